"""Kronecker products in the verifier: norms, distances and singular values at the size of their parts."""

from __future__ import annotations

import tracemalloc
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import loraconv
from loraconv.source import open_source
from loraconv.verification.adapters import adapter_pairs
from loraconv.verifier.algebra import cut_rows, dense, special_pairs
from loraconv.verifier.delta import Grams, compare_module, distance, inner, rows_of, transposed
from loraconv.verifier.fused.whole import Kron, Turned
from loraconv.verifier.numbers import Held, Pair, room_of, values
from loraconv.verifier.spectrum import singular_values

Array = np.ndarray[Any, Any]


def noise(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32).astype(np.float64)


def kron(one: Array, other: Array, scale: Fraction = Fraction(1, 2)) -> Pair:
    up, down = Held(one.reshape(-1, 1), "F32"), Held(other.reshape(1, -1), "F32")
    return Pair(down, up, scale, (*one.shape, *other.shape))


def low_rank(up: Array, down: Array, scale: Fraction = Fraction(2, 3)) -> Pair:
    return Pair(Held(down, "F32"), Held(up, "F32"), scale)


ONE, OTHER = noise(3, 4), noise(5, 2, seed=1)
UP, DOWN = noise(15, 3, seed=2), noise(3, 8, seed=3)
WHOLE, PRODUCT = np.kron(ONE, OTHER) / 2, UP @ DOWN * 2 / 3


@pytest.mark.parametrize("rows", [1, 4, 7, 15])
def test_distance_and_inner_product_are_those_of_the_whole_matrices(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loraconv.verifier.delta._BLOCK", 8 * rows)
    one, other = kron(ONE, OTHER), low_rank(UP, DOWN)
    assert distance(one, other) == pytest.approx(np.linalg.norm(WHOLE - PRODUCT), rel=1e-14)
    assert distance(other, one) == pytest.approx(np.linalg.norm(WHOLE - PRODUCT), rel=1e-14)
    assert inner(one, other) == pytest.approx(np.vdot(WHOLE, PRODUCT), rel=1e-13)
    assert inner(one, one) == pytest.approx(np.vdot(WHOLE, WHOLE), rel=1e-13)


def test_products_of_other_grids_are_compared_as_what_they_are() -> None:
    one, other = kron(ONE, OTHER), kron(noise(5, 2, seed=4), noise(3, 4, seed=5))
    whole = np.kron(noise(5, 2, seed=4), noise(3, 4, seed=5)) / 2
    assert one.shape == other.shape
    assert distance(one, other) == pytest.approx(np.linalg.norm(WHOLE - whole), rel=1e-14)
    assert not compare_module("m", one, other).same
    assert compare_module("m", one, dense(Held(WHOLE, "F64"))).error < 1e-15


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_a_product_that_holds_no_number_is_infinitely_far_from_any_of_another_grid(number: float) -> None:
    one, other = kron(ONE, OTHER), low_rank(UP, DOWN)
    up, left = UP.copy(), ONE.copy()
    up[3, 1] = left[1, 1] = number
    broken = low_rank(up, DOWN), kron(left, OTHER)
    for first, second in ((one, broken[0]), (broken[1], other), broken):
        assert distance(first, second) == distance(second, first) == np.inf


def test_a_tiny_difference_is_measured_to_all_its_digits() -> None:
    near = WHOLE.copy()
    near[7, 3] += 1e-9
    error = distance(kron(ONE, OTHER), low_rank(near, np.eye(8), Fraction(1)))
    assert error == pytest.approx(1e-9, rel=1e-6)


def test_norm_singular_values_transpose_and_rows() -> None:
    pair = kron(ONE, OTHER)
    assert Grams.of(pair).norm == pytest.approx(np.linalg.norm(WHOLE), rel=1e-14)
    want = np.linalg.svd(WHOLE, compute_uv=False)
    assert np.allclose(singular_values(pair), want[: pair.shape[1]], rtol=0, atol=1e-13 * want[0])
    assert np.array_equal(rows_of(transposed(pair), 0, 8) / 2, WHOLE.T)
    assert np.array_equal(rows_of(cut_rows(pair, (2, 0), 3), 0, 10) / 2, np.concatenate([WHOLE[10:], WHOLE[:5]]))


def test_no_matrix_of_the_full_size_is_made() -> None:
    one, other = kron(noise(8, 8), noise(192, 192)), low_rank(noise(1536, 4), noise(4, 1536))
    tracemalloc.start()
    assert distance(one, other) > 0
    assert len(singular_values(one)) == 1536
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1536 * 1536 * 8 * 0.9


@pytest.mark.parametrize("kind", ["lokr", "loha", "loha_dense", "tucker"])
def test_the_room_is_what_the_largest_roundings_of_every_factor_add_up_to(kind: str) -> None:
    shapes = SHAPES.get(kind, {"down": (2, 4, 1, 1), "up": (6, 2, 1, 1), "lora_mid": (2, 2, 3, 3)})
    sides = {side: Held(abs(noise(*shape, seed=n)), "BF16") for n, (side, shape) in enumerate(shapes.items())}
    largest = {side: Held(held.values * (1 + 2.0**-8), "BF16") for side, held in sides.items()}
    pair, more = special_pairs(sides, None)[""], special_pairs(largest, None)[""]  # type: ignore[arg-type]
    for one, other in ((pair.up, more.up), (pair.down, more.down)):
        assert np.allclose(room_of(one), values(other) - values(one), rtol=1e-5, atol=0)


def test_rows_of_a_transpose_keep_no_whole_matrix() -> None:
    whole = Kron(kron(noise(8, 8), noise(192, 192)))
    tracemalloc.start()
    made = Turned(whole).rows(3, 5)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.array_equal(made, np.kron(noise(8, 8), noise(192, 192)).T[3:5])
    assert peak < 1536 * 1536 * 8 * 0.7


SHAPES = {
    "lokr": {"lokr_w1_a": (4, 2), "lokr_w1_b": (2, 4), "lokr_w2_a": (6, 3), "lokr_w2_b": (3, 4)},
    "lokr_w1": {"lokr_w1": (4, 4), "lokr_w2_a": (6, 3), "lokr_w2_b": (3, 4)},
    "loha": {"hada_w1_a": (24, 2), "hada_w1_b": (2, 16), "hada_w2_a": (24, 2), "hada_w2_b": (2, 16)},
    "loha_dense": {"hada_w1_a": (24, 5), "hada_w1_b": (5, 16), "hada_w2_a": (24, 5), "hada_w2_b": (5, 16)},
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("size", [1.0, 1e-4], ids=["usual", "near the smallest float16"])
def test_storing_every_factor_in_16_bits_is_no_difference_and_more_than_that_is_one(
    kind: str, dtype: torch.dtype, size: float, tmp_path: Path
) -> None:
    torch.manual_seed(3)
    tensors = {f"lora_unet_blocks_0_self_attn_q.{s}": torch.randn(*shape) * size for s, shape in SHAPES[kind].items()}
    for name in ("wide", "narrow", "wrong"):
        (tmp_path / name).mkdir()
    save_file(tensors, tmp_path / "wide" / "a.safetensors")
    narrow = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    save_file(narrow, tmp_path / "narrow" / "a.safetensors")
    first = next(iter(tensors))
    save_file({**narrow, first: narrow[first] * 1.1}, tmp_path / "wrong" / "a.safetensors")
    with ExitStack() as opened:
        files = [tmp_path / name / "a.safetensors" for name in ("wide", "narrow", "wrong")]
        pairs = [adapter_pairs(opened.enter_context(open_source(file)), None) for file in files]
        for module, pair in pairs[0].items():
            result = compare_module(module, pair, pairs[1][module])
            assert 0 < result.error <= result.bound < 0.05
            assert not compare_module(module, pair, pairs[2][module]).same
    if size == 1:
        assert loraconv.verify(tmp_path / "wide" / "a.safetensors", tmp_path / "narrow" / "a.safetensors").same
