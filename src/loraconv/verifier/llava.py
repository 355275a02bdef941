"""What a LLaVA run adds to its base, stated a second time from LLaVA's own loader.

Facts: haotian-liu/LLaVA ``llava/model/builder.py``: of each name in ``non_lora_trainables.bin`` the wrapper that peft
puts around a model (``base_model.model.``) comes off, and what is left is a name of the model's state dict.
"""

from __future__ import annotations

from collections.abc import Mapping

from loraconv.lazy import TensorRef


def trained_beside(state: Mapping[str, TensorRef]) -> dict[str, TensorRef]:
    """The tensors of ``non_lora_trainables.bin`` or ``mm_projector.bin`` under the names of the model's state dict."""
    found = {}
    for name, ref in state.items():
        wrapped, _, inner = name.partition("base_model.model.")
        found[name if wrapped or not inner else inner] = ref
    return found
