"""Parts of the verifier that a whole run seldom reaches: each against its definition, or against a mistake of ours."""

from __future__ import annotations

import json
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file

import loraconv
from loraconv.errors import ProofFailed
from loraconv.registry import dialects
from loraconv.verifier.changes.renames import match_content, match_names
from loraconv.verifier.config import expected_config
from loraconv.verifier.consumers.inputs import COMPUTE, described, distance, make_inputs, rounding_bound
from loraconv.verifier.consumers.prediction import read_with
from loraconv.verifier.consumers.reading import AdapterFile, Reading
from loraconv.verifier.consumers.recorded import ForwardCheck, compare_forward
from loraconv.verifier.consumers.table import CONSUMERS
from loraconv.verifier.controls import adapter_controls, comparison_controls
from loraconv.verifier.delta import compare_adapters, delta_norm, relative_room
from loraconv.verifier.fused.controls import OneBit
from loraconv.verifier.fused.figures import LAYOUT, Figures, spacing
from loraconv.verifier.fused.figures import truncated as cut_off
from loraconv.verifier.loadable import adapter_file
from loraconv.verifier.numbers import HALF_ULP, Expectation, Held, Pair, compare, relative_error
from loraconv.verifier.oracles import peft_pairs, rank_distances, sat_pairs
from loraconv.verifier.origin import source_record
from loraconv.verifier.positions import agrees
from loraconv.verifier.spelled import compare_magnitudes
from tests.conftest import Converted
from tests.support import LORA_FILE, RECORDED

MODULES = [f"transformer_blocks.{layer}.attn1.{name}" for layer in (0, 1) for name in ("to_q", "to_k")]


def pairs(seed: int = 0, out: int = 6, into: int = 8) -> dict[str, Pair]:
    rng = np.random.default_rng(seed)
    return {
        module: Pair(Held(rng.normal(size=(2, into)), "F32"), Held(rng.normal(size=(out, 2)), "F32"), Fraction(1, 2))
        for module in MODULES
    }


# --- controls -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("out", "into"), [(6, 8), (8, 8)], ids=["oblong", "square"])
def test_a_proof_that_sees_nothing_misses_every_control(out: int, into: int) -> None:
    given = pairs(out=out, into=into)
    expected = Expectation(given, dict.fromkeys(given, ("F32", "F32")))
    controls = adapter_controls(expected, given, lambda part, spoilt: "")
    assert len(controls) == 8
    assert [control.caught for control in controls] == [False] * 8


@pytest.mark.parametrize(("up", "down"), [(0.0, np.nan), (np.nan, 1.0), (0.0, 1.0)])
def test_a_mistake_that_leaves_every_number_or_nan_as_it_is_is_harmless(up: float, down: float) -> None:
    given = {m: Pair(Held(np.full((2, 8), down), "F32"), Held(np.full((6, 2), up), "F32"), 1) for m in MODULES}
    expected = Expectation(given, dict.fromkeys(given, ("F32", "F32")))
    controls = {c.name: c.caught for c in adapter_controls(expected, given, lambda part, spoilt: "")}
    harmless = {"scale doubled", "scale divided by rank", "up zeroed", "stored in a lower precision"}
    harmless |= {"q and k swapped", "layers shifted by one"}  # every module is the same here
    assert {name for name, caught in controls.items() if caught is None} == harmless


def test_a_comparison_with_a_bound_that_lets_everything_pass_misses_what_the_bound_lets_pass() -> None:
    given = pairs()
    results = compare_adapters(given, pairs(seed=1), bound=100.0)
    assert all(result.same and not result.equal for result in results)
    missed = {c.name for c in comparison_controls(given, pairs(seed=1), results, 100.0) if c.caught is False}
    assert missed >= {"q and k swapped", "scale doubled", "up zeroed"}
    assert "a module dropped" not in missed


class Pieces:
    """A tensor of two pieces."""

    dtype, shape = "U8", (5,)

    def pieces(self) -> Iterator[bytes]:
        yield b"\x02\x03"
        yield b"\x04\x05\x06"

    def leaves(self) -> Iterator[str]:
        yield "leaf"


def test_one_bit_turned_is_one_bit_and_the_rest_stays() -> None:
    spoilt = OneBit(Pieces())  # type: ignore[arg-type]
    assert b"".join(spoilt.pieces()) == b"\x03\x03\x04\x05\x06"
    assert (spoilt.dtype, spoilt.shape) == ("U8", (5,))


# --- numbers, oracles, records ------------------------------------------------------------------------------------

TORCH = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


@pytest.mark.parametrize("dtype", TORCH)
def test_units_and_exponents_are_those_of_the_dtypes(dtype: str) -> None:
    told = torch.finfo(TORCH[dtype])
    assert set(HALF_ULP) == set(LAYOUT) == set(TORCH)
    # Half of float64's smallest number is none.
    assert HALF_ULP[dtype] == (told.eps / 2, told.tiny * told.eps / 2 or told.tiny * told.eps)
    digits, least, greatest = LAYOUT[dtype]
    assert (2.0**-digits, 2.0**least, (2 - 2.0**-digits) * 2.0**greatest) == (told.eps, told.tiny, told.max)


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
def test_the_room_of_a_stored_number_is_half_a_unit_and_hardly_more(dtype: str) -> None:
    """A number halfway between two stored ones is within the room of both; a little farther away it is not."""
    unit = torch.finfo(TORCH[dtype]).eps
    halfway, pasted = np.array([1 + unit / 2]), np.array([1 + unit * 0.51])
    for exact, right in ((halfway, True), (pasted, False)):
        one = Pair(Held(np.ones((1, 1)), dtype), Held(exact[None], "F64"), 1)
        other = Pair(Held(np.ones((1, 1)), dtype), Held(np.ones((1, 1)), dtype), 1)
        assert compare(one, other).within is right


def test_the_figures_of_two_blocks_add_up_and_the_worst_row_is_that_of_the_worse() -> None:
    one = Figures(1, 2, 3, 4, 5, 6, 7.0, 8.0, 9.0, 10.0, worst_row=11, worst=3)
    other = Figures(10, 20, 30, 40, 50, 60, 2.0, 80.0, 90.0, 100.0, worst_row=99, worst=4)
    for both in (one + other, other + one):
        assert both == Figures(11, 22, 33, 44, 55, 66, 7.0, 88.0, 99.0, 110.0, worst_row=99, worst=4)
    assert (one + Figures(worst_row=50, worst=3)).worst_row == 11
    assert sum([one, other], Figures()) == one + other
    assert Figures() + Figures(worst_row=50) == Figures(worst_row=0)


@pytest.mark.parametrize(
    ("figures", "right"),
    [
        (Figures(elements=1000, changed=1000), True),
        (Figures(elements=1000, changed=1000, wrong=1), True),
        (Figures(elements=1000, changed=1000, wrong=2), False),
        (Figures(elements=10_000, changed=10, wrong=1), True),
        (Figures(elements=10_000, changed=9, wrong=1), False),
        (Figures(elements=1000, changed=1000, wrong=1, far=1), False),
        (Figures(), True),
    ],
)
def test_few_numbers_may_be_off_by_one_unit_and_none_farther(figures: Figures, right: bool) -> None:
    assert figures.rounded_once is right


def test_error_and_share_of_the_delta_are_relative_to_it() -> None:
    figures = Figures(along=6.0, size=4.0, rest=36.0)
    assert (figures.error, figures.kept) == (3.0, 1.5)
    assert (Figures(rest=36.0).error, Figures(rest=36.0).kept) == (6.0, None)


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
def test_numbers_are_cut_off_towards_zero(dtype: str) -> None:
    unit = torch.finfo(TORCH[dtype]).eps
    exact = np.array([1 + 0.9 * unit, -1 - 0.9 * unit, 1 + 0.1 * unit, 2 - 0.1 * unit, 1.0, 0.0, -(1 - 0.1 * unit)])
    right = [1.0, -1.0, 1.0, 2 - unit, 1.0, 0.0, -(1 - 0.5 * unit)]
    assert cut_off(exact, dtype).tolist() == right


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
def test_half_the_gap_and_one_unit_of_a_number(dtype: str) -> None:
    """Below a power of two the numbers stand twice as close; below the smallest normal number no closer."""
    unit, tiny = torch.finfo(TORCH[dtype]).eps, torch.finfo(TORCH[dtype]).tiny
    stored = np.array([1.0, 1.0, -1.0, 1.5, tiny, 0.0])
    exact = np.array([1.0 + unit / 8, 1.0 - unit / 8, -1.0 + unit / 8, 1.4, tiny * 0.9999, tiny * unit / 8])
    half, one = spacing(stored, exact, dtype)
    assert half.tolist() == [unit / 2, unit / 4, unit / 4, unit / 2, tiny * unit / 2, tiny * unit / 2]
    assert one.tolist() == [unit, unit / 2, unit / 2, unit, tiny * unit, tiny * unit]


def test_what_two_factorings_may_differ_by_follows_from_the_roundings_of_the_factors() -> None:
    """For factors of one element: each may be off by half a unit, relative."""
    pair = Pair(Held(np.array([[3.0]]), "F16"), Held(np.array([[-5.0]]), "F16"), Fraction(1, 2))
    half = 2.0**-11
    assert delta_norm(pair) == 7.5
    assert relative_room(pair) == pytest.approx(2 * half + half * half, rel=1e-5)
    assert relative_room(pair, "BF16") == pytest.approx(2 * 2.0**-8 + 2.0**-16, rel=1e-5)


def test_pairs_of_other_shapes_are_infinitely_far_apart() -> None:
    assert relative_error(pairs()[MODULES[0]], pairs(out=7)[MODULES[0]]) == (float("inf"), 0.0)


def held(*shape: int) -> Any:
    return Held(np.ones(shape), "F32")


def test_a_factor_that_the_definition_of_sat_does_not_have_is_refused() -> None:
    layer = "model.diffusion_model.transformer.layers.0."
    good = {f"{layer}attention.dense.matrix_{side}.0": held(2, 2) for side in "AB"}
    assert list(sat_pairs([good], {}, None, None)) == ["transformer_blocks.0.attn1.to_out.0"]
    with pytest.raises(ProofFailed, match="does not cover"):
        sat_pairs([good | {f"{layer}mlp.dense_h_to_4h.matrix_A.0": held(2, 2)}], {}, None, None)


@pytest.mark.parametrize("name", ["q.lora_C.weight", "q.lora_A.bias", "k.lora_A.weight"])
def test_a_key_that_the_definition_of_peft_does_not_have_is_refused(name: str) -> None:
    good = {f"base_model.model.q.lora_{side}.weight": held(2, 2) for side in "AB"}
    assert list(peft_pairs([good], {}, {}, None)) == ["q"]
    with pytest.raises(ProofFailed, match="does not cover"):
        peft_pairs([good | {f"base_model.model.{name}": held(2, 2)}], {}, {}, None)


class Stored:
    """A float64 tensor in one piece."""

    dtype = "F64"

    def __init__(self, array: Any) -> None:
        self.array, self.shape = array, array.shape

    def pieces(self) -> Iterator[bytes]:
        yield self.array.tobytes()


@pytest.mark.parametrize(("kind", "name"), [("query_key_value", "to_q"), ("dense", "to_out.0")])
def test_how_far_the_nearest_adapter_is_from_what_each_rank_computed(kind: str, name: str) -> None:
    """Of q, a rank makes half of the rows; of the output projection it sees half of the columns, and adds nothing for
    the others. The nearest adapter to both is the mean of what they make."""
    rng = np.random.default_rng(3)
    downs, ups = rng.normal(size=(2, 2, 6)), rng.normal(size=(2, 5, 2))
    place = f"model.diffusion_model.transformer.layers.0.attention.{kind}.matrix_"
    ranks: Any = [{f"{place}A.0": Stored(a), f"{place}B.0": Stored(b)} for a, b in zip(downs, ups, strict=True)]
    gaps = []
    for rank in (0, 1):
        own = ups[rank] @ downs[rank]
        if kind == "query_key_value":
            gap = own - ups[rank] @ downs.mean(axis=0)
        else:
            seen = np.concatenate([own * (rank == 0), own * (rank == 1)], axis=1)
            gap = seen - ups.mean(axis=0) @ np.concatenate(downs, axis=1) / 2
        gaps.append(np.linalg.norm(gap) / np.linalg.norm(own))
    assert rank_distances(ranks) == {name: pytest.approx(max(gaps), rel=1e-9)}


@pytest.mark.parametrize("damaged", ["", "[1]", "3", '{"": ', "[" * 100_000])
def test_a_damaged_record_of_the_source_is_none(damaged: str) -> None:
    assert source_record({"loraconv.origin": damaged}, None) == {}
    entry = {"": {"alpha": "1", "rank": 4}}
    assert source_record({"loraconv.origin": json.dumps(entry)}, None) == entry
    assert source_record({}, {"loraconv": {"origin": entry}}) == entry


#: config.json of THUDM/CogVideoX-2b and of the transformer of THUDM/CogVideoX1.5-5B-I2V.
TWO_B = {
    "_class_name": "CogVideoXTransformer3DModel", "activation_fn": "gelu-approximate", "attention_bias": True,
    "attention_head_dim": 64, "dropout": 0.0, "flip_sin_to_cos": True, "freq_shift": 0, "in_channels": 16,
    "max_text_seq_length": 226, "norm_elementwise_affine": True, "norm_eps": 1e-05, "num_attention_heads": 30,
    "num_layers": 30, "ofs_embed_dim": None, "out_channels": 16, "patch_bias": True, "patch_size": 2,
    "patch_size_t": None, "sample_frames": 49, "sample_height": 60, "sample_width": 90,
    "spatial_interpolation_scale": 1.875, "temporal_compression_ratio": 4, "temporal_interpolation_scale": 1.0,
    "text_embed_dim": 4096, "time_embed_dim": 512, "timestep_activation_fn": "silu",
    "use_learned_positional_embeddings": False, "use_rotary_positional_embeddings": False,
}  # fmt: skip
ONE_AND_A_HALF = TWO_B | {
    "in_channels": 32, "num_attention_heads": 48, "num_layers": 42, "ofs_embed_dim": 512, "patch_bias": False,
    "patch_size_t": 2, "sample_frames": 81, "sample_height": 300, "sample_width": 300,
    "use_rotary_positional_embeddings": True,
}  # fmt: skip


@pytest.mark.parametrize("released", [TWO_B, ONE_AND_A_HALF], ids=["2B", "1.5 I2V"])
def test_a_released_model_without_settings_has_the_released_configuration(released: dict[str, Any]) -> None:
    width, depth = released["num_attention_heads"] * 64, released["patch_size_t"] or 1
    shapes: dict[str, tuple[int, ...]] = {
        "mixins.final_layer.linear.weight": (16 * 2 * 2 * depth, width),
        "mixins.adaln_layer.query_layernorm_list.0.weight": (64,),
        "mixins.patch_embed.proj.weight": (width, released["in_channels"], depth, 2, 2),
        "mixins.patch_embed.text_proj.weight": (width, 4096),
        "time_embed.0.weight": (512, width),
        "transformer.final_layernorm.weight": (width,),
    }
    shapes |= {f"transformer.layers.{n}.input_layernorm.weight": (width,) for n in range(released["num_layers"])}
    shapes |= {"mixins.pos_embed.freqs_sin": (1, 64)} if released["use_rotary_positional_embeddings"] else {}
    shapes |= {"ofs_embed.0.weight": (512, 512)} if released["ofs_embed_dim"] else {}
    tensors: Any = {f"model.diffusion_model.{n}": SimpleNamespace(shape=shape) for n, shape in shapes.items()}
    assert expected_config(tensors, None) == released


def test_a_table_of_positions_of_another_size_is_another_table() -> None:
    config = {
        "num_attention_heads": 2, "attention_head_dim": 8, "patch_size": 2, "sample_frames": 9,
        "sample_height": 4, "sample_width": 6, "temporal_compression_ratio": 4, "max_text_seq_length": 5,
    }  # fmt: skip
    right = (1, 5 + 3 * 2 * 3, 16)
    for shape in (right[1:], (1, right[1] + 1, 16), (1, right[1], 8)):
        fine, gap, _ = agrees(SimpleNamespace(dtype="F32", shape=shape), config)  # type: ignore[arg-type]
        assert (fine, gap) == (False, float("inf"))


LOST_TABLES: dict[str, tuple[str, Any, str]] = {
    "whole numbers": ("pos_embed.table", np.arange(12).reshape(3, 4), "table-lost"),
    "a single row": ("pos_embed.table", np.ones(4, np.float32), "table-lost"),
    "no columns": ("pos_embed.table", np.ones((3, 0), np.float32), "table-lost"),
    "sines beside cosines": ("pos_embed.table", np.array([[0, 0], [0.6, 0.8]], np.float32), "table-uncomputed"),
    "ones, which are no sines and cosines": ("pos_embed.table", np.ones((3, 4), np.float32), "table-lost"),
    "frequencies by their name": ("rope.inv_freq", np.array([1, 0.1], np.float32), "table-uncomputed"),
    "cosines by their name": ("rope.freqs_cos", np.full((2, 2), 0.3, np.float32), "table-uncomputed"),
}


@pytest.mark.parametrize("case", LOST_TABLES)
def test_a_table_of_positions_that_is_gone_was_learned_or_computed(tmp_path: Path, case: str) -> None:
    name, table, slug = LOST_TABLES[case]
    other = {"weight": np.ones((2, 2), np.float32)}
    save_arrays(other | {name: table}, tmp_path / "before.safetensors")
    save_arrays(other, tmp_path / "after.safetensors")
    files = {when: tmp_path / f"{when}.safetensors" for when in ("before", "after")}
    result = loraconv.verify(**files, expect="identical")
    assert [finding.slug for finding in result.findings] == [slug]


@pytest.mark.parametrize(("shift", "equal"), [([0, 0, 0], 1), ([-(2.0**-12), 0, 0], 1), ([0, 0, 0.003], 0)])
def test_magnitudes_in_another_dtype_may_be_rounded_once(shift: list[float], equal: int) -> None:
    """At 1, half a unit of float16 is 2**-11, at 3 it is 2**-10; NaN and infinity stay what they are."""
    exact = np.array([1.0, 1.0 + 2.0**-11, 3.0, np.nan, np.inf])
    stored = np.array([1.0, 1.0, 3.0, np.nan, np.inf]) + np.array([*shift, 0, 0])
    one, other = {"q": Held(exact, "F32")}, {"q": Held(stored, "F16")}
    assert compare_magnitudes(one, other)[0].equal == equal  # type: ignore[arg-type]
    assert compare_magnitudes(other, one)[0].equal == equal  # type: ignore[arg-type]
    assert compare_magnitudes(one, {"q": Held(stored, "F32")})[0].equal == 0  # type: ignore[arg-type]


RENAMES: dict[str, tuple[list[str], list[str], dict[str, str]]] = {
    "the mark of a wrapper": (["a.b.weight"], ["a.b.original.weight"], {"a.b.weight": "a.b.original.weight"}),
    "two that would be one": (["a.b.weight"], ["a.b.original.weight", "a.b.base_layer.weight"], {}),
    "a prefix": (["x.q.w", "x.k.w"], ["y.z.q.w", "y.z.k.w"], {"x.q.w": "y.z.q.w", "x.k.w": "y.z.k.w"}),
    "a prefix of one name alone": (["x.q.w"], ["y.q.w"], {}),
    "a prefix of fewer than half": (
        ["x.q.w", "x.k.w", *(f"old{n}" for n in range(4))], ["y.q.w", "y.k.w", *(f"new{n}" for n in range(4))], {},
    ),
    "a prefix of two parts": (
        ["a.q.w", "a.k.w", "b.m.w", "b.n.w"], ["c.q.w", "c.k.w", "d.m.w", "d.n.w"],
        {"a.q.w": "c.q.w", "a.k.w": "c.k.w", "b.m.w": "d.m.w", "b.n.w": "d.n.w"},
    ),
    "one step in common is not enough": (["x.w1", "x.w2"], ["y.w1", "y.w2"], {}),
    "a prefix and the same names": (["s.w", "x.q.w", "x.k.w"], ["s.w", "q.w", "k.w"],
        {"s.w": "s.w", "x.q.w": "q.w", "x.k.w": "k.w"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", RENAMES)
def test_names_are_matched_by_the_mark_and_by_the_prefix_that_explains_most(case: str) -> None:
    before, after, matched = RENAMES[case]
    assert match_names(before, after) == matched


def test_content_is_matched_in_order_where_as_many_names_hold_it() -> None:
    a, b = Stored(np.arange(4.0)), Stored(np.arange(4.0) + 1)
    square = Stored(np.arange(4.0).reshape(2, 2))
    before: Any = {"one": a, "two": b, "three": b, "four": square}
    after: Any = {"x": b, "y": a, "z": b, "v": b}
    assert match_content(before, after) == {"one": "y"}
    del after["v"]
    assert match_content(before, after) == {"one": "y", "two": "x", "three": "z"}


def test_what_a_lora_run_did_as_it_should_is_told(tmp_path: Path) -> None:
    layer, one = "transformer.layers.0.attention.dense", np.ones((2, 2), np.float32)
    factors = {f"{layer}.matrix_{side}.0": one * (side == "A") for side in "AB"}
    save_arrays({f"{layer}.weight": one}, tmp_path / "before.safetensors")
    save_arrays({f"{layer}.original.weight": one} | factors, tmp_path / "after.safetensors")
    files = {when: tmp_path / f"{when}.safetensors" for when in ("before", "after")}
    result = loraconv.verify(**files, expect="only-lora")
    assert result.same
    told = "\n".join(result.notices)
    assert f"1 weights have the mark of an adapted layer now, with the same bytes: {layer}.weight" in told
    assert "2 LoRA factors: new" in told
    assert "every up factor is zero" in told


def test_magnitudes_of_another_size_differ_and_of_another_shape_do_not() -> None:
    one, same, other = {"q": held(4)}, {"q": held(4, 1)}, {"q": held(5)}
    told, findings = compare_magnitudes(one, same)  # type: ignore[arg-type]
    assert (told.equal, findings) == (1, [])
    told, findings = compare_magnitudes(one, other)  # type: ignore[arg-type]
    assert (told.equal, [found.slug for found in findings]) == (0, ["dora-differs"])


# --- consumers ------------------------------------------------------------------------------------------------------

PEFT = {"peft_type": "LORA", "r": 2, "lora_alpha": 1, "target_modules": ["to_q"]}


def said(consumer: str, tensors: dict[str, Any], **options: Any) -> Reading:
    row = next(row for row in CONSUMERS if row.name == consumer)
    return read_with(row, AdapterFile("adapter.safetensors", tensors, **options))


def peft_file(module: str = MODULES[0]) -> dict[str, Any]:
    return {f"base_model.model.{module}.lora_{s}.weight": held(*shape) for s, shape in (("A", (2, 8)), ("B", (8, 2)))}


def test_a_plain_peft_file_is_read_and_what_the_table_does_not_follow_is_said() -> None:
    newest = "peft 0.21 and later"
    assert said(newest, peft_file(), settings=PEFT).scales == {MODULES[0]: Fraction(1, 2)}
    assert "LOHA" in said(newest, peft_file(), settings=PEFT | {"peft_type": "LOHA"}).unsure
    assert "layers_to_transform" in said(newest, peft_file(), settings=PEFT | {"layers_to_transform": [0]}).unsure
    assert "magnitudes" in said(newest, peft_file(), settings=PEFT | {"use_dora": True}).unsure


def test_a_file_that_comfyui_cannot_take_apart_is_refused_with_the_key() -> None:
    module = "diffusion_model.blocks.0.q"  # as comfy/ldm/cogvideo/model.py calls it
    whole = {f"{module}.lora_down.weight": held(2, 8), f"{module}.lora_up.weight": held(8, 2)}
    assert said("ComfyUI", whole).scales == {MODULES[0]: Fraction(1)}
    half = said("ComfyUI", {f"{module}.lora_up.weight": held(8, 2)})
    assert half.error == f"{module}.lora_down.weight"
    many = said("ComfyUI", whole | {f"{module}.alpha": held(2)})
    assert f"{module}.alpha" in many.why


# --- forward passes -------------------------------------------------------------------------------------------------


def config_of(**changes: Any) -> Any:
    given: dict[str, Any] = {
        "num_layers": 2, "num_attention_heads": 3, "attention_head_dim": 8, "in_channels": 4, "patch_size": 2,
        "patch_size_t": None, "max_text_seq_length": 5, "text_embed_dim": 10, "ofs_embed_dim": None,
        "sample_height": 8, "sample_width": 12, "use_learned_positional_embeddings": False,
        "use_rotary_positional_embeddings": False,
    }  # fmt: skip
    return SimpleNamespace(**given | changes)


def test_inputs_are_seeded_and_as_small_as_the_configuration_allows() -> None:
    made = make_inputs(config_of(), "float32")
    noise = torch.Generator().manual_seed(0)
    assert set(made) == {"hidden_states", "encoder_hidden_states", "timestep"}
    assert torch.equal(made["hidden_states"], torch.randn((1, 2, 4, 4, 6), generator=noise))
    assert torch.equal(made["encoder_hidden_states"], torch.randn((1, 5, 10), generator=noise))
    assert described(made, "fp32") == "latents 1x2x4x4x6, 5 text tokens, timestep 500, seed 0, computed in fp32"
    assert made["timestep"].tolist() == [500]
    rotary = {"use_rotary_positional_embeddings": True, "attention_head_dim": 16}
    deep = make_inputs(config_of(patch_size_t=2, ofs_embed_dim=8, **rotary), "bfloat16")
    assert (deep["hidden_states"].shape, deep["hidden_states"].dtype) == ((1, 4, 4, 4, 6), torch.bfloat16)
    assert (deep["ofs"].tolist(), deep["ofs"].dtype) == ([2.0], torch.bfloat16)
    assert [table.shape for table in deep["image_rotary_emb"]] == [(2 * 2 * 3, 16)] * 2
    learned = make_inputs(config_of(use_learned_positional_embeddings=True), "float16")
    assert learned["hidden_states"].shape == (1, 2, 4, 8, 12)


def test_the_bound_of_a_forward_pass_counts_every_term_and_every_result_once() -> None:
    """By hand: 17 tokens (5 of text, 2 frames of 2 x 3 patches); a block sums 9 * 24 + 8 + 17 = 241 terms and stores 18
    results; outside of them, 4 * 24 terms, the patches' 4 * 2 * 2, and 8 results. With two frames to a patch: 11 tokens
    of 1 frame, and patches of 32 numbers."""
    unit = 2.0**-8
    for changes, terms in (({}, 2 * 241 + 96 + 16), ({"patch_size_t": 2}, 2 * (216 + 8 + 11) + 96 + 32)):
        inputs = {"hidden_states": np.zeros((1, 2, 4, 4, 6))}
        variance = (terms * (2.0**-24) ** 2 + (2 * 18 + 8) * unit**2) / 3
        bound = rounding_bound(config_of(**changes), inputs, unit)
        assert bound == pytest.approx(6 * np.sqrt(2 * variance), rel=1e-12)
        bare = rounding_bound(config_of(**changes), inputs, 0.0)
        assert bare == pytest.approx(6 * np.sqrt(2 * terms / 3) * 2.0**-24, rel=1e-12)


def test_the_units_of_what_is_computed_in_are_torchs() -> None:
    assert dict(COMPUTE.values()) == {
        name: torch.finfo(getattr(torch, name)).eps / 2 for name in ("float32", "float16", "bfloat16")
    }


def test_the_distance_of_two_outputs_is_relative_to_the_second() -> None:
    one, other = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 2.0])
    assert distance(one, other) == pytest.approx(np.sqrt(13) / 2)
    assert distance(one * torch.nan, other) == distance(one, other * 0) == float("inf")


# --- recorded forward passes ----------------------------------------------------------------------------------------


def test_the_recorded_outputs_are_met_with_the_adapter_and_without(converted: Converted, tmp_path: Path) -> None:
    recorded = RECORDED[0]
    out, file = converted(recorded, what="all"), recorded.folder / "reference.safetensors"
    reference = load_file(file)
    check = compare_forward(out, file)
    assert check.passed
    assert max(check.live, check.base) <= check.bound == 1e-6
    one, other = (reference[name].double() for name in ("out_base", "out_lora"))
    assert check.effect == pytest.approx(float(torch.linalg.norm(one - other) / torch.linalg.norm(other)), rel=1e-9)
    (tmp_path / "transformer").symlink_to(out / "transformer")
    factors = load_file(out / LORA_FILE)
    save_file({n: t * (2 if "lora_B" in n else 1) for n, t in factors.items()}, tmp_path / LORA_FILE)
    doubled = compare_forward(tmp_path, file)
    assert not doubled.passed
    assert doubled.live > 100 * doubled.bound
    assert doubled.base == check.base


@pytest.mark.parametrize(("live", "base", "passed"), [(1, 1, True), (2, 1, False), (1, 2, False), (0, 0, True)])
def test_a_forward_check_passes_where_both_errors_are_within_the_bound(live: float, base: float, passed: bool) -> None:
    check = ForwardCheck(live=live, base=base, effect=9.0, bound=1)
    assert check.passed is passed
    assert check.to_dict() == {"live": live, "base": base, "effect": 9.0, "bound": 1, "passed": passed}


# --- what a consumer opens ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [table.name for table in dialects() if not table.read_only])
def test_a_file_that_no_consumer_looks_for_is_no_output(kind: str, tmp_path: Path) -> None:
    (tmp_path / "latest").write_text("1")
    with pytest.raises(ProofFailed, match=r"adapter\.safetensors"):
        adapter_file(kind, tmp_path, ["adapter.safetensors"])
