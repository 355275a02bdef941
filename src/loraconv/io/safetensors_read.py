"""The header of a safetensors file, checked against everything the format promises; no tensor bytes are read.

Refused: a header over 100 MB, overlapping or missing bytes, trailing bytes, duplicate names, unknown dtypes, sizes that
do not fit their shape. Names are only names: they are never used as paths.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from loraconv.errors import CorruptCheckpoint, FormatError
from loraconv.io.input_file import InputFile
from loraconv.io.sidecar import parse_json
from loraconv.lazy import TensorRef
from loraconv.names import DTYPE_BYTES, numel, printable

MAX_HEADER = 100_000_000
# Commas in the header of 200,000 tensors with eight dimensions each; a header with more is a bomb for the parser.
MAX_COMMAS = 3_000_000
MAX_TENSORS = 200_000
MAX_NAME = 1024


@dataclass(frozen=True, slots=True)
class SafetensorsFile:
    """The tensors of one file by name, in the order of their bytes, and its ``__metadata__``."""

    tensors: dict[str, TensorRef]
    metadata: dict[str, str]


def read_safetensors(file: InputFile) -> SafetensorsFile:
    """Parse and check the header; raises :class:`CorruptCheckpoint` or, for an unknown dtype, :class:`FormatError`."""
    if file.size < 8:
        raise _corrupt(file, f"{file.size} bytes are too few for a header")
    length = int.from_bytes(file.pread(0, 8), "little")
    if length > MAX_HEADER or length + 8 > file.size:
        raise _corrupt(file, f"the header claims {length} bytes, the file has {file.size}")
    raw = file.pread(8, length)
    if raw[:1] != b"{":
        raise _corrupt(file, "the header does not begin with {")
    if raw.count(b",") > MAX_COMMAS or raw.count(b"[") > 3 * MAX_TENSORS:
        raise _corrupt(file, "the header has more entries than any checkpoint")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _corrupt(file, f"the header is not UTF-8: {error}") from None
    del raw
    header = parse_json(text, file.shown)
    metadata = _metadata(file, header.pop("__metadata__", {}))
    if len(header) > MAX_TENSORS:
        raise _corrupt(file, f"{len(header)} tensors, more than {MAX_TENSORS}")
    refs = [_ref(file, name, entry, 8 + length) for name, entry in header.items()]
    refs.sort(key=lambda ref: (ref.storage[0], ref.storage[1]))
    _check_cover(file, refs, 8 + length)
    return SafetensorsFile({ref.name: ref for ref in refs}, metadata)


def _metadata(file: InputFile, value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise _corrupt(file, "__metadata__ is not a map of strings")
    return value


def _ref(file: InputFile, name: str, entry: Any, start: int) -> TensorRef:
    if len(name) > MAX_NAME:
        raise _corrupt(file, f"a name of {len(name)} characters")
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        numbers = (*shape, begin, end)
        whole = len(entry) == 3 and isinstance(dtype, str) and all(type(n) is int and n >= 0 for n in numbers)
    except (TypeError, KeyError, ValueError):
        whole = False
    if not whole:
        raise _corrupt(file, f"the entry of {printable(name)} is malformed")
    if dtype not in DTYPE_BYTES:
        raise FormatError(
            f"{file.shown} holds a dtype that loraconv does not know: {printable(str(dtype))}",
            where=printable(name),
            hint="convert the file to F32, F16 or BF16 with the tool that wrote it",
            slug="dtype-unknown",
        )
    if len(shape) > 64 or end - begin != numel(shape) * DTYPE_BYTES[dtype]:
        raise _corrupt(file, f"{printable(name)}: shape {list(shape)[:8]} does not take {end - begin} bytes")
    return TensorRef(name, dtype, shape, file, start + begin, storage=(start + begin, end - begin))


def _check_cover(file: InputFile, refs: list[TensorRef], start: int) -> None:
    at = start
    for ref in refs:
        if ref.storage[0] != at:
            raise _corrupt(file, f"the bytes before {printable(ref.name)} overlap or belong to no tensor")
        at += ref.storage[1]
    if at != file.size:
        raise _corrupt(file, f"the tensors end at byte {at}, the file at {file.size}")


def _corrupt(file: InputFile, why: str) -> CorruptCheckpoint:
    return CorruptCheckpoint(
        f"{file.shown} is not a whole safetensors file",
        why=why,
        hint="fetch or copy the file again and compare its size with the original",
    )
