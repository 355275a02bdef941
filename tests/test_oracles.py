"""Where the definitions find what a file says: components, settings, alphas, ranks; the oracle of another package."""

from __future__ import annotations

import importlib.metadata
import json
import re
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from loraconv.errors import FormatError, ProofFailed
from loraconv.verifier.numbers import Held, values
from loraconv.verifier.oracles import (
    by_component,
    header_config,
    is_sat_factor,
    oracle_of,
    pairs_of,
    sat_pairs,
    sat_setting,
    yaml_settings,
)


def held(*shape: int, seed: int = 0) -> Any:
    return Held(np.random.default_rng((seed, *shape)).normal(size=shape), "F32")


def factors(module: str, rank: int = 2, **more: Any) -> dict[str, Any]:
    """peft's keys of one module."""
    made = {f"{module}.lora_A.weight": held(rank, 4), f"{module}.lora_B.weight": held(3, rank)}
    return made | {f"{module}.{end.replace('__', '.')}": tensor for end, tensor in more.items()}


# --- headers and settings ---------------------------------------------------------------------------------------------


def test_tensors_belong_to_a_component_of_the_pipeline_or_to_the_transformer() -> None:
    names = ["unet.a.b", "text_encoder.a", "text_encoder_2.a", "text_encoder_3.a", "transformer.a", "unet", "a.unet.b"]
    found = by_component({name: name for name in names})  # type: ignore[misc]
    assert found == {
        "unet": {"a.b": "unet.a.b"}, "text_encoder": {"a": "text_encoder.a"},
        "text_encoder_2": {"a": "text_encoder_2.a"},
        "transformer": {n: n for n in ("text_encoder_3.a", "transformer.a", "unet", "a.unet.b")},
    }  # fmt: skip


def test_the_header_states_a_configuration_of_each_component_or_one_for_all() -> None:
    both = {"lora_adapter_metadata": json.dumps({"transformer.r": 4, "unet.r": 8, "unet.lora_alpha": 2, "r": 9})}
    assert header_config(both) == {"r": 4}
    assert header_config(both, "unet") == {"r": 8, "lora_alpha": 2}
    bare = {"lora_adapter_metadata": json.dumps({"r": 4}), "lora_config": json.dumps({"r": 5})}
    assert header_config(bare) == {"r": 4}
    assert header_config({"lora_config": json.dumps({"r": 5})}, "unet") == {"r": 5}
    assert header_config({}) == {}


def test_the_components_of_a_pipeline_count_at_their_own_scale() -> None:
    tensors = factors("unet.a") | factors("text_encoder.a") | factors("transformer.a") | factors("b")
    config = {"unet.lora_alpha": 4, "text_encoder.lora_alpha": 6, "transformer.lora_alpha": 8}
    found = pairs_of("diffusers", [tensors], {"lora_adapter_metadata": json.dumps(config)}, None, None)
    assert {m: p.scale for m, p in found.items()} == {"unet.a": 2, "text_encoder.a": 3, "a": 4, "b": 4}
    mine = pairs_of("diffusers", [tensors], {"lora_adapter_metadata": json.dumps(config)}, None, Fraction(1))
    assert {p.scale for p in mine.values()} == {Fraction(1, 2)}


PATH = ("model", "network_config", "params", "modules", "lora_config", "params")


def nested(steps: tuple[str, ...], inner: Any) -> Any:
    return inner if not steps else {steps[0]: nested(steps[1:], inner)}


def test_the_settings_of_a_sat_run_are_six_steps_down() -> None:
    assert sat_setting(nested(PATH, {"r": 4, "lora_alpha": 2}), "r") == 4
    assert sat_setting(nested(PATH, {"r": 4}), "lora_alpha") is None
    for at in range(len(PATH)):
        assert sat_setting(nested(PATH[:at], None), "r") is None
        assert sat_setting(nested(PATH[:at], [4]), "r") is None
        renamed = (*PATH[:at], f"{PATH[at]}x", *PATH[at + 1 :])
        assert sat_setting(nested(renamed, {"r": 4}), "r") is None
    assert sat_setting(None, "r") is None


@pytest.mark.parametrize(
    ("text", "found"), [("a: 1", {"a": 1}), ("- 1", {}), ("", {}), ("3", {}), ('{"a": [1]}', {"a": [1]})]
)
def test_settings_are_a_mapping_or_none(text: str, found: Any) -> None:
    assert yaml_settings(text) == found


# --- SAT --------------------------------------------------------------------------------------------------------------

LAYER = "model.diffusion_model.transformer.layers.3.attention."
OLD = "model.diffusion_model.mixins.my_lora.lora_linear.3."


@pytest.mark.parametrize(
    ("kind", "part", "module"),
    [
        ("query_key_value", 0, "to_q"),
        ("query_key_value", 1, "to_k"),
        ("query_key_value", 2, "to_v"),
        ("dense", 0, "to_out.0"),
    ],
)
@pytest.mark.parametrize(("settings", "user", "scale"), [(None, None, Fraction(1, 2)), ({"lora_alpha": 6}, None, 3),
    ({"lora_alpha": 6}, Fraction(1), Fraction(1, 2)), ({"r": 9}, None, Fraction(1, 2))])  # fmt: skip
def test_every_projection_of_sat_at_alpha_over_its_rank(
    kind: str, part: int, module: str, settings: Any, user: Any, scale: Any
) -> None:
    tensors = {f"{LAYER}{kind}.matrix_A.{part}": held(2, 4), f"{LAYER}{kind}.matrix_B.{part}": held(3, 2)}
    given = None if settings is None else nested(PATH, settings)
    (found,) = sat_pairs([tensors | {"other": held(1)}], {}, given, user).items()
    assert (found[0], found[1].scale, found[1].shape) == (f"transformer_blocks.3.attn1.{module}", scale, (3, 2, 4))
    letter = {"to_q": "Q", "to_k": "K", "to_v": "V", "to_out.0": "O"}[module]
    older = {f"{OLD}{letter}_{side}": tensor for side, tensor in zip("AB", tensors.values(), strict=True)}
    (again,) = pairs_of("sat-lora", [older | {"other": held(1)}], {}, given, user).items()
    assert (again[0], again[1].scale, again[1].down, again[1].up) == (*found[:1], scale, *tensors.values())
    assert all(map(is_sat_factor, [*tensors, *older]))


def test_the_older_mixin_of_sat_has_four_projections_on_one_rank() -> None:
    good = {f"{OLD}Q_{side}": held(2, 2) for side in "AB"}
    for name in (f"{OLD}X_A", f"{OLD}Q_C", f"{OLD}Q_A.weight"):
        with pytest.raises(ProofFailed, match=re.escape(name)):
            pairs_of("sat-lora", [good | {name: held(2, 2)}], {}, None, None)
        assert not is_sat_factor(name)
    with pytest.raises(ProofFailed, match="does not cover"):
        pairs_of("sat-lora", [good, good], {}, None, None)


@pytest.mark.parametrize("count", [2, 4])
def test_the_mean_of_several_ranks_is_what_all_of_them_add(count: int) -> None:
    """Rows of q, k and v are a rank's own; columns of the output projection are, whose sum all ranks share."""
    sides = [(held(2, 4, seed=n), held(3, 2, seed=n)) for n in range(count)]
    ranks: list[Any] = [
        {
            f"{LAYER}{kind}.matrix_{side}.0": Stored(t)
            for kind in ("query_key_value", "dense")
            for side, t in zip("AB", pair, strict=True)
        }
        for pair in sides
    ]
    found = sat_pairs(ranks, {}, None, Fraction(3))
    q, out = (found[f"transformer_blocks.3.attn1.{m}"] for m in ("to_q", "to_out.0"))
    downs, ups = ([pair[n].values for pair in sides] for n in (0, 1))
    np.testing.assert_allclose(values(q.up) @ values(q.down), np.concatenate(ups) @ np.mean(downs, axis=0), rtol=1e-12)
    want = np.mean(ups, axis=0) @ np.concatenate(downs, axis=1) / count
    np.testing.assert_allclose(values(out.up) @ values(out.down), want, rtol=1e-12)
    assert q.scale == out.scale == Fraction(3, 2)
    assert (q.down.dtype, q.up.dtype) == ("F64", "F64")


class Stored:
    """A tensor of a file, in one piece."""

    dtype = "F64"

    def __init__(self, tensor: Any) -> None:
        self.array, self.shape = tensor.values, tensor.shape

    def pieces(self) -> Any:
        yield self.array.tobytes()


# --- peft -------------------------------------------------------------------------------------------------------------


def test_a_name_in_memory_is_taken_out_and_biases_count_at_the_same_scale() -> None:
    tensors = {"a.lora_A.mine.weight": held(2, 4), "a.lora_B.mine.weight": held(3, 2), "a.lora_B.mine.bias": held(3)}
    found = pairs_of("peft", [{f"base_model.model.{n}": t for n, t in tensors.items()}], {}, {"lora_alpha": 3}, None)
    assert {m: (p.scale, p.shape) for m, p in found.items()} == {
        "a": (Fraction(3, 2), (3, 2, 4)), "a.bias": (Fraction(3, 2), (3, 1, 1))
    }  # fmt: skip
    for alone in (list(tensors)[:1], list(tensors)[1:2], list(tensors)[2:]):
        with pytest.raises(ProofFailed, match="a, one factor of two"):
            pairs_of("peft", [{f"base_model.model.{n}": tensors[n] for n in alone}], {}, {}, None)


@pytest.mark.parametrize(
    ("config", "user", "scale"),
    [
        ({"alpha": 3, "r": 2}, None, Fraction(3, 2)), ({"alpha": 3, "r": 2}, Fraction(1), Fraction(1, 2)),
        ({"alpha": 3, "r": 2, "lora_alpha": 9}, None, Fraction(3, 2)),
        ({"alpha": 3, "r": 2, "rank_pattern": {"a": 4}}, None, Fraction(3, 4)),
        ({"alpha": 3, "r": 2, "alpha_pattern": {"a": 5}}, None, Fraction(5, 2)),
    ],
)  # fmt: skip
def test_tuners_other_than_lora_count_at_alpha_over_r_whatever_their_sizes(config: Any, user: Any, scale: Any) -> None:
    begin = "base_model.model.a.lokr_"
    tensors = {f"{begin}w1": held(3, 2), f"{begin}w2_a": held(4, 6), f"{begin}w2_b": held(6, 5)}
    (pair,) = pairs_of("peft", [tensors], {}, config, user).values()
    assert (pair.scale, pair.shape[0], pair.shape[2]) == (scale, 12, 10)


# --- other packages ---------------------------------------------------------------------------------------------------


def packages(monkeypatch: pytest.MonkeyPatch, load: Any) -> None:
    """One package that declares an oracle for ``acme``."""

    def entry_points(*, group: str, name: str) -> list[Any]:
        known = (group, name) == ("loraconv.oracles", "acme")
        return [SimpleNamespace(name="acme", value="acme_formats:oracle", load=load)] if known else []

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)


def test_the_oracle_of_another_package_is_the_one_that_its_entry_point_names(monkeypatch: pytest.MonkeyPatch) -> None:
    def oracle(*given: Any) -> Any:
        return given

    packages(monkeypatch, lambda: oracle)
    assert oracle_of("acme") is oracle
    assert pairs_of("acme", [{}], {"x": "y"}, None, Fraction(2)) == ([{}], {"x": "y"}, None, Fraction(2))
    assert oracle_of("sat") is sat_pairs
    with pytest.raises(FormatError, match="the format other has no oracle") as caught:
        oracle_of("other")
    assert caught.value.slug == "no-oracle"


def broken() -> Any:
    raise ImportError("no such module")


@pytest.mark.parametrize(("load", "why"), [(broken, "ImportError: no such module"), (lambda: 3, "it is int")])
def test_an_entry_point_that_gives_no_oracle_is_named(load: Any, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    packages(monkeypatch, load)
    with pytest.raises(FormatError, match="the entry point acme") as caught:
        oracle_of("acme")
    assert (caught.value.slug, caught.value.why, caught.value.where) == ("oracle-plugin", why, "acme_formats:oracle")
