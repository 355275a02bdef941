"""An adapter of SDXL, a UNet and two text encoders: every file of it adds the same to a real pipeline, and it can be
split into its components."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders import lora_conversion_utils as theirs
from diffusers.utils import convert_unet_state_dict_to_peft
from safetensors.torch import load_file, save_file

import loraconv
from loraconv.errors import FormatError
from loraconv.naming import namings
from loraconv.rules import fill
from loraconv.verifier.pipeline_names import of_pipeline
from tests.dialect_files import FORMATS, PIPELINE, component_of, deltas, write
from tests.public_lists import every_step, public_lists
from tests.released_models import adaptable, components, norms
from tests.support import header
from tests.test_namespace_oracles import SPELLINGS

RANK, ALPHA = 2, 1.0
LORA = FORMATS["diffusers"].file


def pipeline() -> Any:
    """SDXL with every block that it has, and a few channels."""
    from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    unet = UNet2DConditionModel(
        block_out_channels=(8, 16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 3),
        attention_head_dim=(1, 2, 4),
        norm_num_groups=4,
        cross_attention_dim=16,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=32,
        use_linear_projection=True,
    )
    text = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2, "num_hidden_layers": 2}
    small = CLIPTextConfig(**text, projection_dim=8, vocab_size=64, max_position_embeddings=8)
    encoders = CLIPTextModel(small), CLIPTextModelWithProjection(small)
    return StableDiffusionXLPipeline(None, *encoders, None, None, unet, None)


def linear_layers(pipe: Any) -> dict[str, torch.nn.Linear]:
    """The pipeline's linear layers by the names that files have; transformers 5 leaves one step of them out."""
    found = {}
    for component in PIPELINE:
        for name, module in getattr(pipe, component).named_modules():
            if isinstance(module, torch.nn.Linear):
                step = "text_model." if component == "text_encoder" and not name.startswith("text_model.") else ""
                found[f"{component}.{step}{name}"] = module
    return found


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A diffusers file with an adapter on every linear layer of the pipeline, and another alpha in each component."""
    noise = torch.Generator().manual_seed(5)
    tensors, config = {}, {}
    for name, layer in linear_layers(pipeline()).items():
        tensors[f"{name}.lora_A.weight"] = torch.randn(RANK, layer.in_features, generator=noise)
        tensors[f"{name}.lora_B.weight"] = torch.randn(layer.out_features, RANK, generator=noise)
    for number, component in enumerate(PIPELINE):
        own = sorted({component_of(n.rpartition(".lora_")[0])[1] for n in tensors if n.startswith(f"{component}.")})
        settings = {"r": RANK, "lora_alpha": ALPHA * 2**number, "target_modules": own}
        config |= {f"{component}.{key}": value for key, value in settings.items()}
    (tmp_path / "in").mkdir()
    save_file(tensors, tmp_path / "in" / LORA, {"format": "pt", "lora_adapter_metadata": json.dumps(config)})
    return tmp_path / "in"


def loaded(file: Path) -> dict[str, torch.Tensor]:
    """What diffusers adds to every layer once it has loaded the file, by the end of the layer's name."""
    pipe = pipeline()
    before = {name: layer.weight.detach().clone() for name, layer in linear_layers(pipe).items()}
    pipe.load_lora_weights(str(file.parent), weight_name=file.name)
    pipe.fuse_lora(components=list(PIPELINE))
    pipe.unload_lora_weights()
    return {name: layer.weight.detach() - before[name] for name, layer in linear_layers(pipe).items()}


def trained(folder: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(folder / LORA)
    scales = {c: ALPHA * 2**n / RANK for n, c in enumerate(PIPELINE)}
    return {
        name: scales[component_of(name)[0]] * tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]
        for name in linear_layers(pipeline())
    }


@pytest.mark.parametrize("target", ["diffusers", "kohya"])
@pytest.mark.parametrize("scale_in", ["auto", "fold"])
def test_diffusers_adds_to_a_real_pipeline_what_was_trained(
    adapter: Path, tmp_path: Path, target: str, scale_in: str
) -> None:
    loraconv.convert(adapter, out=tmp_path / "out", to=target, scale_in=scale_in)
    got, want = loaded(tmp_path / "out" / FORMATS[target].file), trained(adapter)
    for name, delta in want.items():
        torch.testing.assert_close(got[name], delta, rtol=1e-4, atol=1e-5, msg=name)


def test_every_dialect_on_the_way_and_back_is_the_same_file(adapter: Path, tmp_path: Path) -> None:
    before = adapter
    for number, target in enumerate(["kohya", "comfyui", "diffusers"]):
        loraconv.convert(before, out=tmp_path / str(number), to=target, scale_in="auto")
        before = tmp_path / str(number)
    assert loraconv.verify(adapter, before).same


def test_the_header_has_the_settings_of_each_component(adapter: Path, tmp_path: Path) -> None:
    loraconv.convert(adapter, out=tmp_path / "out", to="diffusers", scale_in="metadata")
    told = json.loads(header(tmp_path / "out" / LORA)["lora_adapter_metadata"])
    assert [told[f"{c}.lora_alpha"] for c in PIPELINE] == [1, 2, 4]
    assert "text_projection" in told["text_encoder_2.target_modules"]
    assert not [name for name in told["unet.target_modules"] if name.startswith("unet.")]


def test_comfyui_has_the_keys_that_it_asks_for(adapter: Path, tmp_path: Path) -> None:
    """``diffusion_model.`` and ``text_encoders.`` before the names of its own state dict, as ``comfy/lora.py`` says."""
    loraconv.convert(adapter, out=tmp_path / "out", to="comfyui")
    keys = load_file(tmp_path / "out" / FORMATS["comfyui"].file).keys()
    assert "diffusion_model.output_blocks.3.1.transformer_blocks.0.attn1.to_q.lora_A.weight" in keys
    assert "text_encoders.clip_l.transformer.text_model.encoder.layers.1.mlp.fc1.lora_A.weight" in keys
    assert "text_encoders.clip_g.transformer.text_projection.alpha" in keys


def test_peft_holds_the_unet_alone_because_its_names_have_no_component(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError) as caught:
        loraconv.convert(adapter, out=tmp_path / "all", to="peft")
    assert caught.value.slug == "cannot-carry"
    loraconv.convert(adapter, out=tmp_path / "unet", to="peft", drop=["text_encoder*"])
    config = json.loads((tmp_path / "unet" / "adapter_config.json").read_text())
    assert "mid_block.attentions.0.proj_in" in config["target_modules"]
    loraconv.convert(tmp_path / "unet", out=tmp_path / "again", to="kohya")
    want = load_file(adapter / LORA)["unet.mid_block.attentions.0.proj_in.lora_A.weight"]
    made = load_file(tmp_path / "again" / FORMATS["kohya"].file)
    assert torch.equal(made["lora_unet_middle_block_1_proj_in.lora_down.weight"], want)


def test_names_of_a_text_encoder_without_its_component_are_not_guessed(tmp_path: Path) -> None:
    module = "base_model.model.text_model.encoder.layers.0.mlp.fc1"
    tensors = {f"{module}.lora_A.weight": torch.ones(2, 8), f"{module}.lora_B.weight": torch.ones(8, 2)}
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(FormatError):
        loraconv.convert(tmp_path / "x.safetensors", out=tmp_path / "out", to="kohya", alpha=1)


@pytest.mark.parametrize("name", ["diffusers", "kohya", "comfyui"])
def test_a_split_by_component_is_three_adapters(name: str, tmp_path: Path) -> None:
    form = FORMATS[name]
    want = write(form, "sdxl", tmp_path / "in")
    result = loraconv.split(tmp_path / "in", out=tmp_path / "out", by="component")
    assert sorted(part.name for part in result.parts) == sorted(PIPELINE)
    whole, seen = load_file(tmp_path / "in" / form.file), {}
    for component in PIPELINE:
        part = load_file(tmp_path / "out" / component / form.file)
        assert all(key.startswith(form.components[component]) for key in part)
        seen |= part
        modules = {m for p in result.parts if p.name == component for m in p.modules}
        assert modules == {m for m in want if component_of(m)[0] == component}
    assert seen.keys() == whole.keys()
    assert all(torch.equal(seen[key], tensor) for key, tensor in whole.items())


def test_the_parts_of_a_split_merge_to_the_whole(tmp_path: Path) -> None:
    want = write(FORMATS["kohya"], "sdxl", tmp_path / "in")
    loraconv.split(tmp_path / "in", out=tmp_path / "parts", by="component")
    loraconv.merge(*(tmp_path / "parts" / c for c in PIPELINE), out=tmp_path / "out", to="kohya")
    got = deltas(FORMATS["kohya"], "sdxl", tmp_path / "out")
    assert sorted(got) == sorted(want)
    for module, delta in want.items():
        torch.testing.assert_close(got[module], delta, rtol=1e-12, atol=1e-12, msg=module)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("original", [False, True])
def test_the_proof_has_its_own_names_for_every_module(original: bool, flat: bool) -> None:
    """The verifier counts blocks where the table lists them: both say the same of every module of the real model."""
    prefixes = {f"{component}/": component for component in PIPELINE}
    modules = sorted([*adaptable("sdxl", "SDXL 1.0"), *norms("sdxl", "SDXL 1.0")])
    written = []
    for module in modules:
        component, name = component_of((SPELLINGS["sdxl"].find_part(module) or (module,))[0] if original else module)
        written.append(f"{component}/{name.replace('.', '_') if flat else name}")
    assert of_pipeline(written, prefixes) == modules


def test_the_proof_takes_no_name_for_one_of_sdxl_that_is_none() -> None:
    prefixes = {"": "unet", "te.": "text_encoder"}
    assert of_pipeline(["double_blocks.0.img_attn.qkv"], prefixes) is None
    assert of_pipeline(["middle_block.1.proj_in", "te.text_projection"], prefixes) is None


def test_a_locon_s_modules_are_those_of_diffusers_reader_and_of_the_unet() -> None:
    """Resnets, samplers and attention of sd-scripts' file: our name of each, that of diffusers' own conversion, and the
    width of the real layer."""
    listed = next(one for one in public_lists() if one.name == "kohya/sdxl-locon-sd-scripts")
    unet = components("sdxl", "SDXL 1.0")["unet"]
    layers = {f"unet.{name}": layer.weight.shape for name, layer in unet.named_modules() if hasattr(layer, "weight")}
    sizes = {key: torch.empty(shape, device="meta") for key, (_, shape) in listed.keys(every_step).items() if shape}
    alphas = {key: torch.tensor(4.0) for key, (_, shape) in listed.keys(every_step).items() if not shape}
    mapped = theirs._maybe_map_sgm_blocks_to_diffusers({**sizes, **alphas}, unet.config)
    read, _ = theirs._convert_non_diffusers_lora_to_diffusers(mapped)
    read = convert_unet_state_dict_to_peft(read)
    [naming] = namings("kohya", "sdxl")[:1]
    for key in (key for key in sizes if key.endswith(".lora_down.weight")):
        rule, fields = naming.find(key.removesuffix(".lora_down.weight")) or pytest.fail(key)
        ours = fill(rule.targets[0], fields)
        down, up = (read.pop(f"{ours}.{side}.weight").shape for side in ("lora_A", "lora_B"))
        assert (down, up) == (sizes[key].shape, sizes[key.replace("down", "up")].shape)
        assert (up[0], *down[1:]) == layers[ours], key
    assert read == {}
