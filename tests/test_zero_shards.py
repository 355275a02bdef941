"""DeepSpeed checkpoints of a peft run, laid out as ``DeepSpeedEngine.save_checkpoint`` does: whole tensors are read,
and parts are refused by name, with the way to whole ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import loraconv
from loraconv.errors import FormatError

LAYERS, RANKS = 2, 2
MODULES = [f"base_model.model.model.layers.{n}.self_attn.{p}" for n in range(LAYERS) for p in ("q_proj", "v_proj")]


def trained(dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    noise = torch.Generator().manual_seed(1)
    made = {}
    for module in MODULES:
        made[f"{module}.lora_A.default.weight"] = torch.randn(4, 8, generator=noise).to(dtype)
        made[f"{module}.lora_B.default.weight"] = torch.randn(8, 4, generator=noise).to(dtype)
    return made


def frozen() -> dict[str, torch.Tensor]:
    return {f"{module}.base_layer.weight": torch.ones(8, 8, dtype=torch.bfloat16) for module in MODULES}


def write(folder: Path, stage: int) -> Path:
    """``checkpoint-N`` of a run on two ranks with this ZeRO stage; the folder of the step."""
    step = folder / "checkpoint-7" / "global_step7"
    step.mkdir(parents=True)
    (folder / "checkpoint-7" / "latest").write_text("global_step7")
    shapes = [{name: tensor.shape for name, tensor in trained().items()}]
    model: dict[str, Any] = {"module": {**trained(), **frozen()}, "param_shapes": shapes, "mp_world_size": 1}
    flat = torch.cat([tensor.flatten().float() for tensor in trained().values()])
    for rank, part in enumerate(flat.chunk(RANKS)):
        groups = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
        optimizer = {"zero_stage": stage, "partition_count": RANKS, groups: [part]}
        name = f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": optimizer, "ds_version": "0.15.4"}, step / name)
        if stage == 3:
            empty = {name: torch.empty(0, dtype=torch.bfloat16) for name in model["module"]}
            torch.save({**model, "module": empty}, step / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
    if stage != 3:
        torch.save(model, step / "mp_rank_00_model_states.pt")
    return step


def refused(path: Path) -> FormatError:
    with pytest.raises(FormatError) as caught:
        loraconv.inspect(path)
    assert caught.value.slug == "zero-shards"
    return caught.value


@pytest.mark.parametrize("stage", [1, 2])
def test_the_whole_tensors_of_zero_1_and_2_are_converted(stage: int, tmp_path: Path) -> None:
    step = write(tmp_path, stage)
    result = loraconv.convert(step, out=tmp_path / "out", to="peft", alpha=8, drop=["*.base_layer.*"])
    made = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {name: made[name.replace(".default", "")].tolist() for name in trained()} == {
        name: tensor.tolist() for name, tensor in trained().items()
    }
    assert len(made) == len(trained())
    assert any("training dtype" in notice and "zero_to_fp32.py" in notice for notice in result.notices)


@pytest.mark.parametrize("stage", [1, 2])
def test_the_folder_above_says_where_the_tensors_are(stage: int, tmp_path: Path) -> None:
    step = write(tmp_path, stage)
    assert str(step) in refused(step.parent).hint


def test_zero_3_is_refused_with_the_way_to_whole_tensors(tmp_path: Path) -> None:
    step = write(tmp_path, 3)
    for path in (step, step.parent, *sorted(step.iterdir())):
        error = refused(path)
        assert f"{step.parent / 'zero_to_fp32.py'} {step.parent} OUT" in error.hint
    assert "empty" in refused(step / "zero_pp_rank_1_mp_rank_00_model_states.pt").why


def test_an_optimizer_s_part_is_no_adapter(tmp_path: Path) -> None:
    step = write(tmp_path, 2)
    assert "ZeRO 2" in refused(step / "zero_pp_rank_0_mp_rank_00_optim_states.pt").why


def test_a_script_of_deepspeed_beside_a_saved_adapter_is_no_reason_to_refuse_it(tmp_path: Path) -> None:
    """As the Trainer of transformers saves: adapter and shards in one ``checkpoint-N``."""
    step = write(tmp_path, 3)
    from safetensors.torch import save_file

    whole = {name.replace(".default", ""): tensor for name, tensor in trained().items()}
    save_file(whole, step.parent / "adapter_model.safetensors")
    assert loraconv.inspect(step.parent).dialect == "peft"
