"""The singular values of two adapters as charts: one for every module that layers have, over all layers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING

from loraconv.report import html_parts as parts
from loraconv.report.grid import Grid
from loraconv.report.html_parts import Html, short, tag
from loraconv.report.svg import Curves, line_chart
from loraconv.verifier.spectrum import effective_rank

if TYPE_CHECKING:
    from loraconv.verification.evidence import Spectrum

Values = Sequence[float]
Spectra = Mapping[str, "Spectrum"]

#: Singular values are drawn over this many decades at most: what is smaller does nothing.
_MOST_DECADES = 8


def effective(values: Values | None) -> float | None:
    """The effective rank; None where there are no singular values."""
    return effective_rank(values) if values else None


def legend_of_lines(spectra: Spectra) -> Html:
    """What the lines of the charts are."""
    one = [
        tag("span", class_="key"),
        parts.text("A: the median over the layers, in a band from the least to the most."),
    ]
    if all(s.one == s.other for s in spectra.values()):
        return tag("p", *one, " B has the same singular values.", class_="note")
    other = tag("span", class_="key second"), "B: the median, and dotted the least and the most."
    return tag("p", *one, Html("<br>"), *other, class_="note")


def charts(grid: Grid, spectra: Spectra) -> Html:
    """A chart for every column of the grid, all with the same decades."""
    columns: dict[str, list[Spectrum]] = {column: [] for column in grid.columns}
    for (_, column), module in grid.modules.items():
        if module in spectra:
            columns[column].append(spectra[module])
    span = _span(
        [value for group in columns.values() for s in group for side in (s.one, s.other) for value in side or ()]
    )
    made = [_chart(column, group, span) for column, group in columns.items()]
    return parts.group(grid.title, tag("div", *made, class_="charts"))


def _span(values: Values) -> tuple[float, float]:
    """The decades that hold all values above zero, as far as they are worth drawing."""
    sizes = [math.log10(value) for value in values if value > 0] or [0.0]
    high = math.floor(max(sizes)) + 1
    return float(max(min(math.floor(min(sizes)), high - 1), high - _MOST_DECADES)), float(high)


def _chart(column: str, group: Sequence[Spectrum], span: tuple[float, float]) -> Html:
    one, other = [s.one for s in group if s.one], [s.other for s in group if s.other]
    differ = any(s.one != s.other for s in group)
    said = [("A", one), ("B", other)] if differ else [("A and B", one)]
    words = [f"effective rank of {name}: {_spread(list(map(effective_rank, values)))}" for name, values in said]
    caption = tag("figcaption", column, *(tag("small", line) for line in words))
    if not one and not other:
        return tag("figure", caption)
    second = _curves(other) if differ else None
    title = f"Singular values of {column}"
    return tag("figure", caption, line_chart(_curves(one), second, span, title, "; ".join(words)))


def _spread(values: Values) -> str:
    if not values:
        return "none (NaN, Inf or absent)"
    low, middle, high = short(min(values)), short(median(values)), short(max(values))
    return middle if low == high else f"{middle} ({low} to {high})"


def _curves(group: Sequence[Values]) -> Curves:
    """Over the layers, at every place: the least, the median and the greatest. Shorter spectra end in zeros."""
    length = max(map(len, group), default=0)
    places = [[values[at] if at < len(values) else 0.0 for values in group] for at in range(length)]
    return Curves([min(p) for p in places], [median(p) for p in places], [max(p) for p in places])
