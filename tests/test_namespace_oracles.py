"""The original names against the functions by which diffusers reads them: name for name and row for row.

Every row of every module holds a number of its own, so a part that is swapped, shifted or named wrongly shows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import pytest
import torch
from diffusers.loaders import lora_conversion_utils as lora
from diffusers.loaders import single_file_utils as whole
from diffusers.utils import (
    convert_state_dict_to_diffusers,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)

from loraconv.registry import families
from tests.released_models import ALL, adaptable, components, norms

SPELLINGS = {f.name: f.spellings["original"] for f in families() if "original" in f.spellings}

Tensors = dict[str, torch.Tensor]


@cache
def both(
    family: str, model: str, *, whole: bool = False
) -> tuple[Mapping[str, torch.Tensor], Mapping[str, torch.Tensor]]:
    """Rows by original module name, and by diffusers name as the table deals them out; of norms too, if ``whole``."""
    spelling = SPELLINGS[family]
    sizes = {**adaptable(family, model), **(norms(family, model) if whole else {})}
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
    theirs, ours = both(family, model, whole=True)
    checkpoint = Complete(parameters(theirs))
    read = SINGLE_FILE[family](checkpoint)
    assert {name for name in checkpoint.invented if name.rpartition(".")[0] in theirs} == set()
    assert_same(ours, {name: rows for name, rows in read.items() if len(rows) != INVENTED})


def test_z_image_is_read_as_diffusers_reads_it() -> None:
    """The projections and norms of its attention have no bias, which diffusers would leave as it is."""
    theirs, ours = both("z-image", "Z-Image, Z-Image-Turbo", whole=True)
    weights = {
        name: rows for name, rows in parameters(theirs).items() if not re.search(r"(qkv|[qk]_norm)\.bias$", name)
    }
    assert_same(ours, whole.convert_z_image_transformer_checkpoint_to_diffusers(weights))


def test_the_unet_of_sdxl_is_read_as_diffusers_reads_it() -> None:
    sides = both("sdxl", "SDXL 1.0", whole=True)
    theirs, ours = ({n[5:]: t for n, t in side.items() if n.startswith("unet.")} for side in sides)
    checkpoint = {f"model.diffusion_model.{name}": rows for name, rows in parameters(theirs).items()}
    assert_same(ours, whole.convert_ldm_unet_checkpoint(checkpoint, components("sdxl", "SDXL 1.0")["unet"].config))


def parameters(modules: Mapping[str, torch.Tensor]) -> Tensors:
    """What a module may have; FLUX calls the weight of a norm its scale."""
    return {
        f"{name}.{param}": rows
        for name, rows in modules.items()
        for param in ("weight", "bias", *(["scale"] if name.endswith(("query_norm", "key_norm")) else []))
    }


def assert_same(ours: Mapping[str, torch.Tensor], read: Mapping[str, torch.Tensor]) -> None:
    """Every weight is read, and every bias that is read, with the same rows (some layers have no bias)."""
    weights = {name.removesuffix(".weight") for name in read if name.endswith(".weight")}
    assert weights == set(ours)
    assert [name for name, rows in read.items() if not torch.equal(rows, ours[name.rpartition(".")[0]])] == []


# --- adapters -------------------------------------------------------------------------------------------------------

RANK = 6


def original_adapter(family: str, model: str, prefix: str, flat: bool, only: str, but: str) -> tuple[Tensors, Tensors]:
    """An adapter of the first blocks in the original names (kohya's keys if ``flat``), and in those of diffusers.

    ``only`` must match a name, ``but`` must not be found in it (unless empty).
    """
    spelling = SPELLINGS[family]
    theirs, ours = both(family, model)
    down, up = ("lora_down", "lora_up") if flat else ("lora_A", "lora_B")
    written: Tensors = {}
    expected: Tensors = {}
    names = [name for name in theirs if re.match(only, name) and not (but and re.search(but, name))]
    first = [name for name in names if int(spelling.find(name)[1].get("i", 0)) < 3]  # type: ignore[index]
    for number, there in enumerate(first):
        key = prefix + (there.replace(".", "_") if flat else there)
        written[f"{key}.{down}.weight"] = torch.arange(RANK)[:, None] + RANK * number
        written[f"{key}.{up}.weight"] = theirs[there].expand(-1, RANK)
        if flat:
            written[f"{key}.alpha"] = torch.tensor(RANK)
        for name in (name for name in ours if (spelling.find_part(name) or ("",))[0] == there):
            expected[f"{name}.lora_A.weight"] = written[f"{key}.{down}.weight"]
            expected[f"{name}.lora_B.weight"] = ours[name].expand(-1, RANK)
    return written, expected


def bare(read: Mapping[str, torch.Tensor]) -> Tensors:
    return {name.removeprefix("transformer."): tensor for name, tensor in read.items()}


def unequal(expected: Tensors, read: Mapping[str, torch.Tensor]) -> list[str]:
    """Names whose tensors differ in shape or in their rows (all columns are alike)."""
    same = {
        n: t.shape == read[n].shape and torch.equal(t[:, 0], read[n][:, 0].to(t.dtype)) for n, t in expected.items()
    }
    return [name for name, equal in same.items() if not equal]


KOHYA = ("lora_unet_", True)
COMFYUI = ("diffusion_model.", False)
TENCENT = ("transformer.", False)


@pytest.mark.parametrize(
    ("family", "model", "reader", "keys", "only", "but"),
    [
        ("flux", "FLUX.1-dev", "kohya_flux", KOHYA, "", ""),
        ("hunyuan-video", "HunyuanVideo", "hunyuan_video", TENCENT, "", r"^txt_in.*qkv$|^final_layer.adaLN"),
        ("ltx-video", "LTX-Video 0.9", "non_diffusers_ltxv", COMFYUI, "", "patchify|adaln_single"),
        ("qwen-image", "Qwen-Image", "non_diffusers_qwen", KOHYA, "", ""),
        ("qwen-image", "Qwen-Image", "non_diffusers_qwen", COMFYUI, "", ""),
        ("wan", "Wan2.1-T2V-1.3B", "musubi_wan", KOHYA, "blocks", ""),
        ("wan", "Wan2.1-I2V-14B", "musubi_wan", KOHYA, "blocks", ""),
        ("wan", "Wan2.1-I2V-14B", "non_diffusers_wan", COMFYUI, "", "patch_embedding"),
        ("z-image", "Z-Image, Z-Image-Turbo", "non_diffusers_z_image", KOHYA, "", "^x_embedder|^final_layer"),
    ],
)
def test_an_adapter_is_read_as_diffusers_reads_it(
    family: str, model: str, reader: str, keys: tuple[str, bool], only: str, but: str
) -> None:
    """But for a few modules, for which see the next tests; Wan's reader knows no adapter of ``patch_embedding``."""
    written, expected = original_adapter(family, model, *keys, only, but)
    read = bare(getattr(lora, f"_convert_{reader}_lora_to_diffusers")(written))
    assert set(read) == set(expected)
    assert unequal(expected, read) == []


def test_diffusers_cuts_the_down_factor_of_the_text_refiner_so_that_it_fits_no_more() -> None:
    """It should be copied to q, k and v: a third of its rows cannot be multiplied with the up factor."""
    written, expected = original_adapter("hunyuan-video", "HunyuanVideo", "", False, r"txt_in.*qkv$", "")
    read = lora._convert_hunyuan_video_lora_to_diffusers(written)
    for name in (name.removesuffix(".lora_A.weight") for name in expected if name.endswith("lora_A.weight")):
        down, up = (read[f"transformer.{name}.{side}.weight"] for side in ("lora_A", "lora_B"))
        assert (down.shape[0], up.shape[1]) == (RANK // 3, RANK)
        assert torch.equal(up, expected[f"{name}.lora_B.weight"])


def test_diffusers_swaps_the_halves_of_the_rank_too_in_the_last_modulation_of_hunyuan_video() -> None:
    """Then up @ down is another matrix: the rank's order must be the same in both."""
    written, expected = original_adapter("hunyuan-video", "HunyuanVideo", "", False, r"final_layer.adaLN", "")
    read = {
        n.removeprefix("transformer."): t for n, t in lora._convert_hunyuan_video_lora_to_diffusers(written).items()
    }
    name = "norm_out.linear.lora_A.weight"
    assert unequal(expected, read) == [name]
    assert torch.equal(read[name], expected[name].roll(RANK // 2, 0))


def test_diffusers_leaves_some_modules_of_ltx_video_with_names_that_its_model_does_not_have() -> None:
    """Its reader of whole models renames them (see above), the one of adapters does not."""
    written, expected = original_adapter("ltx-video", "LTX-Video 0.9", "diffusion_model.", False, "patch|adaln", "")
    read = lora._convert_non_diffusers_ltxv_lora_to_diffusers(written)
    names = {name.rpartition(".lora_")[0] for name in bare(read)}
    assert len(expected) == len(read) == 8
    assert names & set(adaptable("ltx-video", "LTX-Video 0.9")) == set()


def test_an_adapter_of_sdxl_is_read_as_diffusers_reads_it() -> None:
    """kohya's file, through both steps of diffusers' reader and its own renaming to peft's keys."""
    written, expected = original_adapter("sdxl", "SDXL 1.0", "", True, "", "embeddings")
    for prefix, component in (
        ("lora_te2_", "text_encoder_2_"),
        ("lora_te1_", "text_encoder_"),
        ("lora_unet_", "unet_"),
    ):
        written = {re.sub(f"^{component}", prefix, key): tensor for key, tensor in written.items()}
    config = components("sdxl", "SDXL 1.0")["unet"].config
    read, _ = lora._convert_non_diffusers_lora_to_diffusers(lora._maybe_map_sgm_blocks_to_diffusers(written, config))
    texts = convert_state_dict_to_peft(convert_state_dict_to_diffusers({n: t for n, t in read.items() if "text" in n}))
    units = convert_unet_state_dict_to_peft({n: t for n, t in read.items() if n.startswith("unet.")})
    assert set(texts) | set(units) == set(expected)
    assert unequal(expected, {**texts, **units}) == []
