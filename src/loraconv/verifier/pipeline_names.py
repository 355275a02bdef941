"""What the modules of Stable Diffusion XL, a UNet and two text encoders, are in diffusers, in this module's own words.

Stability's UNet is one list of blocks in and one out, diffusers' has levels of three: which block is which is a matter
of counting. Names are flattened, so that formats that keep the dots read alike.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from loraconv.verifier.original_names import regrouped

_BLOCK = re.compile(r"(input_blocks|middle_block|output_blocks)_(\d+)(?:_(\d+))?_(.+)")
_PER_LEVEL = 3
_OUTSIDE = {
    "input_blocks_0_0": "conv_in",
    "out_0": "conv_norm_out",
    "out_2": "conv_out",
    "time_embed_0": "time_embedding.linear_1",
    "time_embed_2": "time_embedding.linear_2",
    "label_emb_0_0": "add_embedding.linear_1",
    "label_emb_0_2": "add_embedding.linear_2",
}
_RESNET = {
    "in_layers_0": "norm1",
    "in_layers_2": "conv1",
    "out_layers_0": "norm2",
    "out_layers_3": "conv2",
    "emb_layers_1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}
_OWN = re.compile(
    r"(?:down_blocks|up_blocks|mid_block)_.+|conv_in|conv(?:_norm)?_out|(?:time|add)_embedding_linear_[12]"
)
_TEXT = re.compile(r"text_model_.+")
#: What the names in a ``CLIPTextModel`` begin with since transformers 5.
_BARE = ("embeddings", "encoder", "final_layer_norm")


def of_pipeline(names: Sequence[str], prefixes: Mapping[str, str]) -> list[str] | None:
    """The diffusers module of each name, behind that of its component; None unless all are modules of SDXL.

    ``prefixes`` says which component the names belong to that begin so; the longest counts.
    """
    found = [_module(name, prefixes) for name in names]
    return [module for module in found if module] if found and all(found) else None


def of_text_encoders(names: Sequence[str], prefixes: Mapping[str, str]) -> dict[str, str]:
    """Those of the names that are modules of a text encoder by their prefix, each with its diffusers module behind the
    encoder's name; the others are the transformer's."""
    own = {prefix: component for prefix, component in prefixes.items() if component != "unet"}
    return {name: module for name in names if (module := _module(name, own))}


def _module(name: str, prefixes: Mapping[str, str]) -> str:
    fitting = [prefix for prefix in prefixes if name.startswith(prefix)]
    if not fitting:
        return ""
    prefix = max(fitting, key=len)
    component, flat = prefixes[prefix], name[len(prefix) :].replace(".", "_")
    module = _of_unet(flat) if component == "unet" else _of_text_encoder(component, flat)
    return f"{component}.{module}" if module else ""


def with_text_model(component: str, name: str) -> str:
    """The name of a text encoder's module with the step ``text_model``, which transformers 5 leaves out.

    ``name`` may be flattened. Those of other components are returned as they are.
    """
    separator = "." if "." in name else "_"
    bare = component.startswith("text_encoder") and name.startswith(tuple(f"{step}{separator}" for step in _BARE))
    return f"text_model{separator}{name}" if bare else name


def _of_text_encoder(component: str, flat: str) -> str:
    flat = with_text_model(component, flat)
    if flat == "text_projection" and component == "text_encoder_2":
        return flat
    return regrouped(flat) if _TEXT.fullmatch(flat) else ""


def _of_unet(flat: str) -> str:
    if flat in _OUTSIDE:
        return _OUTSIDE[flat]
    found = _BLOCK.fullmatch(flat)
    if found is None:
        return regrouped(flat) if _OWN.fullmatch(flat) else ""
    side, number, kind, rest = found[1], int(found[2]), int(found[3] or 0), found[4]
    if side == "middle_block":
        begin = ("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1")[number]
        return f"{begin}.{regrouped(rest) if number == 1 else _RESNET[rest]}"
    level, place = divmod(number - 1 if side == "input_blocks" else number, _PER_LEVEL)
    begin = f"{'down' if side == 'input_blocks' else 'up'}_blocks.{level}"
    if rest == "op":
        return f"{begin}.downsamplers.0.conv"
    if kind == 1:
        return f"{begin}.attentions.{place}.{regrouped(rest)}"
    return f"{begin}.upsamplers.0.conv" if kind == 2 else f"{begin}.resnets.{place}.{_RESNET[rest]}"
