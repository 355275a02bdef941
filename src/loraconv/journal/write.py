"""The journal of a fusion: everything that is needed to turn the fused model back into its base, bit for bit.

It holds how far the base's numbers are from the fused ones (see ``ulps``), the header, size and SHA-256 of
every base file, the CRC-32 of every base tensor and of every fused one, and config.json and the index as they were.
Once written it is read again, and the base made out of it, before anyone relies on it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Event
from typing import TYPE_CHECKING, Any

from loraconv.errors import CorruptCheckpoint, FormatError, ProofFailed
from loraconv.io.atomic import OutputFolder
from loraconv.io.crc import combine, crc32
from loraconv.io.input_file import InputFile
from loraconv.io.output_file import OutputFile
from loraconv.io.target import JOURNAL
from loraconv.journal.read import MAGIC, read_journal, read_rows, restored
from loraconv.journal.ulps import DTYPES, Factors, chunks, encode, pack_factors, whole_factors
from loraconv.lazy import PIECE_BYTES, TensorRef, decode
from loraconv.model_folder import CONFIG, Model, inside
from loraconv.names import fold_names
from loraconv.ordered import in_order, workers

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

__all__ = ["LowRank", "write_journal"]

#: A fused tensor's factors: ``up`` (out, rank) with strength and scale in it and ``down`` (rank, in), all adapters side
#: by side. They only predict: wrong ones make a journal larger, not wrong.
LowRank = Callable[[str], "tuple[Array, Array] | None"]

#: A code, and the CRC-32 and the number of the fused bytes that it stands for.
_Coded = tuple[bytes, tuple[int, int]]


def write_journal(
    folder: OutputFolder,
    base: Model,
    fused: Mapping[str, TensorRef],
    changed: Sequence[str],
    low_rank: LowRank = lambda name: None,
) -> OutputFile:
    """Write the journal of a fusion into ``folder``, read it again, and see that the base comes out of it.

    ``fused`` are the tensors on disk, ``changed`` the names of those that are not the base's own. Raises
    :class:`FormatError` (``journal-dtype``: other dtypes or shapes than the base's), :class:`ProofFailed`,
    :class:`CorruptCheckpoint` and :class:`WriteFailed`.
    """
    _refuse_other_dtypes(base, fused, changed)
    stop = Event()
    with folder.file(JOURNAL) as out, workers() as pool:
        try:
            sums = {name: pool.submit(_checksums, base, file, stop) for name, file in base.files.items()}
            out.write(MAGIC)
            contents: dict[str, Any] = {
                "changes": list(_write_changes(out, pool, base, fused, changed, low_rank)),
                "files": [_write_header(out, base, name, sums[name].result()[0]) for name in base.files],
                "texts": [_write_text(out, base, name) for name in _texts(base)],
                "crc32": {name: crc for future in sums.values() for name, crc in future.result()[1].items()},
            }
        except BaseException:
            stop.set()
            raise
        raw = json.dumps(contents, separators=(",", ":"), sort_keys=True).encode("utf-8")
        out.write(raw + hashlib.sha256(raw).digest() + len(raw).to_bytes(8, "little") + MAGIC)
    _prove(out, fused, changed)
    return out


def _refuse_other_dtypes(base: Model, fused: Mapping[str, TensorRef], changed: Sequence[str]) -> None:
    kinds = {name: (ref.dtype, ref.shape) for name, ref in base.tensors.items()}
    other = [name for name, ref in fused.items() if kinds.get(name) != (ref.dtype, ref.shape)]
    other += [name for name in changed if kinds[name][0] not in DTYPES]
    if other:
        raise FormatError(
            "no journal can be written: it needs a fused model in the dtypes of its base",
            where="; ".join(fold_names(dict.fromkeys(other))[:4]),
            why=f"it holds distances between numbers of one dtype, which is one of {', '.join(DTYPES)}",
            hint="leave out --dtype, or --journal",
            slug="journal-dtype",
        )


def _checksums(base: Model, file: InputFile, stop: Event) -> tuple[str, dict[str, str]]:
    """The SHA-256 of a base file and the CRC-32 of each of its tensors."""
    digest = hashlib.sha256(file.pread(0, _header_size(file)))
    found = {}
    for name, (start, size) in _ranges(base, file).items():
        crc = 0
        for offset in range(start, start + size, PIECE_BYTES):
            if stop.is_set():
                return "", {}
            piece = file.pread(offset, min(PIECE_BYTES, start + size - offset))
            digest.update(piece)
            crc = crc32(piece, crc)
        found[name] = f"{crc:08x}"
    return digest.hexdigest(), found


def _header_size(file: InputFile) -> int:
    return 8 + int.from_bytes(file.pread(0, 8), "little")


def _ranges(base: Model, file: InputFile) -> dict[str, tuple[int, int]]:
    """First byte and length of the tensors of a file, in the order of their bytes."""
    refs = [ref for ref in base.tensors.values() if ref.file is file]
    return {ref.name: ref.storage for ref in sorted(refs, key=lambda ref: ref.storage)}


def _write_changes(
    out: OutputFile,
    pool: ThreadPoolExecutor,
    base: Model,
    fused: Mapping[str, TensorRef],
    changed: Sequence[str],
    low_rank: LowRank,
) -> Iterator[dict[str, Any]]:
    """Write the codes of all changed tensors; yields their entries in the list of contents."""
    predicted: dict[str, tuple[int, int]] = {}

    def jobs() -> Iterator[Callable[[], _Coded]]:
        for name in changed:
            ref = base.tensors[name]
            factors = _factors(ref, low_rank(name))
            predicted[name] = (factors.up.shape[1], factors.exponent) if factors else (0, 0)
            yield partial(_packed, factors)
            yield from (partial(_encoded, ref, fused[name], factors, rows) for rows in chunks(ref.shape))

    made = in_order(pool, jobs())
    for name in changed:
        ref, sizes, crc = base.tensors[name], [], 0
        for _ in range(1 + len(chunks(ref.shape))):
            code, (more, count) = next(made)
            out.write(code)
            sizes.append(len(code))
            crc = combine(crc, more, count)
        rank, exponent = predicted.pop(name)
        yield {
            "name": name, "dtype": ref.dtype, "shape": list(ref.shape), "fused": f"{crc:08x}",
            "rank": rank, "exponent": exponent, "factors": sizes[0], "codes": sizes[1:],
        }  # fmt: skip


def _factors(ref: TensorRef, given: tuple[Array, Array] | None) -> Factors | None:
    """The adapter's factors in whole numbers, by the size of the weights in the first rows."""
    import numpy as np

    first = b"".join(read_rows(ref, rows) for rows in chunks(ref.shape)[:1])
    if given is None or not first:
        return None
    with np.errstate(all="ignore"):
        typical = float(np.sqrt(np.square(decode(first, ref.dtype)).mean()))
    return whole_factors(*given, typical, ref.dtype)


def _packed(factors: Factors | None) -> _Coded:
    return pack_factors(factors) if factors else b"", (0, 0)


def _encoded(base: TensorRef, fused: TensorRef, factors: Factors | None, rows: tuple[int, int]) -> _Coded:
    after = read_rows(fused, rows)
    return encode(read_rows(base, rows), after, base.dtype, factors, rows), (crc32(after), len(after))


def _write_header(out: OutputFile, base: Model, name: str, sha256: str) -> dict[str, Any]:
    file = base.files[name]
    header = file.pread(0, _header_size(file))
    out.write(header)
    tensors = list(_ranges(base, file))
    return {"name": name, "bytes": file.size, "sha256": sha256, "tensors": tensors, "header": len(header)}


def _texts(base: Model) -> list[str]:
    return ([CONFIG] if base.config is not None else []) + ([base.index] if base.index else [])


def _write_text(out: OutputFile, base: Model, name: str) -> dict[str, Any]:
    with InputFile(inside(base.folder, name)) as file:
        raw = file.pread(0, file.size)
    out.write(raw)
    return {"name": name, "sha256": hashlib.sha256(raw).hexdigest(), "content": len(raw)}


def _prove(out: OutputFile, fused: Mapping[str, TensorRef], changed: Sequence[str]) -> None:
    """Make every changed tensor of the base out of the journal as it is on disk."""
    with InputFile(out.path) as file, workers() as pool:
        try:
            for _ in restored(read_journal(file), fused, changed, pool):
                pass
        except CorruptCheckpoint as error:
            raise ProofFailed(
                "the journal that was written does not give the base back; nothing was left behind",
                where=error.why,
                why="a defect in loraconv, or a damaged disk",
                hint="run the same command again; if it fails again, please report it",
                slug="journal-unproved",
            ) from None
