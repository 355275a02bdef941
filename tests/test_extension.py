"""The recipe of CONTRIBUTING.md, followed by a package of its own: a dialect, a spelling of CogVideoX, an oracle."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.sat_run import RunSpec, build

PACKAGE = """
from dataclasses import replace
from fractions import Fraction

from loraconv.converters.models.cogvideox import COGVIDEOX
from loraconv.rules import Dialect, Rename, Spelling

TO = {"q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"}
HERE = "transformer_blocks.{i}.attn1."
SPELLING = Spelling(tuple(Rename("blocks.{i}.attention." + a, HERE + b) for a, b in TO.items()))
# A family of a known name adds its spellings to the known one.
FAMILY = replace(COGVIDEOX, spellings={"acme": SPELLING})
ACME = Dialect(
    name="acme", title="acme LoRA file", container="safetensors-file", file="acme_lora.safetensors",
    down="{module}.lora_down.weight", up="{module}.lora_up.weight", prefixes=("net.",), spellings=("acme",),
    sidecar="acme.json", alpha_at="network.alpha", rank_at="network.rank", default_alpha="rank",
    default_why="acme scales by 1 unless acme.json says otherwise", facts="acme",
)


def oracle(ranks, metadata, settings, alpha):
    from loraconv.verifier.numbers import Pair

    pairs = {}
    for name, ref in ranks[0].items():
        if name.endswith(".lora_down.weight"):
            layer, part = name.split(".")[2], name.split(".")[4]
            said = (settings or {}).get("network", {}).get("alpha", ref.shape[0])
            told = alpha if alpha is not None else Fraction(said)
            up = ranks[0][name.replace("lora_down", "lora_up")]
            pairs[f"transformer_blocks.{layer}.attn1.{TO[part]}"] = Pair(ref, up, told / ref.shape[0])
    return pairs
"""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    place = tmp_path / "site"
    info = place / "acme_formats-1.0.dist-info"
    info.mkdir(parents=True)
    (place / "acme_formats.py").write_text(PACKAGE)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-formats\nVersion: 1.0\n")
    formats = "[loraconv.formats]\nacme = acme_formats:ACME\nfamily = acme_formats:FAMILY\n"
    (info / "entry_points.txt").write_text(formats + "[loraconv.oracles]\nacme = acme_formats:oracle\n")
    return place


def loraconv(site: Path, *words: str | Path) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "loraconv", *map(str, words)]
    return subprocess.run(
        argv, env={**os.environ, "PYTHONPATH": str(site)}, capture_output=True, text=True, check=False
    )


def test_a_format_of_another_package_converts_there_and_back_bit_for_bit(site: Path, tmp_path: Path) -> None:
    run = build(RunSpec(variant="2b", num_layers=2, rank=4, lora_alpha=2), tmp_path)
    steps = ((run, "diffusers", "one"), ("one", "acme", "two"), ("two", "diffusers", "three"))
    for source, to, target in steps:
        path = source if isinstance(source, Path) else tmp_path / source
        done = loraconv(site, "convert", path, "-o", tmp_path / target, "--to", to)
        assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "two/acme.json").read_text()) == {"network": {"alpha": 2, "rank": 4}}
    first, last = (tmp_path / n / "pytorch_lora_weights.safetensors" for n in ("one", "three"))
    assert first.read_bytes() == last.read_bytes()


def test_a_format_without_an_oracle_is_not_converted(site: Path, tmp_path: Path) -> None:
    entries = site / "acme_formats-1.0.dist-info" / "entry_points.txt"
    entries.write_text(entries.read_text().partition("[loraconv.oracles]")[0])
    run = build(RunSpec(variant="2b", num_layers=2), tmp_path)
    done = loraconv(site, "convert", run, "-o", tmp_path / "out", "--to", "acme")
    assert done.returncode == 3
    assert "oracle" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_mistake_in_the_table_of_another_package_fails_the_proof(site: Path, tmp_path: Path) -> None:
    module = site / "acme_formats.py"
    module.write_text(module.read_text().replace('"k": "to_k", "v": "to_v"', '"k": "to_v", "v": "to_k"', 1))
    text = module.read_text()
    module.write_text(
        text.replace(
            "def oracle", 'RIGHT = {"q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"}\n\n\ndef oracle'
        ).replace("attn1.{TO[part]}", "attn1.{RIGHT[part]}")
    )
    run = build(RunSpec(variant="2b", num_layers=2), tmp_path)
    done = loraconv(site, "convert", run, "-o", tmp_path / "out", "--to", "acme")
    assert done.returncode == 5, done.stdout + done.stderr
    assert not (tmp_path / "out").exists()
