"""The text of ``loraconv check-data``: what the data is, a table of what is wrong, and how to mend each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from loraconv.names import printable

if TYPE_CHECKING:
    from loraconv.data.problems import Problem
    from loraconv.data_check import DataReport

#: How many samples of one problem, and how many values of one fact, are listed; ``--verbose`` and ``--json`` list all.
_LISTED = 3


def data(result: DataReport, *, verbose: bool = False) -> str:
    """The whole text; ``verbose`` lists every sample of a problem."""
    return "\n".join(_lines(result, verbose))


def _lines(result: DataReport, verbose: bool) -> Iterator[str]:
    yield f"data      {printable(str(result.path), 1000)}  ({result.kind}, {_samples(result.samples)})"
    for fact, counts in result.facts.items():
        yield f"{fact:<10}{_counts(counts)}"
    if result.problems:
        width = max(len(problem.slug) for problem in result.problems)
        yield ""
        yield f"{'':<8} {'problem':<{width}} {'samples':>7}  what"
        for problem in result.problems:
            yield from _problem(problem, width, verbose)
        yield ""
    yield f"verdict   {_verdict(result)}"
    if result.wrote is not None:
        yield f"wrote     {printable(str(result.wrote), 1000)}"


def _problem(problem: Problem, width: int, verbose: bool) -> Iterator[str]:
    from loraconv.data.problems import KINDS

    kind = KINDS[problem.slug]
    severity = "error" if kind.fatal else "warning"
    yield f"{severity:<8} {problem.slug:<{width}} {len(problem.samples):>7}  {kind.what}"
    listed = list(zip(problem.samples, problem.details, strict=True))
    for name, detail in listed if verbose else listed[:_LISTED]:
        yield f"{'':{width + 17}}  {printable(name)}" + (f": {printable(detail)}" if detail else "")
    if not verbose and len(listed) > _LISTED:
        yield f"{'':{width + 17}}  and {len(listed) - _LISTED} more"
    yield f"{'':{width + 17}}  mend: {kind.mend}"


def _counts(counts: dict[str, int]) -> str:
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    shown = [f"{printable(value)} ({count})" for value, count in ordered[:_LISTED]]
    return ", ".join(shown) + (f", and {len(ordered) - _LISTED} more" if len(ordered) > _LISTED else "")


def _verdict(result: DataReport) -> str:
    warned = sum(not problem.fatal for problem in result.problems)
    notes = f"; {warned} kinds of warning" if warned > 1 else "; 1 kind of warning" if warned else ""
    if result.fine:
        return f"every sample can be trained on{notes}"
    return f"{result.good} of {_samples(result.samples)} can be trained on{notes}"


def _samples(count: int) -> str:
    return f"{count} sample" if count == 1 else f"{count} samples"
