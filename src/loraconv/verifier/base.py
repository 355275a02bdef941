"""The proof of a converted CogVideoX base: the model's own tensor list, and where each tensor's bytes must come from.

Both are stated here from diffusers' ``CogVideoXTransformer3DModel`` and SAT's ``dit_video_concat.py``, not from the
tables that the converter uses.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from loraconv.lazy import Joined, Lazy, TensorRef, Viewed
from loraconv.names import fold_names, numel
from loraconv.verifier.config import DIT, POSITIONS, Settings, check_config, expected_config, is_rotary
from loraconv.verifier.coverage import check_coverage
from loraconv.verifier.numbers import Computed, Held, Tensor, coarse, rounded_once, same_bytes, same_numbers, values
from loraconv.verifier.positions import agrees
from loraconv.verifier.proof import Check, Control, Proof

Tensors = Mapping[str, TensorRef]
_LAYER = DIT + "transformer.layers."
#: diffusers module inside a block -> (SAT module inside a layer, the third of its rows; None for all)
_BLOCK = {
    "attn1.to_q": ("attention.query_key_value", 0),
    "attn1.to_k": ("attention.query_key_value", 1),
    "attn1.to_v": ("attention.query_key_value", 2),
    "attn1.to_out.0": ("attention.dense", None),
    "ff.net.0.proj": ("mlp.dense_h_to_4h", None),
    "ff.net.2": ("mlp.dense_4h_to_h", None),
    "norm1.norm": ("input_layernorm", None),
    "norm2.norm": ("post_attention_layernorm", None),
}
_ADALN = {"norm1.linear": (0, 1, 2, 6, 7, 8), "norm2.linear": (3, 4, 5, 9, 10, 11)}
_OUTER = {
    "norm_final": "transformer.final_layernorm",
    "norm_out.norm": "mixins.final_layer.norm_final",
    "norm_out.linear": "mixins.final_layer.adaLN_modulation.1",
    "proj_out": "mixins.final_layer.linear",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "ofs_embedding.linear_1": "ofs_embed.0",
    "ofs_embedding.linear_2": "ofs_embed.2",
    "patch_embed.proj": "mixins.patch_embed.proj",
    "patch_embed.text_proj": "mixins.patch_embed.text_proj",
}
_BY_ROWS = ("attention.query_key_value", "mlp.dense_h_to_4h")
_BY_COLUMNS = ("attention.dense", "mlp.dense_4h_to_h")


def model_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every parameter of diffusers' CogVideoX transformer with this configuration, and its shape."""
    heads, head = config["num_attention_heads"], config["attention_head_dim"]
    width, time = heads * head, config["time_embed_dim"]
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, out: int, into: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (out, into), (out,)

    def norm(name: str, size: int) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (size,)

    patch, depth = config["patch_size"], config["patch_size_t"]
    linear("patch_embed.text_proj", width, config["text_embed_dim"])
    kernel = config["in_channels"], patch, patch
    shapes["patch_embed.proj.weight"] = (width, *kernel) if depth is None else (width, numel(kernel) * depth)
    shapes["patch_embed.proj.bias"] = (width,)
    if config["use_learned_positional_embeddings"]:
        frames = (config["sample_frames"] - 1) // config["temporal_compression_ratio"] + 1
        area = (config["sample_height"] // patch) * (config["sample_width"] // patch)
        shapes["patch_embed.pos_embedding"] = (1, config["max_text_seq_length"] + frames * area, width)
    linear("time_embedding.linear_1", time, width)
    linear("time_embedding.linear_2", time, time)
    if config["ofs_embed_dim"] is not None:
        linear("ofs_embedding.linear_1", config["ofs_embed_dim"], config["ofs_embed_dim"])
        linear("ofs_embedding.linear_2", config["ofs_embed_dim"], config["ofs_embed_dim"])
    for layer in range(config["num_layers"]):
        block = f"transformer_blocks.{layer}."
        for name in ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0"):
            linear(block + name, width, width)
        norm(block + "attn1.norm_q", head)
        norm(block + "attn1.norm_k", head)
        linear(block + "ff.net.0.proj", 4 * width, width)
        linear(block + "ff.net.2", width, 4 * width)
        for name in ("norm1", "norm2"):
            linear(block + f"{name}.linear", 6 * width, time)
            norm(block + f"{name}.norm", width)
    norm("norm_final", width)
    norm("norm_out.norm", width)
    linear("norm_out.linear", 2 * width, time)
    linear("proj_out", config["out_channels"] * patch * patch * (depth or 1), width)
    return shapes


def source_of(ranks: list[Tensors], name: str, shape: tuple[int, ...]) -> Lazy:
    """The bytes that the diffusers tensor ``name`` must hold, out of a SAT checkpoint. Raises KeyError if absent."""
    if name == "patch_embed.pos_embedding":
        return ranks[0][POSITIONS]
    module, _, param = name.rpartition(".")
    if not module.startswith("transformer_blocks."):
        found = ranks[0][f"{DIT}{_OUTER[module]}.{param}"]
        return found if found.shape == shape else Viewed(found, shape)
    layer, _, inner = module.removeprefix("transformer_blocks.").partition(".")
    if inner in ("attn1.norm_q", "attn1.norm_k"):
        which = {"q": "query", "k": "key"}[inner[-1]]
        return ranks[0][f"{DIT}mixins.adaln_layer.{which}_layernorm_list.{layer}.{param}"]
    if inner in _ADALN:
        table = ranks[0][f"{DIT}mixins.adaln_layer.adaLN_modulations.{layer}.1.{param}"]
        step = table.shape[0] // 12
        return Joined(tuple(table.rows(n * step, (n + 1) * step) for n in _ADALN[inner]), 0)
    return _layer_source(ranks, layer, inner, param)


def _layer_source(ranks: list[Tensors], layer: str, inner: str, param: str) -> Lazy:
    sat, third = _BLOCK[inner]
    refs = [_plain_or_original(tensors, f"{_LAYER}{layer}.{sat}", param) for tensors in ranks]
    if third is not None:
        step = refs[0].shape[0] // 3
        refs = [ref.rows(third * step, (third + 1) * step) for ref in refs]
    if len(refs) == 1:
        return refs[0]
    if sat in _BY_ROWS:
        return Joined(tuple(refs), 0)
    return Joined(tuple(refs), 1) if sat in _BY_COLUMNS and param == "weight" else refs[0]


def _plain_or_original(tensors: Tensors, module: str, param: str) -> TensorRef:
    original = f"{module}.original.{param}"
    return tensors[original] if original in tensors else tensors[f"{module}.{param}"]


def prove_base(
    ranks: list[Tensors], settings: Settings, stored: Mapping[str, Lazy], config: Mapping[str, Any], dtype: str | None
) -> Proof:
    """Compare what is on disk, the tensors and ``config.json``, with the source and its ``settings``.

    ``dtype`` is set where the user asked for a cast.
    """
    right = expected_config(ranks[0], settings)
    shapes = model_shapes(right)
    names = _names(shapes, stored)
    if not names.passed:
        return Proof("base", (names, check_config(right, config)), ())
    origins = {n: source_of(ranks, n, shape) for n, shape in shapes.items()}
    # One core is the writer's, which may still be at work.
    with ThreadPoolExecutor(max(1, min(4, (os.cpu_count() or 1) - 1))) as pool:
        positions = pool.submit(_positions, ranks[0], right)
        controls = pool.submit(_controls, ranks, stored, shapes, dtype)
        order = _as_written(stored)
        right_bytes = pool.map(lambda n: _agrees(origins[n], stored[n], dtype), order)
        wrong = [n for n, fine in zip(order, right_bytes, strict=True) if not fine]
    what = "byte for byte equal" if dtype is None else f"every number within half a unit of {dtype}"
    detail = f"other content in {'; '.join(fold_names(wrong)[:4])}" if wrong else ""
    checks = [
        names,
        Check("L1", what, not wrong, len(shapes), detail=detail),
        check_config(right, config),
        check_coverage(ranks, origins.values()),
        *positions.result(),
    ]
    return Proof("base", tuple(checks), controls.result())


def _as_written(stored: Mapping[str, Lazy]) -> list[str]:
    """The tensors in the order of their bytes, shard by shard: the output may still be being written."""
    leaves = {name: next(tensor.leaves()) for name, tensor in stored.items()}
    return sorted(leaves, key=lambda name: (leaves[name].file.path.name, leaves[name].offset))


def _positions(tensors: Tensors, config: Mapping[str, Any]) -> list[Check]:
    """The table that diffusers computes where its weights have none: it must be the one the model was trained with."""
    held = tensors.get(POSITIONS)
    if held is None or is_rotary(tensors):
        return []
    fine, gap, bound = agrees(held, config)
    detail = "" if fine else f"diffusers would compute another table: off by {gap:.1e}"
    return [Check("L1", "the table of positions that diffusers computes", fine, 1, gap, bound, detail)]


def _names(shapes: Mapping[str, tuple[int, ...]], stored: Mapping[str, Lazy]) -> Check:
    wrong = sorted(set(shapes) ^ set(stored))
    wrong += [n for n in shapes if n in stored and tuple(stored[n].shape) != shapes[n]]
    detail = f"missing, unexpected or of another shape: {'; '.join(fold_names(wrong)[:6])}" if wrong else ""
    return Check("L0", "every tensor of the model and its shape", not wrong, len(shapes), detail=detail)


def _agrees(expected: Lazy, stored: Tensor, dtype: str | None) -> bool:
    if expected.shape != stored.shape:
        return False
    if dtype is None:
        return _unchanged(expected, stored) if isinstance(stored, Held | Computed) else same_bytes(expected, stored)
    return stored.dtype == dtype and rounded_once(values(expected), values(stored), dtype)


def _controls(
    ranks: list[Tensors], stored: Mapping[str, Lazy], shapes: Mapping[str, tuple[int, ...]], dtype: str | None
) -> tuple[Control, ...]:
    import numpy as np

    made = []
    for name, mistake in _mistakes(stored):
        # Infinity times zero is one of the mistakes.
        with np.errstate(over="ignore", invalid="ignore"):
            spoilt = mistake()
        failed = [n for n, t in spoilt.items() if not _agrees(source_of(ranks, n, shapes[n]), t, dtype)]
        if failed:
            made.append(Control(name, True, "L1"))
        else:
            changed = any(not _unchanged(stored[n], t) for n, t in spoilt.items())
            made.append(Control(name, False if changed else None, ""))
    return tuple(made)


def _unchanged(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and same_numbers(values(one), values(other))


Spoil = Callable[[], dict[str, Tensor]]


def _mistakes(stored: Mapping[str, Lazy]) -> Iterator[tuple[str, Spoil]]:
    """Each deliberate mistake as the tensors it would leave behind (of the first block, to stay cheap)."""
    block = "transformer_blocks.0."
    q, k, out = (f"{block}attn1.{name}.weight" for name in ("to_q", "to_k", "to_out.0"))
    later = "transformer_blocks.1.attn1.to_q.weight"
    chunked = _telling(stored, [f"{block}norm1.linear.bias", f"{block}norm1.linear.weight"])
    small = _telling(stored, [f"{block}norm1.linear.bias", f"{block}attn1.to_q.bias", q])

    def changed(name: str, how: Callable[[Any], Any]) -> dict[str, Tensor]:
        return {name: Held(how(values(stored[name])), stored[name].dtype)}

    yield "q and k swapped", lambda: {q: stored[k], k: stored[q]}
    yield "a tensor doubled", lambda: changed(small, lambda x: x * 2)
    yield "a tensor halved", lambda: changed(small, lambda x: x / 2)
    yield "a weight transposed", lambda: changed(out, lambda x: x.T)
    yield "layers shifted by one", lambda: {q: stored[later if later in stored else out]}
    yield "a tensor zeroed", lambda: changed(small, lambda x: x * 0)
    yield "stored in a lower precision", lambda: changed(small, coarse)
    yield "modulation chunks left in their order", lambda: changed(chunked, _reordered)


def _telling(stored: Mapping[str, Lazy], names: list[str]) -> str:
    """The first of these tensors in which a mistake would show: one that is not zero, and not exact in few bits."""
    for name in names:
        array = values(stored[name])
        if not same_numbers(array, coarse(array)):
            return name
    return names[-1]


def _reordered(array: Any) -> Any:
    import numpy as np

    chunks = np.split(array, 6, axis=0)
    return np.concatenate([chunks[n] for n in (0, 3, 1, 4, 2, 5)], axis=0)
