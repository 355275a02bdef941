"""``verify --consumers``: what the table says of each consumer is what the consumer does.

The rows of diffusers and peft are held against the libraries themselves, run in a process of their own on every file of
``consumer_zoo``: the installed ones here, the older releases with ``pytest -m old_consumers``, which installs each into
a virtual environment of its own. The other consumers cannot be installed here; what is expected of them was read in
the sources that the table names.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from loraconv.cli import run as cli
from loraconv.errors import FormatError
from loraconv.registry import dialects
from loraconv.source import open_source
from loraconv.verification.consumers import ConsumersResult, Use, verify_consumers
from loraconv.verifier.consumers.prediction import read_with
from loraconv.verifier.consumers.reading import AdapterFile, Reading
from loraconv.verifier.consumers.table import (
    CONFIG_FIELDS,
    CONSUMERS,
    DEFAULTS,
    FOLLOWED,
    MODULES,
    NOTES,
    ByConfig,
    ByName,
)
from tests import consumer_run
from tests import consumer_zoo as zoo_of
from tests.cli_support import tiny_run
from tests.conftest import FIXTURES

ANIMALS = dict(zoo_of.animals())
ROWS = {consumer.name: consumer for consumer in CONSUMERS}
NEWEST = {"diffusers": "diffusers 0.40 and later", "peft": "peft 0.21 and later"}
Version = tuple[int, ...]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return zoo_of.write_zoo(tmp_path_factory.mktemp("zoo") / "zoo")


def observe(python: str, zoo: dict[str, Path]) -> dict[str, Any]:
    """What the libraries of an environment do with every animal."""
    root = next(iter(zoo.values())).parent.parent
    words = [python, consumer_run.__file__, str(root)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=550, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    value: dict[str, Any] = json.loads(done.stdout)
    return value


@pytest.fixture(scope="module")
def installed(zoo: dict[str, Path]) -> dict[str, Any]:
    return observe(sys.executable, zoo)


def read(file: Path, consumer: str) -> tuple[Reading, set[str]]:
    """What the table says, and the file's keys."""
    with open_source(file) as source:
        read = read_with(ROWS[consumer], AdapterFile(str(file), source.tensors, source.metadata, source.config))
        return read, set(source.tensors)


def disagreement(file: Path, consumer: str, was: dict[str, Any], peft: Version) -> str:
    """How the table and the real consumer differ; empty if they do not."""
    said, keys = read(file, consumer)
    if said.needs and peft < version(said.needs.removeprefix("peft ")):
        return "" if "could not be instantiated" in was.get("error", "") else f"needs {said.needs}, was {was}"
    if said.why or said.unsure or "error" in was:
        return "" if said.error and said.error in was.get("error", "") else f"{said}, was {was}"
    found = {
        "dropped": keys - set(was["applied"]),
        "undefined": {module for module, scale in was["measured"].items() if scale is None},
        "applied": {module: was["stated"][module] for module, scale in was["measured"].items() if scale},
        "magnitudes": was["magnitudes"],
    }
    told = {
        "dropped": set(said.dropped),
        "undefined": set(said.undefined),
        "applied": {module: pytest.approx(float(scale), rel=1e-12) for module, scale in said.scales.items()},
        "magnitudes": said.magnitudes,
    }
    plain = not was["magnitudes"] and not any("bias" in key for key in keys)
    computed = {m: pytest.approx(float(s), rel=1e-4) for m, s in said.scales.items()} if plain else {}
    really = {module: scale for module, scale in was["measured"].items() if scale and plain}
    return "" if found == told and really == computed else f"{told}, was {found}; computes {really}"


def compact(was: dict[str, Any]) -> dict[str, Any]:
    """An outcome without the names, as ``fixtures/consumers.json`` records it."""
    if "error" in was:
        return {"error": " ".join(re.sub(r"\{[^}]*\}", "{}", was["error"]).split())[:140]}
    scales = [f"{was['stated'][module]:.6g}" for module, scale in was["measured"].items() if scale]
    return {
        "applied": len(was["applied"]),
        "scales": {scale: scales.count(scale) for scale in sorted(set(scales))},
        "undefined": sum(scale is None for scale in was["measured"].values()),
        "magnitudes": was["magnitudes"],
    }


def version(text: str) -> Version:
    return tuple(int(part) for part in text.split(".")[:2])


# --- the installed libraries ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ANIMALS)
def test_the_table_says_what_the_installed_libraries_do(
    name: str, zoo: dict[str, Path], installed: dict[str, Any]
) -> None:
    assert version(installed["diffusers"]) >= (0, 40)
    assert version(installed["peft"]) >= (0, 21)
    row = NEWEST[name.partition(",")[0]]
    assert disagreement(zoo[name], row, installed["found"][name], version(installed["peft"])) == ""


def test_the_zoo_holds_every_outcome(installed: dict[str, Any]) -> None:
    """Else the comparison above would say little: some are refused, dropped, scaled, and made but never filled."""
    found = installed["found"].values()
    fine = [was for was in found if "error" not in was]
    assert len(fine) < len(found) - 5
    assert {1.0, 0.5, 0.25, 2.0} <= {scale for was in fine for scale in was["stated"].values()}
    assert any(not was["applied"] and not was["measured"] for was in fine)
    assert any(None in was["measured"].values() for was in fine)
    assert any(was["magnitudes"] for was in fine)


def test_the_fields_of_a_configuration_are_those_of_the_installed_peft(installed: dict[str, Any]) -> None:
    assert set(installed["fields"]) == set(CONFIG_FIELDS)


def test_the_defaults_of_a_configuration_are_those_of_the_installed_peft() -> None:
    from peft import LoraConfig

    computed_from = {n: v for n, v in asdict(LoraConfig()).items() if n not in FOLLOWED | NOTES}
    assert {n: v for n, v in computed_from.items() if v not in (None, False, [], {})} == DEFAULTS


#: Release of peft -> the fields that it added, as its ``LoraConfig`` and the classes above it declare them.
ADDED_FIELDS: dict[str, list[str]] = json.loads((FIXTURES / "peft_fields.json").read_text())


def fields_of(peft: Version) -> set[str]:
    return {name for release, added in ADDED_FIELDS.items() if version(release) <= peft for name in added}


@pytest.mark.parametrize("release", ADDED_FIELDS)
def test_the_table_knows_since_when_peft_has_a_field(release: str) -> None:
    peft = version(release)
    assert {name for name, since in CONFIG_FIELDS.items() if since <= peft} == fields_of(peft)


def test_the_modules_are_those_of_the_real_models() -> None:
    import torch
    from diffusers import CogVideoXTransformer3DModel

    found = set()
    rotary = {"use_rotary_positional_embeddings": True, "patch_size_t": 2, "ofs_embed_dim": 8, "patch_bias": False}
    for changes in ({}, rotary):
        model = CogVideoXTransformer3DModel(**{**consumer_run.CONFIG, "num_layers": 1, **changes})
        found |= {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)}
    assert {module.replace("{i}", "0") for module in MODULES} == found


# --- older releases, each in an environment of its own ---------------------------------------------------------------

_HTTPX = ("httpx", "httpcore", "h11", "anyio", "sniffio", "idna", "certifi")
_HUB_0 = ("transformers==4.57.6", "huggingface_hub==0.36.2", "tokenizers==0.22.2", "accelerate==1.11.0")
#: Release -> the row of the table, and what it is installed with; torch, numpy and safetensors are the installed ones.
RELEASES: dict[str, tuple[str, tuple[str, ...]]] = {
    "0.31.0": (
        "diffusers 0.31",
        (
            "peft==0.13.2",
            "transformers==4.46.3",
            "huggingface_hub==0.26.5",
            "tokenizers==0.20.3",
            "accelerate==1.1.1",
        ),
    ),
    "0.32.2": (
        "diffusers 0.32",
        (
            "peft==0.14.0",
            "transformers==4.48.3",
            "huggingface_hub==0.28.1",
            "tokenizers==0.21.0",
            "accelerate==1.3.0",
        ),
    ),
    "0.33.1": (
        "diffusers 0.33",
        (
            "peft==0.15.2",
            "transformers==4.51.3",
            "huggingface_hub==0.30.2",
            "tokenizers==0.21.1",
            "accelerate==1.6.0",
        ),
    ),
    "0.34.0": (
        "diffusers 0.34",
        (
            "peft==0.15.2",
            "transformers==4.52.4",
            "huggingface_hub==0.33.1",
            "tokenizers==0.21.2",
            "accelerate==1.8.1",
        ),
    ),
    "0.35.2": ("diffusers 0.35 to 0.39", ("peft==0.17.1", *_HUB_0)),
    "0.36.0": ("diffusers 0.35 to 0.39", ("peft==0.18.1", *_HUB_0, *_HTTPX)),
    "0.39.0": ("diffusers 0.35 to 0.39", ("peft==0.19.1", *_HTTPX)),
    "0.40.0": ("diffusers 0.40 and later", ("peft==0.20.0", *_HTTPX)),
}


def environment(folder: Path, *packages: str) -> str:
    """The interpreter of a new virtual environment that has these packages and, behind them, the installed ones."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = str(folder / "bin" / "python")
    pip = [sys.executable, "-m", "pip", "-q", "--python", python, "install", "--no-deps", *packages]
    subprocess.run(pip, check=True, env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"})
    (site,) = (folder / "lib").glob("python*/site-packages")
    (site / "installed.pth").write_text(sysconfig.get_paths()["purelib"])
    return python


#: What the releases did, as the test below observed it: release -> animal -> compact outcome.
RECORDED: dict[str, dict[str, Any]] = json.loads((FIXTURES / "consumers.json").read_text())


def row_of(name: str, release: str) -> str:
    """The row for an animal; empty for a peft that is older than the table."""
    if name.startswith("diffusers"):
        return RELEASES[release][0]
    return "" if release in ("0.31.0", "0.32.2") else "peft 0.15 to 0.20"


@pytest.mark.parametrize("release", RELEASES)
def test_the_table_says_what_an_older_release_was_seen_to_do(release: str, zoo: dict[str, Path]) -> None:
    peft = version(RELEASES[release][1][0].removeprefix("peft=="))
    assert set(RECORDED[release]) == set(ANIMALS)
    for name, was in RECORDED[release].items():
        if not row_of(name, release):
            continue
        said, keys = read(zoo[name], row_of(name, release))
        if "error" in was:
            late = bool(said.needs) and peft < version(said.needs.removeprefix("peft "))
            assert late or (said.error and said.error in was["error"]), name
            continue
        scales = [f"{float(scale):.6g}" for scale in said.scales.values()]
        assert was == {
            "applied": len(keys) - len(said.dropped),
            "scales": {scale: scales.count(scale) for scale in sorted(set(scales))},
            "undefined": len(said.undefined),
            "magnitudes": said.magnitudes,
        }, name


@pytest.mark.old_consumers
@pytest.mark.parametrize("release", RELEASES)
def test_the_table_says_what_an_older_release_does(release: str, zoo: dict[str, Path], tmp_path: Path) -> None:
    observed = observe(environment(tmp_path / "venv", f"diffusers=={release}", *RELEASES[release][1]), zoo)
    assert observed["diffusers"] == release
    peft, wrong = version(observed["peft"]), {}
    assert set(observed["fields"]) == fields_of(peft)
    for name, was in observed["found"].items():
        row = row_of(name, release)
        wrong[name] = disagreement(zoo[name], row, was, peft) if row else ""
    assert {name: text for name, text in wrong.items() if text} == {}
    assert {name: compact(was) for name, was in observed["found"].items()} == RECORDED[release]
    assert set(observed["fields"]) == {name for name, since in CONFIG_FIELDS.items() if since <= peft}


# --- consumers that look for names (facts: the sources that the table names) -----------------------------------------


def put(tmp_path: Path, arrays: zoo_of.Arrays, name: str = "lora") -> Path:
    return zoo_of.write(tmp_path / name, (arrays, None, None))


def comfy_names(module: str) -> str:
    """As the blocks of ComfyUI's own CogVideoX are called (comfy/ldm/cogvideo/model.py, CogVideoXBlock)."""
    ends = {"attn1.to_q": "q", "attn1.to_k": "k", "attn1.to_v": "v", "attn1.to_out.0": "attn_out"}
    block, end = module.split(".", 2)[1:]
    return f"blocks.{block}.{ends[end]}"


@pytest.mark.parametrize(("prefix", "name"), [("diffusion_model.", comfy_names), ("lora_unet_", None)])
def test_comfyui_applies_its_own_names_at_alpha_over_rank(
    tmp_path: Path, prefix: str, name: Callable[[str], str] | None
) -> None:
    name = name or (lambda module: comfy_names(module).replace(".", "_"))
    arrays = zoo_of.factors(prefix, zoo_of.DOWN_UP, name=name)
    arrays |= {f"{prefix}{name(zoo_of.MODULES[0])}.alpha": zoo_of.number(2)()}
    read_, _ = read(put(tmp_path, arrays), "ComfyUI")
    assert {module: float(scale) for module, scale in read_.scales.items()} == {
        module: 0.5 if module == zoo_of.MODULES[0] else 1.0 for module in zoo_of.MODULES
    }
    assert read_.dropped == ()


@pytest.mark.parametrize("prefix", ["transformer.", "", "base_model.model.", "diffusion_model."])
def test_comfyui_drops_a_file_with_diffusers_names(tmp_path: Path, prefix: str) -> None:
    read_, keys = read(put(tmp_path, zoo_of.factors(prefix)), "ComfyUI")
    assert read_.scales == {}
    assert set(read_.dropped) == keys


def test_the_wrapper_leaves_lora_b_to_diffusers_and_merges_the_rest(zoo: dict[str, Path]) -> None:
    diffusers, _ = read(zoo["diffusers, as trained"], "ComfyUI-CogVideoXWrapper")
    assert {float(scale) for scale in diffusers.scales.values()} == {0.5}
    for name in ("diffusers, VideoX-Fun", "diffusers, kohya with alpha"):
        fun, _ = read(zoo[name], "ComfyUI-CogVideoXWrapper")
        assert {module: float(scale) for module, scale in fun.scales.items()} == dict.fromkeys(zoo_of.MODULES, 0.5)
    without, _ = read(zoo["diffusers, kohya"], "ComfyUI-CogVideoXWrapper")
    assert {float(scale) for scale in without.scales.values()} == {1.0}


def test_the_wrapper_refuses_keys_that_it_cannot_place(tmp_path: Path) -> None:
    arrays = zoo_of.factors("lora_unet__", zoo_of.DOWN_UP, name=lambda m: zoo_of.underscored(m).replace("attn1", "foo"))
    read_, _ = read(put(tmp_path, arrays), "ComfyUI-CogVideoXWrapper")
    assert read_.error == "Can't recognize LoRA"


@pytest.mark.parametrize(("word", "warned"), [("DimensionX_left", True), ("my-orbit", True), ("portrait", False)])
def test_a_path_that_makes_the_wrapper_divide_is_named(tmp_path: Path, word: str, warned: bool) -> None:
    read_, _ = read(put(tmp_path, zoo_of.factors(), word), "ComfyUI-CogVideoXWrapper")
    assert ("divides by the rank" in read_.note) is warned


def test_kohya_has_no_cogvideox(zoo: dict[str, Path]) -> None:
    read_, keys = read(zoo["diffusers, kohya with alpha"], "kohya sd-scripts")
    assert read_.scales == {}
    assert set(read_.dropped) == keys


# --- the verdict ------------------------------------------------------------------------------------------------------


def uses_of(result: ConsumersResult) -> dict[str, Use]:
    return {use.consumer: use for use in result.uses}


def strengths(use: Use, result: ConsumersResult) -> set[float]:
    return {float(scale) / float(result.trained[module]) for module, scale in use.reading.scales.items()}


def test_a_scale_in_the_header_is_lost_before_0_34(zoo: dict[str, Path]) -> None:
    result = verify_consumers(zoo["diffusers, as trained"])
    uses = uses_of(result)
    assert not result.same
    for old in ("diffusers 0.31", "diffusers 0.32", "diffusers 0.33"):
        assert strengths(uses[old], result) == {2.0}
        assert "2 times as strong as trained" in uses[old].sentence
    for new in ("diffusers 0.34", "diffusers 0.35 to 0.39", "diffusers 0.40 and later"):
        assert uses[new].exact
    (finding,) = result.findings
    assert "0.33" in finding.sentence
    assert "0.34" not in finding.sentence
    assert finding.mend.startswith("loraconv convert")


def test_mixed_ranks_without_alpha_are_scaled_by_the_first_key(zoo: dict[str, Path]) -> None:
    result = verify_consumers(zoo["diffusers, mixed ranks, the first differs"])
    uses = uses_of(result)
    for old in ("diffusers 0.31", "diffusers 0.32", "diffusers 0.33", "diffusers 0.35 to 0.39"):
        assert strengths(uses[old], result) == {2.0, 1.0}
        assert not uses[old].exact
    assert uses["diffusers 0.40 and later"].exact


@pytest.mark.parametrize("name", ["peft, as trained", "peft, rsLoRA", "peft, mixed ranks", "peft, alpha_pattern"])
def test_a_peft_folder_is_exact_in_peft_and_in_nothing_else(zoo: dict[str, Path], name: str) -> None:
    result = verify_consumers(zoo[name].parent)
    assert result.same
    assert result.findings == ()
    assert {use.consumer for use in result.uses if use.exact} == {"peft 0.15 to 0.20", "peft 0.21 and later"}


def test_dropped_magnitudes_are_not_as_trained(zoo: dict[str, Path]) -> None:
    uses = uses_of(verify_consumers(zoo["diffusers, DoRA not in the header"]))
    assert not uses["diffusers 0.40 and later"].exact
    assert "magnitudes" in uses["diffusers 0.40 and later"].sentence
    assert uses_of(verify_consumers(zoo["diffusers, DoRA in the header"]))["diffusers 0.40 and later"].exact


@pytest.mark.parametrize("name", ["another component", "another module"])
def test_a_file_with_more_in_it_than_is_applied_is_not_as_trained(zoo: dict[str, Path], name: str) -> None:
    use = uses_of(verify_consumers(zoo[f"diffusers, {name}"]))["diffusers 0.40 and later"]
    assert not use.exact
    assert "applies 8 of 8 modules at the scale as trained; drops " in use.sentence
    assert "foo.lora_A.weight" in use.sentence


def test_layers_without_factors_are_named(zoo: dict[str, Path]) -> None:
    use = uses_of(verify_consumers(zoo["diffusers, one factor missing"]))["diffusers 0.40 and later"]
    assert not use.exact
    assert "transformer_blocks.0.attn1.to_q" in use.sentence
    assert "never fills" in use.sentence


@pytest.mark.parametrize(
    "name",
    [
        "diffusers, as trained",
        "diffusers, header of a later peft",
        "diffusers, header with alpha_pattern",
        "diffusers, header without patterns",
        "diffusers, no prefix",
        "diffusers, rsLoRA",
        "peft, as trained",
    ],
)
def test_the_command_that_mends_a_consumer_does(zoo: dict[str, Path], name: str, tmp_path: Path) -> None:
    source = zoo[name] if name.startswith("diffusers") else zoo[name].parent
    mended = 0
    for use in verify_consumers(source).uses:
        command, _, instead = use.mend.partition(", for ")
        if command:
            out = tmp_path / str(mended)
            assert cli([str(out) if word == "OUT" else word for word in shlex.split(command)[1:]]) == 0
            assert uses_of(verify_consumers(out))[instead or use.consumer].exact
            mended += 1
    assert mended > 2


def test_what_loraconv_writes_for_diffusers_is_exact_in_every_diffusers(zoo: dict[str, Path], tmp_path: Path) -> None:
    run = tiny_run(tmp_path, lora_alpha=3.0)
    for source in (run, zoo["peft, alpha_pattern"].parent, zoo["peft, rsLoRA"].parent):
        out = tmp_path / f"out of {source.name}"
        assert cli(["convert", str(source), "-o", str(out), "--to", "diffusers"]) == 0
        result = verify_consumers(out)
        assert result.same
        assert all(use.exact for use in result.uses if use.consumer.startswith("diffusers"))


@pytest.mark.parametrize("name", ["diffusers, mixed ranks", "diffusers, mixed ranks, one differs", "peft, mixed ranks"])
def test_no_conversion_saves_mixed_ranks_from_a_diffusers_that_reads_no_header(
    zoo: dict[str, Path], name: str, tmp_path: Path
) -> None:
    assert cli(["convert", str(zoo[name]), "-o", str(tmp_path / "out"), "--to", "diffusers"]) == 0
    uses = uses_of(verify_consumers(tmp_path / "out"))
    assert uses["diffusers 0.33"].mend == "pip install -U diffusers"
    assert all(uses[name].exact for name in ("diffusers 0.34", "diffusers 0.35 to 0.39", "diffusers 0.40 and later"))


def test_alpha_of_the_user_is_what_it_was_trained_with(zoo: dict[str, Path]) -> None:
    result = verify_consumers(zoo["diffusers, header missing"], alpha=1)
    assert {float(scale) for scale in result.trained.values()} == {0.25}
    uses = uses_of(result)
    assert strengths(uses["diffusers 0.40 and later"], result) == {4.0}
    assert uses["diffusers 0.40 and later"].mend.endswith("--alpha 1 --to diffusers")


@pytest.mark.parametrize(
    ("name", "scale"),
    [
        ("diffusers, kohya with alpha", 0.5),
        ("diffusers, kohya", 1.0),
        ("diffusers, alpha tensors", 0.5),
        ("diffusers, VideoX-Fun", 0.5),
        ("diffusers, header of finetrainers", 0.5),
        ("diffusers, names in memory", 1.0),
        ("diffusers, another module", 1.0),
    ],
)
def test_the_scale_as_trained_is_found_in_strange_files_too(zoo: dict[str, Path], name: str, scale: float) -> None:
    trained = verify_consumers(zoo[name]).trained
    assert {module: float(found) for module, found in trained.items()} == dict.fromkeys(zoo_of.MODULES, scale)


def test_nobody_loads_a_sat_run_and_the_report_says_what_to_do(tmp_path: Path) -> None:
    result = verify_consumers(tiny_run(tmp_path))
    assert not result.same
    assert all(use.reading.why for use in result.uses)
    (finding,) = result.findings
    assert finding.mend.endswith("--to diffusers")


def test_a_pattern_that_would_hang_the_matcher_is_not_run(tmp_path: Path) -> None:
    config = zoo_of.settings(alpha_pattern={"(a+)+b": 8})
    file = zoo_of.write(tmp_path / "bad", (zoo_of.factors(zoo_of.PEFT), None, config))
    read_, _ = read(file, NEWEST["peft"])
    assert "too complicated" in read_.unsure


@pytest.mark.parametrize(
    "config", [{"r": 0}, {"r": "4"}, {"lora_alpha": None}, {"target_modules": 3}, {"alpha_pattern": {"(": 1}}]
)
def test_senseless_settings_are_no_traceback(tmp_path: Path, config: dict[str, Any]) -> None:
    file = zoo_of.write(tmp_path / "bad", (zoo_of.factors(zoo_of.PEFT), None, zoo_of.settings(**config)))
    read_, _ = read(file, NEWEST["peft"])
    assert read_.why or read_.unsure


def test_a_base_model_has_no_consumers(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert cli(["sat2diffusers", str(tiny_run(tmp_path)), "-o", str(out), "--what", "base", "-q"]) == 0
    with pytest.raises(FormatError):
        verify_consumers(out / "diffusion_pytorch_model.safetensors")


def test_the_command_exits_with_0_5_and_3(zoo: dict[str, Path], tmp_path: Path) -> None:
    assert cli(["verify", "--consumers", str(zoo["peft, as trained"].parent)]) == 0
    assert cli(["verify", "--consumers", str(zoo["diffusers, as trained"])]) == 5
    base = tmp_path / "base"
    assert cli(["sat2diffusers", str(tiny_run(tmp_path)), "-o", str(base), "--what", "base", "-q"]) == 0
    assert cli(["verify", "--consumers", str(base / "diffusion_pytorch_model.safetensors")]) == 3
    assert cli(["verify", "--consumers", str(base), str(base)]) == 2


def test_the_text_names_every_consumer_and_the_command(
    zoo: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    cli(["verify", "--consumers", str(zoo["diffusers, as trained"])])
    text = capsys.readouterr().out
    assert text.startswith("verdict NOT every consumer of a diffusers file applies it as trained\n")
    assert "  diffusers 0.31, 0.32, 0.33: applies 8 of 8 modules, 2 times as strong as trained\n" in text
    for name in ROWS:
        assert name.split(" ", 1)[-1] in text
    assert "mend    loraconv convert" in text


def test_the_json_has_the_documented_keys(zoo: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    cli(["verify", "--consumers", str(zoo["diffusers, mixed ranks"]), "--json"])
    value = json.loads(capsys.readouterr().out)
    assert set(value) == {"schema", "mode", "same", "findings", "path", "format", "consumers"}
    assert (value["schema"], value["mode"], value["format"]) == (1, "consumers", "diffusers")
    by_name = {entry["consumer"]: entry for entry in value["consumers"]}
    assert set(by_name) == set(ROWS)
    assert set(by_name["diffusers 0.31"]) == {
        *("consumer", "meant", "exact", "sentence", "mend", "why", "error", "unsure", "scales", "undefined"),
        *("dropped", "needs"),
    }
    ratios = {scale["ratio"]: len(scale["modules"]) for scale in by_name["diffusers 0.33"]["scales"]}
    assert ratios == {0.5: 2, 1.0: 6}


# --- the table --------------------------------------------------------------------------------------------------------


def test_the_peft_of_a_row_is_the_oldest_that_it_was_run_with_or_that_its_name_says() -> None:
    oldest: dict[str, tuple[int, int]] = {}
    for row, packages in RELEASES.values():
        major, minor = packages[0].removeprefix("peft==").split(".")[:2]
        oldest[row] = min(oldest.get(row, (9, 9)), (int(major), int(minor)))
    oldest |= {"peft 0.15 to 0.20": (0, 15), "peft 0.21 and later": (0, 21)}
    assert {row.name: row.peft for row in CONSUMERS if isinstance(row, ByConfig)} == oldest


def test_every_row_is_whole() -> None:
    formats = {dialect.name for dialect in dialects()}
    assert len(ROWS) == len(CONSUMERS)
    for consumer in CONSUMERS:
        assert consumer.facts
        assert consumer.mend in {*formats, ""}
        if isinstance(consumer, ByName):
            assert consumer.delegates[1] in {*ROWS, ""}
            assert {ours for _, ours in consumer.names} <= set(MODULES)
            assert consumer.instead in {*ROWS, ""}
