"""How libraries name the files of a model's weights, as data: what is read, and what is written in its place.

Facts: huggingface/diffusers ``utils/constants.py``, huggingface/transformers ``utils/__init__.py``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

_ONE_OF_SEVERAL = re.compile(r".*-\d{5}-of-(?!00001)\d{5}\.\w+", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Layout:
    """``package`` is whose names these are; ``stem`` is what names of weights begin with, ``suffix`` what they end
    with; ``written`` the stem of new files, which are always safetensors."""

    package: str
    stem: str
    suffix: str
    written: str

    @property
    def pickled(self) -> bool:
        """True if the weights are torch files."""
        return self.suffix == ".bin"

    @property
    def index(self) -> str:
        """The name of the index of several files."""
        return f"{self.stem}{self.suffix}.index.json"

    @property
    def written_pattern(self) -> str:
        """New names, as ``huggingface_hub`` takes them."""
        return f"{self.written}{{suffix}}.safetensors"

    @property
    def written_index(self) -> str:
        return f"{self.written}.safetensors.index.json"

    def rewritten(self, name: str) -> str:
        """The name in the output of a file that keeps its place among the others."""
        return f"{self.written}{name[len(self.stem) : -len(self.suffix)]}.safetensors" if self.pickled else name

    def holds(self, name: str) -> bool:
        """True for a file of weights, whatever stands between stem and suffix: a number, a variant."""
        return name.startswith(self.stem) and name.endswith(self.suffix) and self._plain(name)

    def lists(self, name: str) -> bool:
        """True for an index."""
        begins, more = name.startswith(self.stem) and self._plain(name), f"{self.suffix}.index"
        return begins and more in name and name.endswith(".json")

    def _plain(self, name: str) -> bool:
        # Not model_states or modelling.
        return self.package == "diffusers" or name[len(self.stem) :].startswith((".", "-"))


DIFFUSERS = Layout("diffusers", "diffusion_pytorch_model", ".safetensors", "diffusion_pytorch_model")
TRANSFORMERS = Layout("transformers", "model", ".safetensors", "model")
PICKLED = Layout("transformers", "pytorch_model", ".bin", "model")
#: In the order in which a folder is searched: what both libraries prefer comes first.
LAYOUTS = (DIFFUSERS, TRANSFORMERS, PICKLED)


def layout_of(names: Sequence[str]) -> Layout:
    """The first layout that some of the names in a folder are of; diffusers' where none is."""
    return next((one for one in LAYOUTS if any(one.holds(name) or one.lists(name) for name in names)), DIFFUSERS)


def is_one_of_several(name: str) -> bool:
    """True for a shard by its number."""
    return _ONE_OF_SEVERAL.fullmatch(name) is not None
