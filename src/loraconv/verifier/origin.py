"""``loraconv.origin``: what the trainer said about alpha, rank and dtype, as an output records it for the way back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from fractions import Fraction
from typing import Any

from loraconv.names import FLOAT_DTYPES, fold_names
from loraconv.verifier.numbers import Pair
from loraconv.verifier.proof import Check

Record = Mapping[str, Any]


def record(metadata: Mapping[str, str], settings: Mapping[str, Any] | None) -> Record | None:
    """The record of a safetensors header, or else of a settings file: module -> entry, ``""`` for all others."""
    if "loraconv.origin" in metadata:
        found = json.loads(metadata["loraconv.origin"])
    else:
        ours = (settings or {}).get("loraconv")
        found = ours.get("origin") if isinstance(ours, Mapping) else None
    if found is not None and not isinstance(found, Mapping):
        raise TypeError("loraconv.origin is not a mapping")
    return found


def source_record(metadata: Mapping[str, str], settings: Mapping[str, Any] | None) -> Record:
    """The record of the source, which somebody else may have damaged: then there is none."""
    with suppress(ValueError, TypeError, RecursionError):
        return record(metadata, settings) or {}
    return {}


def recorded_dtypes(source: Record) -> dict[str, str]:
    """The dtypes that a source's record names, by module."""
    told = {m: e.get("dtype") for m, e in source.items() if isinstance(e, Mapping)}
    return {module: dtype for module, dtype in told.items() if dtype in FLOAT_DTYPES}


def check_origin(expected: Mapping[str, Pair], written: Record, source: Record) -> Check:
    """The record has the source's alpha and rank for every module, or what the source itself had recorded."""
    wrong = []
    for module, pair in expected.items():
        entry = written.get(module, written.get(""))
        alpha, rank = pair.scale * pair.shape[1], pair.shape[1]
        right = isinstance(entry, Mapping) and type(entry["rank"]) is int
        if not right or (
            (Fraction(entry["alpha"]), entry["rank"]) != (alpha, rank) and not _kept(entry, module, source)
        ):
            wrong.append(module)
    detail = f"another alpha or rank than the source has: {'; '.join(fold_names(wrong)[:4])}" if wrong else ""
    return Check("L0", "the recorded alpha and rank", not wrong, len(expected), detail=detail)


def _kept(entry: Record, module: str, source: Record) -> bool:
    """An earlier record may be handed on as it is."""
    earlier = source.get(module, source.get(""))
    return isinstance(earlier, Mapping) and all(entry[key] == earlier.get(key) for key in ("alpha", "rank"))
