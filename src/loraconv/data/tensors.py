"""Torch tensors in safetensors files: read through ``InputFile``, written through ``io.atomic``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from loraconv.errors import FormatError
from loraconv.io.input_file import InputFile
from loraconv.io.safetensors_read import read_safetensors
from loraconv.lazy import TensorRef
from loraconv.names import printable

if TYPE_CHECKING:
    from torch import Tensor

TORCH_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True, slots=True)
class InMemory:
    """A floating-point torch tensor as what ``write_safetensors`` streams."""

    tensor: Tensor

    @property
    def dtype(self) -> str:
        names = {torch: name for name, torch in TORCH_DTYPES.items()}
        return names[str(self.tensor.dtype).removeprefix("torch.")]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def pieces(self) -> Iterator[bytes]:
        """The row-major bytes, in one piece."""
        import torch

        yield self.tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()

    def leaves(self) -> Iterator[TensorRef]:
        """None: it lies in no file."""
        return iter(())


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file, in float32.

    Raises :class:`UsageError` (no such file), :class:`CorruptCheckpoint` and, for integers, :class:`FormatError`.
    """
    with InputFile(path) as file:
        refs = read_safetensors(file).tensors
        loaded = {name: _tensor(ref) for name, ref in refs.items()}
        file.check_unchanged()
    return loaded


def _tensor(ref: TensorRef) -> Tensor:
    import torch

    if ref.dtype not in TORCH_DTYPES:
        raise FormatError(
            f"{ref.file.shown} holds {ref.dtype} numbers where floating-point ones belong",
            where=printable(ref.name),
            hint="save it as F32, F16 or BF16",
        )
    raw = bytearray().join(ref.pieces())
    dtype = getattr(torch, TORCH_DTYPES[ref.dtype])
    flat = torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)
    return flat.reshape(ref.shape).to(torch.float32)
