"""The torch reader: equal to torch on what torch writes, and a refusal for everything else."""

from __future__ import annotations

import importlib
import json
import pickle
import pickletools
import random
import re
import subprocess
import sys
import types
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraconv.errors import CorruptCheckpoint, FormatError, LoraconvError, UnsafeCheckpoint
from loraconv.io.input_file import InputFile
from loraconv.io.torch_read import _CALLS, _OPAQUE, Opaque, TaggedTensor, read_torch, sniff
from loraconv.lazy import TensorRef
from loraconv.names import DTYPE_BYTES
from tests import hostile

FIXTURES = sorted((Path(__file__).parent.parent / "fixtures" / "sat").rglob("*.pt"))
#: Read within the limits: no elements, or no more objects than a large checkpoint has.
HARMLESS = ("huge-dim-by-0", "lists", "tuples", "memo", "one-key-dicts")
HOSTILE = str(Path(hostile.__file__))
DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
}


def read(path: Path) -> object:
    with InputFile(path) as file:
        return read_torch(file)


def read_bytes(folder: Path, data: bytes) -> object:
    path = folder / "case.pt"
    path.write_bytes(data)
    return read(path)


def read_pickle(folder: Path, data: bytes, *storages: bytes) -> object:
    return read_bytes(folder, hostile.checkpoint(data, storages))


def same(ours: object, theirs: object) -> None:
    """Assert that what was read here is what torch read."""
    if isinstance(ours, TaggedTensor):
        assert ours.state == {key: tuple(value) for key, value in vars(theirs).items()}
        ours = ours.tensor
    if isinstance(theirs, torch.Tensor):
        assert isinstance(ours, TensorRef)
        assert (ours.shape, ours.dtype) == (tuple(theirs.shape), DTYPES[theirs.dtype])
        flat = theirs.detach().contiguous().reshape(-1).view(torch.uint8)
        assert b"".join(ours.pieces()) == flat.numpy().tobytes()
    elif isinstance(theirs, dict):
        assert isinstance(ours, dict)
        assert list(ours) == list(theirs)
        for key, value in theirs.items():
            same(ours[key], value)
    elif isinstance(theirs, list | tuple):
        assert isinstance(ours, list | tuple)
        assert isinstance(ours, tuple) == isinstance(theirs, tuple)
        assert len(ours) == len(theirs)
        for mine, other in zip(ours, theirs, strict=True):
            same(mine, other)
    elif isinstance(ours, Opaque):
        assert type(theirs).__module__.partition(".")[0] in ("numpy", "torch", "argparse")
    else:
        assert type(ours) is type(theirs)
        assert ours == theirs


@pytest.fixture
def saved(tmp_path: Path):
    def check(value: object, **options: object) -> object:
        path = tmp_path / "saved.pt"
        torch.save(value, path, **options)
        with InputFile(path) as file:
            ours = read_torch(file)
            same(ours, torch.load(path, weights_only=False))
        return ours

    return check


# Equal to torch.


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: "-".join(path.parts[-5:-2]))
def test_a_real_checkpoint_reads_as_torch_reads_it(path: Path) -> None:
    with InputFile(path) as file:
        assert sniff(file) == "torch-zip"
        same(read_torch(file), torch.load(path, weights_only=False))


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPES.get)
def test_every_dtype_of_safetensors_is_read(saved, dtype: torch.dtype) -> None:
    values = torch.arange(6).to(torch.float32).reshape(2, 3).to(dtype)
    ours = saved({"whole": values, "view": values[1], "empty": values[:0]})
    assert {tensor.dtype for tensor in ours.values()} == {DTYPES[dtype]}
    assert set(DTYPES.values()) == set(DTYPE_BYTES)


def test_views_are_read_as_torch_reads_them(saved) -> None:
    base = torch.arange(60, dtype=torch.float32).reshape(3, 4, 5)
    ours = saved(
        {
            "base": base,
            "slice": base[1:, 1:3],
            "transposed": base.transpose(0, 2),
            "steps": base[..., ::2],
            "scalar": base[2, 1, 3],
            "row": base[1],
            "one": base[:, :1, :1],
            "kept": base[:1, :1].expand(1, 4, 5),
            "empty": torch.empty(0, 7),
            "alone": torch.empty(0),
            "bytes": torch.arange(8, dtype=torch.uint8)[:4].view(torch.float32),
        }
    )
    assert ours["row"].strides is None
    assert ours["row"].storage == ours["base"].storage
    assert ours["transposed"].strides == (1, 5, 20)


def test_the_stride_of_a_dimension_of_one_does_not_make_a_view_strided(tmp_path: Path) -> None:
    pickle_of = b"\x80\x02" + hostile.tensor((1, 4, 1), (99, 1, 7), count=4) + b"."
    assert read_pickle(tmp_path, pickle_of, b"\0" * 16).strides is None


def test_offset_storage_and_checksum_point_at_the_member(tmp_path: Path) -> None:
    path = tmp_path / "case.pt"
    path.write_bytes(hostile.small_checkpoint())
    tensor = read(path)["module"]["b.weight"]
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo("archive/data/0")
        raw = archive.read(info)
    start, size = tensor.storage
    assert (path.read_bytes()[start : start + size], tensor.storage_crc) == (raw, info.CRC)
    assert tensor.offset == start + 4 * 192
    assert tensor.name == ""


def test_objects_of_a_trainer_are_read(saved) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    parameter = torch.nn.Parameter(torch.ones(6))
    parameter.ds_shape = torch.Size([2, 3])
    tagged = torch.ones(6)
    tagged.ds_shape = torch.Size([6])
    optimizer = torch.optim.AdamW(model.parameters())
    ours = saved(
        {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "parameter": parameter,
            "tagged": tagged,
            "plain": torch.nn.Parameter(torch.ones(2)),
            "dtype": torch.float16,
            "device": torch.device("cpu"),
            "bytes": b"\xff\x00abc",
            "empty": b"",
            "names": {"a", "b"},
            "frozen": frozenset((1, 2)),
            "big": 1 << 200,
            "small": [-1, 255, 65535, -(1 << 31), 1 << 40, 0.1, None, True],
            "ordered": OrderedDict(b=1, a=2),
        }
    )
    assert ours["parameter"].state == {"ds_shape": (2, 3)}
    assert ours["dtype"] == Opaque("torch.float16")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_binary_protocol_is_read(saved, protocol: int) -> None:
    value = {
        "a": torch.ones(3),
        "b": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)],
        "c": b"x",
        "d": {1, 2},
        "e": "é" * 300,
    }
    saved({"x": value, "y": [value["b"]] * 3, "long": ["s" * 70_000, b"b" * 70_000]}, pickle_protocol=protocol)


def test_objects_of_deepspeed_and_others_become_opaque(tmp_path: Path) -> None:
    state = b"}" + hostile.text("a") + b"K\x01sb"
    for name in (b"deepspeed.runtime.fp16.loss_scaler\nLossScaler\n", b"argparse\nNamespace\n", b"omegaconf.a\nB\n"):
        for call in (b")R", b")\x81"):
            ours = read_pickle(tmp_path, b"\x80\x02c" + name + call + state + b".")
            assert ours == Opaque(name.decode().strip().replace("\n", "."))
    filled = b")R}(K\x01K\x02ub(K\x01K\x02u(K\x01e"
    assert read_pickle(tmp_path, b"\x80\x02cnumpy\nndarray\n" + filled + b".") == Opaque("numpy.ndarray")
    assert read_pickle(tmp_path, b"\x80\x02ccollections\ndeque\n](K\x01e\x85R(K\x02e.") == [1, 2]
    assert read_pickle(tmp_path, b"\x80\x02ccollections\ndefaultdict\nc__builtin__\nlist\n\x85RK\x01K\x02s.") == {1: 2}


def test_a_file_without_checksums_is_read(saved) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        assert saved({"a": torch.ones(4)})["a"].storage_crc is None
    finally:
        torch.serialization.set_crc32_options(True)


def test_a_wide_storage_alignment_is_read(saved) -> None:
    from torch.utils.serialization import config

    with config.patch({"save.storage_alignment": 4096}):
        assert saved({"a": torch.ones(4), "b": torch.ones(5)})["b"].offset % 4096 == 0


@pytest.mark.slow
def test_a_checkpoint_beyond_four_gigabytes_is_read(tmp_path: Path) -> None:
    path = tmp_path / "big.pt"
    sizes = {"a": 3, "b": (1 << 32) + 100, "c": 5, "d": 6}
    with torch.serialization.skip_data():
        torch.save({name: torch.empty(size, dtype=torch.uint8) for name, size in sizes.items()}, path)
    ours = read(path)
    assert {name: tensor.shape for name, tensor in ours.items()} == {name: (size,) for name, size in sizes.items()}
    theirs = torch.load(path, mmap=True)
    base = theirs["a"].data_ptr() - ours["a"].offset
    assert [tensor.offset for tensor in ours.values()] == [tensor.data_ptr() - base for tensor in theirs.values()]


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 300), 1 << 300)
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(0, 99), inner) | st.tuples(inner, inner),
    max_leaves=20,
)


@given(PLAIN, st.integers(2, 5))
def test_plain_values_read_as_the_standard_unpickler_reads_them(tmp_path_factory, value: object, protocol: int) -> None:
    folder = tmp_path_factory.mktemp("plain")
    assert read_pickle(folder, pickle.dumps(value, protocol)) == value


# P1: no file runs code.


def run_hostile(*arguments: str) -> dict[str, object]:
    done = subprocess.run(
        [sys.executable, HOSTILE, *arguments], capture_output=True, text=True, check=True, timeout=300
    )
    return json.loads(done.stdout)


def test_no_malicious_file_executes_or_imports_anything() -> None:
    result = run_hostile("audit")
    print(result)
    assert result["cases"] >= 2124 + 12
    assert result["hits"] == []
    assert result["control"], "the hook sees what it is there for"
    assert result["executed"] is False
    assert result["not exit 4"] == []


def test_the_payloads_are_real(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    for form in hostile.FORMS:
        code = f"import pickle; pickle.loads({hostile.attack('os.system', form, canary)!r})"
        subprocess.run([sys.executable, "-c", code], check=False, capture_output=True)
        assert canary.exists(), form
        canary.unlink()


def test_the_module_imports_neither_torch_nor_numpy_nor_pickle(tmp_path: Path) -> None:
    (tmp_path / "case.pt").write_bytes(hostile.small_checkpoint())
    code = (
        "import sys; from loraconv.io.input_file import InputFile; from loraconv.io.torch_read import read_torch;"
        f"read_torch(InputFile({str(tmp_path / 'case.pt')!r}));"
        "print(sorted({'torch', 'numpy', 'pickle', '_pickle'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


# P2: an allowlist.


def globals_of(path: Path) -> set[str]:
    with zipfile.ZipFile(path) as archive:
        data = archive.read(next(name for name in archive.namelist() if name.endswith("/data.pkl")))
    return {argument for code, argument, _ in pickletools.genops(data) if code.name == "GLOBAL"}


def test_the_real_checkpoints_need_few_names() -> None:
    needed = set().union(*map(globals_of, FIXTURES))
    print(*sorted(needed), sep="\n")
    known = {name.replace(".", " ") for name in (*_CALLS, *_OPAQUE)}
    rest = {name for name in needed if name.replace(".", " ") not in known}
    assert all(re.fullmatch(r"torch (\w+Storage)", name) for name in rest)


def standard_names() -> Iterator[str]:
    modules = [name for name, module in sys.modules.items() if isinstance(module, types.ModuleType)]
    standard = [name for name in modules if name.partition(".")[0] in sys.stdlib_module_names]
    for name in sorted(
        {*standard, "socket", "ctypes", "runpy", "pdb", "shutil", "xmlrpc.client", "sqlite3", "asyncio"}
    ):
        yield from (f"{name}\n{attribute}\n" for attribute in dir(importlib.import_module(name)))


def test_a_thousand_random_names_of_the_standard_library_are_refused(tmp_path: Path) -> None:
    allowed = {*_CALLS, *_OPAQUE}
    names = sorted({name for name in standard_names() if name.strip().replace("\n", ".") not in allowed})
    for name in random.Random(0).sample(names, 1000):
        with pytest.raises(UnsafeCheckpoint) as refused:
            read_pickle(tmp_path, b"\x80\x02c" + name.encode() + b".")
        assert refused.value.slug == "pickle-global"


@pytest.mark.parametrize(
    "name", ["torch._utils\n_rebuild", "torch\nnn.Module", "collections\nOrderedDict.fromkeys", "torch\nsave"]
)
def test_a_name_near_the_table_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UnsafeCheckpoint, match=re.escape(name.replace("\n", "."))):
        read_pickle(tmp_path, b"\x80\x02c" + name.encode() + b"\n.")


def test_a_hostile_name_is_printed_harmlessly(tmp_path: Path) -> None:
    with pytest.raises(UnsafeCheckpoint) as refused:
        read_pickle(tmp_path, b"\x80\x02cos\x1b[2J\nsystem\x07\n.")
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", str(refused.value))


# P3: no bombs.


@pytest.mark.parametrize("name", hostile.BOMBS)
def test_a_bomb_is_refused_within_memory_and_time(tmp_path: Path, name: str) -> None:
    path = hostile.write((name, hostile.BOMBS[name]()), tmp_path)
    result = run_hostile("measure", str(path))
    print(name, result)
    assert result["outcome"] == "read" if name in HARMLESS else result["outcome"].startswith("4 ")
    assert result["seconds"] < 5
    assert result["megabytes"] < 300


def test_a_view_larger_than_its_storage_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsafeCheckpoint) as refused:
        read_pickle(tmp_path, b"\x80\x02" + hostile.tensor((5,), (0,), count=4) + b".", b"\0" * 16)
    assert refused.value.slug == "view-larger-than-storage"


def test_a_pickle_that_contains_itself_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsafeCheckpoint, match="contains itself"):
        read_pickle(tmp_path, b"\x80\x02]q\0h\0a.")


# Tensors that do not fit.


@pytest.mark.parametrize(
    "tensor",
    [
        hostile.tensor((4,), (1,), offset=1, count=4),
        hostile.tensor((2,), (4,), count=4),
        hostile.tensor((4,), (1,), count=5),
        hostile.tensor((4,), (1,), count=3),
        hostile.tensor((4,), (1,), count=4, key="1"),
        hostile.tensor((4,), (1,), count=4, key="../0"),
        hostile.tensor((4,), (1, 1), count=4),
        hostile.tensor((-1,), (1,), count=4),
        hostile.tensor((2,), (-1,), offset=1, count=4),
        hostile.tensor((4,), (1,), offset=-1, count=4),
        hostile.tensor((1,) * 65, (1,) * 65, count=4),
        hostile.tensor((1 << 70,), (1,), count=4),
    ],
)
def test_a_tensor_outside_its_storage_is_corrupt(tmp_path: Path, tensor: bytes) -> None:
    with pytest.raises(CorruptCheckpoint):
        read_pickle(tmp_path, b"\x80\x02" + tensor + b".", b"\0" * 16)


@pytest.mark.parametrize("storage", ["QInt8Storage", "ComplexDoubleStorage", "NewStorage"])
def test_an_unknown_storage_type_is_refused_by_name(tmp_path: Path, storage: str) -> None:
    with pytest.raises(FormatError, match=storage):
        read_pickle(tmp_path, b"\x80\x02" + hostile.tensor((4,), (1,), count=4, storage=storage) + b".", b"\0" * 16)


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (torch.eye(3).to_sparse(), "sparse"),
        (torch.ones(3, device="meta"), "meta|UntypedStorage|no storage"),
        (torch.ones(3, dtype=torch.complex64).conj(), "conjugate"),
        (torch.ones(3, dtype=torch.complex128), "ComplexDouble"),
    ],
)
def test_an_unsupported_tensor_is_refused_by_name(tmp_path: Path, value: torch.Tensor, what: str) -> None:
    path = tmp_path / "x.pt"
    torch.save(value, path)
    with pytest.raises(FormatError, match=what):
        read(path)


# Containers.


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"", "empty"),
        (b"P", "zip"),
        (b"hello world", "unknown"),
        (b"\x80\x02}.", "legacy-pickle"),
        (b"cos\nsystem\n(S'x'\ntR.", "legacy-pickle"),
        (b"7z\xbc\xaf\x27\x1c\0\4", "7z"),
        (b"\x1f\x8b\x08\0", "gzip"),
        (b"\0" * 257 + b"ustar\0", "tar"),
        (b"\x02\0\0\0\0\0\0\0{}", "safetensors"),
        (hostile.small_checkpoint(), "torch-zip"),
        (hostile.small_checkpoint()[:-5], "torch-zip"),
        (hostile.zip_of([("a.txt", b"x")]), "zip"),
        (hostile.zip_of([("a/data.pkl", b"x"), ("a/code/x.py", b"")]), "torchscript"),
    ],
)
def test_the_kind_of_a_file_follows_from_its_bytes(tmp_path: Path, data: bytes, kind: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with InputFile(path) as file:
        assert sniff(file) == kind


def test_old_torch_files_and_torchscript_are_refused_with_a_command(tmp_path: Path) -> None:
    old, script = tmp_path / "it's old.pt", tmp_path / "script.pt"
    torch.save({"a": torch.ones(2)}, old, _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(script, "w") as archive:
        for name in ("x/data.pkl", "x/code/a.py", "x/constants.pkl"):
            archive.writestr(name, b"\x80\x02}.")
    for path in (old, script):
        with pytest.raises(UnsafeCheckpoint) as refused:
            read(path)
        assert "weights_only=True" in refused.value.hint
    with pytest.raises(UnsafeCheckpoint) as refused:
        read(old)
    command = refused.value.hint.replace("python ", f"{sys.executable} ", 1)
    subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    assert read(tmp_path / "resaved.pt")["a"].shape == (2,)


def test_a_zip_that_python_wrote_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\x02}.")
        with archive.open("x/data/0", "w", force_zip64=True) as member:
            member.write(b"abcd")
        archive.writestr("x/version", b"3\n")
    assert read(path) == {}


def test_a_big_endian_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="big-endian"):
        read_bytes(tmp_path, hostile.zip_of([("a/data.pkl", hostile.BENIGN), ("a/byteorder", b"big")]))


# P5: damage.


def test_a_file_cut_at_any_byte_is_corrupt(tmp_path: Path) -> None:
    outcomes = {type(outcome(tmp_path, data)) for _, data in hostile.truncations(hostile.small_checkpoint())}
    assert outcomes == {CorruptCheckpoint}


def test_a_torch_file_cut_at_any_byte_is_corrupt(tmp_path: Path) -> None:
    path = tmp_path / "whole.pt"
    torch.save({"a": torch.arange(8.0), "b": torch.ones(2, 3)[1]}, path)
    outcomes = {type(outcome(tmp_path, data)) for _, data in hostile.truncations(path.read_bytes())}
    assert outcomes == {CorruptCheckpoint}


def outcome(folder: Path, data: bytes) -> object:
    """What reading gives: a value, or the refusal. Any other exception passes through and fails the test."""
    path = folder / "case.pt"
    path.write_bytes(data)
    with InputFile(path) as file:
        sniff(file)
        try:
            return read_torch(file)
        except LoraconvError as error:
            return error


def survives(folder: Path, data: bytes) -> None:
    result = outcome(folder, data)
    assert not isinstance(result, LoraconvError) or result.exit_code in (3, 4)


def test_a_flipped_bit_never_gives_another_exception(tmp_path: Path) -> None:
    for _, data in hostile.bit_flips(hostile.small_checkpoint(), 4000):
        survives(tmp_path, data)


def test_a_flipped_bit_in_a_bare_pickle_never_gives_another_exception(tmp_path: Path) -> None:
    data = pickletools_stream()
    for _, flipped in hostile.bit_flips(data, 4000):
        survives(tmp_path, hostile.checkpoint(flipped, [b"\0" * 1024]))


def pickletools_stream() -> bytes:
    with zipfile.ZipFile(FIXTURES[0]) as archive:
        data = archive.read(archive.namelist()[0])
    return data[:3000]


@pytest.mark.slow
def test_every_bit_of_a_torch_file_may_flip(tmp_path: Path) -> None:
    path = tmp_path / "whole.pt"
    torch.save({"a": torch.arange(8.0), "b": torch.ones(2, 3)[1]}, path)
    data = path.read_bytes()
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        survives(tmp_path, bytes(flipped))


def mutants(examples: int):
    @settings(max_examples=examples, deadline=None)
    @given(
        st.lists(st.tuples(st.integers(0, 1810), st.binary(min_size=1, max_size=8)), min_size=1, max_size=4),
        st.booleans(),
    )
    def check(tmp_path_factory, edits: list[tuple[int, bytes]], mend: bool) -> None:
        data = bytearray(hostile.small_checkpoint())
        for at, new in edits:
            data[at : at + len(new)] = new
        if mend:  # a mutated pickle under a right checksum gets past the container
            start = data.find(b"\x80\x02")
            body = bytes(data[start : start + 500]) if start >= 0 else b""
            data = bytearray(hostile.checkpoint(body, [b"\0" * 1024]))
        survives(tmp_path_factory.mktemp("mutant"), bytes(data))

    return check


test_random_mutations_give_a_value_or_a_refusal = mutants(200)
test_many_random_mutations_give_a_value_or_a_refusal = pytest.mark.slow(mutants(20_000))
