"""An adapter for several parts of a pipeline, with its modules under the names that they have in the base's own folder.

Which part that is, is told from how the names of its weights begin, without the converter's table.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from loraconv.verifier.fused.case import Term


def in_base(
    terms: Sequence[Term], only: Collection[str] | None, base: Collection[str]
) -> tuple[list[Term], list[str] | None]:
    """``terms`` and the chosen modules (None for all) with the names that modules of this part have in ``base``; those
    of other parts keep theirs, and so have no weight in it."""
    part, steps = _part_of(base), {name.partition(".")[0] for name in base}
    if not part:
        return list(terms), None if only is None else list(only)

    def named(module: str) -> str:
        first, _, rest = module.partition(".")
        if first != part:
            return module
        inner = rest.partition(".")
        return inner[2] if inner[0] == "text_model" and "text_model" not in steps else rest

    renamed = [
        replace(
            term,
            pairs={named(module): pair for module, pair in term.pairs.items()},
            magnitudes={named(module): tensor for module, tensor in term.magnitudes.items()},
        )
        for term in terms
    ]
    return renamed, None if only is None else [named(module) for module in only]


def _part_of(base: Collection[str]) -> str:
    """``unet``, or one of the two CLIP text encoders of SDXL, of which the second alone has a projection."""
    steps = {name.partition(".")[0] for name in base}
    if {"down_blocks", "mid_block", "up_blocks"} <= steps:
        return "unet"
    if not any(name.removeprefix("text_model.").startswith("encoder.layers.0.self_attn.q_proj") for name in base):
        return ""
    return "text_encoder_2" if "text_projection" in steps else "text_encoder"
