"""Reads the structure of a ``torch.save`` checkpoint without torch, and without running or importing what it names.

The zip is checked first (:mod:`loraconv.io.torch_zip`), then its pickle is interpreted
(:mod:`loraconv.io.torch_pickle`) with the table below: a name outside the table refuses the file. Tensor bytes are
not read; a tensor becomes a :class:`~loraconv.lazy.TensorRef` whose bounds have been checked.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NoReturn, TypeGuard

from loraconv.errors import CorruptCheckpoint, FormatError, LoraconvError
from loraconv.io.input_file import InputFile
from loraconv.io.torch_pickle import Global, Machine, Opaque, refuse_global
from loraconv.io.torch_zip import Member, damaged, open_torch_zip, read_member, resave, unsafe
from loraconv.io.torch_zip import sniff as sniff
from loraconv.lazy import TensorRef
from loraconv.names import DTYPE_BYTES, fold_names, numel, printable

MAX_DIMS = 64
MAX_NUMBER = 1 << 60
MAX_STATE = 64
#: What one reference takes in memory; the budget of the machine then ends at about 200,000 tensors.
TENSOR_BYTES = 320

_STORAGES = {
    "BoolStorage": "BOOL", "ByteStorage": "U8", "CharStorage": "I8", "ShortStorage": "I16", "IntStorage": "I32",
    "LongStorage": "I64", "HalfStorage": "F16", "BFloat16Storage": "BF16", "FloatStorage": "F32",
    "DoubleStorage": "F64", "ComplexFloatStorage": "C64",
}  # fmt: skip

_DTYPES = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "uint16": "U16", "int16": "I16", "uint32": "U32", "int32": "I32",
    "uint64": "U64", "int64": "I64", "float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64",
    "complex64": "C64", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
}  # fmt: skip

#: Tensors that torch can save and loraconv has no use for.
_UNSUPPORTED = {
    "_rebuild_sparse_tensor": "a sparse tensor",
    "_rebuild_sparse_csr_tensor": "a sparse tensor",
    "_rebuild_nested_tensor": "a nested tensor",
    "_rebuild_qtensor": "a quantised tensor",
    "_rebuild_meta_tensor_no_storage": "a meta tensor, which has no data",
    "_rebuild_wrapper_subclass": "a tensor subclass",
    "_rebuild_device_tensor_from_numpy": "a tensor of another device type",
}

_CALLS = {
    "torch._utils._rebuild_tensor_v2": "_tensor_v2",
    "torch._utils._rebuild_tensor_v3": "_tensor_v3",
    "torch._utils._rebuild_parameter": "_parameter",
    "torch._utils._rebuild_parameter_with_state": "_parameter_with_state",
    "torch._tensor._rebuild_from_type_v2": "_from_type",
    "torch.Size": "_size",
    "collections.OrderedDict": "_make_ordered_dict",
    "collections.defaultdict": "_make_default_dict",
    "collections.deque": "_make_deque",
    "builtins.set": "_make_set",
    "builtins.frozenset": "_make_frozenset",
    "builtins.bytes": "_make_bytes",
    "_codecs.encode": "_encode",
    # A number with a name: which stage of ZeRO cut the tensors up.
    "deepspeed.runtime.zero.config.ZeroStageEnum": "_stage",
}

#: Recognised, never built. The built-in types are the factory of a defaultdict and the element types of omegaconf.
_OPAQUE = frozenset(
    (
        "numpy.ndarray", "numpy.dtype", "numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct",
        "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "argparse.Namespace", "torch.device",
        "torch.Tensor", "torch.nn.parameter.Parameter", "pathlib.PosixPath", "pathlib.PurePosixPath", "typing.Any",
        "builtins.dict", "builtins.list", "builtins.tuple", "builtins.int", "builtins.float", "builtins.str",
        "builtins.bool",
    )
)  # fmt: skip
_OPAQUE_PACKAGES = ("deepspeed", "omegaconf")

_DAMAGE = (
    ArithmeticError, AttributeError, EOFError, LookupError, MemoryError, OSError, RecursionError, TypeError,
    ValueError, struct.error,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class TaggedTensor:
    """A tensor saved with Python attributes (ZeRO-3 parameters carry ``ds_shape``); only plain ones are kept."""

    tensor: TensorRef
    state: dict[str, object]


@dataclass(frozen=True, slots=True)
class _StorageType(Opaque):
    dtype: str | None


@dataclass(frozen=True, slots=True)
class _Storage(Opaque):
    dtype: str | None
    start: int
    size: int
    crc: int | None


def read_torch(file: InputFile) -> object:
    """The root object of a checkpoint as plain values, :class:`TensorRef`, :class:`TaggedTensor`, :class:`Opaque`.

    Raises :class:`CorruptCheckpoint` for a damaged file, :class:`UnsafeCheckpoint` for one that names something
    outside the table, has an odd container or asks for far more than its size, :class:`FormatError` for one that is
    no torch checkpoint or holds tensors of an unsupported kind.
    """
    try:
        members = open_torch_zip(file)
        return _Reader(file, members).load()
    except LoraconvError:
        raise
    except _DAMAGE as error:
        raise CorruptCheckpoint(
            f"{file.shown} is damaged",
            why=printable(f"its pickle cannot be read: {type(error).__name__} {error}"),
            hint="fetch or copy the file again and compare its size and checksum with the original",
        ) from None


def read_tensors(file: InputFile) -> dict[str, TensorRef]:
    """The tensors of a checkpoint that is a plain dictionary of them, each named as its key.

    Raises what :func:`read_torch` raises, and :class:`FormatError` for anything else in it (``no-state-dict``) and for
    views with gaps or transposed ones (``strided``), whose bytes cannot be copied.
    """
    root = read_torch(file)
    tensors = {key: bare(value) for key, value in root.items()} if isinstance(root, dict) else {}
    found = {key: replace(ref, name=key) for key, ref in tensors.items() if type(key) is str and ref is not None}
    if len(found) != len(tensors) or not found:
        other = [str(key) for key in tensors if key not in found]
        raise FormatError(
            f"{file.shown} is no plain dictionary of tensors",
            where="; ".join(fold_names(other)[:4]),
            hint="pass the weights as their library saves them: save_pretrained",
            slug="no-state-dict",
        )
    if strided := [key for key, ref in found.items() if ref.strides is not None]:
        raise FormatError(
            f"{len(strided)} tensors of {file.shown} are views whose numbers do not lie side by side",
            where="; ".join(fold_names(strided)[:4]),
            hint="load it in transformers and save_pretrained(..., safe_serialization=True)",
            slug="strided",
        )
    return found


def bare(value: object) -> TensorRef | None:
    """The tensor, without its Python attributes; None for anything else."""
    value = value.tensor if isinstance(value, TaggedTensor) else value
    return value if isinstance(value, TensorRef) else None


class _Reader(Machine):
    """The meaning of names and storages in a torch checkpoint. A wrong number of arguments is a TypeError."""

    __slots__ = ("known", "members")

    def __init__(self, file: InputFile, members: dict[str, Member]) -> None:
        super().__init__(file, read_member(file, members["data.pkl"]))
        self.members = members
        self.known: dict[tuple[str, str], object] = {}

    def find_global(self, module: str, name: str) -> object:
        if (module, name) not in self.known:
            # Python 2 spells the module of the built-in types differently, and protocol 2 keeps that spelling.
            full = f"{'builtins' if module == '__builtin__' else module}.{name}"
            # The dots of a nested name must not make it equal to one of the table.
            found = self._look_up(module, name, full) if "." not in name else None
            self.known[module, name] = found or refuse_global(self.file, module, name)
        return self.known[module, name]

    def _look_up(self, module: str, name: str, full: str) -> object:
        if full in _CALLS:
            return Global(full, _caller(self, _CALLS[full]))
        if full in _OPAQUE or module.partition(".")[0] in _OPAQUE_PACKAGES:
            opaque = Opaque(printable(full))
            return Global(opaque.kind, lambda args: opaque, is_class=True)
        if module == "torch._utils" and name in _UNSUPPORTED:
            self._unsupported(_UNSUPPORTED[name])
        if full == "torch.storage.UntypedStorage":
            return _StorageType(full, None)
        if module == "torch" and name.endswith("Storage"):
            return _StorageType(full, _STORAGES.get(name) or self._unsupported(f"a {printable(name)}"))
        if module == "torch" and name in _DTYPES:
            return Opaque(full)
        return None

    def _unsupported(self, what: str) -> NoReturn:
        raise FormatError(f"{self.file.shown} holds {what}", slug="dtype", hint=resave(self.file))

    def persistent_load(self, pid: object) -> object:
        if not isinstance(pid, tuple) or len(pid) != 5 or pid[0] != "storage":
            damaged(self.file, "data.pkl refers to something that is no storage")
        kind, key, count = pid[1], pid[2], pid[4]
        if not isinstance(kind, _StorageType) or type(key) is not str:
            damaged(self.file, "data.pkl refers to something that is no storage")
        member = self.members.get(f"data/{key}")
        if member is None:
            damaged(self.file, f"the storage {printable(repr(key))} is missing")
        item = 1 if kind.dtype is None else DTYPE_BYTES[kind.dtype]
        if type(count) is not int or count < 0 or count * item != member.size:
            damaged(self.file, f"the storage {key} has {member.size} bytes, its tensor declares {count!s:.40} elements")
        return _Storage("torch.storage", kind.dtype, *member)

    # What stands for calling a name.

    def _tensor_v2(
        self, storage: object, offset: object, shape: object, strides: object, _grad: object, _hooks: object,
        meta: object = None,
    ) -> TensorRef:  # fmt: skip
        if not isinstance(storage, _Storage) or storage.dtype is None:
            damaged(self.file, "a tensor has no storage")
        return self._tensor(storage, storage.dtype, offset, shape, strides, meta)

    def _tensor_v3(
        self, storage: object, offset: object, shape: object, strides: object, _grad: object, _hooks: object,
        dtype: object, meta: object = None,
    ) -> TensorRef:  # fmt: skip
        name = _DTYPES.get(dtype.kind.removeprefix("torch.")) if isinstance(dtype, Opaque) else None
        if not isinstance(storage, _Storage) or storage.dtype is not None or name is None:
            damaged(self.file, "a tensor has no storage or no dtype")
        return self._tensor(storage, name, offset, shape, strides, meta)

    def _tensor(
        self, storage: _Storage, dtype: str, offset: object, shape: object, strides: object, meta: object
    ) -> TensorRef:
        if meta:
            self._unsupported("a tensor with its conjugate or negative bit set")
        if not (_is_size(shape) and _is_size(strides) and len(shape) == len(strides) and _is_size((offset,))):
            damaged(self.file, "the shape, strides or offset of a tensor are malformed")
        assert type(offset) is int
        self.spend(TENSOR_BYTES)
        item, count = DTYPE_BYTES[dtype], numel(shape)
        where = (storage.start, storage.size)
        if count == 0:
            return TensorRef("", dtype, shape, self.file, storage.start, None, where, storage.crc)
        if count * item > storage.size:
            why = f"a tensor of shape {list(shape)} needs {count * item} bytes, its storage has {storage.size}"
            unsafe(self.file, printable(why), "view-larger-than-storage")
        steps = None if _is_contiguous(shape, strides) else strides
        extent = count if steps is None else 1 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
        if (offset + extent) * item > storage.size:
            damaged(self.file, printable(f"a tensor of shape {list(shape)} reaches beyond its storage"))
        return TensorRef("", dtype, shape, self.file, storage.start + offset * item, steps, where, storage.crc)

    def _parameter(self, tensor: object, _grad: object, _hooks: object) -> object:
        if not isinstance(tensor, TensorRef | TaggedTensor):
            damaged(self.file, "a parameter holds no tensor")
        return tensor

    def _parameter_with_state(self, tensor: object, grad: object, hooks: object, state: object) -> object:
        return self._tagged(self._parameter(tensor, grad, hooks), state)

    def _from_type(self, function: object, kind: object, args: object, state: object) -> object:
        if not (type(function) is Global and function.kind.startswith("torch._utils.") and type(args) is tuple):
            self.refuse("a tensor is rebuilt by something else than torch")
        if not isinstance(kind, Opaque) or kind.kind not in ("torch.Tensor", "torch.nn.parameter.Parameter"):
            self.refuse("a tensor has a type that is not torch's own")
        return self._tagged(function.call(args), state)

    def _tagged(self, tensor: object, state: object) -> object:
        """The tensor with those attributes that are plain values; the rest of its state is dropped."""
        if isinstance(state, tuple) and state:
            state = state[0]
        if not isinstance(tensor, TensorRef) or not isinstance(state, dict | None) or len(state or ()) > MAX_STATE:
            damaged(self.file, "the attributes of a tensor are malformed")
        self.spend(100 * len(state or ()))
        plain = {key: value for key, value in (state or {}).items() if type(key) is str and _is_plain(value)}
        return TaggedTensor(tensor, plain)

    def _size(self, sizes: object) -> object:
        if not _is_size(sizes):
            damaged(self.file, "a torch.Size is malformed")
        return sizes

    def _make_ordered_dict(self, pairs: object = ()) -> object:
        if not pairs:
            return {}
        found: dict[object, object] = {}
        for pair in self._items(pairs):
            if not isinstance(pair, list | tuple) or len(pair) != 2:
                damaged(self.file, "the items of a container are malformed")
            self.check_keys([pair[0]])
            found[pair[0]] = pair[1]
        return found

    def _make_default_dict(self, _factory: object = None) -> object:
        return {}

    def _make_deque(self, items: object = (), _most: object = None) -> object:
        return list(self._items(items))

    def _make_set(self, items: object = ()) -> object:
        return set(self._hashable_items(items))

    def _make_frozenset(self, items: object = ()) -> object:
        return frozenset(self._hashable_items(items))

    def _hashable_items(self, items: object) -> list[object]:
        copied = self._items(items)
        self.check_keys(copied)
        return copied

    def _items(self, items: object) -> list[object]:
        if not isinstance(items, list | tuple):
            damaged(self.file, "the items of a container are malformed")
        self.spend(100 + 100 * len(items))
        return list(items)

    def _make_bytes(self) -> object:
        # Protocol 2 writes empty bytes as a call; with an argument it would be a bomb, and is a TypeError.
        return b""

    def _stage(self, number: object) -> object:
        if type(number) is not int:
            damaged(self.file, "a stage of ZeRO is no number")
        return number

    def _encode(self, text: object, codec: object = "latin1") -> object:
        if type(text) is not str or codec not in ("latin1", "latin-1"):
            self.refuse("data.pkl decodes text with another codec than latin1")
        self.spend(len(text))
        return text.encode("latin-1")


def _caller(reader: _Reader, name: str) -> Callable[[tuple[object, ...]], object]:
    method: Callable[..., object] = getattr(reader, name)
    return lambda args: method(*args)


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple):
        return len(value) <= MAX_DIMS and all(isinstance(item, int | float | str) for item in value)
    return value is None or isinstance(value, int | float | str)


def _is_size(numbers: object) -> TypeGuard[tuple[int, ...]]:
    if type(numbers) is not tuple or len(numbers) > MAX_DIMS:
        return False
    for number in numbers:  # noqa: SIM110 - twice as fast as all(), and called four times per tensor
        if type(number) is not int or not 0 <= number < MAX_NUMBER:
            return False
    return True


def _is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Row-major without gaps; the stride of a dimension of size 1 says nothing."""
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True
