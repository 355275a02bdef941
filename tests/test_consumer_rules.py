"""The rules of the table of consumers, one at a time, on files of a few keys: what ``ByConfig`` and ``ByName`` say.

The rows of the table are held against the real libraries in ``test_consumers.py``.
"""

from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from loraconv.verifier.consumers.prediction import read_with, spelled_scales
from loraconv.verifier.consumers.reading import AdapterFile, Reading
from loraconv.verifier.consumers.table import ByConfig, ByName
from loraconv.verifier.numbers import Held

BLOCK = "transformer_blocks.0.attn1."
Q, K, V = (f"{BLOCK}{name}" for name in ("to_q", "to_k", "to_v"))
HEADER = ByConfig(name="c", meant_for=(), mend="", facts="", prefix="transformer.", config="header", peft=(0, 15))
NOWHERE = replace(HEADER, config="nowhere")
PEFT = replace(HEADER, prefix="base_model.model.", config="adapter_config.json", strict=False, unfilled="nothing")


def keys(*modules: str, prefix: str = "transformer.", rank: int = 2) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for module in modules:
        made[f"{prefix}{module}.lora_A.weight"] = Held(np.ones((rank, 8)), "F32")
        made[f"{prefix}{module}.lora_B.weight"] = Held(np.ones((8, rank)), "F32")
    return made


def read(
    consumer: Any, tensors: dict[str, Any], config: Any = None, path: str = "file.safetensors", **more: Any
) -> Reading:
    if config is not None and consumer.config == "header":
        text = config if isinstance(config, str) else json.dumps({f"transformer.{k}": v for k, v in config.items()})
        return read_with(consumer, AdapterFile(path, tensors, {"lora_adapter_metadata": text}, **more))
    return read_with(consumer, AdapterFile(path, tensors, {}, config, **more))


def stated(*modules: str, **more: Any) -> dict[str, Any]:
    return {"r": 2, "lora_alpha": 1, "target_modules": list(modules), **more}


# --- keys -------------------------------------------------------------------------------------------------------------


def test_keys_without_the_prefix_are_dropped_unless_all_lack_it() -> None:
    both = keys(Q) | keys(K, prefix="")
    told = read(NOWHERE, both)
    assert told == Reading("c", scales={Q: Fraction(1)}, dropped=tuple(keys(K, prefix="")))
    assert read(NOWHERE, keys(K, prefix="")) == Reading("c", dropped=tuple(keys(K, prefix="")))
    lenient = replace(NOWHERE, unless_all_lack_it=True)
    assert read(lenient, both) == told
    assert read(lenient, keys(K, prefix="")) == Reading("c", scales={K: Fraction(1)})
    # A prefix without its dot is cut off with it.
    assert read(replace(NOWHERE, prefix="transformer"), keys(Q)).scales == {Q: Fraction(1)}


def test_a_word_that_every_key_needs_and_one_that_is_passed_over() -> None:
    strict = replace(NOWHERE, must_contain="lora", ignored="dora_scale")
    odd = {"transformer.x": Held(np.ones(2), "F32")}
    refused = read(strict, keys(Q) | odd)
    assert (refused.error, refused.scales) == ("Invalid LoRA checkpoint", {})
    assert "lora" in refused.why
    scaled = {f"transformer.{Q}.dora_scale": Held(np.ones(2), "F32")}
    assert read(strict, keys(Q) | scaled) == Reading("c", scales={Q: Fraction(1)}, dropped=tuple(scaled))


def test_old_names_are_renamed_where_the_first_key_has_no_new_one() -> None:
    row = replace(NOWHERE, renames=((".to_q_lora.down", ".to_q.lora_A"), (".to_q_lora.up", ".to_q.lora_B")))
    ones = Held(np.ones((2, 2)), "F32")
    old: dict[str, Any] = {f"transformer.{BLOCK}processor.to_q_lora.{side}.weight": ones for side in ("down", "up")}
    assert read(row, old) == Reading("c", scales={Q: Fraction(1)})
    assert read(row, old | keys(K)) == Reading("c", scales={Q: Fraction(1), K: Fraction(1)})
    assert read(row, keys(K) | old) == Reading("c", scales={K: Fraction(1)}, dropped=tuple(old))
    assert read(NOWHERE, old).error.startswith("IndexError")


def test_the_name_of_an_adapter_in_a_key_is_taken_by_some() -> None:
    named = {n.replace(".weight", ".default.weight"): t for n, t in keys(Q, prefix="base_model.model.").items()}
    config = stated("to_q", peft_type="LORA")
    assert read(PEFT, named, config) == Reading("c", dropped=tuple(named))
    assert read(replace(PEFT, in_memory="default"), named, config) == Reading("c", scales={Q: Fraction(1, 2)})


# --- without a configuration ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "ranks", "scales"),
    [
        ("rank", (2, 4, 4), (1, 1, 1)),
        ("first", (2, 4, 4), (1, Fraction(1, 2), Fraction(1, 2))),
        ("first", (4, 2, 2), (1, 2, 2)),
        ("first, if one differs", (2, 2, 2), (1, 1, 1)),
        ("first, if one differs", (4, 2, 2), (1, 2, 2)),
        ("first, if one differs", (2, 2, 4), (1, 1, Fraction(1, 2))),
    ],
)  # fmt: skip
def test_alpha_is_taken_from_the_ranks(rule: Any, ranks: tuple[int, ...], scales: tuple[Any, ...]) -> None:
    tensors: dict[str, Any] = {}
    for module, rank in zip((Q, K, V), ranks, strict=True):
        tensors |= keys(module, rank=rank)
    told = read(replace(NOWHERE, default_alpha=rule), tensors)
    assert told.scales == dict(zip((Q, K, V), map(Fraction, scales), strict=True))


def test_two_ranks_that_differ_leave_each_module_its_own_alpha() -> None:
    modules = [f"transformer_blocks.{n}.attn1.to_q" for n in range(5)]
    tensors = keys(*modules[:3]) | keys(*modules[3:], rank=4)
    told = read(replace(NOWHERE, default_alpha="first, if one differs"), tensors)
    assert told.scales == dict.fromkeys(modules, Fraction(1))


def test_biases_of_lora_b_break_who_takes_the_rank_from_them() -> None:
    tensors = keys(Q) | {f"transformer.{Q}.lora_B.bias": Held(np.ones(8), "F32")}
    assert read(NOWHERE, tensors) == Reading("c", scales={Q: Fraction(1)})
    assert read(replace(NOWHERE, bias=False), tensors).error == "IndexError: tuple index out of range"
    assert read(NOWHERE, {n: t for n, t in keys(Q).items() if "lora_A" in n}).error == (
        "IndexError: list index out of range"
    )


def test_magnitudes_are_applied_by_those_who_know_them() -> None:
    extra = {f"transformer.{Q}.lora_magnitude_vector": Held(np.ones(8), "F32")}
    assert read(NOWHERE, keys(Q) | extra) == Reading("c", scales={Q: Fraction(1)}, magnitudes=True)
    assert read(NOWHERE, keys(Q)).magnitudes is False
    assert read(replace(NOWHERE, dora=False), keys(Q) | extra) == Reading(
        "c", scales={Q: Fraction(1)}, dropped=tuple(extra)
    )


@pytest.mark.parametrize(("modules", "error"), [((f"{BLOCK}to_x",), "not found in the base model"), ((Q,), "")])
def test_modules_that_the_model_does_not_have_are_refused(modules: tuple[str, ...], error: str) -> None:
    assert read(NOWHERE, keys(*modules)).error == error


# --- with one -------------------------------------------------------------------------------------------------------


def test_the_header_is_read_by_those_who_read_it() -> None:
    config = stated("to_q")
    assert read(HEADER, keys(Q), config).scales == {Q: Fraction(1, 2)}
    text = json.dumps({f"transformer.{k}": v for k, v in config.items()} | {"text_encoder.r": 7})
    assert read(HEADER, keys(Q), text).scales == {Q: Fraction(1, 2)}
    both = AdapterFile("f", keys(Q), {"lora_adapter_metadata": text})
    assert read_with(NOWHERE, both).scales == {Q: Fraction(1)}
    assert read(HEADER, keys(Q), "").scales == {Q: Fraction(1)}
    for wrong, error in (("{", "JSONDecodeError"), ("[1]", "AttributeError"), ("[" * 100_000, "JSONDecodeError")):
        assert read(HEADER, keys(Q), wrong).error == error


def test_peft_reads_its_configuration_where_no_key_is_its_own_too() -> None:
    others = keys(Q)
    assert read(PEFT, others, {"peft_type": "LORA", "r": 2}).error == "KeyError"
    assert read(PEFT, others, stated("to_q", peft_type="LORA")) == Reading("c", dropped=tuple(others))
    theirs = keys(Q, prefix="base_model.model.")
    assert read(HEADER, theirs, {"r": 2}) == Reading("c", dropped=tuple(theirs))


def test_peft_needs_its_file_and_its_kind() -> None:
    tensors = keys(Q, prefix="base_model.model.")
    assert read(PEFT, tensors).error == "adapter_config.json"
    assert read(PEFT, tensors, stated("to_q")).error == "KeyError"
    assert "IA3" in read(PEFT, tensors, stated("to_q", peft_type="IA3")).unsure
    assert read(PEFT, tensors, stated("to_q", peft_type="LORA")).scales == {Q: Fraction(1, 2)}


@pytest.mark.parametrize(("strict", "error"), [(True, "could not be instantiated"), (False, "")])
def test_a_field_that_no_peft_knows_is_refused_or_passed_over(strict: bool, error: str) -> None:
    told = read(replace(HEADER, strict=strict), keys(Q), stated("to_q", invented=1))
    assert told.error == error
    assert ("invented" in told.why) is strict


@pytest.mark.parametrize(
    ("field", "value", "sure"),
    [
        ("layers_to_transform", [0], False), ("layers_to_transform", [], True), ("layers_to_transform", None, True),
        ("fan_in_fan_out", True, False), ("fan_in_fan_out", False, True), ("bias", "none", True),
        ("bias", "all", False),
        ("init_lora_weights", True, True), ("init_lora_weights", "gaussian", False), ("task_type", "X", True),
        ("loftq_config", {}, True), ("loftq_config", {"a": 1}, False), ("exclude_modules", ["x"], True),
    ],
)  # fmt: skip
def test_a_field_that_is_not_followed_leaves_the_table_unsure(field: str, value: Any, sure: bool) -> None:
    told = read(HEADER, keys(Q), stated("to_q", **{field: value}))
    assert (told.unsure == "") is sure
    assert (field in told.unsure) is not sure
    assert told.scales == ({Q: Fraction(1, 2)} if sure else {})


@pytest.mark.parametrize(
    ("field", "peft", "strict", "needs"),
    [
        ("eva_config", (0, 13), True, "peft 0.14"), ("eva_config", (0, 14), True, ""),
        ("eva_config", (0, 15), True, ""),
        ("velora_config", (0, 17), True, "peft 0.20"), ("velora_config", (0, 17), False, ""), ("r", (0, 13), True, ""),
        ("no_such_field", (0, 13), False, ""),
    ],
)  # fmt: skip
def test_the_oldest_peft_that_knows_all_fields_is_told(field: str, peft: Any, strict: bool, needs: str) -> None:
    config = stated("to_q") | ({field: None} if field != "r" else {})
    told = read(replace(HEADER, peft=peft, strict=strict), keys(Q), config)
    assert (told.needs, told.scales) == (needs, {Q: Fraction(1, 2)})


def test_what_a_configuration_has_to_say_is_asked_for() -> None:
    row = replace(HEADER, required=("rank_pattern", "target_modules"))
    assert read(row, keys(Q), stated("to_q")).why == "the configuration has no rank_pattern"
    assert read(row, keys(Q), stated("to_q", rank_pattern={})).error == ""
    assert read(row, keys(Q), {"r": 2, "rank_pattern": {}}).why == "the configuration has no target_modules"


TARGETS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "ends": ({"target_modules": ["to_q", "to_k"]}, (Q, K)),
    "a whole name": ({"target_modules": [Q]}, (Q,)),
    "the end of a step is none": ({"target_modules": ["o_q", "to_k"]}, (K,)),
    "a pattern": ({"target_modules": r".*\.to_[qk]"}, (Q, K)),
    "a pattern of the whole name": ({"target_modules": "to_q|.*to_k"}, (K,)),
    "but": ({"target_modules": ["to_q", "to_k"], "exclude_modules": ["to_q"]}, (K,)),
    "but a pattern": ({"target_modules": ["to_q", "to_k"], "exclude_modules": ".*to_k"}, (Q,)),
}


@pytest.mark.parametrize("case", TARGETS)
def test_the_modules_are_those_that_the_configuration_names(case: str) -> None:
    config, modules = TARGETS[case]
    told = read(HEADER, keys(Q, K, V), {"r": 2, "lora_alpha": 1} | config)
    assert told.scales == dict.fromkeys(modules, Fraction(1, 2))
    assert told.undefined == ()
    assert set(told.dropped) == set(keys(Q, K, V)) - set(keys(*modules))
    by_keys = read(replace(HEADER, layers_by="keys"), keys(Q, K, V), {"r": 2, "lora_alpha": 1} | config)
    assert set(by_keys.scales) == {Q, K, V}


@pytest.mark.parametrize(
    ("targets", "error"), [(7, "TypeError"), (["x"], "not found in the base model"), ("(", "error")]
)
def test_targets_that_are_none_are_refused(targets: Any, error: str) -> None:
    assert read(HEADER, keys(Q), stated() | {"target_modules": targets}).error == error


def test_layers_are_those_that_the_keys_name_and_the_first_without() -> None:
    far = "transformer_blocks.11.attn1.to_q"
    told = read(HEADER, keys(Q, far), stated("to_q", "to_k"))
    assert set(told.scales) == {Q, far}
    assert told.undefined == (K, far.replace("to_q", "to_k"))
    told = read(HEADER, keys("proj_out"), stated("proj_out", "to_q"))
    assert (told.scales, told.undefined) == ({"proj_out": Fraction(1, 2)}, (Q,))
    every = read(HEADER, keys(Q), stated() | {"target_modules": "all-linear"})
    assert len(every.undefined) == 15  # MODULES has 16
    assert Q in every.scales


def test_layers_that_are_never_filled_compute_anything_or_nothing() -> None:
    half = keys(Q) | {n: t for n, t in keys(K).items() if "lora_B" in n}
    other = keys(Q) | {n: t for n, t in keys(K).items() if "lora_A" in n}
    for tensors, undefined in ((half, (K,)), (other, ())):
        told = read(replace(HEADER, unfilled="nothing"), tensors, stated("to_q", "to_k", "to_v"))
        assert (set(told.scales), told.undefined) == ({Q}, undefined)
        told = read(HEADER, tensors, stated("to_q", "to_k", "to_v"))
        assert (set(told.scales), told.undefined) == ({Q}, (K, V))
    asked = stated("to_q", use_dora=True)
    assert read(replace(HEADER, unfilled="nothing"), keys(Q), asked).unsure
    assert read(HEADER, keys(Q), asked).undefined == (Q,)


@pytest.mark.parametrize(("field", "ending"), [("use_dora", "lora_magnitude_vector"), ("lora_bias", "lora_B.bias")])
def test_magnitudes_and_biases_are_filled_where_the_configuration_asks_for_them(field: str, ending: str) -> None:
    extra = {f"transformer.{Q}.{ending}": Held(np.ones(8), "F32")}
    for asked in (True, False):
        told = read(HEADER, keys(Q) | extra, stated("to_q", **{field: asked}))
        assert told.scales == {Q: Fraction(1, 2)}
        assert told.dropped == (() if asked else tuple(extra))
        assert told.magnitudes is (asked and field == "use_dora")


@pytest.mark.parametrize("field", ["use_dora", "lora_bias"])
def test_a_layer_that_lacks_only_what_the_configuration_asks_for_besides_is_not_filled(field: str) -> None:
    asked = stated("to_q", **{field: True})
    told = read(HEADER, keys(Q), asked)
    assert (told.scales, told.undefined, told.dropped) == ({}, (Q,), ())
    lenient = replace(HEADER, unfilled="nothing")
    assert "magnitudes or biases" in read(lenient, keys(Q), asked).unsure
    # A layer of which nothing is there, or the down alone, adds nothing whatever is asked for.
    down = {n: t for n, t in keys(K).items() if "lora_A" in n}
    ending = {"use_dora": "lora_magnitude_vector", "lora_bias": "lora_B.bias"}[field]
    whole = keys(Q) | {f"transformer.{Q}.{ending}": Held(np.ones(8), "F32")}
    told = read(lenient, whole | down, stated("to_q", "to_k", "to_v", **{field: True}))
    assert (told.scales, told.undefined) == ({Q: Fraction(1, 2)}, ())


RANKS: dict[str, tuple[dict[str, Any], Any]] = {
    "alpha over rank": ({"lora_alpha": 3}, Fraction(3, 2)),
    "peft's own alpha": ({"lora_alpha": 8}, Fraction(4)),
    "a pattern of alpha": ({"alpha_pattern": {"to_k": 9, "to_q": 5, "attn1.to_q": 6}}, Fraction(5, 2)),
    "a pattern of a whole name": ({"alpha_pattern": {"o_q": 9, Q: 5}}, Fraction(5, 2)),
    "no pattern": ({"alpha_pattern": None}, Fraction(1, 2)),
    "rslora, a square": ({"use_rslora": True, "r": 4, "lora_alpha": 6}, Fraction(3)),
    "rslora": ({"use_rslora": True, "lora_alpha": 6}, 6 / np.sqrt(2)),
    "no rslora": ({"use_rslora": False}, Fraction(1, 2)),
}


@pytest.mark.parametrize("case", RANKS)
def test_the_scale_is_that_of_the_configuration(case: str) -> None:
    config, scale = RANKS[case]
    config = stated("to_q") | config
    assert read(HEADER, keys(Q, rank=config["r"]), config).scales == {Q: scale}


def test_without_alpha_and_rank_both_are_pefts_eight() -> None:
    assert read(HEADER, keys(Q, rank=8), {"target_modules": ["to_q"], "r": 8}).scales == {Q: Fraction(1)}
    assert read(HEADER, keys(Q, rank=8), {"target_modules": ["to_q"], "lora_alpha": 4}).scales == {Q: Fraction(1, 2)}


def test_a_rank_that_is_none_or_another_is_refused() -> None:
    for rank in (0, -1, 2.0, True, "2", None):
        assert read(HEADER, keys(Q), stated("to_q") | {"r": rank}).error == "ValueError"
    assert read(HEADER, keys(Q, rank=1), stated("to_q") | {"r": 1}).scales == {Q: Fraction(1)}
    for alpha in (float("inf"), float("nan"), "1", True):
        assert "alpha" in read(HEADER, keys(Q), stated("to_q") | {"lora_alpha": alpha}).unsure
    for tensors in (keys(Q, rank=3), keys(Q) | {f"transformer.{Q}.lora_A.weight": Held(np.ones((3, 8)), "F32")}):
        assert read(HEADER, tensors, stated("to_q")).error == "size mismatch for"
    up = {f"transformer.{Q}.lora_B.weight": Held(np.ones((8, 3)), "F32")}
    assert read(HEADER, keys(Q) | up, stated("to_q")).error == "size mismatch for"
    assert read(HEADER, keys(Q) | {n: Held(np.ones(8), "F32") for n in up}, stated("to_q")).error == "size mismatch for"


@pytest.mark.parametrize(
    ("pattern", "fine"),
    [
        (".*to_q", True), (".*to_[qk]+", True), (".*t.*o.*_q", False), (".*(to_q){1}", False),
        (".*to_q|" + "q" * 193, True), (".*to_q|" + "q" * 194, False),
    ],
)  # fmt: skip
def test_a_pattern_that_could_take_years_is_not_tried(pattern: str, fine: bool) -> None:
    told = read(HEADER, keys(Q), stated() | {"target_modules": pattern})
    assert ("complicated" in told.unsure) is not fine


# --- by name --------------------------------------------------------------------------------------------------------

NAMED = ByName(
    name="n", meant_for=(), mend="", facts="", names=(("b.{i}.q", Q.replace("0", "{i}")), ("out", "proj_out")),
    factors=((".down", ".up"), (".lora_A", ".lora_B")), dotted=("d.",), underscored=("u_",), magnitude=".dora",
)  # fmt: skip


def two(stem: str, rank: int = 2, ends: tuple[str, str] = (".down", ".up")) -> dict[str, Any]:
    return {stem + ends[0]: Held(np.ones((rank, 8)), "F32"), stem + ends[1]: Held(np.ones((8, rank)), "F32")}


def alpha(stem: str, value: Any) -> dict[str, Any]:
    return {f"{stem}.alpha": Held(np.array(value, dtype=np.float64), "F32")}


def test_names_are_found_with_their_prefixes_and_endings() -> None:
    far = Q.replace("0", "12")
    tensors = two("d.b.12.q") | two("u_out", ends=(".lora_A", ".lora_B")) | two("b.0.q") | two("u_b.0.q") | two("d.x")
    told = read_with(NAMED, AdapterFile("f", tensors))
    assert told.scales == {far: Fraction(1), "proj_out": Fraction(1)}
    assert told.dropped == (*two("b.0.q"), *two("u_b.0.q"), *two("d.x"))
    assert read_with(NAMED, AdapterFile("f", two("u_b_3_q"))).scales == {Q.replace("0", "3"): Fraction(1)}
    assert (told.note, told.magnitudes) == ("", False)


def test_alpha_and_magnitudes_stand_beside_the_factors() -> None:
    dora = {"d.out.dora": Held(np.ones(8), "F32")}
    tensors = two("d.out", rank=4) | alpha("d.out", 2) | dora
    assert read_with(NAMED, AdapterFile("f", tensors)) == Reading(
        "n", scales={"proj_out": Fraction(1, 2)}, magnitudes=True
    )
    plain = replace(NAMED, magnitude="")
    assert read_with(plain, AdapterFile("f", tensors)) == Reading(
        "n", scales={"proj_out": Fraction(1, 2)}, dropped=("d.out.dora",)
    )
    assert read_with(NAMED, AdapterFile("f", two("d.out") | alpha("d.out", [[4]]))).scales == {"proj_out": Fraction(2)}
    assert read_with(NAMED, AdapterFile("f", two("d.out", rank=0) | alpha("d.out", 4))).scales == {
        "proj_out": Fraction(0)
    }
    refused = read_with(NAMED, AdapterFile("f", two("d.out") | alpha("d.out", [1, 2])))
    assert (refused.error, refused.scales) == ("only one element tensors", {})


def test_half_a_pair_and_a_strange_key_are_refused_by_those_who_refuse_them() -> None:
    up = {n: t for n, t in two("d.out").items() if n.endswith("up")}
    assert read_with(NAMED, AdapterFile("f", up)).error == "d.out.down"
    strange = two("d.out") | {"x": Held(np.ones(1), "F32")}
    assert read_with(NAMED, AdapterFile("f", strange)).error == ""
    raising = replace(NAMED, unknown="raises")
    assert read_with(raising, AdapterFile("f", strange)).error == "Can't recognize LoRA"
    assert read_with(raising, AdapterFile("f", two("d.out"))).scales == {"proj_out": Fraction(1)}


def test_who_leaves_a_file_to_another_says_so_and_what_the_path_does() -> None:
    row = replace(NAMED, delegates=("lora_B", "diffusers 0.40 and later"), divides=("orbit", "dimensionx"), lacks="no")
    told = read_with(row, AdapterFile("some/Orbit_DimensionX.safetensors", keys(Q)))
    assert (told.consumer, told.scales) == ("n", {Q: Fraction(1)})
    by_diffusers, _, fusing = told.note.partition("; ")
    assert by_diffusers.endswith("here diffusers 0.40 and later")
    assert fusing.endswith("because the file's path contains orbit")
    assert read_with(row, AdapterFile("f", keys(Q))).note.endswith("0.40 and later")
    assert read_with(row, AdapterFile("orbit", two("d.out"))).note == "no"


def test_a_trainers_checkpoint_is_no_file_for_anyone() -> None:
    for row in (HEADER, NAMED):
        told = read_with(row, AdapterFile("f", keys(Q), training=True))
        assert (told.scales, told.dropped) == ({}, ())
        assert "trainer's checkpoint" in told.why


def test_the_scale_as_trained_is_found_in_every_spelling() -> None:
    ends = (".lora_down.weight", ".lora_up.weight")
    tensors = two(f"diffusion_model.{Q}", 4, ends) | alpha(f"diffusion_model.{Q}", 2)
    tensors |= two("lora_unet__" + K.replace(".", "_"), 4, ends) | two(V, 4, ends) | two("x", 4, ends)
    assert spelled_scales(tensors, None) == {Q: Fraction(1, 2), K: Fraction(1), V: Fraction(1)}
    assert spelled_scales(tensors, Fraction(8)) == dict.fromkeys((Q, K, V), Fraction(2))
    assert spelled_scales(two(Q, 0, ends) | {K + ends[1]: Held(np.ones((8, 2)), "F32")}, None) == {}
    assert spelled_scales(two(Q, 1, ends), Fraction(3)) == {Q: Fraction(3)}
