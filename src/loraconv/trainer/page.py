"""The page of a run: its curves, its settings, what had to be said; one file, no script, nothing from elsewhere."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape

from loraconv import __version__
from loraconv.trainer.curves import Point, chart
from loraconv.trainer.loop import Row
from loraconv.trainer.settings import Settings

_STYLE = """
:root{color-scheme:light dark}body{font:15px/1.5 system-ui,sans-serif;max-width:44rem;margin:2rem auto;padding:0 1rem}
svg{width:100%;margin:1rem 0}svg text{font-size:11px;fill:currentColor}.y{text-anchor:end}
polyline{fill:none;stroke-width:1.5}.axes path{stroke:currentColor;stroke-opacity:.2}
.l0{stroke:#2563eb}.l1{stroke:#d97706}.l2{stroke:#059669}.l3{stroke:#9333ea}.l4{stroke:#dc2626}.l5{stroke:#0891b2}
circle.l0{fill:#2563eb}circle.l1{fill:#d97706}tspan{stroke:none}tspan.l0{fill:#2563eb}tspan.l1{fill:#d97706}
tspan.l2{fill:#059669}tspan.l3{fill:#9333ea}tspan.l4{fill:#dc2626}tspan.l5{fill:#0891b2}
pre{overflow:auto;font-size:12px}
"""


def page(rows: Sequence[Row], settings: Settings, notices: Sequence[str]) -> str:
    """HTML with the curves of loss, rate, gradient norm and adapter size over the steps."""
    charts = [
        chart("loss", {"training": column(rows, "loss"), "held out": column(rows, "held_out_loss")}),
        chart("learning rate", {"rate": column(rows, "rate")}),
        chart("gradient norm", {"before clipping": column(rows, "gradient_norm")}, logarithmic=True),
        chart("|delta| / |W|", _ratios(rows), logarithmic=True),
    ]
    said = [*notices, *(f"step {r['step']}: {r['fault']}, {r['where']} ({r['action']})" for r in rows if "fault" in r)]
    items = "".join(f"<li>{escape(text)}</li>" for text in said)
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><title>loraconv train</title>"
        f"<style>{_STYLE}</style><h1>Training run</h1>"
        f"<p>{escape(settings.model.tiny or settings.model.path)}, {settings.kind}, {settings.steps} steps,"
        f" seed {settings.seed}, loraconv {__version__}</p>"
        f"{'<h2>Notices</h2><ul>' + items + '</ul>' if items else ''}{''.join(charts)}"
        f"<h2>Settings</h2><pre>{escape(json.dumps(settings.to_dict(), indent=1))}</pre></html>\n"
    )


def column(rows: Sequence[Row], name: str) -> list[Point]:
    """The points of one number over the steps."""
    return [(row["step"], row[name]) for row in rows if isinstance(row.get(name), int | float)]


def _ratios(rows: Sequence[Row]) -> dict[str, list[Point]]:
    """The first, middle and last block: more lines than that hide each other."""
    blocks = list(next((row["delta_ratio"] for row in rows if row.get("delta_ratio")), {}))
    chosen = dict.fromkeys([*blocks[:1], *blocks[len(blocks) // 2 : len(blocks) // 2 + 1], *blocks[-1:]])
    return {name: [(r["step"], r["delta_ratio"][name]) for r in rows if r.get("delta_ratio")] for name in chosen}
