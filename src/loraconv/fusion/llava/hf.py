"""A fused LLaVA model as ``LlavaForConditionalGeneration`` of transformers: names, settings, vision tower, image token.

Facts: huggingface/transformers ``models/llava``. The names are those of the ``llava-hf`` repositories, which every
release reads. The original keeps the tower in a repository of its own and marks images by the token -200, which no
tokenizer has; transformers has the tower inside and needs a token of the vocabulary. Its embedding is never used: image
features are put in its place.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loraconv.errors import FormatError, UsageError
from loraconv.fusion.llava.landing import EMBEDDINGS, HEAD, TOWER
from loraconv.fusion.llava.tokenizer import FILES, with_image_token
from loraconv.fusion.rest import Kept
from loraconv.lazy import TensorRef
from loraconv.model_folder import Model, inside, open_model
from loraconv.names import fold_names, printable, quoted

#: The original's names and transformers' (beginnings of names), the longer first.
_NAMES = {
    TOWER: "vision_tower.vision_model.",
    "model.mm_projector.0.": "multi_modal_projector.linear_1.",
    "model.mm_projector.2.": "multi_modal_projector.linear_2.",
    "model.embed_tokens.": "language_model.model.embed_tokens.",
    "model.layers.": "language_model.model.layers.",
    "model.norm.": "language_model.model.norm.",
    "lm_head.": "language_model.lm_head.",
}
_TOWER_PARTS = (
    "embeddings.class_embedding",
    "embeddings.patch_embedding.weight",
    "embeddings.position_embedding.weight",
)
_TOWER_NORMS = ("pre_layrnorm", "post_layernorm")
_TOWER_LAYER = (
    "layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2", "self_attn.k_proj", "self_attn.out_proj", "self_attn.q_proj",
    "self_attn.v_proj",
)  # fmt: skip
_STRATEGIES = {"patch": "default", "cls_patch": "full"}
#: Settings of the original that its language model does not have, beside those with ``mm_`` in their names.
_NOT_TEXT = {
    "_name_or_path", "architectures", "auto_map", "dtype", "image_aspect_ratio", "image_grid_pinpoints",
    "tokenizer_model_max_length", "tokenizer_padding_side", "torch_dtype", "transformers_version",
}  # fmt: skip
#: What CLIP's settings are where its config.json does not say them (``CLIPVisionConfig``).
_CLIP = {"image_size": 224, "num_hidden_layers": 12, "patch_size": 32}
PREPROCESSOR = "preprocessor_config.json"


@dataclass(frozen=True, slots=True)
class HfLlava:
    """What the output is besides the fused tensors: ``names`` of the original -> of the output, ``more`` rows of zeros
    (original name -> number), the whole model's ``config``, the opened ``tower``, files ``kept`` of it, and the
    ``texts`` of the tokenizer and the processor by file name."""

    tower: Model
    tensors: Mapping[str, TensorRef]
    names: Mapping[str, str]
    more: Mapping[str, int]
    config: dict[str, Any]
    kept: tuple[Kept, ...]
    texts: Mapping[str, str]
    notices: tuple[str, ...]

    def joined(self, whole: Model) -> Model:
        """The model with the tower, under the original's names; tensors that ``whole`` has already win."""
        return replace(whole, tensors={**self.tensors, **whole.tensors}, config=self.config)


def open_hf(whole: Model, tower: str | Path | None, stack: ExitStack, own: Mapping[str, Path]) -> HfLlava:
    """Open the vision tower and plan the output; ``whole`` is base and run together, ``own`` the run's files.

    Raises :class:`UsageError` (``tower-missing``) and :class:`FormatError` (``not-llava``, ``tower-type``,
    ``tower-incomplete``, ``hf-llava``: what this class of transformers has no place for).
    """
    config = _llava_config(whole)
    if tower is None:
        name = printable(str(config.get("mm_vision_tower", "its repository")), 200)
        raise UsageError(
            "--to hf-llava needs the vision tower, which the run and the base do not have",
            why=f"LLaVA loads it from {name}, and transformers has it in the model",
            hint=f"hf download {quoted(name)} --local-dir TOWER, then add --vision-tower TOWER",
            slug="tower-missing",
        )
    opened = stack.enter_context(open_model(tower))
    vision = _vision_config(opened, config)
    tensors = _tower_tensors(opened, vision)
    every = {**tensors, **whole.tensors}
    names = _names(every)
    token = every[EMBEDDINGS].shape[0]
    more = {name: 1 for name in (EMBEDDINGS, HEAD) if name in every}
    kept: tuple[Kept, ...] = ()
    if (opened.folder / PREPROCESSOR).is_file():
        path = inside(opened.folder, PREPROCESSOR)
        kept = (Kept(path, PREPROCESSOR, os.stat(path).st_size),)
    said = [] if kept else [f"the tower's folder has no {PREPROCESSOR}, without which AutoProcessor loads nothing"]
    made = _config(config, vision, token)
    of_base = {} if whole.single is not None else {name: whole.folder / name for name in FILES}
    files = {**{name: inside(whole.folder, name) for name, path in of_base.items() if path.is_file()}, **own}
    patch = {**_CLIP, **vision}["patch_size"]
    tokenizer = with_image_token(files, token, patch, made["vision_feature_select_strategy"])
    return HfLlava(opened, tensors, names, more, made, kept, tokenizer.texts, (tokenizer.notice, *said))


def _llava_config(whole: Model) -> dict[str, Any]:
    config = whole.config or {}
    if "mm_hidden_size" not in config:
        raise FormatError(
            "--to hf-llava is for LLaVA, and neither the adapter nor the base is a LLaVA model",
            where=printable(str(whole.path), 1000),
            why="no config.json says mm_hidden_size",
            hint="leave --to out, or pass the folder of the finished LLaVA run",
            slug="not-llava",
        )
    kind, feature = config.get("mm_projector_type", "linear"), str(config.get("mm_vision_select_feature", "patch"))
    if kind != "mlp2x_gelu" or feature not in _STRATEGIES or type(config.get("mm_vision_select_layer")) is not int:
        raise FormatError(
            "LlavaForConditionalGeneration cannot hold this model",
            where=printable(f"mm_projector_type {kind}, mm_vision_select_feature {feature}", 200),
            why="its projector is mlp2x_gelu, on patches or on all of one layer of the tower",
            hint="leave --to out: the model in LLaVA's own layout is exact",
            slug="hf-llava",
        )
    return config


def _vision_config(tower: Model, config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the tower, as ``CLIPVisionConfig`` has them."""
    told = tower.config or {}
    vision = told["vision_config"] if isinstance(told.get("vision_config"), dict) else told
    kind, width = printable(str(told.get("model_type")), 60), vision.get("hidden_size", 768)
    sizes = [
        vision.get(key, usual) for key, usual in (("image_size", 224), ("patch_size", 32), ("num_hidden_layers", 12))
    ]
    plain = all(type(size) is int and 0 < size < 1 << 12 for size in sizes)
    if kind not in ("clip", "clip_vision_model") or width != config["mm_hidden_size"] or not plain:
        raise FormatError(
            f"the vision tower is not the run's: {printable(str(tower.path), 1000)}",
            where=f"model_type {kind}, hidden_size {printable(str(width), 40)}",
            why=f"the run has mm_vision_tower {printable(str(config.get('mm_vision_tower')), 200)}, a CLIP model of"
            f" hidden_size {printable(str(config['mm_hidden_size']), 40)}",
            hint="pass the folder of that model as --vision-tower",
            slug="tower-type",
        )
    return {**{key: value for key, value in vision.items() if key not in _NOT_TEXT}, "model_type": "clip_vision_model"}


def _tower_tensors(tower: Model, vision: Mapping[str, Any]) -> dict[str, TensorRef]:
    """The tower's tensors under the names that LLaVA gives them in its model; the text half of CLIP stays behind."""
    inner = {name.removeprefix("vision_model."): ref for name, ref in tower.tensors.items()}
    needed = list(_tower_names({**_CLIP, **vision}["num_hidden_layers"]))
    missing = [name for name in needed if name not in inner]
    if missing:
        raise FormatError(
            f"the vision tower is not whole: {printable(str(tower.path), 1000)}",
            where="; ".join(fold_names(missing)[:4]),
            hint="fetch or copy the folder again",
            slug="tower-incomplete",
        )
    return {TOWER + name: inner[name] for name in needed}


def _tower_names(layers: int) -> Iterator[str]:
    yield from _TOWER_PARTS
    modules = [*_TOWER_NORMS, *(f"encoder.layers.{n}.{module}" for n in range(layers) for module in _TOWER_LAYER)]
    for module in modules:
        yield from (f"{module}.weight", f"{module}.bias")


def _names(every: Mapping[str, TensorRef]) -> dict[str, str]:
    found = {}
    for name in every:
        begin = next((begin for begin in _NAMES if name.startswith(begin)), None)
        if begin is not None:
            found[name] = _NAMES[begin] + name.removeprefix(begin)
    homeless = [name for name in every if name not in found]
    flat = [name for name in (EMBEDDINGS, HEAD) if name in every and len(every[name].shape) != 2]
    if homeless or flat or EMBEDDINGS not in every:
        raise FormatError(
            "LlavaForConditionalGeneration cannot hold this model",
            where="; ".join(fold_names(homeless or flat or [EMBEDDINGS])[:4]),
            why="it has no such tensors" if homeless else "the base has none, or it is no matrix",
            hint="leave --to out: the model in LLaVA's own layout is exact",
            slug="hf-llava",
        )
    return found


def _config(config: Mapping[str, Any], vision: Mapping[str, Any], token: int) -> dict[str, Any]:
    """``LlavaConfig`` as JSON."""
    kind = str(config.get("model_type", "llava"))
    text = {key: value for key, value in config.items() if key not in _NOT_TEXT and "mm_" not in key}
    text |= {"model_type": "llama" if kind == "llava" else kind.removeprefix("llava_"), "vocab_size": token + 1}
    strategy = _STRATEGIES[config.get("mm_vision_select_feature", "patch")]
    told = {**_CLIP, **vision}
    patches = (told["image_size"] // told["patch_size"]) ** 2
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "image_seq_length": patches + (strategy == "full"),
        "image_token_index": token,
        "model_type": "llava",
        "multimodal_projector_bias": True,
        "projector_hidden_act": "gelu",
        "text_config": text,
        "tie_word_embeddings": bool(config.get("tie_word_embeddings", False)),
        "torch_dtype": "float32",  # replaced by that of the weights
        "vision_config": dict(vision),
        "vision_feature_layer": config["mm_vision_select_layer"],
        "vision_feature_select_strategy": strategy,
    }
