"""What the oracles read in a file: which rows of which factor are which module's, and at what scale they count.

Each expected delta is made here from the factors by the format's rule.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from loraconv.errors import ProofFailed
from loraconv.verifier.adapter import check_adapter, prove_adapter
from loraconv.verifier.aside import SetAside, check_aside
from loraconv.verifier.llava import as_original, main_dtype, tower_beside, trained_beside
from loraconv.verifier.numbers import Expectation, Held, Pair, values
from loraconv.verifier.oracles import by_pattern, pairs_of
from loraconv.verifier.origin import check_origin
from loraconv.verifier.proof import Check
from loraconv.verifier.reshaped import named_check
from loraconv.verifier.spelled import check_magnitudes, magnitudes_of, passed_over, sort_keys

RNG = np.random.default_rng(0)
RANK, IN = 6, 8
Read = Callable[[dict[str, Any]], Any]


def normal(*shape: int) -> Any:
    return RNG.normal(size=shape).astype(np.float32)


def kohya(name: str, up: Any, down: Any, alpha: float | None = None, prefix: str = "lora_unet_") -> dict[str, Any]:
    made = {f"{prefix}{name}.lora_down.weight": down, f"{prefix}{name}.lora_up.weight": up}
    return made if alpha is None else made | {f"{prefix}{name}.alpha": np.float32(alpha)}


def deltas(pairs: dict[str, Pair]) -> dict[str, Any]:
    return {m: float(p.scale) * product(p) for m, p in pairs.items()}


def product(pair: Pair) -> Any:
    if pair.grid is None:
        return values(pair.up) @ values(pair.down)
    n1, m1, n2, m2 = pair.grid
    return np.kron(values(pair.up).reshape(n1, m1), values(pair.down).reshape(n2, m2))


def assert_same(pairs: dict[str, Pair], right: dict[str, Any]) -> None:
    found = deltas(pairs)
    assert set(found) == set(right)
    for module, want in right.items():
        np.testing.assert_allclose(found[module], want, rtol=1e-6, atol=1e-6, err_msg=module)


QKV = "double_blocks_3_img_attn_qkv"
ATTENTION = "transformer_blocks.3.attn."
OURS = ("to_q", "to_k", "to_v")


@pytest.mark.parametrize(
    ("metadata", "alpha", "user", "scale"),
    [
        ({}, 3.0, None, 0.5), ({}, None, None, 1.0), ({}, 3.0, Fraction(12), 2.0), ({}, None, Fraction(12), 2.0),
        ({"ss_network_alpha": "1.5"}, None, None, 0.25), ({"ss_network_alpha": "12"}, None, None, 2.0),
        ({"ss_network_alpha": "1.5"}, 3.0, None, 0.5), ({"ss_network_alpha": "None"}, None, None, 1.0),
        ({"ss_network_alpha": "1.5"}, None, Fraction(12), 2.0), ({"ss_network_alpha": "1."}, None, None, 1.0),
    ],
)  # fmt: skip
def test_the_alpha_of_kohya_is_the_users_the_tensors_the_headers_or_the_rank(
    read: Read, metadata: Any, alpha: Any, user: Any, scale: float
) -> None:
    up, down = normal(5, RANK), normal(RANK, IN)
    tensors = read(kohya("double_blocks_3_img_attn_proj", up, down, alpha))
    assert_same(pairs_of("kohya", [tensors], metadata, None, user), {f"{ATTENTION}to_out.0": scale * up @ down})


def test_the_alpha_of_diffusion_pipe_stands_in_its_settings(read: Read) -> None:
    up, down = normal(5, RANK), normal(RANK, IN)
    for begin in ("diffusion_model.", "transformer."):
        name = f"{begin}double_blocks.3.img_attn.proj"
        tensors = read({f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up})
        for settings, user, scale in (
            ({"lora_alpha": 3}, None, 0.5),
            ({}, None, 1.0),
            ({"lora_alpha": 3}, Fraction(6), 1.0),
        ):
            found = pairs_of("diffusion-pipe", [tensors], {}, settings, user)
            assert_same(found, {f"{ATTENTION}to_out.0": scale * up @ down})


@pytest.mark.parametrize("blocks", [False, True])
def test_a_fused_projection_is_dealt_out_by_rows(read: Read, blocks: bool) -> None:
    """And where every third has columns of its own, the others zero, each has that third of the rank."""
    up, down = normal(12, RANK), normal(RANK, IN)
    if blocks:
        up = np.concatenate([np.pad(normal(4, 2), ((0, 0), (2 * n, 4 - 2 * n))) for n in range(3)])
    pairs = pairs_of("kohya", [read(kohya(QKV, up, down, 3))], {}, None, None)
    assert_same(pairs, {f"{ATTENTION}{m}": 0.5 * up[4 * n : 4 * n + 4] @ down for n, m in enumerate(OURS)})
    assert {p.shape for p in pairs.values()} == {(4, 2 if blocks else 6, IN)}
    trained = pairs_of(
        "kohya", [read(kohya(QKV, up, down, 3))], {"ss_network_args": '{"split_qkv": "True"}'}, None, None
    )
    factor = 3 if blocks else 1
    assert_same(trained, {m: factor * d for m, d in deltas(pairs).items()})


def test_a_block_that_is_zero_is_no_module_and_one_block_alone_is_no_diagonal(read: Read) -> None:
    up, down = np.zeros((12, RANK), np.float32), normal(RANK, IN)
    up[:4, :2], up[8:, 4:] = normal(4, 2), normal(4, 2)
    halved = down.copy()
    halved[2:4] = 0
    pairs = pairs_of("kohya", [read(kohya(QKV, up, halved))], {}, None, None)
    assert_same(pairs, {f"{ATTENTION}to_q": up[:4] @ down, f"{ATTENTION}to_v": up[8:] @ down})
    kept = pairs_of("kohya", [read(kohya(QKV, up, down))], {}, None, None)
    assert set(kept) == {f"{ATTENTION}{m}" for m in OURS}
    up[8:] = 0
    alone = pairs_of("kohya", [read(kohya(QKV, up, down))], {}, None, None)
    assert {p.shape[1] for p in alone.values()} == {RANK}
    odd = pairs_of("kohya", [read(kohya(QKV, up[:, :4], down[:4]))], {}, None, None)
    assert {p.shape[1] for p in odd.values()} == {4}


def test_unequal_shares_and_swapped_halves_are_dealt_out(read: Read) -> None:
    up, down = normal(14, RANK), normal(RANK, IN)
    tensors = read(kohya("single_blocks_2_linear1", up, down) | kohya("final_layer_adaLN_modulation_1", up, down))
    single = "single_transformer_blocks.2."
    right = {f"{single}attn.{m}": up[2 * n : 2 * n + 2] @ down for n, m in enumerate(OURS)}
    right |= {f"{single}proj_mlp": up[6:] @ down, "norm_out.linear": np.concatenate([up[7:], up[:7]]) @ down}
    assert_same(pairs_of("kohya", [tensors], {}, None, None), right)


@pytest.mark.parametrize(("rows", "swapped"), [(2 * IN, True), (6 * IN, False)])
def test_the_last_block_of_sd3_has_a_modulation_of_its_own(read: Read, rows: int, swapped: bool) -> None:
    up, down = normal(rows, RANK), normal(RANK, IN)
    tensors = read(kohya("joint_blocks_7_context_block_adaLN_modulation_1", up, down))
    right = np.concatenate([up[IN:], up[:IN]]) if swapped else up
    found = pairs_of("kohya", [tensors], {}, None, None)
    assert_same(found, {"transformer_blocks.7.norm1_context.linear": right @ down})


@pytest.mark.parametrize("name", [QKV, "double_blocks_3_img_attn_proj", "final_layer_adaLN_modulation_1"])
def test_a_whole_difference_is_dealt_out_too(read: Read, name: str) -> None:
    whole = normal(12, IN)
    pairs = pairs_of(
        "kohya", [read({f"lora_unet_{name}.diff": whole, f"lora_unet_{name}.diff_b": whole[:, 0]})], {}, None, None
    )
    parts: dict[str, Any] = {f"{ATTENTION}to_out.0": whole}
    if name == QKV:
        parts = {f"{ATTENTION}{m}": whole[4 * n : 4 * n + 4] for n, m in enumerate(OURS)}
    elif "final" in name:
        parts = {"norm_out.linear": np.concatenate([whole[6:], whole[:6]])}
    assert_same(pairs, parts | {f"{m}.bias": part[:, :1] for m, part in parts.items()})


@pytest.mark.parametrize("lost", ["lora_down", "lora_up", "both"])
def test_a_module_that_is_not_whole_or_of_another_kind_is_not_covered(read: Read, lost: str) -> None:
    tensors = kohya(QKV, normal(12, RANK), normal(RANK, IN), 3)
    kept = {n: a for n, a in tensors.items() if lost not in n and (lost != "both" or n.endswith("alpha"))}
    with pytest.raises(ProofFailed, match=f"does not cover: lora_unet_{QKV}"):
        pairs_of("kohya", [read(kept)], {}, None, None)
    for strange in ("lora_unet_x.weird", "other.lora_down.weight"):
        with pytest.raises(ProofFailed, match="does not cover"):
            pairs_of("kohya", [read(tensors | {strange: np.float32([1])})], {}, None, None)


def test_rank_and_alpha_patterns_fit_the_end_of_a_name() -> None:
    config = {"r": 4, "lora_alpha": 8, "rank_pattern": {"q": 2, r"^a\.k": 3}, "alpha_pattern": {r"a\..*": 7}}
    assert [by_pattern(config, "r", m) for m in ("q", "a.q", "aq", "a.k", "b.a.k", "x")] == [2, 2, 4, 3, 4, 4]
    assert [by_pattern(config, "lora_alpha", m) for m in ("a.x", "b.a.x", "x")] == [7, 7, 8]
    assert by_pattern({"r": 4, "rank_pattern": None}, "r", "q") == 4


@pytest.mark.parametrize(
    ("config", "rank", "user", "scale"),
    [
        ({}, 4, None, 1), ({"lora_alpha": 2}, 4, None, Fraction(1, 2)), ({"lora_alpha": 2}, 4, Fraction(8), 2),
        ({"lora_alpha": 2, "use_rslora": True}, 4, None, 1),
        ({"lora_alpha": 2, "use_rslora": True}, 3, None, 2 / np.sqrt(3)),
        ({"lora_alpha": 2, "use_rslora": False}, 4, None, Fraction(1, 2)),
    ],
)  # fmt: skip
def test_the_scale_of_peft(read: Read, config: Any, rank: int, user: Any, scale: Any) -> None:
    begin = "base_model.model.x."
    arrays = {f"{begin}lora_A.weight": normal(rank, IN), f"{begin}lora_B.weight": normal(5, rank)}
    bias = normal(5)
    pairs = pairs_of("peft", [read(arrays | {f"{begin}lora_B.bias": bias})], {}, config, user)
    assert {m: p.scale for m, p in pairs.items()} == {"x": scale, "x.bias": scale}
    assert_same({"x.bias": pairs["x.bias"]}, {"x.bias": float(scale) * bias[:, None]})


# --- the proof of an adapter ------------------------------------------------------------------------------------------


def test_bytes_are_counted_where_dtype_and_scale_stay(read: Read) -> None:
    arrays = {f"{m}.{s}": normal(3, 3) for m in "ab" for s in ("down", "up")}
    one, two = read(arrays), read(arrays)
    spoilt = read(arrays | {"b.up": arrays["b.up"] + 1})

    def pairs(tensors: Any, scale: Any = 1) -> dict[str, Pair]:
        return {m: Pair(tensors[f"{m}.down"], tensors[f"{m}.up"], Fraction(scale)) for m in "ab"}

    expected = Expectation(pairs(one), dict.fromkeys("ab", ("F32", "F32")))
    names, copied, numbers = check_adapter(expected, pairs(two))
    assert names == Check("L0", "every module, shape and dtype", True, 2)
    assert copied == Check("L1", "bytes of factors that are only renamed", True, 4)
    assert (numbers.passed, numbers.figure, numbers.bound) == (True, 0.0, 0.0)
    assert numbers.detail == "2 of 2 equal number for number"
    _, copied, numbers = check_adapter(expected, pairs(spoilt))
    assert (copied.passed, copied.count, copied.detail) == (False, 4, "other bytes in b.up")
    assert (numbers.passed, numbers.detail) == (False, "another delta in b")
    _, copied, numbers = check_adapter(expected, pairs(two, 2))
    assert (copied.passed, copied.count) == (True, 2)
    assert numbers.detail == "another delta in a; b"
    other = Expectation(pairs(one), {"a": ("F32", "F32"), "b": ("F32", "F16")})
    (names,) = check_adapter(other, pairs(two))
    assert (names.passed, names.detail) == (False, "missing, unexpected or of another shape: b")
    (names,) = check_adapter(expected, {"a": pairs(two)["a"], "c": pairs(two)["b"]})
    assert names.detail == "missing, unexpected or of another shape: b; c"
    assert prove_adapter(expected, {"a": pairs(two)["a"]}, scale_ignored=True).checks == (
        Check("L0", "every module, shape and dtype", False, 2, detail="missing, unexpected or of another shape: b"),
    )
    at_one = prove_adapter(expected, pairs(two), scale_ignored=True).checks[-1]
    assert at_one.passed
    halved = Expectation(pairs(one, Fraction(1, 2)), expected.dtypes)
    assert not prove_adapter(halved, pairs(two, Fraction(1, 2)), scale_ignored=True).checks[-1].passed
    assert prove_adapter(halved, pairs(two, Fraction(1, 2)), scale_ignored=False).passed


def test_of_many_modules_four_are_named() -> None:
    names = list("abcdef")
    one = {m: Pair(Held(np.ones((1, 2)), "F32"), Held(np.ones((2, 1)), "F32"), Fraction(1)) for m in names}
    twice = {m: replace(p, scale=Fraction(2)) for m, p in one.items()}
    expected = Expectation(one, dict.fromkeys(names, ("F32", "F32")))
    assert check_adapter(expected, twice)[2].detail == "another delta in a; b; c; d"
    assert check_adapter(expected, {})[0].detail == "missing, unexpected or of another shape: a; b; c; d"
    record = check_origin(one, {"": {"alpha": "2", "rank": 1}}, {})
    assert record.detail == "another alpha or rank than the source has: a; b; c; d"
    seen = [SimpleNamespace(module=m, faults=("x",)) for m in names]
    assert named_check("L2", "x", seen) == Check("L2", "x", False, 6, detail="a; b; c; d")  # type: ignore[arg-type]
    assert named_check("L2", "y", seen) == Check("L2", "y", True, 6)  # type: ignore[arg-type]


# --- what stands beside -----------------------------------------------------------------------------------------------


def test_what_was_set_aside_takes_no_pair_apart(read: Read) -> None:
    names = ["a.lora_A.weight", "a.lora_B.weight", "a.alpha", "b.lora_A.weight", "b.lora_B.weight", "x", "y"]
    source = read({name: normal(2) for name in names})
    assert list(check_aside(SetAside(), source, {})) == []
    a, whole = ("a.lora_A.weight", "a.lora_B.weight", "a.alpha"), "keys left behind on purpose"
    assert list(check_aside(SetAside(a), source, {})) == [
        Check("L0", whole, True, 3, detail="left behind: a.lora_A.weight; a.lora_B.weight; a.alpha")
    ]
    for dropped in (a[:1], a[:2], a[2:]):
        (check,) = check_aside(SetAside(dropped), source, {})
        assert not check.passed
        assert check.detail == f"not in the source, or half of a pair: {'; '.join(dropped)}"
    (check,) = check_aside(SetAside(("x", "z")), source, {})
    assert (check.passed, check.count, check.detail) == (False, 2, "not in the source, or half of a pair: z")
    kept = SetAside(kept=("x", "y"))
    assert set(kept.rest(source)) == set(names) - {"x", "y"}
    right = {name: source[name] for name in ("x", "y")}
    assert list(check_aside(kept, source, right)) == [
        Check("L1", "bytes of unknown tensors that are kept", True, 2, detail="kept: x; y")
    ]
    for wrong, bad in (({"x": source["x"]}, "y"), ({"x": source["y"], "y": source["y"]}, "x")):
        (check,) = check_aside(kept, source, wrong)
        assert (check.passed, check.detail) == (False, f"missing, or other bytes: {bad}")


def test_a_record_says_alpha_and_rank_of_every_module() -> None:
    pairs = {m: Pair(Held(np.ones((4, 2)), "F32"), Held(np.ones((2, 4)), "F32"), Fraction(1, 2)) for m in "ab"}
    right = {"alpha": "2", "rank": 4}
    for written in ({"": right}, {"a": right, "b": right}, {"": {"alpha": "9", "rank": 9}, "a": right, "b": right}):
        assert check_origin(pairs, written, {}) == Check("L0", "the recorded alpha and rank", True, 2)
    for wrong in ({"alpha": "3", "rank": 4}, {"alpha": "2", "rank": 5}, {"alpha": "2", "rank": 4.0}, 7, None):
        check = check_origin(pairs, {"": right, "b": wrong}, {})
        assert (check.passed, check.detail) == (False, "another alpha or rank than the source has: b")
    earlier = {"alpha": "8", "rank": 16}
    for source, passed in (({"": earlier}, True), ({"b": earlier}, True), ({"a": earlier}, False), ({}, False)):
        assert check_origin(pairs, {"": right, "b": earlier}, source).passed is passed
    assert not check_origin(pairs, {"": right, "b": earlier}, {"": earlier | {"rank": 8}}).passed


def test_names_of_a_llava_run_lose_the_wrapper_and_nothing_else() -> None:
    a: Any = SimpleNamespace()
    names = {
        "base_model.model.model.mm.0": "model.mm.0",
        "model.mm.1": "model.mm.1",
        "x.base_model.model.y": "x.base_model.model.y",
    }
    assert list(trained_beside(dict.fromkeys(names, a))) == list(names.values())
    assert list(trained_beside({"base_model.model.": a})) == ["base_model.model."]


def test_the_dtype_of_a_model_is_that_of_most_bytes(read: Read) -> None:
    small, large = np.zeros(3, np.float32), np.zeros(5, np.float16)
    assert main_dtype(read({"a": small, "b": large, "i": np.zeros(99, np.int64)})) == "F32"
    assert main_dtype(read({"a": small, "b": np.zeros(7, np.float16)})) == "F16"


def test_a_vision_tower_alone_or_in_a_whole_clip_has_llavas_names(read: Read) -> None:
    inner = ["embeddings.patch.weight", "encoder.layers.0.w", "pre_layrnorm.weight", "post_layernorm.bias"]
    here = {f"model.vision_tower.vision_tower.vision_model.{name}" for name in inner}
    one = np.zeros(1, np.float32)
    alone = dict.fromkeys([*inner, "embeddings.position_ids", "logit_scale"], one)
    assert set(tower_beside(read(alone))) == here
    whole = {f"vision_model.{name}": one for name in [*inner, "embeddings.position_ids"]}
    assert set(tower_beside(read(whole | {"encoder.text": one, "text_model.x": one}))) == here


def test_the_image_token_has_one_row_of_zeros(read: Read) -> None:
    table = normal(5, 2)
    expected = read(
        {"model.embed_tokens.weight": table, "lm_head.weight": table, "model.mm_projector.2.bias": normal(2)}
    )
    names = {"language_model.model.embed_tokens.weight": "model.embed_tokens.weight",
             "language_model.lm_head.weight": "lm_head.weight"}  # fmt: skip
    more = {"multi_modal_projector.linear_1.bias": normal(2), "multi_modal_projector.linear_2.bias": normal(2),
            "vision_tower.vision_model.x": normal(2), "other": normal(2)}  # fmt: skip
    rows = {
        "right": np.zeros((1, 2)),
        "two": np.zeros((2, 2)),
        "none": np.zeros((0, 2)),
        "not zero": np.array([[0, 1]]),
    }
    for case, added in rows.items():
        grown = np.concatenate([table, added]).astype(np.float32)
        found, check = as_original(read(dict.fromkeys(names, grown) | more), expected)
        assert set(found) == {
            *names.values(), "model.mm_projector.0.bias", "model.mm_projector.2.bias",
            "model.vision_tower.vision_tower.vision_model.x", "other",
        }  # fmt: skip
        assert (check.level, check.passed, check.count) == ("L1", case == "right", 2)
        assert check.detail == ("" if case == "right" else "model.embed_tokens.weight; lm_head.weight")
        assert np.array_equal(values(found["lm_head.weight"]), table)
    shorter = read(dict.fromkeys(names, table[:4]))
    assert not as_original(shorter, expected)[1].passed
    assert not as_original(read({"other": normal(2)}), expected)[1].passed


# --- keys as they stand -----------------------------------------------------------------------------------------------


def test_keys_are_sorted_into_factors_names_in_memory_and_magnitudes(read: Read) -> None:
    tensors = read({
        "transformer.q.lora_A.default.weight": normal(2), "transformer.q.lora_A.weight": normal(2),
        "transformer.k.lora_A.mine.weight": normal(2), "transformer.k.lora_magnitude_vector": normal(3),
        "transformer.v.lora_magnitude_vector.default.weight": normal(3), "x.dora_scale": np.zeros(3, np.int64),
    })  # fmt: skip
    keys = sort_keys(tensors)
    assert keys.in_memory == {"transformer.k.lora_A.mine.weight": "mine"}
    assert set(keys.plain) == {
        "transformer.q.lora_A.default.weight", "transformer.q.lora_A.weight", "transformer.k.lora_A.weight",
        "x.dora_scale",
    }  # fmt: skip
    assert set(keys.magnitudes) == {"k", "v"}


@pytest.mark.parametrize(
    ("adapter", "kind", "prefix", "settings", "slugs"),
    [
        ("", "diffusers", "transformer.", False, []), ("", "peft", "base_model.model.", True, []),
        ("default", "peft", "base_model.model.", True, []),
        ("mine", "peft", "base_model.model.", True, ["in-memory-names"]),
        ("default", "diffusers", "transformer.", False, ["in-memory-names"]),
        ("", "diffusers", "", False, ["no-prefix"]), ("", "diffusers", "transformer.", True, ["peft-prefix"]),
        ("", "peft", "base_model.model.", False, ["foreign-prefix"]),
        ("", "kohya", "", True, []),
    ],
)  # fmt: skip
def test_what_consumers_pass_over_is_told(
    read: Read, adapter: str, kind: str, prefix: str, settings: bool, slugs: list[str]
) -> None:
    middle = f".{adapter}" if adapter else ""
    keys = sort_keys(read({f"{prefix}q.lora_{s}{middle}.weight": normal(2) for s in "AB"}))
    found = list(passed_over(keys, kind, prefix, settings))
    assert [f.slug for f in found] == slugs
    assert all(len(f.modules) == 2 for f in found)


@pytest.mark.parametrize("adapter", ["", ".mine"])
def test_what_is_converted_anew_is_the_file_whose_names_can_be_read(read: Read, adapter: str) -> None:
    keys = sort_keys(read({f"q.lora_{s}{adapter}.weight": normal(2) for s in "AB"}))
    (found,) = [f for f in passed_over(keys, "diffusers", "", False) if f.slug == "no-prefix"]
    assert found.mend == f"loraconv convert {'{one}' if adapter else '{other}'} -o OUT --to diffusers"


def test_magnitudes_are_dealt_out_like_the_rows_that_they_scale(read: Read) -> None:
    size = normal(12)
    found = magnitudes_of(read({f"lora_unet_{QKV}": size}))
    assert {m: values(t).tolist() for m, t in found.items()} == {
        f"{ATTENTION}{m}": size[4 * n : 4 * n + 4].astype(np.float64).tolist() for n, m in enumerate(OURS)
    }
    columns = magnitudes_of(read({f"lora_unet_{QKV}": size[None]}))
    # Of columns there is one norm over the rows of all parts, which is that of no part.
    assert {m: values(t).shape for m, t in columns.items()} == {" and ".join(f"{ATTENTION}{m}" for m in OURS): (1, 12)}
    whole = magnitudes_of(
        read({"lora_unet_double_blocks_3_img_attn_proj": size, "lora_unet_double_blocks_3_img_mlp_0": size})
    )
    assert set(whole) == {f"{ATTENTION}to_out.0", "transformer_blocks.3.ff.net.0.proj"}
    assert list(magnitudes_of(read({"base_model.model.a.q": size}))) == ["a.q"]


def test_the_magnitudes_of_an_output_are_those_of_the_source() -> None:
    one: Any = {"q": Held(np.array([1.0, 3.0]), "F32"), "k": Held(np.array([1.0]), "F32")}
    assert check_magnitudes(one, dict(one)) == Check("L1", "magnitudes of DoRA", True, 2)
    assert "lost" in check_magnitudes(one, {"q": one["q"]}).detail
    assert "only the second" in check_magnitudes({"q": one["q"]}, one).detail
    narrow = one | {"q": Held(np.array([1.0, 3.0]), "F16")}
    assert check_magnitudes(one, narrow) == Check("L1", "magnitudes of DoRA", False, 2, detail="in another dtype")
