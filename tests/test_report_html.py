"""The HTML report: whole, self-contained and harmless markup that shows the numbers of the result and no others.

What the numbers must be comes from numpy's singular values of the full product, from hashlib, and from the JSON.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loraconv
from loraconv.cli import run as cli
from loraconv.names import printable
from loraconv.report.grid import grids
from loraconv.report.html import MARK, page
from loraconv.report.html_parts import nested
from loraconv.report.style import VIRIDIS, style_sheet
from loraconv.report.svg import Curves, line_chart
from loraconv.verification.adapters import AdaptersResult, verify_adapters
from loraconv.verification.evidence import Evidence, HashedFile, Side, Spectrum
from loraconv.verification.fused import Fused, FusedResult
from loraconv.verifier.delta import ModuleResult
from loraconv.verifier.diagnosis import Finding
from loraconv.verifier.fused import FusedReport, TensorResult
from loraconv.verifier.fused.figures import Figures
from loraconv.verifier.proof import Check, Control, Proof
from tests.cli_support import launch
from tests.sat_run import RunSpec, build
from tests.test_verify import factors, renamed, rotated, ups, write

VOID = {"meta", "br", "wbr"}
#: What a browser would fetch or run.
ACTIVE = {
    "script",
    "link",
    "img",
    "iframe",
    "object",
    "embed",
    "audio",
    "video",
    "source",
    "base",
    "form",
    "image",
    "use",
}
FETCHING = {"src", "href", "xlink:href", "srcset", "data", "action", "poster", "background", "ping"}


class Page(HTMLParser):
    """A page, read strictly: every element is closed, in order."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[tuple[str, ...], str]] = []
        self.rows: list[list[dict[str, Any]]] = []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"{tag}: an attribute twice"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("th", "td"):
            self.rows[-1].append({"text": "", "values": []})
        elif tag == "data":
            self.rows[-1][-1]["values"].append(json.loads(str(dict(attrs)["value"]))) if "tr" in self.open else None

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        raise AssertionError(f"{tag} is not an element that closes itself")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((tuple(self.open), data))
        if "tr" in self.open and self.rows[-1]:
            self.rows[-1][-1]["text"] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]

    def classes(self, name: str) -> list[str]:
        return [tag for tag, attrs in self.tags if name in (attrs.get("class") or "").split()]

    def inside(self, tag: str) -> str:
        return "".join(text for around, text in self.texts if tag in around)

    def classes_of(self, name: str) -> list[str]:
        """All classes of the one element that has this class."""
        (found,) = [words for _, attrs in self.tags if name in (words := (attrs.get("class") or "").split())]
        return found

    @property
    def json(self) -> dict[str, Any]:
        value: dict[str, Any] = json.loads(self.inside("pre"))
        return value

    def table(self, first: str) -> list[list[dict[str, Any]]]:
        """The rows below the one whose first heading is ``first``, as many cells each."""
        at = next(n for n, row in enumerate(self.rows) if row[0]["text"] == first)
        end = next((n for n in range(at + 1, len(self.rows)) if len(self.rows[n]) != len(self.rows[at])), None)
        return self.rows[at + 1 : end]


def four_digits(value: Any) -> Any:
    """The JSON of a page: its fractions are rounded."""
    if isinstance(value, dict):
        return {key: four_digits(item) for key, item in value.items()}
    if isinstance(value, list):
        return [four_digits(item) for item in value]
    return float(f"{value:.3e}") if isinstance(value, float) else value


def compared(tmp_path: Path, spoil: Callable[[Any], Any] = lambda a: a, layers: int = 3) -> AdaptersResult:
    one = write(tmp_path / "a.safetensors", factors(layers))
    return verify_adapters(one, write(tmp_path / "b.safetensors", spoil(factors(layers))), evidence=True)


def fused_model(bound: float | None = None) -> FusedResult:
    """A verdict on a fused model of two layers, of which one weight is wrong and one adapter adds nothing."""
    right = Figures(elements=100, changed=90, misrounded=1, ulps=0.5, along=3.9, size=4.0, rest=0.01)
    wrong = replace(right, wrong=90, ulps=3e4, along=8.0, rest=4.0)
    figures = {
        "0.attn1.to_q": right,
        "0.attn1.to_k": wrong,
        "1.attn1.to_q": Figures(elements=100),
        "1.attn1.to_k": right,
    }
    tensors = tuple(
        TensorResult(f"transformer_blocks.{name}.weight", f"transformer_blocks.{name}", found is not wrong, found)
        for name, found in figures.items()
    )
    checks = (Check("L1", "untouched", True, 8), Check("L2", "sums", False, 4, detail="not so in one"))
    proof = Proof("fused", checks, (Control("strength doubled", True, "L2"), Control("cut off", False, "")))
    finding = Finding("scale", "twice as strong in it", "loraconv fuse A --base B -o OUT", (tensors[1].name,))
    report = FusedReport(proof, (finding,), tensors, sum(figures.values(), Figures()))
    subject = Fused("base", (("a.safetensors", Fraction(4, 5)),), "fused", None, bound)
    return FusedResult(False, (finding,), subject=subject, report=report)


def swapped(arrays: Any) -> Any:
    return renamed(arrays, ("1.attn1.to_q", "1.attn1.to_k"), ("1.attn1.to_k", "1.attn1.to_q"))


def changed_record(tmp_path: Path) -> Any:
    loraconv.convert(write(tmp_path / "a.safetensors", factors()), out=tmp_path / "out", to="peft")
    with (tmp_path / "out/adapter_config.json").open("a") as file:
        file.write(" ")
    return loraconv.verify(tmp_path / "out")


def states(tmp_path: Path) -> Any:
    before = write(tmp_path / "a.safetensors", factors())
    return loraconv.verify(before=before, after=write(tmp_path / "b.safetensors", ups(factors(), lambda x: x * 2)))


#: A result of every kind of page there is: with sections of its own, and without.
RESULTS: dict[str, Callable[[Path], Any]] = {
    "the same": compared,
    "other factors": lambda path: compared(path, rotated),
    "swapped": lambda path: compared(path, swapped),
    "one missing": lambda path: compared(path, lambda a: {n: x for n, x in a.items() if "1.attn1.to_v" not in n}),
    "not a number": lambda path: compared(path, lambda a: ups(a, lambda x: x + np.nan)),
    "all zero": lambda path: compared(path, lambda a: ups(a, lambda x: x * 0)),
    "one layer": lambda path: compared(path, layers=1),
    "a record": changed_record,
    "two states": states,
    "a fused model": lambda _: fused_model(),
    "a fused model within a bound": lambda _: fused_model(bound=0.01),
}


@pytest.fixture(params=RESULTS)
def result(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    return RESULTS[request.param](tmp_path)


# --- the markup -------------------------------------------------------------------------------------------------------


def test_every_page_is_balanced_and_complete(result: Any) -> None:
    source = page(result)
    made = Page(source)
    assert source.startswith(MARK)
    assert [len(made.all(tag)) for tag in ("html", "head", "body", "header", "main", "h1", "style", "footer")] == [
        1
    ] * 8
    (title,) = [text for around, text in made.texts if around == ("html", "head", "title")]
    assert title.lower().startswith(made.inside("h1").lower())
    assert ("NOT" in made.inside("h1") or "CHANGED" in made.inside("h1")) == (not result.same)
    assert made.inside("header").count("✓" if result.same else "✗") == 1
    assert ("no" in made.classes_of("verdict")) == (not result.same)
    assert all(attrs.get("scope") for attrs in made.all("th"))
    assert len(made.all("table")) == len(made.all("caption"))


def test_every_picture_has_a_title_a_description_and_numbers_that_fit(result: Any) -> None:
    source = page(result)
    for picture in re.findall(r"<svg.*?</svg>", source, re.DOTALL):
        made = Page(picture)
        assert made.tags[1][0] == "title"
        assert made.tags[2][0] == "desc"
        assert made.tags[0][1]["role"] == "img"
        for _, attrs in made.tags:
            for name in ("d", "x", "y", "width", "height", "viewbox", "transform"):
                assert not re.search("nan|inf|None", attrs.get(name) or "")
                assert attrs.get(name) != ""


def test_nothing_is_fetched_or_run(result: Any) -> None:
    source = page(result)
    made = Page(source)
    assert not ACTIVE & {tag for tag, _ in made.tags}
    for tag, attrs in made.tags:
        assert not FETCHING & set(attrs), tag
        assert not [name for name in attrs if name.startswith("on")], tag
    assert not re.search(r"url\(|@import|https?:|javascript:", source)
    (policy,) = [m["content"] for m in made.all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_the_page_holds_the_json_of_its_result(result: Any) -> None:
    assert Page(page(result)).json == four_digits(json.loads(json.dumps(result.to_dict())))


def test_every_finding_is_there_with_what_mends_it(result: Any) -> None:
    said = "".join(text for around, text in Page(page(result)).texts if "pre" not in around)
    for finding in result.findings:
        assert finding.sentence in said
        assert finding.mend in said
    assert result.same or result.findings or result.mode == "record"


def test_the_text_report_is_on_a_page_without_sections_of_its_own(tmp_path: Path) -> None:
    result = changed_record(tmp_path)
    _, settings = result.files
    assert settings.difference
    made = Page(page(result))
    assert f"adapter_config.json: {settings.difference}" in made.inside("ul")
    rows = [[cell["text"] for cell in row] for row in made.table("name")]
    assert rows == [["adapter_model.safetensors", "–"], ["adapter_config.json", settings.difference]]


def test_any_json_becomes_labelled_values_and_tables() -> None:
    names = [*(f"blocks.{n}.to_q" for n in range(3)), "proj_in", "proj_out", "norm"]
    item = {"name": "a", "fine": False, "why": "", "found": {"x": 1.5, "y": None}, "names": names, "none": []}
    source = nested({"what_it_is": "b", "empty": None, "items": [item, {**item, "name": "c", "found": {"y": 2}}]})
    made = Page(source)
    assert [text for around, text in made.texts if {"dt", "dd"} & set(around)] == ["what it is", "b", "empty", "–"]
    assert [[cell["text"] for cell in row] for row in made.rows] == [
        ["name", "fine", "found x", "found y", "names"],
        ["a", "no", "1.5", "–", "blocks.{0...2}.to_q (3 keys), proj_in, proj_out, and 1 more"],
        ["c", "no", "–", "2", "blocks.{0...2}.to_q (3 keys), proj_in, proj_out, and 1 more"],
    ]
    assert not made.all("details")
    assert len(Page(nested({"items": [item] * 41})).all("details")) == 1


# --- hostile names ----------------------------------------------------------------------------------------------------

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "</style><script>alert(1)</script>",
    "</title><script>alert(1)</script>",
    "</pre>&lt;b&gt;&amp;",
    "\u202egnp.exe",
    "a\nb\x00c\x1b[31m\udcff",
    "]]> --> <!-- <![CDATA[",
    "javascript:alert(1)",
]


def hostile(name: str) -> AdaptersResult:
    """A result with a hostile string wherever a file or a user's path can put one."""
    module = f"transformer_blocks.0.{name}"
    side = Side(name, name, name, (1,), (name,), (name,), (HashedFile(name, 1, name),))
    modules = (ModuleResult(module, False, 2.0, 1.0, 1.0), ModuleResult(name, False, math.inf, 0.0, math.nan))
    spectra = Spectrum(module, (1.0,), (2.0,)), Spectrum(name, None, ())
    findings = (Finding(name, name, name, (module, name)), Finding("missing", name, name, (f"{name}.x",)))
    return AdaptersResult(
        False,
        findings,
        name,
        name,
        modules,
        evidence=Evidence(side, side, spectra),
        controls=(Control(name, None, name),),
    )


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_is_text_and_nothing_else(name: str) -> None:
    harmless = re.sub(r"[^.]", "h", printable(name))
    plain, made = Page(page(hostile(harmless))), Page(page(hostile(name)))
    assert [tag for tag, _ in made.tags] == [tag for tag, _ in plain.tags]
    assert [set(attrs) for _, attrs in made.tags] == [set(attrs) for _, attrs in plain.tags]
    assert made.json["one"] == name
    shown = "".join(text for _, text in made.texts)
    assert printable(name) in shown
    source = page(hostile(name))
    assert not [c for c in source if c != "\n" and not c.isprintable()]
    source.encode()


def test_a_hostile_file_name_goes_through_the_command(tmp_path: Path) -> None:
    evil = "<script>alert(1)<\\script>\u202e '\"&.safetensors"
    one, other = write(tmp_path / evil, factors()), write(tmp_path / "b.safetensors", factors())
    assert cli(["verify", str(one), str(other), "--report", str(tmp_path / "out.html"), "-q"]) == 0
    source = (tmp_path / "out.html").read_text(encoding="utf-8")
    assert "\u202e" not in source
    made = Page(source)
    assert not ACTIVE & {tag for tag, _ in made.tags}
    assert printable(str(one)) in made.inside("header")


# --- the numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["the same", "other factors", "swapped", "not a number", "all zero"])
def test_the_numbers_of_the_tables_are_those_of_the_json(tmp_path: Path, kind: str) -> None:
    result = RESULTS[kind](tmp_path)
    made = Page(page(result))
    rows = {row[0]["text"]: row[1:] for row in made.table("module")}
    assert set(rows) == {m["module"] for m in made.json["modules"]}
    for module in made.json["modules"]:
        same, *numbers = rows[module["module"]][:4]
        assert same["text"] == ("equal" if module["equal"] else "yes" if module["same"] else "NO")
        for cell, key in zip(numbers, ("error", "bound", "norm"), strict=True):
            assert cell["values"] == ([] if module[key] is None else [module[key]])
            assert module[key] is None or float(cell["text"]) == pytest.approx(module[key], rel=0.05)
    exact = {m["module"]: m for m in result.to_dict()["modules"]}
    assert made.json["modules"] == four_digits(list(exact.values()))


def test_the_singular_values_are_those_of_the_full_product(tmp_path: Path) -> None:
    arrays = factors()
    result = compared(tmp_path, lambda a: ups(a, lambda x: x * 2))
    rows = {row[0]["text"]: row[5:] for row in Page(page(result)).table("module")}
    for spectrum in result.to_dict()["evidence"]["spectra"]:
        name = f"transformer.{spectrum['module']}"
        down, up = (arrays[f"{name}.lora_{side}.weight"].astype(np.float64) for side in "AB")
        exact = np.linalg.svd(up @ down / 4, compute_uv=False)[:4]  # alpha / rank of the file is 1 / 4
        assert spectrum["one"] == pytest.approx(exact, rel=1e-12)
        assert spectrum["other"] == pytest.approx(2 * exact, rel=1e-12)
        share = exact / exact.sum()
        rank = np.exp(-(share * np.log(share)).sum())
        expected = [rank, rank, exact[0], 2 * exact[0], exact[3], 2 * exact[3]]
        assert [cell["values"] for cell in rows[spectrum["module"]]] == [
            [pytest.approx(v, rel=5.1e-4)] for v in expected
        ]


def test_both_sides_are_named_with_scale_rank_and_the_hashes_of_their_files(tmp_path: Path) -> None:
    run = build(RunSpec(variant="2b", num_layers=1, rank=4, lora_alpha=3.0), tmp_path / "run")
    loraconv.convert(run, out=tmp_path / "out", to="peft")
    result = verify_adapters(run, tmp_path / "out", evidence=True)
    said = Page(page(result)).inside("dd")
    files = [run / "2/mp_rank_00_model_states.pt", run / "training_config.yaml"]
    files += [tmp_path / "out" / name for name in ("adapter_model.safetensors", "adapter_config.json")]
    for file in files:
        assert file.name in said
        assert hashlib.sha256(file.read_bytes()).hexdigest() in said
    assert said.count("3/4") == 2
    assert str(run) in said
    assert result.to_dict()["evidence"]["one"]["ranks"] == (4,)


def test_evidence_is_gathered_only_for_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = (str(write(tmp_path / name, factors())) for name in ("a.safetensors", "b.safetensors"))
    assert cli(["verify", one, other, "--json"]) == 0
    assert "evidence" not in json.loads(capsys.readouterr().out)
    assert cli(["verify", one, other, "--json", "--report", str(tmp_path / "out.html")]) == 0
    value = json.loads(capsys.readouterr().out)
    assert set(value["evidence"]) == {"one", "other", "spectra"}
    assert Page((tmp_path / "out.html").read_text(encoding="utf-8")).json == four_digits(value)


# --- heat maps and charts ---------------------------------------------------------------------------------------------


def cells(source: str, title: str) -> Iterator[tuple[str, str, str]]:
    """Colour, words and text of every cell of a heat map."""
    (picture,) = re.findall(rf"<svg[^>]*><title>{title}, .*?</svg>", source, re.DOTALL)
    yield from re.findall(r'<g class="cell (\w+)"><title>(.*?)</title>.*?<text[^>]*>(.*?)</text>', picture)


def test_every_module_has_its_place_in_every_heat_map(tmp_path: Path) -> None:
    result = compared(tmp_path, swapped)
    source = page(result)
    for title in ("Relative error", "Norm of the delta", "Effective rank"):
        words = [said for _, said, _ in cells(source, title)]
        assert [said.split(":")[0] for said in words] == [
            f"transformer_blocks.{layer}.attn1.{name}"
            for layer in range(3)
            for name in ("to_q", "to_k", "to_v", "to_out.0")
        ]


def test_every_cell_stands_under_its_column_and_beside_its_layer(tmp_path: Path) -> None:
    (picture,) = re.findall(r"<svg[^>]*><title>Relative error, .*?</svg>", page(compared(tmp_path)), re.DOTALL)
    labels = {
        name: (float(x), float(y))
        for x, y, name in re.findall(r'<text x="([^"]+)" y="([^"]+)" class="(?:mid|end)">([^<]+)', picture)
    }
    assert set(labels) == {"0", "1", "2", "to_q", "to_k", "to_v", "to_out.0"}
    boxes = re.findall(r'<title>(.*?):.*?<rect x="([^"]+)" y="([^"]+)" width="([^"]+)" height="([^"]+)"', picture)
    assert len(boxes) == 12
    for module, *numbers in boxes:
        x, y, width, height = map(float, numbers)
        _, layer, _, column = module.split(".", 3)
        assert x < labels[column][0] < x + width
        assert y < labels[layer][1] < y + height
        assert labels[layer][0] < x
        assert labels[column][1] < y


def test_what_is_wrong_is_outlined_and_bright_and_nothing_else(tmp_path: Path) -> None:
    result = compared(tmp_path, swapped)
    source = page(result)
    assert len(Page(source).classes("alert")) == 2
    wrong = [said.split(":")[0] for colour, said, _ in cells(source, "Relative error") if colour != "bare"]
    assert wrong == ["transformer_blocks.1.attn1.to_q", "transformer_blocks.1.attn1.to_k"]
    assert {colour for colour, _, text in cells(source, "Relative error") if text == "="} == {"bare"}
    assert len(Page(page(compared(tmp_path, rotated))).classes("alert")) == 0


def test_a_module_that_only_one_of_them_has_is_marked(tmp_path: Path) -> None:
    missing = RESULTS["one missing"](tmp_path)
    texts = {said.split(":")[0]: text for _, said, text in cells(page(missing), "Relative error")}
    assert texts["transformer_blocks.1.attn1.to_v"] == "A only"
    turned = verify_adapters(tmp_path / "b.safetensors", tmp_path / "a.safetensors", evidence=True)
    texts = {said.split(":")[0]: text for _, said, text in cells(page(turned), "Relative error")}
    assert texts["transformer_blocks.1.attn1.to_v"] == "B only"
    assert page(turned).count("only B has it") == 1


def with_errors(*errors: float) -> AdaptersResult:
    modules = tuple(ModuleResult(f"blocks.{n}.to_q", False, e, 1e-6, 1.0) for n, e in enumerate(errors))
    return AdaptersResult(False, (), "a", "b", modules)


def test_the_colour_of_an_error_is_its_distance_from_what_is_allowed_in_decades() -> None:
    source = page(with_errors(1e-9, 1e-8, 1e-6, 1e-4, 1.0, 1e3, math.inf, math.nan))
    colours = [colour for colour, _, _ in cells(source, "Relative error")]
    # From a hundredth of what is allowed to a million times that: 8 decades over h0 to h20, so 5 colours for 2.
    assert colours == ["h0", "h0", "h5", "h10", "h20", "h20", "h20", "h20"]
    assert [text for _, _, text in cells(source, "Relative error")][-3:] == ["1000", "∞", "NaN"]
    assert len(Page(source).classes("alert")) == 5


def test_the_colour_of_a_size_is_in_proportion_or_by_decades() -> None:
    def colours(*norms: float) -> list[str]:
        modules = tuple(ModuleResult(f"blocks.{n}.to_q", True, 0.0, 0.0, norm) for n, norm in enumerate(norms))
        return [c for c, _, _ in cells(page(AdaptersResult(True, (), "a", "b", modules)), "Norm of the delta")]

    assert colours(0.0, 1.0, 2.0) == ["h0", "h10", "h20"]
    assert colours(1e-4, 1e-2, 1.0) == ["h0", "h10", "h20"]
    assert colours(0.0, 0.0) == ["h0", "h0"]
    assert colours(1.0, math.inf) == ["h20", "h20"]


def test_rows_are_layers_in_order_and_columns_are_modules() -> None:
    names = [f"transformer_blocks.{n}.attn1.{m}" for n in (10, 2, 0) for m in ("to_out.0", "to_v", "to_k", "to_q")]
    names += ["transformer_blocks.2.ff.net.0.proj", "single_transformer_blocks.0.proj_mlp", "proj_out"]
    names += [f"down_blocks.{n}.attentions.1.transformer_blocks.0.attn2.to_q" for n in (1, 0)]
    blocks, single, unet, outside = grids(names)
    assert blocks.title == "transformer_blocks.{}"
    assert blocks.rows == ("0", "2", "10")
    assert blocks.columns == ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj")
    assert ("0", "ff.net.0.proj") not in blocks.modules
    assert blocks.modules["10", "attn1.to_out.0"] == "transformer_blocks.10.attn1.to_out.0"
    assert (single.title, single.rows, single.columns) == ("single_transformer_blocks.{}", ("0",), ("proj_mlp",))
    assert unet.title == "down_blocks.{}.attentions.{}.transformer_blocks.{}.attn2"
    assert (unet.rows, unet.columns) == (("0.1.0", "1.1.0"), ("to_q",))
    assert (outside.title, outside.rows) == ("", ("proj_out",))
    assert sorted(m for grid in (blocks, single, unet, outside) for m in grid.modules.values()) == sorted(names)


def test_a_chart_is_logarithmic_upwards_and_even_to_the_right() -> None:
    values = [10.0, 1.0, 0.1, 0.0]
    picture = line_chart(Curves(values, values, values), None, (-3.0, 1.0), "t", "d")
    (line,) = re.findall(r'<path d="M([^"]*)" class="line one"', picture)
    points = [tuple(map(float, point.split())) for point in line.split("L")]
    steps = [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(points)]
    rules = sorted(float(y) for y in re.findall(r'<path d="M40 ([\d.]+)H', picture))
    decade = (rules[-1] - rules[0]) / 4
    assert points[0][1] == pytest.approx(rules[0], abs=0.1)  # ten, at the top
    assert [dy / decade for _, dy in steps] == pytest.approx([1, 1, 2], abs=0.01)  # zero lies at the foot
    assert [dx for dx, _ in steps] == pytest.approx([steps[0][0]] * 3, abs=0.11)


def test_the_second_adapter_is_drawn_only_where_it_differs(tmp_path: Path) -> None:
    same, other = page(compared(tmp_path)), page(compared(tmp_path, lambda a: ups(a, lambda x: x * 2)))
    assert (same.count('class="line one"'), same.count('class="line other"')) == (4, 0)
    assert (other.count('class="line one"'), other.count('class="line other"')) == (4, 4)
    assert "B has the same singular values" in same


def test_the_page_of_a_fused_model_shows_checks_controls_strengths_and_distances() -> None:
    source = page(fused_model())
    made = Page(source)
    assert "a.safetensors at strength 4/5" in made.inside("dd")
    assert [[cell["text"] for cell in row] for row in made.table("check")][1] == [
        "L2 sums",
        "FAILS",
        "4",
        "not so in one",
    ]
    assert [row[1]["text"] for row in made.table("deliberate mistake")] == ["caught", "MISSED"]
    found = {said.split(":")[0]: (colour, text) for colour, said, text in cells(source, "Units in the last place")}
    assert found["transformer_blocks.0.attn1.to_k"][1] == "3.0e4"
    assert found["transformer_blocks.0.attn1.to_q"][1] == "0.5"
    assert len(made.classes("alert")) == 1
    left = {said.split(":")[0]: text for _, said, text in cells(source, "Delta left")}
    assert left["transformer_blocks.0.attn1.to_q"] == "0.975"
    assert left["transformer_blocks.1.attn1.to_q"] == "–"
    rows = {row[0]["text"]: [cell["values"] for cell in row[2:]] for row in made.table("weight")}
    for tensor in made.json["tensors"]:
        counts = [tensor[key] for key in ("elements", "changed", "misrounded", "wrong", "nonfinite", "ulps", "error")]
        assert rows[tensor["tensor"]] == [[value] for value in counts] + [[tensor["kept"]] if tensor["kept"] else []]


def test_a_bound_of_the_users_own_is_what_a_fused_model_is_coloured_by() -> None:
    source = page(fused_model(bound=0.01))
    found = {said.split(":")[0]: text for _, said, text in cells(source, "Relative error of the delta")}
    assert found["transformer_blocks.0.attn1.to_q"] == "0.05"  # sqrt(0.01 / 4)
    assert len(Page(source).classes("alert")) == 1


# --- colours ----------------------------------------------------------------------------------------------------------


def luminance(colour: str) -> float:
    """WCAG 2.2, relative luminance."""
    parts = colour.lstrip("#")
    parts = "".join(c * 2 for c in parts) if len(parts) == 3 else parts
    channels = [int(parts[at : at + 2], 16) / 255 for at in (0, 2, 4)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_the_colours_of_heat_maps_grow_evenly_lighter() -> None:
    lightness = [116 * luminance(c) ** (1 / 3) - 16 for c in VIRIDIS]  # CIE L*, all above its linear part
    steps = np.diff(lightness)
    assert steps.min() > 0
    assert steps.max() < 1.5 * steps.mean()
    assert steps.min() > 0.5 * steps.mean()


def test_text_on_every_colour_can_be_read() -> None:
    inks = re.findall(r"\.h(\d+) \{ fill: (#\w+) \} \.h\1 text \{ fill: (#\w+) \}", style_sheet())
    assert len(inks) == len(VIRIDIS)
    assert min(contrast(fill, ink) for _, fill, ink in inks) >= 4.5


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_text_can_be_read_in_both_schemes(scheme: int) -> None:
    names = re.findall(r":root \{(.*?)\}", style_sheet(), re.DOTALL)[scheme]
    colours = dict(re.findall(r"--([\w-]+): (#\w+)", names))
    for ink, ground in [
        ("text", "card"), ("text", "page"), ("soft", "card"), ("soft", "page"), ("soft", "bare"), ("one", "card"),
        ("good", "good-card"), ("bad", "bad-card"), ("text", "good-card"), ("text", "bad-card"),
    ]:  # fmt: skip
        assert contrast(colours[ink], colours[ground]) >= 4.5, (ink, ground)
    assert contrast(colours["other"], colours["card"]) >= 3  # a line, not text
    assert contrast(colours["alert"], colours["card"]) >= 3


# --- the file ---------------------------------------------------------------------------------------------------------


def test_the_same_comparison_gives_the_same_bytes_in_every_process(tmp_path: Path) -> None:
    one, other = write(tmp_path / "a.safetensors", factors()), write(tmp_path / "b.safetensors", swapped(factors()))
    digests = set()
    for seed, threads in (("0", "1"), ("1", "2"), ("random", "1")):
        env = {"PYTHONHASHSEED": seed, "OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads}
        out = tmp_path / "out.html"
        assert launch(["verify", one, other, "--report", out, "-q"], env=env).returncode == 5
        digests.add(hashlib.sha256(out.read_bytes()).hexdigest())
    assert len(digests) == 1


def test_a_page_of_42_layers_of_rank_128_is_less_than_a_megabyte() -> None:
    rng = np.random.default_rng(0)
    names = [f"transformer_blocks.{n}.attn1.{m}" for n in range(42) for m in ("to_q", "to_k", "to_v", "to_out.0")]
    modules = tuple(ModuleResult(name, False, *rng.random(3).tolist()) for name in names)
    values = [tuple(rng.random(128).tolist()) for _ in range(2 * len(names))]
    spectra = tuple(Spectrum(name, *values[2 * n : 2 * n + 2]) for n, name in enumerate(names))
    side = Side("a", "diffusers", "file", (128,), ("1",), ("F32",), ())
    assert len(page(AdaptersResult(False, (), "a", "b", modules, evidence=Evidence(side, side, spectra)))) < 1_000_000


@pytest.mark.parametrize("spoil", [lambda a: a, swapped], ids=["same", "not the same"])
def test_the_command_prints_and_exits_as_without_a_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil: Callable[[Any], Any]
) -> None:
    words = [str(write(tmp_path / f"{n}.safetensors", how(factors()))) for n, how in (("a", lambda a: a), ("b", spoil))]
    code, out = cli(["verify", *words]), capsys.readouterr()
    assert cli(["verify", *words, "--report", str(tmp_path / "out.html")]) == code
    assert capsys.readouterr() == out
    assert (tmp_path / "out.html").read_text(encoding="utf-8").startswith(MARK)


def test_what_cannot_be_compared_leaves_no_page_and_an_old_one_as_it_was(tmp_path: Path) -> None:
    one = str(write(tmp_path / "a.safetensors", factors()))
    out = tmp_path / "out.html"
    for old in (None, f"{MARK}of before"):
        if old is not None:
            out.write_text(old)
        assert cli(["verify", one, str(tmp_path / "absent.safetensors"), "--report", str(out)]) == 2
        (tmp_path / "empty").mkdir(exist_ok=True)
        assert cli(["verify", one, str(tmp_path / "empty"), "--report", str(out)]) == 3
        assert (out.read_text() if out.exists() else None) == old
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "empty", "out.html"]


def test_an_earlier_report_is_replaced_and_any_other_file_only_with_overwrite(tmp_path: Path) -> None:
    words = ["verify", *(str(write(tmp_path / n, factors())) for n in ("a.safetensors", "b.safetensors")), "-q"]
    out = tmp_path / "out.html"
    assert cli([*words, "--report", str(out)]) == 0
    out.write_text(out.read_text(encoding="utf-8") + "old")
    assert cli([*words, "--report", str(out)]) == 0
    assert not out.read_text(encoding="utf-8").endswith("old")
    out.write_text("<!DOCTYPE html>mine")
    assert cli([*words, "--report", str(out)]) == 6
    assert out.read_text() == "<!DOCTYPE html>mine"
    assert cli([*words, "--report", str(out), "--overwrite"]) == 0
    assert out.read_text(encoding="utf-8").startswith(MARK)
    assert cli([*words, "--overwrite"]) == 2


@pytest.mark.parametrize("target", ["a.safetensors", "out/adapter_model.safetensors", "out/report.html"])
def test_a_report_never_lands_on_or_in_what_is_compared(tmp_path: Path, target: str) -> None:
    one = write(tmp_path / "a.safetensors", factors())
    loraconv.convert(one, out=tmp_path / "out", to="peft")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    for words in ([one, tmp_path / "out"], ["--before", one, "--after", tmp_path / "out"]):
        given = ["verify", *map(str, words), "--report", str(tmp_path / target), "--overwrite"]
        assert cli(given) == 2
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_the_page_needs_neither_torch_nor_a_browser(tmp_path: Path) -> None:
    one, other = (write(tmp_path / n, factors()) for n in ("a.safetensors", "b.safetensors"))
    code = (
        f"import sys, loraconv; loraconv.verify({str(one)!r}, {str(other)!r}, report={str(tmp_path / 'o.html')!r});"
        " sys.exit(bool({'torch', 'diffusers', 'peft', 'matplotlib'} & set(sys.modules)))"
    )
    assert launch([], code=code).returncode == 0


def test_a_bound_of_the_users_own_is_said(tmp_path: Path) -> None:
    result = compared(tmp_path, rotated)
    assert "by the dtypes" in page(result)
    assert "by --bound" in page(replace(result, bound=0.5))
