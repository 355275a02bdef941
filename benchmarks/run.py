"""Measure loraconv against its peers on a full-size checkpoint that this script makes, and print ratios.

    python benchmarks/run.py WORKDIR [--runs 5] [--cold]

Peers are run in turn with loraconv, so that both meet the same noise: CogVideo's own exporter (the same work in
``peer_exporter.py``) for the LoRA, ``cp`` and ``sync`` of the same bytes for the base. ``--cold`` drops the page cache
before each run (needs root). Needs about 25 GB of disk.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
LORACONV = [str(Path(sys.executable).with_name("loraconv"))]


@dataclass(frozen=True)
class Sample:
    """Wall-clock seconds and peak resident bytes of one process."""

    seconds: float
    peak: int


def measure(argv: list[str], before: Callable[[], None]) -> Sample:
    """Run one command; raises if it fails."""
    before()
    start = time.perf_counter()
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        raise SystemExit(f"{' '.join(argv)} failed:\n{errors.decode(errors='replace')}")
    return Sample(seconds, usage.ru_maxrss * 1024)


def median(samples: list[Sample]) -> Sample:
    return Sample(statistics.median(s.seconds for s in samples), max(s.peak for s in samples))


class Bench:
    """One work folder, and the rows of the result."""

    def __init__(self, work: Path, runs: int, cold: bool) -> None:
        self.work, self.runs, self.cold = work, runs, cold
        self.rows: list[tuple[str, str, str, str]] = []

    def clean(self, *targets: Path) -> Callable[[], None]:
        def before() -> None:
            for target in targets:
                shutil.rmtree(target, ignore_errors=True)
                target.unlink(missing_ok=True)
            os.sync()
            if self.cold:
                Path("/proc/sys/vm/drop_caches").write_text("3", encoding="ascii")

        return before

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
        widths = [max(len(row[n]) for row in self.rows) for n in range(4)]
        for row in self.rows:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


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
