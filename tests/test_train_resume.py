"""A run that is killed with SIGKILL and goes on is, bit for bit, the run that was never stopped."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from loraconv.errors import CorruptCheckpoint, UsageError
from loraconv.trainer import run
from loraconv.trainer.settings import CheckpointSettings, OptimizerSettings, ValidationSettings
from tests.train_support import contents, opener, rows, short, train

pytest_plugins = ["tests.train_fixtures"]

ROOT = Path(__file__).parent.parent


def drive(out: Path, variant: str, *points: str) -> None:
    words = [sys.executable, "-m", "tests.train_driver", str(out), variant, *points]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def equal_runs(one: Path, other: Path) -> None:
    """The same checkpoints, to the byte; the same metrics but for the time they took."""
    left, right = contents(one / "checkpoints"), contents(other / "checkpoints")
    assert sorted(left) == sorted(right)
    assert [name for name in left if left[name] != right[name]] == []
    assert (one / "best").resolve().name == (other / "best").resolve().name
    last = [{row["step"]: _timeless(row) for row in rows(place)} for place in (one, other)]
    assert last[0] == last[1]


def _timeless(row: dict[str, object]) -> dict[str, object]:
    return {key: value for key, value in row.items() if key != "seconds"}


def test_a_killed_lora_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    # Every step asks for one training sample. There is a checkpoint at step 2 (the first validation), 3, 6 and 8.
    points = ["sample:2", "sample:7", "save:2", "settle:1", "twice"]
    drive(tmp_path, "5b-i2v", *points)
    for point in points:
        equal_runs(tmp_path / "whole", tmp_path / point)


def test_a_killed_full_fine_tune_goes_on_bit_for_bit(tmp_path: Path) -> None:
    drive(tmp_path, "full", "sample:5")
    equal_runs(tmp_path / "whole", tmp_path / "sample:5")


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["5b", "1.5"])  # in fp16 and in bf16
def test_killed_at_any_step_in_sixteen_bits_with_accumulation_it_goes_on_bit_for_bit(
    tmp_path: Path, variant: str
) -> None:
    # Two samples a step, and none to go on from before the first checkpoint, at step 2.
    points = [*(f"sample:{n}" for n in range(4, 16)), *(f"save:{n}" for n in range(2, 5))]
    drive(tmp_path, variant, *points)
    for point in points:
        equal_runs(tmp_path / "whole", tmp_path / point)


# --- what resuming refuses --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps with checkpoints at 3 and 6."""
    out = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "open_dataset", opener())
        train(SETTINGS, out)
    return out


SETTINGS = short(checkpoints=CheckpointSettings(every=3, keep=9))


@pytest.fixture
def place(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(run, "open_dataset", opener())
    shutil.copytree(finished, tmp_path / "run", symlinks=True)
    return tmp_path / "run"


def test_a_run_that_is_there_is_not_written_over(place: Path) -> None:
    before = contents(place)
    with pytest.raises(UsageError) as error:
        train(SETTINGS, place)
    assert error.value.slug == "output-exists"
    assert "--resume" in error.value.hint
    assert contents(place) == before


def test_nothing_to_resume_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "open_dataset", opener())
    with pytest.raises(UsageError, match="no whole checkpoint"):
        train(SETTINGS, tmp_path / "run", resume=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 1}, "seed"),
        ({"optimizer": OptimizerSettings(rate=1e-3)}, "optimizer.rate"),
        ({"validation": ValidationSettings(every=3)}, "validation.every"),
    ],
)
def test_other_settings_are_refused_by_name(place: Path, changes: dict[str, object], named: str) -> None:
    with pytest.raises(UsageError) as error:
        train(replace(SETTINGS, **changes), place, resume=True)  # type: ignore[arg-type]
    assert error.value.slug == "resume-differs"
    assert named in error.value.where


def test_other_data_and_another_base_are_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "open_dataset", opener(count=7))
    with pytest.raises(UsageError, match="something else") as error:
        train(SETTINGS, place, resume=True)
    assert "data" in error.value.where


def test_more_steps_and_other_checkpoints_may_be_asked_for(place: Path, tmp_path: Path) -> None:
    longer = replace(SETTINGS, steps=8, checkpoints=CheckpointSettings(every=8, keep=9))
    train(longer, place, resume=True)
    train(longer, tmp_path / "long")
    one, other = (
        contents(p / "checkpoints/step-00000008/state")["state.safetensors"] for p in (place, tmp_path / "long")
    )
    assert one == other


def test_a_damaged_checkpoint_is_moved_aside_and_the_one_before_is_taken(place: Path, finished: Path) -> None:
    file = place / "checkpoints/step-00000006/state/state.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    outcome = train(SETTINGS, place, resume=True)
    assert any("damaged" in text for text in outcome.notices)
    assert contents(place / "checkpoints/step-00000006") == contents(finished / "checkpoints/step-00000006")
    assert [p.name for p in (place / "checkpoints").iterdir() if "damaged" in p.name]


def test_a_checkpoint_that_was_being_deleted_is_swept_away(place: Path) -> None:
    (place / "checkpoints/step-00000003/loraconv.json").unlink()
    train(SETTINGS, place, resume=True)
    assert not (place / "checkpoints/step-00000003").exists()


def test_a_state_that_is_none_is_said_to_be_damaged(place: Path) -> None:
    from loraconv.trainer.checkpoints import load
    from tests.train_support import session

    folder = place / "checkpoints/step-00000006"
    value = json.loads((folder / "state/state.json").read_text())
    del value["progress"]["best"]
    value["progress"]["nonsense"] = 1
    (folder / "state/state.json").write_text(json.dumps(value))
    with pytest.raises(CorruptCheckpoint, match="not the state"):
        load(folder, session(SETTINGS), {})


def test_no_state_file_is_a_pickle(finished: Path) -> None:
    kinds = {p.suffix for p in (finished / "checkpoints/step-00000006/state").iterdir()}
    assert kinds == {".safetensors", ".json"}
