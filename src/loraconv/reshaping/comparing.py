"""Two models of one architecture, tensor by tensor: which differ, and which of those a LoRA can hold. Streamed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from loraconv.adapter import natural
from loraconv.errors import CorruptCheckpoint, FormatError
from loraconv.lazy import TensorRef, decode, read
from loraconv.model_folder import Model
from loraconv.names import FLOAT_DTYPES, fold_names, numel, printable, quoted

if TYPE_CHECKING:
    import numpy as np

#: Elements that are compared in one go.
_BLOCK = 1 << 18
#: The last step of the name of an embedding, whose weight is a table of rows and no linear map.
_EMBEDDING = re.compile(r".*embeddings?|embed_tokens|shared|wpe|wte")


@dataclass(frozen=True, slots=True)
class Changes:
    """The tensors that differ: modules with a linear ``weight``, and the names of all ``other`` tensors."""

    modules: tuple[str, ...]
    other: tuple[str, ...]


def changes(tuned: Model, base: Model) -> Changes:
    """Compare every tensor by its numbers; raises :class:`FormatError` (``base-mismatch``) where names or shapes are
    not the same."""
    _refuse_other_models(tuned, base)
    names = sorted(base.tensors, key=natural)
    changed = [name for name in names if not _same(tuned.tensors[name], base.tensors[name])]
    linear = [name for name in changed if _is_linear(name, tuned.tensors[name], base.tensors[name])]
    held = set(linear)
    return Changes(tuple(n.removesuffix(".weight") for n in linear), tuple(n for n in changed if n not in held))


def delta_of(tuned: Model, base: Model, module: str) -> np.ndarray[Any, Any]:
    """What the fine-tune added to the weight of a module, (out, in), in float64.

    Raises :class:`CorruptCheckpoint` (``nonfinite``).
    """
    import numpy as np

    name = f"{module}.weight"
    delta = read(tuned.tensors[name])
    delta -= read(base.tensors[name])
    if not np.isfinite(delta).all():
        raise CorruptCheckpoint(
            f"a weight holds NaN or Inf: {printable(name)}",
            where=f"{printable(str(tuned.path), 500)} or {printable(str(base.path), 500)}",
            why="the training diverged, or a file is damaged",
            hint="use an earlier checkpoint of the fine-tune",
            slug="nonfinite",
        )
    return delta


def _refuse_other_models(tuned: Model, base: Model) -> None:
    shared = set(tuned.tensors) & set(base.tensors)
    apart = set(tuned.tensors) ^ set(base.tensors)
    shapes = {n for n in shared if tuned.tensors[n].shape != base.tensors[n].shape}
    if apart or shapes:
        raise FormatError(
            f"the two are not one model before and after: {len(apart | shapes)} tensors do not fit",
            where="; ".join(fold_names(sorted(apart | shapes, key=natural))[:4]),
            why=f"{len(apart)} are in one of them only, {len(shapes)} have another shape",
            hint=f"pass the model that the fine-tune was started from; this one is {quoted(base.path)}",
            slug="base-mismatch",
        )


def _is_linear(name: str, tuned: TensorRef, base: TensorRef) -> bool:
    module, _, kind = name.rpartition(".")
    floating = tuned.dtype in FLOAT_DTYPES and base.dtype in FLOAT_DTYPES
    return kind == "weight" and floating and len(base.shape) == 2 and not _is_embedding(module)


def _is_embedding(module: str) -> bool:
    return _EMBEDDING.fullmatch(module.rpartition(".")[2]) is not None


def _same(one: TensorRef, other: TensorRef) -> bool:
    return all(_equal(left, right) for left, right in zip(_blocks(one), _blocks(other), strict=True))


def _blocks(ref: TensorRef) -> Iterator[TensorRef]:
    flat = replace(ref, shape=(numel(ref.shape),))
    for start in range(0, flat.shape[0], _BLOCK):
        yield flat.rows(start, min(start + _BLOCK, flat.shape[0]))


def _equal(one: TensorRef, other: TensorRef) -> bool:
    """The same bytes of one dtype, or the same numbers: zero has two signs, and a dtype can be wider."""
    first, second = (b"".join(block.pieces()) for block in (one, other))
    if one.dtype == other.dtype and first == second:
        return True
    if {one.dtype, other.dtype} - set(FLOAT_DTYPES):
        return False
    return bool((decode(first, one.dtype) == decode(second, other.dtype)).all())
