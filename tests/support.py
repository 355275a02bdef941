"""What several test files share: the recorded fixtures, readers foreign to the library, and float64 truth."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
import sysconfig
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import CogVideoXTransformer3DModel
from safetensors import safe_open
from safetensors.torch import load_file

from tests import sat_run
from tests.forward import FINAL_NORM_EPS
from tests.sat_run import DIT, Expected, RunSpec, State, Variant, full_state, peer_mapping

FIXTURES = Path(__file__).parent.parent / "fixtures"
LORA_FILE = "pytorch_lora_weights.safetensors"
BASE_FILE = "diffusion_pytorch_model.safetensors"
LORA_PATH = ("model", "network_config", "params", "modules", "lora_config", "params")
DTYPE_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Recorded:
    """A run of the real training stack, with the real model's outputs beside it."""

    name: str
    variant: Variant

    @property
    def folder(self) -> Path:
        return FIXTURES / "sat" / self.name

    @property
    def run(self) -> Path:
        return next((self.folder / "ckpts").iterdir())

    @property
    def iteration(self) -> Path:
        return self.run / (self.run / "latest").read_text()

    @property
    def checkpoint(self) -> Path:
        return self.iteration / "mp_rank_00_model_states.pt"

    @property
    def config(self) -> dict[str, Any]:
        value: dict[str, Any] = json.loads((self.folder / "config.json").read_text())
        return value

    @property
    def reference(self) -> Tensors:
        return load_file(self.folder / "reference.safetensors")

    @property
    def module(self) -> State:
        return module_of(self.checkpoint)


RECORDED = (
    Recorded("cogvideox-2b-t2v", "2b"),
    Recorded("cogvideox-5b-t2v-late", "5b"),
    Recorded("cogvideox-5b-i2v", "5b-i2v"),
    Recorded("cogvideox1.5-5b-t2v", "1.5-5b"),
    Recorded("cogvideox-5b-t2v-bf16", "5b"),
)
PARALLEL = Recorded("cogvideox-model-parallel-2", "5b")


def module_of(file: Path) -> State:
    """The module of a checkpoint that this repository made itself, as torch reads it."""
    state: State = torch.load(file, weights_only=False)["module"]
    return state


def small(**changes: Any) -> RunSpec:
    """A run of two narrow layers without the parts that take time to write."""
    given: dict[str, Any] = {"num_layers": 2, "vae_channels": 0, "t5": (8, 8, 8, 1, 2)}
    return RunSpec(**(given | changes))


# --- reading ------------------------------------------------------------------------------------------------------


def tensors_in(*files: Path) -> Tensors:
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def header(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return dict(opened.metadata() or {})


def stated(out: Path) -> dict[str, Any]:
    """What the written adapter's header tells peft."""
    value: dict[str, Any] = json.loads(header(out / LORA_FILE)["lora_adapter_metadata"])
    return value


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def same_bits(got: Mapping[str, torch.Tensor], want: Mapping[str, torch.Tensor]) -> None:
    """Assert equal names, dtypes, shapes and bytes."""
    assert sorted(got) == sorted(want)
    for name, tensor in want.items():
        assert (got[name].dtype, got[name].shape) == (tensor.dtype, tensor.shape), name
        assert raw(got[name]) == raw(tensor), name


def sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(raw(tensor)).hexdigest()


# --- the truth of an adapter --------------------------------------------------------------------------------------


def modules_of(adapter: Mapping[str, torch.Tensor], prefix: str = "transformer.") -> dict[str, tuple[Any, Any]]:
    """Module -> (down, up)."""
    names = [name.removesuffix(".lora_A.weight") for name in adapter if name.endswith(".lora_A.weight")]
    assert len(adapter) == 2 * len(names)
    return {
        name.removeprefix(prefix): (adapter[f"{name}.lora_A.weight"], adapter[f"{name}.lora_B.weight"])
        for name in names
    }


def deltas(adapter: Mapping[str, torch.Tensor], scale: float, prefix: str = "transformer.") -> Tensors:
    """Module -> ``scale * up @ down`` in float64."""
    pairs = modules_of(adapter, prefix).items()
    return {name: scale * (up.double() @ down.double()) for name, (down, up) in pairs}


def peft_scales(config: Mapping[str, Any], modules: Mapping[str, tuple[Any, Any]]) -> dict[str, float]:
    """Module -> scale by peft's rule, for patterns that are plain names."""
    scales = {}
    for name, (down, _) in modules.items():
        rank = config["rank_pattern"].get(name, config["r"])
        assert rank == down.shape[0], name
        alpha = config["alpha_pattern"].get(name, config["lora_alpha"])
        scales[name] = alpha / (math.sqrt(rank) if config["use_rslora"] else rank)
    return scales


def written_deltas(out: Path) -> Tensors:
    """What a written diffusers adapter adds to each module, by its header."""
    config = {key.removeprefix("transformer."): value for key, value in stated(out).items()}
    pairs = modules_of(load_file(out / LORA_FILE))
    scales = peft_scales(config, pairs)
    return {name: scales[name] * (up.double() @ down.double()) for name, (down, up) in pairs.items()}


def expected(spec: RunSpec, *, ema: bool = False) -> Expected:
    return peer_mapping(full_state(spec, ema=ema), variant=spec.variant, partition=spec.partition)


def scale_of(spec: RunSpec) -> float:
    return (1 if spec.lora_alpha is None else spec.lora_alpha) / spec.rank


def folded_adapter(adapter: Mapping[str, torch.Tensor], scale: float, dtype: torch.dtype | None = None) -> Tensors:
    """The adapter with its scale multiplied into ``up`` (float64, rounded once to at most float32)."""
    made = {}
    for name, tensor in adapter.items():
        value = tensor.double() * (scale if name.endswith(".lora_B.weight") else 1.0)
        made[name] = value.to(dtype or tensor.dtype)
    return made


def merged(expectation: Expected, scale: float) -> Tensors:
    """The base with the adapter added, in float64."""
    state = {name: tensor.double() for name, tensor in expectation.base.items()}
    for module, delta in deltas(expectation.adapter, scale).items():
        state[f"{module}.weight"] = state[f"{module}.weight"] + delta
    return state


def merge_ranks(ranks: list[State]) -> State:
    """The base of a model-parallel checkpoint put together by hand, without its LoRA tensors."""
    whole: State = State()
    for name, first in ranks[0].items():
        if not name.startswith(DIT) or ".matrix_" in name:
            continue
        parts = [rank[name] for rank in ranks]
        if "query_key_value" in name:
            whole[name] = torch.cat([torch.cat([part.chunk(3)[i] for part in parts]) for i in range(3)])
        elif "dense_h_to_4h" in name:
            whole[name] = torch.cat(parts)
        elif name.endswith(".weight") and ("dense_4h_to_h" in name or ".attention.dense." in name):
            whole[name] = torch.cat(parts, dim=1)
        else:
            assert all(torch.equal(first, part) for part in parts), name
            whole[name] = first
    return whole


# --- built runs ---------------------------------------------------------------------------------------------------


def set_lora_params(run: Path, **values: Any) -> None:
    """Change the LoRA settings in a run's YAML."""
    file = run / "training_config.yaml"
    config = yaml.safe_load(file.read_text())
    place = config
    for step in LORA_PATH:
        place = place[step]
    place.update(values)
    file.write_text(yaml.safe_dump(config, sort_keys=False))


def rewrite(spec: RunSpec, run: Path, change: Any) -> Path:
    """Write the run's checkpoint again after ``change(payload)``."""
    content = sat_run.payload(spec, full_state(spec))
    change(content)
    sat_run.save(spec, content, run / str(spec.iteration) / "mp_rank_00_model_states.pt")
    return run


# --- the consumers ------------------------------------------------------------------------------------------------


class _Collector(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(f"{record.name}: {record.getMessage()}")


@contextmanager
def no_warnings() -> Iterator[None]:
    """Fail on any Python warning, and on any log line of a warning or worse from diffusers, peft or torch."""
    collector = _Collector()
    loggers = [logging.getLogger(name) for name in ("diffusers", "peft", "transformers", "torch", "loraconv")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(collector)
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.removeHandler(collector)
            logger.setLevel(level)
    assert collector.said == []
    assert [str(w.message) for w in caught] == []


def load_transformer(folder: Path, dtype: torch.dtype = torch.float32) -> CogVideoXTransformer3DModel:
    """The model that diffusers makes of a written folder, comparable with SAT."""
    transformer = CogVideoXTransformer3DModel.from_pretrained(folder, torch_dtype=dtype).eval()
    transformer.norm_out.norm.eps = FINAL_NORM_EPS
    return transformer


def add_lora(transformer: CogVideoXTransformer3DModel, out: Path, **options: Any) -> None:
    """Load a written folder into the model as a user does, without a scale."""
    transformer.load_lora_adapter(out, prefix="transformer", use_safetensors=True, **options)


def inputs_of(spec: RunSpec, dtype: torch.dtype = torch.float32) -> Tensors:
    """Seeded inputs for the forward pass of a built run's model."""
    noise = torch.Generator().manual_seed(7)
    frames, height, width = spec.video
    latents = ((frames - 1) // 4 + 1) // spec.patch[0] * spec.patch[0]
    shape = (1, latents, spec.in_channels, height, width)
    made = {
        "x": torch.randn(shape, generator=noise).to(dtype),
        "context": torch.randn((1, spec.text_length, spec.text_hidden), generator=noise).to(dtype),
        "timesteps": torch.tensor([500]),
    }
    if spec.variant == "1.5-5b-i2v":
        made["ofs"] = torch.tensor([2.0]).to(dtype)
    return made


def refuse_to_skip_compiled_parts() -> None:
    """Skip, loudly, what tests the compiled parts of fuse, where they could not be built; fail where they could."""
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    if shutil.which("cc") and headers.exists():
        pytest.fail("there is a C compiler, but loraconv was installed without its compiled parts: pip install -e .")
    pytest.skip("COMPILED PARTS NOT TESTED: there is no C compiler or no Python.h, so that they were not built")
