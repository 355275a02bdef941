"""Adapters made of others, or of models: merged, resized, extracted, split; each is proved before it is there."""

from __future__ import annotations

from loraconv.reshaping.extracting import extract
from loraconv.reshaping.resizing import resize
from loraconv.reshaping.result import ReshapeResult
from loraconv.reshaping.splitting import split
from loraconv.reshaping.summing import merge

__all__ = ["ReshapeResult", "extract", "merge", "resize", "split"]
