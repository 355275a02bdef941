"""What a consumer needs before it looks at a number: each thing that would keep it from loading is refused alone."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loraconv.errors import ProofFailed
from loraconv.verifier.loadable import adapter_file, check_base_files, check_torch, check_written
from loraconv.verifier.numbers import Held

WEIGHTS = "diffusion_pytorch_model"


def refused(yes: bool) -> Any:
    return pytest.raises(ProofFailed, match="would not load") if yes else nullcontext()


@pytest.mark.parametrize(
    ("files", "beside", "fine"),
    [
        ([f"{WEIGHTS}.safetensors"], [], True), ([f"{WEIGHTS}.safetensors"], ["config.json"], True),
        ([f"{WEIGHTS}.safetensors"], ["old.bin"], False), ([f"{WEIGHTS}.safetensors"], ["x.ckpt"], False),
        ([f"{WEIGHTS}-00001-of-00002.safetensors", f"{WEIGHTS}-00002-of-00002.safetensors"], [], True),
        ([f"{WEIGHTS}-00002-of-00002.safetensors", f"{WEIGHTS}-00001-of-00002.safetensors"], [], True),
        ([f"{WEIGHTS}-00000-of-00002.safetensors", f"{WEIGHTS}-00001-of-00002.safetensors"], [], False),
        ([f"{WEIGHTS}-00001-of-00001.safetensors"], [], False), (["model.safetensors"], [], False),
        ([f"{WEIGHTS}-00001-of-00002.safetensors"], [f"{WEIGHTS}-00002-of-00002.safetensors"], False),
    ],
)  # fmt: skip
def test_the_weights_of_a_base_are_those_that_diffusers_opens(
    tmp_path: Path, files: list[str], beside: list[str], fine: bool
) -> None:
    for name in files + beside:
        (tmp_path / name).write_text("")
    with refused(not fine):
        check_base_files(tmp_path, files)
    (tmp_path / files[0]).unlink()
    with refused(True):
        check_base_files(tmp_path, files)


def test_the_file_of_an_adapter_is_found_where_its_consumer_looks(tmp_path: Path) -> None:
    (tmp_path / "7").mkdir()
    (tmp_path / "latest").write_text("7\n")
    (tmp_path / "7/mp_rank_00_model_states.pt").write_text("")
    assert adapter_file("sat", tmp_path, ["7/mp_rank_00_model_states.pt"]) == "7/mp_rank_00_model_states.pt"
    (tmp_path / "adapter_model.safetensors").write_text("")
    assert adapter_file("peft", tmp_path, ["adapter_model.safetensors"]) == "adapter_model.safetensors"
    with refused(True):
        adapter_file("kohya", tmp_path, ["adapter_model.safetensors"])
    with refused(True):
        adapter_file("peft", tmp_path / "nowhere", ["adapter_model.safetensors"])
    assert adapter_file("somebody's", tmp_path, ["x.st", "y.st"]) == "x.st"


@pytest.mark.parametrize(
    ("world", "fine"), [(1, True), (2, False), (0, False), (True, False), (1.0, False), ("1", False)]
)
def test_the_world_of_a_single_file_is_one(world: Any, fine: bool) -> None:
    with refused(not fine):
        check_torch({"mp_world_size": world})


def factors(*modules: str, prefix: str = "base_model.model.", rank: int = 2) -> dict[str, Any]:
    sides = {"A": (rank, 8), "B": (8, rank)}
    return {f"{prefix}{m}.lora_{s}.weight": Held(np.ones(shape), "F32") for m in modules for s, shape in sides.items()}


def config(**changes: Any) -> dict[str, Any]:
    return {"peft_type": "LORA", "r": 2, "lora_alpha": 1, "target_modules": ["a.q", "a.k"]} | changes


CONFIGS: dict[str, tuple[dict[str, Any], bool]] = {
    "plain": ({}, True), "defaults": ({"bias": "none", "init_lora_weights": True, "qalora_group_size": 16}, True),
    "empty": ({"use_dora": False, "layers_to_transform": None, "modules_to_save": [], "loftq_config": {}}, True),
    "notes": ({"base_model_name_or_path": "x", "revision": "y", "inference_mode": True, "peft_version": "1"}, True),
    "bias": ({"bias": "all"}, False), "no bias": ({"bias": None}, True),
    "a default of true": ({"init_lora_weights": False}, False),
    "another group": ({"qalora_group_size": 0}, False), "saved": ({"modules_to_save": ["x"]}, False),
    "one fan": ({"fan_in_fan_out": True}, False), "no LoRA": ({"peft_type": "LOHA"}, False),
    "DoRA": ({"use_dora": True}, False), "fewer targets": ({"target_modules": ["a.q"]}, False),
    "more targets": ({"target_modules": ["a.q", "a.k", "a.v"]}, False),
    "a pattern": ({"target_modules": "a.[qk]"}, False), "in another order": ({"target_modules": ["a.k", "a.q"]}, True),
    "another rank": ({"r": 3}, False),
    "a rank of its own": ({"r": 3, "rank_pattern": {"q": 2, "k": 2}}, True),
    "one rank of its own": ({"r": 3, "rank_pattern": {"q": 2}}, False),
}  # fmt: skip


@pytest.mark.parametrize("case", CONFIGS)
def test_the_configuration_makes_the_modules_of_the_file_and_plain_lora(case: str) -> None:
    changes, fine = CONFIGS[case]
    with refused(not fine):
        check_written("peft", factors("a.q", "a.k"), {}, config(**changes))
    own = {key: value for key, value in config(**changes).items() if key != "peft_type"}
    header = {"lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in own.items()})}
    with refused(not fine and case != "no LoRA"):
        check_written("diffusers", factors("a.q", "a.k", prefix="transformer."), header, None)
    check_written("kohya", {}, {}, None)


def test_keys_have_the_prefix_and_magnitudes_their_word() -> None:
    tensors = factors("a.q") | factors("a.k", prefix="")
    for given in (tensors, {n: t for n, t in factors("a.q", "a.k").items() if "k.lora_B" not in n}):
        with refused(True):
            check_written("peft", given, {}, config())
    both = factors("a.q", "a.k")
    check_written("peft", both, {}, config(use_dora=True), dora=True)
    with refused(True):
        check_written("peft", both, {}, config(), dora=True)
    text = factors("text_model.a.q", prefix="text_encoder.")
    header = {"r": 2, "lora_alpha": 1, "target_modules": ["a.q"]}
    told = {"lora_adapter_metadata": json.dumps({f"text_encoder.{k}": v for k, v in header.items()})}
    check_written("diffusers", text, told, None)
    told = {"lora_adapter_metadata": json.dumps({f"text_encoder.{k}": v for k, v in header.items()} | {"r": 2})}
    with refused(True):
        check_written("diffusers", text, told, None)


@pytest.mark.parametrize(("told", "rank", "fine"), [(2, 2, True), (3, 2, False), (None, 2, False)])
def test_the_settings_of_sat_say_the_rank_of_all_factors(told: Any, rank: int, fine: bool) -> None:
    tensors: dict[str, Any] = {f"x.matrix_A.{n}": Held(np.ones((rank, 4)), "F32") for n in range(2)}
    tensors |= {"x.matrix_B.0": Held(np.ones((4, rank)), "F32"), "x.weight": Held(np.ones((9, 9)), "F32")}
    settings: dict[str, Any] = {"lora_config": {"params": {"r": told}}}
    for step in ("modules", "params", "network_config", "model"):
        settings = {step: settings}
    with refused(not fine):
        check_written("sat", tensors, {}, settings)
    with refused(True):
        check_written("sat", tensors | {"y.matrix_A.0": Held(np.ones((5, 4)), "F32")}, {}, settings)
