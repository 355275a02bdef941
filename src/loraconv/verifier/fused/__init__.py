"""The proof of a fused model: exactly the base plus the adapters, each number rounded once, nothing else changed."""

from __future__ import annotations

from loraconv.verifier.fused.case import TensorResult, Term
from loraconv.verifier.fused.prove import FusedReport, prove_fused

__all__ = ["FusedReport", "TensorResult", "Term", "prove_fused"]
