"""Makes a base and an adapter of full size: `python benchmarks/make_fuse_inputs.py 2b|5b DIR [--rank R] [--shards N]`.

The base is a diffusers transformer folder in the layout of the real model, `DIR/base-N`: its tensors are windows into
one pool of noise. The adapter, `DIR/rank-R`, holds realistic values. What is there already is kept.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import CogVideoXTransformer3DModel
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.torch import save_file

WEIGHTS = "diffusion_pytorch_model{suffix}.safetensors"
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
# A prime number of elements between windows of the noise, so that no two tensors repeat the same bytes.
STRIDE = 104729


@dataclass(frozen=True)
class Size:
    """A released model: layers, heads of width 64, dtype."""

    layers: int
    heads: int
    dtype: str

    @property
    def width(self) -> int:
        return self.heads * 64


SIZES = {"2b": Size(30, 30, "float16"), "5b": Size(42, 48, "bfloat16")}


def make_base(size: Size, shards: int, folder: Path) -> None:
    """A transformer folder of noise in the layout of the real model."""
    if folder.exists():
        return
    config = {"num_layers": size.layers, "num_attention_heads": size.heads, "use_rotary_positional_embeddings": True}
    with torch.device("meta"):
        model = CogVideoXTransformer3DModel(**config)
    model.save_config(folder)
    dtype = getattr(torch, size.dtype)
    state = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    total = sum(tensor.nbytes for tensor in state.values())
    split = split_state_dict_into_shards_factory(
        state,
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern=WEIGHTS,
        max_shard_size=total if shards == 1 else math.ceil(total / shards * 1.02),
    )
    noise = torch.empty(max(tensor.numel() for tensor in state.values()) + 997 * STRIDE, dtype=dtype)
    noise.normal_(std=0.02, generator=torch.Generator().manual_seed(0))
    taken = 0
    for file, names in split.filename_to_tensors.items():
        made = {}
        for name in names:
            start = taken * STRIDE % (997 * STRIDE)
            made[name] = noise[start : start + state[name].numel()].view(state[name].shape).clone()
            taken += 1
        save_file(made, folder / file, {"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / f"{WEIGHTS.format(suffix='')}.index.json").write_text(json.dumps(index))


def make_adapter(size: Size, rank: int, folder: Path) -> None:
    """A diffusers adapter as after a short training: A as it is initialised, B small, alpha half the rank."""
    if folder.exists():
        return
    folder.mkdir(parents=True)
    noise, dtype, width = torch.Generator().manual_seed(rank), getattr(torch, size.dtype), size.width
    made = {}
    for layer in range(size.layers):
        for target in TARGETS:
            module = f"transformer.transformer_blocks.{layer}.attn1.{target}"
            down = (torch.rand(rank, width, generator=noise) * 2 - 1) / math.sqrt(width)
            up = torch.randn(width, rank, generator=noise) * 1e-3
            made |= {f"{module}.lora_A.weight": down.to(dtype), f"{module}.lora_B.weight": up.to(dtype)}
    config = {"transformer.r": rank, "transformer.lora_alpha": rank / 2, "transformer.target_modules": list(TARGETS)}
    save_file(made, folder / "pytorch_lora_weights.safetensors", {"lora_adapter_metadata": json.dumps(config)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=sorted(SIZES))
    parser.add_argument("dir", type=Path)
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--layers", type=int, help="make a smaller base")
    args = parser.parse_args()
    size = SIZES[args.size]
    size = replace(size, layers=args.layers or size.layers)
    make_base(size, args.shards, args.dir / f"base-{args.shards}")
    make_adapter(size, args.rank, args.dir / f"rank-{args.rank}")


if __name__ == "__main__":
    main()
