"""What is counted of stored numbers beside the exact ones: how many are the nearest, how far away the others are.

All arithmetic here is float64's; dtypes are those of the safetensors format.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from loraconv.lazy import decode, encode
from loraconv.names import DTYPE_BYTES

if TYPE_CHECKING:
    from loraconv.verifier.numbers import Array

#: dtype -> (stored bits of the mantissa, exponent of the smallest and of the greatest normal number).
LAYOUT = {"F16": (10, -14, 15), "BF16": (7, -126, 127), "F32": (23, -126, 127), "F64": (52, -1022, 1023)}

#: Of a correct fuse: the share of elements that may be off the nearest number, each by one unit at most.
MISROUNDED = 1e-3
#: The same of those elements that the adapter moves. Rounding alone makes a few percent, where the adapter is so weak
#: that it moves few; doubling or halving it makes half.
MISMOVED = 0.1


@dataclass(frozen=True, slots=True)
class Figures:
    """What was counted in a block or tensor.

    ``misrounded``: not the nearest number to the exact one. ``wrong``: nor within what products and sums in float32 can
    excuse. ``far``: further than one unit beyond that. ``ulps``: the greatest distance in units in the last place.
    ``changed``: differs from the base. ``nonfinite``: NaN or Inf where the base has a number, which is wrong too.
    ``along``, ``size``, ``rest``: the products <fused - base, delta>, <delta, delta> and the squared norm of
    fused - base - delta. ``worst_row``: the first row of the block with most wrong elements, of which it has ``worst``.
    """

    elements: int = 0
    misrounded: int = 0
    wrong: int = 0
    far: int = 0
    nonfinite: int = 0
    changed: int = 0
    ulps: float = 0.5
    along: float = 0.0
    size: float = 0.0
    rest: float = 0.0
    worst_row: int = 0
    worst: int = 0

    def __add__(self, other: Figures) -> Figures:
        most = self if self.worst >= other.worst else other
        return Figures(
            self.elements + other.elements,
            self.misrounded + other.misrounded,
            self.wrong + other.wrong,
            self.far + other.far,
            self.nonfinite + other.nonfinite,
            self.changed + other.changed,
            max(self.ulps, other.ulps),
            self.along + other.along,
            self.size + other.size,
            self.rest + other.rest,
            most.worst_row,
            most.worst,
        )

    @property
    def rounded_once(self) -> bool:
        """True if the elements are the exact ones rounded once: see :data:`MISROUNDED` and :data:`MISMOVED`."""
        few = self.wrong <= self.elements * MISROUNDED
        return few and not self.far and self.wrong <= max(self.changed, self.wrong) * MISMOVED

    @property
    def error(self) -> float:
        """``|| fused - base - delta || / || delta ||`` in the Frobenius norm; absolute for a delta of zero."""
        return float((self.rest / (self.size or 1.0)) ** 0.5)

    @property
    def kept(self) -> float | None:
        """The part of the delta that the stored change has along it: 1 where no rounding swallows any; None for 0."""
        return self.along / self.size if self.size else None


def judge(stored: Array, base: Array, added: Array, sizes: Array, dtype: str) -> Figures:
    """Count elements that are misrounded, wrong or far from ``base + added``; all arguments are flat float64 arrays.

    ``sizes`` times the unit roundoff bounds the error of ``added`` in an arithmetic.
    """
    import numpy as np

    exact = base + added
    beyond = np.copysign(np.ldexp(1.0, LAYOUT[dtype][2] + 1), stored)  # where a number above the greatest would be
    held = np.where(np.isinf(stored), beyond, stored)
    gap, unit = spacing(held, exact, dtype)
    distance = np.abs(held - exact)
    infinite = np.isinf(stored) & ((stored == exact) | (exact / beyond >= 1))
    distance[infinite | (np.isnan(stored) & np.isnan(exact))] = 0.0
    sums = np.abs(base) + np.abs(added)
    noise = _finite(sizes * 2.0**-53 + sums * 2.0**-52)
    # To a 16-bit number, float32's sum is one more rounding; to a float32 number it is the rounding.
    excuse = _finite(sizes * 2.0**-24 + (sums * 2.0**-24 if dtype in ("F16", "BF16") else 0.0)) + noise
    broken = ~np.isfinite(stored) & np.isfinite(base)
    wrong = ~(distance <= gap + excuse) | broken
    units = distance / unit
    return Figures(
        misrounded=int(np.count_nonzero(~(distance <= gap + noise))),
        wrong=int(np.count_nonzero(wrong)),
        far=int(np.count_nonzero(~(distance <= unit + excuse) | broken)),
        nonfinite=int(np.count_nonzero(broken)),
        ulps=float(np.max(np.where(np.isnan(units), np.inf, units), initial=0.0)),
        worst=int(np.count_nonzero(wrong)),
    )


def _finite(array: Array) -> Array:
    import numpy as np

    return np.where(np.isfinite(array), array, 0.0)


def spacing(stored: Array, exact: Array, dtype: str) -> tuple[Array, Array]:
    """``(half the gap from a stored number to its neighbour on the exact one's side, one unit at the exact one)``."""
    import numpy as np

    digits, least, _ = LAYOUT[dtype]
    (mantissa, own), (_, there) = np.frexp(np.abs(stored)), np.frexp(exact)
    own, there = (np.where(x == 0, least, np.maximum(e - 1, least)) for x, e in ((stored, own), (exact, there)))
    narrower = (mantissa == 0.5) & (np.abs(exact) < np.abs(stored)) & (own > least)  # below a power of two
    return np.ldexp(0.5, own - digits - narrower), np.ldexp(1.0, there - digits)


def rounded(exact: Array, dtype: str) -> Array:
    """Float64 numbers rounded once to ``dtype``, as float64."""
    return decode(encode(exact, dtype), dtype).reshape(exact.shape)


def truncated(exact: Array, dtype: str) -> Array:
    """Float64 numbers cut off to ``dtype`` (rounded towards zero), as float64."""
    import numpy as np

    near = encode(exact, dtype)
    bits = np.frombuffer(near, dtype=f"<u{DTYPE_BYTES[dtype]}").reshape(exact.shape)
    away = np.abs(decode(near, dtype).reshape(exact.shape)) > np.abs(exact)
    return decode((bits - away.astype(bits.dtype)).tobytes(), dtype).reshape(exact.shape)
