"""Where the tensors of ``non_lora_trainables.bin`` belong in the base. Each has a place by name and shape, or it is an
error: LLaVA's own loader (``load_state_dict(strict=False)``) drops a wrong name without a word."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from loraconv.errors import CorruptCheckpoint, FormatError
from loraconv.io.input_file import InputFile
from loraconv.lazy import TensorRef
from loraconv.model_folder import Model
from loraconv.names import FLOAT_DTYPES, fold_names, numel, printable, quoted

#: peft's wrapper around the model that was trained.
_WRAPPER = "base_model.model."
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
#: What a run adds to a language model: the tower of a run that trained it, the separator of LLaVA-NeXT.
TOWER = "model.vision_tower.vision_tower.vision_model."
NEWLINE = "model.image_newline"
#: Settings on which the shapes of the language model's weights depend.
_SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "num_key_value_heads")
_MLP = re.compile(r"mlp([1-9]\d?)x_gelu")


def check_config(config: Mapping[str, Any], model: Model, folder: Path) -> None:
    """Raise :class:`FormatError` (``base-mismatch``) where the run's settings are those of another base."""
    base = model.config or {}
    other = [key for key in _SIZES if key in config and key in base and config[key] != base[key]]
    if other:
        raise FormatError(
            f"the run was trained on another base: {printable(str(folder), 1000)}",
            where="; ".join(printable(f"{key}: run {config[key]}, base {base[key]}", 120) for key in other),
            hint=f"pass the model that it was trained on as --base; this one is {quoted(model.path)}",
            slug="base-mismatch",
        )


def landed(
    state: Mapping[str, TensorRef], model: Model, config: Mapping[str, Any], file: InputFile
) -> dict[str, TensorRef]:
    """The tensors under the base's names.

    Raises :class:`FormatError` (``zero3-empty``, ``no-home``, ``base-mismatch``, ``dtype-unsupported``,
    ``projector-incomplete``, ``vocabulary``) and :class:`CorruptCheckpoint` (``doubled``).
    """
    _refuse_empty(state, file)
    named = _named(state, file)
    projector = dict(projector_shapes(config))
    strange = [name for name in named if not (name in model.tensors or name in projector or _is_added(name))]
    if strange:
        near = get_close_matches(strange[0], [*projector, *model.tensors], n=2, cutoff=0.5)
        raise FormatError(
            f"{len(strange)} tensors of {file.shown} have no place in the base or in LLaVA's projector",
            where="; ".join(fold_names(strange)[:4]),
            why=f"names near to it: {printable(', '.join(near), 300)}" if near else "no name is near to it",
            hint="pass the base and the config.json that the run was trained with",
            slug="no-home",
        )
    wrong = [name for name, ref in named.items() if not _fits(name, ref, model, projector)]
    if wrong:
        shapes = {**{name: ref.shape for name, ref in model.tensors.items()}, **projector}
        raise FormatError(
            f"{len(wrong)} tensors of {file.shown} do not fit the base, or are no floating-point numbers",
            where="; ".join(fold_names(wrong)[:4]),
            why=f"{printable(wrong[0])} is {named[wrong[0]].dtype} {list(named[wrong[0]].shape)}, of the base and"
            f" config.json {list(shapes.get(wrong[0], ()))}",
            hint=f"pass the model that it was trained on as --base; this one is {quoted(model.path)}",
            slug="base-mismatch",
        )
    _check_whole({**model.tensors, **named}, projector, config, file)
    return named


def projector_shapes(config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of each tensor of the projector that the settings describe (``mm_projector_type``, and
    ``linear`` where it is not said). Raises :class:`FormatError` (``projector-type``) for one that LLaVA has not."""
    kind, wide, hidden = (
        config.get("mm_projector_type", "linear"),
        config.get("mm_hidden_size"),
        config.get("hidden_size"),
    )
    mlp = _MLP.fullmatch(kind) if isinstance(kind, str) else None
    if kind == "identity":
        return
    if (mlp is None and kind != "linear") or type(wide) is not int or type(hidden) is not int:
        raise FormatError(
            f"config.json describes no projector that LLaVA has: {printable(str(kind), 60)}",
            why="mm_projector_type is linear, mlpNx_gelu or identity, mm_hidden_size and hidden_size are numbers",
            hint="restore the config.json that the trainer wrote",
            slug="projector-type",
        )
    steps = [f"{2 * step}." for step in range(int(mlp[1]))] if mlp else [""]
    for number, step in enumerate(steps):
        yield f"model.mm_projector.{step}weight", (hidden, hidden if number else wide)
        yield f"model.mm_projector.{step}bias", (hidden,)


def _refuse_empty(state: Mapping[str, TensorRef], file: InputFile) -> None:
    empty = [name for name, ref in state.items() if not numel(ref.shape)]
    if empty:
        raise FormatError(
            f"{len(empty)} tensors of {file.shown} are empty",
            where="; ".join(fold_names(empty)[:4]),
            why="they were saved under DeepSpeed ZeRO-3 without being gathered: the file holds no number of them",
            hint="save them again with stage3_gather_16bit_weights_on_model_save, or train with ZeRO stage 2",
            slug="zero3-empty",
        )


def _named(state: Mapping[str, TensorRef], file: InputFile) -> dict[str, TensorRef]:
    named = {name.removeprefix(_WRAPPER): ref for name, ref in state.items()}
    if len(named) != len(state):
        raise CorruptCheckpoint(
            f"{file.shown} holds tensors twice, once with peft's prefix and once without",
            hint="use the file as the trainer saved it",
            slug="doubled",
        )
    return named


def _is_added(name: str) -> bool:
    return name.startswith(TOWER) or name == NEWLINE


def _fits(name: str, ref: TensorRef, model: Model, projector: Mapping[str, tuple[int, ...]]) -> bool:
    if ref.dtype not in FLOAT_DTYPES:
        return False
    if name in projector:
        return ref.shape == projector[name]
    home = model.tensors.get(name)
    if home is None:
        return True
    grown = name in (EMBEDDINGS, HEAD) and len(ref.shape) == 2 and ref.shape[1:] == home.shape[1:]
    return grown or ref.shape == home.shape


def _check_whole(
    tensors: Mapping[str, TensorRef],
    projector: Mapping[str, tuple[int, ...]],
    config: Mapping[str, Any],
    file: InputFile,
) -> None:
    missing = [name for name in projector if name not in tensors]
    if missing:
        raise FormatError(
            f"neither {file.shown} nor the base has the whole projector",
            where="; ".join(fold_names(missing)[:4]),
            why=f"config.json says mm_projector_type = {printable(str(config.get('mm_projector_type', 'linear')), 40)}",
            hint="pass the run and the base as they were trained",
            slug="projector-incomplete",
        )
    rows = {name: tensors[name].shape[0] for name in (EMBEDDINGS, HEAD) if name in tensors and tensors[name].shape}
    told = config.get("vocab_size")
    if len({*rows.values(), *([told] if type(told) is int else [])}) > 1:
        raise FormatError(
            "the vocabulary has more than one size",
            where=printable(", ".join(f"{name} {count}" for name, count in rows.items()) + f", vocab_size {told}", 300),
            why="the tokenizer grew, and only a part of what grew with it is in the run",
            hint="pass the base that the run was trained on, with the config.json that the trainer wrote",
            slug="vocabulary",
        )
