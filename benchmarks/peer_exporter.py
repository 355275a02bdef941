"""The work of CogVideo's own LoRA exporter, for comparison: `python benchmarks/peer_exporter.py CKPT OUTDIR`.

It maps the checkpoint into memory, renames the adapter's tensors and hands them to diffusers for writing. Like the
original it keeps neither rank nor alpha. Where the original accepts 240 tensors only (the 2B model), this one takes
any number.

One difference is forced: the original leaves `weights_only` at its default, and since torch 2.6 that default refuses
these files because of the NumPy random state in them. Trusted input is therefore assumed here.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.loaders.lora_base import LoraBaseMixin

ADAPTER_NAME = re.compile(
    r"^model\.diffusion_model\.transformer\.layers\.(?P<block>\d+)\.attention\."
    r"(?P<linear>query_key_value|dense)\.matrix_(?P<side>[AB])\.(?P<part>\d)$"
)
TARGETS = {"query_key_value": ("to_q", "to_k", "to_v"), "dense": ("to_out.0",)}


def unwrap(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """Step into the containers that a checkpoint may be wrapped in, outermost first."""
    for container in ("model", "module", "state_dict"):
        content = content.get(container, content)
    return content


def diffusers_name(match: re.Match[str]) -> str:
    target = TARGETS[match["linear"]][int(match["part"])]
    return f"transformer.transformer_blocks.{match['block']}.attn1.{target}.lora_{match['side']}.weight"


def export(checkpoint: str, folder: str) -> int:
    """Write the adapter and return how many tensors it has."""
    module = unwrap(torch.load(checkpoint, map_location="cpu", mmap=True, weights_only=False))
    matches = {name: ADAPTER_NAME.match(name) for name in module}
    adapter = {diffusers_name(match): module[name] for name, match in matches.items() if match}
    LoraBaseMixin.write_lora_layers(
        state_dict=adapter,
        save_directory=folder,
        is_main_process=True,
        weight_name=None,
        save_function=None,
        safe_serialization=True,
    )
    return len(adapter)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("outdir")
    args = parser.parse_args()
    print(f"{export(args.checkpoint, args.outdir)} tensors")


if __name__ == "__main__":
    main()
