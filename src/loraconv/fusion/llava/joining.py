"""A base with everything that is put into it besides the adapters: what a LLaVA run trained whole, a vision tower."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from loraconv.fusion.adapters import Used
from loraconv.fusion.llava.hf import HfLlava, open_hf
from loraconv.fusion.llava.run import Run, one_dtype, open_run, run_notices
from loraconv.fusion.rest import Kept
from loraconv.fusion.shards import NOTHING
from loraconv.model_folder import Model


@dataclass(frozen=True, slots=True)
class Joined:
    """``run`` is the LLaVA run that brings tensors of its own, if one does, ``hf`` what makes it a model of
    transformers, if that was asked for, and ``whole`` the base with their tensors, under the names of the base.

    ``dtype`` is what every floating tensor is cast to, None where nothing is; ``told`` the dtype that config.json has
    to tell, None where the base's own does.
    """

    whole: Model
    run: Run | None
    hf: HfLlava | None
    dtype: str | None
    told: str | None
    notices: tuple[str, ...]

    @property
    def other(self) -> bool:
        """True if the output is another model than the base with other numbers."""
        return self.run is not None or self.hf is not None

    @property
    def names(self) -> Mapping[str, str]:
        """The base's names -> the output's, where they differ."""
        return NOTHING if self.hf is None else self.hf.names

    @property
    def more(self) -> Mapping[str, int]:
        """Rows of zeros that the output has behind a tensor's own."""
        return NOTHING if self.hf is None else self.hf.more

    @property
    def kept(self) -> list[Kept]:
        """Files that take the place of the base's."""
        found = [kept for part in (self.run, self.hf) if part is not None for kept in part.kept]
        return [kept for kept in found if kept.name not in self.texts]

    @property
    def texts(self) -> Mapping[str, str]:
        """Files that are written anew, by name."""
        return {} if self.hf is None else self.hf.texts

    def check_unchanged(self) -> None:
        """Raise :class:`CorruptCheckpoint` if the run's file or the tower's changed since it was opened."""
        if self.run is not None:
            self.run.file.check_unchanged()
        if self.hf is not None:
            self.hf.tower.check_unchanged()


def join(
    model: Model, used: Sequence[Used], stack: ExitStack, *, hf: bool, tower: str | Path | None, dtype: str | None
) -> Joined:
    """Open what belongs to the adapters; ``stack`` closes it. Raises as :func:`open_run` and :func:`open_hf` do."""
    run = open_run(model, used, stack)
    whole = model if run is None else run.joined(model)
    own = {} if run is None else {kept.name: kept.path for kept in run.kept}
    made = open_hf(whole, tower, stack, own) if hf else None
    whole = whole if made is None else made.joined(whole)
    said = [*run_notices(model, used, run), *(() if made is None else made.notices)]
    if run is None and made is None:
        return Joined(whole, None, None, dtype, dtype, tuple(said))
    told, more = one_dtype(model, whole, dtype)
    return Joined(whole, run, made, told if more else dtype, told, (*said, *more))
