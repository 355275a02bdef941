"""What the definitions of the file formats say of single files that real ones seldom are: half empty, half missing."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from loraconv.registry import dialects
from loraconv.verifier.algebra import cut_rows, dense, is_special, side_of, special_pairs
from loraconv.verifier.numbers import Computed, Held, Pair, values
from loraconv.verifier.oracles import ORACLES, pairs_of
from loraconv.verifier.spelled import apart, check_magnitudes, compare_magnitudes, magnitudes_of, sort_keys
from tests.test_readings import ATTENTION, IN, OURS, QKV, RANK, assert_same, kohya, normal


def test_every_format_has_a_definition_and_there_are_no_others() -> None:
    assert set(ORACLES) == {dialect.name for dialect in dialects()}


@pytest.mark.parametrize("up_is_zero", [True, False])
@pytest.mark.parametrize("down_is_zero", [True, False])
def test_a_block_is_no_module_only_where_both_of_its_factors_are_zero(
    read: Any, up_is_zero: bool, down_is_zero: bool
) -> None:
    """Of q, k and v with columns of their own, k's."""
    up = np.concatenate([np.pad(normal(4, 2), ((0, 0), (2 * n, 4 - 2 * n))) for n in range(3)])
    down = normal(RANK, IN)
    up[4:8] *= not up_is_zero
    down[2:4] *= not down_is_zero
    found = pairs_of("kohya", [read(kohya(QKV, up, down))], {}, None, None)
    right = {f"{ATTENTION}{m}": up[4 * n : 4 * n + 4] @ down for n, m in enumerate(OURS)}
    if up_is_zero and down_is_zero:
        del right[f"{ATTENTION}to_k"]
    assert_same(found, right)
    assert {pair.shape[1] for pair in found.values()} == {2}


def test_a_number_outside_of_its_block_makes_one_pair_of_the_whole_rank(read: Any) -> None:
    for row in (0, 5, 11):
        up = np.concatenate([np.pad(normal(4, 2), ((0, 0), (2 * n, 4 - 2 * n))) for n in range(3)])
        up[row, (2 * (row // 4) + 3) % RANK] = -1e-3
        down = normal(RANK, IN)
        found = pairs_of("kohya", [read(kohya(QKV, up, down, 3))], {}, None, None)
        assert_same(found, {f"{ATTENTION}{m}": 0.5 * up[4 * n : 4 * n + 4] @ down for n, m in enumerate(OURS)})
        assert {pair.shape[1] for pair in found.values()} == {RANK}


@pytest.mark.parametrize("side", ["down", "up"])
def test_a_kernel_with_one_factor_is_no_module_that_adds_nothing(side: str, read: Any) -> None:
    with pytest.raises(KeyError):
        special_pairs({side: read({"x": normal(2, 3, 3, 3)})["x"]}, None)


def test_a_module_may_have_a_bias_alone(read: Any) -> None:
    bias = normal(5)
    for name in ("diff_b", "b_norm"):
        (found,) = special_pairs({name: read({"x": bias})["x"]}, None).items()
        assert found[0] == ".bias"
        assert (values(found[1].up) @ values(found[1].down)).tolist() == bias.astype(np.float64)[:, None].tolist()
    assert special_pairs({"alpha": read({"x": np.float32(3)})["x"]}, None) == {}


SIDES = (
    "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2", "lokr_w1", "lokr_w1_a", "lokr_w1_b",
    "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2", "lora_mid", "diff", "diff_b", "w_norm", "b_norm",
)  # fmt: skip


@pytest.mark.parametrize("side", SIDES)
def test_every_tensor_of_lycoris_is_one_side_of_its_module(side: str) -> None:
    for end in ("", ".weight"):
        assert side_of(f"a.b.{side}{end}") == ("a.b", side)
    for other in (f"a.{side}x", f"{side}", f"a.{side}.bias", f"a.x{side}"):
        assert side_of(other) is None


def test_what_makes_a_module_more_than_a_pair_of_factors(read: Any) -> None:
    flat, kernel, number = (read({"x": array})["x"] for array in (normal(2, 3), normal(2, 3, 1), np.float32(1)))
    assert not is_special({"up": flat, "down": flat, "alpha": number})
    assert not is_special({})
    assert is_special({"up": kernel, "down": flat, "alpha": number})
    assert is_special({"up": flat, "down": kernel})
    assert is_special({"up": flat, "down": flat, "lora_mid": flat})
    assert is_special({"diff": flat})


@pytest.mark.parametrize("chunks", [(0,), (2,), (2, 0), (1, 2, 0)])
def test_chunks_of_rows_are_cut_out_of_any_delta_with_their_room(chunks: tuple[int, ...]) -> None:
    up, down = normal(6, 2).astype(np.float64), normal(2, 4).astype(np.float64)
    rows = [row for n in chunks for row in (2 * n, 2 * n + 1)]
    pair = cut_rows(Pair(Held(down, "F16"), Held(up, "F16"), Fraction(1, 2)), chunks, 3)
    assert values(pair.up).tolist() == up[rows].tolist()
    assert (pair.shape, pair.scale) == ((len(rows), 2, 4), Fraction(1, 2))
    assert isinstance(pair.up, Computed)
    np.testing.assert_allclose(pair.up.room(""), np.abs(up[rows]) * 2.0**-11, rtol=2.0**-19)
    first, second = up[:, :1], down[:1]
    kron = Pair(Held(second, "F16"), Held(first[:3], "F16"), Fraction(1, 3), (3, 1, 2, 2))
    whole = np.kron(first[:3].reshape(3, 1), second.reshape(2, 2))
    cut = cut_rows(kron, chunks, 3)
    assert cut.grid == (1, 1, len(rows), 2)
    assert cut.scale == Fraction(1, 3)
    assert values(cut.down).reshape(len(rows), 2).tolist() == whole[rows].tolist()


def test_a_whole_matrix_is_the_product_of_one_number_and_itself() -> None:
    array = normal(3, 4).astype(np.float64)
    pair = dense(Held(array, "F16"))
    assert (pair.grid, pair.scale, pair.shape) == ((1, 1, 3, 4), 1, (3, 3, 4))
    assert values(pair.up).tolist() == [[1.0]]
    assert values(pair.down).reshape(3, 4).tolist() == array.tolist()
    assert isinstance(pair.up, Held)
    assert pair.up.room is not None
    assert pair.up.room("BF16").tolist() == [[0.0]]


# --- magnitudes -------------------------------------------------------------------------------------------------------


def test_the_adapters_own_name_is_told_from_a_key_that_is_there_without_it() -> None:
    both = {"a.lora_A.default.weight": 1, "a.lora_A.weight": 2, "b.lora_B.mine.weight": 3, "c.lora_A.weight": 4}
    keys = sort_keys(both)  # type: ignore[arg-type]
    assert keys.in_memory == {"b.lora_B.mine.weight": "mine"}
    assert keys.plain == {
        "a.lora_A.default.weight": 1,
        "a.lora_A.weight": 2,
        "b.lora_B.weight": 3,
        "c.lora_A.weight": 4,
    }


SPELLED = {
    "a.to_q.lora_magnitude_vector": "a.to_q", "transformer.a.to_q.lora_magnitude_vector": "a.to_q",
    "base_model.model.a.to_q.lora_magnitude_vector.weight": "a.to_q",
    "base_model.model.a.to_q.lora_magnitude_vector.default.weight": "a.to_q",
    "diffusion_model.double_blocks.1.img_attn.proj.dora_scale": "transformer_blocks.1.attn.to_out.0",
    "lora_unet_double_blocks_1_img_attn_proj.dora_scale": "transformer_blocks.1.attn.to_out.0",
    "lora_transformer_transformer_blocks_1_attn_to_out_0.dora_scale": "transformer_blocks.1.attn.to_out.0",
    "lycoris_transformer_blocks_1_attn_to_out_0.dora_scale": "transformer_blocks.1.attn.to_out.0",
}  # fmt: skip


@pytest.mark.parametrize("name", SPELLED)
def test_magnitudes_are_found_in_every_spelling(name: str, read: Any) -> None:
    tensors = read({name: normal(4), "a.lora_A.weight": normal(2, 2)})
    rest, found = apart(tensors)
    assert (list(rest), list(found)) == (["a.lora_A.weight"], [SPELLED[name]])
    keys = sort_keys(tensors)
    assert (list(keys.plain), list(keys.magnitudes), keys.in_memory) == (["a.lora_A.weight"], [SPELLED[name]], {})
    assert values(found[SPELLED[name]]).tolist() == values(tensors[name]).tolist()


def test_magnitudes_that_are_no_numbers_are_a_key_like_any_other(read: Any) -> None:
    keys = sort_keys(read({"a.dora_scale": np.arange(4), "b.dora_scale": normal(4)}))
    assert (list(keys.plain), list(keys.magnitudes)) == (["a.dora_scale"], ["b"])


@pytest.mark.parametrize("shape", [(12,), (12, 1)])
def test_magnitudes_of_rows_are_dealt_out_with_the_rows(shape: tuple[int, ...], read: Any) -> None:
    array = normal(*shape)
    found = magnitudes_of(read({f"lora_unet_{QKV}": array}))
    assert list(found) == [f"{ATTENTION}{m}" for m in OURS]
    for n, one in enumerate(found.values()):
        assert values(one).tolist() == array[4 * n : 4 * n + 4].astype(np.float64).tolist()
    swapped = magnitudes_of(read({"lora_unet_final_layer_adaLN_modulation_1": array}))
    assert values(swapped["norm_out.linear"]).tolist() == np.concatenate([array[6:], array[:6]]).tolist()


def test_magnitudes_of_columns_are_those_of_no_part(read: Any) -> None:
    array = normal(1, 12)
    (found,) = magnitudes_of(read({f"lora_unet_{QKV}": array})).items()
    assert found[0] == " and ".join(f"{ATTENTION}{m}" for m in OURS)
    assert values(found[1]).tolist() == array.tolist()


def held(array: Any, dtype: str = "F32") -> Any:
    return Held(np.asarray(array, dtype=np.float64), dtype)


def test_magnitudes_that_are_lost_new_or_others_are_counted_and_named() -> None:
    one = {"lost": held([1.0]), "other": held([1.0]), "same": held([1.0, 2.0])}
    two = {"other": held([2.0]), "same": held([[1.0], [2.0]]), "new": held([1.0])}
    told, findings = compare_magnitudes(one, two)
    assert (told.one, told.other, told.equal) == (3, 3, 1)
    assert [(f.slug, f.modules) for f in findings] == [
        ("dora-lost", ("lost",)), ("dora-gained", ("new",)), ("dora-differs", ("other",))
    ]  # fmt: skip
    assert findings[0].mend.startswith("keep {one}, or fuse it")
    assert findings[1].mend == "loraconv inspect {other} --verbose"
    assert findings[2].mend == "copy them from {one} again"
    check = check_magnitudes(one, two)
    assert (check.passed, check.count) == (False, 3)
    assert check.detail == "; ".join(f.sentence for f in findings)
    assert check_magnitudes(one, dict(one)).passed
    narrowed = check_magnitudes({"a": held([1.0])}, {"a": held([1.0], "F16")})
    assert (narrowed.passed, narrowed.detail) == (False, "in another dtype")


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        ([[1.0, 2.0]], [1.0, 2.0], False), ([[1.0, 2.0]], [[1.0, 2.0]], True), ([[1.0], [2.0]], [1.0, 2.0], True),
        ([[1.0]], [1.0], True), ([[1.0, 2.0]], [[1.0], [2.0]], False), ([1.0, 2.0], [1.0, 2.0, 3.0], False),
    ],
)  # fmt: skip
def test_magnitudes_of_rows_and_columns_are_never_equal_but_of_one_number(one: Any, other: Any, equal: bool) -> None:
    for first, second in ((one, other), (other, one)):
        assert compare_magnitudes({"m": held(first)}, {"m": held(second)})[0].equal == equal


# --- kinds of modules -------------------------------------------------------------------------------------------------


def double(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng((seed, *shape)).normal(size=shape)


def delta_of(pair: Pair) -> Any:
    if pair.grid is None:
        return float(pair.scale) * values(pair.up) @ values(pair.down)
    n1, m1, n2, m2 = pair.grid
    return float(pair.scale) * np.kron(values(pair.up).reshape(n1, m1), values(pair.down).reshape(n2, m2))


@pytest.mark.parametrize(("ranks", "low"), [((2, 2), 4), ((3, 4), 12), ((2, 6), 12), ((4, 4), 0), ((2, 8), 0),
    ((3, 5), 15), ((1, 1), 1), ((5, 5), 0)])  # fmt: skip
@pytest.mark.parametrize("shape", [(24, 16), (16, 24)])
def test_a_loha_has_the_product_of_its_ranks_or_is_a_whole_matrix(
    ranks: tuple[int, int], low: int, shape: tuple[int, int]
) -> None:
    """Whole where that many columns would be no fewer than those of the matrix; alpha is divided by the rank of w1."""
    rows, columns = shape
    (r1, r2), seeds = ranks, iter(range(4))
    sides: Any = {
        "hada_w1_a": (rows, r1), "hada_w1_b": (r1, columns), "hada_w2_a": (rows, r2), "hada_w2_b": (r2, columns),
    }  # fmt: skip
    sides = {side: Held(double(*size, seed=next(seeds)), "F32") for side, size in sides.items()}
    w1a, w1b, w2a, w2b = (tensor.values for tensor in sides.values())
    whole = (w1a @ w1b) * (w2a @ w2b)
    for alpha, scale in ((None, 1.0), (Fraction(3), 3 / r1)):
        (pair,) = special_pairs(sides, alpha).values()
        assert (pair.grid, pair.shape[1]) == ((None, low) if low else ((1, 1, rows, columns), min(shape)))
        np.testing.assert_allclose(delta_of(pair), scale * whole, rtol=1e-12, atol=1e-12)
    (pair,) = special_pairs({**sides, "alpha": Held(np.float64(5), "F32")}, None).values()
    assert pair.scale == Fraction(5, r1)


@pytest.mark.parametrize("first", ["whole", "factors"])
@pytest.mark.parametrize("second", ["whole", "factors", "core"])
def test_a_lokr_is_the_kronecker_product_of_its_parts_whatever_they_are_made_of(first: str, second: str) -> None:
    """Alpha counts where a part has factors, divided by the rank of w2 or else of w1."""
    one, other = double(3, 2), double(4, 5, seed=1)
    sides: Any = {"lokr_w1": one, "lokr_w2": other}
    rank = 0
    if first == "factors":
        sides |= {"lokr_w1_a": double(3, 6), "lokr_w1_b": double(6, 2)}
        one, rank = sides["lokr_w1_a"] @ sides["lokr_w1_b"], 6
        del sides["lokr_w1"]
    if second != "whole":
        sides |= {"lokr_w2_a": double(4, 7), "lokr_w2_b": double(7, 5)}
        other, rank = sides["lokr_w2_a"] @ sides["lokr_w2_b"], 7
        del sides["lokr_w2"]
    if second == "core":
        sides |= {"lokr_t2": double(7, 7, 3, 3), "lokr_w2_a": double(7, 4)}
        other = np.einsum("ijhw,io,jn->onhw", sides["lokr_t2"], sides["lokr_w2_a"], sides["lokr_w2_b"]).reshape(4, 45)
    held_sides: Any = {side: Held(array, "F32") for side, array in sides.items()}
    for alpha in (None, Fraction(3)):
        (pair,) = special_pairs(held_sides, alpha).values()
        assert pair.scale == (1 if alpha is None or not rank else alpha / rank)
        np.testing.assert_allclose(delta_of(pair), float(pair.scale) * np.kron(one, other), rtol=1e-12, atol=1e-12)
        assert pair.kernel == ((3, 3) if second == "core" else ())


@pytest.mark.parametrize("kernel", [(), (1, 1), (3, 1), (2, 3)])
def test_a_convolution_is_a_matrix_of_rows_times_everything_else(kernel: tuple[int, ...]) -> None:
    down, up = double(2, 3, *kernel), double(5, 2, *[1] * len(kernel))
    sides: Any = {"down": Held(down, "F32"), "up": Held(up, "F32"), "alpha": Held(np.float64(3), "F32")}
    (pair,) = special_pairs(sides, None).values()
    want = up.reshape(5, 2) @ down.reshape(2, -1) * 3 / 2
    np.testing.assert_allclose(delta_of(pair), want, rtol=1e-12)
    assert pair.kernel == kernel
    (whole,) = special_pairs({"diff": Held(down, "F32")}, Fraction(7)).values()  # type: ignore[dict-item]
    np.testing.assert_allclose(delta_of(whole), down.reshape(2, -1), rtol=1e-12)
    assert whole.kernel == (kernel if np.prod(kernel) > 1 else ())  # one number is a matrix's


def test_a_core_stands_between_the_factors_of_a_convolution() -> None:
    core, down, up = double(2, 4, 3, 3), double(4, 5, 1, 1), double(6, 2, 1, 1)
    sides: Any = {"lora_mid": Held(core, "F32"), "down": Held(down, "F32"), "up": Held(up, "F32")}
    (pair,) = special_pairs(sides, Fraction(2)).values()
    want = np.einsum("oi,ijhw,jn->onhw", up[..., 0, 0], core, down[..., 0, 0]).reshape(6, 45) * 2 / 4
    np.testing.assert_allclose(delta_of(pair), want, rtol=1e-12, atol=1e-12)
    assert (pair.kernel, pair.shape) == ((3, 3), (6, 2, 45))


@pytest.mark.parametrize("rows", [2 * IN, 6 * IN])
def test_a_whole_difference_of_the_last_modulation_of_sd3_is_swapped_too(rows: int, read: Any) -> None:
    whole = normal(rows, IN)
    name = "lora_unet_joint_blocks_7_context_block_adaLN_modulation_1.diff"
    right = np.concatenate([whole[IN:], whole[:IN]]) if rows == 2 * IN else whole
    found = pairs_of("kohya", [read({name: whole})], {}, None, None)
    assert_same(found, {"transformer_blocks.7.norm1_context.linear": right})


def test_blocks_of_a_peft_file_in_original_names_count_at_the_scale_of_the_whole(read: Any) -> None:
    up = np.concatenate([np.pad(normal(4, 2), ((0, 0), (2 * n, 4 - 2 * n))) for n in range(3)])
    down, begin = normal(RANK, IN), "base_model.model.double_blocks.3.img_attn.qkv"
    tensors = read({f"{begin}.lora_A.weight": down, f"{begin}.lora_B.weight": up})
    right = {f"{ATTENTION}{m}": 0.5 * up[4 * n : 4 * n + 4] @ down for n, m in enumerate(OURS)}
    found = pairs_of("peft", [tensors], {}, {"lora_alpha": 3}, None)
    assert_same(found, right)
    assert {pair.shape[1] for pair in found.values()} == {2}
    with_root = pairs_of("peft", [tensors], {}, {"lora_alpha": 3, "use_rslora": True}, None)
    assert_same(with_root, {m: delta * np.sqrt(RANK) for m, delta in right.items()})
