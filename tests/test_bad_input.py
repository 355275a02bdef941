"""Hostile and damaged inputs at the command line: one clear error, a documented code, nothing written or changed."""

from __future__ import annotations

import json
import os
import random
import shutil
import stat
import struct
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loraconv
from loraconv.io.input_file import InputFile
from tests import hostile
from tests.cli_driver import COMMANDS, CONVERSIONS, argv
from tests.cli_support import (
    Cli,
    Done,
    Refusals,
    assert_clear_error,
    digests,
    driven,
    harmless,
    rank_file,
    tiny_run,
)

pytest_plugins = ["tests.cli_fixtures"]

CORRUPT = {4}
WEIGHTS = "pytorch_lora_weights.safetensors"
every_command = pytest.mark.parametrize("command", COMMANDS)
every_conversion = pytest.mark.parametrize("command", CONVERSIONS)


@pytest.fixture(scope="module")
def sat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run."""
    return tiny_run(tmp_path_factory.mktemp("sat"))


@pytest.fixture(scope="module")
def lora(sat: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of the same adapter for diffusers."""
    out = tmp_path_factory.mktemp("lora") / "out"
    loraconv.sat2diffusers(sat, out=out)
    return (out / WEIGHTS).read_bytes()


@pytest.fixture(scope="module")
def good(sat: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the conversions of the undamaged run write: weights file by command, as SHA-256."""
    made = {}
    for command, to in zip(CONVERSIONS, ("diffusers", "peft"), strict=True):
        out = tmp_path_factory.mktemp("good") / "out"
        loraconv.convert(sat, out=out, to=to)
        made[command] = _weights_digest(out)
    return made


def _weights_digest(out: Path) -> str:
    (digest,) = (value for name, value in digests(out).items() if name.endswith(".safetensors"))
    return digest


@pytest.fixture
def run(sat: Path, refusals: Refusals) -> Path:
    """A copy of the run that a test may damage."""
    return Path(shutil.copytree(sat, refusals.inputs / "run"))


# --- truncated --------------------------------------------------------------------------------------------------------


def zip_boundaries(path: Path) -> set[int]:
    """Offsets where the parts of a zip begin and end, and one byte to either side of each."""
    marks = {0, 1, 4, 8, path.stat().st_size}
    with zipfile.ZipFile(path) as archive:
        marks |= {archive.start_dir, archive.start_dir + 46}
        for info in archive.infolist():
            marks |= {info.header_offset, info.header_offset + 30, info.header_offset + 30 + len(info.filename)}
    size = path.stat().st_size
    marks |= {size - 22, size - 42, size - 98}
    return {near for mark in marks for near in (mark - 1, mark, mark + 1) if 0 <= near < size}


@pytest.mark.parametrize("count", [60, pytest.param(1500, marks=pytest.mark.slow)])
def test_a_checkpoint_cut_anywhere_is_refused(refusals: Refusals, sat: Path, count: int) -> None:
    source = rank_file(sat)
    data = source.read_bytes()
    lengths = sorted(zip_boundaries(source) | set(random.Random(1).sample(range(len(data)), count)))
    chosen = lengths if count > 100 else random.Random(2).sample(lengths, 2 * count)
    target = rank_file(Path(shutil.copytree(sat, refusals.inputs / "run")))
    for number, length in enumerate(chosen):
        target.write_bytes(data[:length])
        place = target if number % 2 else target.parent.parent
        for command in COMMANDS if count > 100 else [COMMANDS[number % 3]]:
            done = refusals(command, place, {3, 4})
            assert done.code == 4 or length < 4, (length, done)
    print(len(chosen), "lengths")


def safetensors_boundaries(data: bytes) -> set[int]:
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    ends = {end for name, entry in header.items() if name != "__metadata__" for end in entry["data_offsets"]}
    marks = {0, 7, 8, 9, 8 + length // 2, 8 + length, *(8 + length + end for end in ends)}
    return {near for mark in marks for near in (mark - 1, mark, mark + 1) if 0 <= near < len(data)}


def test_an_adapter_cut_anywhere_is_refused(refusals: Refusals, lora: bytes) -> None:
    lengths = safetensors_boundaries(lora) | set(random.Random(1).sample(range(len(lora)), 60))
    for number, length in enumerate(sorted(lengths)):
        path = refusals.file(lora[:length], WEIGHTS)
        command = ("inspect", "convert")[number % 2]
        done = refusals(command, path, {3, 4})
        assert done.code == 4 or length < 9, (length, done)


# --- flipped bits -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [200, pytest.param(4000, marks=pytest.mark.slow)])
def test_a_flipped_bit_never_changes_an_output(refusals: Refusals, sat: Path, good: dict[str, str], count: int) -> None:
    data = rank_file(sat).read_bytes()
    target = rank_file(Path(shutil.copytree(sat, refusals.inputs / "run")))
    codes: dict[int, int] = {}
    for name, damaged in hostile.bit_flips(data, count, seed=3):
        target.write_bytes(damaged)
        assert refusals.either("inspect", target, {3, 4}).code in (0, 3, 4), name
        for command, to in zip(CONVERSIONS, ("diffusers", "peft"), strict=True):
            out = refusals.outputs / "result"
            done = refusals.cli("convert", target, "-o", out, "--to", to)
            codes[done.code] = codes.get(done.code, 0) + 1
            if done.code == 0:
                assert _weights_digest(out) == good[command], name
                shutil.rmtree(out)
            else:
                assert_clear_error(done, {3, 4})
                # 3: the damaged bit makes it a file of another kind, such as a zip without a member data.pkl.
                assert done.code == 4 or "not a torch checkpoint" in done.err, name
            assert os.listdir(refusals.outputs) == []
    print(codes)
    assert codes[4] > count // 2


def lora_spans(path: Path) -> list[tuple[int, int]]:
    """Where the bytes of the LoRA's storages lie in the file."""
    from loraconv.source import open_source

    with open_source(path) as source:
        return [ref.storage for name, ref in source.tensors.items() if ".matrix_" in name]


@pytest.mark.parametrize("count", [60, pytest.param(2000, marks=pytest.mark.slow)])
def test_a_flipped_bit_in_the_lora_is_always_found(refusals: Refusals, sat: Path, count: int) -> None:
    data = rank_file(sat).read_bytes()
    target = rank_file(Path(shutil.copytree(sat, refusals.inputs / "run")))
    draw = random.Random(4)
    spans = lora_spans(rank_file(sat))
    assert len(spans) == 8
    for number in range(count):
        start, length = spans[number % len(spans)]
        damaged = bytearray(data)
        damaged[start + draw.randrange(length)] ^= 1 << draw.randrange(8)
        target.write_bytes(damaged)
        for command in CONVERSIONS if count > 100 else [CONVERSIONS[number % 2]]:
            done = refusals(command, target, CORRUPT)
            assert "checksum" in done.err


@pytest.mark.parametrize("count", [40, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_flipped_bit_in_the_base_is_always_found(refusals: Refusals, sat: Path, count: int) -> None:
    from loraconv.source import open_source

    with open_source(rank_file(sat)) as source:
        spans = [
            ref.storage for name, ref in source.tensors.items() if ".matrix_" not in name and "diffusion_model" in name
        ]
        needed = [span for name, ref in source.tensors.items() if ".original." in name for span in [ref.storage]]
    assert needed
    assert set(needed) <= set(spans)
    data = rank_file(sat).read_bytes()
    target = rank_file(Path(shutil.copytree(sat, refusals.inputs / "run")))
    draw = random.Random(5)
    for number in range(count):
        start, length = needed[number % len(needed)]
        damaged = bytearray(data)
        damaged[start + draw.randrange(length)] ^= 1 << draw.randrange(8)
        target.write_bytes(damaged)
        done = refusals("sat2diffusers", target, CORRUPT, ["--what", ("base", "all")[number % 2]])
        assert "checksum" in done.err


# --- not what it seems ------------------------------------------------------------------------------------------------


def _tar() -> bytes:
    return hostile._tar(b"data")


def _gzip() -> bytes:
    import gzip

    return gzip.compress(b"data" * 100, mtime=0)


STRANGERS: dict[str, Callable[[], bytes]] = {
    "an empty file": lambda: b"",
    "one byte": lambda: b"\x80",
    "text": lambda: b"hello, I am a checkpoint\n",
    "zeros": lambda: bytes(4096),
    "random bytes": lambda: random.Random(0).randbytes(5000),
    "a legacy pickle": lambda: hostile.legacy(hostile.BENIGN),
    "a bare pickle": lambda: hostile.BENIGN,
    "a TorchScript archive": lambda: hostile.zip_of(
        [("a/data.pkl", hostile.BENIGN), ("a/code/x.py", b"import os"), ("a/constants.pkl", hostile.BENIGN)]
    ),
    "a 7z archive": lambda: b"7z\xbc\xaf\x27\x1c\x00\x04" + bytes(60),
    "a tar archive": _tar,
    "a gzip file": _gzip,
    "a zip of documents": lambda: hostile.zip_of([("letter.txt", b"dear"), ("photo.jpg", b"\xff\xd8")]),
    "an empty zip": lambda: hostile.zip_of([]),
    "a PNG": lambda: b"\x89PNG\r\n\x1a\n" + bytes(50),
    "a GGUF file": lambda: b"GGUF\x03\0\0\0" + bytes(50),
    "an HTML error page": lambda: b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
    "a Git LFS pointer": lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 9\n",
    "JSON": lambda: b'{"a": 1}',
    "a header of 2^63 bytes": lambda: struct.pack("<Q", 1 << 63) + b"{}",
    "a header of 2^40 bytes": lambda: struct.pack("<Q", 1 << 40) + b"{}",
    "a header just over the cap": lambda: struct.pack("<Q", 100_000_001) + b"{}",
    "a header of no bytes": lambda: struct.pack("<Q", 0),
    "an empty header": lambda: struct.pack("<Q", 2) + b"{}",
}


@every_command
@pytest.mark.parametrize("name", ["mp_rank_00_model_states.pt", "x.safetensors", "adapter_model.bin", "no extension"])
@pytest.mark.parametrize("stranger", STRANGERS)
def test_a_file_of_another_kind_is_refused(refusals: Refusals, stranger: str, name: str, command: str) -> None:
    done = refusals(command, refusals.file(STRANGERS[stranger](), name), {3, 4})
    assert name in done.err


@every_command
def test_a_renamed_checkpoint_is_what_its_bytes_say(refusals: Refusals, sat: Path, lora: bytes, command: str) -> None:
    for data, name in ((rank_file(sat).read_bytes(), "lora.safetensors"), (rank_file(sat).read_bytes(), "x.zip")):
        assert refusals.either(command, refusals.file(data, name)).code == 0
        shutil.rmtree(refusals.outputs)
        refusals.outputs.mkdir()
    done = refusals.either(command, refusals.file(lora, "mp_rank_00_model_states.pt"), {3})
    assert (done.code == 3) == (command == "sat2diffusers")


@every_command
def test_a_folder_of_unrelated_files_is_refused(refusals: Refusals, command: str) -> None:
    folder = refusals.inputs / "photos"
    for number in range(300):
        (folder / f"{number}").mkdir(parents=True)
        (folder / f"{number}.jpg").touch()
        (folder / f"{number}/x.pt").touch()
    refusals(command, folder, {3})
    (folder / "latest").write_text("12")
    refusals(command, folder, CORRUPT)


# --- malicious pickles, bombs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [25, pytest.param(1, marks=pytest.mark.slow)])
def test_no_malicious_file_executes_anything_in_any_command(every: int) -> None:
    result = driven("audit", str(every))
    print({name: value for name, value in result.items() if name != "hits"})
    assert result["cases"] >= 2124 // every
    assert result["hits"] == []
    assert result["control"], "the hook sees what it is there for"
    assert result["executed"] is False
    assert result["not exit 4"] == []
    assert result["left"] == []


QUICK = {
    "deflated-member",
    "nested-zip",
    "stride-0-expand",
    "memo-laughs",
    "sparse-tail",
    "dup",
    "huge-dim-by-0",
    "long-length",
}


def bounded(line: list[str], codes: set[int]) -> None:
    """The command is refused within the promised memory and time."""
    measured = driven("measure", *line)
    assert measured["code"] in codes, measured
    assert measured["err"].startswith("error: "), measured
    assert "Traceback" not in measured["err"]
    assert measured["megabytes"] < 300, measured
    assert measured["seconds"] < 5, measured


@pytest.mark.parametrize(
    ("bomb", "command"),
    [
        pytest.param(bomb, command, marks=[] if bomb in QUICK and command == "sat2diffusers" else pytest.mark.slow)
        for bomb in hostile.BOMBS
        for command in COMMANDS
    ],
)
def test_a_bomb_is_refused_within_memory_and_time(refusals: Refusals, bomb: str, command: str) -> None:
    path = hostile.write((bomb, hostile.BOMBS[bomb]()), refusals.inputs)
    bounded(argv(command, path, refusals.outputs / "result"), {3, 4})
    assert os.listdir(refusals.outputs) == []


@every_command
def test_a_view_far_larger_than_its_storage_is_refused(refusals: Refusals, command: str) -> None:
    name = "model.diffusion_model.transformer.layers.0.attention.dense.matrix_A.0"
    body = hostile.text("module") + b"}(" + hostile.text(name)
    body += hostile.tensor((1 << 20, 1 << 20), (0, 0), count=4) + b"u"
    data = hostile.checkpoint(b"\x80\x02}(" + body + b"u.", [bytes(16)])
    refusals(command, refusals.file(data, "mp_rank_00_model_states.pt"), CORRUPT)


# --- the settings beside the checkpoint -------------------------------------------------------------------------------


def settings(lora_config: str) -> str:
    """A training_config.yaml whose LoRA parameters are ``lora_config`` (flow style)."""
    return f"model: {{network_config: {{params: {{modules: {{lora_config: {{params: {lora_config}}}}}}}}}}}\n"


TAGS = {
    "os.system": "!!python/object/apply:os.system ['touch canary']",
    "subprocess": "!!python/object/apply:subprocess.check_output [['touch', 'canary']]",
    "eval": "!!python/object/apply:eval ['1']",
    "new": "!!python/object/new:type {args: ['z', !!python/tuple [], {'extend': !!python/name:exec }]}",
    "name": "!!python/name:os.system",
    "module": "!!python/module:os",
    "tuple": "!!python/tuple [1, 2]",
    "argparse": "!!python/object:argparse.Namespace {r: 4}",
    "local": "!mine {r: 4}",
}


@every_command
@pytest.mark.parametrize("tag", TAGS)
def test_a_yaml_tag_is_never_run(
    refusals: Refusals, run: Path, monkeypatch: pytest.MonkeyPatch, tag: str, command: str
) -> None:
    monkeypatch.chdir(refusals.inputs)
    for text in (f"x: {TAGS[tag]}\n", settings(f"{{r: 2, lora_alpha: {TAGS[tag]}}}"), TAGS[tag]):
        (run / "training_config.yaml").write_text(text)
        done = refusals(command, run, CORRUPT)
        assert "training_config.yaml" in done.err
    assert not (refusals.inputs / "canary").exists()


def _laughs(level: int) -> str:
    lines = ["a0: &a0 [lol, lol]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, level)]
    return "\n".join(lines)


def _merges(level: int) -> str:
    lines = ["a0: &a0 {k: 1}"]
    lines += [f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}" for i in range(1, level)]
    return "\n".join(lines)


YAML_BOMBS: dict[str, Callable[[], str]] = {
    "nested flow lists": lambda: "a: " + "[" * 200_000,
    "nested block lists": lambda: "- " * 200_000 + "x",
    "nested complex keys": lambda: "? " * 100_000 + "x",
    "closed nested lists": lambda: "a: " + "[" * 50_000 + "]" * 50_000,
    "merge keys": lambda: _merges(30),
    "base 60": lambda: settings(f"{{r: 2, lora_alpha: 1{':1' * 1_000_000}}}"),
    "a million lists": lambda: "a: [" + "[]," * 1_000_000 + "]",
    "a million keys": lambda: "\n".join(f"k{i}: 1" for i in range(300_000)),
    "10 MB": lambda: "a: 1\n# " + "x" * 10_000_000,
}


@pytest.mark.parametrize("bomb", YAML_BOMBS)
def test_a_yaml_bomb_is_refused_within_memory_and_time(refusals: Refusals, run: Path, bomb: str) -> None:
    (run / "training_config.yaml").write_text(YAML_BOMBS[bomb]())
    bounded(argv("sat2diffusers", run, refusals.outputs / "result"), CORRUPT)
    assert os.listdir(refusals.outputs) == []


#: Text of the settings, or None for what plain data may hold: then the command may succeed.
ODD_SETTINGS: dict[str, str | bytes] = {
    "nothing": "",
    "a list": "- 1\n",
    "a number": "7",
    "broken": "a: [1, 2\nb: }",
    "NUL": "a: \0",
    "ESC": "a: \x1b[31m",
    "ESC by escape": settings('{r: 2, lora_alpha: "\\e[31mred\\e[0m"}'),
    "BEL and DEL by escape": settings('{r: 2, lora_alpha: "\\a\\x7f\\x9b31m"}'),
    "newlines by escape": settings('{r: 2, lora_alpha: "1\\nerror: all is well\\n"}'),
    "right to left by escape": settings('{r: 2, lora_alpha: "\\u202egnp.exe"}'),
    "not UTF-8": b"a: \xff\xfe\xfd",
    "UTF-16": "a: 1".encode("utf-16"),
    "alpha is text": settings("{r: 2, lora_alpha: four}"),
    "alpha is a list": settings("{r: 2, lora_alpha: [4]}"),
    "alpha is true": settings("{r: 2, lora_alpha: true}"),
    "alpha is NaN": settings("{r: 2, lora_alpha: .nan}"),
    "alpha is infinite": settings("{r: 2, lora_alpha: .inf}"),
    "alpha is 10^400": settings(f"{{r: 2, lora_alpha: 1{'0' * 400}}}"),
    "alpha has 5000 digits": settings(f"{{r: 2, lora_alpha: 1{'0' * 5000}}}"),
    "alpha has 5000 hexadecimal digits": settings(f"{{r: 2, lora_alpha: 0x{'f' * 5000}}}"),
    "alpha is 1e300": settings("{r: 2, lora_alpha: 1.0e+300}"),
    "alpha is a date": settings("{r: 2, lora_alpha: 2024-01-01}"),
    "alpha is no date": settings("{r: 2, lora_alpha: 2024-13-45}"),
    "r contradicts": settings("{r: 128, lora_alpha: 4}"),
    "r is negative": settings("{r: -2, lora_alpha: 4}"),
    "r is 2.5": settings("{r: 2.5, lora_alpha: 4}"),
    "r is text": settings("{r: two, lora_alpha: 4}"),
    "r is a list": settings("{r: [2], lora_alpha: 4}"),
    "r has 5000 hexadecimal digits": settings(f"{{r: 0x{'f' * 5000}, lora_alpha: 4}}"),
    "unhashable keys": "? [1, 2]\n: 3\n",
}


@every_command
@pytest.mark.parametrize("odd", ODD_SETTINGS)
def test_settings_that_make_no_sense_are_refused(refusals: Refusals, run: Path, odd: str, command: str) -> None:
    text = ODD_SETTINGS[odd]
    (run / "training_config.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    done = refusals.either(command, run, {3, 4})
    if done.code == 0:  # inspect may report what it cannot read
        assert command == "inspect"
        assert "cannot be read" in done.out
    assert len(done.err) < 3000


def test_settings_that_refer_to_themselves_or_share_parts_are_plain_data(refusals: Refusals, run: Path) -> None:
    whole = (run / "training_config.yaml").read_text()
    for text in ("x: &x {y: *x}\n", _laughs(12)):
        (run / "training_config.yaml").write_text(whole + text)
        assert refusals.either("inspect", run).code == 0
        assert refusals.either("sat2diffusers", run).code == 0
        shutil.rmtree(refusals.outputs / "result")


SETTINGS_IN_PLACE_OF: dict[str, Callable[[Path], object]] = {
    "a folder": lambda path: path.mkdir(),
    "a FIFO": os.mkfifo,
    "a link to nowhere": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to a device": lambda path: path.symlink_to("/dev/zero"),
}


@every_command
@pytest.mark.parametrize("kind", SETTINGS_IN_PLACE_OF)
def test_settings_that_are_no_file_are_refused_or_taken_as_missing(
    refusals: Refusals, run: Path, kind: str, command: str
) -> None:
    (run / "training_config.yaml").unlink()
    SETTINGS_IN_PLACE_OF[kind](run / "training_config.yaml")
    done = refusals.either(command, run)
    if done.code == 0:
        assert "no settings file" in done.out + done.err


# --- the run folder ---------------------------------------------------------------------------------------------------

POINTERS: dict[str, bytes] = {
    "outside": b"../../etc",
    "absolute": b"/etc/passwd",
    "nowhere": b"999",
    "nothing": b"",
    "a space": b" ",
    "two lines": b"2\n3",
    "ESC": b"\x1b[31m2",
    "ESC after the number": b"2\x1b]0;title\x07",
    "NUL": b"2\0",
    "itself": b"latest",
    "a dot": b".",
    "not UTF-8": b"\xff\xfe",
    "other digits": "２".encode(),
    "a number of 10,000 digits": b"2" * 10_000,
    "5 MB": b"2" * 5_000_000,
    "negative": b"-2",
    "right to left": "\u202e2".encode(),
}


@every_command
@pytest.mark.parametrize("pointer", POINTERS)
def test_a_pointer_that_names_no_iteration_is_refused(
    refusals: Refusals, run: Path, pointer: str, command: str
) -> None:
    (run / "latest").write_bytes(POINTERS[pointer])
    done = refusals(command, run, CORRUPT)
    assert "latest" in done.err
    assert len(done.err) < 2000


@pytest.mark.parametrize("text", ["2", "2\n", " 2 \r\n"])
def test_white_space_around_the_pointer_is_no_matter(refusals: Refusals, run: Path, text: str) -> None:
    (run / "latest").write_text(text)
    assert refusals.either("inspect", run).code == 0


@every_command
def test_a_pointer_that_is_a_link_or_a_folder_leads_nowhere_else(refusals: Refusals, run: Path, command: str) -> None:
    outside = Path(shutil.copytree(run, refusals.inputs / "9"))
    (run / "latest").unlink()
    (run / "latest").symlink_to("/etc/hostname")
    refusals(command, run, CORRUPT)
    (run / "latest").unlink()
    (run / "latest").symlink_to(outside)
    assert refusals.either(command, run).code == 0  # a folder is no pointer; the only iteration is taken


HOSTILE_NAMES: dict[str, tuple[str, ...]] = {
    "the same rank twice": ("mp_rank_0_model_states.pt",),
    "the same rank thrice": ("mp_rank_000_model_states.pt", "mp_rank_0_model_states.pt"),
    "rank 2 without 1": ("mp_rank_02_model_states.pt",),
    "rank 999999": ("mp_rank_999999_model_states.pt",),
    "an extra rank": ("mp_rank_01_model_states.pt",),
}
IGNORED_NAMES = (
    "mp_rank_\x1b[31m_model_states.pt",
    "mp_rank_٠١_model_states.pt",
    "mp_rank_-1_model_states.pt",
    "mp_rank_1 _model_states.pt",
    "mp_rank_9999999_model_states.pt",
    "mp_rank__model_states.pt",
    "mp_rank_01_model_states.pt\n",
    "mp_rank_01_model_states.pt.tmp",
    "MP_RANK_01_MODEL_STATES.PT",
    "\u202etp.setats",
    "x" * 250,
)


@every_command
@pytest.mark.parametrize("kind", HOSTILE_NAMES)
def test_rank_files_that_do_not_fit_together_are_refused(
    refusals: Refusals, run: Path, kind: str, command: str
) -> None:
    for name in HOSTILE_NAMES[kind]:
        shutil.copyfile(rank_file(run), run / "2" / name)
    for place in (run, run / "2", rank_file(run)):
        refusals(command, place, {3, 4})


@every_command
def test_names_that_only_resemble_rank_files_are_ignored(refusals: Refusals, run: Path, command: str) -> None:
    for name in IGNORED_NAMES:
        (run / "2" / name).write_bytes(b"not a checkpoint")
        (run / name).write_bytes(b"not a checkpoint")
    assert refusals.either(command, run).code == 0


@every_command
def test_a_file_with_a_hostile_name_is_printed_harmlessly(refusals: Refusals, sat: Path, command: str) -> None:
    names = [name for name in IGNORED_NAMES if len(name) < 200] + [
        "\x1b]0;pwned\x07.pt",
        "a\nerror: b",
        "\x9b31m",
        os.fsdecode(b"\xff\xfe"),
    ]
    for name in names:
        path = refusals.file(rank_file(sat).read_bytes(), name)
        assert refusals.either(command, path).code == 0
        shutil.rmtree(refusals.outputs)
        refusals.outputs.mkdir()
        path.write_bytes(b"broken")
        refusals(command, path)
        path.unlink()
        refusals(command, path, {2})
        path.mkdir()
        (path / name).touch()
        refusals(command, path, {3})
        (path / name).unlink()
        path.rmdir()


IN_PLACE_OF_A_RANK: dict[str, Callable[[Path], object]] = {
    "a FIFO": os.mkfifo,
    "a folder": lambda path: path.mkdir(),
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a terminal": lambda path: path.symlink_to("/dev/tty"),
    "a process file": lambda path: path.symlink_to("/proc/self/mem"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to nowhere": lambda path: path.symlink_to("nowhere"),
    "a link to its folder": lambda path: path.symlink_to("."),
    "an empty file": lambda path: path.touch(),
}


@every_command
@pytest.mark.parametrize("kind", IN_PLACE_OF_A_RANK)
def test_what_is_no_file_is_not_read_as_one(refusals: Refusals, run: Path, kind: str, command: str) -> None:
    rank_file(run).unlink()
    IN_PLACE_OF_A_RANK[kind](rank_file(run))
    for place in (run, run / "2", rank_file(run)):
        refusals(command, place)


@every_command
def test_a_real_device_node_is_not_read(refusals: Refusals, run: Path, command: str) -> None:
    rank_file(run).unlink()
    try:
        os.mknod(rank_file(run), stat.S_IFCHR | 0o666, os.makedev(1, 5))
    except PermissionError:
        pytest.skip("A DEVICE NODE IS NOT TESTED: mknod is forbidden here")
    for place in (run, rank_file(run)):
        refusals(command, place, {2})


@every_command
@pytest.mark.parametrize(
    "path",
    [
        "/dev/zero",
        "/dev/null",
        "/dev/stdin",
        "/proc/self/mem",
        "/proc/self/environ",
        "",
        "x" * 5000,
        "a\0b",
        "/dev/null/x",
    ],
)
def test_a_path_that_is_no_file_is_refused(refusals: Refusals, command: str, path: str) -> None:
    refusals(command, path)


@every_command
def test_a_loop_of_links_ends(refusals: Refusals, command: str) -> None:
    one, other = refusals.inputs / "one", refusals.inputs / "other"
    one.symlink_to(other)
    other.symlink_to(one)
    refusals(command, one, {2})
    folder = refusals.inputs / "folder"
    folder.mkdir()
    (folder / "1").symlink_to(folder)
    (folder / "latest").write_text("1")
    refusals(command, folder)


@every_command
def test_an_unreadable_file_or_folder_is_refused(command: str) -> None:
    # Not below tmp_path, which other users cannot enter.
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "out").mkdir()
        (folder / "out").chmod(0o777)
        run = tiny_run(folder)
        for locked in (rank_file(run), run / "2", run / "training_config.yaml", run / "latest", run):
            line = argv(command, run, folder / "out/result")
            warm = [argv(command, run, folder / f"warm-{locked.name}"), argv(command, folder / "missing", folder / "x")]
            plan = {"warm": warm, "lock": str(locked), "line": line}
            result = driven("nobody", json.dumps(plan))
            locked.chmod(0o755 if locked.is_dir() else 0o644)
            assert result["warm"][0][0] == 0, result
            assert_clear_error(Done(*result["done"][:1], "", result["done"][1]), {2, 4})
            assert os.listdir(folder / "out") == []


# --- files that change ------------------------------------------------------------------------------------------------


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 3)


def _rewrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"\0" * 200)


def _grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def _replace(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    os.replace(other, path)


CHANGES: dict[str, Callable[[Path], None]] = {
    "cut": _truncate,
    "cut to nothing": lambda path: os.truncate(path, 0),
    "rewritten": _rewrite,
    "grown": _grow,
    "replaced": _replace,
    "deleted": lambda path: path.unlink(),
}


class Interference:
    """Changes a file right before its k-th read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, victim: Path) -> None:
        self.victim, self.at, self.count = victim, 0, 0
        self.change: Callable[[Path], None] = lambda path: None
        real = InputFile.pread

        def pread(file: InputFile, offset: int, count: int) -> bytes:
            if file.path.name == victim.name and "in" in file.path.parts and file.path.resolve() == victim.resolve():
                self.count += 1
                if self.count == self.at:
                    self.change(victim)
            return real(file, offset, count)

        monkeypatch.setattr(InputFile, "pread", pread)


@every_command
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("points", [6, pytest.param(20, marks=pytest.mark.slow)])
def test_a_checkpoint_that_changes_while_it_is_read_is_refused(
    cli: Cli, sat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, change: str, points: int
) -> None:
    work = tmp_path / "in"
    interference = Interference(monkeypatch, work / "run/2/mp_rank_00_model_states.pt")
    out = tmp_path / "out"
    out.mkdir()
    more = ["--what", "all"] if command == "sat2diffusers" else []
    shutil.copytree(sat, work / "run")
    assert cli(*argv(command, work / "run", tmp_path / "control", *more)).code == 0
    reads = interference.count
    assert reads >= (20 if command == "inspect" else 60)
    for number in range(points):
        shutil.rmtree(work)
        shutil.copytree(sat, work / "run")  # with the old times: a rewrite within one tick of the clock would not show
        os.utime(rank_file(work / "run"), ns=(10**18, 10**18))
        interference.count, interference.change = 0, CHANGES[change]
        interference.at = 2 + (reads - 2) * number // (points - 1)
        done = cli(*argv(command, work / "run", out / "result", *more))
        assert interference.count >= interference.at
        assert_clear_error(done, CORRUPT)
        assert os.listdir(out) == [], interference.at


@every_conversion
@pytest.mark.parametrize("change", CHANGES)
def test_an_adapter_that_changes_while_it_is_read_is_refused(
    cli: Cli, lora: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, change: str
) -> None:
    victim = tmp_path / "in" / WEIGHTS
    victim.parent.mkdir()
    interference = Interference(monkeypatch, victim)
    interference.change = CHANGES[change]
    to = "peft" if command == "convert" else "sat"
    victim.write_bytes(lora)
    assert cli("convert", victim, "-o", tmp_path / "control", "--to", to).code == 0
    reads = interference.count
    for at in sorted({1, 2, 3, reads // 2, reads}):
        victim.write_bytes(lora)
        os.utime(victim, ns=(10**18, 10**18))
        interference.count, interference.at = 0, at
        # Before the first read there was nothing yet that could have changed: the bytes are judged as they are.
        codes = {3, 4} if at == 1 else CORRUPT
        assert_clear_error(cli("convert", victim, "-o", tmp_path / "out", "--to", to), codes)
        assert not (tmp_path / "out").exists(), at


# --- malformed safetensors --------------------------------------------------------------------------------------------


def parts(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(header: dict[str, Any] | str | bytes, body: bytes) -> bytes:
    raw = header if isinstance(header, bytes) else (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(raw)) + raw + body


def renamed(name: str) -> Callable[[dict[str, Any], bytes], bytes]:
    """One tensor more, of no LoRA, with a hostile name."""

    def make(header: dict[str, Any], body: bytes) -> bytes:
        end = len(body)
        return joined({**header, name: {"dtype": "F32", "shape": [1], "data_offsets": [end, end + 4]}}, body + bytes(4))

    return make


def edited(**changes: Any) -> Callable[[dict[str, Any], bytes], bytes]:
    """The first tensor's entry changed."""

    def make(header: dict[str, Any], body: bytes) -> bytes:
        first = next(name for name in header if name != "__metadata__")
        return joined({**header, first: {**header[first], **changes}}, body)

    return make


def _entry(name: str, begin: int, end: int, shape: list[int]) -> dict[str, Any]:
    return {name: {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}}


def _twice(header: dict[str, Any], body: bytes) -> bytes:
    text = json.dumps(header)
    name = next(name for name in header if name != "__metadata__")
    return joined(text[:-1] + f", {json.dumps(name)}: {json.dumps(header[name])}}}", body)


Maker = Callable[[dict[str, Any], bytes], bytes]

#: Accepted, because names are only names: they are printed harmlessly and never used as a path.
ODD_NAMES: dict[str, Maker] = {
    "a path upwards": renamed("../../etc/x"),
    "an absolute path": renamed("/etc/passwd"),
    "NUL": renamed("a\0b"),
    "a newline": renamed("a\nerror: all is well"),
    "ESC": renamed("\x1b]0;title\x07\x1b[2J\x1b[31mred"),
    "C1 controls": renamed("\x9b31m\x85"),
    "right to left": renamed("\u202egnp.exe\u2066\u200b"),
    "an empty name": renamed(""),
    "a lone surrogate": lambda h, b: renamed("SURROGATE")(h, b).replace(b'"SURROGATE"', b'"\\ud800xyz"'),
    "1024 characters": renamed("x" * 1024),
}
MALFORMED: dict[str, Maker] = {
    "overlap": lambda h, b: joined({**h, **_entry("z", len(b) - 4, len(b), [1])}, b),
    "a hole": lambda h, b: joined({**h, **_entry("z", len(b) + 4, len(b) + 8, [1])}, b + bytes(8)),
    "trailing bytes": lambda h, b: joined(h, b + b"PK\3\4"),
    "too short by one": lambda h, b: joined(h, b[:-1]),
    "a name twice": _twice,
    "metadata twice": lambda h, b: joined('{"__metadata__": {}, ' + json.dumps(h)[1:], b),
    "sizes that overflow": edited(shape=[1 << 32, 1 << 32]),
    "2^62 by 0": edited(shape=[1 << 62, 0]),
    "a negative size": edited(shape=[-1, 2]),
    "a size with a fraction": edited(shape=[1.5, 2]),
    "a size that is true": edited(shape=[True, 2]),
    "a size of 5000 digits": lambda h, b: joined(
        json.dumps(h).replace('"shape": [', '"shape": [1' + "0" * 5000 + ", ", 1), b
    ),
    "1000 dimensions": edited(shape=[1] * 1000),
    "a shape that is text": edited(shape="16"),
    "an unknown dtype": edited(dtype="F13"),
    "a dtype with ESC": edited(dtype="\x1b[31mF32"),
    "a dtype that is a list": edited(dtype=["F32"]),
    "offsets reversed": edited(data_offsets=[64, 0]),
    "offsets beyond the end": edited(data_offsets=[0, 1 << 60]),
    "negative offsets": edited(data_offsets=[-8, 120]),
    "three offsets": edited(data_offsets=[0, 1, 2]),
    "an extra key": edited(more=1),
    "an entry that is a list": lambda h, b: joined({**h, "z": []}, b),
    "an entry that is null": lambda h, b: joined({**h, "z": None}, b),
    "a root that is a list": lambda h, b: joined("[]", b),
    "no brace at the start": lambda h, b: joined(" " + json.dumps(h), b),
    "text after the header": lambda h, b: joined(json.dumps(h) + "x", b),
    "not UTF-8": lambda h, b: joined(json.dumps(h).encode().replace(b"lora_A", b"lor\xff_A"), b),
    "nested 100,000 deep": lambda h, b: joined('{"a":' * 100_000, b),
    "NaN as an offset": lambda h, b: joined(json.dumps(h).replace('"data_offsets": [0', '"data_offsets": [NaN', 1), b),
    "metadata that is a list": lambda h, b: joined({**h, "__metadata__": []}, b),
    "metadata with numbers": lambda h, b: joined({**h, "__metadata__": {"a": 1}}, b),
    "metadata in metadata": lambda h, b: joined({**h, "__metadata__": {"a": {"b": "c"}}}, b),
    "a name of 1025 characters": renamed("x" * 1025),
}


def test_at_least_25_malformations_are_named() -> None:
    assert len(MALFORMED) + len(ODD_NAMES) >= 25


@every_command
@pytest.mark.parametrize("kind", MALFORMED)
def test_a_malformed_header_is_refused(refusals: Refusals, lora: bytes, kind: str, command: str) -> None:
    header, body = parts(lora)
    done = refusals(command, refusals.file(MALFORMED[kind](header, body), WEIGHTS), {3, 4})
    assert done.code == 4 or "dtype" in kind or kind in ("a root that is a list", "no brace at the start")
    assert len(done.err) < 3000


@every_command
@pytest.mark.parametrize("kind", ODD_NAMES)
def test_a_hostile_tensor_name_is_printed_harmlessly(refusals: Refusals, lora: bytes, kind: str, command: str) -> None:
    header, body = parts(lora)
    path = refusals.file(ODD_NAMES[kind](header, body), WEIGHTS)
    for more in ((), ("--json",), ("-v",) if command == "inspect" else ("--dry-run",)):
        done = refusals.cli(
            *argv(command, path, refusals.outputs / "result", *more, *([] if command == "inspect" else ["--overwrite"]))
        )
        assert done.code in ({0} if command == "inspect" else {0, 3}), done
        assert harmless(done.out + done.err), ascii(done.out + done.err)
        assert not list(refusals.outputs.parent.parent.glob("etc*"))
    files = {path.name for path in refusals.outputs.rglob("*") if path.is_file()}
    assert files <= {"adapter_config.json", "adapter_model.safetensors", "loraconv.json", "README.md"}


@every_command
@pytest.mark.parametrize("kind", ["module", "every name"])
def test_a_lora_with_hostile_module_names_is_printed_harmlessly(
    refusals: Refusals, lora: bytes, kind: str, command: str
) -> None:
    header, body = parts(lora)
    hostile_name = "blocks\x1b[31m\n\u202e.0"
    changed = {name.replace("transformer_blocks.0", hostile_name) if kind == "module" else f"{hostile_name}{n}": value
               for n, (name, value) in enumerate(header.items()) if name != "__metadata__"}  # fmt: skip
    refusals.either(command, refusals.file(joined(changed, body), WEIGHTS), {3, 4})


#: Headers within the cap of 100 MB that cost far more in memory or time than their size, as the parts of the JSON text.
HEADER_BOMBS: dict[str, Callable[[], bytes]] = {
    "99 MB of spaces": lambda: b"{" + b" " * 99_000_000 + b"}",
    "10 MB of metadata": lambda: b'{"__metadata__": {"a": "' + b"x" * 10_000_000 + b'"}}',
    "300,000 tensors": lambda: json.dumps(
        {f"t{n}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(300_000)}
    ).encode(),
    "30 million lists": lambda: b'{"a": [' + b"[]," * 30_000_000 + b"[]]}",
    "10 million keys": lambda: b"{" + b",".join(b'"%d":0' % n for n in range(8_000_000)) + b"}",
    "nested 99 million deep": lambda: b'{"a":' + b"[" * 99_000_000,
    "a number of 99 million digits": lambda: b'{"a": ' + b"9" * 99_000_000 + b"}",
    "a number with a huge exponent": lambda: b'{"a": {"dtype": "F32", "shape": [1e999999999], "data_offsets": [0, 4]}}',
}
QUICK_HEADERS = {"10 MB of metadata", "300,000 tensors", "30 million lists", "a number with a huge exponent"}


@pytest.mark.parametrize(
    "bomb", [pytest.param(b, marks=[] if b in QUICK_HEADERS else pytest.mark.slow) for b in HEADER_BOMBS]
)
def test_a_header_bomb_is_refused_within_memory_and_time(refusals: Refusals, bomb: str) -> None:
    path = refusals.file(joined(HEADER_BOMBS[bomb](), b""), WEIGHTS)
    bounded(argv("inspect", path, refusals.outputs), {3, 4})


# --- hostile metadata -------------------------------------------------------------------------------------------------


def with_metadata(lora: bytes, metadata: dict[str, str]) -> bytes:
    header, body = parts(lora)
    return joined({**header, "__metadata__": metadata}, body)


def adapter_metadata(**changes: Any) -> dict[str, str]:
    return {
        "lora_adapter_metadata": json.dumps(
            {"transformer.r": 2, "transformer.lora_alpha": 2} | {f"transformer.{k}": v for k, v in changes.items()}
        )
    }


REFUSED_METADATA: dict[str, dict[str, str]] = {
    "not JSON": {"lora_adapter_metadata": "not JSON"},
    "empty": {"lora_adapter_metadata": ""},
    "nested": {"lora_adapter_metadata": "[" * 100_000},
    "a key twice": {"lora_adapter_metadata": '{"transformer.r": 2, "transformer.r": 4}'},
    "alpha is text": adapter_metadata(lora_alpha="2"),
    "alpha with ESC": adapter_metadata(lora_alpha="\x1b[31m2\n"),
    "alpha is a list": adapter_metadata(lora_alpha=[2]),
    "alpha is true": adapter_metadata(lora_alpha=True),
    "alpha is NaN": adapter_metadata(lora_alpha=float("nan")),
    "alpha is infinite": adapter_metadata(lora_alpha=float("inf")),
    "alpha is 10^400": adapter_metadata(lora_alpha=10**400),
    "alpha is 1e300": adapter_metadata(lora_alpha=1e300),
    "alpha has 5000 digits": {
        "lora_adapter_metadata": '{"transformer.r": 2, "transformer.lora_alpha": 1' + "0" * 5000 + "}"
    },
    "r is negative": adapter_metadata(r=-2),
    "r is zero": adapter_metadata(r=0),
    "r is text": adapter_metadata(r="2"),
    "r is huge": adapter_metadata(r=1 << 62),
    "r has 4000 digits": adapter_metadata(r=10**4000),
    "r is 2.5": adapter_metadata(r=2.5),
    "r is a list": adapter_metadata(r=[2]),
    "r contradicts": adapter_metadata(r=128),
    "a pattern with text": adapter_metadata(alpha_pattern={"transformer_blocks.0.attn1.to_q": "x"}),
    "a pattern with lists": adapter_metadata(rank_pattern={"transformer_blocks.0.attn1.to_q": [1]}),
}
#: What contradicts nothing may be accepted or refused.
ODD_METADATA: dict[str, dict[str, str]] = {
    "a list": {"lora_adapter_metadata": "[1, 2]"},
    "a number": {"lora_adapter_metadata": "7"},
    "null": {"lora_adapter_metadata": "null"},
    "patterns of a wrong type": adapter_metadata(alpha_pattern=[1], rank_pattern="x"),
    "patterns that are numbers": adapter_metadata(alpha_pattern=7, rank_pattern=7.5),
    "a pattern with an empty name": adapter_metadata(alpha_pattern={"": 3}),
    "a pattern with a hostile name": adapter_metadata(alpha_pattern={"(a+)+$\x1b[31m": 3}),
    "alpha is tiny": adapter_metadata(lora_alpha=5e-324),
    "alpha is zero": adapter_metadata(lora_alpha=0),
    "alpha is negative": adapter_metadata(lora_alpha=-1),
    "rslora is text": adapter_metadata(use_rslora="yes"),
    "rslora is a list": adapter_metadata(use_rslora=[]),
    "other components": {"lora_adapter_metadata": json.dumps({"text_encoder.r": 8, "text_encoder.lora_alpha": 8})},
    "foreign keys with ESC": {"\x1b[31mkey": "\x1b[31mvalue\n\0", "format": "pt"},
    "format is something else": {"format": "\x1b[31mtf"},
    **{
        f"origin: {text[:40]}": {**adapter_metadata(), "loraconv.origin": text}
        for text in (
            "garbage", "", "null", "7", "[]", "{}", '{"": 7}', '{"": {}}', '{"": {"alpha": "x"}}',
            json.dumps({"": {"alpha": "1/0", "rank": 2, "source": "", "dtype": "F32", "place": "up"}}),
            json.dumps({"": {"alpha": "nan", "rank": 2, "source": "", "dtype": "F32", "place": "up"}}),
            json.dumps({"": {"alpha": "-3", "rank": 2, "source": "\x1b[31m", "dtype": "F32", "place": "up"}}),
            json.dumps({"": {"alpha": "0", "rank": 2, "source": "", "dtype": "F32", "place": "up"}}),
            json.dumps({"": {"alpha": "4", "rank": 0, "source": "", "dtype": "F32", "place": "up"}}),
            json.dumps({"": {"alpha": "4", "rank": 3, "source": "", "dtype": "F32", "place": "up"}}),
            json.dumps({"": {"alpha": "4", "rank": -2, "source": "", "dtype": "F32", "place": "up"}}),
            json.dumps({"": {"alpha": "4", "rank": "2", "source": [], "dtype": "\x1b[31mF13", "place": "no"}}),
            json.dumps({"": {"alpha": "4", "rank": 2, "source": "", "dtype": "I64", "place": "up"}}),
            json.dumps({"": {"alpha": 1e308, "rank": 2, "source": "", "dtype": "F16", "place": "up"}}),
            json.dumps({"": {"alpha": 10**400, "rank": 2, "source": "", "dtype": "F32", "place": "up"}}),
            json.dumps({"": {"alpha": "1e-400", "rank": 2, "source": "", "dtype": "F32", "place": "up"}}),
            json.dumps({"\x1b[31m": {"alpha": "4", "rank": 2, "source": "", "dtype": "F32", "place": "up"}}),
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("command", ["inspect", "convert"])
@pytest.mark.parametrize("kind", REFUSED_METADATA)
def test_metadata_that_makes_no_sense_is_refused(refusals: Refusals, lora: bytes, kind: str, command: str) -> None:
    path = refusals.file(with_metadata(lora, REFUSED_METADATA[kind]), WEIGHTS)
    done = refusals.either(command, path, {3, 4})
    if done.code == 0:
        assert command == "inspect"
        assert "cannot be read" in done.out or "1e300" in kind
    assert len(done.err) < 3000


@pytest.mark.parametrize("to", ["inspect", "peft", "sat", "diffusers"])
@pytest.mark.parametrize("kind", ODD_METADATA)
def test_odd_metadata_never_breaks_a_command(refusals: Refusals, lora: bytes, kind: str, to: str) -> None:
    path = refusals.file(with_metadata(lora, ODD_METADATA[kind]), WEIGHTS)
    if to == "inspect":
        refusals.either(to, path, {3, 4})
        return
    done = refusals.cli("convert", path, "-o", refusals.outputs / "result", "--to", to)
    assert harmless(done.out + done.err)
    if done.code != 0:
        assert_clear_error(done, {3, 4})
        assert os.listdir(refusals.outputs) == []


@pytest.mark.parametrize("alpha", ["1e999999999", "1e99999999/3", "9" * 4000 + "e99999999", "1e-999999999"])
def test_an_exponent_bomb_in_the_origin_is_refused_within_memory_and_time(
    refusals: Refusals, lora: bytes, alpha: str
) -> None:
    origin = {"": {"alpha": alpha, "rank": 2, "source": "", "dtype": "F32", "place": "up"}}
    path = refusals.file(with_metadata(lora, {**adapter_metadata(), "loraconv.origin": json.dumps(origin)}), WEIGHTS)
    measured = driven("measure", *argv("convert", path, refusals.outputs / "result"))
    assert measured["code"] in (0, 3, 4), measured
    assert measured["megabytes"] < 300, measured
    assert measured["seconds"] < 5, measured


@pytest.mark.parametrize("command", ["inspect", "convert"])
@pytest.mark.parametrize(
    "config",
    ["", "[]", "not JSON", "[" * 100_000, '{"r": -1}',
     '{"r": 2, "lora_alpha": "\\u001b[31m"}', '{"r": 2, "lora_alpha": NaN}',
     '{"r": 2, "lora_alpha": 1' + "0" * 400 + "}", '{"r": 2, "lora_alpha": 1' + "0" * 5000 + "}", '{"r": 2, "r": 2}',
     '{"r": 2, "lora_alpha": 1e300}', '{"x": "' + "x" * 5_000_000 + '"}'],
    ids=lambda config: config[:36].replace("\\", "/") or "empty",
)  # fmt: skip
def test_an_adapter_config_that_makes_no_sense_is_refused(
    refusals: Refusals, sat: Path, config: str, command: str
) -> None:
    folder = refusals.inputs / "peft"
    loraconv.convert(sat, out=folder, to="peft")
    (folder / "adapter_config.json").write_text(config)
    for place in (folder, folder / "adapter_model.safetensors"):
        done = refusals.cli(
            *argv(command, place, refusals.outputs / "result", *([] if command == "inspect" else ["--dtype", "fp32"]))
        )
        assert harmless(done.out + done.err)
        if done.code == 0:
            assert command == "inspect"
            assert "cannot be read" in done.out or "1e300" in config
        else:
            assert_clear_error(done, {3, 4})
        assert os.listdir(refusals.outputs) == []


# --- numbers ----------------------------------------------------------------------------------------------------------


@every_conversion
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_none_is_refused_by_name(
    refusals: Refusals, tmp_path: Path, command: str, value: float
) -> None:
    import torch

    run = tiny_run(refusals.inputs)
    content = torch.load(rank_file(run), weights_only=False)
    name = next(n for n in content["module"] if ".matrix_B.1" in n)
    content["module"][name][3, 1] = value
    torch.save(content, rank_file(run))
    done = refusals(command, run, CORRUPT)
    assert "matrix_B.1" in done.err
    assert "--allow-nonfinite" in done.err
    assert refusals.either(command, run, more=["--allow-nonfinite"]).code == 0
