from typing import Any

import numpy as np

Buffer = bytes | np.ndarray[Any, Any]

def round_sums(
    base: Buffer, stored: str, product: Buffer, error: Buffer, dtype: str, made: Buffer, doubtful: Buffer, /
) -> int: ...
def settle(
    base: Buffer,
    stored: str,
    up: Buffer,
    down: Buffer,
    lengths: Buffer,
    widths: Buffer,
    error: float,
    dtype: str,
    made: Buffer,
    doubtful: Buffer,
    /,
) -> int: ...
