"""Measure `loraconv fuse` against its peers on full-size bases that this script makes, and print ratios.

    python benchmarks/fuse.py WORKDIR [--sizes 2b 5b] [--runs 5] [--cold] [--curve] [--layers N]

Peers are run in turn with loraconv, so that all meet the same noise: `cp` and `sync` of the base, diffusers' loading,
`fuse_lora` and `save_pretrained`, peft's `merge_and_unload` and saving (`peer_fuse.py`). Ratios are to `cp`. `--curve`
measures ranks 4 to 256 and 1 to 4 shards of the 2B base instead. `--layers` makes smaller bases, to try the script. A
full run needs about 40 GB of disk.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from measure import LORACONV, Sample, in_turn, median, table

HERE = Path(__file__).parent
#: Size -> dtype, and the number of files that the model is released in.
SIZES = {"2b": ("float16", 1), "5b": ("bfloat16", 2)}


def commands(dtype: str, base: Path, adapter: Path, out: Path, peers: bool) -> dict[str, list[str]]:
    copy = ["sh", "-c", f"cp -r '{base}' '{out}' && sync"]
    ours = [*LORACONV, "fuse", str(adapter), "--base", str(base), "-o", str(out)]
    found = {"cp and sync": copy, "fuse --no-prove": [*ours, "--no-prove"], "fuse": ours}
    if not peers:
        return {name: argv for name, argv in found.items() if name != "fuse"}
    spelled = adapter.with_name(f"{adapter.name}-peft")
    if not spelled.exists():
        subprocess.run([*LORACONV, "convert", str(adapter), "--to", "peft", "-o", str(spelled), "-q"], check=True)
    for peer, folder in (("diffusers", adapter), ("peft", spelled)):
        script = [sys.executable, str(HERE / "peer_fuse.py"), peer, str(base), str(folder), str(out)]
        found[peer] = [*script, "--dtype", dtype]
    return found


def rows(name: str, samples: Mapping[str, list[Sample]]) -> list[tuple[str, ...]]:
    copies = samples["cp and sync"]
    found = []
    for command, runs in samples.items():
        best, ratios = median(runs), [run.seconds / copy.seconds for run, copy in zip(runs, copies, strict=True)]
        ratio = f"{best.seconds / median(copies).seconds:.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        cells = (f"{best.seconds:.2f} s", ratio, f"{best.busy:.1f} s", f"{best.peak / 1e6:.0f} MB")
        found.append((name, command, *cells))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--sizes", nargs="+", choices=sorted(SIZES), default=sorted(SIZES))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--curve", action="store_true")
    parser.add_argument("--layers", type=int)
    options = parser.parse_args()
    cases = [(name, SIZES[name][1], 128, True) for name in options.sizes]
    if options.curve:
        cases = [("2b", 1, rank, False) for rank in (4, 16, 64, 128, 256)]
        cases += [("2b", shards, 128, False) for shards in (2, 3, 4)]
    found: list[tuple[str, ...]] = [("base", "command", "time", "to cp", "processor", "peak")]
    for name, shards, rank, peers in cases:
        place = options.work / f"{name}-{options.layers or 'full'}"
        make = [sys.executable, str(HERE / "make_fuse_inputs.py"), name, str(place), "--rank", str(rank)]
        make += ["--shards", str(shards), *(["--layers", str(options.layers)] if options.layers else [])]
        subprocess.run(make, check=True)  # in a process of its own: a child's peak counts its parent's memory
        base, adapter, out = place / f"base-{shards}", place / f"rank-{rank}", place / "out"
        samples = in_turn(commands(SIZES[name][0], base, adapter, out, peers), out, options.runs, options.cold)
        found += rows(f"{name}, rank {rank}, {shards} files", samples)
    print(f"median of {options.runs} runs, page cache {'cold' if options.cold else 'warm'}; peak = greatest")
    print(table(found))


if __name__ == "__main__":
    main()
