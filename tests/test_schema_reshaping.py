"""The JSON of ``merge``, ``resize``, ``extract`` and ``split``: real results have the keys and types stated here, and
docs/JSON.md names every key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loraconv.cli import run as cli
from tests.reshape_support import drawn, write
from tests.test_extract import base_state, tune
from tests.test_fuse import write_base
from tests.test_schema import CHECK, CONTROL, NUMBER, STRINGS, documented, faults, keys

SCHEMA: dict[str, Any] = {
    "schema": int,
    "kind": str,
    "out": str,
    "to": str,
    "dry_run": bool,
    "inputs": [{"path": str, "format": str, "strength": NUMBER, "digest": (str, None)}],
    "modules": [{"module": str, "rank_before": int, "rank": int, "norm": (*NUMBER, None), "error": NUMBER}],
    "error": NUMBER,
    "parts": [{"name": str, "modules": STRINGS}],
    "other": STRINGS,
    "files": [{"name": str, "bytes": int, "sha256": str}],
    "proofs": [{"subject": str, "checks": [CHECK], "controls": [CONTROL]}],
    "notices": STRINGS,
    "options": dict,
}


def words(kind: str, folder: Path) -> list[str]:
    a, b = (str(write(folder / f"{seed}.st", drawn(seed))) for seed in (1, 2))
    if kind == "extracted":
        tuned = write_base(folder / "tuned", tune(base_state(), other=True))
        base = write_base(folder / "base", base_state())
        return ["extract", str(tuned), "--base", str(base), "--rank", "2", "--ignore-other"]
    return {
        "merged": ["merge", a, f"{b}@0.3"],
        "resized": ["resize", a, "--max-error", "0.9"],
        "split": ["split", a, "--by", "module"],
    }[kind]


@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=str)
@pytest.mark.parametrize("kind", ["merged", "resized", "extracted", "split"])
def test_real_results_have_the_keys_and_types_of_the_schema(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, dry: list[str]
) -> None:
    assert cli([*words(kind, tmp_path), "-o", str(tmp_path / "out"), "--json", *dry]) == 0
    value = json.loads(capsys.readouterr().out, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert list(faults(value, SCHEMA)) == []
    assert (value["schema"], value["kind"], value["dry_run"]) == (1, kind, bool(dry))
    assert bool(value["parts"]) == (kind == "split")
    assert bool(value["other"]) == (kind == "extracted")
    assert (tmp_path / "out").exists() != bool(dry)
    if not dry:
        record = json.loads((tmp_path / "out" / "loraconv.json").read_text())
        assert record.keys() ^ value.keys() == {"out", "dry_run", "versions"}


def test_the_page_names_every_key_and_no_other() -> None:
    assert documented("Kinds `merged`") == set(keys(SCHEMA))
