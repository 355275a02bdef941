"""What the modules of each model's own repository are in diffusers, in this module's own words.

Every rule is an expression over a name whose dots were flattened to underscores, so that it is the same for formats
that keep the dots and for those that do not. Written from the two implementations of each model, not from the tables
that the converter uses.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True, slots=True)
class Share:
    """A diffusers module and the equal chunks of rows that it has, of ``of`` chunks, in its own order.

    ``last`` is what the module is in the last block instead: there it has ``last[0]`` times as many rows as columns.
    """

    module: str
    chunks: tuple[int, ...] = (0,)
    of: int = 1
    last: tuple[float, Share] | None = None

    def sized(self, rows: int, columns: int) -> Share:
        """The module of this size."""
        return self.last[1] if self.last is not None and rows == self.last[0] * columns else self


_SWAPPED = ((1, 0), 2)
_QKV, _ADDED = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")

#: One model: expression -> the module (``\1`` is the layer), three modules in equal parts, modules and their chunks, or
#: a module, a ratio of rows to columns, and what it is at that ratio.
_Rules = dict[str, object]


def _mmdit(img: str, txt: str, mlp: tuple[str, str], mod: str, join: str) -> _Rules:
    """The double and single blocks that FLUX and HunyuanVideo share."""
    block, single = r"transformer_blocks.\1", r"single_transformer_blocks.\1"
    rules: _Rules = {
        rf"double_blocks_(\d+)_{img}_attn_qkv": [f"{block}.attn.{m}" for m in _QKV],
        rf"double_blocks_(\d+)_{txt}_attn_qkv": [f"{block}.attn.{m}" for m in _ADDED],
        rf"double_blocks_(\d+)_{img}_attn_proj": f"{block}.attn.to_out.0",
        rf"double_blocks_(\d+)_{txt}_attn_proj": f"{block}.attn.to_add_out",
        r"single_blocks_(\d+)_linear1": [
            (f"{single}.attn.to_q", (0,), 7),
            (f"{single}.attn.to_k", (1,), 7),
            (f"{single}.attn.to_v", (2,), 7),
            (f"{single}.proj_mlp", (3, 4, 5, 6), 7),
        ],
        r"single_blocks_(\d+)_linear2": f"{single}.proj_out",
        rf"single_blocks_(\d+)_modulation_{mod}": f"{single}.norm.linear",
        rf"final_layer_adaLN_modulation_{join}": [("norm_out.linear", *_SWAPPED)],
        "final_layer_linear": "proj_out",
    }
    for ours, theirs, norm in ((img, "ff", "norm1"), (txt, "ff_context", "norm1_context")):
        rules[rf"double_blocks_(\d+)_{ours}_mlp_{mlp[0]}"] = f"{block}.{theirs}.net.0.proj"
        rules[rf"double_blocks_(\d+)_{ours}_mlp_{mlp[1]}"] = f"{block}.{theirs}.net.2"
        rules[rf"double_blocks_(\d+)_{ours}_mod_{mod}"] = f"{block}.{norm}.linear"
    return rules


def _embedders(there: dict[str, str], here: str, first: str, second: str) -> _Rules:
    """Two linear layers in a row, which diffusers calls linear_1 and linear_2."""
    return {
        f"{name}_{layer}": f"{here}{module}.linear_{number}"
        for name, module in there.items()
        for number, layer in ((1, first), (2, second))
    }


def _query_and_key(there: str, here: str) -> _Rules:
    """The norms of queries and keys, which diffusers calls q and k."""
    return {there.format(word): here.format(word[0]) for word in ("query", "key")}


_FLUX: _Rules = {
    **_mmdit("img", "txt", ("0", "2"), "lin", "1"),
    **_embedders(
        {"time_in": "timestep_embedder", "vector_in": "text_embedder", "guidance_in": "guidance_embedder"},
        "time_text_embed.",
        "in_layer",
        "out_layer",
    ),
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    **_query_and_key(r"double_blocks_(\d+)_img_attn_norm_{}_norm", r"transformer_blocks.\1.attn.norm_{}"),
    **_query_and_key(r"double_blocks_(\d+)_txt_attn_norm_{}_norm", r"transformer_blocks.\1.attn.norm_added_{}"),
    **_query_and_key(r"single_blocks_(\d+)_norm_{}_norm", r"single_transformer_blocks.\1.attn.norm_{}"),
}

_REFINER = r"context_embedder.token_refiner.refiner_blocks.\1"
_HUNYUAN_VIDEO: _Rules = {
    **_mmdit("img", "txt", ("fc1", "fc2"), "linear", "1"),
    **_embedders({"vector_in": "text_embedder"}, "time_text_embed.", "in_layer", "out_layer"),
    **_embedders({"time_in_mlp": "timestep_embedder"}, "time_text_embed.", "0", "2"),
    **_embedders({"guidance_in_mlp": "guidance_embedder"}, "time_text_embed.", "0", "2"),
    **_embedders({"txt_in_t_embedder_mlp": "timestep_embedder"}, "context_embedder.time_text_embed.", "0", "2"),
    **_embedders({"txt_in_c_embedder": "text_embedder"}, "context_embedder.time_text_embed.", "linear_1", "linear_2"),
    r"txt_in_individual_token_refiner_blocks_(\d+)_self_attn_qkv": [f"{_REFINER}.attn.{m}" for m in _QKV],
    r"txt_in_individual_token_refiner_blocks_(\d+)_self_attn_proj": f"{_REFINER}.attn.to_out.0",
    r"txt_in_individual_token_refiner_blocks_(\d+)_mlp_fc1": f"{_REFINER}.ff.net.0.proj",
    r"txt_in_individual_token_refiner_blocks_(\d+)_mlp_fc2": f"{_REFINER}.ff.net.2",
    r"txt_in_individual_token_refiner_blocks_(\d+)_adaLN_modulation_1": f"{_REFINER}.norm_out.linear",
    "txt_in_input_embedder": "context_embedder.proj_in",
    "img_in_proj": "x_embedder.proj",
    r"double_blocks_(\d+)_img_attn_([qk])_norm": r"transformer_blocks.\1.attn.norm_\2",
    r"double_blocks_(\d+)_txt_attn_([qk])_norm": r"transformer_blocks.\1.attn.norm_added_\2",
    r"single_blocks_(\d+)_([qk])_norm": r"single_transformer_blocks.\1.attn.norm_\2",
    r"txt_in_individual_token_refiner_blocks_(\d+)_norm([12])": rf"{_REFINER}.norm\2",
}

_WAN_TEXT = "condition_embedder."
_WAN: _Rules = {
    **{rf"blocks_(\d+)_self_attn_{q}": rf"blocks.\1.attn1.to_{q}" for q in "qkv"},
    **{rf"blocks_(\d+)_cross_attn_{q}": rf"blocks.\1.attn2.to_{q}" for q in "qkv"},
    r"blocks_(\d+)_self_attn_o": r"blocks.\1.attn1.to_out.0",
    r"blocks_(\d+)_cross_attn_o": r"blocks.\1.attn2.to_out.0",
    r"blocks_(\d+)_cross_attn_k_img": r"blocks.\1.attn2.add_k_proj",
    r"blocks_(\d+)_cross_attn_v_img": r"blocks.\1.attn2.add_v_proj",
    r"blocks_(\d+)_ffn_0": r"blocks.\1.ffn.net.0.proj",
    r"blocks_(\d+)_ffn_2": r"blocks.\1.ffn.net.2",
    **_embedders({"text_embedding": "text_embedder", "time_embedding": "time_embedder"}, _WAN_TEXT, "0", "2"),
    "time_projection_1": "condition_embedder.time_proj",
    "img_emb_proj_1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb_proj_3": "condition_embedder.image_embedder.ff.net.2",
    "head_head": "proj_out",
    "patch_embedding": "patch_embedding",
    r"blocks_(\d+)_self_attn_norm_([qk])": r"blocks.\1.attn1.norm_\2",
    r"blocks_(\d+)_cross_attn_norm_([qk])": r"blocks.\1.attn2.norm_\2",
    r"blocks_(\d+)_cross_attn_norm_k_img": r"blocks.\1.attn2.norm_added_k",
    r"blocks_(\d+)_norm3": r"blocks.\1.norm2",
    "img_emb_proj_0": "condition_embedder.image_embedder.norm1",
    "img_emb_proj_4": "condition_embedder.image_embedder.norm2",
}

_LTX_LAYER = r"transformer_blocks.\1"
_LTX: _Rules = {
    **{rf"transformer_blocks_(\d+)_attn{n}_to_{q}": rf"{_LTX_LAYER}.attn{n}.to_{q}" for n in (1, 2) for q in "qkv"},
    **{rf"transformer_blocks_(\d+)_attn{n}_to_out_0": rf"{_LTX_LAYER}.attn{n}.to_out.0" for n in (1, 2)},
    r"transformer_blocks_(\d+)_ff_net_0_proj": f"{_LTX_LAYER}.ff.net.0.proj",
    r"transformer_blocks_(\d+)_ff_net_2": f"{_LTX_LAYER}.ff.net.2",
    **_embedders(
        {"adaln_single_emb_timestep_embedder": "timestep_embedder"}, "time_embed.emb.", "linear_1", "linear_2"
    ),
    **_embedders({"caption_projection": "caption_projection"}, "", "linear_1", "linear_2"),
    r"transformer_blocks_(\d+)_attn([12])_([qk])_norm": rf"{_LTX_LAYER}.attn\2.norm_\3",
    "adaln_single_linear": "time_embed.linear",
    "patchify_proj": "proj_in",
    "proj_out": "proj_out",
}

_MOCHI_LAYER = r"transformer_blocks.\1"
_MOCHI: _Rules = {
    r"blocks_(\d+)_attn_qkv_x": [f"{_MOCHI_LAYER}.attn1.{m}" for m in _QKV],
    r"blocks_(\d+)_attn_qkv_y": [f"{_MOCHI_LAYER}.attn1.{m}" for m in _ADDED],
    r"blocks_(\d+)_attn_proj_x": f"{_MOCHI_LAYER}.attn1.to_out.0",
    r"blocks_(\d+)_attn_proj_y": f"{_MOCHI_LAYER}.attn1.to_add_out",
    r"blocks_(\d+)_mlp_x_w1": [(f"{_MOCHI_LAYER}.ff.net.0.proj", *_SWAPPED)],
    r"blocks_(\d+)_mlp_y_w1": [(f"{_MOCHI_LAYER}.ff_context.net.0.proj", *_SWAPPED)],
    r"blocks_(\d+)_mlp_x_w2": f"{_MOCHI_LAYER}.ff.net.2",
    r"blocks_(\d+)_mlp_y_w2": f"{_MOCHI_LAYER}.ff_context.net.2",
    r"blocks_(\d+)_attn_([qk])_norm_x": rf"{_MOCHI_LAYER}.attn1.norm_\2",
    r"blocks_(\d+)_attn_([qk])_norm_y": rf"{_MOCHI_LAYER}.attn1.norm_added_\2",
    r"blocks_(\d+)_mod_x": f"{_MOCHI_LAYER}.norm1.linear",
    # The last block has no text output, and another text modulation.
    r"blocks_(\d+)_mod_y": (f"{_MOCHI_LAYER}.norm1_context.linear", 0.5, f"{_MOCHI_LAYER}.norm1_context.linear_1"),
    **_embedders({"t_embedder_mlp": "timestep_embedder"}, "time_embed.", "0", "2"),
    **{f"t5_y_embedder_to_{q}": f"time_embed.pooler.to_{q}" for q in ("q", "kv", "out")},
    "t5_yproj": "time_embed.caption_proj",
    "x_embedder_proj": "patch_embed.proj",
    "final_layer_mod": [("norm_out.linear", *_SWAPPED)],
    "final_layer_linear": "proj_out",
}

_SD3_LAYER = r"transformer_blocks.\1"
_SD3: _Rules = {
    r"joint_blocks_(\d+)_x_block_attn_qkv": [f"{_SD3_LAYER}.attn.{m}" for m in _QKV],
    r"joint_blocks_(\d+)_x_block_attn2_qkv": [f"{_SD3_LAYER}.attn2.{m}" for m in _QKV],
    r"joint_blocks_(\d+)_context_block_attn_qkv": [f"{_SD3_LAYER}.attn.{m}" for m in _ADDED],
    r"joint_blocks_(\d+)_x_block_(attn2?)_proj": rf"{_SD3_LAYER}.\2.to_out.0",
    r"joint_blocks_(\d+)_context_block_attn_proj": f"{_SD3_LAYER}.attn.to_add_out",
    r"joint_blocks_(\d+)_x_block_(attn2?)_ln_([qk])": rf"{_SD3_LAYER}.\2.norm_\3",
    r"joint_blocks_(\d+)_context_block_attn_ln_([qk])": rf"{_SD3_LAYER}.attn.norm_added_\2",
    r"joint_blocks_(\d+)_x_block_mlp_fc1": f"{_SD3_LAYER}.ff.net.0.proj",
    r"joint_blocks_(\d+)_x_block_mlp_fc2": f"{_SD3_LAYER}.ff.net.2",
    r"joint_blocks_(\d+)_context_block_mlp_fc1": f"{_SD3_LAYER}.ff_context.net.0.proj",
    r"joint_blocks_(\d+)_context_block_mlp_fc2": f"{_SD3_LAYER}.ff_context.net.2",
    r"joint_blocks_(\d+)_x_block_adaLN_modulation_1": f"{_SD3_LAYER}.norm1.linear",
    # The last block has no text output: shift and scale alone, in the other order.
    r"joint_blocks_(\d+)_context_block_adaLN_modulation_1": (f"{_SD3_LAYER}.norm1_context.linear", 2, _SWAPPED),
    **_embedders(
        {"t_embedder_mlp": "timestep_embedder", "y_embedder_mlp": "text_embedder"}, "time_text_embed.", "0", "2"
    ),
    "x_embedder_proj": "pos_embed.proj",
    "context_embedder": "context_embedder",
    "final_layer_adaLN_modulation_1": [("norm_out.linear", *_SWAPPED)],
    "final_layer_linear": "proj_out",
}

#: XLabs' layers in FLUX's attention processors.
_XLABS: _Rules = {
    r"double_blocks_(\d+)_processor_qkv_lora1": [rf"transformer_blocks.\1.attn.{m}" for m in _QKV],
    r"double_blocks_(\d+)_processor_qkv_lora2": [rf"transformer_blocks.\1.attn.{m}" for m in _ADDED],
    r"double_blocks_(\d+)_processor_proj_lora1": r"transformer_blocks.\1.attn.to_out.0",
    r"double_blocks_(\d+)_processor_proj_lora2": r"transformer_blocks.\1.attn.to_add_out",
    r"single_blocks_(\d+)_processor_qkv_lora": [rf"single_transformer_blocks.\1.attn.{m}" for m in _QKV],
    r"single_blocks_(\d+)_processor_proj_lora": r"single_transformer_blocks.\1.proj_out",
}

_Z_BLOCK = r"(layers|noise_refiner|context_refiner)_(\d+)"
_Z_IMAGE: _Rules = {
    rf"{_Z_BLOCK}_attention_qkv": [rf"\1.\2.attention.{m}" for m in _QKV],
    rf"{_Z_BLOCK}_attention_out": r"\1.\2.attention.to_out.0",
    rf"{_Z_BLOCK}_feed_forward_w([123])": r"\1.\2.feed_forward.w\3",
    rf"{_Z_BLOCK}_attention_([qk])_norm": r"\1.\2.attention.norm_\3",
    rf"{_Z_BLOCK}_(attention|ffn)_norm([12])": r"\1.\2.\3_norm\4",
    rf"{_Z_BLOCK}_adaLN_modulation_0": r"\1.\2.adaLN_modulation.0",
    r"t_embedder_mlp_([02])": r"t_embedder.mlp.\1",
    "cap_embedder_0": "cap_embedder.0",
    "cap_embedder_1": "cap_embedder.1",
    "x_embedder": "all_x_embedder.2-1",
    "final_layer_linear": "all_final_layer.2-1.linear",
    "final_layer_adaLN_modulation_1": "all_final_layer.2-1.adaLN_modulation.1",
}

_MODELS: tuple[_Rules, ...] = (_FLUX, _XLABS, _HUNYUAN_VIDEO, _WAN, _LTX, _MOCHI, _SD3, _Z_IMAGE)

#: The words of diffusers' module names that have underscores in them; whatever stands between is one step.
# fmt: off
_WORDS = (
    "adaLN_modulation", "add_embedding", "add_k_proj", "add_q_proj", "add_v_proj", "all_final_layer", "all_x_embedder",
    "attention_norm1", "attention_norm2", "cap_embedder", "caption_proj", "caption_projection", "condition_embedder",
    "context_embedder", "context_refiner", "conv_in", "conv_norm_out", "conv_out", "conv_shortcut", "down_blocks",
    "feed_forward", "ff_context", "ffn_norm1", "ffn_norm2", "final_layer_norm", "guidance_embedder", "image_embedder",
    "img_in", "img_mlp", "img_mod", "k_proj", "layer_norm1", "layer_norm2", "linear_1", "linear_2", "mid_block",
    "noise_refiner", "norm1_context", "norm_added_k", "norm_added_q", "norm_final", "norm_k", "norm_out", "norm_q",
    "ofs_embedding", "out_proj", "patch_embed", "patch_embedding", "pos_embed", "position_embedding", "proj_in",
    "proj_mlp", "proj_out", "q_proj", "refiner_blocks", "self_attn", "single_transformer_blocks", "t_embedder",
    "text_embedder", "text_model", "text_proj", "text_projection", "time_emb_proj", "time_embed", "time_embedder",
    "time_embedding", "time_proj", "time_text_embed", "timestep_embedder", "to_add_out", "to_k", "to_kv", "to_out",
    "to_q", "to_v", "token_embedding", "token_refiner", "transformer_blocks", "txt_in", "txt_mlp", "txt_mod",
    "txt_norm", "up_blocks", "v_proj", "x_embedder",
)
# fmt: on
_STEP = re.compile("(" + "|".join(sorted(_WORDS, key=len, reverse=True)) + "|[^_]+)(?:_|$)")


def here(names: Sequence[str], *, original: bool) -> list[list[Share]]:
    """For every module name (dots or underscores) the diffusers modules whose rows it has.

    With ``original`` the names are tried as those of each model's own repository, all of them of one model, and after
    that as diffusers' own.
    """
    found = of_original(names) if original else None
    return found or [[Share(regrouped(name.replace(".", "_")))] for name in names]


def of_original(names: Sequence[str]) -> list[list[Share]] | None:
    """What :func:`here` says of names that are all of one model's own repository; None if they are not."""
    flat = [name.replace(".", "_") for name in names]
    for rules in _MODELS:
        found = [_by_rules(rules, name) for name in flat]
        if all(found):
            return found
    return None


def regrouped(flat: str) -> str:
    """A diffusers module name with its dots again."""
    return ".".join(_STEP.findall(flat))


def _by_rules(rules: _Rules, flat: str) -> list[Share]:
    for expression, target in _compiled(id(rules), tuple(rules)).items():
        found = expression.fullmatch(flat)
        if found is not None:
            return list(_shares(rules[target], found))
    return []


@cache
def _compiled(_: int, expressions: tuple[str, ...]) -> dict[re.Pattern[str], str]:
    return {re.compile(text): text for text in expressions}


def _shares(target: object, found: re.Match[str]) -> Iterable[Share]:
    if isinstance(target, str):
        return [Share(found.expand(target))]
    if isinstance(target, tuple):
        module, ratio, last = target
        other = Share(found.expand(last)) if isinstance(last, str) else Share(found.expand(module), *last)
        return [Share(found.expand(module), last=(ratio, other))]
    assert isinstance(target, list)
    if isinstance(target[0], str):
        return [Share(found.expand(t), (n,), len(target)) for n, t in enumerate(target)]
    return [Share(found.expand(t), chunks, of) for t, chunks, of in target]
