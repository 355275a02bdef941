"""Which files of a DeepSpeed checkpoint belong together, told by their names: whole tensors, and each rank's parts.

Facts: microsoft/DeepSpeed ``runtime/engine.py`` and ``utils/zero_to_fp32.py``. ZeRO 1 and 2 save the weights whole, in
the training dtype, and each rank's part of their fp32 copies beside the optimizer's state; ZeRO 3 saves parts alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loraconv.errors import CorruptCheckpoint, FormatError, UsageError
from loraconv.io.sidecar import read_text
from loraconv.lazy import TensorRef
from loraconv.names import fold_names, numel, printable, quoted

_STEP = re.compile(r"global_step\d{1,12}")
_PART = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d{1,6})_mp_rank_(\d{1,3})_(model|optim)_states\.pt")
_WHOLE = re.compile(r"mp_rank_\d{1,3}_model_states\.pt")


@dataclass(frozen=True, slots=True)
class ZeroStep:
    """The files of one step. ``models`` has one file a rank (ZeRO 3), or one for all (``whole``, ZeRO 1 and 2);
    ``optimizers`` has one a rank."""

    folder: Path
    models: tuple[Path, ...]
    optimizers: tuple[Path, ...]
    whole: bool
    notices: tuple[str, ...] = ()


def find_step(path: Path) -> ZeroStep | None:
    """The ZeRO files in ``path``, or in the step that its ``latest`` names; None where there are none, or where several
    model-parallel ranks have whole tensors besides.

    Raises :class:`FormatError` (``rank-missing``, ``zero-shards``: a kind of file missing, model-parallel parts),
    :class:`CorruptCheckpoint` (``rank-duplicate``, ``rank-mixed``), :class:`UsageError` (``iteration-ambiguous``).
    """
    if _parts(path):
        return _of_folder(path)
    steps = [p for name in _names(path) if _STEP.fullmatch(name) and _parts(p := path / name)]
    if not steps:
        return None
    named = path / read_text(path / "latest").strip() if (path / "latest").is_file() else None
    if named in steps:
        return _of_folder(named)
    if len(steps) > 1:
        raise UsageError(
            f"{printable(str(path))} has several steps, and no file 'latest' says which",
            why=f"found {', '.join(sorted(step.name for step in steps))}",
            hint=f"pass one of them: {quoted(steps[-1])}",
            slug="iteration-ambiguous",
        )
    step = _of_folder(steps[0])
    told = f"no 'latest' file; the only step, {steps[0].name}, was taken"
    return None if step is None else replace(step, notices=(told,))


def beside(folder: Path) -> str:
    """What to say about fp32 parts beside files of whole tensors; empty if there are none."""
    if not any(kind == "optim" for _, _, kind, _ in _parts(folder)):
        return ""
    one = sum(_WHOLE.fullmatch(name) is not None for name in _names(folder)) == 1
    return (
        "these are the weights in the training dtype; their fp32 copies are in the optimizer's files beside them"
        f" ({f'pass the folder for those: {quoted(folder)}' if one else 'not read: several model-parallel ranks'})"
    )


def refuse_parts_of(root: Mapping[Any, Any], state: Mapping[Any, Any], file: Path) -> None:
    """Raise :class:`FormatError` for a file of one rank's parts: an optimizer's, or the empty tensors of ZeRO 3."""
    optimizer = root.get("optimizer_state_dict")
    if isinstance(optimizer, dict) and "partition_count" in optimizer:
        raise _in_parts(file, "it holds one rank's part of an optimizer's state")
    groups = root.get("param_shapes")
    shapes = [group for group in groups if isinstance(group, dict)] if isinstance(groups, list) else []
    empty = [str(name) for group in shapes for name, shape in group.items() if _is_empty(state.get(name), shape)]
    if empty:
        raise _in_parts(file, f"ZeRO 3 left {len(empty)} tensors empty: {'; '.join(fold_names(empty)[:2])}")


def _is_empty(tensor: Any, shape: Any) -> bool:
    known = isinstance(shape, tuple) and all(type(size) is int and size >= 0 for size in shape)
    return known and isinstance(tensor, TensorRef) and not numel(tensor.shape) and numel(shape) > 0


def _in_parts(file: Path, why: str) -> FormatError:
    return FormatError(
        f"{printable(str(file))} holds parts of tensors, as DeepSpeed's ZeRO saves them",
        why=why,
        hint=f"pass the folder with the files of all ranks: loraconv inspect {quoted(file.parent)}",
        slug="zero-shards",
    )


#: Data-parallel rank, model-parallel rank, ``model`` or ``optim``, and the file's name.
_Part = tuple[int, int, str, str]


def _parts(folder: Path) -> list[_Part]:
    found = ((_PART.fullmatch(name), name) for name in _names(folder))
    return sorted((int(part[1]), int(part[2]), part[3], name) for part, name in found if part)


def _of_folder(folder: Path) -> ZeroStep | None:
    parts = _parts(folder)
    whole = sorted(name for name in _names(folder) if _WHOLE.fullmatch(name))
    models, optimizers = ([part for part in parts if part[2] == kind] for kind in ("model", "optim"))
    if any(mp for _, mp, _, _ in parts) or len(whole) > 1:
        if whole and not models:
            return None
        raise _not_all(folder, "its parts are those of several model-parallel ranks", "zero-shards")
    if models and whole:
        why = f"{whole[0]} is of ZeRO 1 or 2, {models[0][3]} of ZeRO 3"
        raise CorruptCheckpoint(
            f"{printable(str(folder))} holds files of two runs",
            why=why,
            hint="move the files that do not belong to this run away",
            slug="rank-mixed",
        )
    if not optimizers:
        raise _not_all(folder, "the fp32 weights are in the files *_optim_states.pt, and it has none", "zero-shards")
    if not (models or whole):
        raise _not_all(folder, "the names are in the files *_model_states.pt, and it has none", "zero-shards")
    ranks = 1 + max(rank for rank, _, _, _ in parts)
    files = tuple(folder / name for name in whole) or _in_order(folder, models, ranks)
    return ZeroStep(folder, files, _in_order(folder, optimizers, ranks), bool(whole))


def _in_order(folder: Path, parts: list[_Part], ranks: int) -> tuple[Path, ...]:
    """One file a rank; raises where a rank has none or two."""
    found = [rank for rank, _, _, _ in parts]
    if len(set(found)) < len(found):
        raise CorruptCheckpoint(
            f"{printable(str(folder))} holds one rank twice",
            why=", ".join(printable(name) for rank, _, _, name in parts if found.count(rank) > 1),
            hint="move the files that do not belong to this run away",
            slug="rank-duplicate",
        )
    refuse_missing(folder, f"*_{parts[0][2]}_states.pt", found, ranks)
    return tuple(folder / name for _, _, _, name in parts)


def refuse_missing(folder: Path, what: str, found: list[int], ranks: int) -> None:
    """Raise :class:`FormatError` (``rank-missing``) unless ``found`` has every rank below ``ranks``."""
    missing = sorted(set(range(ranks)) - set(found))
    if missing:
        shown = ", ".join(map(str, missing[:8]))
        raise _not_all(folder, f"rank {shown} of {ranks} has no file {what}", "rank-missing")


def _not_all(folder: Path, why: str, slug: str) -> FormatError:
    whole = folder / "mp_rank_00_model_states.pt"
    other = f", or take the weights in the training dtype: loraconv inspect {quoted(whole)}" if whole.is_file() else ""
    return FormatError(
        f"{printable(str(folder))} holds parts of tensors, and not all of them",
        why=why,
        hint=f"copy the files of all ranks of the step into the same folder{other}",
        slug=slug,
    )


def _names(folder: Path) -> list[str]:
    try:
        return [p.name for p in folder.iterdir()] if folder.is_dir() else []
    except OSError as error:
        raise UsageError(f"cannot list {printable(str(folder))}", why=str(error), slug="unreadable") from None
