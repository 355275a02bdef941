"""Adapters of other kinds than LoRA and its kin, by the names of their tensors: refused with the reason.

Facts: huggingface/peft ``tuners/*/layer.py``, KohakuBlueleaf/LyCORIS ``lycoris/modules``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from loraconv.errors import FormatError
from loraconv.names import fold_names, printable

_END = r"(\.(weight|default|default\.weight))?"
#: Name -> its tensors behind the module's name, and what it does with the weight.
_KINDS = {
    "OFT": (r".+\.(oft_[rR]|oft_blocks|oft_diag)", "it turns the weight: the whole of it is multiplied by a rotation"),
    "BOFT": (r".+\.(boft_[Rs])", "it turns the weight: the whole of it is multiplied by rotations"),
    "IA3": (r".+\.(ia3_l|on_input)", "it multiplies rows or columns of the weight, which has full rank"),
    "VeRA": (r"(.+\.)?(vera_lambda_[bd]|vera_[AB])", "its factors are random and shared by all layers"),
    "VB-LoRA": (r"(.+\.)?vblora_(logits_[AB]|vector_bank).*", "its factors are put together from a bank of vectors"),
    "GLoRA": (r".+\.(bm?[12]|a[12])", "its delta is a product with the weight itself"),
    "FourierFT": (r".+\.fourierft_spectrum", "its delta is a Fourier transform of a few numbers"),
    "HRA": (r".+\.hra_[uU]", "it turns the weight: the whole of it is multiplied by reflections"),
    "AdaLoRA": (r".+\.lora_E", "its factors are multiplied by a third tensor and by the rank that training left"),
    "LN tuning": (r".+\.ln_tuning_layers.*", "it holds whole norm layers"),
}
_PATTERNS = {name: re.compile(f"{ends}{_END}") for name, (ends, _) in _KINDS.items()}
_ADAPTED = ("base_model.", "lora_unet_", "lora_te", "lycoris_", "diffusion_model.", "transformer.", "lora_transformer_")


def refuse_other_kinds(path: Path, names: Iterable[str]) -> None:
    """Raise :class:`FormatError` (``another-kind``) where tensors of an adapter are those of another kind than LoRA."""
    own = [name for name in names if name.startswith(_ADAPTED)]
    for kind, pattern in _PATTERNS.items():
        found = [name for name in own if pattern.fullmatch(name)]
        if found and (kind != "GLoRA" or _is_glora(found)):
            raise FormatError(
                f"this is an adapter of another kind, {kind}, and no LoRA: {printable(str(path))}",
                where="; ".join(fold_names(found)[:4]),
                why=_KINDS[kind][1],
                hint="merge it into its base with what trained it, then: loraconv extract TUNED --base BASE -o OUT",
                slug="another-kind",
            )


def _is_glora(names: Iterable[str]) -> bool:
    """True if some module has both sides: ``a1`` alone may be the name of anything."""
    ends = {name.removesuffix(".weight").rpartition(".")[2] for name in names}
    return {"a1", "a2", "b1", "b2"} <= ends
