"""Writes full-size engine checkpoints: `python benchmarks/make_inputs.py {2b-engine|5b-engine} OUTDIR [--dtype fp16]`.

The layout is that of a real LoRA run (transformer with adapter, text encoder, VAE in one file). The adapter holds
realistic values; every other large tensor is a window into one pool of noise, so that the maker stays small while
the file holds real bytes throughout.
"""

from __future__ import annotations

import argparse
import math
import resource
import sys
import time
from collections import OrderedDict
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests import sat_run

FULL_SIZE = {
    "heads": 30,
    "rank": 128,
    "time_embed_dim": 512,
    "text_hidden": 4096,
    "text_length": 226,
    "latent_width": 90,
    "latent_height": 60,
    "num_frames": 49,
    "vae_channels": 128,
    "vae_multipliers": (1, 2, 2, 4),
    "vae_res_blocks": 3,
    "t5": (32128, 4096, 10240, 24, 64),
}
ENGINES = {
    "2b-engine": {**FULL_SIZE, "variant": "2b", "num_layers": 30, "hidden": 1920},
    "5b-engine": {**FULL_SIZE, "variant": "5b", "num_layers": 42, "hidden": 3072, "heads": 48},
}
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
# A prime number of elements between windows, so that no two tensors repeat the same bytes.
STRIDE = 104729


class Pool:
    """Hands out tensors that share memory but not storages: the writer stores each of them in full."""

    def __init__(self, largest: int, count: int, dtype: torch.dtype, seed: int) -> None:
        noise = torch.Generator().manual_seed(seed)
        self.room = STRIDE * min(count, 997)
        pool = torch.empty(largest + self.room, dtype=dtype)
        pool.normal_(std=0.02, generator=noise)
        self.memory, self.dtype, self.offset = pool.view(torch.int16).numpy(), dtype, 0

    def take(self, shape: tuple[int, ...]) -> torch.Tensor:
        size = math.prod(shape)
        window = self.memory[self.offset : self.offset + size]
        self.offset = (self.offset + STRIDE) % self.room
        return torch.frombuffer(window, dtype=self.dtype).view(shape)


def lora_tensor(name: str, shape: tuple[int, ...], noise: torch.Generator) -> torch.Tensor:
    """A as it is initialised (Kaiming uniform, a = sqrt(5)), B small as after a short training."""
    if ".matrix_A." in name:
        return (torch.rand(shape, generator=noise) * 2 - 1) / math.sqrt(shape[1])
    return torch.randn(shape, generator=noise) * 1e-3


def small_tensor(name: str, shape: tuple[int, ...], noise: torch.Generator) -> torch.Tensor:
    """Biases and norms as training leaves them: near zero and near one, but neither."""
    mean = 1.0 if "norm" in name and name.endswith("weight") else 0.0
    return mean + torch.randn(shape, generator=noise) * 0.02


def make_module(spec: sat_run.RunSpec) -> sat_run.State:
    shapes = sat_run.shapes(spec)
    noise = torch.Generator().manual_seed(spec.seed)
    pool = Pool(max(math.prod(shape) for shape in shapes.values()), len(shapes), spec.dtype, spec.seed)
    module: sat_run.State = OrderedDict()
    for name, shape in shapes.items():
        if ".matrix_" in name:
            module[name] = lora_tensor(name, shape, noise).to(spec.dtype)
        elif name.endswith("pos_embed.pos_embedding"):
            module[name] = sat_run.position_table(spec).to(spec.dtype)
        elif len(shape) == 1:
            module[name] = small_tensor(name, shape, noise).to(spec.dtype)
        else:
            module[name] = pool.take(shape)
    module[sat_run.TIED] = module[sat_run.SHARED]
    return module


def make(engine: str, folder: Path, dtype: torch.dtype) -> Path:
    """Write the run folder and return the checkpoint in it."""
    spec = sat_run.RunSpec(**ENGINES[engine], dtype=dtype)
    run = folder / spec.experiment
    sat_run.write_settings(spec, run)
    file = run / str(spec.iteration) / "mp_rank_00_model_states.pt"
    sat_run.save(spec, sat_run.payload(spec, make_module(spec)), file)
    return file


def describe(file: Path, seconds: float) -> str:
    size, blocks = file.stat().st_size, file.stat().st_blocks * 512
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    parts = (f"{size / 1e9:.2f} GB", f"{blocks / 1e9:.2f} GB on disk", f"{seconds:.0f} s", f"peak {peak / 1e9:.2f} GB")
    return f"{file}: {', '.join(parts)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=sorted(ENGINES))
    parser.add_argument("outdir", type=Path)
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="fp16")
    args = parser.parse_args()
    start = time.perf_counter()
    file = make(args.engine, args.outdir, DTYPES[args.dtype])
    print(describe(file, time.perf_counter() - start))


if __name__ == "__main__":
    main()
