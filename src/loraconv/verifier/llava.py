"""What a LLaVA run adds to its base, stated a second time from LLaVA's own loader.

Facts: haotian-liu/LLaVA ``llava/model/builder.py``: of each name in ``non_lora_trainables.bin`` the wrapper that peft
puts around a model (``base_model.model.``) comes off, and what is left is a name of the model's state dict.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

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


def tower_beside(tower: Mapping[str, TensorRef]) -> dict[str, TensorRef]:
    """The tensors of a CLIP vision tower (alone, or in a whole CLIP model) under LLaVA's names of them."""
    whole = any(name.startswith("vision_model.") for name in tower)
    inner = {name.removeprefix("vision_model."): ref for name, ref in tower.items() if _is_vision(name, whole)}
    inner.pop("embeddings.position_ids", None)  # 0, 1, 2, ...: no weight, and no longer saved
    return {f"model.vision_tower.vision_tower.vision_model.{name}": ref for name, ref in inner.items()}


def _is_vision(name: str, whole: bool) -> bool:
    return name.startswith("vision_model.") if whole else name.split(".")[0] in _VISION


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
