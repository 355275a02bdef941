"""LLaVA runs: a LoRA of the language model, and beside it what was trained whole (the projector, grown embeddings)."""

from __future__ import annotations

from loraconv.fusion.llava.hf import HfLlava, open_hf
from loraconv.fusion.llava.run import (
    Run,
    one_dtype,
    open_run,
    refuse_projector_only,
    refuse_unfinished,
    run_notices,
    trained_whole,
)

__all__ = [
    "HfLlava",
    "Run",
    "one_dtype",
    "open_hf",
    "open_run",
    "refuse_projector_only",
    "refuse_unfinished",
    "run_notices",
    "trained_whole",
]
