"""Tables of positions in a checkpoint: computed from sines and cosines, or learned, and what became of one.

A computed table can be made again by whoever loads the model; a learned one cannot.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

from loraconv.lazy import TensorRef
from loraconv.names import FLOAT_DTYPES
from loraconv.verifier.changes.comparison import Change, elements
from loraconv.verifier.numbers import HALF_ULP

Tensors = Mapping[str, TensorRef]
Fate = Literal["unused", "uncomputed", "lost", "recomputed", "resized", "remade", ""]

_TABLE = re.compile(r"(?:^|\.)(?:\w*pos(?:ition)?_embed\w*|freqs_(?:sin|cos)|inv_freq)(?:\.|$)")
_WAVES = re.compile(r"(?:^|\.)(?:freqs_(?:sin|cos)|inv_freq)$")
#: SAT makes this one for every model with rotary positions and never uses it.
_UNUSED = re.compile(r"(?:^|\.)transformer\.position_embeddings\.weight$")
#: Roundings of a float32 angle and of the numbers that it is a product of, in either of two computations.
_ROUNDINGS = 8
#: Numbers that are looked at together, in whole rows.
_AT_ONCE = 1 << 16


def is_table(name: str) -> bool:
    """True for the name of a table of positions."""
    return _TABLE.search(name) is not None


def fate_of(change: Change, before: Tensors, after: Tensors) -> Fate:
    """What became of a table that is missing, or holds other numbers; empty where it simply moved, as in training."""
    if _UNUSED.search(change.name):
        return "unused"
    computed = _is_computed(change.name, before[change.name])
    if change.kind == "missing":
        return "uncomputed" if computed else "lost"
    other = after[change.other or change.name]
    if computed and _is_computed(change.name, other):
        return "recomputed" if _by_rounding(change, before[change.name]) else "resized"
    if change.kind == "reshaped" or _is_computed(change.name, other):
        return "remade"
    # No nearer to what it was than a table of zeros is: it does not come from it.
    return "remade" if change.figures is not None and change.figures.relative >= 1 else ""


def _by_rounding(change: Change, before: TensorRef) -> bool:
    """True if two computations of the same sines and cosines may differ this much: in rounding an angle, which is at
    most the number of rows, and in rounding the result."""
    dtypes = [form[0] for form in (change.before, change.after) if form is not None and form[0] in HALF_ULP]
    if change.figures is None or len(dtypes) < 2:
        return False
    stored = sum(HALF_ULP[dtype][0] for dtype in dtypes)
    rows = max(before.shape[:-1], default=1)
    return change.figures.greatest <= stored + rows * _ROUNDINGS * HALF_ULP["F32"][0]


def _is_computed(name: str, table: TensorRef) -> bool:
    """True for a table of sines beside the cosines of the same angles, which every row but those of the text (zero)
    shows: its squares sum up to half its width. Frequencies are told by their names."""
    import numpy as np

    if _WAVES.search(name):
        return True
    if table.dtype not in FLOAT_DTYPES or len(table.shape) < 2 or table.strides is not None or not table.shape[-1]:
        return False
    width = table.shape[-1]
    room = width * (2 * HALF_ULP[table.dtype][0] + 2.0**-20)  # of the stored numbers, and of float32 sines
    found = False
    for values in elements(table, count=width * max(1, _AT_ONCE // width)):
        squares = np.sum(np.square(values.reshape(-1, width)), axis=1)
        waves = np.abs(squares - width / 2) <= room
        if not bool(np.all(waves | (squares == 0))):
            return False
        found = found or bool(np.any(waves))
    return found
