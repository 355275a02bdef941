"""What diffusers and peft do to fuse an adapter: `python benchmarks/peer_fuse.py {diffusers|peft} BASE ADAPTER OUT`."""

from __future__ import annotations

import argparse

import torch
from diffusers import CogVideoXTransformer3DModel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("peer", choices=["diffusers", "peft"])
    parser.add_argument("base")
    parser.add_argument("adapter")
    parser.add_argument("out")
    parser.add_argument("--dtype", choices=["float16", "bfloat16"], default="float16")
    args = parser.parse_args()
    model = CogVideoXTransformer3DModel.from_pretrained(args.base, torch_dtype=getattr(torch, args.dtype))
    if args.peer == "diffusers":
        model.load_lora_adapter(args.adapter, prefix="transformer", use_safetensors=True)
        model.fuse_lora()
        model.unload_lora()
    else:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, args.adapter).merge_and_unload()
    model.save_pretrained(args.out)


if __name__ == "__main__":
    main()
