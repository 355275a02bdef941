"""The vocabulary that every layer shares: dtype names and sizes, safe printing, and folding of layer numbers.

Dtype names are those of the safetensors format (``F32``, ``BF16``, ...).
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable

DTYPE_BYTES: dict[str, int] = {
    "BOOL":    1,
    "U8":      1,
    "I8":      1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "U16":     2,
    "I16":     2,
    "F16":     2,
    "BF16":    2,
    "U32":     4,
    "I32":     4,
    "F32":     4,
    "U64":     8,
    "I64":     8,
    "F64":     8,
    "C64":     8,
}  # fmt: skip

FLOAT_DTYPES = ("F16", "BF16", "F32", "F64")

#: The greatest relative error of one rounding to a dtype, for numbers in its normal range.
ROUNDING = {"F16": 2.0**-11, "BF16": 2.0**-8, "F32": 2.0**-24, "F64": 2.0**-53}

#: The dtype words a user may type, and the safetensors name of each.
DTYPE_WORDS: dict[str, str] = {"fp16": "F16", "bf16": "BF16", "fp32": "F32"}

_DIGITS = re.compile(r"(?<![A-Za-z0-9])\d+(?![A-Za-z0-9])")


def numel(shape: Iterable[int]) -> int:
    """The number of elements of a tensor of ``shape`` (1 for a scalar)."""
    count = 1
    for size in shape:
        count *= size
    return count


def printable(text: str, limit: int = 200) -> str:
    """``text`` with control bytes, escapes and surrogates spelled out: a hostile name must not drive a terminal."""
    # isprintable is false for controls, bidirectional marks, surrogates, private and unassigned characters.
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode("ascii") for c in text)
    return shown if len(shown) <= limit else f"{shown[:limit]}... ({len(shown)} characters)"


def quoted(path: object) -> str:
    """A path as one word of a shell command that a user can copy."""
    return printable(shlex.quote(str(path)), limit=1000)


def ranges(numbers: Iterable[int]) -> str:
    """Sorted integers folded into ranges: ``0...41`` or ``0...3, 7``."""
    ordered = sorted(set(numbers))
    runs: list[list[int]] = []
    for number in ordered:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}...{b}" for a, b in runs)


def fold_names(names: Iterable[str]) -> list[str]:
    """Names that differ only in their first number, folded: ``blocks.{0...41}.attn1.to_q (42 keys)``.

    The order is that of first appearance; names are made printable.
    """
    groups: dict[str, list[int]] = {}
    for name in names:
        match = _DIGITS.search(name)
        if match is None:
            groups.setdefault(name, [])
        else:
            groups.setdefault(name[: match.start()] + "\0" + name[match.end() :], []).append(int(match.group()))
    folded = []
    for template, numbers in groups.items():
        if not numbers:
            folded.append(printable(template))
            continue
        inside = str(numbers[0]) if len(numbers) == 1 else "{" + ranges(numbers) + "}"
        head, _, tail = template.partition("\0")
        count = "" if len(numbers) == 1 else f" ({len(numbers)} keys)"
        folded.append(printable(head + inside + tail) + count)
    return folded


def once_a_layer(names: Iterable[str]) -> dict[str, int]:
    """One of all names that differ only in their first number -> how many they are."""
    first: dict[tuple[str, ...], str] = {}
    counts: dict[str, int] = {}
    for name in names:
        match = _DIGITS.search(name)
        key = (name,) if match is None else (name[: match.start()], name[match.end() :])
        one = first.setdefault(key, name)
        counts[one] = counts.get(one, 0) + 1
    return counts


def human_bytes(count: int) -> str:
    """A byte count for people, in powers of 1000: ``118.0 MB``."""
    value = float(count)
    for unit in ("B", "KB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"
