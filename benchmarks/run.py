"""Measure loraconv against its peers on a full-size checkpoint that this script makes, and print ratios.

    python benchmarks/run.py WORKDIR [--runs 5] [--cold]

Peers are run in turn with loraconv, so that both meet the same noise: CogVideo's own exporter (the same work in
``peer_exporter.py``) for the LoRA, ``cp`` and ``sync`` of the same bytes for the base. ``--cold`` drops the page cache
before each run (needs root). Needs about 25 GB of disk.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from measure import LORACONV, clean, measure, median, table

HERE = Path(__file__).parent


class Bench:
    """One work folder, and the rows of the result."""

    def __init__(self, work: Path, runs: int, cold: bool) -> None:
        self.work, self.runs, self.cold = work, runs, cold
        self.rows: list[tuple[str, str, str, str]] = []

    def clean(self, *targets: Path) -> Callable[[], None]:
        return clean(targets, self.cold)

    def alone(self, name: str, argv: list[str], limit: float) -> None:
        """A command with a limit in seconds."""
        best = median([measure(argv, self.clean()) for _ in range(self.runs)])
        self.rows.append((name, f"{best.seconds:.3f} s", f"limit {limit} s", f"{best.peak / 1e6:.0f} MB"))

    def against(self, name: str, ours: list[str], out: Path, peer: list[str], peer_out: Path, limit: float) -> None:
        """Two commands in turn; the row holds the ratio of their medians, and the range of the paired ratios."""
        pairs = []
        for _ in range(self.runs):
            mine = measure(ours, self.clean(out))
            pairs.append((mine, measure(peer, self.clean(peer_out))))
        mine, theirs = median([a for a, _ in pairs]), median([b for _, b in pairs])
        ratios = [a.seconds / b.seconds for a, b in pairs]
        ratio = f"{mine.seconds / theirs.seconds:.2f} ({min(ratios):.2f} to {max(ratios):.2f}), limit {limit}"
        self.rows.append((name, f"{mine.seconds:.2f} s", ratio, f"{mine.peak / 1e6:.0f} MB"))
        self.rows.append(("  peer", f"{theirs.seconds:.2f} s", "1", f"{theirs.peak / 1e6:.0f} MB"))

    def report(self) -> None:
        state = "cold" if self.cold else "warm"
        print(f"median of {self.runs} runs, page cache {state}; ratio = loraconv / peer; memory = greatest peak")
        print(table(self.rows))


def checkpoint(work: Path) -> Path:
    """The full-size 2B engine checkpoint's run folder, made once."""
    place = work / "2b"
    if not place.exists():
        subprocess.run([sys.executable, str(HERE / "make_inputs.py"), "2b-engine", str(place)], check=True)
    return next(p for p in place.iterdir() if p.is_dir())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--cold", action="store_true")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    run = checkpoint(options.work)
    (file,) = run.glob("*/mp_rank_00_model_states.pt")
    print(f"checkpoint: {file.stat().st_size / 1e9:.1f} GB")
    bench = Bench(options.work, options.runs, options.cold)
    bench.alone("loraconv --help", [*LORACONV, "--help"], 0.15)
    bench.alone("loraconv inspect", [*LORACONV, "inspect", str(run)], 0.3)
    lora, peer = options.work / "lora", options.work / "peer"
    exporter = [sys.executable, str(HERE / "peer_exporter.py"), str(file), str(peer)]
    ours = [*LORACONV, "sat2diffusers", str(run), "-o", str(lora)]
    bench.against("sat2diffusers, LoRA", ours, lora, exporter, peer, 0.5)
    base, kept, copy = (options.work / n for n in ("base", "kept", "copy"))
    ours = [*LORACONV, "sat2diffusers", str(run), "--what", "base", "-o", str(base)]
    measure(ours, bench.clean(base, kept))
    base.rename(kept)
    bench.against("sat2diffusers, base", ours, base, ["sh", "-c", f"cp -r '{kept}' '{copy}' && sync"], copy, 1.5)
    bench.clean(base, kept, copy, lora, peer)()
    bench.report()


if __name__ == "__main__":
    main()
