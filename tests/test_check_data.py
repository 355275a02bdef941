"""``check-data``: every kind of problem is provoked, named with its sample, and nothing else is."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import EpsImagePlugin, Image
from safetensors.numpy import load_file, save_file

import loraconv
from loraconv.data import DataSettings, ModelNeeds, open_dataset
from loraconv.data.problems import KINDS
from loraconv.data_check import DataReport
from loraconv.errors import CorruptCheckpoint, FormatError, LoraconvError, UsageError, WriteFailed
from tests.cli_support import Cli, assert_clear_error, harmless, snapshot
from tests.videos import noise, plain, write_video

pytest_plugins = ["tests.cli_fixtures"]

SIZE = {"frames": 9, "height": 16, "width": 32}


# --- good data, to be spoiled -----------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four good videos, made once."""
    folder = tmp_path_factory.mktemp("stock")
    for number in range(4):
        write_video(folder / f"{number}.mkv", noise(number))
    return folder


@dataclass
class Videos:
    """A JSONL of four videos in a folder of their own; ``rows`` are written by :meth:`check`."""

    root: Path
    rows: list[Any] = field(default_factory=list)

    @property
    def list(self) -> Path:
        return self.root / "list.jsonl"

    def video(self, number: int) -> Path:
        return self.root / f"{number}.mkv"

    def replace(self, number: int, pixels: Any, **more: Any) -> None:
        write_video(self.video(number), pixels, **more)

    def check(self, **options: Any) -> DataReport:
        self.list.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in self.rows))
        return loraconv.check_data(self.list, **options)


@pytest.fixture
def videos(stock: Path, tmp_path: Path) -> Videos:
    shutil.copytree(stock, tmp_path / "videos")
    return Videos(tmp_path / "videos", [{"video": f"{n}.mkv", "prompt": f"prompt {n}"} for n in range(4)])


@dataclass
class Latents:
    """Four precomputed I2V samples; ``tensors`` of each are written by :meth:`check`."""

    root: Path
    tensors: list[dict[str, Any]]

    def check(self, **options: Any) -> DataReport:
        self.root.mkdir()
        for number, tensors in enumerate(self.tensors):
            save_file(tensors, self.root / f"{number}.safetensors")
        return loraconv.check_data(self.root, **options)


@pytest.fixture
def latents(tmp_path: Path) -> Latents:
    random = np.random.default_rng(0)
    samples = []
    for _ in range(4):
        image = random.normal(size=(3, 16, 2, 4)).astype(np.float32)
        image[1:] = 0
        samples.append(
            {
                "latents": random.normal(size=(3, 16, 2, 4)).astype(np.float32),
                "prompt_embeds": random.normal(size=(6, 8)).astype(np.float32),
                "image_latents": image,
            }
        )
    return Latents(tmp_path / "latents", samples)


@dataclass
class Talks:
    """Four LLaVA conversations about images, the last one without; ``entries`` are written by :meth:`check`."""

    root: Path
    entries: Any

    @property
    def list(self) -> Path:
        return self.root / "talks.json"

    def check(self, **options: Any) -> DataReport:
        self.list.write_text(json.dumps(self.entries))
        return loraconv.check_data(self.list, **options)


def talk(number: int, **more: Any) -> dict[str, Any]:
    turns = [
        {"from": "human", "value": "<image>\nWhat is it?"},
        {"from": "gpt", "value": f"Number {number}."},
        {"from": "human", "value": "Are you sure?"},
        {"from": "gpt", "value": "Yes."},
    ]
    return {"id": str(number), "image": f"{number}.png", "conversations": turns, **more}


@pytest.fixture
def talks(tmp_path: Path) -> Talks:
    entries = [talk(number) for number in range(4)]
    for number in range(3):
        Image.fromarray(noise(number, 1)[0]).save(tmp_path / f"{number}.png")
    del entries[3]["image"]
    entries[3]["conversations"][0]["value"] = "What is it?"
    return Talks(tmp_path, entries)


def found(report: DataReport) -> dict[str, list[str]]:
    """Every problem with the samples that have it."""
    return {problem.slug: list(problem.samples) for problem in report.problems}


@pytest.mark.parametrize("kind", ["videos", "latents", "talks"])
def test_good_data_has_no_problem(kind: str, request: pytest.FixtureRequest) -> None:
    report = request.getfixturevalue(kind).check(**(SIZE if kind != "talks" else {}))
    assert found(report) == {}
    assert report.fine
    assert (report.samples, report.good) == (4, 4)


# --- each kind of problem ---------------------------------------------------------------------------------------------

VIDEO_CASES: dict[str, tuple[Callable[[Videos], object], list[str]]] = {
    "row-broken": (lambda v: v.rows.__setitem__(1, '{"video": "1.mkv", '), ["list.jsonl line 2"]),
    "field-missing": (lambda v: v.rows.__setitem__(1, {"vidoe": "1.mkv", "prompt": "x"}), ["list.jsonl line 2"]),
    "file-missing": (lambda v: v.rows.append({"video": "9.mkv", "prompt": "x"}), ["list.jsonl line 5"]),
    "listed-twice": (lambda v: _link(v), ["list.jsonl line 5"]),
    "content-duplicate": (lambda v: shutil.copy(v.video(0), v.video(2)), ["list.jsonl line 3"]),
    "file-unlisted": (lambda v: write_video(v.video(7), noise(7)), ["7.mkv"]),
    "prompt-missing": (lambda v: v.rows[2].update(prompt=None), ["list.jsonl line 3"]),
    "prompt-empty": (lambda v: v.rows[2].update(prompt=" \n"), ["list.jsonl line 3"]),
    "prompt-not-text": (lambda v: v.rows[2].update(prompt=["a"]), ["list.jsonl line 3"]),
    "prompt-long": (lambda v: v.rows[2].update(prompt="word " * 227), ["list.jsonl line 3"]),
    "prompt-duplicate": (lambda v: v.rows[2].update(prompt="Prompt  0"), ["list.jsonl line 3"]),
    "video-unreadable": (lambda v: v.video(3).write_bytes(b"no video" * 99), ["list.jsonl line 4"]),
    "video-truncated": (lambda v: _cut(v.video(3)), ["list.jsonl line 4"]),
    "frames-few": (lambda v: v.replace(3, noise(3, 8)), ["list.jsonl line 4"]),
    "frames-many": (lambda v: v.replace(3, noise(3, 10)), ["list.jsonl line 4"]),
    "frames-differ": (lambda v: v.replace(3, noise(3, 10)), ["list.jsonl line 4"]),
    "size-small": (lambda v: v.replace(3, noise(3, 9, 16, 24)), ["list.jsonl line 4"]),
    "size-differs": (lambda v: v.replace(3, noise(3, 9, 16, 40)), ["list.jsonl line 4"]),
    "size-mixed": (lambda v: v.replace(3, noise(3, 9, 16, 40)), ["list.jsonl line 4"]),
    "rate-wrong": (lambda v: v.replace(3, noise(3), rate=16), ["list.jsonl line 4"]),
    "rate-mixed": (lambda v: v.replace(3, noise(3), rate=16), ["list.jsonl line 4"]),
    "video-black": (lambda v: v.replace(3, plain(0)), ["list.jsonl line 4"]),
    "video-white": (lambda v: v.replace(3, plain(255)), ["list.jsonl line 4"]),
    "video-constant": (lambda v: v.replace(3, plain((0, 90, 250))), ["list.jsonl line 4"]),
    "video-still": (lambda v: v.replace(3, noise(3, 1).repeat(9, axis=0)), ["list.jsonl line 4"]),
    "video-rotated": (lambda v: _turn(v), ["list.jsonl line 4"]),
}
#: What a check is told besides; a size that is given takes the place of what most videos have.
GIVEN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("frames-few", "frames-many", "size-small", "size-differs"), SIZE),
    "rate-wrong": {"fps": 8.0},
}
#: A video of another length is not of the majority's length either, and the like.
ALSO = {
    "video-truncated": {"frames-differ"},
}


def _cut(path: Path) -> None:
    """As a download that stopped: the header promises more frames than there are."""
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) * 6 // 10])


def _link(videos: Videos) -> None:
    (videos.root / "again.mkv").symlink_to(videos.video(0))
    videos.rows.append({"video": "again.mkv", "prompt": "x"})


def _turn(videos: Videos) -> None:
    """A video with the display matrix that phones write: a quarter turn, in the track header."""
    path = write_video(videos.root / "turned.mp4", noise(3), codec="mpeg4")
    raw = path.read_bytes()
    upright = b"".join(value.to_bytes(4, "big") for value in (0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000))
    turned = (0, 0x10000, 0, 0xFFFF0000, 0, 0, 0, 0, 0x40000000)
    at = raw.index(upright, raw.index(b"tkhd"))
    matrix = b"".join(value.to_bytes(4, "big") for value in turned)
    path.write_bytes(raw[:at] + matrix + raw[at + len(matrix) :])
    videos.video(3).unlink()
    videos.rows[3]["video"] = "turned.mp4"


@pytest.mark.parametrize("slug", VIDEO_CASES)
def test_each_problem_of_videos_is_named_with_its_sample(slug: str, videos: Videos) -> None:
    spoil, samples = VIDEO_CASES[slug]
    spoil(videos)
    report = videos.check(**GIVEN.get(slug, {}))
    problems = found(report)
    assert problems[slug] == samples
    unlisted = {"file-unlisted"} if slug in ("row-broken", "field-missing") else set()
    assert set(problems) - ALSO.get(slug, set()) - unlisted == {slug}
    assert report.fine == (not KINDS[slug].fatal)
    assert report.good == report.samples - (1 if KINDS[slug].fatal else 0)


LATENT_CASES: dict[str, Callable[[list[dict[str, Any]]], object]] = {
    "tensor-missing": lambda t: t[2].update(prompt_embedding=t[2].pop("prompt_embeds")),
    "tensor-shape": lambda t: t[2].update(latents=t[2]["latents"].swapaxes(0, 1).copy()),
    "shape-mixed": lambda t: t[2].update(prompt_embeds=np.ones((7, 8), np.float32)),
    "not-finite": lambda t: t[2]["latents"].__setitem__((1, 2, 0, 3), np.inf),
    "latents-scale": lambda t: t[2].update(latents=t[2]["latents"] * 127),
    "embeds-zero": lambda t: t[2].update(prompt_embeds=np.zeros((6, 8), np.float32)),
    "image-rest": lambda t: t[2]["image_latents"].__setitem__((2, 0, 0, 0), 1),
    "content-duplicate": lambda t: t.__setitem__(2, t[0]),
    "tensors-unreadable": lambda t: t[2].update(latents=t[2]["latents"].astype(np.int32)),
}


@pytest.mark.parametrize("slug", LATENT_CASES)
def test_each_problem_of_latents_is_named_with_its_sample(slug: str, latents: Latents) -> None:
    LATENT_CASES[slug](latents.tensors)
    report = latents.check()
    assert found(report) == {slug: ["2.safetensors"]}
    assert (report.fine, report.good) == (False, 3)


TALK_CASES: dict[str, Callable[[Talks], object]] = {
    "row-broken": lambda t: t.entries.__setitem__(1, "text"),
    "field-missing": lambda t: t.entries[1].update(conversation=t.entries[1].pop("conversations")),
    "file-missing": lambda t: t.entries[1].update(image="9.png"),
    "id-missing": lambda t: t.entries[1].pop("id"),
    "id-duplicate": lambda t: t.entries[1].update(id="0"),
    "image-unreadable": lambda t: _cut(t.root / "1.png"),
    "turns-missing": lambda t: t.entries[1].update(conversations=[]),
    "turn-malformed": lambda t: t.entries[1]["conversations"][2].update({"from": "user"}),
    "turn-empty": lambda t: t.entries[1]["conversations"][3].update(value=" "),
    "turn-order": lambda t: t.entries[1]["conversations"].pop(),
    "image-token": lambda t: t.entries[1]["conversations"][0].update(value="What is it?"),
}


@pytest.mark.parametrize("slug", TALK_CASES)
def test_each_problem_of_conversations_is_named_with_its_sample(slug: str, talks: Talks) -> None:
    TALK_CASES[slug](talks)
    report = talks.check()
    assert found(report) == {slug: ["entry 1"]}
    assert (report.fine, report.good) == (False, 3)


def test_every_kind_of_problem_is_provoked_above() -> None:
    assert {*VIDEO_CASES, *LATENT_CASES, *TALK_CASES} == set(KINDS)


# --- videos and lists, in detail --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field_name", "near"),
    [("PROMPT ", "PROMPT "), ("promt", "promt"), ("caption", "caption"), ("text", "text"), (" prompt", " prompt")],
)
def test_a_wrong_field_name_is_named_with_the_nearest(videos: Videos, field_name: str, near: str) -> None:
    for row in videos.rows:
        row[field_name] = row.pop("prompt")
    report = videos.check()
    [problem] = report.problems
    assert problem.slug == "field-missing"
    assert problem.details == (f"no 'prompt'; nearest: {near!r}",) * 4
    assert videos.check(prompt_field=field_name).fine


def test_a_csv_is_checked_like_a_jsonl(videos: Videos) -> None:
    path = videos.root / "list.csv"
    path.write_text('video,prompt\n0.mkv,"a, b"\n1.mkv,\n2.mkv,c,d\n3.mkv,e\n')
    report = loraconv.check_data(path)
    assert found(report) == {
        "row-broken": ["list.csv line 4"],
        "prompt-empty": ["list.csv line 3"],
        "file-unlisted": ["2.mkv"],
    }


def test_in_a_folder_videos_without_prompt_and_prompts_without_video_are_named(videos: Videos) -> None:
    for name in ("0", "1", "2", "lost"):
        (videos.root / f"{name}.txt").write_text(f"prompt {name}")
    assert found(loraconv.check_data(videos.root)) == {"prompt-missing": ["3.mkv"], "file-unlisted": ["lost.txt"]}


def test_a_folder_is_its_metadata_file_if_it_has_one(videos: Videos) -> None:
    (videos.root / "metadata.jsonl").write_text('{"file_name": "0.mkv", "text": "a"}\n')
    report = loraconv.check_data(videos.root, video_field="file_name", prompt_field="text")
    assert (report.kind, report.path.name, report.samples) == ("jsonl", "metadata.jsonl", 1)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi"])
def test_a_video_that_was_cut_off_is_found_in_every_container_that_says_how_long_it_is(
    videos: Videos, name: str
) -> None:
    options = {"movflags": "faststart"} if name == "a.mp4" else {}
    path = write_video(videos.root / name, noise(9, 25), codec="mpeg4", **options)
    videos.rows.append({"video": name, "prompt": "x"})
    assert videos.check().fine
    _cut(path)
    assert set(found(videos.check())) & {"video-truncated", "video-unreadable"}


def test_a_damaged_frame_is_found_where_no_header_says_how_many_there_are(videos: Videos) -> None:
    path = write_video(videos.root / "a.ts", noise(9, 17, 48, 64), codec="libx264")
    videos.rows.append({"video": "a.ts", "prompt": "x"})
    assert videos.check().fine
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) * 2 // 3])
    [problem] = videos.check().problems
    assert (problem.slug, problem.samples) == ("video-truncated", ("list.jsonl line 5",))
    assert problem.details[0].endswith("is damaged")


def test_a_clip_cut_out_of_a_file_without_encoding_is_whole(videos: Videos) -> None:
    """Its edit list hides the frames before the cut, which are still in the file and in its count of frames."""
    source = write_video(videos.root / "long.mp4", noise(9, 25), codec="mpeg4")
    with av.open(str(source)) as before, av.open(str(videos.root / "cut.mp4"), "w") as after:
        copied = after.add_stream_from_template(before.streams.video[0])
        for packet in before.demux(video=0):
            if packet.dts is not None:
                shift = round(2 / packet.time_base)  # seconds: 16 of 25 frames
                packet.dts, packet.pts, packet.stream = packet.dts - shift, packet.pts - shift, copied
                after.mux(packet)
    source.unlink()
    with av.open(str(videos.root / "cut.mp4")) as container:
        assert container.streams.video[0].frames == 25
    videos.rows.append({"video": "cut.mp4", "prompt": "x"})
    report = videos.check()
    assert found(report) == {}
    assert report.facts["frames"] == {"9": 5}


@pytest.mark.parametrize(("levels", "hidden"), [(4, True), (6, False)])
def test_the_noise_of_coding_does_not_hide_a_constant_or_a_still_video(
    videos: Videos, levels: int, hidden: bool
) -> None:
    dust = np.random.default_rng(0).integers(0, levels + 1, (9, 16, 32, 3), dtype=np.uint8)
    videos.replace(0, plain((200, 30, 90)) + dust)
    videos.replace(1, (noise(1, 1) // 2).repeat(9, axis=0) + dust)
    expected = {"video-constant": ["list.jsonl line 1"], "video-still": ["list.jsonl line 2"]}
    assert found(videos.check()) == (expected if hidden else {})


def test_half_of_the_videos_are_no_majority(videos: Videos) -> None:
    for number in (0, 1):
        videos.replace(number, noise(number, 10))
    assert found(videos.check()) == {}


def test_the_facts_count_every_value(videos: Videos) -> None:
    videos.replace(0, noise(0, 10), rate=16)
    assert videos.check().facts == {
        "frames": {"9": 3, "10": 1},
        "size": {"16 x 32": 4},
        "rate": {"8": 3, "16": 1},
    }


def test_two_ways_to_write_a_rate_are_one(videos: Videos) -> None:
    assert videos.check(fps=8.05).fine
    assert not videos.check(fps=8.5).fine


# --- latents and conversations, in detail -----------------------------------------------------------------------------


def test_the_details_say_what_is_wrong_with_latents(latents: Latents) -> None:
    shape = latents.tensors[0]["latents"].shape
    latents.tensors[0]["latents"] = latents.tensors[0]["latents"].swapaxes(0, 1).copy()
    latents.tensors[1]["latents"] = latents.tensors[1]["latents"][None]
    latents.tensors[2]["latent"] = latents.tensors[2].pop("latents")
    latents.tensors[3]["latents"] *= 1000
    details = {problem.slug: problem.details for problem in latents.check().problems}
    assert details["tensor-shape"] == (
        "latents is [16, 3, 2, 4]: its channels stand before its frames",
        f"latents is {[1, *shape]}, not 4 dimensions",
    )
    assert details["tensor-missing"] == ("no 'latents'; nearest: 'latent'",)
    assert details["latents-scale"][0].startswith("standard deviation ")


@pytest.mark.parametrize(("size", "fits"), [({"frames": 9}, True), ({"frames": 13}, False), ({"width": 40}, False)])
def test_latents_are_compared_with_the_size_asked_for(latents: Latents, size: dict[str, int], fits: bool) -> None:
    assert latents.check(**size).fine == fits


def test_the_frame_that_1_5_repeats_is_no_problem(latents: Latents) -> None:
    for tensors in latents.tensors:
        for key in ("latents", "image_latents"):
            tensors[key] = np.concatenate([tensors[key][:1], tensors[key]])
    report = latents.check(frames=9)
    assert found(report) == {}


def test_another_image_in_the_second_frame_is_a_problem(latents: Latents) -> None:
    latents.tensors[1]["image_latents"][1] = 0.5
    assert found(latents.check()) == {"image-rest": ["1.safetensors"]}


def test_latents_that_are_all_the_same_number_are_no_latents(latents: Latents) -> None:
    latents.tensors[1]["latents"][:] = 1
    assert found(latents.check()) == {"latents-scale": ["1.safetensors"]}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("key", ["latents", "prompt_embeds", "image_latents"])
def test_a_single_number_that_is_none_is_found_in_every_tensor(latents: Latents, key: str, value: float) -> None:
    latents.tensors[1][key].flat[-1 if key != "image_latents" else 3] = value
    assert found(latents.check()) == {"not-finite": ["1.safetensors"]}


def test_a_missing_image_is_named_where_other_samples_have_one(latents: Latents) -> None:
    del latents.tensors[1]["image_latents"]
    assert found(latents.check()) == {"tensor-missing": ["1.safetensors"]}


def test_a_damaged_sample_file_is_named(latents: Latents) -> None:
    latents.check()
    _cut(latents.root / "3.safetensors")
    assert found(loraconv.check_data(latents.root)) == {"tensors-unreadable": ["3.safetensors"]}


@pytest.mark.parametrize(
    "spoil",
    [
        lambda turns: turns.reverse(),
        lambda turns: turns.pop(0),
        lambda turns: turns.insert(1, dict(turns[0], value="Well?")),
    ],
    ids=["backwards", "gpt first", "human twice"],
)
def test_every_disorder_of_turns_is_found(talks: Talks, spoil: Callable[[list[Any]], object]) -> None:
    spoil(talks.entries[1]["conversations"])
    assert "entry 1" in found(talks.check())["turn-order"]


@pytest.mark.parametrize(("turn", "text"), [(0, "<image> <image>"), (2, "<image>"), (1, "an <image>")])
def test_an_image_token_too_many_is_found_wherever_it_stands(talks: Talks, turn: int, text: str) -> None:
    talks.entries[1]["conversations"][turn]["value"] += text
    assert found(talks.check()) == {"image-token": ["entry 1"]}


def test_an_image_token_in_a_later_turn_is_found(talks: Talks) -> None:
    first, _, later, _ = talks.entries[1]["conversations"]
    first["value"], later["value"] = later["value"], first["value"]
    assert found(talks.check()) == {"image-token": ["entry 1"]}


def test_an_image_token_without_an_image_is_found(talks: Talks) -> None:
    del talks.entries[1]["image"]
    assert found(talks.check()) == {"image-token": ["entry 1"]}


def test_images_may_lie_in_another_folder(talks: Talks) -> None:
    (talks.root / "pictures").mkdir()
    for number in range(3):
        (talks.root / f"{number}.png").rename(talks.root / "pictures" / f"{number}.png")
    assert set(found(talks.check())) == {"file-missing"}
    assert talks.check(images=talks.root / "pictures").fine


def test_an_image_format_that_calls_programs_is_not_even_opened(talks: Talks, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(noise(0, 1)[0]).save(talks.root / "1.png", "EPS")
    monkeypatch.setattr(EpsImagePlugin.EpsImageFile, "load", lambda self: None)
    with Image.open(talks.root / "1.png") as control:
        control.load()  # what Ghostscript does where it is installed
    assert found(talks.check()) == {"image-unreadable": ["entry 1"]}


def test_openai_style_turns_are_explained(talks: Talks) -> None:
    talks.entries[1]["conversations"] = [{"role": "user", "content": "hello"}]
    [problem] = talks.check().problems
    assert problem.details == ("turn 0: no 'from'; nearest: 'role'",)


# --- what is not a dataset --------------------------------------------------------------------------------------------


def _write(name: str, data: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_text(data)
        return folder / name

    return make


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda folder: folder / "nothing", UsageError),
        (lambda folder: folder, FormatError),
        (_write("notes.txt", "hello"), FormatError),
        (_write("empty.csv", ""), FormatError),
        (_write("header.csv", "video,prompt\n"), FormatError),
        (_write("empty.jsonl", "\n\n"), FormatError),
        (_write("object.json", "{}"), FormatError),
        (_write("numbers.json", "[1, 2]"), FormatError),
        (_write("broken.json", "[{"), CorruptCheckpoint),
        (_write("deep.json", "[" * 200_000), CorruptCheckpoint),
        (_write("twice.csv", "video,video\na,b\n"), CorruptCheckpoint),
        (_write("open.csv", 'video,prompt\na,"b\n'), CorruptCheckpoint),
    ],
)
def test_what_is_no_dataset_is_one_clear_error(
    make: Callable[[Path], Path], error: type[LoraconvError], tmp_path: Path, cli: Cli
) -> None:
    path = make(tmp_path)
    with pytest.raises(error):
        loraconv.check_data(path)
    assert_clear_error(cli("check-data", path))


@pytest.mark.parametrize("wrong", [{"frames": 48}, {"height": 20}, {"fps": 0.0}, {"kind": "zip"}])
def test_a_senseless_option_is_a_usage_error(wrong: dict[str, Any], videos: Videos) -> None:
    with pytest.raises(UsageError):
        videos.check(**wrong)


def test_names_from_hostile_files_drive_no_terminal(videos: Videos, cli: Cli) -> None:
    evil = "\x1b[2J\u202e\x07"
    videos.rows += [{"video": f"{evil}.mkv", "prompt": evil}, {evil: 1}, {"video": "a\0b", "prompt": "x"}]
    videos.check()
    done = cli("check-data", videos.list, "--verbose")
    assert done.code == 4
    assert harmless(done.out)
    assert harmless(done.err)


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_exit_code_tells_good_from_bad(videos: Videos, cli: Cli) -> None:
    videos.check()
    done = cli("check-data", videos.list)
    assert done.code == 0
    assert "every sample can be trained on" in done.out
    videos.rows[2]["prompt"] = "prompt 0"
    videos.check()
    done = cli("check-data", videos.list)
    assert done.code == 0
    assert "1 kind of warning" in done.out
    assert cli("check-data", videos.list, "--frames", "13").code == 4


def test_the_table_names_problem_count_sample_and_how_to_mend_it(videos: Videos, cli: Cli) -> None:
    for number in range(4):
        videos.rows.append({"video": "0.mkv", "prompt": f"x {number}"})
    videos.check()
    lines = [line.split() for line in cli("check-data", videos.list).out.splitlines()]
    assert ["error", "listed-twice", "4", *KINDS["listed-twice"].what.split()] in lines
    assert ["list.jsonl", "line", "5:", "as", "list.jsonl", "line", "1"] in lines
    assert ["and", "1", "more"] in lines
    assert ["mend:", *KINDS["listed-twice"].mend.split()] in lines
    assert ["verdict", "4", "of", "8", "samples", "can", "be", "trained", "on"] in lines
    assert "line 8" in cli("check-data", videos.list, "-v").out


def test_json_holds_everything(videos: Videos, cli: Cli) -> None:
    videos.rows[2]["prompt"] = ""
    report = videos.check()
    value = json.loads(cli("check-data", videos.list, "--json").out)
    assert value == {
        "schema": 1,
        "path": str(videos.list),
        "kind": "jsonl",
        "fine": False,
        "samples": 4,
        "good": 3,
        "facts": report.facts,
        "wrote": None,
        "problems": [
            {
                "slug": "prompt-empty",
                "severity": "error",
                "what": KINDS["prompt-empty"].what,
                "mend": KINDS["prompt-empty"].mend,
                "samples": [{"name": "list.jsonl line 3", "detail": ""}],
            }
        ],
    }


def test_without_pyav_the_error_says_how_to_install_it(
    videos: Videos, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    videos.check()
    monkeypatch.setitem(sys.modules, "av", None)
    done = cli("check-data", videos.list)
    assert done.code == 2
    assert "pip install 'loraconv[train]'" in done.err


# --- the cleaned list -------------------------------------------------------------------------------------------------


def test_the_cleaned_list_holds_the_good_rows_and_can_be_trained_on(videos: Videos, tmp_path: Path) -> None:
    videos.rows[1]["prompt"] = ""
    videos.rows[2]["note"] = "kept"
    videos.list.write_text("".join(json.dumps(row) + "\n" for row in videos.rows))
    before = snapshot(videos.root)
    report = videos.check(fix=tmp_path / "out")
    assert report.wrote == tmp_path / "out" / "clean.jsonl"
    rows = [json.loads(line) for line in report.wrote.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["prompt 0", "prompt 2", "prompt 3"]
    assert rows[1]["note"] == "kept"
    assert [row["video"] for row in rows] == [f"../videos/{number}.mkv" for number in (0, 2, 3)]
    assert loraconv.check_data(report.wrote).samples == 3
    settings = DataSettings(kind="jsonl", path=report.wrote, cache=tmp_path / "cache", held_out=0.0)
    assert len(open_dataset(settings, ModelNeeds(4, 3, 2, 4, 6, 8))[0]) == 3
    after = snapshot(videos.root)
    assert {name: state for name, state in after.items() if name != "list.jsonl"} == {
        name: state for name, state in before.items() if name != "list.jsonl"
    }


def test_a_cleaned_csv_is_a_csv(videos: Videos, tmp_path: Path) -> None:
    path = videos.root / "list.csv"
    path.write_text('video,prompt,note\n0.mkv,"a, b",x\n1.mkv,,y\n3.mkv,"say ""c""",z\n')
    report = loraconv.check_data(path, fix=tmp_path / "out")
    with (tmp_path / "out" / "clean.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["prompt"], row["note"]) for row in rows] == [("a, b", "x"), ('say "c"', "z")]
    assert [(tmp_path / "out" / row["video"]).resolve().name for row in rows] == ["0.mkv", "3.mkv"]
    assert report.good == 2


def test_a_cleaned_folder_is_a_list(videos: Videos, tmp_path: Path) -> None:
    for number in (0, 2):
        (videos.root / f"{number}.txt").write_text(f"prompt {number}")
    report = loraconv.check_data(videos.root, fix=tmp_path / "out")
    assert report.wrote is not None
    assert [json.loads(line)["prompt"] for line in report.wrote.read_text().splitlines()] == ["prompt 0", "prompt 2"]


def test_cleaned_latents_are_copies_of_the_good_ones(latents: Latents, tmp_path: Path) -> None:
    latents.tensors[1]["latents"][0, 0, 0, 0] = np.nan
    report = latents.check(fix=tmp_path / "out")
    assert report.good == 3
    assert sorted(path.name for path in (tmp_path / "out").glob("*.safetensors")) == [
        f"{number}.safetensors" for number in (0, 2, 3)
    ]
    copied = load_file(tmp_path / "out" / "2.safetensors")
    assert all(np.array_equal(copied[key], value) for key, value in latents.tensors[2].items())


def test_cleaned_conversations_are_the_good_ones_unchanged(talks: Talks, tmp_path: Path) -> None:
    talks.entries[1]["conversations"].pop()
    talks.check(fix=tmp_path / "out")
    kept = [talks.entries[number] for number in (0, 2, 3)]
    assert json.loads((tmp_path / "out" / "clean.json").read_text()) == kept


def test_a_second_cleaned_list_needs_overwrite(videos: Videos, tmp_path: Path) -> None:
    videos.check(fix=tmp_path / "out")
    with pytest.raises(WriteFailed, match="exists"):
        videos.check(fix=tmp_path / "out")
    del videos.rows[3]
    report = videos.check(fix=tmp_path / "out", overwrite=True)
    assert report.wrote is not None
    assert len(report.wrote.read_text().splitlines()) == 3


def test_a_cleaned_list_is_never_written_over_the_dataset(videos: Videos) -> None:
    videos.check()
    before = snapshot(videos.root)
    with pytest.raises(LoraconvError):
        loraconv.check_data(videos.list, fix=videos.root, overwrite=True)
    assert snapshot(videos.root) == before


def test_a_cleaned_list_does_not_replace_itself(videos: Videos, tmp_path: Path) -> None:
    report = videos.check(fix=tmp_path / "out")
    assert report.wrote is not None
    with pytest.raises(UsageError, match="inside an input"):
        loraconv.check_data(report.wrote, fix=tmp_path / "out", overwrite=True)


def test_no_list_is_written_where_nothing_is_good(videos: Videos, tmp_path: Path) -> None:
    for row in videos.rows:
        row["prompt"] = ""
    with pytest.raises(FormatError, match="no sample is good"):
        videos.check(fix=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_rotation_of_the_test_is_one_that_pyav_sees(videos: Videos) -> None:
    """The control of ``video-rotated``: the spoiled header is still a video, and it is turned."""
    _turn(videos)
    with av.open(str(videos.root / "turned.mp4")) as container:
        assert abs(next(container.decode(video=0)).rotation) == 90
