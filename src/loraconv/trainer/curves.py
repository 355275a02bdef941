"""Line charts as inline SVG: a few hundred points, an axis on either side, readable in light and dark, no script."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

Point = tuple[float, float]
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 640, 200, 64, 24, 8


def chart(title: str, lines: Mapping[str, Sequence[Point]], *, logarithmic: bool = False) -> str:
    """An SVG of the lines by name; points that are not finite (or not above 0, with ``logarithmic``) are left out."""
    shown = {name: _shown(points, logarithmic) for name, points in lines.items()}
    shown = {name: points for name, points in shown.items() if points}
    if not shown:
        return ""
    xs = [x for points in shown.values() for x, _ in points]
    ys = [y for points in shown.values() for _, y in points]
    box = (min(xs), max(max(xs), min(xs) + 1), *_spread(min(ys), max(ys)))
    drawn = "".join(_line(points, box, number) for number, points in enumerate(shown.values()))
    names = " ".join(f'<tspan class="l{n}">{escape(name)}</tspan>' for n, name in enumerate(shown))
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT + 20}" role="img" aria-label="{escape(title)}">'
        f'<text x="{_LEFT}" y="14">{escape(title)}: {names}</text>{_axes(box, logarithmic)}{drawn}</svg>'
    )


def _shown(points: Sequence[Point], logarithmic: bool) -> list[Point]:
    kept = [(x, y) for x, y in points if math.isfinite(y) and (y > 0 or not logarithmic)]
    return [(x, math.log10(y)) for x, y in kept] if logarithmic else kept


def _spread(low: float, high: float) -> tuple[float, float]:
    room = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    return low - room, high + room


def _place(point: Point, box: tuple[float, float, float, float]) -> Point:
    x0, x1, y0, y1 = box
    across = _LEFT + (point[0] - x0) / (x1 - x0) * (_WIDTH - _LEFT - 8)
    return across, 20 + _TOP + (1 - (point[1] - y0) / (y1 - y0)) * (_HEIGHT - _BOTTOM - _TOP)


def _line(points: list[Point], box: tuple[float, float, float, float], number: int) -> str:
    placed = [_place(p, box) for p in points]
    if len(placed) == 1:
        return f'<circle class="l{number}" cx="{placed[0][0]:.1f}" cy="{placed[0][1]:.1f}" r="3"/>'
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
    return f'<polyline class="l{number}" points="{path}"/>'


def _axes(box: tuple[float, float, float, float], logarithmic: bool) -> str:
    x0, x1, y0, y1 = box
    made = []
    for share in (0.0, 0.5, 1.0):
        y = y0 + share * (y1 - y0)
        _, at = _place((x0, y), box)
        shown = f"{10**y if logarithmic else y:.3g}"
        made.append(
            f'<path d="M{_LEFT},{at:.1f}H{_WIDTH - 8}"/><text x="{_LEFT - 6}" y="{at + 4:.1f}" class="y">{shown}</text>'
        )
    for x, anchor in ((x0, "start"), (x1, "end")):
        across, _ = _place((x, y0), box)
        made.append(f'<text x="{across:.1f}" y="{_HEIGHT + 14}" text-anchor="{anchor}">{x:.0f}</text>')
    return f'<g class="axes">{"".join(made)}</g>'
