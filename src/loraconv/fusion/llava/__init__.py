"""LLaVA runs: a LoRA of the language model, and beside it what was trained whole (the projector, grown embeddings)."""

from __future__ import annotations

from loraconv.fusion.llava.run import Run, one_dtype, open_run, refuse_projector_only

__all__ = ["Run", "one_dtype", "open_run", "refuse_projector_only"]
