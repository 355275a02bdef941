"""An output file that is read again while it is still being written."""

from __future__ import annotations

from loraconv.io.input_file import InputFile
from loraconv.io.output_file import OutputFile


class GrowingFile(InputFile):
    """The file of an :class:`OutputFile` whose length is reserved: a read waits until its bytes are there.

    Reads raise OSError where the writer gave up.
    """

    def __init__(self, output: OutputFile) -> None:
        super().__init__(output.path)
        self._output = output

    def pread(self, offset: int, count: int) -> bytes:
        self._output.wait(min(offset + count, self.size))
        return super().pread(offset, count)
