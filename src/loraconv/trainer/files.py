"""An output folder that remembers what was written into it, for the record of all its files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loraconv.io.atomic import OutputFolder
from loraconv.io.output_file import OutputFile


class Files:
    """An :class:`OutputFolder` and the files made in it so far, by name; ``path`` is its temporary place."""

    def __init__(self, folder: OutputFolder) -> None:
        self._folder = folder
        self.made: dict[str, OutputFile] = {}

    @property
    def path(self) -> Path:
        return self._folder.path

    @contextmanager
    def file(self, name: str) -> Iterator[OutputFile]:
        """A new file of the folder; see :meth:`OutputFolder.file`."""
        with self._folder.file(name) as file:
            yield file
        self.made[name] = file


def write_text(folder: Files, name: str, text: str) -> None:
    """A small UTF-8 file of the output."""
    with folder.file(name) as file:
        file.write(text.encode("utf-8"))
