"""Measure `loraconv resize` and `merge` on full-size adapters of noise, against numpy's SVD of one full delta.

    python benchmarks/resize.py WORKDIR [--runs 3] [--layers 42] [--width 3072] [--rank 128]

The adapters have the modules of CogVideoX-5B: 42 layers, four modules each, rank 128, 528 MB in fp32. There is no peer
that works at factor size; one full delta (3072 x 3072) by `numpy.linalg.svd` is what a tool needs that does not, 168
times over.
"""

from __future__ import annotations

import argparse
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from measure import LORACONV, in_turn, median
from safetensors.numpy import save_file

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


def make(file: Path, layers: int, width: int, rank: int, seed: int) -> None:
    noise, tensors = np.random.default_rng(seed), {}
    for layer in range(layers):
        for target in TARGETS:
            name = f"transformer.transformer_blocks.{layer}.attn1.{target}.lora"
            tensors[f"{name}_A.weight"] = noise.standard_normal((rank, width), dtype=np.float32)
            tensors[f"{name}_B.weight"] = noise.standard_normal((width, rank), dtype=np.float32)
    save_file(tensors, file)


def adapter(file: Path, *given: int) -> Path:
    """The adapter's file, made once, in a process of its own: what this one holds would count for those it starts."""
    if not file.exists():
        process = get_context("spawn").Process(target=make, args=(file, *given))
        process.start()
        process.join()
    return file


def full_svd(width: int, rank: int) -> float:
    noise = np.random.default_rng(0)
    delta = noise.standard_normal((width, rank)) @ noise.standard_normal((rank, width))
    start = time.perf_counter()
    np.linalg.svd(delta)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--layers", type=int, default=42)
    parser.add_argument("--width", type=int, default=3072)
    parser.add_argument("--rank", type=int, default=128)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    size = options.layers, options.width, options.rank
    a, b = (str(adapter(options.work / f"{seed}-{size}.safetensors", *size, seed)) for seed in (1, 2))
    out = options.work / "out"
    small = str(options.rank // 4)
    commands = {
        "resize --rank": [*LORACONV, "resize", a, "-o", str(out), "--rank", small, "-q"],
        "resize --energy 0.9": [*LORACONV, "resize", a, "-o", str(out), "--energy", "0.9", "-q"],
        "merge of two": [*LORACONV, "merge", f"{a}@0.8", f"{b}@0.5", "-o", str(out), "-q"],
        "merge of two --rank": [*LORACONV, "merge", f"{a}@0.8", f"{b}@0.5", "-o", str(out), "--rank", small, "-q"],
    }
    for name, samples in in_turn(commands, out, options.runs, cold=False).items():
        best = median(samples)
        print(f"{name:<22} {best.seconds:6.2f} s  {best.busy:6.1f} s of CPU  {best.peak / 1e6:5.0f} MB")
    print(f"{'numpy, one full delta':<22} {full_svd(options.width, options.rank):6.2f} s")


if __name__ == "__main__":
    main()
