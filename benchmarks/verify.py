"""Measure ``loraconv verify`` on full-size inputs that this script makes.

    python benchmarks/verify.py WORKDIR [--sizes 2b 5b] [--layers N] [--runs 3] [--cold]

First two adapters of the 5B model (rank 128) that are equal, equal up to a power of two, factored otherwise or
different; then base, adapter and fused model (made by ``loraconv fuse``) against the time that ``cat`` takes to read
the same files, run in turn. ``--cold`` drops the page cache before each run (needs root). The 5B needs about 25 GB of
disk.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from measure import LORACONV, clean, measure, median, table

RANK = 128
#: The files that a released model is in.
SHARDS = {"2b": 1, "5b": 2}
Row = tuple[str, str, str, str]


def apart(make: Callable[..., Any], *given: Any) -> Any:
    """The result of a function that ran in a process of its own: a child's peak memory counts that of the process that
    it was forked from, so this one stays small."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(make, *given).result()


def make_pairs(work: Path, layers: int | None) -> dict[str, tuple[Path, Path, int]]:
    """What is compared -> two adapters in float32, and the exit code that is right."""
    import torch
    from make_fuse_inputs import SIZES, make_adapter
    from safetensors.torch import load_file

    size = replace(SIZES["5b"], layers=layers or SIZES["5b"].layers, dtype="float32")
    folder = work / f"float32-{size.layers}"
    make_adapter(size, RANK, folder)
    one = folder / "pytorch_lora_weights.safetensors"
    tensors = load_file(one)
    turn = torch.linalg.qr(torch.randn((RANK, RANK), generator=torch.Generator().manual_seed(2)).double())[0]
    halved = {n: t / 2 if ".lora_B." in n else t for n, t in tensors.items()}
    turned = {n: (turn @ t.double() if ".lora_A." in n else t.double() @ turn.T).float() for n, t in tensors.items()}
    stronger = {n: t * 1.01 if ".lora_B." in n else t for n, t in tensors.items()}
    return {
        "equal": (one, write(work / "equal.safetensors", tensors, RANK / 2), 0),
        "equal up to a power of two": (one, write(work / "halved.safetensors", halved, RANK), 0),
        "factored otherwise": (one, write(work / "turned.safetensors", turned, RANK / 2), 0),
        "1 % stronger": (one, write(work / "stronger.safetensors", stronger, RANK / 2), 5),
    }


def write(path: Path, tensors: dict[str, Any], alpha: float) -> Path:
    from safetensors.torch import save_file

    config = {"transformer.r": RANK, "transformer.lora_alpha": alpha}
    save_file(tensors, path, {"format": "pt", "lora_adapter_metadata": json.dumps(config)})
    return path


def make_models(work: Path, name: str, layers: int | None) -> tuple[Path, Path, Path]:
    """A base, an adapter and the base with the adapter fused into it."""
    from make_fuse_inputs import SIZES, make_adapter, make_base

    size = replace(SIZES[name], layers=layers or SIZES[name].layers)
    place = work / f"{name}-{size.layers}"
    base, adapter, out = place / f"base-{SHARDS[name]}", place / f"rank-{RANK}", place / "fused"
    make_base(size, SHARDS[name], base)
    make_adapter(size, RANK, adapter)
    if not out.exists():
        ours = [*LORACONV, "fuse", str(adapter), "--base", str(base), "-o", str(out), "--no-prove", "-q"]
        subprocess.run(ours, check=True)
    return base, adapter, out


def adapters(work: Path, layers: int | None, runs: int, cold: bool) -> list[Row]:
    found = []
    for what, (one, other, code) in apart(make_pairs, work, layers).items():
        command = f"{shlex.join([*LORACONV, 'verify', str(one), str(other), '-q'])}; test $? = {code}"
        best = median([measure(["sh", "-c", command], clean([], cold)) for _ in range(runs)])
        found.append((f"A B, {what}", f"{best.seconds:.2f} s", "limit 5 s", f"{best.peak / 1e6:.0f} MB"))
    return found


def fused(work: Path, name: str, layers: int | None, runs: int, cold: bool) -> list[Row]:
    """The proof and plain reading of the same files, in turn."""
    base, adapter, out = apart(make_models, work, name, layers)
    files = [file for folder in (base, out) for file in sorted(folder.glob("*.safetensors"))]
    proof = [*LORACONV, "verify", "--base", str(base), str(adapter), str(out)]
    pairs = [
        (measure(proof, clean([], cold)), measure(["cat", *map(str, files)], clean([], cold))) for _ in range(runs)
    ]
    mine, reading = median([a for a, _ in pairs]), median([b for _, b in pairs])
    ratios = [a.seconds / b.seconds for a, b in pairs]
    ratio = f"{mine.seconds / reading.seconds:.2f} ({min(ratios):.2f} to {max(ratios):.2f}), limit 2.5"
    gigabytes = sum(file.stat().st_size for file in files) / 1e9
    return [
        (f"--base, {name}, {gigabytes:.1f} GB", f"{mine.seconds:.2f} s", ratio, f"{mine.peak / 1e6:.0f} MB, limit 800"),
        ("  reading", f"{reading.seconds:.2f} s", "1", ""),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--sizes", nargs="*", choices=sorted(SHARDS), default=sorted(SHARDS))
    parser.add_argument("--layers", type=int)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--cold", action="store_true")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    rows = adapters(options.work, options.layers, options.runs, options.cold)
    for name in options.sizes:
        rows += fused(options.work, name, options.layers, options.runs, options.cold)
    state = "cold" if options.cold else "warm"
    print(f"median of {options.runs} runs, page cache {state}; ratio = verify / reading; memory = greatest peak")
    print(table(rows))


if __name__ == "__main__":
    main()
