"""The singular values of a delta from its factors alone: numpy's of the full product; none for what is no number."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from loraconv.verifier.numbers import Held, Pair
from loraconv.verifier.spectrum import effective_rank, singular_values


def pair(up: Any, down: Any, scale: Fraction | float = Fraction(1)) -> Pair:
    return Pair(Held(np.asarray(down, dtype=float), "F32"), Held(np.asarray(up, dtype=float), "F32"), scale)


@pytest.mark.parametrize("scale", [Fraction(1), Fraction(1, 128), 2 / math.sqrt(3), Fraction(-2)], ids=str)
@pytest.mark.parametrize(
    ("out", "rank", "inner"), [(40, 8, 24), (24, 8, 40), (6, 8, 40), (40, 8, 6), (5, 64, 7), (9, 1, 9), (1, 1, 1)]
)
def test_singular_values_are_those_of_numpys_svd_in_float64(out: int, rank: int, inner: int, scale: Any) -> None:
    rng = np.random.default_rng(out * rank + inner)
    up, down = rng.normal(size=(out, rank)), rng.normal(size=(rank, inner))
    exact = np.linalg.svd(float(scale) * up @ down, compute_uv=False)[: min(out, rank, inner)]
    found = singular_values(pair(up, down, scale))
    assert len(found) == min(out, rank, inner)
    # Both ways round in the order of one unit at the size of the factors.
    room = (out + rank + inner) * 2.0**-52 * abs(float(scale)) * np.linalg.norm(up) * np.linalg.norm(down)
    assert np.abs(np.asarray(found) - exact).max() <= 2 * room


def test_directions_that_are_not_there_have_a_singular_value_of_zero() -> None:
    rng = np.random.default_rng(0)
    up, down = rng.normal(size=(30, 8)), rng.normal(size=(8, 20))
    down[4:] = down[:4]  # rank 4 in factors of rank 8
    found = singular_values(pair(up, down))
    assert min(found[:4]) > 0.1
    assert found[4:] == (0.0,) * 4
    assert singular_values(pair(up * 0, down)) == (0.0,) * 8


def test_a_small_singular_value_is_not_taken_for_noise() -> None:
    rng = np.random.default_rng(1)
    left, right = (np.linalg.qr(rng.normal(size=(size, 2)))[0] for size in (30, 20))
    found = singular_values(pair(left * [1.0, 1e-12], right.T))
    assert found == (pytest.approx(1.0, rel=1e-12), pytest.approx(1e-12, rel=1e-2, abs=0))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_factors_that_are_no_numbers_have_no_singular_values(bad: float) -> None:
    assert singular_values(pair([[bad], [1.0]], [[1.0, 2.0]])) == ()
    assert singular_values(pair([[1.0], [1.0]], [[1.0, bad]])) == ()


def test_the_effective_rank_counts_equal_directions() -> None:
    for count in (1, 2, 7):
        assert effective_rank([3.0] * count + [0.0] * 5) == pytest.approx(count, rel=1e-12)
    assert effective_rank([1.0, 1e-9]) == pytest.approx(1, abs=1e-6)
    assert effective_rank([4.0, 2.0, 1.0]) == pytest.approx(effective_rank([400.0, 200.0, 100.0]), rel=1e-12)
    assert effective_rank([]) == effective_rank([0.0, 0.0]) == 0.0
