"""The text of ``loraconv verify --base BASE ADAPTER FUSED``: the weights folded by projection."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from loraconv.names import printable
from loraconv.verifier.fused import FusedReport, TensorResult
from loraconv.verifier.fused.figures import Figures

if TYPE_CHECKING:
    from loraconv.verification.fused import FusedResult

#: The share of the delta below which the rounding has taken what a user would miss.
_WEAK = 0.5


def verdict(result: FusedResult) -> str:
    bound = result.subject.bound
    if not result.same:
        return "NOT the base plus the adapter"
    if bound is not None:
        return f"the base plus the adapter, within the bound given ({bound:g})"
    return "the base plus the adapter: every weight rounded once, and everything else untouched"


def lines(result: FusedResult) -> list[str]:
    report = result.report
    groups: dict[str, list[TensorResult]] = {}
    for tensor in report.tensors:
        groups.setdefault(re.sub(r"\.\d+\.", ".{}.", tensor.module, count=1), []).append(tensor)
    made = [_line(name, tensors) for name, tensors in groups.items()]
    untouched = next(check for check in report.proof.checks if check.level == "L1")
    made.append(f"  untouched: {untouched.count} tensors, {untouched.detail or 'none changed'}")
    made += _kept(report, result.subject.dtype)
    made.append(f"  controls caught {report.proof.caught}")
    return made + ([] if result.same else [f"failed  {failure}" for failure in report.proof.failures()])


def _line(name: str, tensors: Sequence[TensorResult]) -> str:
    total = sum((tensor.figures for tensor in tensors), Figures())
    nearest = 1 - total.misrounded / max(1, total.elements)
    good = sum(tensor.same for tensor in tensors)
    return (
        f"  {printable(name)}: {good}/{len(tensors)} right; {_percent(nearest)} of the numbers are the nearest,"
        f" none more than {total.ulps:.3g} units in the last place away"
    )


def _percent(share: float) -> str:
    """Never rounded up to 100 %."""
    return "100 %" if share == 1 else f"{min(share * 100, 99.9999):.6g} %"


def _kept(report: FusedReport, dtype: str | None) -> Iterator[str]:
    kept, total = report.kept, report.total
    if kept is None:
        return
    moved = total.changed / max(1, total.elements)
    yield f"  kept {kept:.1%} of the delta after rounding; {moved:.1%} of the numbers moved"
    if kept < _WEAK and all(tensor.same for tensor in report.tensors):
        yield (
            f"notice  the adapter is so weak that rounding to {dtype or 'the dtype of the base'} swallows most of it;"
            " fused with --dtype fp32, or not fused at all, it would have its full effect"
        )
