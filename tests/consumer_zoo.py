"""Adapter files in every condition that users bring: each in a folder of its own, with random factors of a tiny model.

Written with safetensors and numpy alone. A folder with ``adapter_config.json`` is peft's; the others are for diffusers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

Arrays = dict[str, Any]
Config = dict[str, Any]
Animal = tuple[Arrays, dict[str, str] | None, Config | None]

WIDTH, LAYERS, RANK = 16, 2, 4
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
MODULES = tuple(f"transformer_blocks.{i}.attn1.{name}" for i in range(LAYERS) for name in ATTENTION)
PEFT = "base_model.model."
AB = ("{}.lora_A.weight", "{}.lora_B.weight")
DOWN_UP = ("{}.lora_down.weight", "{}.lora_up.weight")

_random = np.random.default_rng(0)


def draw(*shape: int) -> Any:
    return _random.normal(size=shape).astype(np.float32)


def factors(
    prefix: str = "transformer.",
    spelled: tuple[str, str] = AB,
    ranks: Callable[[str], int] = lambda module: RANK,
    name: Callable[[str], str] = lambda module: module,
    modules: tuple[str, ...] = MODULES,
) -> Arrays:
    made = {}
    for module in modules:
        down, up = (prefix + template.format(name(module)) for template in spelled)
        made[down], made[up] = draw(ranks(module), WIDTH), draw(WIDTH, ranks(module))
    return made


def each(template: str, make: Callable[[], Any], modules: tuple[str, ...] = MODULES) -> Arrays:
    return {template.format(module): make() for module in modules}


def settings(**changes: Any) -> Config:
    """What peft's ``LoraConfig.to_dict`` gives of the fields that every release knows."""
    base = {
        "r": RANK,
        "lora_alpha": 2,
        "rank_pattern": {},
        "alpha_pattern": {},
        "target_modules": list(MODULES),
        "use_rslora": False,
        "use_dora": False,
        "bias": "none",
        "peft_type": "LORA",
        "task_type": None,
    }
    return {key: value for key, value in {**base, **changes}.items() if value is not ...}


def header(prefix: str = "transformer.", **changes: Any) -> dict[str, str]:
    return {"lora_adapter_metadata": json.dumps({prefix + k: v for k, v in settings(**changes).items()})}


def underscored(module: str) -> str:
    return module.replace(".", "_")


def processor(module: str) -> str:
    return module.replace(".to_", ".processor.to_").removesuffix(".0")


def wide(word: str) -> Callable[[str], int]:
    return lambda module: 2 * RANK if word in module else RANK


def number(value: float) -> Callable[[], Any]:
    return lambda: np.array(value, dtype=np.float32)


def magnitude() -> Any:
    return np.abs(draw(WIDTH)) + 1


LATER = {"alora_invocation_tokens": None, "arrow_config": None, "ensure_weight_tying": False, "peft_version": "0.18.0"}
OUTSIDE = {"transformer.foo.lora_A.weight": draw(RANK, WIDTH), "transformer.foo.lora_B.weight": draw(WIDTH, RANK)}
WITHOUT_V = tuple(m for m in MODULES if "to_v" not in m)
FIRST_LAYER, SECOND_LAYER = MODULES[:4], MODULES[4:]
MAGNITUDES = "transformer.{}.lora_magnitude_vector"

FOR_DIFFUSERS: dict[str, tuple[Arrays, Mapping[str, str] | None]] = {
    "as trained": (factors(), header()),
    "scale 1": (factors(), header(lora_alpha=RANK)),
    "header missing": (factors(), None),
    "header empty": (factors(), {"lora_adapter_metadata": ""}),
    "header of another component": (factors(), header("text_encoder.")),
    "header without prefix": (factors(), header("")),
    "header not JSON": (factors(), {"lora_adapter_metadata": "{"}),
    "header of finetrainers": (factors(), {"lora_config": json.dumps({"r": RANK, "lora_alpha": 2})}),
    "header with alpha_pattern": (factors(), header(alpha_pattern={"to_k": 8, f"^{MODULES[2]}": 1})),
    "header with an unfit pattern": (factors(), header(alpha_pattern={"^transformer_blocks.1": 8, "attn1": 8})),
    "header of another rank": (factors(), header(r=8)),
    "header without patterns": (factors(), header(rank_pattern=..., alpha_pattern=...)),
    "header without target_modules": (factors(), header(target_modules=...)),
    "header with few target_modules": (factors(), header(target_modules=["to_q", "to_k"])),
    "header with more target_modules": (factors(modules=WITHOUT_V), header(target_modules=list(ATTENTION))),
    "header with a pattern of modules": (
        factors(),
        header(target_modules=r"transformer_blocks\..*\.to_(q|k|v|out\.0)"),
    ),
    "header with excluded modules": (factors(), header(exclude_modules=["to_k"])),
    "header of an unknown field": (factors(), header(nonsense=1)),
    "header of a later peft": (factors(), header(**LATER)),
    "rsLoRA": (factors(), header(use_rslora=True)),
    "mixed ranks": (factors(ranks=wide("to_q")), None),
    "mixed ranks, the first differs": (factors(ranks=wide("0.attn1.to_k")), None),
    "mixed ranks, one differs": (factors(ranks=wide("1.attn1.to_v")), None),
    "mixed ranks in the header": (
        factors(ranks=wide("to_q")),
        header(rank_pattern={"to_q": 2 * RANK}, alpha_pattern={"to_q": 2}),
    ),
    "no prefix": (factors(""), None),
    "half without prefix": (factors(modules=FIRST_LAYER) | factors("", modules=SECOND_LAYER), None),
    "prefix of peft": (factors(PEFT), None),
    "prefix of SimpleTuner": (factors("transformer." + PEFT), None),
    "prefix of ComfyUI": (factors("diffusion_model."), None),
    "names in memory": (factors(spelled=("{}.lora_A.default.weight", "{}.lora_B.default.weight")), None),
    "names without weight": (factors(spelled=("{}.lora_A", "{}.lora_B")), None),
    "kohya": (factors("lora_unet_", DOWN_UP, name=underscored), None),
    "kohya with alpha": (
        factors("lora_unet_", DOWN_UP, name=underscored)
        | each("lora_unet_{}.alpha", number(2), tuple(map(underscored, MODULES))),
        None,
    ),
    "VideoX-Fun": (
        factors("lora_unet__", DOWN_UP, name=underscored)
        | each("lora_unet__{}.alpha", number(2), tuple(map(underscored, MODULES))),
        None,
    ),
    "down and up": (factors(spelled=DOWN_UP), None),
    "alpha tensors": (factors() | each("transformer.{}.alpha", number(2)), None),
    "lora_alpha tensors": (factors() | each("transformer.{}.lora_alpha", number(2)), None),
    "another module": (factors() | OUTSIDE, None),
    "other modules only": (OUTSIDE, None),
    "another component": (factors() | {"text_encoder.foo.lora_A.weight": draw(RANK, WIDTH)}, None),
    "a plain weight": (factors() | {"transformer.proj_out.weight": draw(WIDTH, WIDTH)}, None),
    "one factor missing": ({k: v for k, v in factors().items() if "0.attn1.to_q.lora_B" not in k}, None),
    "DoRA": (factors() | each(MAGNITUDES, magnitude), None),
    "DoRA in the header": (factors() | each(MAGNITUDES, magnitude), header(use_dora=True)),
    "DoRA not in the header": (factors() | each(MAGNITUDES, magnitude), header()),
    "DoRA in one layer": (factors() | each(MAGNITUDES, magnitude, FIRST_LAYER), None),
    "DoRA with weight": (factors() | each(MAGNITUDES + ".weight", magnitude), None),
    "DoRA of kohya": (factors() | each("transformer.{}.dora_scale", magnitude), None),
    "biases": (factors() | each("transformer.{}.lora_B.bias", lambda: draw(WIDTH)), None),
    "old names": (factors(spelled=("{}.lora.down.weight", "{}.lora.up.weight")), None),
    "old processors": (factors(spelled=("{}_lora.down.weight", "{}_lora.up.weight"), name=processor), None),
    "old names without processors": (factors(spelled=("{}_lora.down.weight", "{}_lora.up.weight")), None),
}

FOR_PEFT: dict[str, tuple[Arrays, Config]] = {
    "as trained": (factors(PEFT), settings()),
    "alpha_pattern": (factors(PEFT), settings(alpha_pattern={"to_k": 8, f"^{MODULES[2]}": 1})),
    "an unfit pattern": (factors(PEFT), settings(alpha_pattern={"^transformer_blocks.1": 8, "attn1": 8})),
    "rsLoRA": (factors(PEFT), settings(use_rslora=True)),
    "mixed ranks": (factors(PEFT, ranks=wide("to_q")), settings(rank_pattern={"to_q": 2 * RANK})),
    "another rank": (factors(PEFT), settings(r=8)),
    "no rank and no alpha": (factors(PEFT, ranks=lambda module: 8), settings(r=..., lora_alpha=...)),
    "names in memory": (factors(PEFT, ("{}.lora_A.default.weight", "{}.lora_B.default.weight")), settings()),
    "prefix of diffusers": (factors(), settings()),
    "no prefix": (factors(""), settings()),
    "kohya": (factors("lora_unet_", DOWN_UP, name=underscored), settings()),
    "few target_modules": (factors(PEFT), settings(target_modules=["to_q", "to_k"])),
    "more target_modules": (factors(PEFT, modules=WITHOUT_V), settings(target_modules=list(ATTENTION))),
    "all linear": (factors(PEFT), settings(target_modules="all-linear")),
    "excluded modules": (factors(PEFT), settings(exclude_modules=["to_k"])),
    "no target_modules": (factors(PEFT), settings(target_modules=...)),
    "unknown target_modules": (factors(PEFT), settings(target_modules=["foo"])),
    "no peft_type": (factors(PEFT), settings(peft_type=...)),
    "an unknown field": (factors(PEFT), settings(nonsense=1)),
    "alpha tensors": (factors(PEFT) | each(PEFT + "{}.alpha", number(2)), settings()),
    "another module": (factors(PEFT) | {PEFT + "foo.lora_A.weight": draw(RANK, WIDTH)}, settings()),
    "DoRA": (factors(PEFT) | each(PEFT + "{}.lora_magnitude_vector", magnitude), settings(use_dora=True)),
    "DoRA not in the settings": (factors(PEFT) | each(PEFT + "{}.lora_magnitude_vector", magnitude), settings()),
}


def animals() -> Iterator[tuple[str, Animal]]:
    """Folder name -> tensors, header, adapter_config.json."""
    for name, (arrays, metadata) in FOR_DIFFUSERS.items():
        yield f"diffusers, {name}", (arrays, dict(metadata) if metadata else None, None)
    for name, (arrays, config) in FOR_PEFT.items():
        yield f"peft, {name}", (arrays, None, config)


def write(folder: Path, animal: Animal) -> Path:
    """Write one adapter into a new folder and return the file."""
    arrays, metadata, config = animal
    folder.mkdir(parents=True)
    file = folder / ("pytorch_lora_weights.safetensors" if config is None else "adapter_model.safetensors")
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, file, metadata)
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return file


def write_zoo(root: Path) -> dict[str, Path]:
    """Every animal, in a folder of its name below ``root``."""
    return {name: write(root / name, animal) for name, animal in animals()}
