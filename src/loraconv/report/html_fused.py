"""The page of ``loraconv verify --base``: the checks, and heat maps of distance, delta and what the rounding left."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from loraconv.report import html_parts as parts
from loraconv.report.grid import Grid, grids
from loraconv.report.html_parts import Html, number, section, tag
from loraconv.report.maps import error_cell, error_map, size_map
from loraconv.report.svg import Cell

if TYPE_CHECKING:
    from loraconv.verification.fused import FusedResult
    from loraconv.verifier.fused import TensorResult

Tensors = Mapping[str, "TensorResult"]


def sections(result: FusedResult) -> list[Html]:
    """Everything between the findings and the raw data."""
    tensors = {tensor.module: tensor for tensor in result.report.tensors}
    maps = [_maps(grid, tensors, result.subject.bound) for grid in grids(tensors)]
    return [
        _summary(result),
        _subject(result),
        section("By layer and module", *maps),
        _checks(result),
        parts.controls(result.report.proof.controls),
    ]


def _summary(result: FusedResult) -> Html:
    report = result.report
    wrong = sum(not tensor.same for tensor in report.tensors)
    told: list[tuple[str, str]] = [
        ("weights with an adapter", str(len(report.tensors))),
        ("right", str(len(report.tensors) - wrong)),
        ("wrong", str(wrong)),
        ("units in the last place at most", number(report.total.ulps)),
        ("of the delta is left after rounding", "–" if report.kept is None else f"{report.kept:.1%}"),
        ("numbers moved", f"{report.total.changed / max(1, report.total.elements):.1%}"),
    ]
    return section("In numbers", parts.facts(told, class_="tiles"))


def _subject(result: FusedResult) -> Html:
    subject = result.subject
    adapters = [parts.joined([parts.code(path), parts.text(f" at strength {s}")]) for path, s in subject.adapters]
    told: list[tuple[str, str]] = [
        ("base", parts.code(subject.base)),
        *(("adapter", adapter) for adapter in adapters),
        ("fused", parts.code(subject.fused)),
        ("dtype", subject.dtype or "that of the base"),
    ]
    return section("What was compared", parts.facts(told, class_="rows"))


def _maps(grid: Grid, tensors: Tensors, bound: float | None) -> Html:
    modules = list(grid.modules.values())
    title, note = "Units in the last place", "Furthest from the exact sum; 1 is allowed. Outlined: wrong."
    if bound is not None:
        title, note = "Relative error of the delta", "Colour: error over what is allowed. Outlined: beyond."
    norms = {module: math.sqrt(tensors[module].figures.size) for module in modules}
    kept = {module: tensors[module].figures.kept for module in modules}
    figures = [
        error_map(grid, {module: _cell(tensors[module], bound) for module in modules}, title, note),
        size_map(grid, norms, "Norm of the delta", "Frobenius norm of what the adapters add."),
        size_map(grid, kept, "Delta left", "The share of it that the rounding to the dtype leaves.", 1.0),
    ]
    return parts.group(grid.title, tag("div", *figures, class_="maps"), _numbers(grid, tensors))


def _cell(tensor: TensorResult, bound: float | None) -> Cell:
    """By the greatest distance from the exact sum, of which one unit is allowed, or by the user's own bound."""
    figures = tensor.figures
    error, allowed = (figures.ulps, 1.0) if bound is None else (figures.error, bound)
    cell = error_cell(tensor.module, False, error, allowed)
    words = f"{cell.words}; {figures.misrounded} of {figures.elements} numbers are not the nearest"
    return replace(cell, words=words, alert=not tensor.same)


def _numbers(grid: Grid, tensors: Tensors) -> Html:
    head = [
        "weight",
        "right",
        "numbers",
        "moved",
        "not the nearest",
        "wrong",
        "NaN or Inf",
        "units",
        "error",
        "delta left",
    ]
    rows = [_row(tensors[module]) for module in grid.modules.values()]
    caption = "Every weight (units: in the last place, at most; error: relative, of the delta)"
    return parts.details(f"All numbers ({len(rows)} weights)", parts.table(head, rows, caption))


def _row(tensor: TensorResult) -> list[str]:
    figures = tensor.figures
    counts = figures.elements, figures.changed, figures.misrounded, figures.wrong, figures.nonfinite
    sizes = figures.ulps, figures.error, figures.kept
    return [
        parts.code(tensor.name),
        "yes" if tensor.same else "NO",
        *(number(count, str(count)) for count in counts),
        *map(number, sizes),
    ]


def _checks(result: FusedResult) -> Html:
    rows = [
        (f"{check.level} {check.name}", "holds" if check.passed else "FAILS", str(check.count), check.detail or "–")
        for check in result.report.proof.checks
    ]
    return section("Checks", parts.table(("check", "result", "of", "detail"), rows, "What was proved"))
