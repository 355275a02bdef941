"""Writing a state dict as a torch zip file, as a stream and without torch: what ``torch.load`` reads with
``weights_only=True``.

Only plain values, ordered dicts, sizes and tensors are written. The file is the same byte for byte every time.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loraconv.io.crc import crc32
from loraconv.io.output_file import OutputFile
from loraconv.lazy import Lazy, nbytes
from loraconv.names import numel

_STORAGE = {
    "BF16": "BFloat16Storage",
    "BOOL": "BoolStorage",
    "F16": "HalfStorage",
    "F32": "FloatStorage",
    "F64": "DoubleStorage",
    "I16": "ShortStorage",
    "I32": "IntStorage",
    "I64": "LongStorage",
    "I8": "CharStorage",
    "U8": "ByteStorage",
}
_ALIGN = 64
_ROOT = "archive"
# Sizes follow the data, and names are UTF-8: the flags that torch itself sets.
_FLAGS = 0x808
_SATURATED = 0xFFFFFFFF


class Size(tuple[int, ...]):
    """A shape among the plain values: read back as ``torch.Size``."""


def write_torch(file: OutputFile, tensors: Mapping[str, Lazy], rest: Mapping[str, Any]) -> None:
    """Write ``{"module": tensors, **rest}``; every tensor gets a storage of its own.

    ``rest`` holds None, bool, int, float, str, list, dict, OrderedDict, :class:`Size`, and tensors of ``tensors``
    itself (the same object: both names then share a storage). Raises TypeError for anything else.
    """
    zipped = _Zip(file)
    numbers = {id(tensor): number for number, tensor in enumerate(tensors.values())}
    zipped.add("data.pkl", _pickled(tensors, rest, numbers))
    zipped.add("byteorder", b"little")
    for number, tensor in enumerate(tensors.values()):
        zipped.add_tensor(f"data/{number}", tensor)
    zipped.add("version", b"3\n")
    zipped.close()


# --- pickle, protocol 2: opcodes as documented in Python's pickletools --------------------------------------------


def _text(value: str) -> bytes:
    raw = value.encode("utf-8")
    return b"X" + struct.pack("<I", len(raw)) + raw


def _int(value: int) -> bytes:
    if 0 <= value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def _tuple(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(_int(v) for v in values) + b"t"


def _global(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode("ascii")


def _tensor(number: int, tensor: Lazy) -> bytes:
    """A call of ``torch._utils._rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks)``."""
    count = numel(tensor.shape)
    storage = (
        b"("
        + _text("storage")
        + _global("torch", _STORAGE[tensor.dtype])
        + _text(str(number))
        + _text("cpu")
        + _int(count)
        + b"tQ"
    )
    strides = tuple(numel(tensor.shape[dim + 1 :]) for dim in range(len(tensor.shape)))
    hooks = _global("collections", "OrderedDict") + b")R"
    arguments = storage + _int(0) + _tuple(tensor.shape) + _tuple(strides) + b"\x89" + hooks
    return _global("torch._utils", "_rebuild_tensor_v2") + b"(" + arguments + b"tR"


def _pickled(tensors: Mapping[str, Lazy], rest: Mapping[str, Any], numbers: Mapping[int, int]) -> bytes:
    module = b"".join(_text(name) + _tensor(number, tensor) for number, (name, tensor) in enumerate(tensors.items()))
    items = b"".join(_text(key) + _value(value, numbers) for key, value in rest.items())
    return b"\x80\x02}(" + _text("module") + b"}(" + module + b"u" + items + b"u."


def _value(value: Any, numbers: Mapping[int, int]) -> bytes:
    if value is None or isinstance(value, bool):
        return {None: b"N", True: b"\x88", False: b"\x89"}[value]
    if isinstance(value, int | float):
        return _int(value) if isinstance(value, int) else b"G" + struct.pack(">d", value)
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, Size):
        return _global("torch", "Size") + b"(" + _tuple(value) + b"tR"
    if isinstance(value, list):
        return b"](" + b"".join(_value(item, numbers) for item in value) + b"e"
    if isinstance(value, dict):
        begin = _global("collections", "OrderedDict") + b")R" if isinstance(value, OrderedDict) else b"}"
        return begin + b"(" + b"".join(_value(k, numbers) + _value(v, numbers) for k, v in value.items()) + b"u"
    if id(value) in numbers:
        return _tensor(numbers[id(value)], value)
    raise TypeError(f"{type(value).__name__} is no plain value")


# --- zip, stored, with zip64 where a size or offset needs it -------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Member:
    name: bytes
    crc: int
    size: int
    offset: int


class _Zip:
    """A stream of stored members. Sizes are known beforehand; each CRC follows its data in a descriptor."""

    def __init__(self, file: OutputFile) -> None:
        self._file = file
        self._members: list[_Member] = []

    def add(self, name: str, data: bytes) -> None:
        self._begin(name, len(data))
        self._file.write(data)
        self._end(crc32(data), len(data))

    def add_tensor(self, name: str, tensor: Lazy) -> None:
        self._begin(name, nbytes(tensor))
        crc = count = 0
        for piece in tensor.pieces():
            self._file.write(piece)
            crc = crc32(piece, crc)
            count += len(piece)
        if count != nbytes(tensor):
            raise RuntimeError(f"{name}: {count} bytes were made, {nbytes(tensor)} were declared")
        self._end(crc, count)

    def close(self) -> None:
        """Write the central directory, in zip64 form where the sizes need it."""
        start = self._file.size
        for member in self._members:
            self._file.write(_central(member))
        length = self._file.size - start
        count = len(self._members)
        if start >= _SATURATED or count >= 0xFFFF:
            end = self._file.size
            self._file.write(struct.pack("<IQHHIIQQQQ", 0x06064B50, 44, 45, 45, 0, 0, count, count, length, start))
            self._file.write(struct.pack("<IIQI", 0x07064B50, 0, end, 1))
        few = min(count, 0xFFFF)
        self._file.write(
            struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, few, few, min(length, _SATURATED), min(start, _SATURATED), 0)
        )

    def _begin(self, name: str, size: int) -> None:
        """The local header, padded so that the data begins at a multiple of 64 (torch maps storages into memory)."""
        raw = f"{_ROOT}/{name}".encode()
        wide = size >= _SATURATED
        extra = struct.pack("<HHQQ", 1, 16, 0, 0) if wide else b""
        bare = self._file.size + 30 + len(raw) + len(extra) + 4
        padding = -bare % _ALIGN
        extra += b"FB" + struct.pack("<H", padding) + b"Z" * padding
        self._members.append(_Member(raw, 0, size, self._file.size))
        sizes = (_SATURATED, _SATURATED) if wide else (0, 0)
        head = struct.pack(
            "<IHHHHHIIIHH", 0x04034B50, 45 if wide else 0, _FLAGS, 0, 0, 0, 0, *sizes, len(raw), len(extra)
        )
        self._file.write(head + raw + extra)

    def _end(self, crc: int, size: int) -> None:
        begun = self._members[-1]
        self._members[-1] = _Member(begun.name, crc, size, begun.offset)
        self._file.write(struct.pack("<IIQQ" if size >= _SATURATED else "<IIII", 0x08074B50, crc, size, size))


def _central(member: _Member) -> bytes:
    extra = b""
    if member.size >= _SATURATED:
        extra += struct.pack("<QQ", member.size, member.size)
    if member.offset >= _SATURATED:
        extra += struct.pack("<Q", member.offset)
    if extra:
        extra = struct.pack("<HH", 1, len(extra)) + extra
    size, offset = min(member.size, _SATURATED), min(member.offset, _SATURATED)
    version = 45 if extra else 0
    fixed = struct.pack(
        "<IHHHHHHIIIHHHHHII",
        *(0x02014B50, version, version, _FLAGS, 0, 0, 0, member.crc, size, size),
        *(len(member.name), len(extra), 0, 0, 0, 0, offset),
    )
    return fixed + member.name + extra
