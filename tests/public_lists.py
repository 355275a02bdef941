"""The lists of keys in ``fixtures/FORMAT/NAME.json``: what a real file of that format holds, without its numbers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.support import FIXTURES

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}
_FOLDED = re.compile(r"\{([^}]*)\}")

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class PublicList:
    """One list. ``tensors`` has folded keys; ``to`` is where the tests convert it, ``drop`` what they leave behind;
    ``one_way`` says that the format itself cannot be written again from there."""

    path: Path
    origin: tuple[str, ...]
    says: str
    dialect: str
    family: str
    file: str
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    header: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    to: str = "diffusers"
    drop: tuple[str, ...] = ()
    one_way: bool = False

    @property
    def name(self) -> str:
        return f"{self.path.parent.name}/{self.path.stem}"

    def within(self, folder: Path) -> Path:
        """What to open of a folder that the list was written to: all of it where the settings count too."""
        return folder if self.settings else folder / self.file

    def keys(self, steps: Callable[[str], Sequence[str]]) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {key: like for folded, like in self.tensors.items() for key in unfolded(folded, steps)}


def every_step(inside: str) -> Sequence[str]:
    """What ``0-29`` and ``q,k,v`` stand for between braces."""
    first, dash, last = inside.partition("-")
    return [str(n) for n in range(int(first), int(last) + 1)] if dash else inside.split(",")


def ends(inside: str) -> Sequence[str]:
    """The same, of a range the first and the last alone."""
    steps = every_step(inside)
    return steps if "," in inside else [steps[0], steps[-1]]


def unfolded(folded: str, steps: Callable[[str], Sequence[str]]) -> Iterator[str]:
    """Every key that a folded one stands for."""
    between = _FOLDED.split(folded)
    for chosen in product(*(steps(inside) for inside in between[1::2])):
        filled = [*chosen, ""]
        yield "".join(text + step for text, step in zip(between[::2], filled, strict=True))


def public_lists() -> list[PublicList]:
    return [_read(path) for path in sorted(FIXTURES.glob("*/*.json"))]


def _read(path: Path) -> PublicList:
    data = json.loads(path.read_text())
    tensors = {key: (dtype, tuple(shape)) for key, (dtype, shape) in data.pop("tensors").items()}
    lists = {key: tuple(data.pop(key)) for key in ("origin", "drop") if key in data}
    return PublicList(path=path, tensors=tensors, **lists, **data)


def write_headers(listed: PublicList, folder: Path) -> None:
    """The whole file with every key, dtype and shape, whose numbers are a hole in it that takes no disk."""
    entries: dict[str, Any] = {"__metadata__": dict(listed.header)}
    at = 0
    for key, (dtype, shape) in sorted(listed.keys(every_step).items()):
        size = DTYPES[dtype].itemsize * torch.Size(shape).numel()
        entries[key] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(entries).encode()
    folder.mkdir(parents=True)
    with (folder / listed.file).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
    _write_settings(listed, folder)


def write(listed: PublicList, folder: Path) -> Tensors:
    """A file of the first and last layers, a sixteenth as wide, with random numbers and half the rank as alpha."""
    noise = torch.Generator().manual_seed(len(listed.tensors))
    made = {key: _tensor(dtype, narrow(key, shape), noise) for key, (dtype, shape) in listed.keys(ends).items()}
    for key in (key for key in made if key.endswith(".alpha")):
        made[key].fill_(_rank(key.removesuffix(".alpha"), made) / 2)
    file = folder / listed.file
    file.parent.mkdir(parents=True)
    if file.suffix == ".pt":
        torch.save({"module": made}, file)
        (folder / "latest").write_text(file.parent.name)
    else:
        save_file(made, file, dict(listed.header))
    _write_settings(listed, folder)
    return made


def narrow(key: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Widths of layers divided by 16, not ranks; by 32 those of a LoKr, whose factors are dense."""
    least, by = (64, 32) if key.endswith(".lokr_w2") else (512, 16)
    return tuple(size // by if size >= least else size for size in shape)


def _tensor(dtype: str, shape: tuple[int, ...], noise: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=noise).to(DTYPES[dtype]) if shape else torch.zeros(shape, dtype=DTYPES[dtype])


def _rank(module: str, tensors: Tensors) -> int:
    """The rank of the module's factors; 1 of a LoKr without any, whose alpha says nothing."""
    return next((tensors[module + end].shape[0] for end in _DOWN if module + end in tensors), 1)


_DOWN = (".lora_down.weight", ".lora_A.weight", ".hada_w1_b", ".lokr_w2_b")


def _write_settings(listed: PublicList, folder: Path) -> None:
    if listed.settings:  # JSON is YAML too
        (folder / listed.settings["file"]).write_text(json.dumps(listed.settings["content"]))
