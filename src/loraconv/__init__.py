"""Convert LoRA checkpoints, prove that the conversion is right, and fuse adapters with the right scale.

The public API is one function a command: :func:`inspect`, :func:`sat2diffusers`, :func:`convert`, :func:`verify`,
:func:`formats`, :func:`demo`. Importing this package loads neither torch nor numpy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from loraconv.catalog import formats
    from loraconv.conversion import ConvertResult, convert, sat2diffusers
    from loraconv.demonstration import demo
    from loraconv.describe import Summary, inspect
    from loraconv.errors import LoraconvError
    from loraconv.verification import VerifyResult, verify

# No module may bear the name of a public function: importing it would put the module in the function's place.
_HOMES = {
    "ConvertResult": "loraconv.conversion",
    "LoraconvError": "loraconv.errors",
    "Summary":       "loraconv.describe",
    "VerifyResult":  "loraconv.verification",
    "convert":       "loraconv.conversion",
    "demo":          "loraconv.demonstration",
    "formats":       "loraconv.catalog",
    "inspect":       "loraconv.describe",
    "sat2diffusers": "loraconv.conversion",
    "verify":        "loraconv.verification",
}  # fmt: skip

__all__ = [
    "ConvertResult",
    "LoraconvError",
    "Summary",
    "VerifyResult",
    "__version__",
    "convert",
    "demo",
    "formats",
    "inspect",
    "sat2diffusers",
    "verify",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module 'loraconv' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
