"""Two states of one checkpoint, tensor by tensor: which are the same bytes, and how far the others have moved.

Both are read in pieces, so that memory does not grow with them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from loraconv.lazy import TensorRef, decode, encode
from loraconv.names import DTYPE_BYTES, FLOAT_DTYPES, numel
from loraconv.verifier.changes.renames import match_content, match_names
from loraconv.verifier.numbers import same_bytes

if TYPE_CHECKING:
    from loraconv.verifier.numbers import Array

Tensors = Mapping[str, TensorRef]
Kind = Literal["identical", "renamed", "retyped", "changed", "reshaped", "missing", "new"]

#: Elements that are compared at a time.
_CHUNK = 1 << 16
_INTEGERS = {"BOOL": "u1", "U8": "u1", "I8": "i1", "U16": "<u2", "I16": "<i2", "U32": "<u4", "I32": "<i4",
             "U64": "<u8", "I64": "<i8"}  # fmt: skip
_FACTOR = re.compile(
    r"(?:^|\.)(?:matrix_[AB]\.\d+|lora_(?:A|B|down|up|mid|embedding_A|embedding_B|magnitude_vector)|dora_scale)(?=\.|$)"
)
_UP = re.compile(r"\.(?:matrix_B\.\d+|lora_(?:B|up))(?=\.|$)")


@dataclass(frozen=True, slots=True)
class Figures:
    """How far a tensor moved. ``relative`` is ``|| after - before ||_F / || before ||_F``, infinite where that divides
    by zero; ``greatest`` the greatest absolute difference; both over the elements that are finite before and after.

    ``changed`` of ``count`` elements have another value; ``nonfinite`` became NaN or Inf; ``rounded`` is the dtype to
    which rounding ``before`` once gives exactly ``after``, empty if there is none.
    """

    relative: float
    greatest: float
    changed: int
    count: int
    nonfinite: int
    rounded: str


@dataclass(frozen=True, slots=True)
class Change:
    """What became of a tensor. ``name`` is the name before (of a new one: after), ``other`` that after if it differs.

    ``renamed``: the same bytes under another name. ``retyped``: in another dtype the same values, or those before
    rounded once to it. The other kinds say nothing about the name. ``before`` and ``after`` are ``(dtype, shape)``.
    ``figures`` is None where the two have no numbers to compare one by one; ``rank`` is the model-parallel rank.
    """

    kind: Kind
    name: str
    other: str = ""
    rank: int = 0
    before: tuple[str, tuple[int, ...]] | None = None
    after: tuple[str, tuple[int, ...]] | None = None
    figures: Figures | None = None

    @property
    def is_factor(self) -> bool:
        """True for a tensor of a LoRA, by its name."""
        return is_factor(self.name)


def is_factor(name: str) -> bool:
    """True for the name of a LoRA factor, or of a DoRA magnitude, in any spelling."""
    return _FACTOR.search(name) is not None


def is_up(name: str) -> bool:
    """True for the name of an up factor, which is zero until it is trained."""
    return _UP.search(name) is not None


def compare_states(before: Tensors, after: Tensors, rank: int = 0) -> list[Change]:
    """What became of every tensor of ``before`` and where every one of ``after`` came from."""
    matched = match_names(before, after)
    lost = {name: ref for name, ref in before.items() if name not in matched}
    taken = set(matched.values())
    found = match_content(lost, {name: ref for name, ref in after.items() if name not in taken})
    matched |= found
    with ThreadPoolExecutor(2) as pool:  # reading is most of it, and lets other threads run
        kept = [name for name in before if name in matched]
        changes = list(pool.map(lambda n: _compared(before[n], after[matched[n]], n, matched[n], rank), kept))
    missing = [Change("missing", n, rank=rank, before=_form(before[n])) for n in before if n not in matched]
    taken = set(matched.values())
    new = [Change("new", n, rank=rank, after=_form(after[n])) for n in after if n not in taken]
    return [*changes, *missing, *new]


def _form(ref: TensorRef) -> tuple[str, tuple[int, ...]]:
    return ref.dtype, ref.shape


def _compared(one: TensorRef, two: TensorRef, name: str, new_name: str, rank: int) -> Change:
    other = new_name if new_name != name else ""

    def made(kind: Kind, figures: Figures | None = None) -> Change:
        return Change(kind, name, other, rank, _form(one), _form(two), figures)

    if one.shape != two.shape:
        return made("reshaped", measure(one, two) if numel(one.shape) == numel(two.shape) else None)
    if same_bytes(one, two):
        return made("renamed" if other else "identical")
    figures = measure(one, two)
    if one.dtype == two.dtype:
        return made("changed", figures)
    cast = figures is not None and (not figures.changed or figures.rounded == two.dtype)
    return made("retyped" if cast else "changed", figures)


def measure(one: TensorRef, two: TensorRef) -> Figures | None:
    """The figures of two tensors of one size, in row-major order; None for dtypes without numbers to subtract."""
    import numpy as np

    if not {*FLOAT_DTYPES, *_INTEGERS}.issuperset((one.dtype, two.dtype)):
        return None
    rounded = [d for d in dict.fromkeys((two.dtype, "BF16", "F16")) if d in FLOAT_DTYPES]
    square = size = greatest = 0.0
    changed = nonfinite = 0
    for first, second in zip(elements(one), elements(two), strict=True):
        finite = np.isfinite(first) & np.isfinite(second)
        with np.errstate(invalid="ignore"):
            gap = np.where(finite, second - first, 0.0)
            changed += int(np.sum((first != second) & ~(np.isnan(first) & np.isnan(second))))
        nonfinite += int(np.sum(np.isfinite(first) & ~np.isfinite(second)))
        square += float(gap @ gap)
        size += float(np.sum(np.square(np.where(finite, first, 0.0))))
        greatest = max(greatest, float(np.max(np.abs(gap), initial=0.0)))
        rounded = [d for d in rounded if np.array_equal(decode(encode(first, d), d), second, equal_nan=True)]
    relative = (square / size) ** 0.5 if size else (float("inf") if square else 0.0)
    return Figures(relative, greatest, changed, numel(one.shape), nonfinite, (rounded or [""])[0] if changed else "")


def elements(ref: TensorRef, count: int = _CHUNK) -> Iterator[Array]:
    """The values of a tensor in row-major order as float64, ``count`` at a time."""
    step, held = count * DTYPE_BYTES[ref.dtype], b""
    for piece in ref.pieces():
        held += piece
        whole = len(held) - len(held) % step
        for at in range(0, whole, step):
            yield _numbers(held[at : at + step], ref.dtype)
        held = held[whole:]
    if held:
        yield _numbers(held, ref.dtype)


def _numbers(raw: bytes, dtype: str) -> Array:
    import numpy as np

    return decode(raw, dtype) if dtype in FLOAT_DTYPES else np.frombuffer(raw, _INTEGERS[dtype]).astype(np.float64)
