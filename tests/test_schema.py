"""The JSON of ``verify`` and ``roundtrip``: real results have exactly the keys and types stated here, and
docs/JSON.md names every key.

A mode is added by a schema in ``MODES``, examples in ``EXAMPLES`` and a section in the page.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import loraconv
from loraconv.cli import run as cli
from tests.sat_run import build
from tests.support import LORA_FILE, header, small

PAGE = (Path(__file__).parent.parent / "docs" / "JSON.md").read_text(encoding="utf-8")

# --- a schema is {key: type}: a Python type, a tuple of types, [schema of every item], or a dict for an object --------

OPTIONAL = "?"  # behind a key: it may be absent
NUMBER = (int, float)
STRINGS = [str]

CHECK = {
    "level": str,
    "name": str,
    "passed": bool,
    "count": int,
    "figure": (*NUMBER, None),
    "bound": (*NUMBER, None),
    "detail": str,
}
CONTROL = {"name": str, "caught": (bool, None), "by": str}
FORM = {"dtype": str, "shape": [int]}
COMMON = {
    "schema": int,
    "mode": str,
    "same": bool,
    "findings": [{"slug": str, "sentence": str, "mend": str, "modules": STRINGS}],
}
MODES: dict[str, dict[str, Any]] = {
    "adapters": {
        "one": str,
        "other": str,
        "bound": (*NUMBER, None),
        "modules": [
            {
                "module": str,
                "equal": bool,
                "error": (*NUMBER, None),
                "bound": (*NUMBER, None),
                "norm": (*NUMBER, None),
                "same": bool,
            }
        ],
        "controls": [CONTROL],
        "magnitudes": ({"one": int, "other": int, "equal": int}, None),
        "evidence?": dict,
    },
    "record": {"subject": str, "record": str, "files": [{"name": str, "difference": str}]},
    "changes": {
        "before": str,
        "after": str,
        "expect": (str, None),
        "counts": dict,
        "tensors": [
            {
                "kind": str,
                "name": str,
                "other": str,
                "rank": int,
                "before": (FORM, None),
                "after": (FORM, None),
                "figures": (
                    {
                        "relative": (*NUMBER, None),
                        "greatest": NUMBER,
                        "changed": int,
                        "count": int,
                        "nonfinite": int,
                        "rounded": str,
                    },
                    None,
                ),
            }
        ],
        "notices": STRINGS,
    },
    "fused": {
        "base": str,
        "adapters": [{"path": str, "strength": str}],
        "fused": str,
        "dtype": (str, None),
        "bound": (*NUMBER, None),
        "kept": (*NUMBER, None),
        "checks": [CHECK],
        "controls": [CONTROL],
        "tensors": [
            {
                "tensor": str,
                "same": bool,
                "elements": int,
                "changed": int,
                "misrounded": int,
                "wrong": int,
                "nonfinite": int,
                "ulps": (*NUMBER, None),
                "error": (*NUMBER, None),
                "kept": (*NUMBER, None),
            }
        ],
    },
    "consumers": {
        "path": str,
        "format": str,
        "consumers": [
            {
                "consumer": str,
                "meant": bool,
                "exact": bool,
                "sentence": str,
                "mend": str,
                "why": str,
                "error": str,
                "unsure": str,
                "scales": [
                    {"scale": NUMBER, "trained": (*NUMBER, None), "ratio": (*NUMBER, None), "modules": STRINGS},
                ],
                "undefined": STRINGS,
                "dropped": STRINGS,
                "needs": str,
            }
        ],
    },
    "forward": {
        "model": str,
        "one": str,
        "other": str,
        "kind": str,
        "dtype": str,
        "inputs": str,
        "effect": NUMBER,
        "bound": NUMBER,
        "outputs": [
            {
                "what": str,
                "distance": (*NUMBER, None),
                "allowed": NUMBER,
                "strength": (*NUMBER, None),
                "within": bool,
            }
        ],
        "mistakes": dict,
        "changed": STRINGS,
    },
    "roundtrip": {
        "source": str,
        "format": str,
        "hops": [
            {
                "to": str,
                "bytes": int,
                "proof": {"subject": str, "checks": [CHECK], "controls": [CONTROL]},
                "same": bool,
                "modules": int,
                "equal": int,
                "error": NUMBER,
                "controls": str,
            }
        ],
        "factors": int,
        "identical": int,
        "alpha": bool,
    },
}


def faults(value: Any, schema: Any, place: str = "") -> Iterator[str]:
    """Where a JSON value is not what its schema says."""
    if isinstance(schema, tuple):
        if all(list(faults(value, one, place)) for one in schema):
            yield f"{place}: {value!r:.80} is none of the types it may have"
    elif isinstance(schema, dict):
        if not isinstance(value, dict):
            yield f"{place}: {value!r:.80} is no object"
            return
        needed = {key for key in schema if not key.endswith(OPTIONAL)}
        allowed = {key.removesuffix(OPTIONAL) for key in schema}
        yield from (f"{place}.{key} is missing" for key in needed - value.keys())
        yield from (f"{place}.{key} is not in the schema" for key in value.keys() - allowed)
        for key in allowed & value.keys():
            yield from faults(value[key], schema.get(key, schema.get(key + OPTIONAL)), f"{place}.{key}")
    elif isinstance(schema, list):
        if not isinstance(value, list):
            yield f"{place}: {value!r:.80} is no array"
            return
        for number, item in enumerate(value):
            yield from faults(item, schema[0], f"{place}[{number}]")
    elif schema is None:
        if value is not None:
            yield f"{place}: {value!r:.80} is not null"
    elif not isinstance(value, schema) or (isinstance(value, bool) and schema is not bool):
        yield f"{place}: {value!r:.80} is no {schema.__name__}"


# --- real results -----------------------------------------------------------------------------------------------------


def spoilt(file: Path, copy: Path, change: Callable[[str, Any], Any]) -> Path:
    """A copy of a safetensors file with other tensors."""
    save_file({name: change(name, tensor) for name, tensor in load_file(file).items()}, copy, header(file))
    return copy


def adapters(folder: Path) -> Iterator[list[str]]:
    run = build(small(rank=4, lora_alpha=3), folder)
    loraconv.convert(run, out=folder / "lora", to="diffusers")
    right = folder / "lora" / LORA_FILE
    nan = spoilt(right, folder / "nan.safetensors", lambda n, t: t * float("nan") if "to_q.lora_B" in n else t)
    dora = {
        n.replace("lora_A", "lora_magnitude_vector"): t[0].clone() for n, t in load_file(right).items() if "_A" in n
    }
    save_file({**load_file(right), **dora}, folder / "dora.safetensors", header(right))
    yield [str(run), str(right)]
    yield [str(right), str(right), "--bound", "1e-6"]
    yield [str(right), str(nan)]
    yield [str(folder / "dora.safetensors"), str(right)]


def record(folder: Path) -> Iterator[list[str]]:
    loraconv.convert(build(small(), folder), out=folder / "lora", to="peft")
    yield [str(folder / "lora")]
    (folder / "lora" / "adapter_model.safetensors").unlink()
    yield [str(folder / "lora")]


def changes(folder: Path) -> Iterator[list[str]]:
    run = build(small(ema=True), folder / "run")
    base = build(small(kind="base", dtype=torch.bfloat16), folder / "base")
    for before, after in ((run / "2", run / "2-ema"), (base, run), (run, base), (run, run)):
        yield ["--before", str(before), "--after", str(after)]
    yield ["--before", str(run), "--after", str(run), "--expect", "only-lora"]


def consumers(folder: Path) -> Iterator[list[str]]:
    loraconv.convert(build(small(), folder), out=folder / "lora", to="diffusers")
    right = folder / "lora" / LORA_FILE
    bare = {name.removeprefix("transformer."): tensor for name, tensor in load_file(right).items()}
    save_file(bare, folder / "bare.safetensors", header(right))
    yield ["--consumers", str(right)]
    yield ["--consumers", str(folder / "bare.safetensors")]


def forward(folder: Path) -> Iterator[list[str]]:
    run = build(small(lora_alpha=4), folder)
    loraconv.sat2diffusers(run, out=folder / "all", what="all")
    right = folder / "all" / LORA_FILE
    twice = spoilt(right, folder / "twice.safetensors", lambda name, tensor: tensor * 2 if "lora_B" in name else tensor)
    model = ["--forward", "--model", str(folder / "all" / "transformer")]
    yield [*model, str(run), str(right)]
    yield [*model, str(run), str(twice)]


def roundtrip(folder: Path) -> Iterator[list[str]]:
    yield [str(build(small(rank=4, lora_alpha=4), folder / "exact"))]
    yield [str(build(small(rank=4, lora_alpha=3), folder / "rounded"))]


def fused(folder: Path) -> Iterator[list[str]]:
    run = build(small(), folder)
    loraconv.sat2diffusers(run, out=folder / "base", what="base")
    loraconv.fuse(run, base=folder / "base", out=folder / "fused")
    yield ["--base", str(folder / "base"), str(run), str(folder / "fused")]
    yield ["--base", str(folder / "base"), f"{run}@0.5", str(folder / "fused")]


EXAMPLES: dict[str, Callable[[Path], Iterator[list[str]]]] = {
    "adapters": adapters,
    "record": record,
    "changes": changes,
    "fused": fused,
    "consumers": consumers,
    "forward": forward,
    "roundtrip": roundtrip,
}


@pytest.mark.parametrize("mode", MODES)
def test_real_results_have_the_keys_and_types_of_the_schema(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], mode: str
) -> None:
    codes = set()
    for words in EXAMPLES[mode](tmp_path):
        command = "roundtrip" if mode == "roundtrip" else "verify"
        capsys.readouterr()
        codes.add(cli([command, *words, "--json"]))
        value = json.loads(capsys.readouterr().out, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
        assert list(faults(value, {**COMMON, **MODES[mode]}, mode)) == []
        assert (value["schema"], value["mode"]) == (1, mode)
        assert value["same"] == (not value["findings"]) or mode == "record"
    assert codes == {0, 5}, "the examples must show both verdicts"


def test_a_report_adds_its_evidence_and_nothing_else(tmp_path: Path) -> None:
    from loraconv.verification.adapters import verify_adapters

    run = build(small(), tmp_path)
    copy = shutil.copytree(run, tmp_path / "copy")
    value = verify_adapters(run, copy, evidence=True).to_dict()
    assert "evidence" in value
    assert list(faults(json.loads(json.dumps(value)), {**COMMON, **MODES["adapters"]})) == []


# --- the page ---------------------------------------------------------------------------------------------------------


def keys(schema: Any, place: str = "") -> Iterator[str]:
    """Every key of a schema as the page spells it: ``modules[].error``."""
    if isinstance(schema, tuple):
        for one in schema:
            yield from keys(one, place)
    elif isinstance(schema, list):
        yield from keys(schema[0], f"{place}[]")
    elif isinstance(schema, Mapping):
        for key, inside in schema.items():
            path = f"{place}.{key}".removeprefix(".").removesuffix(OPTIONAL)
            yield path
            yield from keys(inside, path)


def documented(title: str) -> set[str]:
    """What the first column of a section's table names; a list of keys in the third stands for ``key[].x``."""
    (section,) = (part for part in PAGE.split("\n## ")[1:] if part.startswith(title))
    named = set()
    for row in re.findall(r"^\| (`.*?) \| (.*?) \| (.*) \|$", section, re.MULTILINE):
        own = re.findall(r"`([^`]+)`", row[0])
        named |= set(own)
        if re.search(r" of every ", row[2]):
            named |= {f"{own[0]}[].{key}" for key in re.findall(r"`(\w+)`", row[2].partition(" of every ")[0])}
    return named


def test_the_page_names_every_common_key_and_no_other() -> None:
    assert documented("Every mode") == set(keys(COMMON))


@pytest.mark.parametrize("mode", MODES)
def test_the_page_names_every_key_of_a_mode_and_no_other(mode: str) -> None:
    assert documented(f"Mode `{mode}`") == set(keys(MODES[mode]))


def test_every_mode_on_the_page_has_a_schema_and_examples() -> None:
    assert re.findall(r"^## Mode `(\w+)`", PAGE, re.MULTILINE) == list(MODES)
    assert set(EXAMPLES) == set(MODES)
    told = re.search(r"^\| `mode` .*", PAGE, re.MULTILINE)
    assert told
    assert set(re.findall(r"`(\w+)`", told.group())) - {"mode"} == set(MODES)


@pytest.mark.parametrize(
    ("value", "schema"),
    [
        ({"a": 1}, {"a": str}),
        ({"a": True}, {"a": int}),
        ({"a": 1, "b": 2}, {"a": int}),
        ({}, {"a": int}),
        ({"a": [1, "x"]}, {"a": [int]}),
        ({"a": None}, {"a": (int, float)}),
        ([], {"a": int}),
    ],
    ids=str,
)
def test_the_checker_finds_what_is_wrong(value: Any, schema: Any) -> None:
    assert list(faults(value, schema))
