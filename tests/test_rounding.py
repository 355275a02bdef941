"""How stored numbers are read and settled: any dtype and shape, sums that are no product, a processor that flushes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from loraconv.io.input_file import InputFile
from loraconv.io.safetensors_read import read_safetensors
from loraconv.verifier.fused import rounding
from loraconv.verifier.fused.controls import _flipped
from loraconv.verifier.fused.rounding import Delta, compare_block, is_rounded, numbers


@pytest.fixture
def stored(tmp_path: Path) -> Iterator[Any]:
    """Torch tensors as they are in a file."""
    files: list[InputFile] = []

    def read(**tensors: torch.Tensor) -> Any:
        path = tmp_path / f"{len(files)}.safetensors"
        save_file(tensors, path)
        files.append(InputFile(path))
        return read_safetensors(files[-1]).tensors

    yield read
    for file in files:
        file.close()


@pytest.mark.parametrize("shape", [(), (1,), (5,), (3, 4), (2, 3, 2), (3, 0), (2, 1, 2, 2)])
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_numbers_of_any_shape_are_rounded_once_or_not(shape: tuple[int, ...], kind: torch.dtype, stored: Any) -> None:
    wide = torch.randn(shape, generator=torch.Generator().manual_seed(4))
    narrow = wide.to(kind)
    spoilt = narrow.clone()
    spoilt.view(-1)[-1:] *= 1.5
    refs = stored(wide=wide, narrow=narrow, spoilt=spoilt, same=wide.clone())
    assert is_rounded(refs["wide"], refs["narrow"])
    assert is_rounded(refs["wide"], refs["same"])
    assert is_rounded(refs["wide"], refs["spoilt"]) is (wide.numel() == 0)
    assert is_rounded(refs["narrow"], refs["spoilt"]) is (wide.numel() == 0)


@pytest.fixture
def flushing() -> Iterator[Any]:
    """Whether the processor takes the smallest numbers for zero, as fast-math code leaves it."""
    yield torch.set_flush_denormal
    torch.set_flush_denormal(False)


def half_bits() -> Any:
    """Every finite number of float16."""
    bits = np.arange(1 << 16, dtype=np.uint16).astype("<u2")
    return bits[(bits & 0x7C00) != 0x7C00]


def exactly(bits: Any) -> Any:
    """float16 by its definition: sign, exponent, fraction."""
    sign = 1 - 2.0 * (bits >> 15)
    exponent, fraction = (bits >> 10 & 31).astype(int), (bits & 1023).astype(float)
    return sign * np.where(exponent == 0, fraction * 2.0**-24, (1 + fraction / 1024) * np.exp2(exponent - 15.0))


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("flushes", [True, False])
def test_a_processor_that_flushes_small_numbers_reads_them_all_the_same(
    compiled: bool, flushes: bool, stored: Any, flushing: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr(rounding, "_cells", None)
    bits = half_bits()
    ref = stored(x=torch.from_numpy(bits.view(np.float16)[None].copy()))["x"]
    assert not rounding._flushes()
    flushing(flushes)
    assert rounding._flushes() is flushes
    found = numbers(ref, "F16")
    flushing(False)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found[0].astype(np.float64), exactly(bits))


def test_numbers_that_are_none_are_read_as_such_beside_others(stored: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding, "_cells", None)
    array = np.array([[np.inf, -np.inf, np.nan, 1.5, -(2.0**-24), 65504.0]], np.float16)
    ref = stored(x=torch.from_numpy(array))["x"]
    np.testing.assert_array_equal(numbers(ref, "F16"), array.astype(np.float64))


# --- which elements are looked at again -------------------------------------------------------------------------------


class Rows:
    """A delta by its rows."""

    def __init__(self, array: Any) -> None:
        self.array, self.shape = array, array.shape

    def rows(self, start: int, stop: int) -> Any:
        return self.array[start:stop]


DIGITS = {"F16": 11, "BF16": 8, "F32": 24}


def to(array: Any, dtype: str) -> Any:
    """Numbers of ordinary size rounded once, which torch does by way of float32."""
    mantissa, exponent = np.frexp(array)
    return np.ldexp(np.rint(np.ldexp(mantissa, DIGITS[dtype])), exponent - DIGITS[dtype])


@pytest.mark.parametrize("dtype", DIGITS)
@pytest.mark.parametrize("whole", [True, False])
def test_nearly_every_right_number_is_settled_without_a_second_look(
    dtype: str, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for sums that are so near the middle between two that their own roundings count."""
    rng = np.random.default_rng(6)
    up, down = rng.normal(size=(60, 4)), rng.normal(size=(4, 50))
    base = to(rng.normal(size=(60, 50)), dtype)
    right = to(base + up @ down, dtype)
    delta = Delta.of(up[:, :0], down[:0], ((1.0, Rows(up @ down)),)) if whole else Delta.of(up, down)
    doubtful = list[int]()
    judged = rounding._judged
    monkeypatch.setattr(rounding, "_judged", lambda *given: doubtful.append(given[5].size) or judged(*given))
    work = np.float32 if dtype != "F32" else np.float64
    figures = compare_block(base.astype(work), right.astype(work), delta, 0, dtype)
    assert (figures.misrounded, figures.wrong, figures.elements) == (0, 0, 3000)
    # Within twice the bound of the middle between two numbers, or at a power of two, where they stand closer below.
    exact, unit = base + up @ down, 2.0**-24 if dtype != "F32" and not whole else 2.0**-53
    lengths = np.outer(np.linalg.norm(up, axis=1), np.linalg.norm(down, axis=0))
    room = lengths * (4 + 10) * unit + np.abs(exact) * 4 * unit
    room += (np.abs(base) + np.abs(up @ down)) * 2.0**-40 * whole
    mantissa, exponent = np.frexp(right)
    middle = np.abs(np.abs(exact - right) - np.ldexp(0.5, exponent - DIGITS[dtype]))
    near = np.count_nonzero((middle <= 2 * room) | (np.abs(mantissa) == 0.5))
    assert sum(doubtful) <= near < 300


@pytest.mark.parametrize("dtype", DIGITS)
def test_a_sum_that_is_no_product_is_judged_like_one_that_is(dtype: str) -> None:
    rng = np.random.default_rng(7)
    up, down = rng.normal(size=(20, 3)), rng.normal(size=(3, 30))
    base = to(rng.normal(size=(20, 30)), dtype)
    exact = base + 2.5 * up @ down
    stored = to(exact, dtype)
    stored[4, 5:9] = to(stored[4, 5:9] * (1 + 1000 * 2.0 ** -DIGITS[dtype]), dtype)
    delta = Delta.of(np.zeros((20, 0)), np.zeros((0, 30)), ((2.0, Rows(up @ down)), (0.5, Rows(up @ down))))
    work = np.float32 if dtype != "F32" else np.float64
    figures = compare_block(base.astype(work), stored.astype(work), delta, 0, dtype)
    assert (figures.misrounded, figures.wrong, figures.far, figures.worst) == (4, 4, 4, 4)
    assert figures.changed == np.count_nonzero(stored != base)
    assert figures.size == pytest.approx(np.sum((2.5 * up @ down) ** 2), rel=1e-12)
    assert figures.along == pytest.approx(np.sum((stored - base) * (2.5 * up @ down)), rel=1e-9)
    assert figures.rest == pytest.approx(np.sum((stored - exact) ** 2), rel=1e-9)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize(("stored", "misrounded"), [(0.0, 1), (2.0**-133, 0)])
def test_products_that_float32_loses_altogether_are_counted_in(
    stored: float, misrounded: int, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The middle between 0 and bfloat16's smallest number is 2**-134. Float32 makes 2**-134 - 2**-146 of a sum that is
    above it: it rounds 120 products of 2**-151 to zero."""
    if not compiled:
        monkeypatch.setattr(rounding, "_cells", None)
    up = np.array([[2.0**-67, -(2.0**-73), *[2.0**-75] * 120]])
    down = np.array([[2.0**-67, 2.0**-73, *[2.0**-76] * 120]]).T
    assert float(up[0] @ down[:, 0]) > 2.0**-134
    given = np.zeros((1, 1), np.float32), np.full((1, 1), stored, np.float32)
    assert compare_block(*given, Delta.of(up, down), 0, "BF16").misrounded == misrounded


@pytest.mark.parametrize("array", [[1.5, 1.0], [-1.5], [1.25, 1.0], [-1.75, 1.0], [0.75, 0.5], [1.0], [3.0, -2.0]])
def test_a_flipped_bit_is_the_first_of_the_greatest_numbers_fraction(array: list[float]) -> None:
    """By the bits of float64: the highest of the 52 of the fraction."""
    given = np.array(array)
    bits = given.view(np.uint64).copy()
    bits[0] ^= np.uint64(1 << 51)
    assert _flipped(given).tolist() == bits.view(np.float64).tolist()
    assert given.tolist() == array
    spoilt = _flipped(np.array([np.inf, *array, np.nan]))
    np.testing.assert_array_equal(spoilt, [np.inf, *bits.view(np.float64), np.nan])
