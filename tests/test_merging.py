"""The sum of a weight and its adapters is the number nearest to the exact one, whoever multiplied the matrices.

Truth here: fractions of whole numbers, and a table of all numbers of a 16-bit dtype in which the nearest is looked up.
"""

from __future__ import annotations

import bisect
import struct
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from loraconv.errors import CorruptCheckpoint
from loraconv.fusion import merging
from loraconv.fusion.merging import Term, blocks, cast_rows, merge_rows, stack
from loraconv.io.input_file import InputFile
from loraconv.lazy import TensorRef
from tests.support import refuse_to_skip_compiled_parts

DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
Given = tuple[torch.Tensor, torch.Tensor, Fraction]


# --- truth --------------------------------------------------------------------------------------------------------


def value_of(bits: int, dtype: str) -> float:
    """A number of a 16-bit dtype, by the definition of its bits."""
    wide, fraction = (5, 10) if dtype == "F16" else (8, 7)
    sign, exponent, low = bits >> 15, (bits >> fraction) & ((1 << wide) - 1), bits & ((1 << fraction) - 1)
    bias = (1 << (wide - 1)) - 1
    whole = low if exponent == 0 else low + (1 << fraction)
    return (-1.0) ** sign * whole * 2.0 ** (max(exponent, 1) - bias - fraction)


@cache
def numbers(dtype: str) -> tuple[list[Fraction], list[int]]:
    """All finite numbers from 0 on, in order, and their bits."""
    top = 0x7C00 if dtype == "F16" else 0x7F80
    return [Fraction(value_of(bits, dtype)) for bits in range(top)], list(range(top))


def nearest(exact: Fraction, dtype: str) -> float:
    """The number of the dtype nearest to ``exact``, of two the one whose last bit is 0."""
    size = abs(exact)
    if dtype == "F32":
        guess = np.float32(float(size))
        near = [np.nextafter(guess, np.float32(0)), guess, np.nextafter(guess, np.float32(np.inf))]
        choices = [
            (abs(Fraction(float(x)) - size), struct.unpack("<I", np.float32(x).tobytes())[0] & 1, float(x))
            for x in near
        ]
    else:
        values, bits = numbers(dtype)
        at = bisect.bisect_left(values, size)
        choices = [(abs(values[n] - size), bits[n] & 1, float(values[n])) for n in (at - 1, at) if 0 <= n < len(values)]
    found = min(choices)[2]
    return found if exact >= 0 else -found


def exact_sum(base: torch.Tensor, terms: Sequence[Given]) -> list[list[Fraction]]:
    made = [[Fraction(x) for x in row] for row in base.double().tolist()]
    for up, down, factor in terms:
        ups, downs = up.double().tolist(), down.double().T.tolist()
        for i, row in enumerate(ups):
            for j, column in enumerate(downs):
                made[i][j] += factor * sum(Fraction(u) * Fraction(d) for u, d in zip(row, column, strict=True))
    return made


# --- what is tested -----------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True, params=["compiled", "numpy"])
def arithmetic(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test, with and without the compiled part."""
    if request.param == "numpy":
        monkeypatch.setattr(merging, "_rounding", None)
    elif merging._rounding is None:
        refuse_to_skip_compiled_parts()
    return str(request.param)


def reference(folder: Path, tensor: torch.Tensor, name: str = "w") -> TensorRef:
    """A tensor on disk."""
    path = folder / f"{name}{len(list(folder.iterdir()))}"
    path.write_bytes(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    dtype = {torch.float64: "F64", **{t: n for n, t in DTYPES.items()}}[tensor.dtype]
    return TensorRef(name, dtype, tuple(tensor.shape), InputFile(path), 0)


def merged(folder: Path, base: torch.Tensor, terms: Sequence[Given], dtype: str) -> torch.Tensor:
    ref = reference(folder, base)
    factors = stack([Term(reference(folder, u, "u"), reference(folder, d, "d"), factor) for u, d, factor in terms])
    made = b""
    for start, stop in blocks(ref.shape):
        part = ref.rows(start, stop)
        made += merge_rows(b"".join(part.pieces()), part, factors.part(slice(start, stop)), dtype)
    return torch.frombuffer(bytearray(made), dtype=DTYPES[dtype]).reshape(base.shape)


def assert_nearest(folder: Path, base: torch.Tensor, terms: Sequence[Given], dtype: str) -> None:
    got = merged(folder, base, terms, dtype).double().tolist()
    for row, exact in zip(got, exact_sum(base, terms), strict=True):
        assert row == [nearest(x, dtype) for x in exact]


def normal(seed: int, *shape: int, std: float = 1.0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    noise = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=noise, dtype=torch.float64) * std).to(dtype)


def pair(seed: int, rows: int, columns: int, rank: int, std: float, dtype: torch.dtype, factor: Fraction) -> Given:
    return (
        normal(seed, rows, rank, std=std, dtype=dtype),
        normal(seed + 1, rank, columns, std=0.2, dtype=dtype),
        factor,
    )


ROWS, COLUMNS = 24, 40

#: Size of the base's numbers, size of up's, factor.
SIZES = {
    "as trained": (0.02, 1e-2, Fraction(1, 2)),
    "no power of two": (0.02, 1e-2, Fraction(64, 3)),
    "far below the last place": (0.02, 1e-7, Fraction(1, 128)),
    "delta above the base": (1e-3, 1.0, Fraction(7, 5)),
    "tiny scale": (0.02, 1e-2, Fraction(1, 10**9)),
    "huge scale": (0.02, 1e-3, Fraction(10**4)),
    "below the smallest normal number": (2e-5, 1e-5, Fraction(1, 3)),
    "below the smallest number": (1e-7, 1e-7, Fraction(1, 5)),
    "negative": (0.02, 1e-2, Fraction(-4, 5)),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_every_number_is_the_nearest_to_the_exact_sum(tmp_path: Path, size: str, dtype: str) -> None:
    std, up, factor = SIZES[size]
    base = normal(1, ROWS, COLUMNS, std=std, dtype=DTYPES[dtype])
    assert_nearest(tmp_path, base, [pair(2, ROWS, COLUMNS, 5, up, DTYPES[dtype], factor)], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stored", DTYPES)
def test_a_cast_is_part_of_the_one_rounding(tmp_path: Path, stored: str, dtype: str) -> None:
    base = normal(1, ROWS, COLUMNS, std=0.02, dtype=DTYPES[stored])
    assert_nearest(tmp_path, base, [pair(2, ROWS, COLUMNS, 3, 1e-2, torch.float32, Fraction(1, 3))], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_several_adapters_are_added_before_the_one_rounding(tmp_path: Path, dtype: str) -> None:
    base = normal(1, ROWS, COLUMNS, std=0.02, dtype=DTYPES[dtype])
    terms = [
        pair(2, ROWS, COLUMNS, 3, 1e-2, torch.float32, Fraction(4, 5)),
        pair(4, ROWS, COLUMNS, 7, 1e-2, torch.bfloat16, Fraction(-1, 6)),
        pair(6, ROWS, COLUMNS, 1, 1e-2, torch.float64, Fraction(1, 2)),
    ]
    assert_nearest(tmp_path, base, terms, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_cancellation_leaves_the_exact_rest(tmp_path: Path, dtype: str) -> None:
    terms = [pair(2, ROWS, COLUMNS, 4, 0.3, DTYPES[dtype], Fraction(1, 3))]
    whole = torch.tensor([[float(x) for x in row] for row in exact_sum(torch.zeros(ROWS, COLUMNS), terms)])
    base = (-whole).to(DTYPES[dtype])  # what is left is the rounding error of the base
    assert_nearest(tmp_path, base, terms, dtype)
    opposite = [(up, down, -factor) for up, down, factor in terms]
    assert torch.equal(merged(tmp_path, base, [*terms, *opposite], dtype), base)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_go_to_even_and_the_slightest_excess_decides(tmp_path: Path, dtype: str) -> None:
    half = {"F16": 2.0**-11, "BF16": 2.0**-8, "F32": 2.0**-24}[dtype]
    ones = [[1.0, 1.0 + 2 * half, -1.0, -1.0 - 2 * half, 2.0 - 2 * half, 1.0]]
    base = torch.tensor(ones * 5, dtype=torch.float64).to(DTYPES[dtype])
    for tiny in (2.0**-100, 2.0**-60, 2.0**-30, 0.0):
        ups = [[half, tiny], [half, -tiny], [-half, tiny], [half / 2, tiny], [-half / 2, -tiny]]
        up = torch.tensor(ups, dtype=torch.float64)
        down = torch.ones(2, 6, dtype=torch.float64)
        assert_nearest(tmp_path, base, [(up, down, Fraction(1))], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_between_the_smallest_numbers_too(tmp_path: Path, dtype: str) -> None:
    least = {"F16": 2.0**-24, "BF16": 2.0**-133, "F32": 2.0**-149}[dtype]
    base = torch.tensor([[0.0, 1.0, 2.0, -1.0, -2.0, 3.0]] * 4, dtype=torch.float64).mul(least).to(DTYPES[dtype])
    for tiny in (2.0**-200, 2.0**-30, 0.0):
        ups = [[0.5, tiny], [0.5, -tiny], [-0.5, tiny], [-0.5, -tiny]]
        up = torch.tensor(ups, dtype=torch.float64) * least
        assert_nearest(tmp_path, base, [(up, torch.ones(2, 6, dtype=torch.float64), Fraction(1))], dtype)


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_every_16_bit_number_comes_through_a_delta_of_zero(tmp_path: Path, dtype: str) -> None:
    values, _ = numbers(dtype)
    both = torch.tensor([[float(x) for x in values], [-float(x) for x in values]], dtype=torch.float64)
    base = both.to(DTYPES[dtype])
    got = merged(tmp_path, base, [(torch.zeros(2, 3), torch.ones(3, len(values)), Fraction(1))], dtype)
    assert torch.equal(got, base)


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_wide_products_are_rounded_to_the_nearest_too(tmp_path: Path, dtype: str) -> None:
    """Rank 128: too many products for fractions, so each number is compared with both of its neighbours."""
    base = normal(1, 300, 400, std=0.02, dtype=DTYPES[dtype])
    up, down, factor = pair(2, 300, 400, 128, 1e-2, DTYPES[dtype], Fraction(1, 2))
    exact = base.double() + float(factor) * (up.double() @ down.double())
    got = merged(tmp_path, base, [(up, down, factor)], dtype)
    bits = got.view(torch.int16)
    off = (got.double() - exact).abs()
    for step in (-1, 1):
        other = (bits + step).view(DTYPES[dtype]).double().nan_to_num(nan=torch.inf)  # zero has one neighbour
        assert bool((off <= (other - exact).abs() + 1e-15).all())
    assert float((got.double() - base.double()).abs().max()) > 0


# --- independence of how the products were made ---------------------------------------------------------------------


@pytest.fixture
def case(tmp_path: Path) -> tuple[TensorRef, bytes, list[Term]]:
    base = reference(tmp_path, normal(1, 200, 300, std=0.02, dtype=torch.float16))
    terms = [
        pair(2, 200, 300, 64, 1e-2, torch.float16, Fraction(1, 3)),
        pair(4, 200, 300, 16, 2e-2, torch.float16, Fraction(2)),
    ]
    made = [Term(reference(tmp_path, u, "u"), reference(tmp_path, d, "d"), factor) for u, d, factor in terms]
    return base, b"".join(base.pieces()), made


Case = tuple[TensorRef, bytes, list[Term]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_order_of_the_terms_does_not_matter(case: Case, dtype: str) -> None:
    ref, raw, terms = case
    want = merge_rows(raw, ref, stack(terms), dtype)
    assert merge_rows(raw, ref, stack(terms[::-1]), dtype) == want


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
@pytest.mark.parametrize("seed", range(4))
def test_a_product_with_other_rounding_errors_gives_the_same_bytes(
    case: Case, dtype: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another BLAS: every product is off by up to the error that float32 allows in the order it sums."""
    ref, raw, terms = case
    factors = stack(terms)
    want = merge_rows(raw, ref, factors, dtype)
    monkeypatch.setattr(merging, "_SOME", 2.0)
    monkeypatch.setattr(merging, "_MANY", 2.0)
    rng = np.random.default_rng(seed)
    off = factors.single_up * (1 + rng.choice([-1, 1], factors.single_up.shape) * 30 * 2.0**-24)
    other = replace(factors, single_up=off.astype(np.float32))
    assert not np.array_equal(other.single_up @ other.single_down, factors.single_up @ factors.single_down)
    assert merge_rows(raw, ref, other, dtype) == want


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_all_three_ways_to_a_number_agree(case: Case, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ref, raw, terms = case
    factors = stack(terms)
    want = merge_rows(raw, ref, factors, dtype)
    monkeypatch.setattr(merging, "_MANY", 2.0)  # every doubtful element on its own
    for some in (2.0, -1.0):  # a product in float32, in float64
        monkeypatch.setattr(merging, "_SOME", some)
        assert merge_rows(raw, ref, factors, dtype) == want
    monkeypatch.setattr(merging, "_MANY", 1e-9)  # everything in float64
    assert merge_rows(raw, ref, factors, dtype) == want
    monkeypatch.setattr(merging, "keeps_subnormals", lambda: False)
    assert merge_rows(raw, ref, factors, dtype) == want


@pytest.mark.parametrize("arithmetic", ["compiled"], indirect=True)
@pytest.mark.parametrize("dtype", ["F16", "BF16"])
@pytest.mark.parametrize("stored", ["F16", "BF16", "F32"])
@pytest.mark.parametrize("width", [1, 7, 1024, 1031])
def test_compiled_and_numpy_leave_the_same_elements_open(
    tmp_path: Path, stored: str, dtype: str, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the same product, with numbers of all sizes, zeros, and such as the dtype cannot hold."""
    sizes = 2.0 ** normal(9, 16, width, std=8.0).clamp(-40, 14.5)
    base = (normal(1, 16, width) * sizes).to(DTYPES[stored])
    base[::5, ::3] = 0
    ref = reference(tmp_path, torch.nan_to_num(base, posinf=0, neginf=0))
    up, down, factor = pair(2, 16, width, 6, 0.3, torch.float32, Fraction(1, 3))
    factors = stack([Term(reference(tmp_path, up, "u"), reference(tmp_path, down, "d"), factor)])
    monkeypatch.setattr(merging, "_MANY", 2.0)
    monkeypatch.setattr(merging, "_SOME", 2.0)
    raw = b"".join(ref.pieces())
    with np.errstate(all="ignore"):
        bits, doubtful = merging._sum_single(raw, ref, factors, dtype)
        monkeypatch.setattr(merging, "_rounding", None)
        want, open_ = merging._sum_single(raw, ref, factors, dtype)
    assert np.array_equal(doubtful, open_)
    settled = np.setdiff1d(np.arange(bits.size), doubtful)
    assert np.array_equal(bits.reshape(-1)[settled], want.reshape(-1)[settled])
    assert width < 1000 or 0 < len(doubtful) < bits.size


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_a_processor_that_flushes_small_numbers_to_zero_does_not_matter(tmp_path: Path, dtype: str) -> None:
    base = normal(1, 50, 60, std=1e-5, dtype=torch.float16)
    terms = [pair(2, 50, 60, 4, 1e-5, torch.float16, Fraction(1, 3))]
    want = merged(tmp_path, base, terms, dtype)
    if not torch.set_flush_denormal(True):
        pytest.skip("FLUSHING NOT TESTED: this processor cannot")
    try:
        got = merged(tmp_path, base, terms, dtype)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(got, want)
    assert int(((want != 0) & (want.abs() < 6e-5)).sum()) > 1000


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
@pytest.mark.parametrize("size", [1e-6, 1e-5, 1e-4, 1e-3])
def test_most_numbers_are_settled_in_float32(tmp_path: Path, size: float, dtype: str) -> None:
    """Else it is right but slow. A rank of 128, and a delta of a ten-thousandth up to a tenth of the weights."""
    ref = reference(tmp_path, normal(1, 300, 400, std=0.02, dtype=DTYPES[dtype]))
    up, down, _ = pair(2, 300, 400, 128, size, DTYPES[dtype], Fraction(1))
    factors = stack([Term(reference(tmp_path, up, "u"), reference(tmp_path, down, "d"), Fraction(1))])
    with np.errstate(all="ignore"):
        bits, doubtful = merging._sum_single(b"".join(ref.pieces()), ref, factors, dtype)
    assert 0 < len(doubtful) < 1.5 * merging._SOME * bits.size


@pytest.mark.parametrize("arithmetic", ["compiled"], indirect=True)
@pytest.mark.parametrize("dtype", ["F16", "BF16"])
@pytest.mark.parametrize("sign", [1, -1])
def test_what_is_nearer_to_a_tie_than_the_error_stays_open(dtype: str, sign: int) -> None:
    """The compiled part alone: sums of one product that lie ever closer to the middle of two numbers of the dtype."""
    digits, error = {"F16": (10, 2.0**-30), "BF16": (7, 2.0**-30)}[dtype]
    tie = 1 + 2.0 ** -(digits + 1)
    offsets = np.array([side * error * far for side in (1, -1) for far in (0.0, 0.5, 0.9, 1.1, 2.0)])
    down = sign * (tie + offsets)
    base, bits = np.zeros(len(down), "<u2"), np.full(len(down), 7, np.uint16)
    places, ones = np.arange(len(down)), np.ones(len(down))
    left = merging._rounding.settle(base, dtype, np.ones(1), down, np.ones(1), ones, error, dtype, bits, places)
    close = np.abs(offsets) < error
    assert places[:left].tolist() == np.flatnonzero(close).tolist()
    assert (bits[close] == 7).all()
    above = {"F16": 0x3C01, "BF16": 0x3F81}[dtype]
    assert (bits[~close] == (above - (offsets[~close] < 0)) | (0x8000 if sign < 0 else 0)).all()


@pytest.mark.parametrize("arithmetic", ["compiled"], indirect=True)
def test_places_outside_of_the_block_are_refused() -> None:
    for place in (-1, 4):
        ones = np.ones(4)
        rest = (np.ones(1), ones, np.ones(1), ones, 0.0, "F16", np.zeros(4, np.uint16), np.array([0, place]))
        with pytest.raises(ValueError, match="belong"):
            merging._rounding.settle(np.zeros(4, "<u2"), "F16", *rest)
    four, five = np.ones(4, np.float32), np.ones(5, np.float32)
    made = "F16", np.zeros(4, np.uint16), np.zeros(1, np.int64)
    with pytest.raises(ValueError, match="belong"):  # five products for four sums
        merging._rounding.round_sums(np.zeros(4, "<u2"), "F16", five, four, *made)


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_one_sum_of_many_that_the_dtype_cannot_hold_is_an_error(tmp_path: Path, dtype: str) -> None:
    largest = float(torch.finfo(DTYPES[dtype]).max)
    base = normal(1, 100, 100, std=largest / 100, dtype=DTYPES[dtype])
    base[50, 50] = largest
    up, down = torch.zeros(100, 1, dtype=torch.float64), torch.ones(1, 100, dtype=torch.float64)
    up[50] = largest / 64
    with pytest.raises(CorruptCheckpoint) as error:
        merged(tmp_path, base, [(up, down, Fraction(1))], dtype)
    assert error.value.slug == "overflow"


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_sum_that_the_dtype_cannot_hold_is_an_error(tmp_path: Path, dtype: str, sign: int) -> None:
    largest = float(torch.finfo(DTYPES[dtype]).max)
    half = {"F16": 16.0, "BF16": 2.0**119}[dtype]  # half a unit in the last place of the largest number
    base = torch.full((2, 3), sign * largest, dtype=torch.float64).to(DTYPES[dtype])
    for share, fits in ((0.999, True), (1.0, False), (3.0, False)):
        up = torch.tensor([[0.0], [sign * half * share]], dtype=torch.float64)
        terms = [(up, torch.ones(1, 3, dtype=torch.float64), Fraction(1))]
        if fits:
            assert torch.equal(merged(tmp_path, base, terms, dtype), base)
            continue
        with pytest.raises(CorruptCheckpoint) as error:
            merged(tmp_path, base, terms, dtype)
        assert error.value.slug == "overflow"
        assert " w " in error.value.what


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_base_that_is_not_finite_is_an_error(tmp_path: Path, dtype: str, bad: float) -> None:
    base = normal(1, 4, 5, std=0.02, dtype=DTYPES[dtype])
    base[1, 2] = bad
    for size in (1e-3, 1e5):  # also where the delta would bring infinity's bits back among the numbers
        with pytest.raises(CorruptCheckpoint) as error:
            merged(tmp_path, base, [pair(2, 4, 5, 2, size, torch.float32, Fraction(1))], dtype)
        assert error.value.slug == "nonfinite"


# --- plain casts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stored", DTYPES)
def test_a_plain_cast_rounds_once(tmp_path: Path, stored: str, dtype: str) -> None:
    base = normal(1, 30, 30, std=1e-3, dtype=DTYPES[stored])
    ref = reference(tmp_path, base)
    got = torch.frombuffer(bytearray(cast_rows(b"".join(ref.pieces()), ref, dtype)), dtype=DTYPES[dtype])
    assert got.double().tolist() == [nearest(Fraction(x), dtype) for x in base.double().reshape(-1).tolist()]


def test_a_cast_that_overflows_is_an_error(tmp_path: Path) -> None:
    ref = reference(tmp_path, torch.tensor([1.0, 1e5]))
    with pytest.raises(CorruptCheckpoint) as error:
        cast_rows(b"".join(ref.pieces()), ref, "F16")
    assert error.value.slug == "overflow"


def test_blocks_cover_every_row_once() -> None:
    for shape in ((1, 1), (5, 10**7), (1000, 1920), (3072, 3072), (0, 4), (4, 0)):
        ranges: list[Any] = list(blocks(shape))
        assert [row for start, stop in ranges for row in range(start, stop)] == list(range(shape[0]))
