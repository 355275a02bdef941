"""The proof of a base: the model's list of tensors is diffusers' own, each is made of the right rows of every rank, and
the table of positions is the one that diffusers computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from diffusers.models.embeddings import get_3d_sincos_pos_embed

from loraconv.verifier.base import model_shapes, prove_base, source_of
from loraconv.verifier.config import POSITIONS, check_config, expected_config
from loraconv.verifier.numbers import values
from loraconv.verifier.positions import agrees, frames_of
from loraconv.verifier.proof import Check

DIT = "model.diffusion_model."
SMALL: dict[str, Any] = {
    "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "time_embed_dim": 8,
    "text_embed_dim": 6, "num_layers": 2, "sample_width": 12, "sample_height": 8, "sample_frames": 9, "patch_size": 2,
    "patch_size_t": None, "temporal_compression_ratio": 4, "max_text_seq_length": 5, "ofs_embed_dim": None,
    "spatial_interpolation_scale": 1.875, "temporal_interpolation_scale": 1.0, "patch_bias": True,
    "use_rotary_positional_embeddings": False, "use_learned_positional_embeddings": False,
}  # fmt: skip
ROTARY = {"use_rotary_positional_embeddings": True}
CONFIGS: dict[str, dict[str, Any]] = {
    "2b": {},
    "5b": ROTARY | {"num_layers": 3},
    "5b, image": ROTARY | {"use_learned_positional_embeddings": True, "in_channels": 8},
    "1.5": ROTARY | {"patch_size_t": 2, "patch_bias": False},
    "1.5, image": ROTARY | {"patch_size_t": 2, "patch_bias": False, "ofs_embed_dim": 8, "in_channels": 8},
}
Read = Callable[[dict[str, Any]], Any]


@pytest.mark.parametrize("name", CONFIGS)
def test_the_tensors_of_a_model_are_those_of_diffusers(name: str) -> None:
    config = SMALL | CONFIGS[name]
    with torch.device("meta"):
        model = CogVideoXTransformer3DModel(**config)
    assert model_shapes(config) == {name: tuple(t.shape) for name, t in model.state_dict().items()}


WIDTH, HEAD, TIME = 32, 16, 8
RNG = np.random.default_rng(0)


def normal(*shape: int) -> Any:
    return RNG.normal(size=shape).astype(np.float32)


def sat(layers: int = 2) -> dict[str, Any]:
    """The whole tensors of a small 2B in SAT's names."""
    made = {
        "mixins.patch_embed.proj.weight": normal(WIDTH, 4, 2, 2), "mixins.patch_embed.proj.bias": normal(WIDTH),
        "mixins.patch_embed.text_proj.weight": normal(WIDTH, 6), "mixins.patch_embed.text_proj.bias": normal(WIDTH),
        "time_embed.0.weight": normal(TIME, WIDTH), "time_embed.0.bias": normal(TIME),
        "time_embed.2.weight": normal(TIME, TIME), "time_embed.2.bias": normal(TIME),
        "mixins.final_layer.norm_final.weight": normal(WIDTH), "mixins.final_layer.norm_final.bias": normal(WIDTH),
        "mixins.final_layer.adaLN_modulation.1.weight": normal(2 * WIDTH, TIME),
        "mixins.final_layer.adaLN_modulation.1.bias": normal(2 * WIDTH),
        "mixins.final_layer.linear.weight": normal(16, WIDTH), "mixins.final_layer.linear.bias": normal(16),
        "transformer.final_layernorm.weight": normal(WIDTH), "transformer.final_layernorm.bias": normal(WIDTH),
    }  # fmt: skip
    for n in range(layers):
        layer, adaln = f"transformer.layers.{n}.", "mixins.adaln_layer."
        for name, out, into in (
            ("attention.query_key_value", 3 * WIDTH, WIDTH), ("attention.dense", WIDTH, WIDTH),
            ("mlp.dense_h_to_4h", 4 * WIDTH, WIDTH), ("mlp.dense_4h_to_h", WIDTH, 4 * WIDTH),
        ):  # fmt: skip
            made |= {f"{layer}{name}.weight": normal(out, into), f"{layer}{name}.bias": normal(out)}
        for name in ("input_layernorm", "post_attention_layernorm"):
            made |= {f"{layer}{name}.weight": normal(WIDTH), f"{layer}{name}.bias": normal(WIDTH)}
        for name in ("query", "key"):
            where = f"{adaln}{name}_layernorm_list.{n}."
            made |= {f"{where}weight": normal(HEAD), f"{where}bias": normal(HEAD)}
        where = f"{adaln}adaLN_modulations.{n}.1."
        made |= {f"{where}weight": normal(12 * WIDTH, TIME), f"{where}bias": normal(12 * WIDTH)}
    return {DIT + name: array for name, array in made.items()}


def in_diffusers(whole: dict[str, Any]) -> dict[str, Any]:
    """What diffusers' tensors hold, by the definition of either model."""
    w = {name.removeprefix(DIT): array for name, array in whole.items()}
    made: dict[str, Any] = {}
    names = {
        "norm_final": "transformer.final_layernorm", "norm_out.norm": "mixins.final_layer.norm_final",
        "norm_out.linear": "mixins.final_layer.adaLN_modulation.1", "proj_out": "mixins.final_layer.linear",
        "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
        "patch_embed.proj": "mixins.patch_embed.proj", "patch_embed.text_proj": "mixins.patch_embed.text_proj",
    }  # fmt: skip
    for n in range(2):
        layer, block = f"transformer.layers.{n}.", f"transformer_blocks.{n}."
        names |= {
            f"{block}attn1.to_out.0": f"{layer}attention.dense", f"{block}ff.net.0.proj": f"{layer}mlp.dense_h_to_4h",
            f"{block}ff.net.2": f"{layer}mlp.dense_4h_to_h", f"{block}norm1.norm": f"{layer}input_layernorm",
            f"{block}norm2.norm": f"{layer}post_attention_layernorm",
            f"{block}attn1.norm_q": f"mixins.adaln_layer.query_layernorm_list.{n}",
            f"{block}attn1.norm_k": f"mixins.adaln_layer.key_layernorm_list.{n}",
        }  # fmt: skip
        for kind in ("weight", "bias"):
            q, k, v = np.split(w[f"{layer}attention.query_key_value.{kind}"], 3)
            made |= {f"{block}attn1.to_{p}.{kind}": part for p, part in zip("qkv", (q, k, v), strict=True)}
            table = np.split(w[f"mixins.adaln_layer.adaLN_modulations.{n}.1.{kind}"], 12)
            # shift, scale, gate of the attention, then of the feed-forward: first the image's, then the text's.
            made[f"{block}norm1.linear.{kind}"] = np.concatenate([table[p] for p in (0, 1, 2, 6, 7, 8)])
            made[f"{block}norm2.linear.{kind}"] = np.concatenate([table[p] for p in (3, 4, 5, 9, 10, 11)])
    return made | {f"{n}.{kind}": w[f"{s}.{kind}"] for n, s in names.items() for kind in ("weight", "bias")}


def parallel(whole: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """The tensors of each model-parallel rank: q, k and v and the first of the feed-forward by rows, their partners by
    columns; everything else, and the bias of what is split by columns, in each rank."""
    ranks: list[dict[str, Any]] = [{} for _ in range(count)]
    for name, array in whole.items():
        parts = [array] * count
        if "query_key_value" in name:
            thirds = [np.split(third, count) for third in np.split(array, 3)]
            parts = [np.concatenate([third[n] for third in thirds]) for n in range(count)]
        elif "dense_h_to_4h" in name:
            parts = np.split(array, count)
        elif name.endswith(("attention.dense.weight", "mlp.dense_4h_to_h.weight")):
            parts = np.split(array, count, axis=1)
        for rank, part in zip(ranks, parts, strict=True):
            rank[name] = part
    return ranks


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("wrapped", [False, True])
def test_every_tensor_is_made_of_the_right_rows_of_every_rank(read: Read, count: int, wrapped: bool) -> None:
    whole = sat()
    ranks = parallel(whole, count)
    if wrapped:
        ranks = [{n.replace(".dense.", ".dense.original."): a for n, a in rank.items()} for rank in ranks]
    right, shapes = in_diffusers(whole), model_shapes(SMALL)
    assert set(right) == set(shapes)
    given = [read(rank) for rank in ranks]
    for name, shape in shapes.items():
        assert np.array_equal(values(source_of(given, name, shape)), right[name]), name
    stored = read(right)
    proof = prove_base(given, settings(), stored, expected_config(given[0], settings()), None)
    assert proof.passed
    assert [(check.count, check.detail) for check in proof.checks[2:]] == [
        (len(expected_config(given[0], settings())), ""), (sum(map(len, given)), ""),
    ]  # fmt: skip


def settings() -> dict[str, Any]:
    """A training YAML that says the sizes of ``SMALL``."""
    positions = {"params": {"text_length": 5, "height_interpolation": 1.875}}
    params = {
        "patch_size": [1, 2, 2], "out_channels": 4, "latent_width": 12, "latent_height": 8, "num_frames": 9,
        "time_compressed_rate": 4, "modules": {"pos_embed_config": positions}, "elementwise_affine": True,
    }  # fmt: skip
    return {"model": {"network_config": {"params": params}}}


@pytest.fixture
def given(read: Read) -> Any:
    """A base in SAT's names with its table of positions, and the same in diffusers'."""
    whole = sat()
    table = np.concatenate([np.array(part) for part in frames_of(SMALL)])[None]
    return read(whole | {POSITIONS: table}), in_diffusers(whole)


def test_a_right_base_passes_every_check(read: Read, given: Any) -> None:
    source, right = given
    config = expected_config(source, settings())
    assert {name: config[name] for name in SMALL} == SMALL
    proof = prove_base([source], settings(), read(right), config, None)
    assert proof.passed
    assert [(c.level, c.name, c.count, c.detail) for c in proof.checks] == [
        ("L0", "every tensor of the model and its shape", len(right), ""),
        ("L1", "byte for byte equal", len(right), ""),
        ("L0", "every value of config.json", len(config), ""),
        ("L0", "every tensor of the source is used", len(source) - 1, ""),
        ("L1", "the table of positions that diffusers computes", 1, ""),
    ]  # fmt: skip
    assert all(control.caught for control in proof.controls)


def test_a_wrong_base_is_told_by_the_check_that_it_fails(read: Read, given: Any) -> None:
    source, right = given
    config = expected_config(source, settings())

    def failed(stored: dict[str, Any], config: Any = config, dtype: Any = None) -> dict[str, str]:
        proof = prove_base([source], settings(), read(stored), config, dtype)
        return {c.name: c.detail for c in proof.checks if not c.passed}

    names, numbers = "every tensor of the model and its shape", "byte for byte equal"
    said = "missing, unexpected or of another shape: "
    less = {n: a for n, a in right.items() if n != "proj_out.bias"}
    assert failed(less) == {names: f"{said}proj_out.bias"}
    assert failed(less | {"x": normal(1)}, {}).keys() == {names, "every value of config.json"}
    assert failed(right | {"proj_out.bias": normal(17)}) == {names: f"{said}proj_out.bias"}
    assert failed(right | {"proj_out.bias": normal(16)}) == {numbers: "other content in proj_out.bias"}
    half = {n: a.astype(np.float16) for n, a in right.items()}
    assert list(failed(half)) == [numbers]
    assert failed(half, dtype="F16") == {}
    assert failed(right, dtype="F16") != {}
    half["proj_out.bias"] = (right["proj_out.bias"] * 1.002).astype(np.float16)
    cast = "every number within half a unit of F16"
    assert failed(half, dtype="F16") == {cast: "other content in proj_out.bias"}


def test_what_the_source_has_more_is_lost(read: Read, given: Any) -> None:
    source, right = given
    config = expected_config(source, settings())
    for name, fine in (
        (DIT + "more.weight", False), (DIT + "mixins.pos_embed.freqs_sin2", False), ("other.weight", True),
        (DIT + "transformer.layers.0.attention.dense.matrix_A.0", True),
    ):  # fmt: skip
        proof = prove_base([source | read({name: normal(2, 2)})], settings(), read(right), config, None)
        check = proof.checks[3]
        assert check.passed is fine
        assert check.detail == ("" if fine else f"lost on the way: {name}")


def test_every_value_of_the_configuration_has_its_type() -> None:
    right = {"a": 1, "b": None, "c": 1.5}
    name = "every value of config.json"
    assert check_config(right, right | {"_diffusers_version": "9"}) == Check("L0", name, True, 3)
    for wrong, detail in (
        (right | {"a": 2}, "a = 2 instead of 1"), (right | {"a": 1.0}, "a = 1.0 instead of 1"),
        (right | {"a": True}, "a = True instead of 1"), ({"b": None, "c": 1.5}, "a is missing instead of 1"),
        (right | {"d": "x"}, "d = 'x'"), ({"a": 1, "c": 1.5}, "b is missing instead of None"),
        ({}, "a is missing instead of 1; b is missing instead of None; c is missing instead of 1.5"),
    ):  # fmt: skip
        assert check_config(right, wrong) == Check("L0", name, False, 3, detail=detail)


# --- positions --------------------------------------------------------------------------------------------------------


def flat(config: dict[str, Any]) -> Any:
    return np.concatenate([np.array(part) for part in frames_of(config)])


@pytest.mark.parametrize("changes", [{}, {"sample_frames": 13, "sample_width": 20}, {"spatial_interpolation_scale": 1.0,
    "temporal_interpolation_scale": 2.0, "num_attention_heads": 3}])  # fmt: skip
def test_the_table_of_positions_is_that_of_diffusers(changes: dict[str, Any]) -> None:
    config = SMALL | changes
    width = config["num_attention_heads"] * config["attention_head_dim"]
    grid = config["sample_width"] // 2, config["sample_height"] // 2
    frames = (config["sample_frames"] - 1) // 4 + 1
    scales = config["spatial_interpolation_scale"], config["temporal_interpolation_scale"]
    theirs = get_3d_sincos_pos_embed(width, grid, frames, *scales, output_type="pt").reshape(-1, width).numpy()
    table = flat(config)
    assert not table[:5].any()
    assert table.dtype == np.float32
    np.testing.assert_allclose(table[5:], theirs, atol=2.0**-22)


@pytest.mark.parametrize(("kind", "half"), [("F32", 2.0**-24), ("F16", 2.0**-11)])
def test_a_table_is_the_same_within_its_roundings_and_no_further(read: Read, kind: str, half: float) -> None:
    """The greatest side of the grid is 6: an angle up to 6 with four roundings, and four more."""
    table = flat(SMALL)[None]
    stored = table.astype(np.float32 if kind == "F32" else np.float16)
    bound = half + (6 * 4 + 4) * 2.0**-24
    fine, gap, allowed = agrees(read({"t": stored})["t"], SMALL)
    assert fine
    assert allowed == bound
    assert gap == np.max(np.abs(stored.astype(np.float32) - table))
    # Beside a sine of zero, the bound is a number of float32 itself, and not one of float16.
    for off, right in ((0.9, True), (1.1, False), *([(1, True), (1 + 2.0**-20, False)] if kind == "F32" else [])):
        moved = np.zeros_like(table)
        at = np.unravel_index(np.argmin(np.abs(table[0, 5:])), table[0, 5:].shape)
        moved[0, at[0] + 5, at[1]] = bound * off
        exact = (table + moved).astype(stored.dtype)
        fine, gap, _ = agrees(read({"t": np.where(moved != 0, exact, table.astype(stored.dtype))})["t"], SMALL)
        assert fine is right
    spoilt = stored.copy()
    spoilt[0, 7, 3] = np.nan
    fine, gap, _ = agrees(read({"t": spoilt})["t"], SMALL)
    assert not fine
    assert np.isnan(gap)
