"""How small the journal of a fusion is, and how fast it is made and read: a table over dtypes and sizes of the delta.

    python benchmarks/journal.py [--rank 128]

Each row is an attention weight ~ N(0, 0.03) and a delta of Gaussian factors of that relative size. ``plain`` is what
the differences in units in the last place take without the prediction by the factors. ``base`` is the share of codes
and factors in a whole base, of which the attention weights that are fused are 26 % (2B) or 28 % (5B).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from loraconv.journal import ulps
from loraconv.lazy import decode, encode

#: Model, dtype, width of an attention weight, share of the attention weights in the whole base.
CASES = (
    ("2B", "F16", 1920, 120 * 1920**2 / 1.69e9),
    ("5B", "BF16", 3072, 168 * 3072**2 / 5.57e9),
    ("5B", "F32", 3072, 168 * 3072**2 / 5.57e9),
)
DELTAS = (0.0001, 0.001, 0.01, 0.02, 0.05, 0.2)


def timed(work: Callable[[tuple[int, int]], bytes], rows: list[tuple[int, int]]) -> tuple[list[bytes], float]:
    """The results, and the processor seconds of all threads."""
    start = time.process_time()
    with ThreadPoolExecutor(2) as pool:
        made = list(pool.map(work, rows))
    return made, time.process_time() - start


def measure(name: str, dtype: str, size: int, share: float, relative: float, rank: int) -> str:
    rng = np.random.default_rng(0)
    base = encode(rng.normal(0, 0.03, size * size), dtype)
    up, down = rng.normal(size=(size, rank)), rng.normal(size=(rank, size)) * (relative * 0.03 / rank**0.5)
    fused = encode(decode(base, dtype) + (up @ down).reshape(-1), dtype)
    rows, width = ulps.chunks((size, size)), len(base) // size
    factors = ulps.whole_factors(up, down, 0.03, dtype)
    packed = b"" if factors is None else ulps.pack_factors(factors)

    def part(raw: bytes, at: tuple[int, int]) -> bytes:
        return raw[at[0] * width : at[1] * width]

    codes, writing = timed(lambda at: ulps.encode(part(base, at), part(fused, at), dtype, factors, at), rows)
    plain, _ = timed(lambda at: ulps.encode(part(base, at), part(fused, at), dtype, None, at), rows)
    of_rows = dict(zip(rows, codes, strict=True))
    back, reading = timed(lambda at: ulps.decode(of_rows[at], part(fused, at), dtype, factors, at), rows)
    assert b"".join(back) == base
    bits = [8 * sum(map(len, parts)) / size**2 for parts in (codes, [packed], plain)]
    whole = share * (bits[0] + bits[1]) * size**2 / (8 * len(base))
    speeds = "  ".join(f"{len(base) / 1e6 / seconds:6.0f}" for seconds in (writing, reading))
    return f"{name} {dtype:4} {relative:7.2%}  {bits[0]:5.2f}  {bits[1]:7.2f}  {bits[2]:5.2f}  {whole:6.2%}  {speeds}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rank", type=int, default=128)
    options = parser.parse_args()
    print("           delta  codes  factors  plain    base  encode  decode")
    print("                  bits an element fused          MB/s of a core")
    for case in CASES:
        for relative in DELTAS:
            print(measure(*case, relative, options.rank), flush=True)


if __name__ == "__main__":
    main()
