"""Modules that are more than a pair of factors, told by the tensors that they have: LoHa, LoKr, Tucker, full, DoRA.

Every kind is a row of a table; a module has exactly one kind, or its tensors are refused. Definitions:
KohakuBlueleaf/LyCORIS ``lycoris/modules``, huggingface/peft ``tuners/lora``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from math import prod

from loraconv.detect import Detected, factor_key, norm_key
from loraconv.errors import CorruptCheckpoint, FormatError
from loraconv.lazy import Joined, Lazy, TensorRef
from loraconv.names import FLOAT_DTYPES, fold_names, printable
from loraconv.rules import fill
from loraconv.scale import tuner_scale
from loraconv.source import Source

_LOHA = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}
_KRON_1, _KRON_2 = ({"lokr_w1"}, {"lokr_w1_a", "lokr_w1_b"}), ({"lokr_w2"}, {"lokr_w2_a", "lokr_w2_b"})

#: Kind -> the sets of sides that a module of this kind may consist of, besides those in ``_BESIDE``.
KINDS: Mapping[str, tuple[frozenset[str], ...]] = {
    "LoRA": (frozenset({"down", "up"}),),
    "LoRA with a Tucker core": (frozenset({"down", "up", "mid"}),),
    "LoHa": (frozenset(_LOHA),),
    "LoHa with Tucker cores": (frozenset(_LOHA | {"hada_t1", "hada_t2"}),),
    "LoKr": tuple(frozenset(one | two) for one in _KRON_1 for two in _KRON_2),
    "LoKr with a Tucker core": tuple(frozenset(one | _KRON_2[1] | {"lokr_t2"}) for one in _KRON_1),
    "full": (frozenset({"diff"}),),
    "norm": (frozenset({"w_norm"}), frozenset({"w_norm", "b_norm"})),
    "whole norm": (frozenset({"norm"}),),
    "bias": (frozenset(),),
}
#: Kind -> side -> its dimensions, of which those of one letter are equal; behind them ``*`` is the kernel of a
#: convolution, or nothing, and ``1`` are ones. ``o`` are the rows of the weight, in a LoKr ``p`` times ``s``.
_SHAPES: Mapping[str, Mapping[str, str]] = {
    "LoRA": {"down": "ri*", "up": "or1"},
    "LoRA with a Tucker core": {"down": "ji1", "mid": "rj*", "up": "or1"},
    "LoHa": {"hada_w1_a": "oa", "hada_w1_b": "an", "hada_w2_a": "ob", "hada_w2_b": "bn"},
    "LoHa with Tucker cores": {
        **{"hada_w1_a": "ao", "hada_w1_b": "cn", "hada_t1": "ac*"},
        **{"hada_w2_a": "bo", "hada_w2_b": "dn", "hada_t2": "bd*"},
    },
    "LoKr": {
        **{"lokr_w1": "pq", "lokr_w1_a": "pa", "lokr_w1_b": "aq"},
        **{"lokr_w2": "st*", "lokr_w2_a": "sb", "lokr_w2_b": "bt"},
    },
    "LoKr with a Tucker core": {
        **{"lokr_w1": "pq", "lokr_w1_a": "pa", "lokr_w1_b": "aq"},
        **{"lokr_w2_a": "bs", "lokr_w2_b": "dt", "lokr_t2": "bd*"},
    },
    "full": {"diff": "oi*"},
    "norm": {"w_norm": "o", "b_norm": "o"},
    "whole norm": {"norm": "o"},
    "bias": {},
}

_BIASES = {"diff_b", "bias"}
_BESIDE = _BIASES | {"alpha", "magnitude"}


@dataclass(frozen=True, slots=True)
class Special:
    """A module: its name in the file, the diffusers modules whose rows it has, its kind, and its tensors by side.
    ``told`` are alpha and rank where settings have them and no tensor."""

    module: str
    targets: tuple[str, ...]
    kind: str
    tensors: Mapping[str, TensorRef]
    told: tuple[Fraction, int] | None = None

    @property
    def has_magnitude(self) -> bool:
        """True for a DoRA: what the sum of weight and delta is normalised to."""
        return "magnitude" in self.tensors

    @property
    def by_column(self) -> bool:
        """True for a DoRA whose magnitudes, (1, in), are those of the weight's columns."""
        shape = self.tensors["magnitude"].shape
        return len(shape) > 1 and shape[0] == 1 < shape[1]

    @property
    def columns(self) -> int:
        """The columns of the weight of a plain pair of factors; 0 where they take a computation."""
        return self.tensors["down"].shape[1] if "down" in self.tensors else 0

    @property
    def is_dora(self) -> bool:
        """True for a plain pair of factors of a linear layer, with magnitudes or without."""
        plain = self.tensors.keys() <= {"down", "up", "alpha", "magnitude"}
        return plain and all(len(self.tensors[side].shape) == 2 for side in ("down", "up"))

    @property
    def has_vectors(self) -> bool:
        """True if it adds to a bias or to the weight of a norm, or is one."""
        return bool((_BIASES | {"w_norm", "norm"}) & self.tensors.keys())

    @property
    def is_plain(self) -> bool:
        """True for a pair of factors of a linear layer, with a bias of ``up`` or without, and for a whole norm."""
        sides = self.tensors.keys() - {"alpha", "bias"}
        return sides == {"norm"} or (sides == {"down", "up"} and not self.is_convolution)

    @property
    def is_convolution(self) -> bool:
        """True for the kernel of a convolution."""
        return any(len(ref.shape) > 2 for ref in self.tensors.values() if ref is not self.tensors.get("magnitude"))

    @property
    def kernel(self) -> tuple[int, ...]:
        """The sizes of a convolution's kernel; empty for a linear layer, and where no tensor has them."""
        sides = ("mid", "hada_t1", "lokr_t2", "lokr_w2", "diff", "down")
        return next((self.tensors[side].shape[2:] for side in sides if side in self.tensors), ())

    @property
    def can_be_approximated(self) -> bool:
        """True if a LoRA can be near to it."""
        return not (self.has_magnitude or self.has_vectors)

    @property
    def floats(self) -> list[TensorRef]:
        """Everything but alpha."""
        return [ref for side, ref in self.tensors.items() if side != "alpha"]

    @property
    def what(self) -> str:
        """The kind in words, with what stands beside it."""
        dora = "DoRA of " if self.has_magnitude else ""
        bias = " with bias" if self.kind != "bias" and _BIASES & self.tensors.keys() else ""
        return "DoRA" + bias if dora and self.kind == "LoRA" else dora + self.kind + bias


def read_specials(source: Source, detected: Detected) -> list[Special]:
    """Every module of an adapter with its tensors, plain pairs too, in the order of the file.

    Raises :class:`FormatError` (tensors of several kinds on one module) and :class:`CorruptCheckpoint` (a tensor
    missing, spelled twice or of no floating dtype).
    """
    found: dict[str, dict[str, TensorRef]] = {}
    ledger = detected.ledger
    for name in (*ledger.factors, *ledger.more, *ledger.alphas):
        key = factor_key(detected.dialect, name) or norm_key(detected.naming, name)
        assert key is not None
        sides, ref = found.setdefault(key.module, {}), source.tensors[name]
        if key.side in sides or (key.side != "alpha" and ref.dtype not in FLOAT_DTYPES):
            raise _unfit(name, "it is there twice" if key.side in sides else f"its dtype is {ref.dtype}")
        sides[key.side] = ref
    return [_special(source, detected, module, sides) for module, sides in found.items()]


def _special(source: Source, detected: Detected, module: str, sides: Mapping[str, TensorRef]) -> Special:
    kind = _kind(module, sides)
    if kind != "LoRA" or sides.keys() - {"down", "up", "alpha"} or any(len(sides[s].shape) > 2 for s in ("down", "up")):
        _check_shapes(module, kind, sides)  # others are looked at as pairs
    told = tuner_scale(source, detected, module) if kind.startswith(("LoHa", "LoKr")) else None
    return Special(module, _targets(detected, module), kind, sides, told)


def row_magnitudes(one: Special, detected: Detected) -> dict[str, Lazy]:
    """Module (diffusers name) -> the magnitudes of its rows as a vector; those of columns (one module) as they are."""
    if not one.has_magnitude:
        return {}
    tensor = one.tensors["magnitude"]
    if one.by_column:
        return dict.fromkeys(one.targets, tensor)
    return rows_of(replace(tensor, shape=(prod(tensor.shape),)), one, detected)


def rows_of(vector: TensorRef, one: Special, detected: Detected) -> dict[str, Lazy]:
    """Module (diffusers name) -> its rows of a vector with a number for each row of the module in the file."""
    found = detected.naming.find(one.module)
    assert found is not None
    pieces = found[0].pieces(vector.shape[0], one.columns)
    chunk = vector.shape[0] // sum(map(len, pieces))
    made: dict[str, Lazy] = {}
    for module, own in zip(one.targets, pieces, strict=True):
        rows = tuple(vector.rows(n * chunk, (n + 1) * chunk) for n in own)
        if rows:
            made[module] = rows[0] if len(rows) == 1 else Joined(rows, 0)
    return made


def specials_in(source: Source, detected: Detected) -> list[Special]:
    """Every module, where some are more than a pair of factors of a linear layer; else none. Raises as above."""
    factors = (source.tensors[name] for name in detected.ledger.factors)
    if detected.ledger.more or any(len(ref.shape) > 2 for ref in factors):
        return read_specials(source, detected)
    return []


def count_kinds(specials: Iterable[Special]) -> dict[str, int]:
    """The number of modules of each kind."""
    counts: dict[str, int] = {}
    for one in specials:
        counts[one.what] = counts.get(one.what, 0) + 1
    return counts


def in_words(specials: Iterable[Special]) -> str:
    """The kinds and the number of modules of each, for people."""
    return ", ".join(f"{count} {what}" for what, count in count_kinds(specials).items())


def _check_shapes(module: str, kind: str, sides: Mapping[str, TensorRef]) -> None:
    """Raise :class:`CorruptCheckpoint` where the tensors of a module do not fit together."""
    sizes: dict[str, tuple[int, ...]] = {}
    fine = all(_fits(dims, sides[side].shape, sizes) for side, dims in _SHAPES[kind].items() if side in sides)
    rows = prod(sizes.get("o") or (*sizes.get("p", ()), *sizes.get("s", ())))
    vectors = [sides[side].shape for side in _BIASES & sides.keys()]
    fine = fine and all(len(shape) == 1 and (rows == shape[0] or kind == "bias") for shape in vectors)
    if fine and "magnitude" in sides:
        shape = sides["magnitude"].shape
        fine = prod(shape) == rows or (len(shape) > 1 and shape[0] == 1 and prod(shape) > 1)
    if not fine:
        raise CorruptCheckpoint(
            f"the tensors of {printable(module)} do not fit together",
            why="; ".join(f"{side} is {list(ref.shape)}" for side, ref in sides.items() if side != "alpha"),
            hint="save the adapter again, or copy it again from where it was trained",
            slug="factor-shape",
        )


def _fits(dimensions: str, shape: tuple[int, ...], sizes: dict[str, tuple[int, ...]]) -> bool:
    """True if a shape has these dimensions (see ``_SHAPES``), each of the size that another tensor gave it."""
    letters = dimensions.rstrip("*1")
    if len(shape) < len(letters) or 0 in shape:
        return False
    rest = shape[len(letters) :]
    own: list[tuple[str, tuple[int, ...]]] = [(letter, (size,)) for letter, size in zip(letters, shape, strict=False)]
    if dimensions.endswith("*"):
        own.append(("*", rest))
    elif rest and (not dimensions.endswith("1") or set(rest) != {1}):
        return False
    return all(sizes.setdefault(name, size) == size for name, size in own)


def _targets(detected: Detected, module: str) -> tuple[str, ...]:
    found = detected.naming.find(module)
    assert found is not None
    rule, fields = found
    return tuple(fill(template, fields) for template in rule.targets)


def _kind(module: str, sides: Mapping[str, TensorRef]) -> str:
    own = frozenset(sides) - _BESIDE
    kind = next((kind for kind, ways in KINDS.items() if own in ways), None)
    if kind is not None and (own or _BIASES & sides.keys()):
        return kind
    begun = [kind for kind, ways in KINDS.items() if own and any(own < way for way in ways)]
    if begun or not own:
        raise _unfit(module, f"of {begun[0]} it has only {', '.join(sorted(own))}" if begun else "it has no factors")
    raise FormatError(
        f"the tensors of {printable(module)} are those of no known kind of adapter",
        why=f"it has {', '.join(sorted(own))}",
        hint="loraconv inspect FILE --verbose",
        slug="not-plain-lora",
    )


def _unfit(name: str, why: str) -> CorruptCheckpoint:
    return CorruptCheckpoint(
        f"the adapter is not whole: {'; '.join(fold_names([name]))}",
        why=why,
        hint="save the adapter again, or copy it again from where it was trained",
        slug="factor-missing",
    )
