"""LLaVA runs: a LoRA of the language model, and beside it what was trained whole (the projector, grown embeddings)."""

from __future__ import annotations

from loraconv.fusion.llava.joining import Joined, join
from loraconv.fusion.llava.run import refuse_projector_only, refuse_unfinished, trained_whole

__all__ = ["Joined", "join", "refuse_projector_only", "refuse_unfinished", "trained_whole"]
