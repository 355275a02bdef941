"""The ``training_config.yaml`` and the payload around the tensors, as the SAT training of CogVideoX writes them.

Keys and nesting are those of runs of zai-org/CogVideo ``sat/`` with DeepSpeed. What a run of loraconv does not have (a
DeepSpeed version, a loss-scale window) is left out rather than made up.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from loraconv import __version__
from loraconv.io.torch_write import Size
from loraconv.lazy import Lazy
from loraconv.trainer.sat import SatModule
from loraconv.trainer.settings import Settings

_DIT = "dit_video_concat"
#: Rows of the position table that SAT's transformer always has and CogVideoX never uses.
MAX_SEQUENCE = 64


def payload(module: SatModule, buffers: list[str], settings: Settings, step: int, processes: int) -> dict[str, Any]:
    """Everything in a rank file besides ``module``, in DeepSpeed's order, as a run with ``--no-save-rng`` leaves it."""
    trained, skipped = module.trained, {*module.trained, *buffers}
    frozen: OrderedDict[str, Lazy] = OrderedDict((n, t) for n, t in module.tensors.items() if n not in skipped)
    parallel = settings.checkpoints.model_parallel
    return {
        "buffer_names": buffers,
        "optimizer": None,
        "param_shapes": [OrderedDict((name, Size(module.tensors[name].shape)) for name in trained)],
        "frozen_param_shapes": OrderedDict((name, Size(tensor.shape)) for name, tensor in frozen.items()),
        "shared_params": {},
        "frozen_param_fragments": frozen,
        "lr_scheduler": None,
        "data_sampler": None,
        "random_ltd": None,
        "skipped_steps": 0,
        "global_steps": step,
        "global_samples": step * settings.batch.size * settings.batch.accumulate * processes,
        "dp_world_size": processes,
        "mp_world_size": parallel,
        "checkpoint_parallel_dimensions": {"pp_degree": 1, "tp_degree": parallel},
        "ds_config": deepspeed(settings),
        "ds_version": f"none; written by loraconv {__version__}",
        "iteration": step,
        "client_lr_scheduler": _annealing(settings, step),
    }


def _annealing(settings: Settings, step: int) -> dict[str, Any]:
    """The state of SAT's ``AnnealingLR``; ``decay_ratio`` is the first rate divided by the last one."""
    schedule = settings.schedule
    ends = schedule.kind in ("linear", "cosine")
    return {
        "start_lr": settings.optimizer.rate,
        "warmup_iter": schedule.warmup,
        "num_iters": step,
        "decay_style": schedule.kind,
        "end_iter": settings.steps,
        "decay_ratio": (1 / schedule.end if schedule.end else math.inf) if ends else 1.0,
    }


def training_config(
    config: Mapping[str, Any], settings: Settings, layers: list[int], record: Mapping[str, Any]
) -> dict[str, Any]:
    """The merged settings. ``config`` is the diffusers transformer's, ``layers`` are those with a LoRA; ``record`` is
    what loraconv adds under its own name."""
    frames = (config["sample_frames"] - 1) // config["temporal_compression_ratio"] + 1
    size = [config["sample_height"], config["sample_width"]]
    model: dict[str, Any] = {"network_config": _network(config, settings, layers)}
    if config["in_channels"] > config["out_channels"]:
        model |= {"noised_image_input": True, "noised_image_dropout": settings.conditioning.dropout}
    if settings.kind == "lora":
        model["not_trainable_prefixes"] = ["all"]
    optimizer = {"lr": settings.optimizer.rate, "betas": list(settings.optimizer.betas), "eps": settings.optimizer.eps,
                 "weight_decay": settings.optimizer.weight_decay}  # fmt: skip
    return {
        "model": model,
        "args": {
            "model_parallel_size": settings.checkpoints.model_parallel,
            "mode": "finetune",
            "train_iters": settings.steps,
            "save_interval": settings.checkpoints.every,
        },
        "data": {"target": "data_video.SFTDataset", "params": {"video_size": size, "max_num_frames": frames}},
        "deepspeed": deepspeed(settings) | {"optimizer": {"type": "sat.ops.FusedEmaAdam", "params": optimizer}},
        "loraconv": dict(record),
    }


def deepspeed(settings: Settings) -> dict[str, Any]:
    """The part of DeepSpeed's configuration that says how this run was trained."""
    return {
        "train_micro_batch_size_per_gpu": settings.batch.size,
        "gradient_accumulation_steps": settings.batch.accumulate,
        "gradient_clipping": settings.optimizer.clip,
        "bf16": {"enabled": settings.model.precision == "bf16"},
        "fp16": {"enabled": settings.model.precision == "fp16"},
    }


def _network(config: Mapping[str, Any], settings: Settings, layers: list[int]) -> dict[str, Any]:
    depth, patch = config["patch_size_t"], config["patch_size"]
    params: dict[str, Any] = {
        "time_embed_dim": config["time_embed_dim"],
        "elementwise_affine": config["norm_elementwise_affine"],
        "num_frames": config["sample_frames"],
        "time_compressed_rate": config["temporal_compression_ratio"],
        "latent_width": config["sample_width"],
        "latent_height": config["sample_height"],
        "num_layers": config["num_layers"],
        "patch_size": [depth, patch, patch] if depth else patch,
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "hidden_size": config["num_attention_heads"] * config["attention_head_dim"],
        "adm_in_channels": 256,
        "num_attention_heads": config["num_attention_heads"],
        "transformer_args": {
            "checkpoint_activations": settings.model.gradient_checkpointing,
            "vocab_size": 1,
            "max_sequence_length": MAX_SEQUENCE,
            "layernorm_order": "pre",
            "skip_init": False,
            "model_parallel_size": settings.checkpoints.model_parallel,
            "is_decoder": False,
        },
        "modules": _modules(config, settings, layers),
    }
    if config["ofs_embed_dim"] is not None:
        params["ofs_embed_dim"] = config["ofs_embed_dim"]
    return {"target": f"{_DIT}.DiffusionTransformer", "params": params}


def _modules(config: Mapping[str, Any], settings: Settings, layers: list[int]) -> dict[str, Any]:
    modules: dict[str, Any] = {"pos_embed_config": _positions(config)}
    if settings.kind == "lora":
        alpha = settings.lora.alpha
        params: dict[str, Any] = {"r": settings.lora.rank, "lora_alpha": int(alpha) if alpha.is_integer() else alpha}
        if layers != list(range(config["num_layers"])):
            params["layer_range"] = layers
        modules["lora_config"] = {"target": "sat.model.finetune.lora2.LoraMixin", "params": params}
    text = {"text_hidden_size": config["text_embed_dim"]}
    modules["patch_embed_config"] = {"target": f"{_DIT}.ImagePatchEmbeddingMixin", "params": text}
    modules["adaln_layer_config"] = {"target": f"{_DIT}.AdaLNMixin", "params": {"qk_ln": True}}
    modules["final_layer_config"] = {"target": f"{_DIT}.FinalLayerMixin"}
    return modules


def _positions(config: Mapping[str, Any]) -> dict[str, Any]:
    params: dict[str, Any] = {"text_length": config["max_text_seq_length"]}
    if not config["use_rotary_positional_embeddings"]:
        scale = config["spatial_interpolation_scale"]
        params |= {"height_interpolation": scale, "width_interpolation": scale}
        return {"target": f"{_DIT}.Basic3DPositionEmbeddingMixin", "params": params}
    params["hidden_size_head"] = config["attention_head_dim"]
    if config["use_learned_positional_embeddings"]:
        params["learnable_pos_embed"] = True
    return {"target": f"{_DIT}.Rotary3DPositionEmbeddingMixin", "params": params}
