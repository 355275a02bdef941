"""What the verifier calls the same number, the right dtype, the error of a delta: against definitions and float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from loraconv.verifier.dtypes import expected_dtypes
from loraconv.verifier.fused.figures import judge
from loraconv.verifier.fused.rounding import Delta, compare_block, numbers, row_blocks
from loraconv.verifier.numbers import (
    Held,
    Outcome,
    Pair,
    compare,
    difference_norm,
    relative_error,
    same_bytes,
    values,
)
from loraconv.verifier.proof import Check, Control, Proof
from loraconv.verifier.reshaped import _MISTAKES as MISTAKES
from loraconv.verifier.reshaped import ASKED, LEAST, NAMES, NUMBERS, STATED, Claims, Term
from loraconv.verifier.reshaped import _prove as prove_reshaped

ULP = 2.0**-52


def pair(up: Any, down: Any = 1.0, scale: Any = Fraction(1), dtype: str = "F16", down_dtype: str = "") -> Pair:
    """Factors from nested lists or numbers: ``up`` of one column, ``down`` of one row."""
    return Pair(
        Held(np.atleast_2d(np.asarray(down, dtype=np.float64)), down_dtype or dtype),
        Held(np.asarray(up, dtype=np.float64).reshape(-1, 1), dtype),
        scale,
    )


# --- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expected", "stored", "outcome"),
    [
        (pair(1.3, scale=Fraction(1, 2)), pair(0.65), Outcome(True, True)),
        (pair(3.0, scale=Fraction(2**28 - 1)), pair(3.0 * (2**28 - 1), dtype="F64"), Outcome(True, True)),
        (pair(3.0, scale=Fraction(2**28 + 1)), pair(3.0 * (2**28 + 1), dtype="F64"), Outcome(False, True)),
        (pair(3.0, scale=Fraction(1, 3)), pair(1.0, dtype="F64"), Outcome(False, True)),
        (pair(3.0, scale=0.5), pair(3.0, scale=Fraction(1, 2)), Outcome(True, True)),
        (pair(3.0, scale=0.5), pair(1.5), Outcome(False, True)),
        (pair(3.0, scale=0.5), pair(1.6), Outcome(False, False)),
        (pair(3.0), pair(3.0, scale=Fraction(0)), Outcome(False, False)),
        (pair(0.0, scale=Fraction(0)), pair(0.0, scale=Fraction(0)), Outcome(True, True)),
        (pair([np.nan, np.inf]), pair([np.nan, np.inf]), Outcome(True, True)),
        (pair([np.nan, np.inf, 1.0]), pair([np.nan, np.inf, 1 + 2.0**-12]), Outcome(False, True)),
        (pair(np.inf), pair(-np.inf), Outcome(False, False)),
        (pair(np.nan), pair(0.0), Outcome(False, False)),
        (pair(1.0, down=2.0), pair(1.0, down=2.0 + 2.0**-11), Outcome(False, True)),
        (pair(1.0, down=2.0), pair(1.0, down=2.0 + 2.0**-9), Outcome(False, False)),
        (pair([1.0, 2.0]), pair(1.0), Outcome(False, False)),
    ],
)  # fmt: skip
def test_numbers_are_equal_or_rounded_once_or_others(expected: Pair, stored: Pair, outcome: Outcome) -> None:
    assert compare(expected, stored) == outcome


def test_a_scale_that_no_float_holds_may_round_the_product_once_more_and_no_further() -> None:
    """1.3 has units of 2**-52: the rounding to float64 is half of one, that of a third and of the product as much."""
    up = 1.3 * 3
    product = up * float(Fraction(1, 3))
    for units, within in ((0, True), (1, True), (2, False)):
        assert compare(pair(up, scale=Fraction(1, 3)), pair(product + units * ULP, dtype="F64")).within is within
        assert compare(pair(product), pair(product + units * ULP, dtype="F64")).within is (units == 0)


@pytest.mark.parametrize(("scale", "more"), [(Fraction(1), 0.0), (Fraction(1, 3), ULP)])
def test_the_bound_of_an_error_is_what_the_roundings_of_both_factors_make(scale: Fraction, more: float) -> None:
    one = pair([3.0, 4.0], [6.0, 8.0], scale=scale, dtype="BF16", down_dtype="F16")
    stored = replace(one, scale=Fraction(1), up=Held(one.up.values * float(scale), "F64"))  # type: ignore[union-attr]
    error, bound = relative_error(one, stored)
    up, down = 2.0**-53 * (1 + 2.0**-20) + more, 2.0**-11 * (1 + 2.0**-20)
    assert error <= 1e-15
    assert bound == pytest.approx(up + down + up * down, rel=1e-14)
    half = relative_error(one, replace(stored, up=Held(stored.up.values / 2, "F64")))  # type: ignore[union-attr]
    assert half == (pytest.approx(0.5), bound)


def test_the_error_against_a_delta_of_zero_is_absolute_and_infinities_are_left_to_others() -> None:
    """Half of the least number above zero of either factor: up 2**-25 * |down|."""
    error, bound = relative_error(pair(0.0, [3.0, 4.0]), pair(2.0, [3.0, 4.0]))
    down = 5.0 * 2.0**-11 * (1 + 2.0**-20)
    assert error == pytest.approx(10.0)
    assert bound == pytest.approx(2.0**-25 * 5 + 2.0**-25 * down)
    assert relative_error(pair([np.inf, 1.0]), pair([np.nan, 1.0]))[0] == 0
    assert relative_error(pair([np.inf, 3.0]), pair([np.nan, 4.0]))[0] == pytest.approx(1 / 3)
    assert relative_error(pair(3.0, [np.inf, 3.0]), pair(3.0, [-np.inf, 4.0]))[0] == pytest.approx(1 / 3)


@pytest.mark.parametrize("near", [1.0, 1e-3, 1e-7, 1e-10, 0.0])
@pytest.mark.parametrize("gap", [1.0, 1e-6, 0.0])
def test_the_distance_of_two_products_is_right_where_factors_are_nearly_alike(near: float, gap: float) -> None:
    """Two columns of up are ``near``; the products differ by a change of up by ``gap``. In extended precision."""
    rng = np.random.default_rng(int(-np.log10(near or 1e-20)))
    up, down = rng.normal(size=(9, 3)), rng.normal(size=(3, 7))
    up[:, 1] = up[:, 0] + near * up[:, 1]
    other = up + gap * rng.normal(size=up.shape)
    wide = [x.astype(np.longdouble) for x in (up, down, other)]
    exact = float(np.sqrt(np.sum(np.square(wide[0] @ wide[1] - wide[2] @ wide[1]))))
    least = 2.0**-40 * np.linalg.norm(up) * np.linalg.norm(down)  # what is no difference anywhere in the verifier
    assert difference_norm(up, down, other, down) == pytest.approx(exact, rel=1e-5, abs=least)
    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    assert difference_norm(up, down, other @ turn, turn.T @ down) == pytest.approx(exact, rel=1e-5, abs=least)


def test_ordinary_factors_are_measured_without_the_slower_way(monkeypatch: pytest.MonkeyPatch) -> None:
    def product_norm(up: Any, down: Any) -> float:
        raise AssertionError("a QR of the stacked factors")

    monkeypatch.setattr("loraconv.verifier.numbers.product_norm", product_norm)
    rng = np.random.default_rng(0)
    up, down, other = rng.normal(size=(30, 4)), rng.normal(size=(4, 20)), rng.normal(size=(30, 4))
    turn = np.linalg.qr(rng.normal(size=(4, 4)))[0]
    for second in (other, up * (1 + 1e-5)):
        right = pytest.approx(np.linalg.norm((up - second) @ down), rel=1e-6)
        assert difference_norm(up, down, second, down) == right
        assert difference_norm(down.T, up.T, down.T, second.T) == right
        assert difference_norm(up, down, second @ turn, turn.T @ down) == right


def test_no_factor_that_is_infinite_has_a_distance() -> None:
    one = np.ones((2, 2))
    for place in range(4):
        factors = [one.copy() for _ in range(4)]
        factors[place][0, 0] = np.nan
        assert difference_norm(*factors) == np.inf
    assert difference_norm(one, np.zeros((2, 2)), np.zeros((2, 2)), one) == 0


class Pieces:
    """A tensor whose bytes come in these pieces."""

    def __init__(self, *pieces: bytes, dtype: str = "U8", shape: tuple[int, ...] = (4,)) -> None:
        self.parts, self.dtype, self.shape = pieces, dtype, shape

    def pieces(self) -> Any:
        return iter(self.parts)


@pytest.mark.parametrize(
    ("other", "same"),
    [
        (Pieces(b"abcd"), True),
        (Pieces(b"a", b"bc", b"d"), True),
        (Pieces(b"abc"), False),
        (Pieces(b"abcde"), False),
        (Pieces(b"ab", b"ce"), False),
        (Pieces(b"abcd", dtype="I8"), False),
        (Pieces(b"abcd", shape=(2, 2)), False),
    ],
)
def test_bytes_are_the_same_in_whatever_pieces_they_come(other: Any, same: bool) -> None:
    one: Any = Pieces(b"ab", b"cd")
    assert same_bytes(one, other) is same
    assert same_bytes(other, one) is same


# --- a fused model ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "kind"), [("F16", torch.float16), ("BF16", torch.bfloat16)])
def test_every_number_of_16_bits_is_read_exactly(dtype: str, kind: torch.dtype) -> None:
    """Finite ones together; each infinity and NaN with an ordinary number beside it."""
    bits = np.arange(1 << 16, dtype=np.uint16)
    right = torch.from_numpy(bits.view(np.int16).copy()).view(kind).float().numpy()
    finite = np.isfinite(right)
    for chosen in ([finite], [[at, 1] for at in np.flatnonzero(~finite)]):
        for at in chosen:
            ref: Any = Pieces(bits[at].tobytes(), dtype=dtype, shape=bits[at].shape)
            read = numbers(ref, "F16")
            assert read.dtype == np.float32
            assert np.array_equal(read, right[at], equal_nan=True)
            assert np.array_equal(np.signbit(read), np.signbit(right[at])) or np.isnan(read).any()
    assert numbers(ref, "F32").dtype == np.float64


@pytest.mark.parametrize(("dtype", "stored", "kind"), [
    ("F32", "F16", np.float32), ("F32", "BF16", np.float32), ("F32", "F32", np.float64), ("F16", "F64", np.float64),
    ("F64", "F16", np.float64),
])  # fmt: skip
def test_numbers_are_worked_in_where_none_is_lost(dtype: str, stored: str, kind: type) -> None:
    array = np.array([[1.5, -0.25]], dtype={"F16": "<f2", "F32": "<f4", "F64": "<f8"}[dtype])
    ref: Any = Pieces(array.tobytes(), dtype=dtype, shape=(1, 2))
    read = numbers(ref, stored)
    assert read.dtype == kind
    assert read.tolist() == [[1.5, -0.25]]


@pytest.mark.parametrize(
    ("shape", "dtype", "blocks"),
    [
        ((1000, 1024), "F16", [(0, 256), (256, 512), (512, 768), (768, 1000)]),
        ((130, 1024), "F32", [(0, 128), (128, 130)]),
        ((2, 1 << 20), "F16", [(0, 1), (1, 2)]),
        ((5, 0), "F64", [(0, 5)]),
        ((0, 5), "F64", []),
    ],
)
def test_a_block_of_rows_is_half_a_mebibyte(shape: tuple[int, int], dtype: str, blocks: list[Any]) -> None:
    ref: Any = SimpleNamespace(shape=shape, dtype=dtype)
    assert list(row_blocks(ref)) == blocks


def told(base: Any, stored: Any, delta: Delta, dtype: str, start: int = 0) -> Any:
    work = np.float32 if dtype in ("F16", "BF16") else np.float64
    return compare_block(base.astype(work), stored.astype(work), delta, start, dtype)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("dtype", "unit", "step"), [("F16", 2.0**-10, 2.0**-23), ("BF16", 2.0**-7, 2.0**-23),
                                                     ("F32", 2.0**-23, ULP)])  # fmt: skip
def test_a_sum_beside_the_middle_of_two_numbers_is_judged_exactly(
    dtype: str, unit: float, step: float, sign: int
) -> None:
    """1 + unit / 2 and some steps of the arithmetic more or less: rounded to 1 or to 1 + unit, one is the nearest."""
    steps = np.arange(-40, 41)
    delta = Delta.of(np.array([[float(sign)]]), (unit / 2 + steps * step)[None])
    base = np.full((1, len(steps)), float(sign))
    noise = 1 if dtype == "F32" else 0  # float64's own, of a sum near 1
    for stored, wrong in ((base, steps > noise), (base * (1 + unit), steps < -noise)):
        figures = told(base, stored, delta, dtype)
        assert (figures.elements, figures.misrounded) == (81, wrong.sum())
        assert figures.changed == (0 if stored is base else 81)
        if dtype != "F32":  # what float32 excuses of a sum near 1 is half a step
            assert figures.wrong == wrong.sum()
        assert figures.far == figures.nonfinite == 0
    for stored in (base * (1 + 2 * unit), base * (1 - unit)):
        figures = told(base, stored, delta, dtype)
        assert (figures.wrong, figures.far, figures.ulps) == (81, 81, pytest.approx(1.5, abs=0.01))


@pytest.mark.parametrize("rank", [0, 1, 64, 65, 150])
@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
def test_the_figures_of_a_block_are_those_of_every_element_in_float64(dtype: str, rank: int) -> None:
    """Some of what is stored is right, some off by a unit or by many; rows 5 and on of a delta."""
    rng = np.random.default_rng(rank)
    kind = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}[dtype]

    def rounded(array: Any) -> Any:
        return torch.from_numpy(array).to(kind).double().numpy()

    up, down = rng.normal(size=(25, rank)), rng.normal(size=(rank, 30))
    product = (up @ down)[5:]
    base = rounded(rng.normal(size=(20, 30)))
    right = rounded(base + product)
    off = rng.choice([0, 0, 0, 1, 1, 40], size=right.shape)
    stored = rounded(right * (1 + off * torch.finfo(kind).eps))
    figures = told(base, stored, Delta.of(up, down), dtype, start=5)
    nearest = np.abs(stored - base - product) <= np.abs(right - base - product)
    assert figures.misrounded == np.count_nonzero(~nearest)
    there = torch.from_numpy(np.where(stored < base + product, np.inf, -np.inf)).to(kind)
    half = np.abs(torch.nextafter(torch.from_numpy(stored).to(kind), there).double().numpy() - stored) / 2
    lengths = np.linalg.norm(up[5:], axis=1)[:, None] * np.linalg.norm(down, axis=0) * (rank + 8)
    sums = (np.abs(base) + np.abs(product)) * (dtype != "F32")
    wrong = np.abs(stored - base - product) > half + (lengths + sums) * 2.0**-24
    assert figures.wrong == figures.worst == np.count_nonzero(wrong)
    assert figures.changed == np.count_nonzero(stored != base)
    assert (figures.elements, figures.worst_row, figures.nonfinite) == (600, 5, 0)
    assert figures.size == pytest.approx(np.sum(product**2), rel=1e-5)
    assert figures.rest == pytest.approx(np.sum((stored - base - product) ** 2), rel=1e-3)
    assert figures.along == pytest.approx(np.sum((stored - base) * product), rel=1e-3, abs=1e-9)


@pytest.mark.parametrize(
    ("stored", "base", "added", "wrong", "nonfinite"),
    [
        (1.0, np.inf, -np.inf, 1, 0), (np.nan, np.inf, -np.inf, 0, 0), (np.nan, np.nan, 1.0, 0, 0),
        (1.0, np.nan, 1.0, 1, 0), (np.nan, 1.0, 1.0, 1, 1), (np.inf, 1.0, 1.0, 1, 1), (np.inf, np.inf, 1.0, 0, 0),
        (-np.inf, np.inf, 1.0, 1, 0), (2.0, np.inf, 1.0, 1, 0), (2.0, 1.0, 1.0, 0, 0),
    ],
)  # fmt: skip
def test_numbers_that_are_none_are_right_where_the_sum_is_none(
    stored: float, base: float, added: float, wrong: int, nonfinite: int
) -> None:
    one, two, three = (np.array([x]) for x in (stored, base, added))
    with np.errstate(invalid="ignore"):
        figures = judge(one, two, three, np.zeros(1), "F16")
    assert (figures.misrounded, figures.wrong, figures.far, figures.nonfinite) == (wrong, wrong, wrong, nonfinite)


# --- which dtype ----------------------------------------------------------------------------------------------------

TINY = 2.0**-24
#: up and scale of the source, the stored scale, and whether float16 holds up at the stored scale.
FITTING: dict[str, tuple[float, Any, Any, bool]] = {
    "the same scale": (1 + 2.0**-10, Fraction(1, 3), Fraction(1, 3), True),
    "twice": (1 + 2.0**-10, Fraction(2), Fraction(1), True),
    "three times, a short number": (1.5, Fraction(3), Fraction(1), True),
    "three times, a long number": (1 + 2.0**-10, Fraction(3), Fraction(1), False),
    "a third": (3.0, Fraction(1, 3), Fraction(1), False),
    "28 bits": (TINY, Fraction(2**27), Fraction(1), True),
    "29 bits": (TINY, Fraction(2**28), Fraction(1), False),
    "too large": (40000.0, Fraction(2), Fraction(1), False),
    "too small": (TINY, Fraction(1, 2), Fraction(1), False),
    "zero, at any scale": (0.0, Fraction(1, 3), Fraction(1), True),
    "a stored scale of zero": (1.0, Fraction(1), Fraction(0), False),
    "a scale that is no fraction": (1.0, 0.5, Fraction(1), False),
    "a scale stored in float32": (1.25, Fraction(1, 3), Fraction(float(np.float32(1 / 3))), True),
    "a scale off by a unit of float32": (1.25, Fraction(1, 3), Fraction(1, 3) * (1 + Fraction(1, 2**23)), False),
}


@pytest.mark.parametrize("case", FITTING)
def test_factors_are_widened_only_where_their_dtype_cannot_hold_them(case: str) -> None:
    """And then all of the adapter are, to float64 where a module's up was that."""
    up, scale, stored, fits = FITTING[case]
    source = {"q": pair(up, scale=scale), "k": pair(1.0, dtype="F64", down_dtype="BF16"), "v": pair(1.0, dtype="BF16")}
    written = {"q": pair(up, scale=stored), "k": source["k"], "v": source["v"]}
    right = {"q": ("F16", "F16"), "k": ("BF16", "F64"), "v": ("BF16", "BF16")}
    assert expected_dtypes(source, written, None, {}) == (
        right if fits else {"q": ("F32", "F32"), "k": ("F64", "F64"), "v": ("F32", "F32")}
    )
    assert expected_dtypes(source, written, "F16", {}) == dict.fromkeys(source, ("F16", "F16"))
    assert expected_dtypes(source, {}, None, {}) == right


@pytest.mark.parametrize(
    ("ratio", "fits"), [("1/2", True), ("1/4", True), ("1/3", False), ("3/2", False), ("3", False)]
)
def test_float64_is_halved_exactly_and_nothing_else_is_relied_on(ratio: str, fits: bool) -> None:
    """float64 itself cannot tell whether a product in it is exact."""
    source = {"q": pair(1.0, scale=Fraction(ratio), dtype="F64"), "k": pair(1.0)}
    stored = {"q": pair(1.0, dtype="F64"), "k": pair(1.0)}
    assert expected_dtypes(source, stored, None, {})["k"] == (("F16", "F16") if fits else ("F32", "F32"))


NARROWED: dict[str, tuple[dict[str, str], Pair, Pair, bool]] = {
    "recorded for all": ({"": "F16"}, pair(1.5, dtype="F32"), pair(1.5), True),
    "recorded for this one": ({"": "BF16", "q": "F16"}, pair(1.5, dtype="F32"), pair(1.5), True),
    "recorded for another": ({"k": "F16"}, pair(1.5, dtype="F32"), pair(1.5), False),
    "not narrowed": ({"": "F16"}, pair(1.5, dtype="F32"), pair(1.5, dtype="F32"), False),
    "one factor narrowed": ({"": "F16"}, pair(1.5, dtype="F32"), pair(1.5, down_dtype="F32"), False),
    "another up": ({"": "F16"}, pair(1.5, dtype="F32"), pair(1.25), False),
    "another down": ({"": "F16"}, pair(1.5, dtype="F32"), pair(1.5, down=2.0), False),
    "the scale taken out": ({"": "F16"}, pair(0.75, dtype="F32"), pair(1.5, scale=Fraction(1, 2)), True),
    "rounded to float32 before": (
        {"": "F16"}, pair(float(np.float32(1.5 / 3)), scale=Fraction(3), dtype="F32"), pair(1.5), True,
    ),
    "a scale of zero": ({"": "F16"}, pair(0.0, scale=Fraction(0), dtype="F32"), pair(0.0), False),
}  # fmt: skip


@pytest.mark.parametrize("case", NARROWED)
def test_factors_that_were_widened_once_may_be_narrow_again(case: str) -> None:
    recorded, source, stored, narrow = NARROWED[case]
    assert expected_dtypes({"q": source}, {"q": stored}, None, recorded)["q"] == (
        ("F16", "F16") if narrow else ("F32", "F32")
    )


# --- merged and resized ---------------------------------------------------------------------------------------------

MODULES = ["blocks.0.to_q", "blocks.0.to_k"]


def drawn(seed: int, rank: int = 3, dtype: str = "F32") -> dict[str, Pair]:
    """Float32 numbers."""
    rng = np.random.default_rng(seed)
    made = {}
    for module in MODULES:
        down, up = (rng.normal(size=s).astype(np.float32).astype(np.float64) for s in ((rank, 8), (6, rank)))
        made[module] = Pair(Held(down, dtype), Held(up, dtype), Fraction(1))
    return made


def summed(one: dict[str, Pair], other: dict[str, Pair], strength: float = 1.0) -> dict[str, Pair]:
    """The factors of two adapters side by side."""
    made = {}
    for m in one:
        down = np.concatenate([one[m].down.values, other[m].down.values])  # type: ignore[union-attr]
        up = np.concatenate([one[m].up.values, other[m].up.values * strength], axis=1)  # type: ignore[union-attr]
        made[m] = Pair(Held(down, "F32"), Held(up, "F32"), Fraction(1))
    return made


def cut(one: dict[str, Pair], rank: int) -> tuple[dict[str, Pair], dict[str, float]]:
    """The best approximation of a rank, in float64, and its relative error by the singular values."""
    made, errors = {}, {}
    for m, p in one.items():
        left, sizes, right = np.linalg.svd(p.up.values @ p.down.values)  # type: ignore[union-attr]
        made[m] = Pair(Held(right[:rank], "F64"), Held(left[:, :rank] * sizes[:rank], "F64"), Fraction(1))
        errors[m] = float(np.linalg.norm(sizes[rank:]) / np.linalg.norm(sizes))
    return made, errors


def proved(sources: list[dict[str, Pair]], stored: dict[str, Pair], ignored: bool = False, **claims: Any) -> Proof:
    strengths = [Fraction(1), Fraction(1, 2)]
    terms = [Term(pairs, strength) for pairs, strength in zip(sources, strengths, strict=False)]
    return prove_reshaped(terms, stored, Claims(**{"errors": {}} | claims), ignored)


@pytest.mark.parametrize(("scale", "weight"), [(Fraction(3, 4), Fraction(3, 8)), (0.7, 0.35)])
def test_a_source_counts_at_its_scale_times_the_strength(scale: Any, weight: Any) -> None:
    assert Term({"m": pair(1.0, scale=scale)}, Fraction(1, 2)).weight("m") == weight


def test_a_sum_that_is_exact_has_no_error_and_all_its_mistakes_are_found() -> None:
    one, other = drawn(1), drawn(2)
    proof = proved([one, other], summed(one, other, 0.5), ignored=True)
    assert proof.passed
    assert [(c.level, c.name, c.passed, c.count) for c in proof.checks[:2]] == [
        ("L0", NAMES, True, 2), ("L2", NUMBERS, True, 2),
    ]  # fmt: skip
    assert (proof.checks[1].figure, proof.checks[1].bound) == (0.0, 0.0)
    assert proof.checks[1].detail == "2 of 2 equal number for number"
    assert len(proof.checks) == 3
    by_name = {control.name: control for control in proof.controls}
    for name in ("an adapter left out", "strengths forgotten", "factors added up, with cross terms"):
        assert by_name[name] == Control(name, True, "L2 delta")
    assert by_name["a module dropped"] == Control("a module dropped", True, NAMES)
    assert by_name["up zeroed"] == Control("up zeroed", True, NUMBERS)


def test_a_scale_that_a_file_can_only_say_rounded_stands_for_the_short_number() -> None:
    """1 / 49 in float64, taken the other way round, is off 49 by a unit in the last place."""
    said = Fraction(1 / 49)
    assert float(1 / said) != 49
    one = drawn(1)
    stored = {m: replace(p, up=Held(p.up.values * 49, "F32"), scale=said) for m, p in one.items()}  # type: ignore[union-attr]
    assert proved([one], stored).checks[1].detail == "2 of 2 equal number for number"
    moved = {m: replace(p, scale=said * (1 + Fraction(1, 2**47))) for m, p in stored.items()}
    assert proved([one], moved).checks[1].detail == "0 of 2 equal number for number"


def test_mistakes_that_only_sums_can_have_say_where_they_change_nothing() -> None:
    one, zero = drawn(1), {m: replace(p, up=Held(p.up.values * 0, "F32")) for m, p in drawn(2).items()}  # type: ignore[union-attr]
    shorter = drawn(3, rank=2)
    harmless = "it changes no number here"
    for sources, changing in (([one, zero], {"factors added up, with cross terms"}), ([one, shorter], set())):
        controls = {c.name: c for c in proved(sources, summed(*sources, 0.5)).controls}
        assert controls["an adapter left out"].caught is (None if sources[1] is zero else True)
        assert controls["factors added up, with cross terms"].caught is (True if changing else None)
        assert all(c.by == harmless for c in controls.values() if c.caught is None)
    alone = {c.name for c in proved([one], one).controls}
    assert not alone & {"an adapter left out", "strengths forgotten", "factors added up, with cross terms"}
    controls = {
        c.name: c
        for c in prove_reshaped(
            [Term(one, Fraction(1)), Term(drawn(2), Fraction(1))], summed(one, drawn(2)), Claims({}), False
        ).controls
    }
    assert controls["strengths forgotten"] == Control("strengths forgotten", None, harmless)


@pytest.mark.parametrize(
    ("strengths", "harmless"),
    [((0.5, 1.5), "strengths forgotten"), ((1, -1), "factors added up, with cross terms"), ((2, 3), ""), ((-2, 1), "")],
)
def test_a_mistake_that_cancels_itself_changes_nothing(strengths: tuple[float, float], harmless: str) -> None:
    """One adapter twice: forgotten, 0.5 and 1.5 are 1 and 1; at 1 and -1 the cross terms are each other's opposite. At
    -2 and 1 a mistake is as large as the sum."""
    one = drawn(1)
    terms = [Term(one, Fraction(strength)) for strength in strengths]
    sums = {
        m: Pair(
            Held(np.concatenate([values(p.down)] * 2), "F32"),
            Held(np.concatenate([values(p.up) * s for s in strengths], axis=1), "F32"),
            Fraction(1),
        )
        for m, p in one.items()
    }
    proof = prove_reshaped(terms, sums, Claims({}), False)
    names = ("an adapter left out", "strengths forgotten", "factors added up, with cross terms")
    caught = {control.name: control.caught for control in proof.controls if control.name in names}
    assert caught == {name: None if name == harmless else True for name in names}
    assert proof.passed


def test_the_mistakes_of_a_merge_are_what_they_are_called() -> None:
    """What is stored with each, of three adapters with scales and strengths of their own."""
    pairs = [drawn(seed)[MODULES[0]] for seed in (1, 2, 3)]
    scales, strengths = (Fraction(1, 2), Fraction(3), Fraction(5, 4)), (Fraction(3, 2), Fraction(1), Fraction(-1, 4))
    ups, downs = ([values(side) for side in sides] for sides in ([p.up for p in pairs], [p.down for p in pairs]))
    weights = [float(scale * strength) for scale, strength in zip(scales, strengths, strict=True)]
    products = [up @ down for up, down in zip(ups, downs, strict=True)]
    stored = {
        "an adapter left out": weights[0] * products[0] + weights[1] * products[1],
        "strengths forgotten": sum(float(s) * p for s, p in zip(scales, products, strict=True)),
        "factors added up, with cross terms": sum(w * u for w, u in zip(weights, ups, strict=True)) @ sum(downs),
    }
    right = sum(w * p for w, p in zip(weights, products, strict=True))
    parts = list(zip(weights, pairs, strengths, strict=True))
    for name, mistake in MISTAKES.items():
        added = sum(up @ down for up, down in mistake(parts))
        np.testing.assert_allclose(right + added, stored[name], rtol=1e-12, atol=1e-12, err_msg=name)


def test_another_list_of_modules_is_no_sum() -> None:
    one = drawn(1)
    proof = proved([one], {MODULES[0]: one[MODULES[0]], "x": one[MODULES[1]]})
    detail = "missing or unexpected: blocks.0.to_k; x"
    assert proof == Proof("adapter", (Check("L0", NAMES, False, 2, detail=detail),), ())


WRONG: dict[str, tuple[Callable[[Pair], Pair], dict[str, Any], str]] = {
    "one more rank": (lambda p: summed({"m": p}, {"m": p})["m"], {}, NAMES),
    "another size": (lambda p: replace(p, up=Held(np.ones((7, 3)), "F32")), {}, NAMES),
    "two dtypes": (lambda p: replace(p, up=Held(p.up.values, "F64")), {}, NAMES),  # type: ignore[union-attr]
    "half precision": (lambda p: Pair(Held(p.down.values, "F16"), Held(p.up.values, "F16"), p.scale), {}, NAMES),  # type: ignore[union-attr]
    "not the dtype that was asked for": (lambda p: p, {"dtype": "F16"}, NAMES),
    "one number": (lambda p: replace(p, up=Held(p.up.values + np.eye(6, 3) * 1e-5, "F32")), {}, NUMBERS),  # type: ignore[union-attr]
}


@pytest.mark.parametrize("case", WRONG)
def test_a_module_that_is_wrong_is_named_in_the_check_that_it_fails(case: str) -> None:
    spoil, claims, name = WRONG[case]
    one = drawn(1)
    proof = proved([one], one | {MODULES[1]: spoil(one[MODULES[1]])}, **claims)
    failed = {check.name: check.detail for check in proof.checks if not check.passed}
    assert not proof.passed
    assert failed[name] == ("blocks.0.to_q; blocks.0.to_k" if claims else MODULES[1])
    assert bool(proof.controls) is (name != NAMES)


def test_a_wider_dtype_and_the_one_that_was_asked_for_are_right() -> None:
    one = {m: Pair(Held(np.ones((1, 2)), "F16"), Held(np.ones((2, 1)), "F16"), Fraction(1)) for m in MODULES}
    for dtype in ("F16", "F32", "F64"):
        stored = {m: Pair(Held(np.ones((1, 2)), dtype), Held(np.ones((2, 1)), dtype), Fraction(1)) for m in MODULES}
        assert proved([one], stored).checks[0].passed
        assert proved([one], stored, dtype=dtype).checks[0].passed
    wide = {m: Pair(Held(np.ones((1, 2)), "F64"), Held(np.ones((2, 1)), "F64"), Fraction(1)) for m in MODULES}
    narrow = {m: Pair(Held(np.ones((1, 2)), "F32"), Held(np.ones((2, 1)), "F32"), Fraction(1)) for m in MODULES}
    assert not proved([wide], narrow).checks[0].passed


def test_a_rounded_sum_has_its_error_and_the_bound_of_its_roundings() -> None:
    """Each number of up is half of 2**-24 of itself away: the error is that of the delta, the bound twice as much and
    the room of down."""
    one = drawn(1)
    stored = {m: replace(p, up=Held(p.up.values * (1 + 2.0**-25), "F32")) for m, p in one.items()}  # type: ignore[union-attr]
    check = proved([one], stored).checks[1]
    assert check.passed
    assert check.figure == pytest.approx(2.0**-25, rel=1e-3)
    rooms = []
    for p in one.values():
        up, down = np.linalg.norm(p.up.values), np.linalg.norm(p.down.values)  # type: ignore[union-attr]
        rooms.append(up * down / np.linalg.norm(p.up.values @ p.down.values))  # type: ignore[union-attr]
    assert check.bound is not None
    assert 2.0**-24 < check.bound < 2.01 * 2.0**-24 * max(rooms)
    assert check.detail == "0 of 2 equal number for number"


def test_the_best_approximation_is_proved_with_its_error() -> None:
    one = {m: Pair(Held(p.down.values, "F64"), Held(p.up.values, "F64"), p.scale) for m, p in drawn(1, rank=4).items()}  # type: ignore[union-attr]
    stored, errors = cut(one, 2)
    asked = max(errors.values()) * 1.001
    proof = proved([one], stored, errors=errors, asked=asked)
    assert [(c.level, c.name, c.passed, c.count) for c in proof.checks] == [
        ("L0", NAMES, True, 2), ("L2", STATED, True, 2), ("L2", LEAST, True, 2), ("L2", ASKED, True, 2),
    ]  # fmt: skip
    assert proof.checks[1].figure == proof.checks[3].figure == pytest.approx(max(errors.values()), rel=1e-9)
    assert proof.checks[1].bound == pytest.approx(max(errors.values()), rel=1e-9)
    assert proof.checks[3].bound == asked
    assert [c.name for c in proved([one], stored, errors=errors).checks] == [NAMES, STATED, LEAST]


def test_each_claim_about_an_approximation_is_tried() -> None:
    one = {m: Pair(Held(p.down.values, "F64"), Held(p.up.values, "F64"), p.scale) for m, p in drawn(1, rank=4).items()}  # type: ignore[union-attr]
    stored, errors = cut(one, 2)

    def failed(stored: dict[str, Pair], **claims: Any) -> set[str]:
        return {c.name for c in proved([one], stored, **claims).checks if not c.passed}

    assert failed(stored, errors={m: e + 1e-9 for m, e in errors.items()}) == {STATED}
    assert failed(stored, errors={m: e - 1e-9 for m, e in errors.items()}) == {STATED}
    assert failed(stored, errors=errors, asked=min(errors.values()) * 0.999) == {ASKED}
    worse, less = cut(one, 1)
    padded = {
        m: Pair(
            Held(np.concatenate([p.down.values, np.zeros((1, 8))]), "F64"),
            Held(np.concatenate([p.up.values, np.zeros((6, 1))], axis=1), "F64"),
            p.scale,
        )
        for m, p in worse.items()
    }  # type: ignore[union-attr]
    assert failed(padded, errors=less) == {LEAST}
    assert failed(stored, errors={}) == {NAMES}
    whole, _ = cut(one, 4)
    assert failed(whole, errors=dict.fromkeys(one, 0.0)) == set()


def test_a_rounded_check_is_one_of_numbers_that_has_a_bound() -> None:
    """A table of positions (L1) has a bound as well, and is not what was converted."""
    fine = Control("x", True, "")
    for check, rounded in (
        (Check("L2", "delta", True, 1, 0.0, 1e-9), True), (Check("L2", "delta", True, 1, 0.0, 0.0), False),
        (Check("L2", "delta", True, 1), False), (Check("L1", "positions", True, 1, 0.0, 1e-9), False),
    ):  # fmt: skip
        assert Proof("adapter", (check,), (fine,)).rounded is rounded


def test_what_failed_is_told_and_nothing_else() -> None:
    checks = Check("L0", "names", True, 1, detail="fine"), Check("L2", "delta", False, 1, detail="in q")
    controls = Control("a", True, "L2"), Control("b", False, ""), Control("c", None, "")
    proof = Proof("adapter", checks, controls)
    assert proof.failures() == ["L2 delta: in q", "control not caught: b"]
    assert proof.caught == "1/2"
    assert Proof.from_dict(proof.to_dict()) == proof


def test_a_delta_moves_what_it_is_added_to_unless_it_is_all_zero() -> None:
    zeros, ones = np.zeros((2, 1)), np.ones((2, 1))
    assert not Delta.of(zeros, ones.T).moves
    assert Delta.of(ones, ones.T).moves
    assert Delta.of(zeros, zeros.T, ((1.0, Rows(np.ones((2, 2)))),)).moves


class Rows:
    """A delta by its rows."""

    def __init__(self, array: Any) -> None:
        self.array, self.shape = array, array.shape

    def rows(self, start: int, stop: int) -> Any:
        return self.array[start:stop]
