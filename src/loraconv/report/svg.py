"""Heat maps, their legends and line charts as inline SVG: text in every cell, so that colour never stands alone.

Colours are classes (``h0`` to ``h20``, see ``style``) and labels take the page's colour, so that one drawing serves
light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loraconv.names import printable
from loraconv.report.grid import Grid
from loraconv.report.html_parts import Html, joined, short, tag

#: Colours of a heat map, h0 to h20.
LEVELS = 21

_ROW, _CHARACTER = 17, 6.7


@dataclass(frozen=True, slots=True)
class Cell:
    """One place of a heat map: ``level`` from 0 to 1 (None: no colour), the text in it, and all of it in words."""

    text: str
    words: str
    level: float | None = None
    alert: bool = False


def heat_map(grid: Grid, cells: Mapping[str, Cell], title: str, description: str) -> Html:
    """A map of the grid's modules; where it has none, the place stays empty."""
    rows, columns = [clipped(name) for name in grid.rows], [clipped(name) for name in grid.columns]
    left = _CHARACTER * max(map(len, rows)) + 10
    widest = max(len(cells[module].text) for module in grid.modules.values())
    width = max(_CHARACTER * widest + 10, 70 if len(columns) < 5 else 44)
    longest = _CHARACTER * max(map(len, columns))
    top = 20 if longest <= width else longest + 8
    parts = [
        *(_heading(name, left + (n + 0.5) * width, top - 6, longest > width) for n, name in enumerate(columns)),
        *(_label(name, left - 6, top + (n + 0.7) * _ROW) for n, name in enumerate(rows)),
    ]
    across = {name: left + n * width for n, name in enumerate(grid.columns)}
    down = {name: top + n * _ROW for n, name in enumerate(grid.rows)}
    for (row, column), module in grid.modules.items():
        parts += [Html("\n"), _cell(cells[module], across[column], down[row], width)]
    return _picture(parts, left + len(columns) * width + 2, top + len(rows) * _ROW + 2, title, description)


def clipped(name: str) -> str:
    """A name that is short enough for a label; the tables have it whole."""
    shown = printable(name)
    return shown if len(shown) <= 30 else f"{shown[:14]}…{shown[-15:]}"


def _heading(name: str, x: float, y: float, turned: bool) -> Html:
    if turned:
        return tag("text", name, transform=f"translate({x + 4:g} {y:g}) rotate(-90)")
    return tag("text", name, x=f"{x:g}", y=f"{y:g}", class_="mid")


def _label(name: str, x: float, y: float) -> Html:
    return tag("text", name, x=f"{x:g}", y=f"{y:g}", class_="end")


def _cell(cell: Cell, x: float, y: float, width: float) -> Html:
    colour = "bare" if cell.level is None else f"h{round(min(max(cell.level, 0.0), 1.0) * (LEVELS - 1))}"
    box = {"x": f"{x + 0.5:g}", "y": f"{y + 0.5:g}", "width": f"{width - 1:g}", "height": f"{_ROW - 1:g}"}
    marks = [tag("rect", **box, class_="alert")] if cell.alert else []
    inside = tag("text", cell.text, x=f"{x + width / 2:g}", y=f"{y + _ROW * 0.72:g}")
    return tag("g", tag("title", cell.words), tag("rect", **box), inside, *marks, class_=f"cell {colour}")


def legend(ticks: Sequence[tuple[float, str]], title: str) -> Html:
    """The colours from 0 to 1, with numbers at some of them."""
    step, left = 11.5, 30.0
    boxes = [
        tag("rect", x=f"{left + n * step:g}", y="2", width=f"{step:g}", height="12", class_=f"h{n}")
        for n in range(LEVELS)
    ]
    length = step * LEVELS
    marks = [
        joined(
            [
                tag("path", d=f"M{left + at * length:g} 14v4", class_="tick"),
                tag("text", name, x=f"{left + at * length:g}", y="30", class_="mid"),
            ]
        )
        for at, name in ticks
    ]
    said = ", ".join(name for _, name in ticks)
    return _picture([*boxes, *marks], left * 2 + length, 34, title, f"From dark to bright: {said}.")


@dataclass(frozen=True, slots=True)
class Curves:
    """Curves over the same places: the middle one, and the lowest and highest at every place."""

    low: Sequence[float]
    middle: Sequence[float]
    high: Sequence[float]


def line_chart(one: Curves, other: Curves | None, span: tuple[float, float], title: str, description: str) -> Html:
    """Curves over 1, 2, ... on a logarithmic scale of the decades ``span``: a band and its middle, the other dashed."""
    count = max(len(one.middle), len(other.middle) if other else 0)
    plot = _Plot(count, span)
    parts = plot.axes()
    if one.middle:
        parts += [plot.band(one), plot.line(one.middle, "one")]
    if other is not None and other.middle:
        kinds = (other.low, "other thin"), (other.high, "other thin"), (other.middle, "other")
        parts += [plot.line(values, kind) for values, kind in kinds]
    return _picture(parts, _Plot.WIDTH, _Plot.HEIGHT, title, description)


class _Plot:
    """A frame in which the numbers 1 to ``count`` run to the right, and decades upwards."""

    WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 252, 168, 40, 8, 8, 22

    def __init__(self, count: int, span: tuple[float, float]) -> None:
        self.count, self.span = count, span

    def x(self, place: float) -> float:
        return self.LEFT + (self.WIDTH - self.LEFT - self.RIGHT) * ((place - 1) / max(self.count - 1, 1))

    def y(self, value: float) -> float:
        low, high = self.span
        decade = max(math.log10(value), low) if value > 0 else low
        return self.TOP + (self.HEIGHT - self.TOP - self.BOTTOM) * (high - decade) / (high - low)

    def axes(self) -> list[Html]:
        low, high = self.span
        step = max(1, math.ceil((high - low) / 6))
        parts = []
        for decade in range(math.ceil(low), math.floor(high) + 1, step):
            y = self.y(10.0**decade)
            parts.append(tag("path", d=f"M{self.LEFT} {y:.1f}H{self.WIDTH - self.RIGHT}", class_="rule"))
            parts.append(_label(short(10.0**decade) if -3 < decade < 4 else f"1e{decade}", self.LEFT - 5, y + 4))
        for place in sorted({1, (self.count + 1) // 2, self.count}):
            parts.append(tag("text", str(place), x=f"{self.x(place):.1f}", y=f"{self.HEIGHT - 6}", class_="mid"))
        return parts

    def points(self, values: Sequence[float]) -> list[str]:
        return [f"{self.x(n):.1f} {self.y(value):.1f}" for n, value in enumerate(values, 1)]

    def line(self, values: Sequence[float], kind: str) -> Html:
        points = self.points(values)
        # A single point would not show: it becomes a short stroke.
        return tag("path", d="M" + "L".join(points) + ("h3" if len(points) == 1 else ""), class_=f"line {kind}")

    def band(self, curves: Curves) -> Html:
        edge = self.points(curves.high) + self.points(curves.low)[::-1]
        return tag("path", d="M" + "L".join(edge) + "Z", class_="band")


def _picture(parts: Sequence[Html], width: float, height: float, title: str, description: str) -> Html:
    wide, high = math.ceil(width), math.ceil(height)
    return tag(
        "svg",
        tag("title", title),
        tag("desc", description),
        *parts,
        viewBox=f"0 0 {wide} {high}",
        width=wide,
        height=high,
        style=f"min-width: {wide * 0.85:.0f}px",  # smaller text cannot be read: the box around it scrolls
        role="img",
        aria_label=title,
    )
