"""Convert LoRA checkpoints, prove that the conversion is right, and fuse adapters with the right scale.

The public API is one function a command: :func:`inspect`, :func:`sat2diffusers`, :func:`convert`, :func:`verify`,
:func:`formats`, :func:`demo`, :func:`check_data`, :func:`train`, :func:`fuse`, :func:`unfuse`, :func:`roundtrip`,
:func:`merge`, :func:`resize`, :func:`extract`, :func:`split`. Importing this package loads neither torch nor numpy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from loraconv.catalog import formats
    from loraconv.conversion import ConvertResult, convert, sat2diffusers
    from loraconv.data_check import DataReport, check_data
    from loraconv.demonstration import demo
    from loraconv.describe import Summary, inspect
    from loraconv.errors import LoraconvError
    from loraconv.fusion import FuseResult, fuse
    from loraconv.reshaping import ReshapeResult, extract, merge, resize, split
    from loraconv.roundtripping import RoundtripResult, roundtrip
    from loraconv.training import TrainResult, train
    from loraconv.unfusing import UnfuseResult, unfuse
    from loraconv.verification import VerifyResult, verify

# No module may bear the name of a public function: importing it would put the module in the function's place.
_HOMES = {
    "ConvertResult": "loraconv.conversion",
    "DataReport":    "loraconv.data_check",
    "FuseResult":    "loraconv.fusion",
    "LoraconvError": "loraconv.errors",
    "ReshapeResult": "loraconv.reshaping",
    "RoundtripResult": "loraconv.roundtripping",
    "Summary":       "loraconv.describe",
    "TrainResult":   "loraconv.training",
    "UnfuseResult":  "loraconv.unfusing",
    "VerifyResult":  "loraconv.verification",
    "check_data":    "loraconv.data_check",
    "convert":       "loraconv.conversion",
    "demo":          "loraconv.demonstration",
    "extract":       "loraconv.reshaping",
    "formats":       "loraconv.catalog",
    "fuse":          "loraconv.fusion",
    "inspect":       "loraconv.describe",
    "merge":         "loraconv.reshaping",
    "resize":        "loraconv.reshaping",
    "roundtrip":     "loraconv.roundtripping",
    "sat2diffusers": "loraconv.conversion",
    "split":         "loraconv.reshaping",
    "train":         "loraconv.training",
    "unfuse":        "loraconv.unfusing",
    "verify":        "loraconv.verification",
}  # fmt: skip

__all__ = [
    "ConvertResult",
    "DataReport",
    "FuseResult",
    "LoraconvError",
    "ReshapeResult",
    "RoundtripResult",
    "Summary",
    "TrainResult",
    "UnfuseResult",
    "VerifyResult",
    "__version__",
    "check_data",
    "convert",
    "demo",
    "extract",
    "formats",
    "fuse",
    "inspect",
    "merge",
    "resize",
    "roundtrip",
    "sat2diffusers",
    "split",
    "train",
    "unfuse",
    "verify",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module 'loraconv' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
