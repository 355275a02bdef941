"""Builds run folders laid out as the SAT training stack with DeepSpeed writes them, at any size.

Nothing here comes from the library under test: the names and shapes were taken from checkpoints of real runs, and
`peer_mapping` is a second, deliberately plain statement of what a conversion has to give.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import random
import sys
import types
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple
from unittest import mock

import numpy as np
import torch
import yaml

DIT = "model.diffusion_model."
VAE = "first_stage_model."
T5 = "conditioner.embedders.0.transformer."
SHARED = T5 + "shared.weight"
TIED = T5 + "encoder.embed_tokens.weight"

State = OrderedDict[str, torch.Tensor]
Shapes = dict[str, tuple[int, ...]]
Variant = Literal["2b", "5b", "5b-i2v", "1.5-5b", "1.5-5b-i2v"]


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """What one run folder is to hold; the defaults give a tiny LoRA run of the first code generation."""

    variant: Variant = "2b"
    generation: Literal["early", "late"] = "early"
    kind: Literal["lora", "full", "base"] = "lora"
    num_layers: int = 3
    hidden: int = 64
    heads: int = 4
    rank: int = 4
    lora_alpha: float | None = None
    layer_range: tuple[int, ...] | None = None
    partition: tuple[int, int, int] = (1, 1, 1)
    dtype: torch.dtype = torch.float32
    seed: int = 0
    iteration: int = 2

    yaml: bool = True
    rng: bool = True
    ema: bool = False
    deepspeed_015: bool = False
    extras: bool = False
    zero_stage: int = 2
    zero3: Literal["whole", "part"] | None = None
    mp_size: int = 1
    mp_drift: bool = False
    zero_b: bool = False
    nan_in: tuple[str, ...] = ()
    second_copy: bool = False  # frozen fragments in storages of their own, as a GPU run should write them
    location: str = "cpu"  # the device tag of every storage
    experiment: str = "lora-disney-11-20-06-14"

    # LoRA B is drawn this wide so that the adapter shows in the output.
    b_std: float = 1.0
    mlp_ratio: int = 4
    channels: int = 16
    time_embed_dim: int = 32
    text_hidden: int = 24
    text_length: int = 10
    max_sequence_length: int = 64
    latent_width: int | None = None
    latent_height: int | None = None
    num_frames: int | None = None
    vae_channels: int = 4  # 0: no VAE in the engine
    vae_multipliers: tuple[int, ...] = (1,)
    vae_res_blocks: int = 0
    t5: tuple[int, int, int, int, int] = (192, 16, 32, 1, 2)  # vocabulary, inner width, feed-forward, layers, heads

    def __post_init__(self) -> None:
        if self.newer and self.generation == "early":
            raise ValueError("the 1.5 models exist in the late generation only")
        if self.zero3 and (self.kind == "base" or self.mp_size > 1):
            raise ValueError("ZeRO-3 is laid out here for training runs with one model-parallel rank")

    @property
    def newer(self) -> bool:
        return self.variant.startswith("1.5")

    @property
    def i2v(self) -> bool:
        return self.variant.endswith("i2v")

    @property
    def rotary(self) -> bool:
        return self.variant != "2b"

    @property
    def learned_positions(self) -> bool:
        return self.variant in ("2b", "5b-i2v")

    @property
    def patch(self) -> tuple[int, int, int]:
        return (2, 2, 2) if self.newer else (1, 2, 2)

    @property
    def in_channels(self) -> int:
        return self.channels * (2 if self.i2v else 1)

    @property
    def video(self) -> tuple[int, int, int]:
        """Frames of the video, then height and width of a latent frame."""
        frames, height, width = (13, 16, 20) if self.newer else (9, 8, 12)
        return self.num_frames or frames, self.latent_height or height, self.latent_width or width

    @property
    def video_tokens(self) -> int:
        frames, height, width = self.video
        depth, rows, columns = self.patch
        return ((frames - 1) // 4 + 1) // depth * (height // rows) * (width // columns)

    @property
    def qkv_rows(self) -> tuple[int, int, int]:
        """Rows of q, k and v: q always has the full width, the others follow from the partition."""
        unit = self.hidden // self.partition[0]
        q, k, v = (unit * share for share in self.partition)
        return q, k, v

    def has_lora(self, layer: int) -> bool:
        return self.kind == "lora" and (self.layer_range is None or layer in self.layer_range)


# --- names and shapes -----------------------------------------------------------------------------------------------


def _linear(name: str, rows: int, columns: int) -> Shapes:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def _norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _conv(name: str, out: int, inputs: int, size: int) -> Shapes:
    return {f"{name}.weight": (out, inputs, size, size, size), f"{name}.bias": (out,)}


def _position_shapes(spec: RunSpec) -> Shapes:
    shapes: Shapes = {}
    if spec.learned_positions:
        shapes["mixins.pos_embed.pos_embedding"] = (1, spec.text_length + spec.video_tokens, spec.hidden)
    if spec.rotary and spec.generation == "early":
        table = (spec.video_tokens, spec.hidden // spec.heads)
        shapes |= {"mixins.pos_embed.freqs_sin": table, "mixins.pos_embed.freqs_cos": table}
    return shapes


def _mixin_shapes(spec: RunSpec) -> Shapes:
    hidden, time, layers = spec.hidden, spec.time_embed_dim, range(spec.num_layers)
    head, volume = hidden // spec.heads, math.prod(spec.patch)
    proj = _linear("mixins.patch_embed.proj", hidden, spec.in_channels * volume)
    if spec.generation == "early":
        proj["mixins.patch_embed.proj.weight"] = (hidden, spec.in_channels, 2, 2)
    shapes = _position_shapes(spec) | proj | _linear("mixins.patch_embed.text_proj", hidden, spec.text_hidden)
    for i in layers:
        shapes |= _linear(f"mixins.adaln_layer.adaLN_modulations.{i}.1", 12 * hidden, time)
    for which in ("query", "key"):
        for i in layers:
            shapes |= _norm(f"mixins.adaln_layer.{which}_layernorm_list.{i}", head)
    shapes |= _norm("mixins.final_layer.norm_final", hidden)
    shapes |= _linear("mixins.final_layer.linear", spec.channels * volume, hidden)
    return shapes | _linear("mixins.final_layer.adaLN_modulation.1", 2 * hidden, time)


def _lora_linear(name: str, rows: tuple[int, ...], columns: int, rank: int | None) -> Shapes:
    """A linear layer, wrapped with one A and B for each part of its rows where a rank is given."""
    if rank is None:
        return _linear(name, sum(rows), columns)
    shapes = _linear(f"{name}.original", sum(rows), columns)
    shapes |= {f"{name}.matrix_A.{i}": (rank, columns) for i in range(len(rows))}
    return shapes | {f"{name}.matrix_B.{i}": (part, rank) for i, part in enumerate(rows)}


def _layer_shapes(spec: RunSpec, layer: int) -> Shapes:
    name, hidden, inner = f"transformer.layers.{layer}", spec.hidden, spec.hidden * spec.mlp_ratio
    rank = spec.rank if spec.has_lora(layer) else None
    return {
        **_norm(f"{name}.input_layernorm", hidden),
        **_lora_linear(f"{name}.attention.query_key_value", spec.qkv_rows, hidden, rank),
        **_lora_linear(f"{name}.attention.dense", (hidden,), hidden, rank),
        **_norm(f"{name}.post_attention_layernorm", hidden),
        **_linear(f"{name}.mlp.dense_h_to_4h", inner, hidden),
        **_linear(f"{name}.mlp.dense_4h_to_h", hidden, inner),
    }


def dit_shapes(spec: RunSpec) -> Shapes:
    """The diffusion transformer, in the order of a real checkpoint, names without the engine's prefix."""
    hidden, time = spec.hidden, spec.time_embed_dim
    shapes = _mixin_shapes(spec)
    if spec.rotary:
        shapes["transformer.position_embeddings.weight"] = (spec.max_sequence_length, hidden)
    for layer in range(spec.num_layers):
        shapes |= _layer_shapes(spec, layer)
    shapes |= _norm("transformer.final_layernorm", hidden)
    shapes |= _linear("time_embed.0", time, hidden) | _linear("time_embed.2", time, time)
    if spec.variant == "1.5-5b-i2v":
        shapes |= _linear("ofs_embed.0", time, time) | _linear("ofs_embed.2", time, time)
    return shapes


def t5_shapes(spec: RunSpec) -> Shapes:
    vocabulary, inner, feed_forward, layers, heads = spec.t5
    width = spec.text_hidden
    shapes: Shapes = {"shared.weight": (vocabulary, width), "encoder.embed_tokens.weight": (vocabulary, width)}
    for i in range(layers):
        attention, dense = f"encoder.block.{i}.layer.0", f"encoder.block.{i}.layer.1"
        shapes |= {f"{attention}.SelfAttention.{part}.weight": (inner, width) for part in "qkv"}
        shapes[f"{attention}.SelfAttention.o.weight"] = (width, inner)
        if i == 0:  # one table of relative positions serves all blocks
            shapes[f"{attention}.SelfAttention.relative_attention_bias.weight"] = (32, heads)
        shapes[f"{attention}.layer_norm.weight"] = (width,)
        shapes |= {f"{dense}.DenseReluDense.{part}.weight": (feed_forward, width) for part in ("wi_0", "wi_1")}
        shapes[f"{dense}.DenseReluDense.wo.weight"] = (width, feed_forward)
        shapes[f"{dense}.layer_norm.weight"] = (width,)
    shapes["encoder.final_layer_norm.weight"] = (width,)
    return shapes


def _vae_norm(name: str, width: int, latent: int | None) -> Shapes:
    """The decoder's norms are conditioned on the latent, the encoder's are plain."""
    if latent is None:
        return _norm(name, width)
    return {
        **_norm(f"{name}.norm_layer", width),
        **_conv(f"{name}.conv_y.conv", width, latent, 1),
        **_conv(f"{name}.conv_b.conv", width, latent, 1),
    }


def _vae_block(name: str, inputs: int, out: int, latent: int | None) -> Shapes:
    shapes = _vae_norm(f"{name}.norm1", inputs, latent) | _conv(f"{name}.conv1.conv", out, inputs, 3)
    shapes |= _vae_norm(f"{name}.norm2", out, latent) | _conv(f"{name}.conv2.conv", out, out, 3)
    return shapes if inputs == out else shapes | _conv(f"{name}.nin_shortcut", out, inputs, 1)


def _vae_levels(prefix: str, widths: list[int], start: int, blocks: int, latent: int | None) -> Shapes:
    """The resolution levels of one half, each but the last with a resampling convolution."""
    shapes: Shapes = {}
    inputs, direction, resample = start, *(("down", "downsample") if latent is None else ("up", "upsample"))
    for i, width in enumerate(widths):
        level = i if latent is None else len(widths) - 1 - i
        for block in range(blocks):
            shapes |= _vae_block(f"{prefix}.{direction}.{level}.block.{block}", inputs, width, latent)
            inputs = width
        if i < len(widths) - 1:
            sample = f"{prefix}.{direction}.{level}.{resample}.conv"
            shapes |= {f"{sample}.weight": (inputs, inputs, 3, 3), f"{sample}.bias": (inputs,)}
    return shapes


def vae_shapes(spec: RunSpec) -> Shapes:
    if not spec.vae_channels:
        return {}
    widths = [spec.vae_channels * factor for factor in spec.vae_multipliers]
    first, last, latent, blocks = widths[0], widths[-1], spec.channels, spec.vae_res_blocks
    encoder = _conv("encoder.conv_in.conv", first, 3, 3) | _vae_levels("encoder", widths, first, blocks, None)
    for i in (1, 2):
        encoder |= _vae_block(f"encoder.mid.block_{i}", last, last, None)
    encoder |= _norm("encoder.norm_out", last) | _conv("encoder.conv_out.conv", 2 * latent, last, 3)
    decoder = _conv("decoder.conv_in.conv", last, latent, 3)
    for i in (1, 2):
        decoder |= _vae_block(f"decoder.mid.block_{i}", last, last, latent)
    decoder |= _vae_levels("decoder", widths[::-1], last, blocks + 1, latent)
    return (
        encoder | decoder | _vae_norm("decoder.norm_out", first, latent) | _conv("decoder.conv_out.conv", 3, first, 3)
    )


def shapes(spec: RunSpec) -> Shapes:
    """Every tensor of the module, unsplit, with full names and in order."""
    parts = {DIT: dit_shapes(spec)}
    if spec.kind != "base":
        parts |= {T5: t5_shapes(spec), VAE: vae_shapes(spec)}
    return {prefix + name: shape for prefix, part in parts.items() for name, shape in part.items()}


def buffer_names(spec: RunSpec) -> list[str]:
    return [name for name in shapes(spec) if ".freqs_" in name]


def trained_names(spec: RunSpec) -> list[str]:
    names = [name for name in shapes(spec) if name.startswith(DIT)]
    if spec.kind == "lora":
        return [name for name in names if ".matrix_" in name]
    return [name for name in names if ".freqs_" not in name]


# --- values ---------------------------------------------------------------------------------------------------------


def _rotary_table(spec: RunSpec, name: str) -> torch.Tensor:
    """The table a 1.0 rotary model carries: time, row and column angles, each repeated in pairs."""
    frames, height, width = spec.video
    axes = ((frames - 1) // 4 + 1, height // 2, width // 2)
    head = spec.hidden // spec.heads
    widths = (head // 4, head // 8 * 3, head // 8 * 3)
    tables = []
    for axis, (count, dim) in enumerate(zip(axes, widths, strict=True)):
        rates = 1.0 / 10000 ** (torch.arange(0, dim, 2)[: dim // 2].float() / dim)
        angles = torch.outer(torch.arange(count).float(), rates).repeat_interleave(2, dim=-1)
        view = [1, 1, 1, dim]
        view[axis] = count
        tables.append(angles.view(view).expand(*axes, dim))
    angles = torch.cat(tables, dim=-1).reshape(-1, sum(widths))
    return angles.sin() if name.endswith("sin") else angles.cos()


def position_table(spec: RunSpec) -> torch.Tensor:
    """The fixed table of the 2B, which SAT computes as diffusers does (checked on the recorded run)."""
    from diffusers.models.embeddings import get_3d_sincos_pos_embed

    frames, height, width = spec.video
    axes = ((width // 2, height // 2), (frames - 1) // 4 + 1)
    video = get_3d_sincos_pos_embed(spec.hidden, *axes, 1.875, 1.0, output_type="pt").flatten(0, 1)
    return torch.cat([torch.zeros(spec.text_length, spec.hidden), video])[None]


def _value(spec: RunSpec, name: str, shape: tuple[int, ...], noise: torch.Generator) -> torch.Tensor:
    draw = torch.randn(shape, generator=noise)
    if ".freqs_" in name:
        return _rotary_table(spec, name)
    if name.endswith("pos_embed.pos_embedding") and spec.variant == "2b":
        return position_table(spec)
    if ".matrix_A." in name:
        # Kaiming uniform with a = sqrt(5), as the real layers start.
        return (torch.rand(shape, generator=noise) * 2 - 1) / math.sqrt(shape[1])
    if ".matrix_B." in name:
        return draw * (0.0 if spec.zero_b else spec.b_std)
    if "norm" in name and name.endswith(".weight"):
        return 1 + 0.1 * draw
    if len(shape) == 1:
        return 0.1 * draw
    return draw / math.sqrt(math.prod(shape[1:]))


def _ema_shift(spec: RunSpec, module: State) -> State:
    """Move the trained tensors a little, as the shadow weights of the optimizer lag behind."""
    noise = torch.Generator().manual_seed(spec.seed + 1)
    trained = set(trained_names(spec))

    def shadow(name: str, tensor: torch.Tensor) -> torch.Tensor:
        wobble = torch.randn(tensor.shape, generator=noise).to(tensor.dtype)
        return tensor * (1 + 0.01 * wobble) if name in trained else tensor

    return OrderedDict((name, shadow(name, tensor)) for name, tensor in module.items())


def full_state(spec: RunSpec, *, ema: bool = False) -> State:
    """The module before any split over ranks: what a merged checkpoint would have to hold."""
    noise = torch.Generator().manual_seed(spec.seed)
    module: State = OrderedDict()
    for name, shape in shapes(spec).items():
        tensor = _value(spec, name, shape, noise).to(spec.dtype)
        if any(part in name for part in spec.nan_in):
            tensor.view(-1)[0] = math.nan
        module[name] = tensor
    if TIED in module:
        module[TIED] = module[SHARED]
    return _ema_shift(spec, module) if ema else module


# --- model parallelism ----------------------------------------------------------------------------------------------


def _split(spec: RunSpec, name: str, tensor: torch.Tensor, rank: int) -> torch.Tensor:
    def part(whole: torch.Tensor, dim: int) -> torch.Tensor:
        return whole.chunk(spec.mp_size, dim=dim)[rank].clone()

    if "query_key_value" in name and name.endswith((".weight", ".bias")):
        return torch.cat([part(piece, 0) for piece in tensor.split(spec.qkv_rows)])
    if "query_key_value.matrix_B" in name or "mlp.dense_h_to_4h" in name:
        return part(tensor, 0)
    if "mlp.dense_4h_to_h.weight" in name or "attention.dense.matrix_A" in name:
        return part(tensor, 1)
    if ".attention.dense." in name and name.endswith(".weight"):
        return part(tensor, 1)
    return tensor


def _drift(spec: RunSpec, name: str, tensor: torch.Tensor, rank: int) -> torch.Tensor:
    """Replicated LoRA tensors of real model-parallel runs differ between the ranks, by a thousandth after two steps."""
    if rank == 0 or not any(part in name for part in ("query_key_value.matrix_A", "dense.matrix_B")):
        return tensor
    noise = torch.Generator().manual_seed(spec.seed + 100 * rank)
    return (tensor.float() * (1 + 1e-3 * torch.randn(tensor.shape, generator=noise))).to(tensor.dtype)


def rank_state(spec: RunSpec, rank: int, *, ema: bool = False) -> State:
    module = full_state(spec, ema=ema)
    if spec.mp_size == 1:
        return module
    local: State = OrderedDict((name, _split(spec, name, tensor, rank)) for name, tensor in module.items())
    if spec.mp_drift:
        local = OrderedDict((name, _drift(spec, name, tensor, rank)) for name, tensor in local.items())
    return local


# --- the payload of one file ----------------------------------------------------------------------------------------


def flatten_trained(module: State, names: list[str]) -> State:
    """Turn the trained tensors into views of one storage, as the optimizer's partitioning leaves them."""
    if not names:
        return module
    flat = torch.cat([module[name].reshape(-1) for name in names])
    laid: State = OrderedDict(module)
    offset = 0
    for name in names:
        shape = module[name].shape
        laid[name] = flat[offset : offset + shape.numel()].view(shape)
        offset += shape.numel()
    return laid


def note_versions(module: State) -> State:
    """Attach the version table that `Module.state_dict` leaves on its result, one entry for each submodule."""
    names = dict.fromkeys([""])
    for name in module:
        parts = name.split(".")[:-1]
        names |= dict.fromkeys(".".join(parts[:i]) for i in range(1, len(parts) + 1))
    module._metadata = OrderedDict((name, {"version": 1}) for name in names)  # type: ignore[attr-defined]
    return module


def deepspeed_config(spec: RunSpec) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 1,
        "steps_per_print": 50,
        "gradient_clipping": 0.1,
        "zero_optimization": {
            "stage": 3 if spec.zero3 else spec.zero_stage,
            "cpu_offload": False,
            "contiguous_gradients": False,
            "overlap_comm": True,
            "reduce_scatter": True,
            "reduce_bucket_size": 1000000000,
            "allgather_bucket_size": 1000000000,
            "load_from_fp32_weights": False,
        },
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": spec.dtype == torch.bfloat16},
        "fp16": {"enabled": spec.dtype == torch.float16},
        "loss_scale": 0,
        "loss_scale_window": 400,
        "hysteresis": 2,
        "min_loss_scale": 1,
        "activation_checkpointing": {"partition_activations": False, "contiguous_memory_optimization": False},
        "wall_clock_breakdown": False,
    }


def _optimizer_state(module: State, names: list[str]) -> dict[str, Any]:
    def moments(tensor: torch.Tensor) -> dict[str, Any]:
        return {"step": 2, "exp_avg": torch.zeros_like(tensor), "exp_avg_sq": torch.zeros_like(tensor)}

    group = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-08, "weight_decay": 1e-4, "params": list(range(len(names)))}
    return {"state": {i: moments(module[name]) for i, name in enumerate(names)}, "param_groups": [group]}


def _partition_entries(spec: RunSpec, module: State, rank: int) -> dict[str, Any]:
    """What the engine notes about trained and frozen parameters; nothing at ZeRO stage 0."""
    keys = ("param_shapes", "frozen_param_shapes", "shared_params", "frozen_param_fragments")
    if spec.zero_stage == 0:
        return dict.fromkeys(keys)
    trained = trained_names(spec)
    skipped = {*trained, *buffer_names(spec), TIED}
    frozen = OrderedDict((name, tensor.detach()) for name, tensor in module.items() if name not in skipped)
    if spec.second_copy:
        frozen = OrderedDict((name, tensor.clone()) for name, tensor in frozen.items())
    return {
        "param_shapes": [OrderedDict((name, module[name].shape) for name in trained)],
        "frozen_param_shapes": OrderedDict((name, tensor.shape) for name, tensor in frozen.items()),
        "shared_params": {TIED: SHARED} if rank == 0 and TIED in module else {},
        "frozen_param_fragments": frozen,
    }


def _rng_entries(spec: RunSpec) -> dict[str, Any]:
    if not spec.rng:
        return {}
    return {
        "random_rng_state": random.Random(spec.seed).getstate(),
        "np_rng_state": np.random.RandomState(1234 + spec.seed).get_state(),
        "torch_rng_state": torch.Generator().manual_seed(spec.seed).get_state(),
        "cuda_rng_state": torch.zeros(16, dtype=torch.uint8),
    }


def _extra_entries(spec: RunSpec) -> dict[str, Any]:
    if not spec.extras:
        return {}
    return {"args": argparse.Namespace(model_parallel_size=spec.mp_size, fp16=True), "loss_scaler": LossScaler(65536.0)}


def payload(spec: RunSpec, module: State, rank: int = 0) -> dict[str, Any]:
    """The dictionary of one `mp_rank_XX_model_states.pt`, in the order of a real one."""
    if spec.kind == "base":
        return {"module": dict(module)}
    names = trained_names(spec)
    if spec.zero_stage:
        module = flatten_trained(module, names)
    steps, parallel = spec.iteration, {"pp_degree": 1, "tp_degree": spec.mp_size}
    return {
        "module": note_versions(module),
        "buffer_names": buffer_names(spec),
        "optimizer": None if spec.zero_stage else _optimizer_state(module, names),
        **_partition_entries(spec, module, rank),
        "lr_scheduler": None,
        "data_sampler": None,
        "random_ltd": None,
        **({"sparse_tensor_module_names": set()} if spec.deepspeed_015 else {}),
        "skipped_steps": 0,
        "global_steps": steps,
        "global_samples": 2 * steps,
        "dp_world_size": 1,
        "mp_world_size": spec.mp_size,
        **({} if spec.deepspeed_015 else {"checkpoint_parallel_dimensions": parallel}),
        "ds_config": deepspeed_config(spec),
        "ds_version": "0.15.4" if spec.deepspeed_015 else "0.19.8",
        "iteration": steps,
        "client_lr_scheduler": {
            "start_lr": 0.01,
            "warmup_iter": 0.02,
            "num_iters": steps + 1,
            "decay_style": "linear",
            "end_iter": steps,
            "decay_ratio": 10.0,
        },
        **_rng_entries(spec),
        **_extra_entries(spec),
    }


def zero3_payload(spec: RunSpec, module: State) -> dict[str, Any]:
    """Flat parameters with their true shape as an attribute; buffers are not partitioned."""
    buffers = set(buffer_names(spec))
    parts: State = OrderedDict()
    for name, tensor in module.items():
        local = tensor
        if name not in buffers:
            local = tensor.reshape(-1).clone()
            if spec.zero3 == "part":
                local = local[: -(-local.numel() // 2)].clone()
            local.ds_shape = tensor.shape  # type: ignore[attr-defined]
        parts[f"module.{name}"] = local
    return {"module": parts}


# --- writing --------------------------------------------------------------------------------------------------------


class LossScaler:
    """Stands for a class that only the training machine has; renamed below so that the pickle says so."""

    def __init__(self, scale: float) -> None:
        self.cur_scale = scale


LossScaler.__module__ = "deepspeed.runtime.fp16.loss_scaler"


@contextlib.contextmanager
def _pretend_modules() -> Iterator[None]:
    """Let the pickler find the foreign class, while it writes and no longer."""
    stub = types.ModuleType(LossScaler.__module__)
    stub.LossScaler = LossScaler  # type: ignore[attr-defined]
    parts = LossScaler.__module__.split(".")
    parents = {".".join(parts[:i]): types.ModuleType(parts[i - 1]) for i in range(1, len(parts))}
    with mock.patch.dict(sys.modules, {**parents, LossScaler.__module__: stub}):
        yield


@contextlib.contextmanager
def _numpy_1_names() -> Iterator[None]:
    """Write arrays under the module name that NumPy 1 used; the object found there is the same one."""
    rebuild = np.empty(0).__reduce__()[0]
    with mock.patch.object(rebuild, "__module__", "numpy.core.multiarray"):
        yield


def save(spec: RunSpec, content: dict[str, Any], file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        if spec.extras:
            stack.enter_context(_pretend_modules())
        if spec.deepspeed_015:
            stack.enter_context(_numpy_1_names())
        if spec.location != "cpu":
            stack.enter_context(mock.patch("torch.serialization.location_tag", return_value=spec.location))
        torch.save(content, file)


def _write_ranks(spec: RunSpec, folder: Path, *, ema: bool) -> None:
    for rank in range(spec.mp_size):
        module = rank_state(spec, rank, ema=ema)
        if spec.zero3:
            save(spec, zero3_payload(spec, module), folder / f"z3_rank_{rank:02d}_model_states.pt")
        else:
            save(spec, payload(spec, module, rank), folder / f"mp_rank_{rank:02d}_model_states.pt")


def write_settings(spec: RunSpec, run: Path) -> None:
    """The small files beside the checkpoints."""
    run.mkdir(parents=True, exist_ok=True)
    (run / "latest").write_text(str(spec.iteration))
    dies_early = spec.kind != "base" and spec.zero_stage == 0 and spec.dtype == torch.float32
    if not dies_early:
        model = {"model_class": "SATVideoDiffusionEngine", "model_parallel_size": spec.mp_size}
        (run / "model_config.json").write_text(json.dumps(model, indent=4))
    if spec.yaml and spec.kind != "base":
        text = yaml.safe_dump(training_config(spec), sort_keys=False)
        (run / "training_config.yaml").write_text(text)


def build(spec: RunSpec, folder: Path) -> Path:
    """Write the run under `folder` and return its path; a base goes to `transformer`, as released ones do."""
    if spec.kind == "base":
        spec = replace(spec, iteration=1)
    run = folder / ("transformer" if spec.kind == "base" else spec.experiment)
    write_settings(spec, run)
    _write_ranks(spec, run / str(spec.iteration), ema=False)
    if spec.ema and spec.kind != "base":
        _write_ranks(spec, run / f"{spec.iteration}-ema", ema=True)
    return run


# --- training_config.yaml -------------------------------------------------------------------------------------------


def _position_config(spec: RunSpec) -> dict[str, Any]:
    if not spec.rotary:
        params: dict[str, Any] = {"text_length": spec.text_length}
        params |= {"height_interpolation": 1.875, "width_interpolation": 1.875}
        return {"target": "dit_video_concat.Basic3DPositionEmbeddingMixin", "params": params}
    params = {"learnable_pos_embed": True} if spec.variant == "5b-i2v" else {}
    params |= {"hidden_size_head": spec.hidden // spec.heads, "text_length": spec.text_length}
    return {"target": "dit_video_concat.Rotary3DPositionEmbeddingMixin", "params": params}


def _lora_config(spec: RunSpec) -> dict[str, Any]:
    params: dict[str, Any] = {"r": spec.rank}
    if spec.lora_alpha is not None:
        params["lora_alpha"] = spec.lora_alpha
    if spec.layer_range is not None:
        params["layer_range"] = list(spec.layer_range)
    return {"target": "sat.model.finetune.lora2.LoraMixin", "params": params}


def _modules_config(spec: RunSpec) -> dict[str, Any]:
    modules: dict[str, Any] = {"pos_embed_config": _position_config(spec)}
    if spec.kind == "lora":
        modules["lora_config"] = _lora_config(spec)
    text = {"text_hidden_size": spec.text_hidden}
    modules["patch_embed_config"] = {"target": "dit_video_concat.ImagePatchEmbeddingMixin", "params": text}
    modules["adaln_layer_config"] = {"target": "dit_video_concat.AdaLNMixin", "params": {"qk_ln": True}}
    modules["final_layer_config"] = {"target": "dit_video_concat.FinalLayerMixin"}
    return modules


def _network_config(spec: RunSpec) -> dict[str, Any]:
    frames, height, width = spec.video
    params: dict[str, Any] = {"time_embed_dim": spec.time_embed_dim}
    if spec.variant == "1.5-5b-i2v":
        params["ofs_embed_dim"] = spec.time_embed_dim
    params |= {
        "elementwise_affine": True,
        "num_frames": frames,
        "time_compressed_rate": 4,
        "latent_width": width,
        "latent_height": height,
        "num_layers": spec.num_layers,
        "patch_size": list(spec.patch) if spec.generation == "late" else 2,
        "in_channels": spec.in_channels,
        "out_channels": spec.channels,
        "hidden_size": spec.hidden,
        "adm_in_channels": 256,
        "num_attention_heads": spec.heads,
        "transformer_args": {
            "checkpoint_activations": True,
            "vocab_size": 1,
            "max_sequence_length": spec.max_sequence_length,
            "layernorm_order": "pre",
            "skip_init": False,
            "model_parallel_size": spec.mp_size,
            "is_decoder": False,
        },
        "modules": _modules_config(spec),
    }
    return {"target": "dit_video_concat.DiffusionTransformer", "params": params}


def _discretization(spec: RunSpec) -> dict[str, Any]:
    config: dict[str, Any] = {"target": "sgm.modules.diffusionmodules.discretizer.ZeroSNRDDPMDiscretization"}
    if not spec.newer:
        config["params"] = {"shift_scale": 3.0 if spec.variant == "2b" else 1.0}
    return config


def _diffusion_config(spec: RunSpec) -> dict[str, Any]:
    """Denoiser, loss and sampler: no converter needs them, but a reader has to step over them."""
    base, noise = "sgm.modules.diffusionmodules", {"num_idx": 1000, "discretization_config": _discretization(spec)}
    guider = {"target": f"{base}.guiders.DynamicCFG", "params": {"scale": 6, "exp": 5, "num_steps": 50}}
    return {
        "denoiser_config": {
            "target": f"{base}.denoiser.DiscreteDenoiser",
            "params": {
                "num_idx": 1000,
                "quantize_c_noise": False,
                "weighting_config": {"target": f"{base}.denoiser_weighting.EpsWeighting"},
                "scaling_config": {"target": f"{base}.denoiser_scaling.VideoScaling"},
                "discretization_config": _discretization(spec),
            },
        },
        "loss_fn_config": {
            "target": f"{base}.loss.VideoDiffusionLoss",
            "params": {
                "offset_noise_level": 0,
                "sigma_sampler_config": {
                    "target": f"{base}.sigma_sampling.DiscreteSampling",
                    "params": {"uniform_sampling": True, **noise},
                },
            },
        },
        "sampler_config": {
            "target": f"{base}.sampling.VPSDEDPMPP2MSampler",
            "params": {
                "num_steps": 50,
                "verbose": True,
                "discretization_config": _discretization(spec),
                "guider_config": guider,
            },
        },
    }


def _conditioner_config(spec: RunSpec) -> dict[str, Any]:
    encoder = {
        "is_trainable": False,
        "input_key": "txt",
        "ucg_rate": 0.1,
        "target": "sgm.modules.encoders.modules.FrozenT5Embedder",
        "params": {"model_dir": "t5-v1_1-xxl", "max_length": spec.text_length, "device": "cpu"},
    }
    return {"target": "sgm.modules.GeneralConditioner", "params": {"emb_models": [encoder]}}


def _first_stage_config(spec: RunSpec) -> dict[str, Any]:
    if not spec.vae_channels:
        return {"target": "torch.nn.Identity"}
    half = {
        "double_z": True,
        "z_channels": spec.channels,
        "resolution": 256,
        "in_channels": 3,
        "out_ch": 3,
        "ch": spec.vae_channels,
        "ch_mult": list(spec.vae_multipliers),
        "attn_resolutions": [],
        "num_res_blocks": spec.vae_res_blocks,
        "dropout": 0.0,
        "gather_norm": False,
    }
    parts = "vae_modules.cp_enc_dec.ContextParallel"
    params = {
        "cp_size": 1,
        "ignore_keys": ["loss"],
        "loss_config": {"target": "torch.nn.Identity"},
        "regularizer_config": {"target": "vae_modules.regularizers.DiagonalGaussianRegularizer"},
        "encoder_config": {"target": f"{parts}Encoder3D", "params": half},
        "decoder_config": {"target": f"{parts}Decoder3D", "params": dict(half)},
    }
    return {"target": "vae_modules.autoencoder.VideoAutoencoderInferenceWrapper", "params": params}


def _model_config(spec: RunSpec) -> dict[str, Any]:
    model: dict[str, Any] = {"scale_factor": 1.15258426 if spec.variant == "2b" else 0.7}
    model["disable_first_stage_autocast"] = True
    if spec.i2v:
        model |= {"latent_input": False, "noised_image_input": True, "noised_image_dropout": 0.05}
    if spec.kind == "lora":
        model["not_trainable_prefixes"] = ["all"]
    model["log_keys"] = ["txt"]
    diffusion = _diffusion_config(spec)
    return model | {
        "denoiser_config": diffusion["denoiser_config"],
        "network_config": _network_config(spec),
        "conditioner_config": _conditioner_config(spec),
        "first_stage_config": _first_stage_config(spec),
        "loss_fn_config": diffusion["loss_fn_config"],
        "sampler_config": diffusion["sampler_config"],
    }


def _args_config(spec: RunSpec) -> dict[str, Any]:
    return {
        "checkpoint_activations": False,
        "model_parallel_size": spec.mp_size,
        "experiment_name": "lora-disney",
        "mode": "finetune",
        "load": "ckpts",
        "no_load_rng": True,
        "train_iters": spec.iteration,
        "eval_iters": 1,
        "eval_interval": 100000,
        "eval_batch_size": 1,
        "save": "ckpts",
        "save_interval": spec.iteration,
        "log_interval": 1,
        "train_data": ["disney"],
        "valid_data": ["disney"],
        "split": "1,0,0",
        "num_workers": 0,
        "force_train": True,
        "only_log_video_latents": True,
        "distributed_backend": "gloo",
        "device": 0,
    }


def training_config(spec: RunSpec) -> dict[str, Any]:
    """The merged settings of a run, with the nesting and the key names of a real one."""
    frames, height, width = spec.video
    size = {"video_size": [height, width], "fps": 8, "max_num_frames": (frames - 1) // 4 + 1}
    optimizer = {"lr": 0.01, "betas": [0.9, 0.95], "eps": 1e-08, "weight_decay": 0.0001}
    deepspeed = deepspeed_config(spec)
    tail = {key: deepspeed.pop(key) for key in ("activation_checkpointing", "wall_clock_breakdown")}
    kind = "sat.ops.FusedEmaAdam" if spec.zero_stage else "Adam"
    return {
        "model": _model_config(spec),
        "args": _args_config(spec),
        "data": {"target": "data_video.SFTDataset", "params": size},
        "deepspeed": deepspeed | {"optimizer": {"type": kind, "params": optimizer}} | tail,
    }


# --- the oracle -----------------------------------------------------------------------------------------------------


class Expected(NamedTuple):
    """What a conversion has to give, in diffusers names; the adapter is unscaled."""

    adapter: dict[str, torch.Tensor]
    base: dict[str, torch.Tensor]


def _adapter_key(rest: str) -> str:
    _, _, layer, _, linear, matrix, index = rest.split(".")
    target = "to_out.0" if linear == "dense" else ("to_q", "to_k", "to_v")[int(index)]
    return f"transformer.transformer_blocks.{layer}.attn1.{target}.lora_{matrix[-1]}.weight"


_RENAMED = {
    "mixins.patch_embed.": "patch_embed.",
    "mixins.final_layer.norm_final.": "norm_out.norm.",
    "mixins.final_layer.adaLN_modulation.1.": "norm_out.linear.",
    "mixins.final_layer.linear.": "proj_out.",
    "transformer.final_layernorm.": "norm_final.",
    "time_embed.0.": "time_embedding.linear_1.",
    "time_embed.2.": "time_embedding.linear_2.",
    "ofs_embed.0.": "ofs_embedding.linear_1.",
    "ofs_embed.2.": "ofs_embedding.linear_2.",
}
_RENAMED_IN_LAYER = {
    "input_layernorm.": "norm1.norm.",
    "post_attention_layernorm.": "norm2.norm.",
    "attention.dense.": "attn1.to_out.0.",
    "mlp.dense_h_to_4h.": "ff.net.0.proj.",
    "mlp.dense_4h_to_h.": "ff.net.2.",
}


def _layer_tensors(rest: str, tensor: torch.Tensor, rows: tuple[int, ...]) -> dict[str, torch.Tensor]:
    _, _, layer, name = rest.split(".", 3)
    block = f"transformer_blocks.{layer}."
    if name.startswith("attention.query_key_value."):
        end = name.rsplit(".", 1)[1]
        parts = zip(("to_q", "to_k", "to_v"), tensor.split(rows), strict=True)
        return {f"{block}attn1.{target}.{end}": part for target, part in parts}
    for old, new in _RENAMED_IN_LAYER.items():
        if name.startswith(old):
            return {block + new + name.removeprefix(old): tensor}
    raise KeyError(rest)


def _adaln_tensors(rest: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    _, _, kind, layer, *_, end = rest.split(".")
    block = f"transformer_blocks.{layer}."
    if kind != "adaLN_modulations":
        return {f"{block}attn1.norm_{kind[0]}.{end}": tensor}
    c = tensor.chunk(12, dim=0)
    # Video and text triples alternate between the two norms: first norm, second norm, and again for the text.
    return {
        f"{block}norm1.linear.{end}": torch.cat([*c[0:3], *c[6:9]]),
        f"{block}norm2.linear.{end}": torch.cat([*c[3:6], *c[9:12]]),
    }


def _base_tensors(rest: str, tensor: torch.Tensor, variant: Variant, rows: tuple[int, ...]) -> dict[str, torch.Tensor]:
    if ".freqs_" in rest or rest == "transformer.position_embeddings.weight":
        return {}
    if rest.endswith("pos_embed.pos_embedding"):
        return {"patch_embed.pos_embedding": tensor} if variant == "5b-i2v" else {}
    if rest == "mixins.patch_embed.proj.weight" and tensor.dim() == 2 and not variant.startswith("1.5"):
        return {"patch_embed.proj.weight": tensor.reshape(tensor.shape[0], -1, 2, 2)}
    if rest.startswith("transformer.layers."):
        return _layer_tensors(rest.replace(".original.", "."), tensor, rows)
    if rest.startswith("mixins.adaln_layer."):
        return _adaln_tensors(rest, tensor)
    for old, new in _RENAMED.items():
        if rest.startswith(old):
            return {new + rest.removeprefix(old): tensor}
    raise KeyError(rest)


def _qkv_rows(state: Mapping[str, torch.Tensor], partition: tuple[int, int, int]) -> tuple[int, ...]:
    total = next(t.shape[0] for k, t in state.items() if "query_key_value" in k and k.endswith(".weight"))
    return tuple(total // sum(partition) * share for share in partition)


def peer_mapping(
    state: Mapping[str, torch.Tensor],
    *,
    variant: Variant,
    partition: tuple[int, int, int] = (1, 1, 1),
) -> Expected:
    """The diffusers adapter (unscaled) and base that follow from one unsplit SAT module."""
    adapter: dict[str, torch.Tensor] = {}
    base: dict[str, torch.Tensor] = {}
    rows = _qkv_rows(state, partition)
    for name, tensor in state.items():
        if not name.startswith(DIT):
            continue
        rest = name.removeprefix(DIT)
        if ".matrix_" in rest:
            adapter[_adapter_key(rest)] = tensor.contiguous()
        else:
            base |= {key: part.contiguous() for key, part in _base_tensors(rest, tensor, variant, rows).items()}
    return Expected(adapter, base)
