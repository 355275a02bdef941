"""The page of ``loraconv verify A B``: both sides, heat maps by layer and module, the singular values of the deltas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import PurePath
from typing import TYPE_CHECKING

from loraconv.names import human_bytes
from loraconv.report import html_parts as parts
from loraconv.report.grid import Grid, grids
from loraconv.report.html_parts import Html, number, section, tag
from loraconv.report.html_spectra import charts, effective, legend_of_lines
from loraconv.report.maps import error_cell, error_map, size_map
from loraconv.report.svg import Cell

if TYPE_CHECKING:
    from loraconv.verification.adapters import AdaptersResult
    from loraconv.verification.evidence import HashedFile, Side, Spectrum
    from loraconv.verifier.delta import ModuleResult

Compared = Mapping[str, "ModuleResult"]
Spectra = Mapping[str, "Spectrum"]


def sections(result: AdaptersResult) -> list[Html]:
    """Everything between the findings and the raw data."""
    spectra = {s.module: s for s in result.evidence.spectra} if result.evidence else {}
    compared = {m.module: m for m in result.modules}
    absent = [m for f in result.findings if f.slug in ("missing", "extra") for m in f.modules]
    made = grids(dict.fromkeys([*spectra, *compared, *absent]))
    found = [_summary(result, absent)]
    if result.evidence:
        both = _side("A, the first", result.evidence.one), _side("B, the second", result.evidence.other)
        found.append(section("The two sides", tag("div", *both, class_="columns")))
    found.append(section("By layer and module", *(_maps(grid, compared, spectra) for grid in made)))
    if spectra:
        lines = [charts(grid, spectra) for grid in made]
        found.append(section("Singular values of the delta", legend_of_lines(spectra), *lines))
    if result.magnitudes is not None:
        found.append(section("DoRA magnitudes", parts.nested(asdict(result.magnitudes))))
    return [*found, parts.controls(result.controls)]


def _summary(result: AdaptersResult, absent: Sequence[str]) -> Html:
    apart = [m for m in result.modules if not m.equal]
    wrong = [m for m in apart if not m.same]
    told: list[tuple[str, str]] = [
        ("modules in both", str(len(result.modules))),
        ("equal number for number", str(len(result.modules) - len(apart))),
        ("within what is allowed", str(len(apart) - len(wrong))),
        ("beyond what is allowed", str(len(wrong))),
        ("in only one of them", str(len(absent))),
    ]
    if apart:
        worst = max(wrong or apart, key=lambda m: m.error)
        source = "the dtypes" if result.bound is None else "--bound"
        told += [("relative error at worst", number(worst.error)), (f"allowed there, by {source}", number(worst.bound))]
    return section("In numbers", parts.facts(told, class_="tiles"))


def _side(title: str, side: Side) -> Html:
    told = [
        ("path", parts.code(side.path)),
        ("format", f"{side.format}, {side.container}"),
        ("scale", ", ".join(side.scales)),
        ("rank", ", ".join(map(str, side.ranks))),
        ("dtype", ", ".join(side.dtypes)),
        *(("SHA-256", _file(file)) for file in side.files),
    ]
    return tag("div", tag("h3", title), parts.facts(told, class_="rows"))


def _file(file: HashedFile) -> Html:
    size = tag("span", f" {human_bytes(file.bytes)}", class_="soft")
    return parts.joined([parts.code(PurePath(file.name).name), size, Html("<br>"), parts.digest(file.sha256)])


def _maps(grid: Grid, compared: Compared, spectra: Spectra) -> Html:
    modules = list(grid.modules.values())
    norms = {m: compared[m].norm if m in compared else None for m in modules}
    note = "Colour: error over what is allowed, outlined if beyond. =: equal number for number."
    figures = [
        error_map(grid, {m: _cell(m, compared, spectra) for m in modules}, "Relative error", note),
        size_map(grid, norms, "Norm of the delta", "Frobenius norm of A's scale × up × down."),
    ]
    longest = max((len(s.one) for s in spectra.values() if s.one), default=0)
    if longest:
        ranks = {m: effective(spectra[m].one) if m in spectra else None for m in modules}
        note = f"Of A: how many of its {longest} directions carry the delta."
        figures.append(size_map(grid, ranks, "Effective rank", note, float(longest)))
    return parts.group(grid.title, tag("div", *figures, class_="maps"), _numbers(grid, compared, spectra))


def _cell(module: str, compared: Compared, spectra: Spectra) -> Cell:
    if module in compared:
        found = compared[module]
        return error_cell(module, found.equal, found.error, found.bound)
    only = "A" if module in spectra and spectra[module].one is not None else "B"
    return Cell(f"{only} only", f"{module}: only {only} has it", alert=True)


def _numbers(grid: Grid, compared: Compared, spectra: Spectra) -> Html:
    head = ["module", "same", "error", "allowed", "norm of A"]
    head += ["effective rank A", "B", "largest σ A", "B", "smallest σ A", "B"] if spectra else []
    rows = [_row(module, compared.get(module), spectra.get(module)) for module in grid.modules.values()]
    return parts.details(
        f"All numbers ({len(rows)} modules)", parts.table(head, rows, "Every module (σ: singular value)")
    )


def _row(module: str, found: ModuleResult | None, spectrum: Spectrum | None) -> list[str]:
    row: list[str] = [parts.code(module)]
    if found is None:
        row += ["absent", *[number(None)] * 3]
    else:
        how = "equal" if found.equal else "yes" if found.same else "NO"
        row += [how, number(found.error), number(found.bound), number(found.norm)]
    if spectrum is not None:
        sides = spectrum.one, spectrum.other
        row += [number(effective(values)) for values in sides]
        row += [number(pick(values) if values else None) for pick in (max, min) for values in sides]
    return row
