"""``loraconv train``: what it prints, what it writes, what it refuses; on the moving-shapes data that ship with it."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from safetensors.torch import load_file

import loraconv
from loraconv.cli.progress import _Rows, training_progress
from loraconv.errors import UsageError
from loraconv.trainer import tracking
from loraconv.trainer.curves import chart
from loraconv.trainer.loop import held_out_loss
from loraconv.trainer.page import page
from loraconv.trainer.run import _session
from loraconv.trainer.settings import LogSettings, tiny_settings
from loraconv.trainer.world import World
from tests.cli_support import Cli, launch
from tests.train_support import VARIANTS, contents, rows, short

pytest_plugins = ["tests.cli_fixtures", "tests.train_fixtures"]

QUICK = """
steps = 4
[lora]
rank = 2
alpha = 2
[data]
count = 6
[validation]
every = 2
samples = 1
timesteps = 1
[checkpoints]
every = 2
[log]
every = 1
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "run.toml"
    file.write_text(QUICK)
    return file


def untrained(variant: str) -> float:
    """The held-out loss of the model before its first step, on the same samples, noise and timesteps."""
    return held_out_loss(_session(tiny_settings(variant), World()))


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_settings_for_tiny_models_learn_the_moving_shapes(variant: str, tmp_path: Path) -> None:
    result = loraconv.train(out=tmp_path / "run", tiny=variant, steps=50)
    assert result.notices == ()
    assert result.held_out is not None
    assert result.held_out < untrained(variant)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_whole_tiny_run_takes_less_than_a_minute_and_learns_to_its_end(variant: str, tmp_path: Path) -> None:
    started = time.monotonic()
    loraconv.train(out=tmp_path / "run", tiny=variant)
    assert time.monotonic() - started < 60
    curve = [row["held_out_loss"] for row in rows(tmp_path / "run") if "held_out_loss" in row]
    assert curve[-1] < curve[0] < untrained(variant)


def test_the_command_says_what_it_made_and_the_next_one_works(cli: Cli, config: Path, tmp_path: Path) -> None:
    done = cli("train", "--config", config, "--tiny", "5b", "-o", tmp_path / "run")
    assert done.code == 0, done.err
    lines = dict(line.split(maxsplit=1) for line in done.out.splitlines() if not line.startswith("held"))
    assert lines["model"] == "tiny 5b"
    assert "4 of 4 steps" in lines["trained"]
    assert (tmp_path / "run/report/report.html").is_file()
    words = lines["next"].replace("DIR", str(tmp_path / "lora")).split()
    assert words[:2] == ["loraconv", "sat2diffusers"]
    assert cli(*words[1:]).code == 0


def test_json_is_the_result_and_nothing_else(cli: Cli, config: Path, tmp_path: Path) -> None:
    done = cli("train", "--config", config, "--tiny", "2b", "-o", tmp_path / "run", "--json")
    value = json.loads(done.out)
    assert (done.code, done.err) == (0, "")
    assert set(value) == {
        "schema", "out", "settings", "parameters", "layouts", "steps", "loss", "held_out", "best", "last", "faults",
        "notices", "dry_run",
    }  # fmt: skip
    assert (value["steps"], value["layouts"], value["faults"]) == (4, ["sat", "diffusers", "peft"], [])
    assert Path(value["last"], "loraconv.json").is_file()


def test_a_dry_run_says_what_would_be_trained_and_writes_nothing(cli: Cli, config: Path, tmp_path: Path) -> None:
    done = cli("train", "--config", config, "--tiny", "2b", "-o", tmp_path / "run", "--dry-run")
    assert done.code == 0
    # Two layers, four projections, two factors of rank 2 and width 48.
    assert f"{2 * 4 * 2 * 2 * 48} parameters, 0 of 4 steps" in done.out
    assert not (tmp_path / "run").exists()


def test_resuming_a_finished_run_does_nothing_more(cli: Cli, config: Path, tmp_path: Path) -> None:
    words = ["train", "--config", config, "--tiny", "2b", "-o", tmp_path / "run"]
    assert cli(*words).code == 0
    before = contents(tmp_path / "run/checkpoints")
    again = cli(*words)
    assert (again.code, "--resume" in again.err) == (2, True)
    assert cli(*words, "--resume").code == 0
    assert contents(tmp_path / "run/checkpoints") == before


def test_a_warning_about_the_rate_is_said(cli: Cli, config: Path, tmp_path: Path) -> None:
    config.write_text(QUICK + "[optimizer]\nrate = 1e-9\n")
    done = cli("train", "--config", config, "--tiny", "2b", "-o", tmp_path / "run", "--dry-run")
    assert "notice: rate x scale is too small" in done.err


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([], "a run needs settings"),
        (["--config", "nowhere.toml"], "no such file"),
        (["--tiny", "3b"], "3b"),
        (["--tiny", "2b", "--steps", "0"], "steps"),
    ],
)
def test_wrong_words_are_usage_errors(cli: Cli, tmp_path: Path, words: list[str], text: str) -> None:
    done = cli("train", *words, "-o", tmp_path / "run")
    assert done.code == 2
    assert text in done.err


def test_a_file_in_the_place_of_the_folder_is_said(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    done = cli("train", "--tiny", "2b", "--steps", "1", "-o", tmp_path / "run")
    assert (done.code, "is not a folder" in done.err) == (2, True)
    assert (tmp_path / "run").read_text() == "mine"


def test_a_missing_video_is_named_with_its_row(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("video,prompt\nnowhere.mp4,a red square\n")
    (tmp_path / "run.toml").write_text(f"[data]\nkind = 'csv'\npath = '{tmp_path / 'list.csv'}'\n")
    done = cli("train", "--config", tmp_path / "run.toml", "--tiny", "2b", "-o", tmp_path / "run")
    assert done.code == 2
    assert "nowhere.mp4" in done.err
    assert "list.csv line 2" in done.err
    assert "hint: loraconv check-data" in done.err


def test_a_stopped_run_exits_with_5_and_leaves_its_report(
    cli: Cli, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loraconv.trainer import run
    from tests.test_train_loop import spoiled
    from tests.train_support import opener

    config.write_text(QUICK + "[safety]\nnonfinite = 'stop'\n")
    monkeypatch.setattr(run, "open_dataset", opener(3, spoiled(float("nan"))))
    done = cli("train", "--config", config, "--tiny", "2b", "-o", tmp_path / "run")
    assert done.code == 5
    assert "clip-2" in done.err
    assert "hint: loraconv train --resume" in done.err
    assert "clip-2" in (tmp_path / "run/report/report.html").read_text()


def test_help_and_import_load_neither_torch_nor_numpy() -> None:
    code = (
        "import sys, loraconv, loraconv.training\n"
        "from loraconv.cli import run\n"
        "try: run(['train', '--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'numpy', 'diffusers', 'peft'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


# --- metrics, trackers, report ----------------------------------------------------------------------------------------


def test_the_metrics_have_a_row_for_every_step_that_was_asked_for(config: Path, tmp_path: Path) -> None:
    loraconv.train(out=tmp_path / "run", config=config, tiny="2b")
    said = rows(tmp_path / "run")
    assert [row["step"] for row in said] == [1, 2, 3, 4]
    wanted = {"step", "loss", "rate", "gradient_norm", "weight_norm", "delta_ratio", "seconds"}
    assert set(said[0]) == wanted
    assert set(said[1]) == wanted | {"held_out_loss"}


def test_a_line_that_a_killed_run_left_unfinished_is_passed_over(tmp_path: Path) -> None:
    lines = ['{"step": 1, "loss": 1.0}', '{"step": 2, "loss": 2.0}', '{"step": 3, "lo', "", '{"step": 2, "loss": 5.0}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert tracking.read_rows(tmp_path, 9) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 5.0}]
    assert tracking.read_rows(tmp_path, 1) == [{"step": 1, "loss": 1.0}]


def test_a_new_row_does_not_join_an_unfinished_line(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
    log = tracking.Log(tmp_path, short(), None)
    log({"step": 2, "loss": 2.0})
    log.close()
    assert tracking.read_rows(tmp_path, 9) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}]


class Writer:
    """Stands for a tracker's module: remembers what it was given."""

    def __init__(self) -> None:
        self.said: list[Any] = []

    def init(self, **given: Any) -> None:
        print("initialized")
        self.said.append(("init", given["project"], given["config"]["steps"], given.get("dir")))

    def log(self, numbers: dict[str, float], step: int) -> None:
        print("logged")
        self.said.append((step, numbers))

    def finish(self) -> None:
        print("finished")
        self.said.append("finish")


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_a_hosted_tracker_gets_every_number_under_a_flat_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    writer = Writer()
    monkeypatch.setitem(sys.modules, name, writer)
    monkeypatch.setattr(tracking, "find_spec", lambda asked: asked == name)
    log = tracking.Log(tmp_path, short(log=LogSettings(tracker=name, project="p")), None)
    log({"step": 3, "loss": 0.5, "where": "x", "delta_ratio": {"transformer_blocks.0": 0.1}})
    log.close()
    where = str(tmp_path) if name == "wandb" else None
    numbers = {"loss": 0.5, "delta_ratio/transformer_blocks.0": 0.1}
    assert writer.said == [("init", "p", 6, where), (3, numbers), "finish"]
    assert capsys.readouterr().out == "", "stdout is for the result"


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_the_tracker_itself_takes_a_run(name: str, tmp_path: Path) -> None:
    pytest.importorskip(name, reason=f"{name} is not installed: only its stand-in was tested")
    (tmp_path / "run.toml").write_text(QUICK.replace("[log]", f"[log]\ntracker = '{name}'"))
    env = {**os.environ, "HOME": str(tmp_path), "WANDB_MODE": "offline"}
    words = ["train", "--config", tmp_path / "run.toml", "--tiny", "2b", "-o", tmp_path / "run", "--json"]
    done = launch(words, env=env)
    assert json.loads(done.stdout)["steps"] == 4
    files = [p for p in tmp_path.rglob("*") if p.is_file() and re.search(r"tfevents|\.wandb$|loraconv\.db$", p.name)]
    assert files, "the tracker wrote nothing"


def test_tensorboard_is_used_where_it_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[Any] = []

    class SummaryWriter:
        def __init__(self, folder: str) -> None:
            said.append(folder)

        def add_scalar(self, *given: Any) -> None:
            said.append(given)

        def close(self) -> None:
            said.append("close")

    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(tracking, "find_spec", lambda asked: asked == "tensorboard")
    log = tracking.Log(tmp_path, short(), None)
    log({"step": 2, "loss": 0.5})
    log.close()
    assert said == [str(tmp_path / "tensorboard"), ("loss", 0.5, 2), "close"]


def test_a_tracker_that_is_not_installed_is_an_error_before_the_first_step(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "find_spec", lambda _: None)
    config.write_text(QUICK.replace("[log]", "[log]\ntracker = 'wandb'"))
    with pytest.raises(UsageError, match="wandb is not installed"):
        loraconv.train(out=tmp_path / "run", config=config, tiny="2b")


def test_the_report_draws_every_curve_and_needs_nothing_from_elsewhere(config: Path, tmp_path: Path) -> None:
    loraconv.train(out=tmp_path / "run", config=config, tiny="2b")
    text = (tmp_path / "run/report/report.html").read_text()
    assert re.findall(r'aria-label="(.*?)"', text) == ["loss", "learning rate", "gradient norm", "|delta| / |W|"]
    assert not re.search(r"<script|src=|href=|https?://", text)
    for drawn in re.findall(r"<svg.*?</svg>", text):
        ElementTree.fromstring(drawn)


def test_names_in_the_report_cannot_be_markup() -> None:
    row = {"step": 1, "fault": "data", "where": "<script>alert(1)</script>", "action": "skip"}
    text = page([row], short(), ["<b>"])
    assert "<script>" not in text
    assert "&lt;b&gt;" in text


def test_a_chart_places_its_points_between_its_axes() -> None:
    drawn = chart("c", {"a": [(0, 1.0), (10, 3.0), (5, float("nan"))]})
    line = ElementTree.fromstring(drawn).find("polyline")
    assert line is not None
    (x0, y0), (x1, y1) = (map(float, point.split(",")) for point in line.attrib["points"].split())
    assert 0 < x0 < x1 < 640
    assert 220 > y0 > y1 > 0
    assert chart("empty", {"a": []}) == ""
    assert chart("zero", {"a": [(1, 0.0)]}, logarithmic=True) == ""


# --- progress ---------------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_one_line_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    logger = logging.getLogger("loraconv.training")
    with training_progress(True):
        logger.info("%s", {"step": 1, "steps": 10, "loss": 0.5, "rate": 1e-4})
        logger.info("%s", {"step": 2, "steps": 10, "loss": 0.25, "held_out_loss": 0.4})
        logger.info("%s", {"step": 3, "steps": 10, "fault": "data", "where": "sample x", "action": "skip"})
    said = screen.getvalue()
    assert "step 1 of 10: loss 0.5, rate 0.0001" in said
    assert re.search(r"step 2 of 10, 0 min \d+ s left: loss 0.25, held out 0.4", said)
    assert said.count("\n") == 1
    assert said.endswith("\r\x1b[K")
    assert not any(isinstance(handler, _Rows) for handler in logger.handlers)


@pytest.mark.parametrize("wanted", [True, False])
def test_there_is_no_progress_where_no_terminal_is(wanted: bool, capsys: pytest.CaptureFixture[str]) -> None:
    with training_progress(wanted):
        logging.getLogger("loraconv.training").info("%s", {"step": 1, "steps": 2, "loss": 1.0})
    assert capsys.readouterr().err == ""


def test_a_run_leaves_torchs_random_state_and_threads_alone(config: Path, tmp_path: Path) -> None:
    before = torch.get_rng_state()
    loraconv.train(out=tmp_path / "run", config=config, tiny="2b")
    assert torch.equal(torch.get_rng_state(), before)
    assert load_file(tmp_path / "run/last/peft/adapter_model.safetensors")
