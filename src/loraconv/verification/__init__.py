"""Prove that two checkpoints are the same, and say in which way they are not.

One module for each kind of comparison; the mathematics is in ``loraconv.verifier``, which knows no converter.
"""

from __future__ import annotations

from pathlib import Path

from loraconv.errors import UsageError
from loraconv.verification.result import VerifyResult

__all__ = ["VerifyResult", "verify"]


def verify(*paths: str | Path, alpha: float | None = None, bound: float | None = None) -> VerifyResult:
    """Compare two adapters, or, with one path alone, a converted folder or file with the record beside it.

    ``alpha`` is that of the first adapter where its files do not say it; ``bound`` replaces the relative error that the
    dtypes allow. Raises :class:`FormatError` where the two cannot be compared, and what opening them raises.
    """
    if bound is not None and not bound >= 0:
        raise UsageError(f"--bound must not be negative, and is {bound}", hint="--bound 1e-6")
    if len(paths) == 1:
        from loraconv.verification.record import verify_record

        if alpha is not None or bound is not None:
            raise UsageError("--alpha and --bound need two checkpoints", hint="loraconv verify A B")
        return verify_record(Path(paths[0]))
    if len(paths) != 2:
        raise UsageError(f"two checkpoints are compared, and {len(paths)} are named", hint="loraconv verify A B")
    from loraconv.verification.adapters import verify_adapters

    return verify_adapters(*paths, alpha=alpha, bound=bound)
