"""Adapters that are no plain LoRA, made by LyCORIS' own modules: their state dicts as files, their deltas as oracle."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

os.environ["LYCORIS_KERNEL_BACKEND"] = "torch"  # or it compiles

from lycoris.functional.general import weight_decompose as weight_decompose
from lycoris.modules.full import FullModule
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from lycoris.modules.norms import NormModule as NormModule
from lycoris.wrapper import create_lycoris
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]
OUT, IN = 24, 16
#: Wan's modules in its own names, which kohya and ComfyUI use, and in those of diffusers.
MODULES = {
    f"blocks.{layer}.{there}": f"blocks.{layer}.{here}"
    for layer in (0, 7)
    for there, here in (("self_attn.q", "attn1.to_q"), ("cross_attn.o", "attn2.to_out.0"), ("ffn.0", "ffn.net.0.proj"))
}

KINDS: dict[str, Callable[[str, torch.nn.Module], Any]] = {
    "loha": lambda n, m: LohaModule(n, m, lora_dim=3, alpha=2),
    "loha-rs": lambda n, m: LohaModule(n, m, lora_dim=3, alpha=2, rs_lora=True),
    "lokr-half": lambda n, m: LokrModule(n, m, lora_dim=1, alpha=0.5, factor=4),
    "lokr-both": lambda n, m: LokrModule(n, m, lora_dim=1, alpha=0.5, factor=4, decompose_both=True),
    "lokr-full": lambda n, m: LokrModule(n, m, lora_dim=999, alpha=1, factor=4),
    "full": lambda n, m: FullModule(n, m),
    "dora": lambda n, m: LoConModule(n, m, lora_dim=4, alpha=2, weight_decompose=True, wd_on_out=True),
    "dora-in": lambda n, m: LoConModule(n, m, lora_dim=4, alpha=2, weight_decompose=True, wd_on_out=False),
    "dora-loha": lambda n, m: LohaModule(n, m, lora_dim=3, alpha=2, weight_decompose=True, wd_on_out=True),
    "lora": lambda n, m: LoConModule(n, m, lora_dim=4, alpha=2),
    "tucker": lambda n, m: LoConModule(n, m, lora_dim=4, alpha=2, use_tucker=True),
    "locon": lambda n, m: LoConModule(n, m, lora_dim=4, alpha=2),
    "loha-tucker": lambda n, m: LohaModule(n, m, lora_dim=3, alpha=2, use_tucker=True),
    "loha-conv": lambda n, m: LohaModule(n, m, lora_dim=3, alpha=2),
    "lokr-tucker": lambda n, m: LokrModule(n, m, lora_dim=1, alpha=0.5, factor=4, use_tucker=True),
}
CONV = {"tucker", "locon", "loha-tucker", "loha-conv", "lokr-tucker"}


def made(kind: str, name: str = "", seed: int = 0) -> Any:
    """A LyCORIS module of this kind with random numbers, on a layer with random weights."""
    torch.manual_seed(seed)
    base = torch.nn.Conv2d(IN, OUT, 3) if kind in CONV else torch.nn.Linear(IN, OUT)
    module = KINDS[kind](name, base)
    if kind == "full":
        module.apply_to()  # what it saves is told from the layer's weight
    with torch.no_grad():
        for parameter in (p for n, p in module.named_parameters() if n != "dora_scale"):
            parameter.copy_(torch.randn_like(parameter))
    return module


def saved(kind: str, folder: Path, *, flat: bool = True) -> dict[str, torch.Tensor]:
    """Write a file of such modules, in kohya's names or ComfyUI's; return the deltas by diffusers module."""
    tensors: Tensors = {}
    deltas: Tensors = {}
    modules = {"patch_embedding": "patch_embedding"} if kind in CONV else MODULES
    for number, (there, here) in enumerate(modules.items()):
        name = f"lora_unet_{there.replace('.', '_')}" if flat else f"diffusion_model.{there}"
        module = made(kind, name, number)
        tensors |= {f"{name}.{side}": t.detach().clone().contiguous() for side, t in module.custom_state_dict().items()}
        deltas[here] = delta_of(module)
        if tensors.get(f"{name}.diff_b") is not None:
            deltas[f"{here}.bias"] = tensors[f"{name}.diff_b"].double()
    folder.mkdir(parents=True)
    save_file(tensors, folder / "lycoris.safetensors")
    return deltas


def delta_of(module: Any) -> torch.Tensor:
    """What LyCORIS adds to the weight at strength 1, before any magnitude, in float64."""
    if isinstance(module, FullModule):
        return module.custom_state_dict()["diff"].detach().double()
    module = module.double()
    shape = module.shape
    if isinstance(module, LohaModule | LokrModule):
        # This is what forward adds; get_diff_weight of LyCORIS 4.1.3 multiplies it by the scale once more.
        return module.get_weight(shape).detach()
    return module.get_diff_weight(1, shape)[0].detach().reshape(shape)


def wrapped(model: torch.nn.Module) -> Any:
    """LyCORIS' own wrapper on a model: LoKr and norms, applied, all numbers random."""
    network = create_lycoris(model, 1.0, linear_dim=2, linear_alpha=1, algo="lokr", factor=2, train_norm=True)
    network.apply_to()
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return network
