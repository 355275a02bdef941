"""What every command here does with the adapters that the user named: open them, and say what they are."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path

from loraconv.adapter import Adapter, read_adapter
from loraconv.algebra import Special
from loraconv.detect import Detected
from loraconv.errors import FormatError, UsageError
from loraconv.fusion.adapters import Used, open_adapters
from loraconv.names import DTYPE_WORDS
from loraconv.products import read_kernels, refuse_kernels_of_linear_layers
from loraconv.reshaping.result import Input
from loraconv.source import Source


def open_for(
    given: Sequence[str | Path], stack: ExitStack, *, alpha: float | None, strict: bool, hint: str
) -> tuple[Used, ...]:
    """The adapters, read and seen to be sound; ``stack`` closes them. Raises what :func:`open_adapters` raises."""
    if not given:
        raise UsageError("no adapter was named", hint=hint)
    try:
        return open_adapters(given, stack, alpha=alpha, rank=None, strict=strict, nearest=False, special=_pairs)
    except FormatError as error:
        if error.slug == "model-parallel-lora":
            error.hint = "make the nearest single adapter first: loraconv convert RUN --nearest --to peft -o ONE"
        raise


def _pairs(
    source: Source, detected: Detected, specials: Sequence[Special], *, alpha: Fraction | None, strict: bool
) -> Adapter:
    """The pairs of factors of an adapter, those of convolutions in the shapes of kernels; raises what
    :func:`read_adapter` raises where some are no pairs."""
    if any(one.what != "LoRA" for one in specials):
        return read_adapter(source, detected, alpha=alpha, strict=strict)
    refuse_kernels_of_linear_layers(source, detected, specials)
    return read_kernels(source, detected, specials, alpha=alpha, strict=strict)


def input_of(used: Used) -> Input:
    """The adapter as a result names it."""
    return Input(str(used.path), used.detected.dialect.name, float(used.strength), used.digest)


def notices_of(used: Sequence[Used]) -> list[str]:
    """Everything that had to be said while the adapters were read."""
    return [notice for one in used for notice in one.notices]


def dtype_name(word: str | None) -> str | None:
    """The safetensors name of a dtype as a user types it; raises :class:`UsageError` for an unknown one."""
    if word is not None and word not in DTYPE_WORDS:
        raise UsageError(f"unknown dtype: {word!r}", hint=f"use one of {', '.join(DTYPE_WORDS)}")
    return None if word is None else DTYPE_WORDS[word]
