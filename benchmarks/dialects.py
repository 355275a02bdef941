"""Measure `loraconv convert` of a full-size adapter between every two LoRA dialects against `cp` of it, and `sync`.

    python benchmarks/dialects.py WORKDIR [--runs 3] [--layers 42] [--dialects diffusers peft kohya ...]

The adapter has the modules of CogVideoX-5B: 42 layers, four modules each, rank 128, 528 MB in fp32, made of noise; its
copy in each dialect is made by loraconv first. The limit is twice the time of `cp` and `sync` plus the start of the
interpreter (`loraconv --help`), and 400 MB of memory.
"""

from __future__ import annotations

import argparse
import subprocess
from pathlib import Path

from measure import LORACONV, in_turn, median, table
from resize import adapter

DIALECTS = ("diffusers", "peft", "kohya", "comfyui", "videox-fun", "onetrainer", "diffsynth")


def spelled(work: Path, made: Path, dialects: list[str]) -> dict[str, Path]:
    """The same adapter in every dialect."""
    found = {}
    for dialect in dialects:
        found[dialect] = work / f"in-{dialect}"
        if not found[dialect].exists():
            ours = [*LORACONV, "convert", str(made), "--to", dialect, "-o", str(found[dialect]), "-q"]
            subprocess.run([*ours, "--family", "cogvideox"], check=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--layers", type=int, default=42)
    parser.add_argument("--dialects", nargs="+", default=DIALECTS)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    size = options.layers, 3072, 128
    inputs = spelled(options.work, adapter(options.work / f"1-{size}.safetensors", *size, 1), list(options.dialects))
    out, first = options.work / "out", next(iter(inputs.values()))
    commands = {
        "cp": ["sh", "-c", f"cp -r '{first}' '{out}' && sync"],
        "start": [*LORACONV, "--help"],
        **{
            f"{there} to {here}": [*LORACONV, "convert", str(inputs[there]), "--to", here, "-o", str(out), "-q"]
            for there in inputs
            for here in inputs
            if there != here
        },
    }
    samples = {name: median(runs) for name, runs in in_turn(commands, out, options.runs, cold=False).items()}
    limit = 2 * samples["cp"].seconds + samples["start"].seconds
    rows = [("conversion", "time", "of the limit", "peak")]
    rows += [
        (name, f"{best.seconds:.2f} s", f"{best.seconds / limit:.2f}", f"{best.peak / 1e6:.0f} MB")
        for name, best in samples.items()
    ]
    print(f"median of {options.runs} runs; limit {limit:.2f} s, twice cp and sync plus a start")
    print(table(rows))


if __name__ == "__main__":
    main()
