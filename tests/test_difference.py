"""How far apart two products are, at rank size, against the full products in extended precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from loraconv.verifier.numbers import difference_norm

Factors = tuple[Any, Any, Any, Any]
RNG = np.random.default_rng(0)
OUT, RANK, IN = 96, 8, 80


def factors(rank: int = RANK) -> tuple[Any, Any]:
    return RNG.normal(size=(OUT, rank)), RNG.normal(size=(rank, IN))


def turn() -> Any:
    return np.linalg.qr(RNG.normal(size=(RANK, RANK)))[0]


def single(*arrays: Any) -> Any:
    return tuple(array.astype(np.float32).astype(np.float64) for array in arrays)


def turned(up: Any, down: Any) -> Factors:
    q = turn()
    return up, down, up @ q.T, q @ down


UP, DOWN = factors()
STEEP = np.diag(10.0 ** -np.arange(0, 16, 2))
NARROW = UP * (np.arange(RANK) < 4)
TWINS = np.concatenate([UP, UP + 1e-7 * factors()[0]], axis=1)
CASES: dict[str, Factors] = {
    "unrelated": (UP, DOWN, *factors()),
    "of other ranks": (UP, DOWN, *factors(3)),
    "equal": (UP, DOWN, UP, DOWN),
    "a little stronger": (UP, DOWN, UP * 1.01, DOWN),
    "a billionth stronger": (UP, DOWN, UP * (1 + 1e-9), DOWN),
    "factored otherwise": turned(UP, DOWN),
    "factored otherwise and rounded": single(*turned(*single(UP, DOWN))),
    "one zero": (UP * 0, DOWN, UP, DOWN),
    "the other zero": (UP, DOWN, UP * 0, DOWN),
    "both zero": (UP * 0, DOWN, UP * 0, DOWN),
    "of lower rank": turned(NARROW, DOWN),
    "steep": turned(UP @ STEEP, DOWN),
    "steep and level": single(UP @ STEEP, np.linalg.inv(STEEP) @ DOWN, UP, DOWN),
    "columns that cancel": (TWINS, np.concatenate([DOWN, -DOWN]), UP, DOWN),
    "tiny": tuple(f * 1e-40 for f in (UP, DOWN, UP * 1.01, DOWN)),
    "huge": tuple(f * 1e35 for f in (UP, DOWN, UP * 1.01, DOWN)),
}


@pytest.mark.parametrize("case", CASES)
def test_the_distance_of_two_products_is_that_of_extended_precision(case: str) -> None:
    up, down, other_up, other_down = CASES[case]
    wide = [factor.astype(np.longdouble) for factor in CASES[case]]
    exact = float(np.sqrt(np.sum(np.square(wide[0] @ wide[1] - wide[2] @ wide[3]))))
    norm: Callable[[Any], Any] = np.linalg.norm
    allowed = 2.0**-48 * (norm(up) * norm(down) + norm(other_up) * norm(other_down))
    assert abs(difference_norm(up, down, other_up, other_down) - exact) <= allowed


@pytest.mark.parametrize("apart", [1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-9, 0])
def test_columns_that_are_nearly_alike_leave_six_digits(apart: float) -> None:
    up = UP[:, :1] + UP[:, 1:2] * [0, apart]
    for other_up in (UP[:, :2], UP[:, 2:4]):
        exact = np.linalg.norm(up @ DOWN[:2] - other_up @ DOWN[2:4])
        assert difference_norm(up, DOWN[:2], other_up, DOWN[2:4]) == pytest.approx(exact, rel=1e-6)


def test_what_rounding_leaves_between_two_factorings_is_measured_to_many_digits() -> None:
    up, down, other_up, other_down = CASES["factored otherwise and rounded"]
    exact = np.linalg.norm(up @ down - other_up @ other_down)
    assert difference_norm(up, down, other_up, other_down) == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("place", range(4))
def test_a_factor_that_is_not_finite_is_infinitely_far(place: int, bad: float) -> None:
    given = [factor.copy() for factor in CASES["equal"]]
    given[place][2, 3] = bad
    assert difference_norm(*given) == np.inf
