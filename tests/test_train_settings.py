"""The settings of a training run: strict, with errors that name the nearest key and the reason."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from loraconv.errors import CorruptCheckpoint, UsageError
from loraconv.trainer.configuration import fill, read_settings
from loraconv.trainer.settings import Settings, tiny_settings


def read(tmp_path: Path, text: str) -> Settings:
    file = tmp_path / "run.toml"
    file.write_text(text)
    return read_settings(file)


def test_an_empty_file_has_every_default(tmp_path: Path) -> None:
    assert read(tmp_path, "") == Settings()


def test_every_section_is_read_into_its_fields(tmp_path: Path) -> None:
    made = read(
        tmp_path,
        """
        steps = 30
        [model]
        tiny = "1.5-i2v"
        [lora]
        rank = 16
        alpha = 8
        targets = ["attn1.to_q", "ff.*"]
        ranks = {"ff.*" = 4}
        [optimizer]
        up = 1e-3
        rates = {"attn1.to_q" = 0}
        [data]
        kind = "folder"
        path = "videos"
        """,
    )
    assert (made.steps, made.model.tiny, made.lora.rank) == (30, "1.5-i2v", 16)
    assert (type(made.lora.alpha), made.lora.alpha) == (float, 8.0)
    assert made.lora.targets == ("attn1.to_q", "ff.*")
    assert made.lora.ranks == {"ff.*": 4}
    assert (made.optimizer.up, made.optimizer.down, made.optimizer.rates) == (1e-3, None, {"attn1.to_q": 0.0})
    assert made.data.path == Path("videos")


@pytest.mark.parametrize(
    ("text", "name", "near"),
    [
        ("step = 3", "step", "steps"),
        ("[lora]\nrnak = 3", "lora.rnak", "lora.rank"),
        ("[optimizer]\nrates_ = {}", "optimizer.rates_", "optimizer.rates"),
        ("[modle]\ntiny = '2b'", "modle", "model"),
    ],
)
def test_an_unknown_key_is_an_error_that_names_the_nearest(tmp_path: Path, text: str, name: str, near: str) -> None:
    with pytest.raises(UsageError) as error:
        read(tmp_path, text)
    assert error.value.slug == "setting-unknown"
    assert name in error.value.what
    assert near in error.value.hint
    assert "run.toml" in error.value.where


@pytest.mark.parametrize(
    "text",
    [
        "steps = 2.5",
        "steps = true",
        "steps = '3'",
        "[lora]\nrank = 4.0",
        "[lora]\ndora = 1",
        "[lora]\ntargets = 'attn1.to_q'",
        "[lora]\ntargets = [1]",
        "[lora]\nranks = 3",
        "model = 'tiny'",
        "[optimizer]\nrate = '1e-4'",
    ],
)
def test_a_value_of_another_kind_is_an_error(tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError, match="setting"):
        read(tmp_path, text)


@pytest.mark.parametrize(
    "text",
    [
        "steps = 0",
        "seed = -1",
        "kind = 'lokr'",
        "frozen = ['patch_embed']",
        "kind = 'full'\n[lora]\nrank = 4",
        "kind = 'full'\n[checkpoints]\nlayouts = ['peft']",
        "[lora]\ndora = true\n[checkpoints]\nlayouts = ['diffusers']",
        "[model]\ntiny = '3b'",
        "[model]\nprecision = 'fp8'",
        "[lora]\nrank = 0",
        "[lora]\nranks = {x = 0}",
        "[lora]\nalpha = 0",
        "[lora]\nalphas = {x = -1}",
        "[lora]\nalpha = nan",
        "[lora]\ndropout = 1.0",
        "[lora]\ntargets = []",
        "[optimizer]\nrate = -1e-4",
        "[optimizer]\nup = inf",
        "[optimizer]\nrates = {x = -1}",
        "[optimizer]\nbetas = [0.9]",
        "[optimizer]\nbetas = [0.9, 1.0]",
        "[optimizer]\neps = 0",
        "[optimizer]\nweight_decay = -1",
        "[optimizer]\nclip = 0",
        "[schedule]\nkind = 'sine'",
        "[schedule]\nwarmup = -1",
        "[schedule]\nend = 1.5",
        "[schedule]\nevery = 0",
        "[schedule]\ngamma = 0",
        "[batch]\nsize = 0",
        "[batch]\naccumulate = 0",
        "[conditioning]\nnoise_std = -1",
        "[conditioning]\ndropout = 2",
        "[safety]\nnonfinite = 'ignore'",
        "[safety]\nlimit = -1",
        "[validation]\nevery = -1",
        "[validation]\nsamples = 0",
        "[validation]\ntimesteps = 0",
        "[checkpoints]\nevery = 0",
        "[checkpoints]\nkeep = 0",
        "[checkpoints]\nmodel_parallel = 3",
        "[checkpoints]\nlayouts = ['kohya']",
        "[log]\nevery = 0",
        "[log]\ntracker = 'mlflow'",
    ],
)
def test_a_value_that_makes_no_sense_is_an_error_with_its_reason(tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError) as error:
        read(tmp_path, text)
    assert error.value.why or error.value.hint


@pytest.mark.parametrize("text", ["steps = ", "[lora", "steps = 1\nsteps = 2"])
def test_what_is_no_toml_is_said_to_be_none(tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError, match="not TOML"):
        read(tmp_path, text)


def test_a_file_that_is_missing_or_no_text_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        read_settings(tmp_path / "run.toml")
    (tmp_path / "run.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(CorruptCheckpoint):
        read_settings(tmp_path / "run.toml")


def test_the_settings_survive_the_way_through_json() -> None:
    settings = tiny_settings("5b-i2v")
    assert fill(Settings, _without_none(settings.to_dict())) == settings


def _without_none(value: Any) -> Any:
    return {k: _without_none(v) for k, v in value.items() if v is not None} if isinstance(value, dict) else value


def test_the_documented_settings_are_all_there_are_with_their_defaults() -> None:
    page = (Path(__file__).parent.parent / "docs" / "TRAINING.md").read_text()
    (block,) = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    table = tomllib.loads(block)
    assert fill(Settings, table) == Settings()
    told = {f"{section}.{key}" for section, value in table.items() if isinstance(value, dict) for key in value}
    known = {f"{s}.{key}" for s, value in Settings().to_dict().items() if isinstance(value, dict) for key in value}
    # What has no default in TOML, and the fields of [data] that DATA.md explains.
    unset = {"optimizer.down", "optimizer.up", *(name for name in known if name.startswith("data."))}
    assert known - unset <= told
