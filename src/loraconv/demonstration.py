"""The main job on a checkpoint that ships with loraconv: inspect it, convert it, prove it.

The checkpoint was written by the real SAT + DeepSpeed training code (tiny sizes, two training steps), and the real
model's forward pass was recorded beside it; ``fixtures/README.md`` tells how.
"""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from loraconv.conversion import ConvertResult, sat2diffusers
from loraconv.describe import Summary, inspect
from loraconv.errors import ProofFailed
from loraconv.verifier.consumers.recorded import ForwardCheck, compare_forward

#: The package that ``fixtures/sat/cogvideox-2b-t2v`` installs as.
_PACKAGE = "loraconv.demo_run"


@dataclass(frozen=True, slots=True)
class DemoResult:
    """What the demonstration found, converted and proved."""

    inspected: Summary
    converted: ConvertResult
    forward: ForwardCheck

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict (schema 1)."""
        return {
            "schema": 1,
            "inspected": self.inspected.to_dict(),
            "converted": self.converted.to_dict(),
            "forward": self.forward.to_dict(),
        }


def demo(*, out: str | Path | None = None) -> DemoResult:
    """Inspect the shipped SAT run, convert LoRA and base, load both in diffusers, compare with the recorded output.

    ``out`` keeps the converted files there; None uses a temporary folder. Raises what :func:`sat2diffusers` raises.
    """
    with ExitStack() as stack:
        shipped = stack.enter_context(as_file(files(_PACKAGE)))
        run = next((shipped / "ckpts").iterdir())
        target = Path(out) if out is not None else Path(stack.enter_context(tempfile.TemporaryDirectory())) / "demo"
        converted = sat2diffusers(run, out=target, what="all")
        forward = compare_forward(target, shipped / "reference.safetensors")
        if not forward.passed:
            raise ProofFailed(
                f"diffusers' output differs from the recorded one by {forward.live:.1e} (bound {forward.bound:.0e})",
                hint="please report this, with the versions of torch, diffusers and peft",
            )
        return DemoResult(inspect(run), converted, forward)
