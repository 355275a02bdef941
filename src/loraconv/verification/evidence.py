"""What a report shows of two compared adapters besides the comparison: what each side is, its files by SHA-256, and the
singular values of every delta. Gathered only for a report: the hashes read every byte of the files."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from loraconv.detect import detect
from loraconv.io.digest import Digest
from loraconv.io.input_file import InputFile
from loraconv.source import Source
from loraconv.verifier.numbers import Pair
from loraconv.verifier.spectrum import singular_values

Pairs = Mapping[str, Pair]


@dataclass(frozen=True, slots=True)
class HashedFile:
    """One input file, as it was named on disk."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Side:
    """One adapter: its format and container, and the ranks, scales and dtypes of its factors without repetition."""

    path: str
    format: str
    container: str
    ranks: tuple[int, ...]
    scales: tuple[str, ...]
    dtypes: tuple[str, ...]
    files: tuple[HashedFile, ...]


@dataclass(frozen=True, slots=True)
class Spectrum:
    """The singular values of one module's delta in both adapters, greatest first; None where a side lacks it."""

    module: str
    one: tuple[float, ...] | None
    other: tuple[float, ...] | None


@dataclass(frozen=True, slots=True)
class Evidence:
    """Both sides, and the spectra of every module that either has."""

    one: Side
    other: Side
    spectra: tuple[Spectrum, ...]

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict."""
        return asdict(self)


def gather(sources: tuple[Source, Source], one: Pairs, other: Pairs, equal: Collection[str]) -> Evidence:
    """The evidence on two opened adapters; ``equal`` are the modules that are the same number for number."""
    spectra = []
    for module in [*one, *(m for m in other if m not in one)]:
        first = singular_values(one[module]) if module in one else None
        second = first if module in equal else singular_values(other[module]) if module in other else None
        spectra.append(Spectrum(module, first, second))
    return Evidence(_side(sources[0], one), _side(sources[1], other), tuple(spectra))


def _side(source: Source, pairs: Pairs) -> Side:
    return Side(
        path=str(source.path),
        format=detect(source).dialect.title,
        container=source.container,
        ranks=tuple(dict.fromkeys(pair.shape[1] for pair in pairs.values())),
        scales=tuple(dict.fromkeys(str(pair.scale) for pair in pairs.values())),
        dtypes=tuple(dict.fromkeys(t.dtype for pair in pairs.values() for t in (pair.down, pair.up))),
        files=_hashed(source),
    )


def _hashed(source: Source) -> tuple[HashedFile, ...]:
    """The checkpoint's files, and the settings file that its alpha may come from."""
    hashed = [_hash(file) for file in source.files]
    if source.config_path is not None:
        with InputFile(source.config_path) as settings:
            hashed.append(_hash(settings))
    return tuple(hashed)


def _hash(file: InputFile) -> HashedFile:
    digest = Digest()
    digest.update_from(file, 0, file.size)
    return HashedFile(str(file.path), file.size, digest.finish())
