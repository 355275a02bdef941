"""Deliberate mistakes in a fused model. A proof is only worth something if each of them, made in a block, fails it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from loraconv.lazy import TensorRef
from loraconv.names import DTYPE_BYTES, numel
from loraconv.verifier.fused.case import Case, Part, Tensors, check_names, delta_of
from loraconv.verifier.fused.figures import rounded, truncated
from loraconv.verifier.fused.rounding import Delta, compare_block, is_rounded, numbers, row_blocks
from loraconv.verifier.numbers import coarse, same_bytes
from loraconv.verifier.partners import in_layer, other_projections
from loraconv.verifier.proof import Control

if TYPE_CHECKING:
    from loraconv.verifier.numbers import Array


def fused_controls(case: Case, touched: Mapping[str, str], untouched: Sequence[str]) -> tuple[Control, ...]:
    """Make each mistake in a copy of the first rows of one touched tensor, or of one untouched, and check it."""
    import numpy as np

    made = []
    if touched:
        name = next((n for n in touched if case.delta(touched[n]).moves), next(iter(touched)))
        block = Block(case, name, touched[name])
        with np.errstate(over="ignore", invalid="ignore"):  # an adapter may hold what is infinite when doubled
            made = [_numbers_control(block, what, spoilt) for what, spoilt in _wrong_numbers(block)]
        made += _structure_controls(case, name)
    return (*made, *_byte_controls(case, untouched))


class Block:
    """The first rows of a touched tensor: base, delta and the right numbers, in float64."""

    def __init__(self, case: Case, name: str, module: str) -> None:
        self.case, self.name, self.module = case, name, module
        self.dtype = case.fused[name].dtype
        _, self.stop = next(row_blocks(case.fused[name]), (0, 0))
        self.delta, self.shape = case.delta(module), case.fused[name].shape
        self.base = numbers(case.base[name].rows(0, self.stop), "F64")
        self.right = rounded(self.base + self.rows(self.delta), self.dtype)

    def rows(self, delta: Delta) -> Array:
        return delta.rows(0, self.stop)

    def sum(self, parts: Sequence[Part]) -> Array:
        """What fusing other parts would store."""
        added = self.rows(delta_of(parts)) if parts else 0.0
        return rounded(self.base + added, self.dtype)

    def accepts(self, stored: Array) -> bool:
        work = numbers(self.case.base[self.name].rows(0, self.stop), self.dtype)
        return self.case.accepts(compare_block(work, stored.astype(work.dtype), self.delta, 0, self.dtype))


def _numbers_control(block: Block, what: str, spoilt: Array | None) -> Control:
    import numpy as np

    if spoilt is None:
        return Control(what, None, "this adapter has no place for it")
    if np.array_equal(spoilt, block.right, equal_nan=True):
        return Control(what, None, "it changes no number here")
    caught = not block.accepts(spoilt)
    return Control(what, caught, "L2" if caught else "")


def _wrong_numbers(block: Block) -> Iterator[tuple[str, Array | None]]:
    case, parts = block.case, block.case.parts(block.module)
    other = _first(case, block.module, [*other_projections(block.module), *case.modules])
    later = _first(case, block.module, [in_layer(block.module, 1), in_layer(block.module, -1)])
    rank = max(part.rank for part in parts)
    yield "q and k swapped", None if other is None else block.sum(case.parts(other))
    yield "layers shifted by one", None if later is None else block.sum(case.parts(later))
    yield "strength doubled", block.sum([replace(p, strength=p.strength * 2) for p in parts])
    yield "scale divided by rank", block.sum([replace(p, scale=p.scale / p.rank) for p in parts]) if rank > 1 else None
    yield "up zeroed", block.sum([parts[0].zeroed, *parts[1:]])
    square = len(set(block.shape)) == 1
    yield "delta transposed", block.sum([p.turned for p in parts]) if square else None
    # Off by one unit may be a number that products in float32 gave.
    short = block.dtype in ("F16", "BF16")
    yield "cut off instead of rounded", truncated(block.base + block.rows(block.delta), block.dtype) if short else None
    yield "stored in a lower precision", coarse(block.right)
    yield "a flipped bit", _flipped(block.right)


def _first(case: Case, module: str, candidates: Iterable[str | None]) -> str | None:
    """The first candidate with a delta of the same shape."""
    shapes = case.shapes(module)
    return next((m for m in candidates if m is not None and m != module and case.shapes(m) == shapes), None)


def _flipped(right: Array) -> Array:
    """The most significant bit of one number's mantissa turned."""
    import numpy as np

    stored = right.copy()
    at = int(np.argmax(np.where(np.isfinite(stored), np.abs(stored), -1.0)))
    mantissa, exponent = np.frexp(np.abs(stored.flat[at]))
    turned = mantissa + (0.25 if mantissa < 0.75 else -0.25)
    stored.flat[at] = np.copysign(np.ldexp(turned, exponent), stored.flat[at])
    return stored


def _structure_controls(case: Case, name: str) -> Iterator[Control]:
    """Mistakes that the list of tensors shows."""
    ref = case.fused[name]
    others = {n: r for n, r in case.fused.items() if n != name}
    yield _caught("a module dropped", not check_names(case.base, others, case.dtype).passed, "L0")
    if len(set(ref.shape)) > 1:
        turned = {**case.fused, name: replace(ref, shape=ref.shape[::-1])}
        yield _caught("a weight transposed", not check_names(case.base, turned, case.dtype).passed, "L0")


def _byte_controls(case: Case, untouched: Sequence[str]) -> Iterator[Control]:
    kept = [n for n in untouched if case.base[n].dtype == case.fused[n].dtype and numel(case.base[n].shape)]
    what = "an untouched tensor changed"
    if not kept:
        yield Control(what, None, "there is none that keeps its bytes")
        return
    smallest = min(kept, key=lambda n: numel(case.base[n].shape) * DTYPE_BYTES[case.base[n].dtype])
    yield _caught(what, not same_bytes(case.base[smallest], OneBit(case.fused[smallest])), "L1")


def beside_controls(case: Case, base: Tensors, beside: Tensors) -> Iterator[Control]:
    """Mistakes with what was trained whole: one of these tensors forgotten, the base's own left in its place."""
    added = next((name for name in beside if name not in base), None)
    if added is not None:
        others = {n: r for n, r in case.fused.items() if n != added}
        yield _caught("a tensor of the run left out", not check_names(case.base, others, case.dtype).passed, "L0")
    replaced = next((n for n in beside if n in base and not same_bytes(base[n], beside[n])), None)
    if replaced is not None:
        what, own = "the base's own tensor in place of the run's", base[replaced]
        alike = check_names(case.base, {**case.fused, replaced: own}, case.dtype).passed
        yield _caught(what, not (alike and is_rounded(case.base[replaced], own)), "L1" if alike else "L0")


@dataclass(frozen=True, slots=True)
class OneBit:
    """A tensor whose first bit is turned."""

    source: TensorRef

    @property
    def dtype(self) -> str:
        return self.source.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    def pieces(self) -> Iterator[bytes]:
        pieces = self.source.pieces()
        first = next(pieces)
        yield bytes([first[0] ^ 1]) + first[1:]
        yield from pieces

    def leaves(self) -> Iterator[TensorRef]:
        yield self.source


def _caught(what: str, caught: bool, by: str) -> Control:
    return Control(what, caught, by if caught else "")
