"""Numbers of modules as heat maps: an error against its bound, or any size, with the legend that belongs to it."""

from __future__ import annotations

import math
from collections.abc import Mapping

from loraconv.report.grid import Grid
from loraconv.report.html_parts import Html, short, tag
from loraconv.report.svg import Cell, heat_map, legend

#: The error over its bound, in decades, from the darkest colour to the brightest.
_DECADES = (-2, 6)


def error_cell(module: str, equal: bool, error: float, bound: float) -> Cell:
    """The place of a module that is ``equal`` number for number, or has an ``error`` that may be ``bound``."""
    if equal:
        return Cell("=", f"{module}: equal number for number")
    shown = short(error) if math.isfinite(error) else "∞" if error == math.inf else "NaN"
    words = f"{module}: error {shown}, allowed {short(bound)}"
    return Cell(shown, words, _error_level(error, bound), alert=not error <= bound)


def _error_level(error: float, bound: float) -> float:
    if error == 0:
        return 0.0
    low, high = _DECADES
    ratio = error / bound if bound else math.inf
    # What is no number at all is as wrong as can be.
    return (math.log10(ratio) - low) / (high - low) if math.isfinite(ratio) and ratio > 0 else 1.0


def error_map(grid: Grid, cells: Mapping[str, Cell], title: str, note: str) -> Html:
    """A figure of :func:`error_cell` cells. Colour: the error over what is allowed, in fixed decades."""
    low, high = _DECADES
    ticks = [((at - low) / (high - low), "allowed" if at == 0 else f"1e{at}×") for at in range(low, high + 1, 2)]
    drawn = heat_map(grid, cells, f"{title}, {grid.title}", f"{note} The table below has every number.")
    return _figure(title, note, drawn, legend(ticks, "The error over what is allowed"))


def size_map(grid: Grid, values: Mapping[str, float | None], title: str, note: str, top: float | None = None) -> Html:
    """A figure of sizes that are not negative; None is a place without one.

    Colour: from 0 to ``top`` if it is given, else to the greatest; by decades from the smallest if they are far apart.
    """
    sizes = [value for value in values.values() if value is not None and 0 < value < math.inf]
    scale = _Scale(0.0, top) if top else _Scale.around(sizes)
    cells = {
        module: Cell("–", f"{module}: none") if value is None else scale.cell(module, value)
        for module, value in values.items()
    }
    drawn = heat_map(grid, cells, f"{title}, {grid.title}", f"{note} The table below has every number.")
    return _figure(title, f"{note} {scale.words}", drawn, legend(scale.ticks(), title))


class _Scale:
    """From a size to a colour between 0 and 1."""

    def __init__(self, low: float, high: float, by_decades: bool = False) -> None:
        self.low, self.high, self.by_decades = low, high, by_decades
        self.words = "Colour: by decades." if by_decades else "Colour: in proportion."

    @classmethod
    def around(cls, sizes: list[float]) -> _Scale:
        """The smallest scale that holds all sizes; from 0 unless they are of different orders."""
        if not sizes:
            return cls(0.0, 1.0)
        low, high = min(sizes), max(sizes)
        return cls(low, high, by_decades=True) if high > 20 * low else cls(0.0, high)

    def cell(self, module: str, value: float) -> Cell:
        shown = short(value) if math.isfinite(value) else "∞"
        return Cell(shown, f"{module}: {shown}", self.level(value))

    def level(self, value: float) -> float:
        if not math.isfinite(value):
            return 1.0
        if self.by_decades:
            return math.log(value / self.low) / math.log(self.high / self.low) if value > 0 else 0.0
        return value / self.high

    def ticks(self) -> list[tuple[float, str]]:
        places = [0.0, 0.5, 1.0]
        if self.by_decades:
            return [(at, short(self.low * (self.high / self.low) ** at)) for at in places]
        return [(at, short(self.high * at)) for at in places]


def _figure(title: str, note: str, drawn: Html, key: Html) -> Html:
    caption = tag("figcaption", title, tag("small", note))
    return tag("figure", caption, tag("div", drawn, class_="scroll", tabindex="0", role="group", aria_label=title), key)
