"""Settings of a LLaVA model in transformers' own class, against those of LLaVA's trainer and of its vision tower."""

from __future__ import annotations

from typing import Any

import pytest

from loraconv.verifier.llava import is_renamed, is_tower, other_settings

#: ``config.json`` of liuhaotian/llava-v1.5-7b, of its tower, and of llava-hf/llava-1.5-7b-hf, shortened.
ORIGINAL: dict[str, Any] = {
    "architectures": ["LlavaLlamaForCausalLM"], "hidden_size": 4096, "image_aspect_ratio": "pad",
    "mm_hidden_size": 1024, "mm_projector_type": "mlp2x_gelu", "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2, "model_type": "llava", "rms_norm_eps": 1e-05, "tokenizer_model_max_length": 2048,
    "torch_dtype": "float16", "transformers_version": "4.31.0", "tune_mm_mlp_adapter": False, "vocab_size": 32000,
}  # fmt: skip
TOWER = {"hidden_size": 1024, "image_size": 336, "model_type": "clip_vision_model", "torch_dtype": "float32"}
CONFIG: dict[str, Any] = {
    "image_token_index": 32000, "vision_feature_layer": -2, "vision_feature_select_strategy": "default",
    "text_config": {"hidden_size": 4096, "rms_norm_eps": 1e-05, "vocab_size": 32001, "torch_dtype": "bfloat16"},
    "vision_config": {"hidden_size": 1024, "image_size": 336, "_name_or_path": "x"},
}  # fmt: skip


def changed(part: str, **values: Any) -> dict[str, Any]:
    return CONFIG | {part: CONFIG[part] | values}


def test_the_right_settings_have_no_other() -> None:
    assert other_settings(CONFIG, ORIGINAL, TOWER) == []
    assert other_settings(CONFIG, ORIGINAL, {"vision_config": TOWER, "text_config": {"x": 1}}) == []
    assert other_settings(CONFIG, ORIGINAL, None) == []  # then the tower is taken at its word
    assert other_settings(CONFIG, {k: v for k, v in ORIGINAL.items() if k != "mm_vision_select_feature"}, TOWER) == []


@pytest.mark.parametrize(
    ("config", "key"),
    [
        (CONFIG | {"image_token_index": 32001}, "image_token_index"),
        (CONFIG | {"vision_feature_layer": -1}, "vision_feature_layer"),
        (CONFIG | {"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy"),
        (changed("text_config", vocab_size=32000), "text_config.vocab_size"),
        (changed("text_config", vocab_size=32002), "text_config.vocab_size"),
        (changed("text_config", hidden_size=5120), "text_config.hidden_size"),
        (changed("text_config", rope_theta=1e6), "text_config.rope_theta"),
        (changed("vision_config", image_size=224), "vision_config.image_size"),
        (changed("vision_config", layers=24), "vision_config.layers"),
    ],
)
def test_a_setting_that_is_another_is_named(config: dict[str, Any], key: str) -> None:
    assert other_settings(config, ORIGINAL, TOWER) == [key]
    # Without the tower's own settings nothing tells that those of the vision model are wrong.
    assert other_settings(config, ORIGINAL, None) == ([] if key.startswith("vision_config") else [key])


def test_settings_that_are_missing_are_named() -> None:
    for key in ("image_token_index", "vision_feature_layer", "vision_feature_select_strategy"):
        assert other_settings({k: v for k, v in CONFIG.items() if k != key}, ORIGINAL, TOWER) == [key]
    bare = other_settings({k: v for k, v in CONFIG.items() if k != "text_config"}, ORIGINAL, TOWER)
    assert bare == ["text_config.vocab_size", "text_config.hidden_size", "text_config.rms_norm_eps"]
    vision = other_settings(CONFIG | {"vision_config": 7}, ORIGINAL, TOWER)
    assert vision == ["vision_config.hidden_size", "vision_config.image_size"]
    # Without a number of rows, the image token has no place of its own.
    for size in (None, "many", 3.5):
        unknown = other_settings(CONFIG, ORIGINAL | {"vocab_size": size}, TOWER)
        assert unknown == ["text_config.vocab_size", "image_token_index"]


@pytest.mark.parametrize(
    ("feature", "strategy"), [("patch", "default"), ("cls_patch", "full"), ("other", None), (3, None)]
)
def test_the_class_token_is_kept_where_llava_keeps_it(feature: Any, strategy: str | None) -> None:
    original = ORIGINAL | {"mm_vision_select_feature": feature}
    for told in ("default", "full", None):
        right = [] if told == strategy else ["vision_feature_select_strategy"]
        assert other_settings(CONFIG | {"vision_feature_select_strategy": told}, original, TOWER) == right


def test_notes_and_the_trainers_own_settings_are_no_settings_of_the_model() -> None:
    notes = {"_diffusers_version": 1, "_name_or_path": 2, "dtype": 3, "torch_dtype": 4}
    assert other_settings(changed("text_config", **notes), ORIGINAL, TOWER) == []
    trainers = {
        "x_mm_y": 1, "mm_z": 1, "architectures": 1, "auto_map": 1, "image_aspect_ratio": 1, "image_grid_pinpoints": 1,
        "model_type": 1, "tokenizer_x": 1, "transformers_version": 1,
    }  # fmt: skip
    assert other_settings(CONFIG, ORIGINAL | trainers | notes, TOWER) == []
    for word in ("amm", "my_architectures", "model_types", "image_aspect"):
        assert other_settings(CONFIG, ORIGINAL | {word: 1}, TOWER) == [f"text_config.{word}"]


@pytest.mark.parametrize(
    ("name", "renamed", "tower"),
    [
        ("vision_tower.vision_model.encoder.w", True, False), ("multi_modal_projector.linear_1.bias", True, False),
        ("multi_modal_projector.linear_2.weight", True, False), ("language_model.lm_head.weight", True, False),
        ("language_model.model.layers.0.w", True, False), ("language_model.other.w", False, False),
        ("model.layers.0.w", False, False), ("multi_modal_projector.linear_3.bias", False, False),
        ("model.vision_tower.vision_tower.vision_model.encoder.w", False, True),
        ("model.vision_tower.vision_tower.other", False, False), ("x.vision_tower.vision_model.w", False, False),
    ],
)  # fmt: skip
def test_names_of_transformers_class_and_of_the_tower_are_told_from_others(
    name: str, renamed: bool, tower: bool
) -> None:
    assert (is_renamed(name), is_tower(name)) == (renamed, tower)
