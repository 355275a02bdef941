"""An adapter of a whole pipeline beside the folder of one of its parts: which modules are that part's, by what name."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest

from loraconv.verifier.fused.case import Term
from loraconv.verifier.fused.parts import in_base

UNET = ("down_blocks.0.attn.weight", "mid_block.attn.weight", "up_blocks.0.attn.weight", "conv_in.weight")
Q = "encoder.layers.0.self_attn.q_proj"
CLIP, BARE = (f"text_model.{Q}.weight", "text_model.final_layer_norm.bias"), (f"{Q}.weight", "final_layer_norm.bias")
PROJECTION = "text_projection.weight"
MODULES = ("unet.mid_block.attn", f"text_encoder.text_model.{Q}", f"text_encoder_2.text_model.{Q}", f"text_encoder.{Q}")

BASES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "the unet": (UNET, ("mid_block.attn", *MODULES[1:])),
    "the first text encoder": (CLIP, (MODULES[0], f"text_model.{Q}", MODULES[2], Q)),
    "the second text encoder": ((*CLIP, PROJECTION), (*MODULES[:2], f"text_model.{Q}", MODULES[3])),
    "the first as transformers 5 has it": (BARE, (MODULES[0], Q, MODULES[2], Q)),
    "the second as transformers 5 has it": ((*BARE, PROJECTION), (*MODULES[:2], Q, MODULES[3])),
    "a unet without a middle": (UNET[:1] + UNET[2:], MODULES),
    "another model": (("transformer_blocks.0.attn.to_q.weight", PROJECTION), MODULES),
    "a text encoder inside of another model": ((f"vision.{CLIP[0]}",), MODULES),
    "nothing": ((), MODULES),
}


@pytest.mark.parametrize("case", BASES)
def test_modules_of_the_part_that_the_base_is_get_its_names(case: str) -> None:
    base, names = BASES[case]
    pairs: Any = {module: f"pair of {module}" for module in MODULES[:3]}
    sizes: Any = {module: f"size of {module}" for module in MODULES[:3]}
    given = [Term(pairs, Fraction(1, 2), sizes), Term({}, Fraction(3))]
    terms, only = in_base(given, None, base)
    assert only is None
    assert [term.strength for term in terms] == [Fraction(1, 2), Fraction(3)]
    assert terms[0].pairs == dict(zip(names, pairs.values(), strict=False))
    assert terms[0].magnitudes == dict(zip(names, sizes.values(), strict=False))
    assert (terms[1].pairs, terms[1].magnitudes) == ({}, {})
    assert in_base(given, MODULES, base) == (terms, [*names])
    assert in_base([], [], base) == ([], [])
