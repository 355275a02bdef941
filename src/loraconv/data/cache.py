"""Encoded tensors on disk, by key. An entry appears whole or not at all, so a run may die at any time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from loraconv.data.tensors import InMemory, load_tensors
from loraconv.errors import CorruptCheckpoint, WriteFailed
from loraconv.io.atomic import output_folder
from loraconv.io.safetensors_write import write_safetensors
from loraconv.lazy import nbytes
from loraconv.names import quoted

if TYPE_CHECKING:
    from torch import Tensor

FILE = "tensors.safetensors"


class Cache:
    """A folder of encoded tensors; an entry's key holds everything that it depends on, so entries never go stale."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def has(self, key: str) -> bool:
        return self._file(key).is_file()

    def get(self, key: str, make: Callable[[], dict[str, Tensor]], inputs: Sequence[Path]) -> dict[str, Tensor]:
        """The entry in float32; it is made from ``inputs`` and stored if it is not there yet.

        Raises what ``make`` raises, :class:`WriteFailed`, and :class:`CorruptCheckpoint` for a damaged entry.
        """
        if not self.has(key):
            self._store(key, make(), inputs)
        try:
            return load_tensors(self._file(key))
        except CorruptCheckpoint as error:
            folder = self._file(key).parent
            hint = f"rm -r {quoted(folder)} and start again: it is made anew"
            raise CorruptCheckpoint(error.what, why=error.why, hint=hint) from None

    def _file(self, key: str) -> Path:
        return self._folder / key[:2] / key / FILE

    def _store(self, key: str, tensors: dict[str, Tensor], inputs: Sequence[Path]) -> None:
        held = {name: InMemory(tensor) for name, tensor in tensors.items()}
        needed = sum(map(nbytes, held.values())) + (1 << 16)
        place = self._file(key).parent
        try:
            with output_folder(place, inputs=inputs, needed=needed) as folder, folder.file(FILE) as file:
                write_safetensors(file, held.items(), {})
        except WriteFailed:
            if not self.has(key):  # another process of the same run may have encoded the same sample a moment before
                raise
