"""Norms at rank size where factors cancel, overflow or are empty; sizes of deltas; rooms of the smallest numbers."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from loraconv.verifier.delta import Grams, delta_norm, inner, projection, rounded_through, tolerance
from loraconv.verifier.numbers import (
    Computed,
    Held,
    Pair,
    compare,
    difference_norm,
    gram_norm,
    in_memory,
    product_norm,
    room_of,
    rounded_once,
    same_numbers,
    slack,
    values,
)

RNG = np.random.default_rng(4)
UP, DOWN = RNG.normal(size=(30, 4)), RNG.normal(size=(4, 20))
NORM = float(np.linalg.norm(UP @ DOWN))


@pytest.mark.parametrize("gap", [1.0, 1e-3, 1e-5, 1e-7, 1e-9])
def test_a_product_of_factors_that_nearly_cancel_is_measured_to_its_digits(gap: float) -> None:
    """Two columns that differ by little, times a row and its opposite: Gram matrices lose twice as many digits."""
    up, more, row = RNG.normal(size=30), RNG.normal(size=30), RNG.normal(size=20)
    both, rows = np.stack([up, up + gap * more], axis=1), np.stack([row, -row])
    apart = both[:, 1] - both[:, 0]  # as it is stored
    right = float(np.linalg.norm(apart) * np.linalg.norm(row))
    assert gram_norm(both, rows) == pytest.approx(right, rel=1e-5)
    assert product_norm(both, rows) == pytest.approx(right, rel=1e-5)
    pair = Pair(Held(rows, "F64"), Held(both, "F64"), Fraction(-3, 2))
    assert delta_norm(pair) == pytest.approx(right * 1.5, rel=1e-5)


@pytest.mark.parametrize("power", [0, 100, 160, -160])
def test_factors_of_very_different_size_have_the_norm_of_their_product(power: int) -> None:
    up, down = UP * 10.0**power, DOWN * 10.0**-power
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        assert gram_norm(up, down) == pytest.approx(NORM, rel=1e-12)
        assert product_norm(up, down) == pytest.approx(NORM, rel=1e-12)


@pytest.mark.parametrize("rank", [0, 1])
def test_nothing_is_as_far_away_as_what_it_is_compared_with_is_large(rank: int) -> None:
    none = np.zeros((30, rank)), np.zeros((rank, 20))
    assert difference_norm(*none, UP, DOWN) == pytest.approx(NORM, rel=1e-12)
    assert difference_norm(UP, DOWN, *none) == pytest.approx(NORM, rel=1e-12)
    assert difference_norm(*none, *none) == 0.0


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", range(4))
def test_any_factor_without_numbers_makes_the_distance_infinite(number: float, at: int) -> None:
    given = [UP.copy(), DOWN.copy(), UP.copy(), DOWN.copy()]
    given[at][1, 1] = number
    assert difference_norm(*given) == np.inf
    assert product_norm(*given[:2]) == (np.inf if at < 2 else pytest.approx(NORM))


@pytest.mark.parametrize("scale", [1.0, -2.0, 1e-3])
def test_columns_of_very_different_length_are_told_apart_from_others(scale: float) -> None:
    lengths = np.array([1e3, 1.0, 1e-3, 0.1])
    up, down = UP * lengths, DOWN / lengths[:, None]
    other = up * (1 + scale * 1e-4)
    turn = np.linalg.qr(RNG.normal(size=(4, 4)))[0]
    right = pytest.approx(NORM * abs(scale) * 1e-4, rel=1e-5)
    assert difference_norm(up, down, other, down) == right
    assert difference_norm(up, down, other @ turn, turn.T @ down) == pytest.approx(NORM * abs(scale) * 1e-4, rel=1e-3)


# --- pairs ------------------------------------------------------------------------------------------------------------


def pair(out: int, rank: int, into: int, scale: Any = Fraction(1), **more: Any) -> Pair:
    rng = np.random.default_rng((out, rank, into))
    return Pair(Held(rng.normal(size=(rank, into)), "F32"), Held(rng.normal(size=(out, rank)), "F32"), scale, **more)


def grid(n1: int, m1: int, n2: int, m2: int, **more: Any) -> Pair:
    return Pair(Held(np.ones((1, n2 * m2)), "F32"), Held(np.ones((n1 * m1, 1)), "F32"), 1, (n1, m1, n2, m2), **more)


def test_the_shape_of_a_delta_and_what_it_fits() -> None:
    assert pair(5, 2, 7).shape == (5, 2, 7)
    assert grid(3, 2, 4, 5).shape == (12, 8, 10)
    assert grid(2, 3, 5, 4).shape == (10, 8, 12)
    fitting: list[tuple[Pair, Pair, bool]] = [
        (pair(5, 2, 7), pair(5, 3, 7), True), (pair(5, 2, 7), pair(5, 2, 8), False),
        (pair(5, 2, 7), pair(6, 2, 7), False), (pair(12, 2, 10), grid(3, 2, 4, 5), True),
        (pair(5, 2, 9, kernel=(3, 3)), pair(5, 2, 9), True),
        (pair(5, 2, 9, kernel=(3, 3)), pair(5, 1, 9, kernel=(3, 3)), True),
        (pair(5, 2, 9, kernel=(3, 3)), pair(5, 2, 9, kernel=(1, 9)), False),
    ]  # fmt: skip
    for one, other, fits in fitting:
        assert one.fits(other) is other.fits(one) is fits
    assert pair(12, 8, 10).kind != grid(3, 2, 4, 5).kind
    assert pair(5, 2, 7).kind == pair(5, 2, 7, 3).kind


def test_a_tensor_in_memory_has_the_values_the_dtype_and_the_room_of_the_computed_one() -> None:
    computed = Computed(lambda: np.ones((2, 3)), lambda dtype: np.full((2, 3), len(dtype)), "F16", (2, 3))
    found = in_memory(computed)
    assert (found.shape, found.dtype, found.values.tolist()) == ((2, 3), "F16", [[1.0] * 3] * 2)
    assert room_of(found).tolist() == room_of(computed).tolist() == [[0] * 3] * 2
    assert room_of(found, "BF16").tolist() == room_of(computed, "BF16").tolist() == [[4] * 3] * 2
    held = Held(np.array([[1.0, 0.0]]), "F16")
    assert in_memory(held) is held
    assert values(computed).tolist() == found.values.tolist()
    for dtype, half, least in (("", 2.0**-11, 2.0**-25), ("BF16", 2.0**-8, 2.0**-134)):
        assert room_of(held, dtype)[0, 0] == pytest.approx(half, rel=2.0**-19)
        assert room_of(held, dtype)[0, 1] == least


@pytest.mark.parametrize(("dtype", "least"), [("F16", 2.0**-24), ("BF16", 2.0**-133), ("F32", 2.0**-149)])
def test_numbers_near_zero_may_be_half_the_smallest_number_away(dtype: str, least: float) -> None:
    exact = np.array([0.49, -0.49, 0.5, 1.5]) * least
    stored = np.array([0.0, 0.0, 0.0, 2.0]) * least
    assert rounded_once(exact, stored, dtype)
    assert not rounded_once(exact * 1.05, stored, dtype)
    assert slack(np.zeros(2), dtype).tolist() == [least / 2] * 2


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ([1.0, np.nan], [1.0, np.nan], True), ([1.0, np.nan], [np.nan, 1.0], False), ([1.0], [1.0, 1.0], False),
        ([0.0], [-0.0], True), ([np.inf], [np.inf], True), ([np.inf], [-np.inf], False), ([1], [1.0], True),
    ],
)  # fmt: skip
def test_numbers_are_the_same_with_nan_where_the_other_has_it(one: Any, other: Any, same: bool) -> None:
    assert same_numbers(np.array(one), np.array(other)) is same


def test_an_inner_product_and_a_projection_count_both_scales() -> None:
    one, other = pair(6, 2, 5, Fraction(3, 2)), pair(6, 3, 5, Fraction(-1, 4))
    first, second = (float(p.scale) * values(p.up) @ values(p.down) for p in (one, other))
    assert inner(one, other) == pytest.approx(np.vdot(first, second), rel=1e-12)
    constant, rest = projection(one, other)
    assert constant == pytest.approx(np.vdot(first, second) / np.vdot(first, first), rel=1e-12)
    assert rest == pytest.approx(np.linalg.norm(second - constant * first) / np.linalg.norm(second), rel=1e-9)
    assert tolerance(one, other) == max(Grams.of(p).relative_room() for p in (one, other)) > 0
    zero = Pair(one.down, one.up, Fraction(0))
    assert tolerance(one, zero) == tolerance(zero, one) == 0.0


def test_numbers_of_a_shorter_dtype_are_known_by_both_factors() -> None:
    short, long = np.full((2, 2), 1 + 2.0**-7), np.full((2, 2), 1 + 2.0**-9)
    for down, up, both in ((short, short, True), (short, long, False), (long, short, False)):
        assert rounded_through(Pair(Held(down, "F32"), Held(up, "F32"), 1), "BF16") is both
    assert compare(pair(5, 2, 7), pair(5, 3, 7)).within is False
