"""CRC-32 by zlib-ng, and that of a whole out of those of its parts.

zlib-ng computes the same checksum with the processor's carry-less multiplication, ten times as fast as most builds of
zlib. The arithmetic of the parts is that of polynomials over GF(2) modulo the CRC-32 polynomial (as zlib's
``crc32_combine``).
"""

from __future__ import annotations

from functools import lru_cache

from zlib_ng.zlib_ng import crc32

__all__ = ["combine", "crc32"]

_POLYNOMIAL = 0xEDB88320  # bit-reversed, as CRC-32 is computed
_ONE = 1 << 31


def combine(first: int, second: int, length: int) -> int:
    """The CRC-32 of two runs of bytes one after the other; ``length`` is that of the second, in bytes."""
    return _times(_shift(length), first) ^ second


def _times(a: int, b: int) -> int:
    """The product of two polynomials modulo the CRC's."""
    product = 0
    bit = _ONE
    while bit:
        if a & bit:
            product ^= b
        b = (b >> 1) ^ _POLYNOMIAL if b & 1 else b >> 1
        bit >>= 1
    return product


@lru_cache(maxsize=256)
def _shift(length: int) -> int:
    """``x`` to the power of ``8 * length``: what the bytes behind do to a checksum."""
    power, square = _ONE, 1 << 23  # 1, and x to the eighth
    while length:
        if length & 1:
            power = _times(square, power)
        square = _times(square, square)
        length >>= 1
    return power
