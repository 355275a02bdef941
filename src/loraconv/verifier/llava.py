"""What a LLaVA run adds to its base, stated a second time from LLaVA's own loader.

Facts: haotian-liu/LLaVA ``llava/model/builder.py``: of each name in ``non_lora_trainables.bin`` the wrapper that peft
puts around a model (``base_model.model.``) comes off, and what is left is a name of the model's state dict.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from loraconv.lazy import TensorRef, nbytes
from loraconv.names import FLOAT_DTYPES
from loraconv.verifier.proof import Check


def trained_beside(state: Mapping[str, TensorRef]) -> dict[str, TensorRef]:
    """The tensors of ``non_lora_trainables.bin`` or ``mm_projector.bin`` under the names of the model's state dict."""
    found = {}
    for name, ref in state.items():
        wrapped, _, inner = name.partition("base_model.model.")
        found[name if wrapped or not inner else inner] = ref
    return found


def main_dtype(base: Mapping[str, TensorRef]) -> str:
    """The floating dtype that most of the base's bytes have: the one dtype of a model that is fused with a run."""
    sizes = {kind: sum(nbytes(ref) for ref in base.values() if ref.dtype == kind) for kind in FLOAT_DTYPES}
    return max(sizes, key=lambda kind: sizes[kind])


def is_tower(name: str) -> bool:
    """True for a tensor of the vision tower by LLaVA's name."""
    return name.startswith(_TOWER)


def tower_beside(tower: Mapping[str, TensorRef]) -> dict[str, TensorRef]:
    """The tensors of a CLIP vision tower (alone, or in a whole CLIP model) under LLaVA's names of them."""
    whole = any(name.startswith("vision_model.") for name in tower)
    inner = {name.removeprefix("vision_model."): ref for name, ref in tower.items() if _is_vision(name, whole)}
    inner.pop("embeddings.position_ids", None)  # 0, 1, 2, ...: no weight, and no longer saved
    return {_TOWER + name: ref for name, ref in inner.items()}


def _is_vision(name: str, whole: bool) -> bool:
    return name.startswith("vision_model.") if whole else name.split(".")[0] in _VISION


_TOWER = "model.vision_tower.vision_tower.vision_model."
_VISION = ("embeddings", "encoder", "pre_layrnorm", "post_layernorm")

#: transformers' names of a LLaVA model (``llava-hf``) and LLaVA's own.
_ORIGINAL = (
    (re.compile(r"vision_tower\.vision_model\.(.+)"), r"model.vision_tower.vision_tower.vision_model.\1"),
    (re.compile(r"multi_modal_projector\.linear_1\.(.+)"), r"model.mm_projector.0.\1"),
    (re.compile(r"multi_modal_projector\.linear_2\.(.+)"), r"model.mm_projector.2.\1"),
    (re.compile(r"language_model\.lm_head\.(.+)"), r"lm_head.\1"),
    (re.compile(r"language_model\.model\.(.+)"), r"model.\1"),
)
_VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")


def is_renamed(name: str) -> bool:
    """True for a name that only transformers' own class has."""
    return any(pattern.fullmatch(name) for pattern, _ in _ORIGINAL)


def as_original(
    fused: Mapping[str, TensorRef], expected: Mapping[str, TensorRef]
) -> tuple[dict[str, TensorRef], Check]:
    """The tensors of a ``LlavaForConditionalGeneration`` under LLaVA's names, without the rows that stand for the image
    token behind those of ``expected``; and the check that there is one of them each, of zeros."""
    found: dict[str, TensorRef] = {}
    for name, ref in fused.items():
        rewritten = next((pattern.sub(new, name) for pattern, new in _ORIGINAL if pattern.fullmatch(name)), name)
        found[rewritten] = ref
    wrong, rows = [], [name for name in _VOCABULARY if name in expected and name in found]
    for name in rows:
        count = expected[name].shape[0]
        added = found[name].rows(min(count, found[name].shape[0]), found[name].shape[0])
        if added.shape[0] != 1 or any(any(piece) for piece in added.pieces()):
            wrong.append(name)
        found[name] = found[name].rows(0, min(count, found[name].shape[0]))
    what = "the image token has one row, of zeros, behind the vocabulary's"
    return found, Check("L1", what, not wrong and bool(rows), len(rows), detail="; ".join(wrong))


#: Notes in config.json about where it came from, which the class that is to be built does not read, and the dtype,
#: which the tensors tell.
NOTES = {"_diffusers_version", "_name_or_path", "dtype", "torch_dtype"}
#: Settings of LLaVA's trainer and loader, which no part of transformers' model has.
_LOADER = re.compile(
    r".*mm_.*|architectures|auto_map|image_aspect_ratio|image_grid_pinpoints|model_type|tokenizer_.*"
    r"|transformers_version|vocab_size"
)


def other_settings(
    config: Mapping[str, Any], original: Mapping[str, Any], tower: Mapping[str, Any] | None
) -> list[str]:
    """The keys of a ``LlavaConfig`` that are not what LLaVA's own settings and the tower's ask for.

    Facts: haotian-liu/LLaVA ``llava/model/multimodal_encoder/clip_encoder.py`` (which layer, with or without the class
    token), huggingface/transformers ``models/llava/configuration_llava.py``.
    """
    text, vision = (_part(config, f"{part}_config") for part in ("text", "vision"))
    rows = original.get("vocab_size")
    feature = original.get("mm_vision_select_feature", "patch")
    told = {
        "text_config.vocab_size": (text.get("vocab_size"), rows + 1 if type(rows) is int else None),
        "image_token_index": (config.get("image_token_index"), rows),
        "vision_feature_layer": (config.get("vision_feature_layer"), original.get("mm_vision_select_layer")),
        "vision_feature_select_strategy": (
            config.get("vision_feature_select_strategy"), {"patch": "default", "cls_patch": "full"}.get(str(feature)),
        ),
    }  # fmt: skip
    clip = vision if tower is None else _part(tower, "vision_config") or tower
    for part, has, wants in (("text", text, original), ("vision", vision, clip)):
        keys = [key for key in {**has, **wants} if key not in NOTES and not _LOADER.fullmatch(key)]
        told |= {f"{part}_config.{key}": (has.get(key), wants.get(key)) for key in keys}
    return [key for key, (has, wants) in told.items() if has != wants]


def _part(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    found = config.get(key)
    return found if isinstance(found, dict) else {}
