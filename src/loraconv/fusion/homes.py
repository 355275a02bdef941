"""Which weight of the base a module's delta is added to, where an adapter is for several parts of a pipeline.

Such an adapter's modules begin with the name of their part, the weights in that part's folder do not. Which part a base
is, its weights tell: a folder may have any name, and a single file has no settings.
"""

from __future__ import annotations

from collections.abc import Sequence

from loraconv.errors import FormatError
from loraconv.model_folder import Model
from loraconv.names import fold_names, quoted

#: Part of a pipeline -> weights of which it has one, and the parts behind it have none.
#: Facts: huggingface/diffusers ``models/unets/unet_2d_condition.py``, huggingface/transformers
#: ``models/clip/modeling_clip.py`` (whose version 5 writes a ``CLIPTextModel`` without the step ``text_model``).
_TOLD_BY = {
    "unet":           ("conv_in.weight",),
    "text_encoder_2": ("text_projection.weight",),
    "text_encoder":   ("text_model.embeddings.token_embedding.weight", "embeddings.token_embedding.weight"),
}  # fmt: skip


def home_of(module: str, model: Model) -> str:
    """The tensor that a module's delta is added to: its weight, or the bias that the name is of."""
    part = _part(model)
    name = module.removeprefix(f"{part}.") if part else module
    home = name if name.endswith(".bias") else f"{name}.weight"
    short = home.removeprefix("text_model.")
    return short if home not in model.tensors and short in model.tensors else home


def refuse_other_parts(model: Model, adapter: object, modules: Sequence[str]) -> None:
    """Raise :class:`FormatError` (``other-component``) where modules are of another part of a pipeline than the base,
    which is not silently left without them. ``adapter`` is the path that the error names."""
    own, parts = _part(model), {module: _named(module) for module in modules}
    apart = [module for module, part in parts.items() if part != own]
    if not apart or not any(parts.values()):  # an adapter of a transformer alone has one kind of names
        return
    others = sorted({parts[module] or "transformer" for module in apart})
    hint = f"pass the pipeline's folder {others[0]}/ as --base"
    if len(apart) < len(modules) and own:
        only = f"loraconv fuse {quoted(adapter)} --base {quoted(model.path)} --modules '{own}.*' -o OUT"
        hint = f"{only}; the others likewise, or all of them in a copy of the pipeline, each folder with --in-place"
    elif len(apart) < len(modules):
        hint = f"loraconv split {quoted(adapter)} --by component -o PARTS; then fuse each part into its own folder"
    raise FormatError(
        f"{len(apart)} of the adapter's {len(modules)} modules are of {' and '.join(others)}, and the base is"
        f" {own or 'another part of a pipeline'}",
        where="; ".join(fold_names(apart)[:4]),
        why="each part of a pipeline is fused by itself",
        hint=hint,
        slug="other-component",
    )


def _named(module: str) -> str:
    """The part that a module's name begins with; empty for a transformer's modules, whose names begin with none."""
    step = module.partition(".")[0]
    return step if step in _TOLD_BY else ""


def _part(model: Model) -> str:
    """The part of a pipeline that a model is; empty for one that is no part of those in the table."""
    return next((part for part, names in _TOLD_BY.items() if any(name in model.tensors for name in names)), "")
