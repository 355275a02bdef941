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
