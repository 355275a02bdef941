"""Writing a safetensors file as a stream, with the same bytes every time.

The ``safetensors`` library writes its metadata in random order and sets neither mode nor durability, so the header is
made here: names and metadata sorted, tensors in the library's own order (wide dtypes first, then by name).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

from loraconv.io.output_file import OutputFile
from loraconv.lazy import Lazy, nbytes, spans
from loraconv.names import DTYPE_BYTES

Named = tuple[str, Lazy]


def in_order(tensors: Iterable[Named]) -> list[Named]:
    """The tensors in the order of their bytes in the file."""
    return sorted(tensors, key=lambda item: (-DTYPE_BYTES[item[1].dtype], item[0]))


def header_bytes(tensors: Iterable[Named], metadata: Mapping[str, str]) -> bytes:
    """The length prefix and the JSON header, padded with spaces to a multiple of 8."""
    return header_of(in_order(tensors), metadata)


def header_of(ordered: Iterable[Named], metadata: Mapping[str, str]) -> bytes:
    """The header of tensors whose bytes stand in the order given."""
    entries: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    at = 0
    for name, tensor in ordered:
        size = nbytes(tensor)
        entries[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_safetensors(file: OutputFile, tensors: Iterable[Named], metadata: Mapping[str, str]) -> None:
    """Stream the header and every tensor into ``file``; raises what ``file.write`` raises."""
    ordered = in_order(tensors)
    file.write(header_bytes(ordered, metadata))
    write_tensors(file, ordered)


def begin_safetensors(file: OutputFile, tensors: Iterable[Named], metadata: Mapping[str, str]) -> None:
    """Write the header only, and give the file its final length; :func:`write_tensors` writes the rest."""
    ordered = in_order(tensors)
    file.write(header_bytes(ordered, metadata))
    file.reserve(file.size + sum(nbytes(tensor) for _, tensor in ordered))


def write_tensors(file: OutputFile, tensors: Iterable[Named]) -> None:
    """Stream every tensor into ``file``, behind its header."""
    for name, tensor in in_order(tensors):
        start = file.size
        for ref in spans(tensor) or ():
            file.copy(ref.file, ref.offset, nbytes(ref))
        if spans(tensor) is None:
            for piece in tensor.pieces():
                file.write(piece)
        if file.size - start != nbytes(tensor):
            raise RuntimeError(f"{name}: {file.size - start} bytes were made, {nbytes(tensor)} were declared")
