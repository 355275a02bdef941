"""A FLUX adapter whose file holds CLIP-L besides the transformer: read as diffusers reads it, in every format that has
names for both, and fused part by part.

Oracles: diffusers' own conversion of kohya's FLUX files, transformers' own CLIP, float64 mathematics.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders import lora_conversion_utils as theirs
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_peft
from safetensors.torch import load_file, save_file

import loraconv
from converters.models.flux import FLUX
from loraconv.errors import FormatError
from loraconv.rules import fill, match
from loraconv.verifier.pipeline_names import of_text_encoders
from tests.cli_support import parsed_hint
from tests.dialect_files import FORMATS
from tests.released_models import adaptable
from tests.support import header

Tensors = dict[str, torch.Tensor]
KOHYA, DIFFUSERS, COMFYUI = (FORMATS[name].file for name in ("kohya", "diffusers", "comfyui"))
RANK, WIDTH, LAYERS = 4, 8, 2
TEXT = {
    f"lora_te1_text_model_encoder_layers_{n}_{flat}": f"text_encoder.text_model.encoder.layers.{n}.{dotted}"
    for n in range(LAYERS)
    for flat, dotted in {
        "self_attn_q_proj": "self_attn.q_proj",
        "self_attn_k_proj": "self_attn.k_proj",
        "self_attn_v_proj": "self_attn.v_proj",
        "self_attn_out_proj": "self_attn.out_proj",
        "mlp_fc1": "mlp.fc1",
        "mlp_fc2": "mlp.fc2",
    }.items()
}
IMAGE = {"lora_unet_double_blocks_0_img_attn_qkv": 3 * WIDTH, "lora_unet_single_blocks_3_linear2": WIDTH}


def kohya_tensors(alpha: float, text_alpha: float, text_rank: int = RANK) -> Tensors:
    noise, made = torch.Generator().manual_seed(3), {}
    for name, rows in {**IMAGE, **dict.fromkeys(TEXT, WIDTH)}.items():
        rank = text_rank if name in TEXT else RANK
        made[f"{name}.lora_down.weight"] = torch.randn(rank, WIDTH, generator=noise)
        made[f"{name}.lora_up.weight"] = torch.randn(rows, rank, generator=noise)
        made[f"{name}.alpha"] = torch.tensor(text_alpha if name in TEXT else alpha)
    return made


@pytest.fixture
def kohya(tmp_path: Path) -> Path:
    """Scale 1/2 in the transformer, 2 in the text encoder, whose rank is another."""
    save_file(kohya_tensors(2.0, 4.0, 2), tmp_path / "kohya.safetensors")
    return tmp_path / "kohya.safetensors"


def converted_by_diffusers(tensors: Tensors) -> Tensors:
    """The file as diffusers' loader gives it to peft."""
    made = theirs._convert_kohya_flux_lora_to_diffusers({name: tensor.clone() for name, tensor in tensors.items()})
    image = {name: tensor for name, tensor in made.items() if name.startswith("transformer.")}
    text = {name: tensor for name, tensor in made.items() if name.startswith("text_encoder.")}
    assert len(image) + len(text) == len(made)
    return {**image, **convert_state_dict_to_peft(convert_state_dict_to_diffusers(text))}


def test_at_scale_one_it_is_what_diffusers_makes_of_it_bit_for_bit(tmp_path: Path) -> None:
    tensors = kohya_tensors(RANK, RANK)
    save_file(tensors, tmp_path / "kohya.safetensors")
    loraconv.convert(tmp_path / "kohya.safetensors", out=tmp_path / "out", to="diffusers")
    ours, wanted = load_file(tmp_path / "out" / DIFFUSERS), converted_by_diffusers(tensors)
    assert ours.keys() == wanted.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in wanted.items())


def test_each_part_has_the_strength_that_diffusers_gives_it(kohya: Path, tmp_path: Path) -> None:
    loraconv.convert(kohya, out=tmp_path / "out", to="diffusers")
    ours, wanted = load_file(tmp_path / "out" / DIFFUSERS), converted_by_diffusers(load_file(kohya))
    assert ours.keys() == wanted.keys()
    for name in (name for name in ours if name.endswith(".lora_A.weight")):
        up = name.replace("lora_A", "lora_B")
        assert torch.equal(ours[up] @ ours[name], wanted[up] @ wanted[name]), name  # powers of two are exact


def test_the_header_tells_alpha_and_rank_of_each_part(kohya: Path, tmp_path: Path) -> None:
    loraconv.convert(kohya, out=tmp_path / "out", to="diffusers", scale_in="metadata")
    told = json.loads(header(tmp_path / "out" / DIFFUSERS)["lora_adapter_metadata"])
    assert (told["transformer.r"], told["transformer.lora_alpha"]) == (4, 2)
    assert (told["text_encoder.r"], told["text_encoder.lora_alpha"]) == (2, 4)
    assert "encoder.layers.1.mlp.fc2" in told["text_encoder.target_modules"]
    assert not [name for name in told["transformer.target_modules"] if "text" in name]


def test_every_format_on_the_way_and_back_keeps_the_bytes(kohya: Path, tmp_path: Path) -> None:
    before = kohya
    for number, target in enumerate(["comfyui", "diffusers", "kohya"]):
        loraconv.convert(before, out=tmp_path / str(number), to=target, scale_in="auto")
        before = tmp_path / str(number)
    after, want = load_file(before / KOHYA), load_file(kohya)
    text = {name for name in want if name.startswith("lora_te1_")}
    assert text == {name for name in after if name.startswith("lora_te1_")}
    assert all(torch.equal(after[name], want[name]) for name in text)
    assert loraconv.verify(kohya, before).same


def test_comfyui_has_the_keys_that_it_asks_for(kohya: Path, tmp_path: Path) -> None:
    """``text_encoders.clip_l.transformer.``, which diffusers' reader looks for as well."""
    loraconv.convert(kohya, out=tmp_path / "out", to="comfyui")
    keys = load_file(tmp_path / "out" / COMFYUI).keys()
    assert "text_encoders.clip_l.transformer.text_model.encoder.layers.1.self_attn.out_proj.lora_A.weight" in keys
    assert "diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight" in keys


@pytest.mark.parametrize("target", ["diffusers", "comfyui", "kohya"])
def test_names_without_the_step_that_transformers_5_leaves_out_are_the_same(
    kohya: Path, tmp_path: Path, target: str
) -> None:
    bare = {name.replace("_te1_text_model_", "_te1_"): tensor for name, tensor in load_file(kohya).items()}
    assert "lora_te1_encoder_layers_0_mlp_fc1.lora_up.weight" in bare
    save_file(bare, tmp_path / "bare.safetensors")
    for name in ("kohya", "bare"):
        loraconv.convert(tmp_path / f"{name}.safetensors", out=tmp_path / name, to=target)
    want, got = (load_file(tmp_path / name / FORMATS[target].file) for name in ("kohya", "bare"))
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in want.items())


def test_a_module_that_is_there_with_the_step_and_without_it_is_refused(kohya: Path, tmp_path: Path) -> None:
    tensors = load_file(kohya)
    twice = {n.replace("_text_model_", "_"): t.clone() for n, t in tensors.items() if n.startswith("lora_te1_")}
    save_file({**tensors, **twice}, tmp_path / "twice.safetensors")
    with pytest.raises(FormatError) as caught:
        loraconv.convert(tmp_path / "twice.safetensors", out=tmp_path / "out", to="comfyui", alpha=1)
    assert caught.value.slug == "factor-twice"


def test_a_wrong_number_in_the_text_encoder_is_seen(kohya: Path, tmp_path: Path) -> None:
    other = load_file(kohya)
    other["lora_te1_text_model_encoder_layers_1_mlp_fc2.lora_up.weight"][0, 0] += 1
    save_file(other, tmp_path / "other.safetensors")
    found = loraconv.verify(kohya, tmp_path / "other.safetensors")
    assert not found.same
    assert any("text_encoder.text_model.encoder.layers.1.mlp.fc2" in f.sentence for f in found.findings)


def test_the_list_is_that_of_the_real_text_encoder() -> None:
    """FLUX.1's ``text_encoder`` is CLIP-L, as SDXL's first."""
    real = [name for name in adaptable("sdxl", "SDXL 1.0") if name.startswith("text_encoder.")]
    assert [name for name in real if all(match(template, name) is None for template in FLUX.beside)] == []
    assert [t for t in FLUX.beside if all(match(t, name) is None for name in real)] == []
    assert all(FLUX.knows(name) for name in real)


def test_the_proof_names_every_module_of_the_text_encoder_itself() -> None:
    modules = [fill(template, {"i": "11"}) for template in FLUX.beside]
    flat = {f"te_{module.removeprefix('text_encoder.').replace('.', '_')}": module for module in modules}
    names = [*flat, "unet_conv_in", "unet_double_blocks_0_img_attn_qkv", "te_double_blocks_0_img_attn_qkv"]
    assert of_text_encoders(names, {"te_": "text_encoder", "unet_": "unet"}) == flat


def test_a_format_without_a_place_for_the_text_encoder_refuses_it(kohya: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError) as caught:
        loraconv.convert(kohya, out=tmp_path / "out", to="peft")
    assert caught.value.slug == "cannot-carry"
    assert "text_encoder.text_model" in str(caught.value.where)
    loraconv.convert(kohya, out=tmp_path / "out", to="peft", drop=["lora_te1_*"])
    assert not [name for name in load_file(tmp_path / "out" / "adapter_model.safetensors") if "text" in name]


def test_dora_of_both_parts_is_renamed_and_proved(tmp_path: Path) -> None:
    tensors = kohya_tensors(RANK, RANK)
    for number, name in enumerate(["lora_unet_single_blocks_3_linear2", next(iter(TEXT))]):
        tensors[f"{name}.dora_scale"] = torch.arange(1.0, WIDTH + 1).reshape(WIDTH, 1) + number
    save_file(tensors, tmp_path / "dora.safetensors")
    loraconv.convert(tmp_path / "dora.safetensors", out=tmp_path / "out", to="comfyui")
    made = load_file(tmp_path / "out" / COMFYUI)
    name = "text_encoders.clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj.dora_scale"
    assert torch.equal(made[name], tensors[f"{next(iter(TEXT))}.dora_scale"])
    assert loraconv.verify(tmp_path / "dora.safetensors", tmp_path / "out").same
    made[name] = made[name] + 1
    save_file(made, tmp_path / "other.safetensors")
    found = loraconv.verify(tmp_path / "dora.safetensors", tmp_path / "other.safetensors")
    assert [finding.slug for finding in found.findings] == ["dora-differs"]
    assert TEXT[next(iter(TEXT))] in found.findings[0].sentence


# --- fuse and split ---------------------------------------------------------------------------------------------------


def clip(folder: Path) -> Tensors:
    from transformers import CLIPTextConfig, CLIPTextModel

    small = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "num_attention_heads": 2, "num_hidden_layers": LAYERS}
    torch.manual_seed(1)
    CLIPTextModel(CLIPTextConfig(**small, vocab_size=16, max_position_embeddings=4)).save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def test_the_text_encoder_is_fused_into_its_own_folder(kohya: Path, tmp_path: Path) -> None:
    before, own = clip(tmp_path / "clip"), ["text_encoder.*"]
    result = loraconv.fuse(kohya, base=tmp_path / "clip", out=tmp_path / "out", modules=own)
    after, tensors = load_file(tmp_path / "out" / "model.safetensors"), load_file(kohya)
    for there, here in TEXT.items():
        name = f"{here.removeprefix('text_encoder.text_model.')}.weight"
        name = name if name in before else f"text_model.{name}"
        up, down = tensors[f"{there}.lora_up.weight"].double(), tensors[f"{there}.lora_down.weight"].double()
        want = (before.pop(name).double() + 2 * up @ down).float()
        assert torch.equal(after.pop(name), want)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert len(result.fused) == len(TEXT)
    assert loraconv.verify(kohya, tmp_path / "out", base=tmp_path / "clip", modules=own).same


def test_an_adapter_of_both_is_not_fused_into_one_of_them_in_silence(kohya: Path, tmp_path: Path) -> None:
    clip(tmp_path / "clip")
    (tmp_path / "transformer").mkdir()
    names = [f"transformer_blocks.0.attn.to_{side}" for side in "qkv"]
    base = {f"{name}.weight": torch.zeros(WIDTH, WIDTH) for name in [*names, "single_transformer_blocks.3.proj_out"]}
    save_file(base, tmp_path / "transformer" / "diffusion_pytorch_model.safetensors")
    for folder, other in (("transformer", "text_encoder"), ("clip", "transformer")):
        with pytest.raises(FormatError) as caught:
            loraconv.fuse(kohya, base=tmp_path / folder, out=tmp_path / "out")
        assert caught.value.slug == "other-component"
        assert re.search(rf"modules are of {other}, and the base is", caught.value.what)
        parsed_hint(str(caught.value.hint).partition(";")[0])
    split: Any = loraconv.split(kohya, out=tmp_path / "parts", by="component")
    assert sorted(part.name for part in split.parts) == ["text_encoder", "transformer"]
    for folder, part in (("transformer", "transformer"), ("clip", "text_encoder")):
        adapter = tmp_path / "parts" / part
        loraconv.fuse(adapter, base=tmp_path / folder, out=tmp_path / f"fused-{part}")
        assert loraconv.verify(adapter, tmp_path / f"fused-{part}", base=tmp_path / folder).same
