"""Precomputed samples: a folder of ``NAME.safetensors``, each with ``latents``, ``prompt_embeds`` and, for I2V,
``image_latents``, in the shapes of :class:`loraconv.data.Sample`."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from loraconv.data.listing import names_in
from loraconv.data.sample import Sample
from loraconv.data.settings import ModelNeeds
from loraconv.data.tensors import load_tensors
from loraconv.errors import FormatError
from loraconv.io.input_file import InputFile
from loraconv.lazy import PIECE_BYTES
from loraconv.names import printable, quoted

if TYPE_CHECKING:
    from torch import Tensor

SUFFIX = ".safetensors"


def sample_files(folder: Path) -> list[Path]:
    """The sample files of a folder by name; raises :class:`FormatError` if there is none."""
    names = [name for name in names_in(folder) if name.endswith(SUFFIX)]
    if not names:
        raise FormatError(
            f"no {SUFFIX} file in {printable(str(folder), 1000)}",
            hint=f"ls {quoted(folder)}",
            slug="no-samples",
        )
    return [folder / name for name in names]


def file_digest(path: Path) -> str:
    """The SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with InputFile(path) as file:
        for at in range(0, file.size, PIECE_BYTES):
            digest.update(file.pread(at, min(PIECE_BYTES, file.size - at)))
        file.check_unchanged()
    return digest.hexdigest()


class LatentsDataset:
    """The samples of such a folder, in the order of their names."""

    def __init__(self, folder: Path, model: ModelNeeds) -> None:
        self._files, self._model = sample_files(folder), model
        self.contents = [file_digest(path) for path in self._files]
        self.fingerprint = hashlib.sha256(" ".join(self.contents).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Sample:
        """Raises :class:`FormatError` for a missing tensor or one of another shape than the model takes."""
        path, model = self._files[index], self._model
        tensors = load_tensors(path)
        latents = _take(path, tensors, "latents", model.shape)
        prompt = _take(path, tensors, "prompt_embeds", (model.tokens, model.text_dim))
        image = _take(path, tensors, "image_latents", model.shape) if model.image else None
        return Sample(printable(path.name), latents, prompt, image)


def _take(path: Path, tensors: dict[str, Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
    found = tensors.get(name)
    if found is None or tuple(found.shape) != shape:
        why = f"it is {list(found.shape)}" if found is not None else f"it holds {', '.join(map(printable, tensors))}"
        raise FormatError(
            f"{printable(str(path), 1000)} has no {name} of shape {list(shape)}",
            why=why,
            hint=f"loraconv check-data {quoted(path.parent)}",
            slug="sample-shape",
        )
    return found
