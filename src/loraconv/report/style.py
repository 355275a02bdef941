"""The report's style sheet: light and dark by the reader's own setting, from a phone's width to a desk's, and on paper.

The colours of heat maps are viridis (S. van der Walt and N. Smith, matplotlib, CC0): lightness rises evenly from h0 to
h20, also for the colour-blind and in grey. Text in a cell is black or white, whichever stands out more.
"""

from __future__ import annotations

VIRIDIS = (
    "440154", "471365", "482475", "463480", "414487", "3b528b", "355f8d",
    "2f6c8e", "2a788e", "25848e", "21918c", "1e9c89", "22a884", "2fb47c",
    "44bf70", "5ec962", "7ad151", "9bd93c", "bddf26", "dfe318", "fde725",
)  # fmt: skip

_LIGHT = """color-scheme: light; --page: #f6f7f9; --card: #fff; --text: #1a1e24; --soft: #596273; --rule: #d5dae2;
--good: #0a6638; --good-card: #e2f4e9; --bad: #a3160f; --bad-card: #fdeae8; --one: #1b5fa8; --other: #b04a00;
--bare: #e9ecf1; --alert: #d3180c"""

_DARK = """color-scheme: dark; --page: #13161a; --card: #1b1f25; --text: #e4e7eb; --soft: #a2abb8; --rule: #353c47;
--good: #74d8a0; --good-card: #12301f; --bad: #ff9c8e; --bad-card: #3d1714; --one: #6fb4f5; --other: #f4a45c;
--bare: #2a3039; --alert: #ff5a48"""

_RULES = """
* { box-sizing: border-box }
html { -webkit-text-size-adjust: 100% }
body { margin: 0; background: var(--page); color: var(--text); font: 15px/1.5 system-ui, sans-serif }
header, main, footer { max-width: 1120px; margin: 0 auto; padding: 0 20px }
h1 { margin: 0; font-size: 1.5rem; line-height: 1.25; overflow-wrap: anywhere }
h2 { margin: 0 0 12px; font-size: 1.1rem; line-height: 1.3 }
h3 { margin: 0 0 8px; font-size: .95rem; line-height: 1.3; overflow-wrap: anywhere }
p { margin: 0 0 10px; max-width: 75ch }
a { color: var(--one) }
code, pre, td data { font-family: ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; font-size: .86em }
code { overflow-wrap: anywhere }
pre { margin: 0; padding: 10px 12px; border-radius: 6px; background: var(--page); white-space: pre-wrap;
  overflow-wrap: anywhere }
.lines { margin: 0; padding-left: 1.1em; overflow-wrap: anywhere }
.lines li { margin-bottom: 3px }
.kicker { margin: 20px 0 8px; color: var(--soft); font-size: .9rem; overflow-wrap: anywhere }
.verdict { display: flex; gap: 14px; align-items: flex-start; padding: 16px 18px; border-radius: 10px;
  border: 1px solid; border-left-width: 8px }
.verdict .sign { font-size: 1.5rem; line-height: 1.25; font-weight: 700 }
.verdict p { margin: 4px 0 0; max-width: none; overflow-wrap: anywhere }
.yes { color: var(--good); background: var(--good-card) }
.no { color: var(--bad); background: var(--bad-card) }
.verdict p { color: var(--text) }
section { margin: 16px 0; padding: 16px 18px; border: 1px solid var(--rule); border-radius: 10px;
  background: var(--card) }
dl { margin: 0; display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 10px 18px }
dl > div { min-width: 0 }
dt { color: var(--soft); font-size: .85rem }
dd { margin: 0; overflow-wrap: anywhere }
.tiles { grid-template-columns: repeat(auto-fill, minmax(120px, 1fr)); gap: 14px 16px }
.tiles > div { display: flex; flex-direction: column-reverse; justify-content: flex-end }
.tiles dd { font-size: 1.3rem; line-height: 1.3; font-weight: 600; font-variant-numeric: tabular-nums }
dl.rows { display: block }
dl.rows > div { display: grid; grid-template-columns: 92px 1fr; gap: 12px; padding: 4px 0;
  border-top: 1px solid var(--rule) }
dl.rows > div:first-child { border-top: 0 }
dl.rows dt { padding-top: 1px }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)); gap: 20px 28px }
.columns > * { min-width: 0 }
.maps { display: flex; flex-wrap: wrap; gap: 20px 24px }
.maps figure { max-width: 100% }
.maps figcaption { width: 0; min-width: 100% }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 236px), 1fr)); gap: 18px 16px }
.charts figure { display: flex; flex-direction: column; justify-content: space-between }
.group + .group { margin-top: 22px }
figure { margin: 0; min-width: 0 }
figcaption { margin-bottom: 6px; font-weight: 600 }
.soft { color: var(--soft) }
figcaption small, .note { display: block; font-weight: 400; font-size: .85rem; color: var(--soft) }
.finding { padding: 12px 0; border-top: 1px solid var(--rule) }
.finding:first-of-type { padding-top: 0; border-top: 0 }
.finding:last-child { padding-bottom: 0 }
.finding p { overflow-wrap: anywhere; max-width: none }
.slug { display: inline-block; margin-right: 8px; padding: 0 8px; border-radius: 4px; font-size: .85rem;
  font-weight: 600 }
.scroll { overflow-x: auto; max-width: 100% }
.scroll:focus-visible, pre:focus-visible, summary:focus-visible { outline: 2px solid var(--one); outline-offset: 2px }
details .scroll, details pre { max-height: 80vh; overflow: auto }
details thead th { position: sticky; top: 0; background: var(--card) }
tbody th code { white-space: nowrap }
table { border-collapse: collapse; font-size: .88rem; min-width: 100%; overflow-wrap: normal }
caption { text-align: left; padding: 0 0 6px; color: var(--soft); font-size: .85rem }
th, td { padding: 3px 12px 3px 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--rule) }
thead th { color: var(--soft); font-weight: 600; white-space: nowrap; vertical-align: bottom }
tbody th { font-weight: 400 }
td { font-variant-numeric: tabular-nums }
td data { white-space: nowrap }
dl.rows + .scroll, details { margin-top: 14px }
details details { margin-top: 6px }
summary { cursor: pointer; color: var(--one); padding: 2px 0 }
details[open] > summary { margin-bottom: 8px }
footer { color: var(--soft); font-size: .85rem; padding-bottom: 28px }
svg { display: block; max-width: 100%; height: auto; overflow: visible }
svg text { fill: var(--soft); font: 11px ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace }
.mid, .cell text { text-anchor: middle }
.end { text-anchor: end }
.bare { fill: var(--bare) }
.cell.bare text { fill: var(--soft) }
.alert { fill: none; stroke: var(--alert); stroke-width: 2.5 }
.tick, .rule { stroke: var(--rule); fill: none }
.band { fill: var(--one); opacity: .2 }
.line { fill: none; stroke-width: 1.8; stroke-linejoin: round }
.thin { stroke-width: 1 }
.one { stroke: var(--one) }
.other { stroke: var(--other); stroke-dasharray: 5 3 }
.other.thin { stroke-dasharray: 1 3 }
.key { display: inline-block; width: 26px; height: 0; margin: 0 6px 4px 0; border-top: 2px solid var(--one) }
.key.second { border-top: 2px dashed var(--other) }
@media (max-width: 480px) {
  header, main, footer { padding: 0 12px }
  section, .verdict { padding: 14px 12px }
  dl.rows > div { grid-template-columns: 1fr; gap: 0 }
  .charts svg { width: 100% }
}
@media print {
  html { font-size: 12px }
  body { font-size: 11px; background: #fff }
  h2, h3, .note { break-after: avoid }
  section { break-inside: auto; border-color: #bbb }
  figure, .finding { break-inside: avoid }
  details .scroll, details pre { max-height: none }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact }
}
"""


def style_sheet() -> str:
    """The whole style sheet. On paper the light colours hold."""
    dark = f"@media screen and (prefers-color-scheme: dark) {{ :root {{ {_DARK} }} }}"
    return f":root {{ {_LIGHT} }}\n{dark}\n{_cells()}{_RULES}"


def _cells() -> str:
    rules = [f".h{n} {{ fill: #{colour} }} .h{n} text {{ fill: {_ink(colour)} }}" for n, colour in enumerate(VIRIDIS)]
    return "\n".join(rules)


def _ink(colour: str) -> str:
    """Black or white, whichever has the greater contrast with a colour (WCAG 2.2, relative luminance)."""
    red, green, blue = (_linear(int(colour[at : at + 2], 16) / 255) for at in (0, 2, 4))
    luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    return "#000" if (luminance + 0.05) / 0.05 > 1.05 / (luminance + 0.05) else "#fff"


def _linear(value: float) -> float:
    return value / 12.92 if value <= 0.04045 else float(((value + 0.055) / 1.055) ** 2.4)
