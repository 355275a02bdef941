"""Re-read what was written, with readers that share nothing with the writers, and prove it against the source."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

from loraconv.errors import LoraconvError, ProofFailed
from loraconv.io.input_file import InputFile
from loraconv.io.safetensors_read import read_safetensors
from loraconv.io.torch_read import read_torch, sniff
from loraconv.lazy import TensorRef
from loraconv.names import printable
from loraconv.verifier.adapter import prove_adapter
from loraconv.verifier.aside import SetAside, check_aside
from loraconv.verifier.base import prove_base
from loraconv.verifier.dtypes import expected_dtypes
from loraconv.verifier.loadable import SETTINGS_FILES, adapter_file, check_base_files, check_torch, check_written
from loraconv.verifier.numbers import Expectation, Pair, Tensor
from loraconv.verifier.oracles import ORACLES, pairs_of, yaml_settings
from loraconv.verifier.origin import check_origin, record, recorded_dtypes, source_record
from loraconv.verifier.proof import Check, Proof
from loraconv.verifier.spelled import apart, check_magnitudes


class Checkpoint(Protocol):
    """The source as the verifier needs it: raw tensors by name for each rank, header, settings."""

    ranks: list[dict[str, TensorRef]]
    metadata: dict[str, str]
    config: dict[str, Any] | None


def prove_written(
    folder: Path,
    *,
    kind: str,
    files: Sequence[str],
    source_kind: str,
    source: Checkpoint,
    settings_file: str = "",
    alpha: Fraction | None = None,
    every_consumer: bool = False,
    aside: SetAside | None = None,
    dtype: str | None = None,
    opener: Callable[[Path], InputFile] = InputFile,
) -> Proof:
    """The proof of the output of format ``kind`` (the name of a dialect, or ``base``) in ``folder``.

    ``alpha`` and ``dtype`` are the user's own, if any. ``every_consumer`` demands that the strength is the same where
    the header is not read. ``aside`` are the keys of the source that are no part of the adapter, by the user's wish.
    ``settings_file`` is the settings file of a format that is not loraconv's own. ``opener``
    opens the weights of a base, which may still be being written.

    Raises :class:`ProofFailed` where the output cannot be read or compared at all, :class:`FormatError` where no oracle
    knows the format. Errors about the source are passed on.
    """
    with as_failure(folder), ExitStack() as stack:
        if kind == "base":
            check_base_files(folder, files)
            opened = {name: stack.enter_context(opener(folder / name)) for name in files}
            return _prove_base(folder, opened, source, dtype)
        aside = aside or SetAside()
        written = read_adapter_files(folder, kind, files, settings_file, stack, aside.kept)
        ranks: list[Mapping[str, TensorRef]] = [aside.rest(tensors) for tensors in source.ranks]
        magnitudes = dict[str, Tensor]()
        if source_kind != "sat":
            ranks[0], magnitudes = apart(ranks[0])
        pairs = pairs_of(source_kind, ranks, source.metadata, source.config, alpha)
        earlier = source_record(source.metadata, source.config)
        dtypes = expected_dtypes(pairs, written.pairs, dtype, recorded_dtypes(earlier))
        proof = prove_adapter(Expectation(pairs, dtypes), written.pairs, scale_ignored=every_consumer)
        if magnitudes or written.magnitudes:
            proof = replace(proof, checks=(*proof.checks, check_magnitudes(magnitudes, written.magnitudes)))
        proof = replace(proof, checks=(*proof.checks, *check_aside(aside, source.ranks[0], written.kept)))
        if source_kind != "sat" or kind not in ORACLES:
            return proof
        told = record(written.metadata, written.settings)
        return replace(proof, checks=(*proof.checks, *_origin(kind, pairs, told, earlier)))


@dataclass(frozen=True, slots=True)
class Written:
    """An adapter that was written: what the format says that it is, its magnitudes by module if it is a DoRA, its
    header, its settings file, and the tensors in its file that are no part of it."""

    pairs: Mapping[str, Pair]
    magnitudes: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    settings: Mapping[str, Any] | None
    kept: Mapping[str, TensorRef]


def read_adapter_files(
    folder: Path, kind: str, files: Sequence[str], settings_file: str, stack: ExitStack, kept: Collection[str] = ()
) -> Written:
    """The adapter of format ``kind`` that was written into ``folder``; ``stack`` closes its file. ``kept`` are the
    names in it that are no part of the adapter.

    Raises :class:`ProofFailed` where a consumer would not load it, and whatever a file that cannot be read raises:
    call it inside of :func:`as_failure`.
    """
    name = adapter_file(kind, folder, files)
    file = stack.enter_context(InputFile(folder / name))
    tensors, metadata = _safetensors(file) if _is_safetensors(file, kind) else _torch(file, kind)
    beside = {name: tensors.pop(name) for name in kept if name in tensors}
    settings = _settings(folder, SETTINGS_FILES.get(kind, "" if kind in ORACLES else settings_file))
    plain, magnitudes = apart(tensors) if kind != "sat" else (tensors, {})
    if kind in ORACLES:
        check_written(kind, plain, metadata, settings, dora=bool(magnitudes))
    return Written(pairs_of(kind, [plain], metadata, settings, None), magnitudes, metadata, settings, beside)


def _origin(
    kind: str, pairs: Mapping[str, Pair], written: Mapping[str, Any] | None, earlier: Mapping[str, Any]
) -> list[Check]:
    """SAT's own settings have room for alpha and rank, so that a record beside them may be missing."""
    if written is None and kind == "sat":
        return []
    return [check_origin(pairs, written or {}, earlier)]


@contextmanager
def as_failure(folder: Path) -> Iterator[None]:
    """Whatever goes wrong with the output is a failed proof; an error about the source stays what it is."""
    try:
        yield
    except ProofFailed:
        raise
    except LoraconvError as error:
        if printable(str(folder), 1000) not in str(error):
            raise
        raise _unreadable(error.what, error.why) from error
    except MemoryError:
        raise
    except Exception as error:
        # Above all what a wrong output makes of json, yaml, regular expressions and look-ups: a key that is missing, a
        # list where there should be a mapping.
        raise _unreadable(f"{type(error).__name__}: {error}", "") from error


def _unreadable(what: str, why: str) -> ProofFailed:
    return ProofFailed(
        "the written output cannot be read again, or not be compared with its source",
        why=printable(f"{what}; {why}" if why else what, 400),
        hint="please report this, with the output of loraconv inspect on the source",
    )


def _prove_base(folder: Path, opened: Mapping[str, InputFile], source: Checkpoint, dtype: str | None) -> Proof:
    shards = {name: _safetensors(file)[0] for name, file in opened.items()}
    _check_index(folder, shards)
    tensors = {n: t for shard in shards.values() for n, t in shard.items()}
    return prove_base(list(source.ranks), source.config, tensors, _json(folder / "config.json"), dtype)


def _check_index(folder: Path, shards: Mapping[str, Mapping[str, TensorRef]]) -> None:
    """Every tensor is in one shard, and the index says which; a single file has no index."""
    total = sum(len(tensors) for tensors in shards.values())
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    if len(shards) == 1 and not index.exists():
        return
    told = _json(index)["weight_map"]
    found = {name: file for file, tensors in shards.items() for name in tensors}
    if told != found or len(found) != total:
        raise ProofFailed(
            "the index of the shards does not say where the tensors are",
            hint="please report this, with the output of loraconv inspect on the source",
        )


def _json(path: Path) -> dict[str, Any]:
    value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise TypeError(f"{path.name} holds {type(value).__name__}, not a mapping")
    return value


def _is_safetensors(file: InputFile, kind: str) -> bool:
    """By the name in loraconv's own formats, by the content in others."""
    return file.path.suffix == ".safetensors" if kind in ORACLES else sniff(file) == "safetensors"


def _safetensors(file: InputFile) -> tuple[dict[str, TensorRef], dict[str, str]]:
    """Our own reading of the header, which the format's reference library has to agree with."""
    import safetensors

    ours = read_safetensors(file)
    with safetensors.safe_open(str(file.path), framework="numpy") as theirs:
        names = {name: tuple(theirs.get_slice(name).get_shape()) for name in theirs.keys()}  # noqa: SIM118 (no dict)
        same = names == {n: t.shape for n, t in ours.tensors.items()} and (theirs.metadata() or {}) == ours.metadata
    if not same:
        raise ProofFailed(
            "the written header reads differently in the safetensors library",
            hint="please report this, with the output of loraconv inspect on the source",
        )
    return ours.tensors, ours.metadata


def _torch(file: InputFile, kind: str) -> tuple[dict[str, TensorRef], dict[str, str]]:
    root = read_torch(file)
    if not isinstance(root, dict):
        raise TypeError(f"{file.path.name} holds {type(root).__name__}, not a mapping")
    if kind in ORACLES:
        check_torch(root)
    return {name: ref for name, ref in root["module"].items() if isinstance(ref, TensorRef)}, {}


def _settings(folder: Path, name: str) -> dict[str, Any] | None:
    """The settings file that was written beside the weights, JSON or YAML by its name; None where there is none."""
    path = folder / name
    if not name or (name not in SETTINGS_FILES.values() and not path.exists()):
        return None
    return _json(path) if path.suffix == ".json" else yaml_settings(path.read_text(encoding="utf-8"))
