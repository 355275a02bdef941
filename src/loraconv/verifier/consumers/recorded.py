"""Level L3: the real consumer. diffusers loads the converted base and LoRA, and its forward pass is compared with one
that was recorded from the model that trained them.

It imports diffusers (and with it torch and peft), so nothing on the way of a conversion imports it.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class ForwardCheck:
    """Relative L2 errors of diffusers' output: with the LoRA (``live``), and without it (``base``).

    ``effect`` is how much the LoRA changes the recorded output, which tells what an adapter that does nothing would
    score. ``bound`` is the promise that ``live`` keeps.
    """

    live: float
    base: float
    effect: float
    bound: float

    @property
    def passed(self) -> bool:
        return self.live <= self.bound and self.base <= self.bound

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict."""
        return {**asdict(self), "passed": self.passed}


def compare_forward(folder: Path, reference: Path, *, bound: float = 1e-6) -> ForwardCheck:
    """Load ``folder/transformer`` and the LoRA in ``folder`` with diffusers and run the recorded inputs through them.

    For CogVideoX with position tables (2B). ``reference`` holds ``x`` (batch, frames, channels, height, width),
    ``timesteps``, ``context`` and the recorded ``out_base`` and ``out_lora``. SAT's final norm uses eps 1e-6, which no
    diffusers configuration reaches, so it is set on the module.
    """
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    import torch
    from diffusers import CogVideoXTransformer3DModel
    from safetensors.torch import load_file

    recorded = load_file(reference)
    load: Any = CogVideoXTransformer3DModel.from_pretrained
    model = load(folder / "transformer", local_files_only=True).eval()
    model.norm_out.norm.eps = 1e-6

    def run() -> Any:
        with torch.no_grad():
            return model(recorded["x"], recorded["context"], recorded["timesteps"], return_dict=False)[0]

    def distance(one: Any, other: Any) -> float:
        return float((one.double() - other.double()).norm() / other.double().norm())

    plain = run()
    model.load_lora_adapter(folder / "pytorch_lora_weights.safetensors", prefix="transformer")
    return ForwardCheck(
        live=distance(run(), recorded["out_lora"]),
        base=distance(plain, recorded["out_base"]),
        effect=distance(recorded["out_base"], recorded["out_lora"]),
        bound=bound,
    )
