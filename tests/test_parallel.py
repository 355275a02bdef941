"""Work on several cores: in order, silent about numbers that are none, and ended where one fails."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from loraconv.verifier.parallel import beside_it, in_parallel


def test_what_is_done_in_parallel_comes_in_order() -> None:
    def work(number: int) -> int:
        time.sleep(0.002 * (number % 3))
        return number * number

    assert list(in_parallel(work, range(20))) == [n * n for n in range(20)]
    assert list(in_parallel(work, ())) == []


def test_where_one_fails_those_that_have_not_begun_are_left_out() -> None:
    begun = list[int]()

    def work(number: int) -> int:
        begun.append(number)
        if number == 0:
            raise ValueError("the first")
        time.sleep(0.01)
        return number

    with pytest.raises(ValueError, match="the first"):
        list(in_parallel(work, range(500)))
    count = len(begun)
    assert count < 100
    time.sleep(0.05)
    assert len(begun) == count


BAD: dict[str, tuple[Callable[[Any], Any], Any]] = {
    "over": (lambda x: x * x, 1e300), "under": (lambda x: x * x, 1e-300), "invalid": (lambda x: x - x, np.inf),
    "divide": (lambda x: 1 / (x - x), 1.0),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_numpy_says_nothing_about_numbers_that_are_none(kind: str) -> None:
    work, number = BAD[kind]
    array = np.full(3, number)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with np.errstate(all="raise"), pytest.raises(FloatingPointError):
            work(array)
        with np.errstate(all="ignore"):
            right = work(array)
        (found,) = in_parallel(work, [array])
        np.testing.assert_array_equal(found, right)
        with beside_it(lambda: work(array)) as beside:
            np.testing.assert_array_equal(beside.result(), right)


def test_work_beside_a_block_is_another_threads_and_over_when_the_block_is_left() -> None:
    done = list[int]()

    def work() -> str:
        time.sleep(0.05)
        done.append(threading.get_ident())
        return "made"

    with beside_it(work) as beside:
        assert done == []
    assert (beside.result(), len(done)) == ("made", 1)
    assert done != [threading.get_ident()]
