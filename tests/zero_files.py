"""Writes DeepSpeed checkpoints as its ``save_checkpoint`` lays them out, for what no real run leaves behind.

Facts: microsoft/DeepSpeed ``runtime/zero/stage_1_and_2.py`` and ``stage3.py``. What real runs leave is in
``fixtures/zero``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import pad

MODULES = [f"base_model.model.model.layers.{n}.self_attn.{p}" for n in range(2) for p in ("q_proj", "v_proj")]
Tensors = dict[str, torch.Tensor]
Root = dict[str, Any]
#: Changes the root of a file before it is written: ``(root, kind of file, rank)``.
Change = Callable[[Root, str, int], None]


def trained() -> Tensors:
    """The fp32 copies."""
    noise = torch.Generator().manual_seed(1)
    made = {}
    for module in MODULES:
        made[f"{module}.lora_A.default.weight"] = torch.randn(3, 7, generator=noise)
        made[f"{module}.lora_B.default.weight"] = torch.randn(7, 3, generator=noise)
    return made


def frozen() -> Tensors:
    return {f"{module}.base_layer.weight": torch.ones(7, 7, dtype=torch.bfloat16) for module in MODULES}


def unchanged(root: Root, kind: str, rank: int) -> None:
    """Leaves a file as DeepSpeed writes it."""


def write(folder: Path, stage: int, *, ranks: int = 2, change: Change = unchanged) -> Path:
    """``checkpoint-7`` of a run with this ZeRO stage; returns the folder of its step."""
    step = folder / "checkpoint-7" / "global_step7"
    step.mkdir(parents=True, exist_ok=True)
    (step.parent / "latest").write_text("global_step7")
    for rank in range(ranks):
        save(step / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt", optimizer(stage, rank, ranks), rank, change)
        if stage == 3:
            save(step / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt", parts(rank, ranks), rank, change)
    if stage != 3:
        save(step / "mp_rank_00_model_states.pt", whole(ranks), 0, change)
    return step


def save(file: Path, root: Root, rank: int, change: Change) -> None:
    change(root, "optim" if "optim" in file.name else "model", rank)
    torch.save(root, file)


def optimizer(stage: int, rank: int, ranks: int) -> Root:
    flat = piece_of_each(rank, ranks) if stage == 3 else piece_of_all(rank, ranks)
    state = {"state": {0: {"step": torch.tensor(7.0), "exp_avg": torch.zeros_like(flat)}}}
    groups = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
    held = {"zero_stage": stage, "partition_count": ranks, groups: [flat]}
    return {"optimizer_state_dict": {**held, "base_optimizer_state": state}, "ds_version": "0.15.4"}


def piece_of_all(rank: int, ranks: int) -> torch.Tensor:
    """ZeRO 1 and 2: the copies end to end, filled up to twice the ranks, and cut into as many pieces as there are."""
    flat = torch.cat([tensor.flatten() for tensor in trained().values()])
    return pad(flat, (0, -len(flat) % (2 * ranks))).chunk(ranks)[rank].clone()


def piece_of_each(rank: int, ranks: int) -> torch.Tensor:
    """ZeRO 3: of every parameter, filled up to the ranks, one piece."""
    flats = [tensor.flatten() for tensor in trained().values()]
    return torch.cat([pad(flat, (0, -len(flat) % ranks)).chunk(ranks)[rank] for flat in flats])


def whole(ranks: int) -> Root:
    return {
        "module": {**{name: tensor.bfloat16() for name, tensor in trained().items()}, **frozen()},
        "buffer_names": [],
        "param_shapes": [{name: tensor.shape for name, tensor in trained().items()}],
        "frozen_param_shapes": {name: tensor.shape for name, tensor in frozen().items()},
        "frozen_param_fragments": frozen(),
        "shared_params": {},
        "global_steps": 7,
        "dp_world_size": ranks,
        "mp_world_size": 1,
        "ds_version": "0.15.4",
    }


def parts(rank: int, ranks: int) -> Root:
    root = whole(ranks)
    root["module"] = {name: torch.empty(0, dtype=torch.bfloat16) for name in root["module"]}
    flats = {name: tensor.flatten() for name, tensor in frozen().items()}
    root["frozen_param_fragments"] = {
        name: pad(flat, (0, -len(flat) % ranks)).chunk(ranks)[rank].clone() for name, flat in flats.items()
    }
    return root
