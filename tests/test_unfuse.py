"""``unfuse`` and the journal: the base comes back bit for bit, or there is an error; never another model.

The fused models of the first parts are made here with numpy: ``base + delta`` in float64, rounded by numpy or torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import tracemalloc
import zlib
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors.torch import load_file, save_file

import loraconv
from loraconv import unfusing
from loraconv.cli import run as cli
from loraconv.errors import CorruptCheckpoint, FormatError, LoraconvError, ProofFailed
from loraconv.io.atomic import output_folder
from loraconv.io.input_file import InputFile
from loraconv.io.output_file import OutputFile
from loraconv.io.safetensors_read import read_safetensors
from loraconv.journal import read as journal_read
from loraconv.journal import ulps
from loraconv.journal import write as journal
from loraconv.model_folder import open_model
from tests.cli_support import tiny_run

Array = Any
TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
BITS = {"BF16": np.uint16, "F16": np.uint16, "F32": np.uint32}
WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
CONFIG = b'{ "_class_name":"CogVideoXTransformer3DModel",\n\n"num_layers" : 2}'
RANK, ROWS, COLUMNS = 3, 24, 40


# --- the distances ----------------------------------------------------------------------------------------------------


def bits_of(dtype: str, count: int) -> st.SearchStrategy[Array]:
    """Any bit patterns: NaN with payloads, infinities, both zeros, the smallest and the greatest numbers."""
    kind, width = BITS[dtype], 8 * np.dtype(BITS[dtype]).itemsize
    top, one = 1 << (width - 1), {"BF16": 7, "F16": 10, "F32": 23}[dtype]
    infinity = top - (1 << one)
    special = [0, 1, infinity - 1, infinity, infinity + 1, top - 1, (1 << one) - 1, 1 << one, infinity - (1 << one)]
    number = st.one_of(st.integers(0, 2 * top - 1), st.sampled_from([*special, *(s | top for s in special)]))
    return arrays.arrays(kind, count, elements=number)


factor = st.one_of(st.integers(-3, 3), st.integers(-(1 << 20), 1 << 20))


@pytest.mark.parametrize("dtype", TORCH)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_every_bit_pattern_comes_back(dtype: str, data: st.DataObject) -> None:
    rows, columns, rank = (data.draw(st.integers(1, 6)) for _ in range(3))
    base, fused = (data.draw(bits_of(dtype, rows * columns)).tobytes() for _ in range(2))
    factors = None
    if data.draw(st.booleans()) and rank <= min(rows, columns):
        up = data.draw(arrays.arrays(np.float64, (rows, rank), elements=factor))
        down = data.draw(arrays.arrays(np.float64, (rank, columns), elements=factor))
        if up.any() and down.any():
            made = ulps._exact(up, down, data.draw(st.integers(-100, 100)))
            code = ulps.pack_factors(made)
            factors = ulps.unpack_factors(code, (rows, columns), rank, made.exponent)
            assert np.array_equal(factors.up, up)
            assert np.array_equal(factors.down, down)
    code = ulps.encode(base, fused, dtype, factors, (0, rows))
    assert ulps.decode(code, fused, dtype, factors, (0, rows)) == base


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_every_number_of_16_bits_is_told_from_every_neighbour(dtype: str) -> None:
    every = np.arange(1 << 16, dtype=np.uint16)
    for base in (every, every[::-1], np.roll(every, 1), np.roll(every, 1 << 15)):
        code = ulps.encode(base.tobytes(), every.tobytes(), dtype, None, (0, 1))
        assert ulps.decode(code, every.tobytes(), dtype, None, (0, 1)) == base.tobytes()


@pytest.mark.parametrize(("limit", "dtype"), [(1 << 24, "float32"), (1 << 25, "float64"), (1 << 53, "float64")])
def test_the_product_of_the_factors_is_that_of_whole_numbers(limit: int, dtype: str) -> None:
    rng = np.random.default_rng(0)
    rank, greatest = 16, int((limit // 16) ** 0.5)
    up, down = (rng.integers(-greatest, greatest + 1, size=shape) for shape in ((50, rank), (rank, 70)))
    up[0], down[:, 0] = greatest, greatest  # the greatest sum that can be
    made = ulps._exact(up.astype(np.float64), down.astype(np.float64), 0)
    assert made.up.dtype == dtype
    assert np.array_equal(made.product(10, 50).astype(np.int64).reshape(40, 70), up[10:] @ down)
    assert made.product(0, 1)[0] == rank * greatest * greatest <= limit


def test_factors_whose_product_would_be_rounded_are_refused() -> None:
    with pytest.raises(ulps.BadCode):
        ulps._exact(np.full((1, 2), 2.0**26), np.full((2, 1), 2.0**26 + 1), 0)
    with pytest.raises(ulps.BadCode):
        ulps._exact(np.full((1, 1), 2.0**31), np.full((1, 1), 1.0), 0)


@pytest.mark.parametrize("dtype", TORCH)
def test_a_processor_that_flushes_small_numbers_to_zero_restores_the_same(dtype: str) -> None:
    rng = np.random.default_rng(3)
    count = 64 * 64
    base, fused = (rng.integers(0, 1 << 16, size=count, dtype=np.uint16).astype(BITS[dtype]) for _ in range(2))
    if dtype == "F32":  # subnormal numbers and their neighbours
        base, fused = (x << 9 for x in (base, fused))
    fused[::3] &= 0x807F if dtype != "F32" else 0x80FFFFFF
    factors = ulps._exact(
        rng.integers(-9, 9, size=(64, 2)).astype(float), rng.integers(-9, 9, size=(2, 64)).astype(float), -100
    )
    code = ulps.encode(base.tobytes(), fused.tobytes(), dtype, factors, (0, 64))
    assert torch.set_flush_denormal(True)
    try:
        tiny = np.float32(1e-38)
        assert tiny * np.float32(0.01) == 0
        assert ulps.decode(code, fused.tobytes(), dtype, factors, (0, 64)) == base.tobytes()
    finally:
        torch.set_flush_denormal(False)


def rounded(values: Array, dtype: str) -> Array:
    """Float64 numbers as bits of ``dtype``, rounded by torch."""
    tensor = torch.from_numpy(np.ascontiguousarray(values)).to(TORCH[dtype])
    return tensor.view(torch.int16 if dtype != "F32" else torch.int32).numpy().view(BITS[dtype])


def numbers(bits: Array, dtype: str) -> Array:
    signed = torch.from_numpy(bits.view(np.int16 if dtype != "F32" else np.int32))
    return signed.view(TORCH[dtype]).double().numpy()


@pytest.mark.parametrize(("dtype", "most"), [("BF16", 2), ("F16", 2), ("F32", 4)])
def test_the_prediction_leaves_few_bits_of_a_delta_of_five_percent(dtype: str, most: int) -> None:
    rng = np.random.default_rng(1)
    size, rank = 512, 8
    base = rounded(rng.normal(0, 0.03, (size, size)), dtype)
    up, down = rng.normal(size=(size, rank)), rng.normal(size=(rank, size)) * 0.05 * 0.03 / rank**0.5
    fused = rounded(numbers(base, dtype) + up @ down, dtype)
    made = ulps.whole_factors(up, down, 0.03, dtype)
    assert made is not None
    rows = (0, size)
    code = ulps.encode(base.tobytes(), fused.tobytes(), dtype, made, rows) + ulps.pack_factors(made)
    plain = ulps.encode(base.tobytes(), fused.tobytes(), dtype, None, rows)
    assert 8 * len(code) / base.size < most
    assert len(plain) > 3 * len(code)


def test_factors_of_no_use_are_left_out() -> None:
    up, down = np.ones((8, 2)), np.ones((2, 8))
    assert ulps.whole_factors(up, down, 1.0, "BF16") is not None
    assert ulps.whole_factors(up * 0, down, 1.0, "BF16") is None
    assert ulps.whole_factors(up * 1e-9, down, 1.0, "BF16") is None  # far less than a rounding error
    assert ulps.whole_factors(up, down, 0.0, "BF16") is None
    assert ulps.whole_factors(up, down, float("nan"), "BF16") is None
    assert ulps.whole_factors(up * float("inf"), down, 1.0, "BF16") is None
    assert ulps.whole_factors(np.ones((8, 9)), np.ones((9, 8)), 1.0, "BF16") is None  # more than the tensor itself


def test_a_component_that_does_nothing_is_not_stored() -> None:
    up, down = np.ones((8, 2)), np.ones((2, 8))
    down[1] = 0
    made = ulps.whole_factors(up, down, 1.0, "BF16")
    assert made is not None
    assert made.up.shape == (8, 1)


def deflated(data: bytes) -> bytes:
    return zlib.compress(data, 9)


BOMBS = {
    "nothing": b"",
    "no deflate stream": b"\0" * 50,
    "too many bytes": deflated(b"\0" * 50_000_000),
    "too few bytes": deflated(b"\0" * 7),
    "cut": deflated(bytes(range(8)))[:-1],
    "values missing": deflated(b"\xff" * 8),
    "the last stream cut": deflated(b"\0" * 8) + deflated(b"") + deflated(b"")[:-1],
    "one byte too many": deflated(b"\0" * 8) + deflated(b"") * 2 + b"x",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_code_that_no_encoder_wrote_is_refused(bomb: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(ulps.BadCode):
            ulps.decode(BOMBS[bomb], bytes(128), "BF16", None, (0, 64))
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


# --- fused models made by hand ----------------------------------------------------------------------------------------


Tensors = dict[str, torch.Tensor]


def base_tensors(dtype: str, seed: int = 0) -> Tensors:
    """Two layers: q is fused, the others are not; one tensor has another dtype, one has no elements."""
    draw = torch.Generator().manual_seed(seed)
    made: Tensors = {"empty": torch.zeros(0, 4, dtype=TORCH[dtype]), "steps": torch.arange(5)}
    for layer in range(2):
        for name, shape in (("to_q.weight", (ROWS, COLUMNS)), ("to_q.bias", (ROWS,)), ("conv.weight", (6, 2, 3, 3))):
            values = torch.randn(shape, generator=draw, dtype=torch.float64) * 0.03
            made[f"blocks.{layer}.{name}"] = values.to(TORCH[dtype])
    return made


CHANGED = [f"blocks.{layer}.{name}" for layer in range(2) for name in ("to_q.weight", "conv.weight")]


def low_rank(name: str, size: float = 0.01) -> tuple[Array, Array]:
    """``(up, down)`` of a fused tensor."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    rows, columns = (ROWS, COLUMNS) if "to_q" in name else (6, 18)
    return rng.normal(size=(rows, RANK)), size * rng.normal(size=(RANK, columns))


def add_deltas(base: Mapping[str, torch.Tensor]) -> Tensors:
    made = dict(base)
    for name in CHANGED:
        up, down = low_rank(name)
        delta = torch.from_numpy(up @ down).reshape(base[name].shape)
        made[name] = (base[name].double() + delta).to(base[name].dtype)
    return made


def shards_of(tensors: Tensors, count: int) -> dict[str, Tensors]:
    names = [list(tensors)[start::count] for start in range(count)]
    return {
        (WEIGHTS if count == 1 else f"diffusion_pytorch_model-{n:05}-of-{count:05}.safetensors"): {
            name: tensors[name] for name in part
        }
        for n, part in enumerate(names, 1)
    }


def foreign_header(file: Path) -> None:
    """The same file as another tool writes it: the entries in another order, spaces, a metadata entry at the end."""
    raw = file.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    header.pop("__metadata__", None)
    entries = dict(reversed(header.items())) | {"__metadata__": {"by": "another tool", "a": "1"}}
    text = json.dumps(entries, indent=1).encode() + b"   "
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])


def model(folder: Path, tensors: Tensors, shards: int = 1) -> Path:
    """A transformer folder."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_bytes(CONFIG)
    listed = {}
    for name, part in shards_of(tensors, shards).items():
        save_file(part, folder / name, {"format": "pt"})
        foreign_header(folder / name)
        listed |= dict.fromkeys(part, name)
    if shards > 1:
        (folder / INDEX).write_text(json.dumps({"weight_map": listed, "metadata": {"total_size": 1}}, indent=3))
    return folder


def fused_model(base: Path, out: Path, tensors: Tensors, *, shards: int = 1, **options: Any) -> Path:
    """What ``fuse --journal`` leaves: the fused shards, the journal, the record."""
    ready = model(out.with_name(f"{out.name}-ready"), tensors, shards)
    if base.is_file():
        (ready / "config.json").unlink()
    with open_model(base) as opened, ExitStack() as stack:
        folder = stack.enter_context(output_folder(out, inputs=[base], needed=0))
        refs = {}
        for path in sorted(ready.iterdir()):
            with folder.file(path.name) as file:
                file.write(path.read_bytes())
            if path.suffix == ".safetensors":
                refs |= read_safetensors(stack.enter_context(InputFile(folder.path / path.name))).tensors
        given = {"low_rank": low_rank, **options}
        journal.write_journal(folder, opened, refs, CHANGED, **given)
        names = [*(path.name for path in ready.iterdir()), journal.JOURNAL]
        with folder.file("loraconv.json") as file:
            file.write(json.dumps({"kind": "fused", "files": [{"name": name} for name in names]}).encode())
    shutil.rmtree(ready)
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def restored(out: Path) -> dict[str, bytes]:
    """The restored files without the record."""
    found = contents(out)
    assert json.loads(found.pop("loraconv.json"))["kind"] == "unfused"
    return found


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A base in BF16 and what it was fused to."""
    tensors = base_tensors("BF16")
    base = model(tmp_path / "base", tensors)
    return base, fused_model(base, tmp_path / "fused", add_deltas(tensors))


@pytest.mark.parametrize("dtype", TORCH)
@pytest.mark.parametrize(("shards", "then"), [(1, 1), (2, 2), (3, 1), (1, 3), (2, 3)])
def test_the_base_comes_back_bit_for_bit_with_its_own_shards(
    tmp_path: Path, dtype: str, shards: int, then: int
) -> None:
    tensors = base_tensors(dtype)
    base = model(tmp_path / "base", tensors, shards)
    fused = fused_model(base, tmp_path / "fused", add_deltas(tensors), shards=then)
    before = contents(fused)
    result = loraconv.unfuse(fused, out=tmp_path / "back")
    assert restored(tmp_path / "back") == contents(base)
    assert contents(fused) == before
    assert (result.restored, result.tensors) == (len(CHANGED), len(tensors))
    assert {f.name: f.sha256 for f in result.files} == {
        name: hashlib.sha256(raw).hexdigest() for name, raw in contents(base).items()
    }
    assert loraconv.verify(tmp_path / "back").same


def test_the_base_comes_back_without_the_factors_and_with_wrong_ones(tmp_path: Path) -> None:
    tensors = base_tensors("BF16")
    base = model(tmp_path / "base", tensors)
    sizes = []
    for number, factors in enumerate((low_rank, lambda name: None, lambda name: low_rank(name, -5.0))):
        fused = fused_model(base, tmp_path / f"fused{number}", add_deltas(tensors), low_rank=factors)
        loraconv.unfuse(fused, out=tmp_path / f"back{number}")
        assert restored(tmp_path / f"back{number}") == contents(base)
        sizes.append((fused / journal.JOURNAL).stat().st_size)
    assert sizes[0] < sizes[1] < sizes[2]


def test_bases_with_nan_infinities_and_tiny_numbers_come_back(tmp_path: Path) -> None:
    tensors = base_tensors("BF16")
    odd = torch.tensor([0x7F80, 0xFF80 - 65536, 0x7FC1, 0xFFFF - 65536, 1, -32768, 0x7F7F], dtype=torch.int16)
    for name in CHANGED:
        tensors[name].view(torch.int16).flatten()[: len(odd)] = odd
    base = model(tmp_path / "base", tensors)
    fused = fused_model(base, tmp_path / "fused", add_deltas(tensors))
    loraconv.unfuse(fused, out=tmp_path / "back")
    assert restored(tmp_path / "back") == contents(base)


def test_a_single_file_comes_back_under_its_name(tmp_path: Path) -> None:
    tensors = base_tensors("F16")
    base = model(tmp_path / "base", tensors)
    (base / "config.json").unlink()
    file = (base / WEIGHTS).rename(base / "any name.safetensors")
    fused = fused_model(file, tmp_path / "fused", add_deltas(tensors))
    loraconv.unfuse(fused, out=tmp_path / "back")
    assert restored(tmp_path / "back") == contents(base)


def test_a_journal_has_the_same_bytes_every_time(tmp_path: Path) -> None:
    tensors = base_tensors("BF16")
    base = model(tmp_path / "base", tensors, 2)
    seen = {
        (fused_model(base, tmp_path / f"fused{n}", add_deltas(tensors)) / journal.JOURNAL).read_bytes()
        for n in range(3)
    }
    assert len(seen) == 1


def test_chunks_of_rows_are_put_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ulps, "CHUNK", 7 * COLUMNS)
    tensors = base_tensors("BF16")
    base = model(tmp_path / "base", tensors)
    fused = fused_model(base, tmp_path / "fused", add_deltas(tensors))
    with InputFile(fused / journal.JOURNAL) as file:
        assert len(journal_read.read_journal(file).changes[CHANGED[0]].codes) == 4
    loraconv.unfuse(fused, out=tmp_path / "back")
    assert restored(tmp_path / "back") == contents(base)


# --- the command ------------------------------------------------------------------------------------------------------


def test_a_dry_run_checks_and_writes_nothing(pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    base, fused = pair
    out = fused.with_name("back")
    assert cli(["unfuse", str(fused), "-o", str(out), "--dry-run", "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert not out.exists()
    assert set(value) == {"schema", "kind", "fused", "out", "dry_run", "tensors", "restored", "files"}
    assert {f["name"]: f["bytes"] for f in value["files"]} == {n: len(raw) for n, raw in contents(base).items()}
    (fused / WEIGHTS).write_bytes((fused / WEIGHTS).read_bytes()[:-1] + b"?")
    assert cli(["unfuse", str(fused), "-o", str(out), "--dry-run"]) in (0, 4)  # the last tensor may be a copied one


def test_the_command_says_what_it_restored(pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    base, fused = pair
    out = fused.with_name("back")
    assert cli(["unfuse", str(fused), "-o", str(out)]) == 0
    said = capsys.readouterr().out
    assert hashlib.sha256((base / WEIGHTS).read_bytes()).hexdigest() in said
    assert "4 of 8 tensors had been fused" in said
    assert cli(["unfuse", str(fused), "-o", str(out)]) == 6
    assert cli(["unfuse", str(fused), "-o", str(out), "--overwrite"]) == 0
    assert restored(out) == contents(base)
    assert cli(["unfuse", str(fused), "-o", str(fused / "inside")]) == 2


def test_progress_is_told_in_bytes_up_to_all_of_them(pair: tuple[Path, Path], caplog: pytest.LogCaptureFixture) -> None:
    base, fused = pair
    with caplog.at_level("INFO", logger="loraconv.unfusing"):
        loraconv.unfuse(fused, out=fused.with_name("back"))
    told: list[Any] = [record.args for record in caplog.records if record.name == "loraconv.unfusing"]
    done = [figures["done"] for figures in told]
    assert done == sorted(done)
    assert {figures["total"] for figures in told} == {done[-1]} == {(base / WEIGHTS).stat().st_size}


# --- refused ----------------------------------------------------------------------------------------------------------


def refused(fused: Path, kind: type[LoraconvError], slug: str) -> LoraconvError:
    """``unfuse`` raises this error and leaves nothing behind."""
    out = fused.with_name("refused")
    with pytest.raises(LoraconvError) as caught:
        loraconv.unfuse(fused, out=out)
    assert (type(caught.value), caught.value.slug) == (kind, slug), caught.value
    assert caught.value.hint
    assert not [path.name for path in fused.parent.iterdir() if "refused" in path.name]
    return caught.value


def test_a_plain_base_cannot_be_unfused(pair: tuple[Path, Path]) -> None:
    assert "did not fuse" in refused(pair[0], FormatError, "no-journal").what


def test_a_model_fused_without_a_journal_cannot_be_unfused(pair: tuple[Path, Path]) -> None:
    (pair[1] / journal.JOURNAL).unlink()
    assert "without a journal" in refused(pair[1], FormatError, "no-journal").what


def test_unfusing_twice_is_refused(pair: tuple[Path, Path]) -> None:
    back = pair[1].with_name("back")
    loraconv.unfuse(pair[1], out=back)
    assert "unfused already" in refused(back, FormatError, "no-journal").what


def change_one_bit(folder: Path, name: str) -> None:
    """Flip the lowest bit of the tensor's first element in the folder's file."""
    (file,) = (f for f in folder.glob("*.safetensors") if name.encode() in f.read_bytes())
    raw = bytearray(file.read_bytes())
    size = int.from_bytes(raw[:8], "little")
    raw[8 + size + json.loads(raw[8 : 8 + size])[name]["data_offsets"][0]] ^= 1
    file.write_bytes(raw)


@pytest.mark.parametrize("name", [CHANGED[0], "blocks.1.to_q.bias"])
def test_a_fused_model_that_was_changed_is_refused_and_the_tensor_is_named(pair: tuple[Path, Path], name: str) -> None:
    change_one_bit(pair[1], name)
    error = refused(pair[1], CorruptCheckpoint, "fused-changed")
    assert name in error.where
    assert "1 of" in error.why


def test_a_changed_header_of_the_fused_model_does_no_harm(pair: tuple[Path, Path]) -> None:
    base, fused = pair
    foreign_header(fused / WEIGHTS)
    loraconv.unfuse(fused, out=fused.with_name("back"))
    assert restored(fused.with_name("back")) == contents(base)


def test_another_models_journal_is_refused(tmp_path: Path) -> None:
    made = []
    for number in range(2):
        tensors = base_tensors("BF16", seed=number)
        base = model(tmp_path / f"base{number}", tensors)
        made.append(fused_model(base, tmp_path / f"fused{number}", add_deltas(tensors)))
    shutil.copy(made[0] / journal.JOURNAL, made[1])
    assert "another model" in refused(made[1], CorruptCheckpoint, "fused-changed").why


@pytest.mark.parametrize("how", ["name", "dtype", "shape"])
def test_a_journal_of_other_tensors_is_refused(pair: tuple[Path, Path], tmp_path: Path, how: str) -> None:
    tensors = base_tensors("BF16")
    first = tensors.pop(CHANGED[0])
    tensors[f"{CHANGED[0]}.x" if how == "name" else CHANGED[0]] = {
        "name": first, "dtype": first.view(torch.float16), "shape": first.reshape(COLUMNS, ROWS)
    }[how]  # fmt: skip
    other = model(tmp_path / "other", tensors)
    shutil.copy(pair[1] / journal.JOURNAL, other)
    assert CHANGED[0] in refused(other, FormatError, "journal-foreign").where


def test_a_model_in_another_dtype_than_its_base_gets_no_journal(tmp_path: Path) -> None:
    tensors = base_tensors("F32")
    base = model(tmp_path / "base", tensors)
    other = {name: t.bfloat16() if t.is_floating_point() else t for name, t in add_deltas(tensors).items()}
    with pytest.raises(FormatError) as caught:
        fused_model(base, tmp_path / "fused", other)
    assert caught.value.slug == "journal-dtype"
    assert not (tmp_path / "fused").exists()


def test_a_dtype_whose_differences_cannot_be_stored_is_refused(tmp_path: Path) -> None:
    tensors = {name: t.double() for name, t in base_tensors("F32").items()}
    base = model(tmp_path / "base", tensors)
    with pytest.raises(FormatError) as caught:
        fused_model(base, tmp_path / "fused", add_deltas(tensors))
    assert caught.value.slug == "journal-dtype"


def test_a_journal_that_would_not_give_the_base_back_is_not_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(base: bytes, *others: Any) -> bytes:
        return ulps.encode(bytes([base[0] ^ 1]) + base[1:], *others)

    monkeypatch.setattr(journal, "encode", wrong)
    tensors = base_tensors("BF16")
    base = model(tmp_path / "base", tensors)
    with pytest.raises(ProofFailed) as caught:
        fused_model(base, tmp_path / "fused", add_deltas(tensors))
    assert caught.value.slug == "journal-unproved"
    assert not (tmp_path / "fused").exists()


def test_a_model_that_changes_while_it_is_unfused_is_refused(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    restore = unfusing._restore

    def disturbed(*arguments: Any) -> None:
        restore(*arguments)
        os.utime(pair[1] / WEIGHTS)

    monkeypatch.setattr(unfusing, "_restore", disturbed)
    refused(pair[1], CorruptCheckpoint, "input-changed")


def test_bytes_that_reach_the_disk_otherwise_are_found(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checksum is that of the file, not of what was meant to be written."""
    write = OutputFile.write

    def broken(self: OutputFile, data: bytes) -> None:
        write(self, data[:-1] + bytes([data[-1] ^ 1]) if self.path.suffix == ".safetensors" else data)

    monkeypatch.setattr(OutputFile, "write", broken)
    refused(pair[1], CorruptCheckpoint, "journal-damaged")


# --- damaged and hostile journals -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes], bytes]:
    """A fused model of one tensor, its base's files, its journal."""
    folder = tmp_path_factory.mktemp("small")
    tensors = {CHANGED[0]: base_tensors("BF16")[CHANGED[0]], "other": torch.ones(4)}
    base = model(folder / "base", tensors)
    up, down = low_rank(CHANGED[0])
    fused = tensors | {CHANGED[0]: (tensors[CHANGED[0]].double() + torch.from_numpy(up @ down)).bfloat16()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.test_unfuse.CHANGED", CHANGED[:1])
        made = fused_model(base, folder / "fused", fused)
    return made, contents(base), (made / journal.JOURNAL).read_bytes()


def never_wrong(fused: Path, base: dict[str, bytes], out: Path) -> bool:
    """Whether the base comes back; if not there must be a clear error, and nothing may be left."""
    error = None
    try:
        loraconv.unfuse(fused, out=out)
    except LoraconvError as failure:
        error = failure
    if error is None:
        assert restored(out) == base
        shutil.rmtree(out)
        return True
    assert error.exit_code in (3, 4), error
    assert error.hint
    assert not out.exists()
    return False


def test_a_journal_cut_at_any_byte_is_refused(small: tuple[Path, dict[str, bytes], bytes]) -> None:
    fused, base, whole = small
    for length in range(len(whole)):
        (fused / journal.JOURNAL).write_bytes(whole[:length])
        assert not never_wrong(fused, base, fused.with_name("back"))
    assert "does not end" in refused(fused, CorruptCheckpoint, "journal-damaged").why
    (fused / journal.JOURNAL).write_bytes(whole)
    assert never_wrong(fused, base, fused.with_name("back"))


@pytest.mark.parametrize("flips", [600, pytest.param(10_000, marks=pytest.mark.slow)])
def test_a_flipped_bit_of_a_journal_never_gives_another_base(
    small: tuple[Path, dict[str, bytes], bytes], flips: int
) -> None:
    fused, base, whole = small
    draw = random.Random(flips)
    for _ in range(flips):
        raw = bytearray(whole)
        raw[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
        (fused / journal.JOURNAL).write_bytes(raw)
        never_wrong(fused, base, fused.with_name("back"))
    (fused / journal.JOURNAL).write_bytes(whole)


Contents = dict[str, Any]


def sealed(whole: bytes, change: Callable[[Contents], Any]) -> bytes:
    """The journal with another list of contents, and its checksum made right."""
    magic = journal_read.MAGIC
    size = int.from_bytes(whole[-len(magic) - 8 : -len(magic)], "little")
    begin = len(whole) - len(magic) - 40 - size
    value = json.loads(whole[begin : begin + size])
    raw = json.dumps(change(value) or value).encode()
    return whole[:begin] + raw + hashlib.sha256(raw).digest() + len(raw).to_bytes(8, "little") + magic


def put(value: Any, *path: Any) -> Callable[[Contents], None]:
    def change(contents: Contents) -> None:
        place: Any = contents
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = value

    return change


HOSTILE: dict[str, Callable[[Contents], Any]] = {
    "a list": lambda value: [1],
    "nothing": lambda value: {"x": 1},
    "no changes": put(None, "changes"),
    "a path out": put("../evil.safetensors", "files", 0, "name"),
    "an absolute path": put("/tmp/evil.safetensors", "files", 0, "name"),
    "a backslash": put("a\\b.safetensors", "files", 0, "name"),
    "the record's name": put("loraconv.json", "texts", 0, "name"),
    "the record's name in capitals": put("LORACONV.JSON", "texts", 0, "name"),
    "one name twice": put(WEIGHTS, "texts", 0, "name"),
    "no name": put(7, "files", 0, "name"),
    "a negative length": put(-5, "changes", 0, "factors"),
    "true as a length": put(True, "changes", 0, "factors"),
    "a length beyond the end": put(1 << 60, "changes", 0, "codes", 0),
    "a longer header": put(999, "files", 0, "header"),
    "another size": put(1, "files", 0, "bytes"),
    "a giant rank": put(1 << 40, "changes", 0, "rank"),
    "a rank more": put(RANK + 1, "changes", 0, "rank"),
    "a wild exponent": put(5000, "changes", 0, "exponent"),
    "another exponent": put(3, "changes", 0, "exponent"),
    "a dtype without numbers": put("U8", "changes", 0, "dtype"),
    "another shape": put([COLUMNS, ROWS], "changes", 0, "shape"),
    "a giant shape": put([1 << 40, 1 << 40], "changes", 0, "shape"),
    "no codes": put([], "changes", 0, "codes"),
    "another checksum": put("00000000", "changes", 0, "fused"),
    "another base checksum": put("00000000", "crc32", CHANGED[0]),
    "another digest": put("0" * 64, "files", 0, "sha256"),
    "another text's digest": put("0" * 64, "texts", 0, "sha256"),
    "a tensor more": put("00000000", "crc32", "extra"),
    "a tensor twice": put([CHANGED[0], CHANGED[0], "other"], "files", 0, "tensors"),
    "a tensor less": put([CHANGED[0]], "files", 0, "tensors"),
    "another order": put([CHANGED[0], "other"], "files", 0, "tensors"),
    "bytes of no part": put([], "texts"),
    "a change of no tensor": put("nowhere", "changes", 0, "name"),
}


def test_a_code_longer_than_any_is_not_read(small: tuple[Path, dict[str, bytes], bytes]) -> None:
    fused, _, whole = small
    start, more = len(journal_read.MAGIC), 20_000_000
    longer = whole[:start] + bytes(more) + whole[start:]
    (fused / journal.JOURNAL).write_bytes(
        sealed(longer, lambda value: put(value["changes"][0]["factors"] + more, "changes", 0, "factors")(value))
    )
    tracemalloc.start()
    try:
        assert "at most" in refused(fused, CorruptCheckpoint, "journal-damaged").why
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()
        (fused / journal.JOURNAL).write_bytes(whole)


@pytest.mark.parametrize("how", HOSTILE)
def test_a_list_of_contents_that_lies_is_refused(small: tuple[Path, dict[str, bytes], bytes], how: str) -> None:
    fused, base, whole = small
    (fused / journal.JOURNAL).write_bytes(sealed(whole, HOSTILE[how]))
    assert not never_wrong(fused, base, fused.with_name("back"))
    assert sorted(p.name for p in fused.parent.iterdir()) == ["base", "fused"]
    (fused / journal.JOURNAL).write_bytes(whole)


# --- fused by loraconv ------------------------------------------------------------------------------------------------


#: Another adapter for the same base, beside the folder of the first.
OTHER = "other.safetensors"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base in four shards and an adapter that was trained on it."""
    folder = tmp_path_factory.mktemp("trained")
    loraconv.sat2diffusers(tiny_run(folder), out=folder / "out", what="all", max_shard_size="8KB")
    (folder / "out" / "transformer" / "loraconv.json").unlink(missing_ok=True)
    other = {name: -3 * t for name, t in load_file(folder / "out" / "pytorch_lora_weights.safetensors").items()}
    config = {"transformer.r": 2, "transformer.lora_alpha": 4}
    save_file(other, folder / OTHER, {"lora_adapter_metadata": json.dumps(config)})
    return folder / "out" / "transformer", folder / "out"


def differs(one: Path, other: Path) -> bool:
    """Whether some tensor of two models is not the same."""
    first, second = (
        {n: t for f in folder.glob("*.safetensors") for n, t in load_file(f).items()} for folder in (one, other)
    )
    assert set(first) == set(second)
    return any(not torch.equal(first[name], second[name]) for name in first)


HOW: dict[str, dict[str, Any]] = {
    "as it is": {},
    "other shards": {"max_shard_size": "5KB"},
    "one shard": {"max_shard_size": "1GB"},
    "some modules": {"modules": ["*.to_q"]},
}


@pytest.mark.parametrize("how", HOW)
def test_what_was_fused_is_unfused(trained: tuple[Path, Path], tmp_path: Path, how: str) -> None:
    base, adapter = trained
    fused = tmp_path / "fused"
    adapters = f"{adapter}@0.8", f"{adapter.with_name(OTHER)}@2.5"
    loraconv.fuse(*adapters, base=base, out=fused, journal=True, **HOW[how])
    assert differs(base, fused)
    assert loraconv.verify(fused).same
    loraconv.unfuse(fused, out=tmp_path / "back")
    assert restored(tmp_path / "back") == contents(base)


def test_what_was_fused_in_place_is_unfused_and_can_be_fused_again(trained: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = trained
    place, back = shutil.copytree(base, tmp_path / "place"), tmp_path / "back"
    loraconv.fuse(adapter, base=place, in_place=True)
    assert differs(base, place)
    loraconv.unfuse(place, out=back)
    assert restored(back) == contents(base)
    loraconv.fuse(adapter, base=back, out=tmp_path / "again", journal=True)
    assert not differs(place, tmp_path / "again")
    assert (tmp_path / "again" / journal.JOURNAL).read_bytes() == (place / journal.JOURNAL).read_bytes()


def test_a_second_fusion_is_undone_by_its_own_journal(trained: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = trained
    one, two = tmp_path / "one", tmp_path / "two"
    loraconv.fuse(adapter, base=base, out=one, journal=True)
    loraconv.fuse(adapter.with_name(OTHER), base=one, out=two, journal=True)
    for fused, before in ((two, one), (one, base)):
        loraconv.unfuse(fused, out=tmp_path / f"{fused.name}-back")
        want = {n: raw for n, raw in contents(before).items() if not n.startswith("loraconv.")}
        assert restored(tmp_path / f"{fused.name}-back") == want


def pipeline(folder: Path, transformer: Path) -> Path:
    """A pipeline of a transformer and two parts that are no models here."""
    shutil.copytree(transformer, folder / "transformer")
    (folder / "model_index.json").write_text('{"_class_name": "CogVideoXPipeline"}')
    for name in ("vae/diffusion_pytorch_model.safetensors", "tokenizer/deep/spiece.model"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_bytes(name.encode())
    return folder


@pytest.mark.parametrize("how", ["copy", "link", "in place"])
def test_a_pipeline_comes_back_with_all_its_parts(trained: tuple[Path, Path], tmp_path: Path, how: str) -> None:
    base, adapter = trained
    whole = pipeline(tmp_path / "whole", base)
    fused = whole
    before = contents(whole)
    if how == "in place":
        loraconv.fuse(adapter, base=whole, in_place=True)
    else:
        fused = tmp_path / "fused"
        loraconv.fuse(adapter, base=whole, out=fused, journal=True, rest=how)
    assert differs(base, fused / "transformer")
    loraconv.unfuse(fused, out=tmp_path / "back")
    assert restored(tmp_path / "back") == before
    assert (tmp_path / "back/vae/diffusion_pytorch_model.safetensors").is_symlink() == (how == "link")


@pytest.mark.parametrize("name", ["vae/diffusion_pytorch_model.safetensors", "transformer/config.json"])
@pytest.mark.parametrize("how", ["changed", "gone"])
def test_a_pipeline_whose_other_files_changed_is_refused(
    trained: tuple[Path, Path], tmp_path: Path, name: str, how: str
) -> None:
    base, adapter = trained
    fused = tmp_path / "fused"
    loraconv.fuse(adapter, base=pipeline(tmp_path / "whole", base), out=fused, journal=True)
    (fused / "vae/notes.txt").write_text("a new file is no change of another")
    loraconv.unfuse(fused, out=tmp_path / "fine")
    if how == "gone":
        (fused / name).unlink()
    else:
        (fused / name).write_bytes((fused / name).read_bytes() + b" ")
    for dry_run in (True, False):
        with pytest.raises(CorruptCheckpoint) as caught:
            loraconv.unfuse(fused, out=tmp_path / "back", dry_run=dry_run)
        assert caught.value.slug == "fused-changed"
        assert caught.value.where == name
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize(
    "text", ["[]", "5", "{", "{}", '{"files": 5}', '{"files": {"name": 1}}', '{"files": [5, null, {}]}']
)
def test_a_record_that_is_none_does_not_hinder(trained: tuple[Path, Path], tmp_path: Path, text: str) -> None:
    base, adapter = trained
    loraconv.fuse(adapter, base=base, out=tmp_path / "fused", journal=True)
    (tmp_path / "fused/loraconv.json").write_text(text)
    loraconv.unfuse(tmp_path / "fused", out=tmp_path / "back")
    assert restored(tmp_path / "back") == contents(base)


@pytest.mark.parametrize("name", ["/etc/hostname", "../x", "a//b", 7, "config.json\0"])
def test_a_record_with_senseless_names_is_refused(trained: tuple[Path, Path], tmp_path: Path, name: object) -> None:
    base, adapter = trained
    loraconv.fuse(adapter, base=base, out=tmp_path / "fused", journal=True)
    (tmp_path / "fused/loraconv.json").write_text(json.dumps({"files": [{"name": name, "sha256": "0" * 64}]}))
    with pytest.raises(CorruptCheckpoint) as caught:
        loraconv.unfuse(tmp_path / "fused", out=tmp_path / "back")
    assert caught.value.slug == "fused-changed"


def test_of_two_journals_in_a_pipeline_the_later_one_counts(trained: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = trained
    fused = tmp_path / "fused"
    loraconv.fuse(adapter, base=pipeline(tmp_path / "whole", base), out=fused, journal=True)
    before = {n: raw for n, raw in contents(fused).items() if not n.startswith("loraconv.")}
    loraconv.fuse(adapter.with_name(OTHER), base=fused, in_place=True)
    loraconv.unfuse(fused, out=tmp_path / "back")
    assert restored(tmp_path / "back") == before


@pytest.mark.parametrize("config", [True, False])
def test_a_fused_single_file_is_unfused(trained: tuple[Path, Path], tmp_path: Path, config: bool) -> None:
    base, adapter = trained
    tensors = {n: t for f in base.glob("*.safetensors") for n, t in load_file(f).items()}
    (tmp_path / "base").mkdir()
    file = tmp_path / "base" / "my model.safetensors"
    save_file(tensors, file)
    foreign_header(file)
    if config:
        shutil.copy(base / "config.json", tmp_path / "base")
    loraconv.fuse(adapter, base=file, out=tmp_path / "fused", journal=True)
    loraconv.unfuse(tmp_path / "fused" / file.name, out=tmp_path / "back")
    assert restored(tmp_path / "back") == contents(tmp_path / "base")
