"""Add adapters to the weights of a base model, prove the result, and leave nothing behind if the proof fails."""

from __future__ import annotations

from loraconv.fusion.fusing import fuse
from loraconv.fusion.result import FuseResult

__all__ = ["FuseResult", "fuse"]
