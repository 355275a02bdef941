"""What DeepSpeed's ZeRO leaves in a checkpoint folder, told by names and content: which files hold whole tensors, which
hold a rank's parts of them, and how to get whole ones.

Facts: microsoft/DeepSpeed ``runtime/engine.py`` and ``utils/zero_to_fp32.py``. ZeRO 1 and 2 save the weights whole, in
the training dtype, and each rank's part of their fp32 copies beside the optimizer's state; ZeRO 3 saves parts alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loraconv.errors import FormatError, UsageError
from loraconv.lazy import TensorRef
from loraconv.names import fold_names, numel, printable, quoted

_STEP = re.compile(r"global_step\d{1,12}")
_OPTIMIZER = re.compile(r"(?:bf16_)?zero_pp_rank_\d+_mp_rank_\d+_optim_states\.pt")
_PARTS = re.compile(r"zero_pp_rank_\d+_mp_rank_\d+_model_states\.pt")
_WHOLE = re.compile(r"mp_rank_\d+_model_states\.pt")


def refuse_shard_folder(path: Path) -> None:
    """Raise :class:`FormatError` for a folder of ZeRO shards without one file of whole tensors, or with such a folder
    in it."""
    steps = [path] if _fits(path, _OPTIMIZER) or _fits(path, _PARTS) else _steps(path)
    if not steps:
        return
    step = steps[-1]
    if _fits(step, _WHOLE):
        raise FormatError(
            f"{printable(str(path))} is a DeepSpeed checkpoint, whose tensors are in {printable(step.name)}",
            why="ZeRO 1 and 2 save them whole, in the training dtype; the fp32 copies are in parts",
            hint=f"loraconv inspect {quoted(step)}, or merge the fp32 parts first: {_merge(step.parent)}",
            slug="zero-shards",
        )
    parts = _fits(step, _PARTS) or _fits(step, _OPTIMIZER)
    raise _in_parts(step, f"{len(parts)} files such as {printable(parts[0])}" if parts else "it is empty")


def beside(folder: Path) -> str:
    """What to say about fp32 parts beside files of whole tensors; empty if there are none."""
    parts = _fits(folder, _OPTIMIZER)
    if not parts:
        return ""
    return (
        "these are the weights in the training dtype; their fp32 copies are in parts in the optimizer's files beside"
        f" them ({_merge(folder.parent)} would merge those)"
    )


def refuse_parts_of(root: Mapping[Any, Any], state: Mapping[Any, Any], file: Path) -> None:
    """Raise :class:`FormatError` for a file of one rank's parts: an optimizer's, or the empty tensors of ZeRO 3."""
    optimizer = root.get("optimizer_state_dict")
    if isinstance(optimizer, dict) and "zero_stage" in optimizer:
        raise _in_parts(file, f"it holds one rank's part of an optimizer's state, of ZeRO {optimizer['zero_stage']!r}")
    groups = root.get("param_shapes")
    shapes = [group for group in groups if isinstance(group, dict)] if isinstance(groups, list) else []
    empty = [str(name) for group in shapes for name, shape in group.items() if _is_empty(state.get(name), shape)]
    if empty:
        raise _in_parts(file, f"ZeRO 3 left {len(empty)} tensors empty: {'; '.join(fold_names(empty)[:2])}")


def _is_empty(tensor: Any, shape: Any) -> bool:
    known = isinstance(shape, tuple) and all(type(size) is int and size >= 0 for size in shape)
    return known and isinstance(tensor, TensorRef) and not numel(tensor.shape) and numel(shape) > 0


def _in_parts(place: Path, why: str) -> FormatError:
    step = place if place.is_dir() else place.parent
    return FormatError(
        f"{printable(str(place))} holds parts of tensors, as DeepSpeed's ZeRO saves them",
        why=why,
        hint=f"merge them first with the script that DeepSpeed put there: {_merge(step.parent)}",
        slug="zero-shards",
    )


def _merge(run: Path) -> str:
    return f"python {quoted(run / 'zero_to_fp32.py')} {quoted(run)} OUT"


def _fits(folder: Path, names: re.Pattern[str]) -> list[str]:
    return sorted(name for name in _names(folder) if names.fullmatch(name))


def _steps(path: Path) -> list[Path]:
    names = sorted((n for n in _names(path) if _STEP.fullmatch(n)), key=lambda n: int(n.removeprefix("global_step")))
    return [path / name for name in names if (path / name).is_dir()]


def _names(folder: Path) -> list[str]:
    try:
        return [p.name for p in folder.iterdir()]
    except OSError as error:
        raise UsageError(f"cannot list {printable(str(folder))}", why=str(error), slug="unreadable") from None
