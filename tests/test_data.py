"""Training data: moving shapes, videos of every kind of list, precomputed latents; encoded, cached, split."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from loraconv.data import Dataset, DataSettings, ModelNeeds, Sample, clips, open_dataset
from loraconv.data.settings import PixelSize, padding
from loraconv.data.shapes import COLOURS, DIRECTIONS, GROUND, Scene, draw, scene
from loraconv.data.stand_in import linear_latents, word_vectors
from loraconv.data.video import DEMUXERS, read_video, scan_video
from loraconv.errors import CorruptCheckpoint, FormatError, UsageError
from tests.videos import FRAMES, HEIGHT, WIDTH, noise, write_video

#: What fits the videos of ``tests.videos``: 9 frames of 16 x 32 pixels.
TINY = ModelNeeds(channels=4, frames=3, height=2, width=4, tokens=6, text_dim=8)
#: CogVideoX 1.5: two latent frames are one patch, so the first one is repeated.
TINY_15 = replace(TINY, frames=4, patch_size_t=2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four videos, each with its prompt beside it."""
    made = tmp_path / "videos"
    for number in range(4):
        write_video(made / f"{number}.mkv", noise(number))
        (made / f"{number}.txt").write_text(f"prompt {number}\n")
    return made


def opened(kind: str, path: Path | None, model: ModelNeeds = TINY, **more: Any) -> tuple[Dataset, Dataset]:
    """The training and the held-out part; the cache lies beside the data."""
    cache = {"cache": path.parent / "cache"} if path is not None else {}
    return open_dataset(DataSettings(kind=kind, path=path, **{"held_out": 0.25, **cache, **more}), model)


def everything(parts: tuple[Dataset, Dataset]) -> dict[str, Sample]:
    return {sample.name: sample for part in parts for sample in (part[i] for i in range(len(part)))}


def same(one: Sample, other: Sample) -> bool:
    return torch.equal(one.latents, other.latents) and torch.equal(one.prompt, other.prompt)


# --- moving shapes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", range(24))
def test_a_shape_moves_as_its_prompt_says_and_otherwise_stays_the_same(index: int) -> None:
    made = scene(3, index)
    # Half of 32 pixels in 16 steps: one pixel a frame, on a torus.
    frames = draw(made, PixelSize(17, 32, 32))
    _, colour, shape, _, direction = made.prompt.split()
    assert shape in ("square", "circle")
    down, right = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}[direction]
    for number, frame in enumerate(frames):
        assert np.array_equal(frame, np.roll(frames[0], (down * number, right * number), axis=(0, 1)))
    inside = (frames[0] != GROUND).any(axis=-1)
    assert {tuple(map(int, pixel)) for pixel in frames[0][inside]} == {COLOURS[colour]}


@pytest.mark.parametrize(("shape", "area"), [("square", 4 * 0.2**2), ("circle", 3.14159 * 0.2**2)])
def test_a_shape_has_the_area_that_its_radius_says_whatever_the_aspect(shape: str, area: float) -> None:
    frames = draw(Scene("red", shape, "up", (0.1, 0.95), 0.2), PixelSize(1, 200, 400))
    assert (frames[..., 0] == 255).sum() / 200**2 == pytest.approx(area, rel=0.02)


def test_every_colour_shape_and_direction_occurs_and_seeds_differ() -> None:
    prompts = {scene(0, index).prompt for index in range(1000)}
    assert len(prompts) == len(COLOURS) * 2 * len(DIRECTIONS) == 48
    assert [scene(0, i) for i in range(9)] != [scene(1, i) for i in range(9)]


def test_the_same_shapes_come_out_of_another_process_whatever_its_hash_seed() -> None:
    code = (
        "import sys; from loraconv.data import *;"
        "s = open_dataset(DataSettings(count=4), ModelNeeds(4, 3, 2, 4, 6, 8))[0][2];"
        "sys.stdout.buffer.write(s.latents.numpy().tobytes() + s.prompt.numpy().tobytes())"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True)
        for seed in ("1", "2")
    ]
    sample = open_dataset(DataSettings(count=4), TINY)[0][2]
    expected = sample.latents.numpy().tobytes() + sample.prompt.numpy().tobytes()
    assert [run.stdout for run in runs] == [expected, expected]


def test_shapes_are_samples_as_the_model_takes_them() -> None:
    train, held = open_dataset(DataSettings(count=40), replace(TINY, image=True))
    assert (len(train), len(held)) == (35, 5)
    sample = train[0]
    assert sample.latents.shape == (3, 4, 2, 4)
    assert sample.prompt.shape == (6, 8)
    assert sample.image is not None
    assert sample.image.shape == sample.latents.shape
    assert torch.equal(sample.image[0], sample.latents[0])
    assert not sample.image[1:].any()
    assert sample.latents.dtype == sample.prompt.dtype == sample.image.dtype == torch.float32
    deviation = torch.stack([train[i].latents for i in range(len(train))]).std()
    assert 0.3 < deviation < 1.5, "a diffusion model expects latents of about 1"


def test_the_first_latent_frame_is_repeated_until_time_splits_into_patches() -> None:
    image = replace(TINY_15, image=True)
    plain, padded = (open_dataset(DataSettings(count=4, frames=9), model)[0][0] for model in (TINY, image))
    assert torch.equal(padded.latents, torch.cat([plain.latents[:1], plain.latents]))
    assert padded.image is not None
    assert torch.equal(padded.image[:2], plain.latents[:1].expand(2, -1, -1, -1))
    assert not padded.image[2:].any()


def test_stand_in_latents_are_signed_sums_of_averages() -> None:
    pixels = noise(0, 9, 16, 24)
    latents = linear_latents(pixels, 16)
    assert latents.shape == (3, 16, 2, 3)
    values = pixels.astype(np.float64) / 127.5 - 1
    for frame, row, column in np.ndindex(3, 2, 3):
        time = slice(0, 1) if frame == 0 else slice(4 * frame - 3, 4 * frame + 1)
        block = values[time, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
        red, green, blue = (block[..., k].mean() for k in range(3))
        for channel in range(16):
            expected = (
                red * (-1) ** (channel % 2) + green * (-1) ** (channel // 2 % 2) + blue * (-1) ** (channel // 4 % 2)
            )
            assert latents[frame, channel, row, column] == pytest.approx(expected, abs=1e-6)


def test_one_frame_alone_can_be_encoded() -> None:
    assert linear_latents(noise(0, 1), 4).shape == (1, 4, 2, 4)


def test_a_word_is_the_same_vector_wherever_it_stands() -> None:
    one, other = word_vectors("A red square", 5, 4096), word_vectors("square red", 5, 4096)
    assert np.array_equal(one[1], other[1])
    assert np.array_equal(one[2], other[0])
    assert np.array_equal(one[3], one[4])
    assert np.array_equal(one[3], other[2])
    assert one.std() == pytest.approx(1, abs=0.05)
    assert abs(float(one[0] @ one[1]) / 4096) < 0.1, "two words must be told apart"
    assert np.array_equal(word_vectors("a b c", 2, 8), word_vectors("A  B", 2, 8))


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"kind": "videos"}, "kind"),
        ({"kind": "csv"}, "path"),
        ({"count": 0}, "count"),
        ({"held_out": 1.0}, "held_out"),
        ({"frames": 48}, "45 or 49"),
        ({"height": 100}, "multiples of 8"),
    ],
)
def test_a_senseless_setting_is_refused(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        DataSettings(**wrong)


@pytest.mark.parametrize("wrong", [{"frames": 13}, {"height": 24}, {"width": 24}])
def test_a_size_that_the_model_does_not_take_is_refused_with_both_sizes(wrong: dict[str, int]) -> None:
    with pytest.raises(FormatError, match="the model takes 3 frames, 2 x 4"):
        open_dataset(DataSettings(**wrong), TINY)


def test_latent_frames_that_do_not_split_into_patches_are_refused() -> None:
    with pytest.raises(FormatError, match="patches of 2"):
        open_dataset(DataSettings(), replace(TINY, patch_size_t=2))


@pytest.mark.parametrize("patch", [None, 1, 2, 3, 4])
def test_padding_makes_whole_patches_and_never_more(patch: int | None) -> None:
    for frames in range(1, 12):
        assert (frames + padding(frames, patch)) % (patch or 1) == 0
        assert 0 <= padding(frames, patch) < (patch or 1)


def test_both_numbers_of_frames_that_make_whole_patches_are_taken() -> None:
    for frames in (9, 13):
        assert open_dataset(DataSettings(frames=frames), TINY_15)[0][0].latents.shape == TINY_15.shape


def test_importing_the_package_loads_neither_torch_nor_numpy() -> None:
    code = "import sys, loraconv.data; sys.exit(bool({'torch', 'numpy', 'av'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# --- lists of videos --------------------------------------------------------------------------------------------------


def test_a_folder_gives_the_latents_of_its_pixels_and_its_prompts(folder: Path) -> None:
    samples = everything(opened("folder", folder))
    assert sorted(samples) == ["0.mkv", "1.mkv", "2.mkv", "3.mkv"]
    for number in range(4):
        sample = samples[f"{number}.mkv"]
        assert np.array_equal(sample.latents.numpy(), linear_latents(noise(number), 4))
        assert np.array_equal(sample.prompt.numpy(), word_vectors(f"prompt {number}", 6, 8))


def _sat_layout(folder: Path) -> tuple[str, Path]:
    root = folder.parent / "sat"
    shutil.copytree(folder, root / "videos", ignore=shutil.ignore_patterns("*.txt"))
    shutil.copytree(folder, root / "labels", ignore=shutil.ignore_patterns("*.mkv"))
    return "folder", root


def _two_lists(folder: Path) -> tuple[str, Path]:
    (folder / "videos.txt").write_text("".join(f"{n}.mkv\n" for n in range(4)))
    (folder / "prompts.txt").write_text("".join(f"prompt {n}\n" for n in range(4)))
    return "folder", folder


def _csv_list(folder: Path) -> tuple[str, Path]:
    path = folder.parent / "list.csv"
    with path.open("w", encoding="utf-8-sig", newline="") as file:  # the byte order mark that spreadsheets write
        writer = csv.writer(file)
        writer.writerows([("video", "prompt"), *((f"videos/{n}.mkv", f"prompt {n}") for n in range(4))])
    return "csv", path


def _jsonl_list(folder: Path) -> tuple[str, Path]:
    path = folder.parent / "list.jsonl"
    rows = [{"video": f"videos/{n}.mkv", "prompt": f"prompt {n}"} for n in range(4)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return "jsonl", path


@pytest.mark.parametrize("layout", [_sat_layout, _two_lists, _csv_list, _jsonl_list])
def test_every_layout_gives_the_same_samples(folder: Path, layout: Any) -> None:
    expected = everything(opened("folder", folder))
    kind, path = layout(folder)
    found = everything(opened(kind, path))
    assert len(found) == 4
    for one, other in zip(expected.values(), found.values(), strict=True):
        assert same(one, other)


def test_other_field_names_can_be_given(folder: Path) -> None:
    path = folder.parent / "list.jsonl"
    path.write_text("".join(json.dumps({"clip": f"videos/{n}.mkv", "text": f"prompt {n}"}) + "\n" for n in range(4)))
    assert len(everything(opened("jsonl", path, video_field="clip", prompt_field="text"))) == 4
    with pytest.raises(FormatError, match="has no video"):
        opened("jsonl", path)


def test_two_lists_of_different_length_are_refused(folder: Path) -> None:
    _two_lists(folder)
    (folder / "prompts.txt").write_text("only one\n")
    with pytest.raises(CorruptCheckpoint, match="4 videos and 1 prompts"):
        opened("folder", folder)


def test_a_row_without_a_prompt_is_an_error_that_names_it(folder: Path) -> None:
    (folder / "2.txt").write_text(" \n")
    with pytest.raises(FormatError, match=r"2\.mkv") as caught:
        opened("folder", folder)
    assert "loraconv check-data" in caught.value.hint


# --- videos -----------------------------------------------------------------------------------------------------------


def test_the_first_frames_are_read_bit_for_bit_and_cut_at_the_centre(tmp_path: Path) -> None:
    wide, high = noise(0, 12, 16, 48), noise(1, 9, 24, 32)
    path = write_video(tmp_path / "wide.mkv", wide)
    assert np.array_equal(read_video(path, PixelSize(9, 16, 32)), wide[:9, :, 8:40])
    path = write_video(tmp_path / "high.mkv", high)
    assert np.array_equal(read_video(path, PixelSize(9, 16, 32)), high[:, 4:20])


def test_a_larger_video_is_scaled_down(tmp_path: Path) -> None:
    small = np.zeros((FRAMES, HEIGHT, WIDTH, 3), np.uint8)
    small[:, :, WIDTH // 2 :] = (250, 120, 10)
    path = write_video(tmp_path / "a.mkv", small.repeat(3, axis=1).repeat(3, axis=2))
    found = read_video(path, PixelSize(FRAMES, HEIGHT, WIDTH)).astype(int)
    away = np.r_[0 : WIDTH // 2 - 3, WIDTH // 2 + 3 : WIDTH]  # bicubic scaling blurs the edge
    assert np.abs(found - small)[:, :, away].max() <= 2


@pytest.mark.parametrize(("size", "words"), [((13, 16, 32), "9 frames, 13"), ((9, 16, 40), "16 x 32 pixels")])
def test_a_video_that_is_too_short_or_too_small_is_refused(tmp_path: Path, size: Any, words: str) -> None:
    path = write_video(tmp_path / "a.mkv", noise(0))
    with pytest.raises(FormatError) as caught:
        read_video(path, PixelSize(*size))
    assert words in caught.value.why


@pytest.mark.parametrize("guards", ["demuxers and protocols", "protocols alone"])
def test_a_playlist_that_is_named_as_a_video_opens_no_other_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, guards: str
) -> None:
    write_video(tmp_path / "secret.mkv", noise(0))
    evil = tmp_path / "evil.mp4"
    evil.write_text("ffconcat version 1.0\nfile secret.mkv\n")
    monkeypatch.chdir(tmp_path)
    if guards == "protocols alone":
        monkeypatch.setattr("loraconv.data.video.DEMUXERS", DEMUXERS + ",concat")
    with evil.open("rb") as file, av.open(file) as container:
        assert len(list(container.decode(video=0))) == FRAMES, "the control: PyAV by itself follows the list"
    with pytest.raises(CorruptCheckpoint, match="cannot decode"):
        scan_video(evil)


def test_only_containers_of_videos_are_opened(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    Image.fromarray(noise(0, 1)[0]).save(path, "PNG")
    with path.open("rb") as file, av.open(file) as container:
        assert len(list(container.decode(video=0))) == 1, "the control: PyAV by itself opens a picture"
    with pytest.raises(CorruptCheckpoint, match="cannot decode"):
        scan_video(path)


@pytest.mark.parametrize(
    "data", [b"", b"not a video at all\n" * 9, b"\x1aE\xdf\xa3" + bytes(99), b"RIFF\xff\xff\xff\xffAVI LIST"]
)
def test_what_is_no_video_is_one_clear_error(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "a.mkv"
    path.write_bytes(data)
    with pytest.raises(CorruptCheckpoint, match="cannot decode"):
        scan_video(path)


def test_a_video_damaged_anywhere_never_escapes_as_another_error(tmp_path: Path) -> None:
    whole = write_video(tmp_path / "a.mp4", noise(0), codec="mpeg4").read_bytes()
    path, random = tmp_path / "b.mp4", np.random.default_rng(1)
    refused = 0
    for _ in range(150):
        damaged = bytearray(whole)
        for at in random.integers(0, len(whole), 8):
            damaged[at] = random.integers(0, 256)
        path.write_bytes(damaged)
        try:
            scan_video(path)
        except CorruptCheckpoint:
            refused += 1
    assert refused > 10


def test_a_frame_too_large_to_decode_is_refused_before_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "a.mkv", noise(0))
    monkeypatch.setattr("loraconv.data.video.MAX_PIXELS", HEIGHT * WIDTH - 1)
    with pytest.raises(CorruptCheckpoint) as caught:
        scan_video(path)
    assert "32 x 16 pixels" in caught.value.why


def test_without_pyav_the_error_says_how_to_install_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UsageError, match="not installed") as caught:
        opened("folder", folder)
    assert caught.value.hint == "pip install 'loraconv[train]'"


# --- the cache --------------------------------------------------------------------------------------------------------


def test_a_second_run_reads_the_cache_and_decodes_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = opened("folder", folder)
    expected = everything(first)

    def never(*_: object) -> None:
        raise AssertionError("decoded again")

    monkeypatch.setattr(clips, "read_video", never)
    second = opened("folder", folder)
    assert [part.fingerprint for part in second] == [part.fingerprint for part in first]
    assert all(same(sample, expected[name]) for name, sample in everything(second).items())


def test_the_cache_holds_plain_safetensors_files(folder: Path) -> None:
    samples = everything(opened("folder", folder, replace(TINY, image=True)))
    files = [path for path in (folder.parent / "cache").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors"}
    stored = [load_file(path) for path in files]
    videos = [tensors for tensors in stored if set(tensors) == {"latents", "image_latents"}]
    assert len(videos) == 4
    assert len([tensors for tensors in stored if set(tensors) == {"prompt_embeds"}]) == 4
    assert any(torch.equal(videos[0]["latents"], sample.latents) for sample in samples.values())


def test_a_changed_video_or_model_is_encoded_again(folder: Path) -> None:
    opened("folder", folder)
    write_video(folder / "0.mkv", noise(50))
    assert np.array_equal(everything(opened("folder", folder))["0.mkv"].latents.numpy(), linear_latents(noise(50), 4))
    wider = everything(opened("folder", folder, replace(TINY, channels=8)))["0.mkv"]
    assert np.array_equal(wider.latents.numpy(), linear_latents(noise(50), 8))


def test_a_damaged_cache_entry_is_an_error_that_says_what_to_delete(folder: Path) -> None:
    opened("folder", folder)
    for path in (folder.parent / "cache").rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptCheckpoint) as caught:
        everything(opened("folder", folder))
    assert caught.value.hint.startswith("rm -r ")


def test_two_processes_may_fill_one_cache(folder: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from loraconv.data import *; p = Path(sys.argv[1]);"
        "settings = DataSettings(kind='folder', path=p, cache=p.parent / 'cache');"
        "print(open_dataset(settings, ModelNeeds(4, 3, 2, 4, 6, 8))[0].fingerprint)"
    )
    both = [subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE) for _ in range(2)]
    said = {process.communicate()[0] for process in both}
    assert [process.returncode for process in both] == [0, 0]
    assert len(said) == 1


# --- split and fingerprint --------------------------------------------------------------------------------------------


def test_held_out_samples_are_a_share_and_never_trained_on() -> None:
    train, held = open_dataset(DataSettings(count=40, held_out=0.3), TINY)
    names = [{part[i].name for i in range(len(part))} for part in (train, held)]
    assert (len(names[0]), len(names[1])) == (28, 12)
    assert not names[0] & names[1]


def test_the_split_depends_on_content_and_not_on_names_or_order(folder: Path) -> None:
    held = opened("folder", folder)[1][0]
    for number in range(4):
        for suffix in ("mkv", "txt"):
            (folder / f"{number}.{suffix}").rename(folder / f"{9 - number}.{suffix}")
    again = opened("folder", folder)[1]
    assert len(again) == 1
    assert same(again[0], held)


def test_the_seed_chooses_what_is_held_out(folder: Path) -> None:
    assert len({opened("folder", folder, seed=seed)[1][0].name for seed in range(12)}) > 1


def test_equal_samples_stay_on_one_side(folder: Path) -> None:
    for number in range(4):
        for suffix in ("mkv", "txt"):
            shutil.copy(folder / f"{number}.{suffix}", folder / f"{number}-again.{suffix}")
    train, held = opened("folder", folder, held_out=0.1)
    assert (len(train), len(held)) == (6, 2)
    assert same(held[0], held[1])


def test_nothing_held_out_is_allowed_and_everything_is_not(folder: Path) -> None:
    train, held = opened("folder", folder, held_out=0.0)
    assert (len(train), len(held)) == (4, 0)
    for number in (1, 2, 3):
        (folder / f"{number}.mkv").unlink()
    with pytest.raises(FormatError, match="1 samples cannot be split"):
        opened("folder", folder)


def test_the_fingerprint_changes_with_any_content(folder: Path) -> None:
    def now(**more: Any) -> str:
        return opened("folder", folder, **more)[0].fingerprint

    seen = [now()]
    assert now() == seen[0]
    (folder / "0.txt").write_text("prompt 0!")
    seen.append(now())
    write_video(folder / "3.mkv", noise(3), rate=9)
    seen.append(now())
    (folder / "1.mkv").unlink()
    seen.append(now())
    seen.append(now(model=replace(TINY, channels=8)))
    assert len(set(seen)) == len(seen)


@pytest.mark.parametrize("change", [{"seed": 1}, {"count": 17}, {"held_out": 0.5}])
def test_the_fingerprint_of_shapes_changes_with_their_settings(change: dict[str, Any]) -> None:
    settings = DataSettings(count=16)
    prints = {open_dataset(s, TINY)[0].fingerprint for s in (settings, settings, replace(settings, **change))}
    assert len(prints) == 2


# --- precomputed latents ----------------------------------------------------------------------------------------------


def _latents(folder: Path, number: int, **more: torch.Tensor) -> Path:
    drawn = torch.Generator().manual_seed(number)
    tensors = {"latents": torch.randn(3, 4, 2, 4, generator=drawn), "prompt_embeds": torch.randn(6, 8, generator=drawn)}
    folder.mkdir(exist_ok=True)
    save_file({**tensors, **more}, folder / f"{number}.safetensors")
    return folder


def test_precomputed_samples_are_read_as_they_are(tmp_path: Path) -> None:
    for number in range(3):
        _latents(tmp_path / "set", number)
    samples = everything(opened("latents", tmp_path / "set"))
    assert len(samples) == 3
    for name, sample in samples.items():
        stored = load_file(tmp_path / "set" / name)
        assert torch.equal(sample.latents, stored["latents"])
        assert torch.equal(sample.prompt, stored["prompt_embeds"])
        assert sample.image is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_precomputed_samples_of_every_dtype_become_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    latents = torch.randn(3, 4, 2, 4).to(dtype)
    train, _ = opened("latents", _latents(tmp_path / "set", 0, latents=latents), held_out=0.0)
    assert train[0].latents.dtype == torch.float32
    assert torch.equal(train[0].latents, latents.to(torch.float32))


def test_image_latents_are_read_for_i2v_only_and_then_needed(tmp_path: Path) -> None:
    image = torch.randn(3, 4, 2, 4)
    model = replace(TINY, image=True)
    train, _ = opened("latents", _latents(tmp_path / "set", 0, image_latents=image), model, held_out=0.0)
    assert train[0].image is not None
    assert torch.equal(train[0].image, image)
    with pytest.raises(FormatError, match="no image_latents of shape"):
        opened("latents", _latents(tmp_path / "other", 0), model, held_out=0.0)[0][0]


def test_latents_of_another_shape_are_refused_with_both_shapes(tmp_path: Path) -> None:
    train, _ = opened("latents", _latents(tmp_path / "set", 0, latents=torch.zeros(4, 3, 2, 4)), held_out=0.0)
    with pytest.raises(FormatError, match=r"\[3, 4, 2, 4\]") as caught:
        train[0]
    assert "[4, 3, 2, 4]" in caught.value.why


def test_a_changed_byte_changes_the_fingerprint_of_latents(tmp_path: Path) -> None:
    folder = _latents(tmp_path / "set", 0)
    before = opened("latents", folder, held_out=0.0)[0].fingerprint
    path = folder / "0.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    assert opened("latents", folder, held_out=0.0)[0].fingerprint != before


def test_a_folder_without_a_sample_is_refused(tmp_path: Path) -> None:
    for kind in ("latents", "folder"):
        with pytest.raises(FormatError, match=r"no .* in "):
            opened(kind, tmp_path)
