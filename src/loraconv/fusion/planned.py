"""What a fusion will write, before any of it is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from loraconv.fusion.adapters import Used
from loraconv.fusion.llava import Joined
from loraconv.fusion.merging import Term
from loraconv.fusion.rest import Kept, Listing
from loraconv.fusion.shards import Shard
from loraconv.model_folder import Model

Rest = Literal["copy", "link"]


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that will be written.

    ``model`` is the base, ``joined`` that with what is put into it besides the adapters. ``place`` is where in the
    output the weights go (empty, or a folder's name with a slash), ``texts`` names and texts of a new index and of new
    settings, if they are needed; ``only`` the modules that the user chose, None for all. ``replaces`` is what the
    base's folder held when it was opened, where that folder is to be replaced.
    """

    model: Model
    joined: Joined
    used: tuple[Used, ...]
    terms: Mapping[str, Sequence[Term]]
    only: Sequence[str] | None
    dtype: str | None
    place: str
    shards: Sequence[Shard]
    texts: Mapping[str, str]
    kept: Sequence[Kept]
    rest: Rest
    replaces: Listing | None

    @property
    def bytes(self) -> int:
        """What has to be written, roughly."""
        return sum(shard.bytes for shard in self.shards) + sum(kept.bytes for kept in self.kept if not self.links(kept))

    def links(self, kept: Kept) -> bool:
        """True for a file that is linked; those beside the weights are always copied."""
        return self.rest == "link" and bool(self.place) and not kept.name.startswith(self.place)
