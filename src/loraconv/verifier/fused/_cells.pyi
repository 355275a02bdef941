from typing import Any

import numpy as np

Buffer = bytes | np.ndarray[Any, Any]

def widen(half: Buffer, wide: Buffer, /) -> bool: ...
def compare(
    base: Buffer,
    stored: Buffer,
    product: Buffer,
    lengths: Buffer,
    widths: Buffer,
    least: float,
    near: float,
    reach: int,
    open: Buffer,
    /,
) -> tuple[int, float, float, float, float]: ...
def confirm(
    base: Buffer,
    stored: Buffer,
    up: Buffer,
    columns: Buffer,
    lengths: Buffer,
    widths: Buffer,
    unit: float,
    least: float,
    near: float,
    reach: int,
    open: Buffer,
    /,
) -> int: ...
