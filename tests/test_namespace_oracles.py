"""The original names against the functions by which diffusers reads them: name for name and row for row.

Every row of every module holds a number of its own, so a part that is swapped, shifted or named wrongly shows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import pytest
import torch
from diffusers.loaders import single_file_utils as whole

from loraconv.registry import families
from tests.released_models import ALL, adaptable, components

SPELLINGS = {f.name: f.spellings["original"] for f in families() if "original" in f.spellings}

Tensors = dict[str, torch.Tensor]


@cache
def both(family: str, model: str) -> tuple[Mapping[str, torch.Tensor], Mapping[str, torch.Tensor]]:
    """Rows by original module name, and by diffusers name as the table deals them out."""
    spelling = SPELLINGS[family]
    sizes = adaptable(family, model)
    theirs: Tensors = {}
    ours: Tensors = {}
    start = 0
    for there in dict.fromkeys(where[0] for name in sizes if (where := spelling.find_part(name)) is not None):
        rule, fields = spelling.find(there)  # type: ignore[misc]
        names = [template.replace("{i}", fields.get("i", "")) for template in rule.targets]
        rows = sum(sizes[name][0] for name in names if name in sizes)
        columns = next(sizes[name][1] for name in names if name in sizes)
        theirs[there] = torch.arange(start, start + rows, dtype=torch.int32)[:, None]
        start += rows
        pieces = rule.pieces(rows, columns)
        chunks = theirs[there].chunk(sum(map(len, pieces)))
        ours |= {n: torch.cat([chunks[k] for k in piece]) for n, piece in zip(names, pieces, strict=True) if piece}
    return theirs, ours


@pytest.mark.parametrize(("family", "model"), [(f, m) for f, m in ALL if f in SPELLINGS])
def test_every_module_gets_as_many_rows_as_it_has(family: str, model: str) -> None:
    _, ours = both(family, model)
    assert {name: len(rows) for name, rows in ours.items()} == {n: s[0] for n, s in adaptable(family, model).items()}


INVENTED = 6  # rows: no module has so few, and both two and three parts can be made of them


class Complete(dict[str, Any]):
    """A checkpoint in which tensors that no adapter is put on (norms, tables) are there when they are asked for."""

    invented: set[str]

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__(tensors)
        self.invented = set()

    def pop(self, key: str, *default: Any) -> Any:
        if key not in self:
            self.invented.add(key)
            return torch.zeros(INVENTED, 1)
        return super().pop(key, *default)


SINGLE_FILE: Mapping[str, Callable[..., Any]] = {
    "flux": whole.convert_flux_transformer_checkpoint_to_diffusers,
    "hunyuan-video": whole.convert_hunyuan_video_transformer_to_diffusers,
    "ltx-video": whole.convert_ltx_transformer_checkpoint_to_diffusers,
    "mochi": whole.convert_mochi_transformer_checkpoint_to_diffusers,
    "sd3": whole.convert_sd3_transformer_checkpoint_to_diffusers,
    "wan": whole.convert_wan_transformer_to_diffusers,
}


@pytest.mark.parametrize(("family", "model"), [(f, m) for f, m in ALL if f in SINGLE_FILE])
def test_a_whole_model_is_read_as_diffusers_reads_it(family: str, model: str) -> None:
    theirs, ours = both(family, model)
    checkpoint = Complete(parameters(theirs))
    read = SINGLE_FILE[family](checkpoint)
    assert {name for name in checkpoint.invented if name.rpartition(".")[0] in theirs} == set()
    assert_same(ours, {name: rows for name, rows in read.items() if len(rows) != INVENTED})


def test_the_unet_of_sdxl_is_read_as_diffusers_reads_it() -> None:
    theirs, ours = ({n[5:]: t for n, t in side.items() if n.startswith("unet.")} for side in both("sdxl", "SDXL 1.0"))
    checkpoint = {f"model.diffusion_model.{name}": rows for name, rows in parameters(theirs).items()}
    assert_same(ours, whole.convert_ldm_unet_checkpoint(checkpoint, components("sdxl", "SDXL 1.0")["unet"].config))


def parameters(modules: Mapping[str, torch.Tensor]) -> Tensors:
    return {f"{name}.{param}": rows for name, rows in modules.items() for param in ("weight", "bias")}


def assert_same(ours: Mapping[str, torch.Tensor], read: Mapping[str, torch.Tensor]) -> None:
    """Every weight is read, and every bias that is read, with the same rows (some layers have no bias)."""
    weights = {name.removesuffix(".weight") for name in read if name.endswith(".weight")}
    assert weights == set(ours)
    assert [name for name, rows in read.items() if not torch.equal(rows, ours[name.rpartition(".")[0]])] == []
