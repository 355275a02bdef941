"""What adapter files with alpha tensors, flattened names or original names say, from the definitions of their formats.

kohya (sd-scripts ``networks/lora.py``), ComfyUI (``comfy/weight_adapter/lora.py``), VideoX-Fun, DiffSynth,
diffusion-pipe, OneTrainer: ``delta = alpha / rank * up @ down``, alpha being a tensor beside the pair, or the rank.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any

from loraconv.errors import ProofFailed
from loraconv.lazy import Joined, Lazy, TensorRef, number, read
from loraconv.names import printable
from loraconv.verifier.algebra import column, cut_rows, is_special, side_of, special_pairs
from loraconv.verifier.numbers import Pair
from loraconv.verifier.original_names import Share, here, of_original
from loraconv.verifier.pipeline_names import of_pipeline, of_text_encoders

Tensors = Mapping[str, TensorRef]

_COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
_FACTOR = re.compile(r"(.+)\.lora_(?:(A|down)|(B|up))(?:\.default)?(?:\.weight)?")


def kohya_pairs(
    ranks: list[Tensors], metadata: Mapping[str, str], settings: Mapping[str, Any] | None, alpha: Fraction | None
) -> dict[str, Pair]:
    """kohya: ``alpha / lora_down.shape[0]``; alpha is the tensor, else ``ss_network_alpha``, else the rank."""
    told = metadata.get("ss_network_alpha", "")
    known = Fraction(told) if re.fullmatch(r"[0-9]+(\.[0-9]+)?", told) else None
    arguments = metadata.get("ss_network_args", "")
    blocks = '"split_qkv": "true"' in arguments.lower()
    parts = {"lora_unet_": "unet", "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2"}
    return _pairs(ranks[0], ("lora_unet_",), alpha, known, original=True, alpha_of_block=blocks, components=parts)


def comfyui_pairs(
    ranks: list[Tensors], metadata: Mapping[str, str], settings: Mapping[str, Any] | None, alpha: Fraction | None
) -> dict[str, Pair]:
    """ComfyUI: the alpha tensor divided by the rank; 1 without it."""
    parts = {
        "diffusion_model.": "unet",
        "text_encoders.clip_l.transformer.": "text_encoder",
        "text_encoders.clip_g.transformer.": "text_encoder_2",
    }
    return _pairs(ranks[0], ("diffusion_model.", "transformer."), alpha, None, original=True, components=parts)


def videox_fun_pairs(
    ranks: list[Tensors], metadata: Mapping[str, str], settings: Mapping[str, Any] | None, alpha: Fraction | None
) -> dict[str, Pair]:
    """VideoX-Fun: kohya's rule; its own classes have diffusers' module names, but for Wan, where they are Wan's."""
    return _pairs(ranks[0], ("lora_unet__",), alpha, None, original=True)


def lycoris_pairs(
    ranks: list[Tensors], metadata: Mapping[str, str], settings: Mapping[str, Any] | None, alpha: Fraction | None
) -> dict[str, Pair]:
    """LyCORIS' wrapper: kohya's rule; the names are those of diffusers' modules."""
    return _pairs(ranks[0], ("lycoris_",), alpha, None, original=False, components={"lycoris_": "unet"})


def onetrainer_pairs(
    ranks: list[Tensors], metadata: Mapping[str, str], settings: Mapping[str, Any] | None, alpha: Fraction | None
) -> dict[str, Pair]:
    """OneTrainer: kohya's rule; the names are those of diffusers' modules."""
    return _pairs(ranks[0], ("lora_transformer_",), alpha, None, original=False)


def diffsynth_pairs(
    ranks: list[Tensors], metadata: Mapping[str, str], settings: Mapping[str, Any] | None, alpha: Fraction | None
) -> dict[str, Pair]:
    """DiffSynth: scale 1; no prefix."""
    return _pairs(ranks[0], ("",), alpha, None, original=True)


def diffusion_pipe_pairs(
    ranks: list[Tensors], metadata: Mapping[str, str], settings: Mapping[str, Any] | None, alpha: Fraction | None
) -> dict[str, Pair]:
    """diffusion-pipe: ComfyUI's keys; alpha is that of ``adapter_config.json``, else the rank."""
    told = (settings or {}).get("lora_alpha")
    known = None if told is None else Fraction(told)
    return _pairs(ranks[0], ("diffusion_model.", "transformer."), alpha, known, original=True)


def simpletuner_pairs(
    ranks: list[Tensors], metadata: Mapping[str, str], settings: Mapping[str, Any] | None, alpha: Fraction | None
) -> dict[str, Pair]:
    """SimpleTuner: scale 1; both prefixes; ``.lora.down`` in some releases."""
    named = {re.sub(r"\.lora\.(down|up)\.weight$", r".lora_\1.weight", name): ref for name, ref in ranks[0].items()}
    parts = {f"{component}.base_model.model.": component for component in _COMPONENTS}
    return _pairs(named, ("transformer.base_model.model.",), alpha, None, original=False, components=parts)


def diffusers_old_pairs(
    ranks: list[Tensors], metadata: Mapping[str, str], settings: Mapping[str, Any] | None, alpha: Fraction | None
) -> dict[str, Pair]:
    """diffusers before peft: scale 1; ``attn1.processor.to_out_lora`` is the LoRA of ``attn1.to_out.0``."""
    renamed = {}
    for name, ref in ranks[0].items():
        module = re.sub(r"(\.lora_linear_layer|\.lora|_lora)\.(down|up)\.weight$", r".lora_\2.weight", name)
        module = re.sub(r"\.processor\.to_out\.", ".to_out.0.", module).replace(".processor.", ".")
        module = re.sub(r"(?<=\.self_attn\.)to_(q|k|v|out)\.", r"\1_proj.", module)
        renamed[module] = ref
    parts = {f"{component}.": component for component in _COMPONENTS}
    return _pairs(renamed, ("transformer.", ""), alpha, None, original=False, components=parts)


def genmo_pairs(
    ranks: list[Tensors], metadata: Mapping[str, str], settings: Mapping[str, Any] | None, alpha: Fraction | None
) -> dict[str, Pair]:
    """Genmo: ComfyUI's rule without alpha tensors, that is scale 1; no prefix."""
    return _pairs(ranks[0], ("",), alpha, None, original=True)


def tencent_pairs(
    ranks: list[Tensors], metadata: Mapping[str, str], settings: Mapping[str, Any] | None, alpha: Fraction | None
) -> dict[str, Pair]:
    """Tencent's HunyuanVideo-I2V: kohya's rule."""
    return _pairs(ranks[0], ("Hunyuan_video_I2V_lora_",), alpha, None, original=True)


def xlabs_pairs(
    ranks: list[Tensors], metadata: Mapping[str, str], settings: Mapping[str, Any] | None, alpha: Fraction | None
) -> dict[str, Pair]:
    """XLabs: scale 1; ``processor.qkv_lora1`` is the LoRA of the image's q, k and v, ``2`` that of the text's."""
    named = {re.sub(r"\.(down|up)\.weight$", r".lora_\1.weight", name): ref for name, ref in ranks[0].items()}
    return _pairs(named, ("diffusion_model.", ""), alpha, None, original=True)


_BFL = re.compile(r"(.+)\.(?:lora_(?:(A)|(B))\.weight|lora_B\.(bias)|(scale))")


def bfl_control_pairs(
    ranks: list[Tensors], metadata: Mapping[str, str], settings: Mapping[str, Any] | None, alpha: Fraction | None
) -> dict[str, Pair]:
    """Black Forest Labs' control LoRA: ``x + lora_B(lora_A(x))``, scale 1, lora_B with its bias, which has a number for
    each row of lora_B; and norms whose ``scale`` replaces the base's, here by the name of that parameter."""
    sides: dict[str, dict[str, TensorRef]] = {}
    for name, ref in ranks[0].items():
        found = _BFL.fullmatch(name)
        if found is None:
            raise _not_covered(name)
        side = "down" if found[2] else "up" if found[3] else "bias" if found[4] else "norm"
        sides.setdefault(found[1], {})[side] = ref
    pairs: dict[str, Pair] = {}
    for (module, own), parts in zip(sides.items(), here(list(sides), original=True), strict=True):
        if own.keys() == {"norm"} and _is_whole(parts):
            pairs[f"{parts[0].module}.weight"] = column(own["norm"], Fraction(1))
            continue
        if not {"down", "up"} <= own.keys() <= {"down", "up", "bias"}:
            raise _not_covered(module)
        told = Fraction(own["down"].shape[0]) if alpha is None else alpha
        made = dict(_split(own["down"], own["up"], told, parts, alpha_of_block=False))
        pairs |= made
        if "bias" in own:
            scale = next(iter(made.values())).scale
            pairs |= dict(_rows(".bias", column(own["bias"], scale), parts))
    return pairs


def of_original_names(pairs: Mapping[str, Pair]) -> dict[str, Pair]:
    """The pairs by diffusers name, where all names are those of one model's own repository; else as they are."""
    shares = of_original(list(pairs))
    if shares is None:
        return dict(pairs)
    made: dict[str, Pair] = {}
    for pair, parts in zip(pairs.values(), shares, strict=True):
        if _is_whole(parts):
            made[parts[0].module] = pair
            continue
        assert isinstance(pair.down, TensorRef)
        assert isinstance(pair.up, TensorRef)
        # at scale 1, which the pair's own multiplies
        found = _split(pair.down, pair.up, Fraction(pair.down.shape[0]), parts, alpha_of_block=False)
        made |= {module: Pair(part.down, part.up, pair.scale * part.scale) for module, part in found}
    return made


def _pairs(
    tensors: Tensors,
    prefixes: tuple[str, ...],
    user: Fraction | None,
    known: Fraction | None,
    *,
    original: bool,
    alpha_of_block: bool = False,
    components: Mapping[str, str] | None = None,
) -> dict[str, Pair]:
    """``user``: the caller's alpha; ``known``: that of the file where a pair has no alpha tensor; ``components``: what
    the names of a pipeline's components begin with."""
    sides: dict[str, dict[str, TensorRef]] = {}
    for name, ref in tensors.items():
        factor = _FACTOR.fullmatch(name)
        if factor is not None:
            sides.setdefault(factor[1], {})["down" if factor[2] else "up"] = ref
        elif name.endswith(".alpha"):
            sides.setdefault(name[: -len(".alpha")], {})["alpha"] = ref
        else:
            more = side_of(name)
            if more is None:
                raise _not_covered(name)
            sides.setdefault(more[0], {})[more[1]] = ref
    broken = [m for m, found in sides.items() if not is_special(found) and not {"down", "up"} <= set(found)]
    if broken:
        raise _not_covered(broken[0])
    shares = _shares(list(sides), prefixes, components or {}, original)
    pairs: dict[str, Pair] = {}
    for found, parts in zip(sides.values(), shares, strict=True):
        if is_special(found):
            pairs |= {m: p for end, pair in special_pairs(found, user).items() for m, p in _rows(end, pair, parts)}
            continue
        told = user if user is not None else _alpha(found.get("alpha"), known, found["down"].shape[0])
        pairs |= dict(_split(found["down"], found["up"], told, parts, alpha_of_block))
    return pairs


def _shares(
    names: list[str], prefixes: tuple[str, ...], components: Mapping[str, str], original: bool
) -> list[list[Share]]:
    """The diffusers modules of each name: of SDXL's parts, or of a transformer and the text encoders beside it."""
    if modules := of_pipeline(names, components):
        return [[Share(module)] for module in modules]
    encoders = of_text_encoders(names, components)
    rest = [name for name in names if name not in encoders]
    found = dict(zip(rest, _of_one(rest, prefixes, original), strict=True))
    return [found[name] if name in found else [Share(encoders[name])] for name in names]


def _of_one(names: list[str], prefixes: tuple[str, ...], original: bool) -> list[list[Share]]:
    """The modules of a model, whose names all begin with one of the prefixes."""
    begin = next((p for p in prefixes if all(name.startswith(p) for name in names)), None)
    if begin is None:
        raise _not_covered(names[0])
    return here([name[len(begin) :] for name in names], original=original)


def _alpha(tensor: TensorRef | None, known: Fraction | None, rank: int) -> Fraction:
    if tensor is not None:
        return Fraction(number(tensor))
    return Fraction(rank) if known is None else known


def _split(
    down: TensorRef, up: TensorRef, alpha: Fraction, parts: list[Share], alpha_of_block: bool
) -> Iterator[tuple[str, Pair]]:
    """One pair of factors as the pairs of the diffusers modules whose rows it has."""
    parts = [share.sized(up.shape[0], down.shape[1]) for share in parts]
    rank, height = down.shape[0], up.shape[0] // parts[0].of
    width = _diagonal(up, parts, height, rank)
    for at, share in enumerate(parts):
        first, last = (at * width, (at + 1) * width) if width else (0, rank)
        if width and not read(down.rows(first, last)).any() and not read(up.columns(first, last)).any():
            continue
        height = up.shape[0] // share.of
        rows: list[Lazy] = [up.rows(n * height, (n + 1) * height).columns(first, last) for n in share.chunks]
        scale = alpha / width if width and alpha_of_block else alpha / rank
        yield share.module, Pair(down.rows(first, last), rows[0] if len(rows) == 1 else Joined(tuple(rows), 0), scale)


def _rows(end: str, pair: Pair, parts: list[Share]) -> Iterator[tuple[str, Pair]]:
    """The pairs of the diffusers modules whose rows a delta has; ``end`` comes behind their names."""
    if _is_whole(parts):
        yield parts[0].module + end, pair
        return
    for share in (share.sized(pair.shape[0], pair.shape[2]) for share in parts):
        yield share.module + end, cut_rows(pair, share.chunks, share.of)


def _is_whole(parts: list[Share]) -> bool:
    """True for one module that has all the rows in their order."""
    return len(parts) == 1 and parts[0].of == 1 and parts[0].last is None


def _diagonal(up: TensorRef, parts: list[Share], height: int, rank: int) -> int:
    """The rank of one block, where every part has rows that are zero outside of its own columns; else 0."""
    if len(parts) == 1 or rank % len(parts):
        return 0
    width, matrix, filled = rank // len(parts), read(up), 0
    for at, share in enumerate(parts):
        rows = matrix[[r for n in share.chunks for r in range(n * height, (n + 1) * height)]]
        own = rows[:, at * width : (at + 1) * width]
        if abs(rows).sum() != abs(own).sum():
            return 0
        filled += bool(own.any())
    return width if filled > 1 else 0


def _not_covered(name: str) -> ProofFailed:
    return ProofFailed(
        f"the source holds a tensor that the proof does not cover: {printable(name)}",
        hint="please report this, with the output of loraconv inspect on the source",
    )
