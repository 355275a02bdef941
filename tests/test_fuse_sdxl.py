"""``fuse`` and its proof for Stable Diffusion XL: each part of the pipeline is what diffusers makes of it in float64.

Convolutions, both text encoders, kohya's names and diffusers'; what is of another part is refused, never left out.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import loraconv
from loraconv.errors import FormatError
from tests.cli_support import digests, parsed_hint, snapshot
from tests.dialect_files import FORMATS, PIPELINE, component_of
from tests.test_sdxl import pipeline

RANK, ALPHA = 2, 1.0
UNET = "diffusion_pytorch_model.safetensors"
WEIGHTS = {"unet": UNET, "text_encoder": "model.safetensors", "text_encoder_2": "model.safetensors"}


def layers(pipe: Any) -> dict[str, torch.nn.Module]:
    """The linear layers and convolutions of a pipeline by the names that files have; transformers 5 leaves one step of
    them out."""
    found = {}
    for part in PIPELINE:
        for name, module in getattr(pipe, part).named_modules():
            if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
                step = "text_model." if part == "text_encoder" and not name.startswith("text_model.") else ""
                found[f"{part}.{step}{name}"] = module
    return found


def factors(seed: int = 3) -> dict[str, torch.Tensor]:
    noise = torch.Generator().manual_seed(seed)
    made = {}
    for name, layer in layers(pipeline()).items():
        out, inside, *kernel = layer.weight.shape  # type: ignore[union-attr, misc]
        ones = [1] * len(kernel)
        made[f"{name}.lora_A.weight"] = torch.randn(RANK, inside, *kernel, generator=noise)
        made[f"{name}.lora_B.weight"] = torch.randn(out, RANK, *ones, generator=noise)
    return made


def write_adapter(file: Path, tensors: dict[str, torch.Tensor]) -> Path:
    config = {}
    for part in PIPELINE:
        names = [component_of(n.rpartition(".lora_")[0])[1] for n in tensors if n.startswith(f"{part}.")]
        own = sorted({name.removeprefix("text_model.") for name in names})
        told = {"r": RANK, "lora_alpha": ALPHA, "target_modules": own}
        config |= {f"{part}.{key}": value for key, value in told.items() if own}
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, file, {"format": "pt", "lora_adapter_metadata": json.dumps(config)})
    return file


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``pipe``, a pipeline's folder; an adapter on every layer of it in diffusers' names and in kohya's; one on the
    UNet alone."""
    home = tmp_path_factory.mktemp("sdxl")
    torch.manual_seed(0)
    pipeline().save_pretrained(home / "pipe")
    tensors = factors()
    whole = write_adapter(home / "diffusers" / FORMATS["diffusers"].file, tensors)
    write_adapter(home / "unet.safetensors", {n: t for n, t in tensors.items() if n.startswith("unet.")})
    loraconv.convert(whole, out=home / "kohya", to="kohya")
    return home


def weights(folder: Path, part: str) -> dict[str, torch.Tensor]:
    return load_file(folder / WEIGHTS[part])


def loaded(folder: Path) -> Any:
    from diffusers import StableDiffusionXLPipeline

    absent: Any = dict.fromkeys(("vae", "scheduler", "tokenizer", "tokenizer_2"))
    return StableDiffusionXLPipeline.from_pretrained(folder, **absent)


def fused_by_diffusers(home: Path, file: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Part -> its state dict once diffusers has loaded the file and fused it in float64."""
    pipe = loaded(home / "pipe")
    pipe.load_lora_weights(str(file.parent), weight_name=file.name)
    for part in PIPELINE:
        getattr(pipe, part).double()
    pipe.fuse_lora(components=list(PIPELINE))
    pipe.unload_lora_weights()
    return {part: getattr(pipe, part).state_dict() for part in PIPELINE}


@pytest.mark.parametrize("dialect", ["diffusers", "kohya"])
def test_every_part_becomes_what_diffusers_makes_of_it_in_float64(home: Path, tmp_path: Path, dialect: str) -> None:
    file = home / dialect / FORMATS[dialect].file
    want = fused_by_diffusers(home, file)
    for part in PIPELINE:
        base, out, own = home / "pipe" / part, tmp_path / part, [f"{part}.*"]
        result = loraconv.fuse(file, base=base, out=out, modules=own)
        touched = {f"{name}.weight" for name, _ in map(_in_file, layers(pipeline())) if _ == part}
        got, before = weights(out, part), weights(base, part)
        assert {n for n in got if not torch.equal(got[n], before[n])} == set(result.fused) == touched
        assert [n for n, t in want[part].items() if not torch.equal(t.float(), got[n])] == []
        assert loraconv.verify(file, out, base=base, modules=own).same


def _in_file(name: str) -> tuple[str, str]:
    """The name of a layer in its part's own file, and that part."""
    part, inner = component_of(name)
    return (inner.removeprefix("text_model.") if part == "text_encoder" else inner), part


@pytest.mark.parametrize("rest", ["copy", "link"])
def test_of_a_pipeline_with_a_unet_that_alone_is_written_anew(home: Path, tmp_path: Path, rest: Any) -> None:
    base, out = home / "pipe", tmp_path / "out"
    before = snapshot(base)
    result = loraconv.fuse(home / "unet.safetensors", base=base, out=out, rest=rest)
    assert result.proofs[0].passed
    for file in ("model_index.json", "text_encoder/model.safetensors", "text_encoder_2/config.json"):
        assert (out / file).read_bytes() == (base / file).read_bytes()
        assert (out / file).is_symlink() == (rest == "link")
    assert not any(file.is_symlink() for file in (out / "unet").iterdir())
    assert loraconv.verify(out).same
    assert loraconv.verify(home / "unet.safetensors", out, base=base).same
    assert snapshot(base) == before
    unet = loaded(out).unet.state_dict()
    alone = loraconv.fuse(home / "unet.safetensors", base=base / "unet", out=tmp_path / "alone").out
    assert all(torch.equal(unet[name], tensor) for name, tensor in weights(alone, "unet").items())


def test_the_file_that_diffusers_itself_saves_is_fused_as_it_was_live(home: Path, tmp_path: Path) -> None:
    """With transformers 5 the keys of the first text encoder lack the step ``text_model``; the header has the scale."""
    from diffusers import StableDiffusionXLPipeline
    from peft import LoraConfig, get_peft_model_state_dict

    pipe, saved = loaded(home / "pipe"), {}
    for part in PIPELINE:
        model = getattr(pipe, part)
        own = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)]
        config = LoraConfig(r=RANK, lora_alpha=4 * RANK, target_modules=own, init_lora_weights=False)
        model.add_adapter(config)
        saved[f"{part}_lora_layers"] = get_peft_model_state_dict(model)
        saved[f"{part}_lora_adapter_metadata"] = config.to_dict()
    StableDiffusionXLPipeline.save_lora_weights(tmp_path, **saved)
    file = tmp_path / FORMATS["diffusers"].file
    for part in PIPELINE:
        base, own = home / "pipe" / part, [f"{part}.*"]
        out = loraconv.fuse(file, base=base, out=tmp_path / part, modules=own).out
        got, live = weights(out, part), getattr(pipe, part)
        for name, layer in live.named_modules():
            if hasattr(layer, "lora_A"):
                delta = layer.double().get_delta_weight("default")
                want = layer.get_base_layer().weight + delta
                assert torch.equal(got[f"{name}.weight"], want.float()), name
        assert loraconv.verify(file, out, base=base, modules=own).same


def test_a_unet_may_be_one_file_without_settings(home: Path, tmp_path: Path) -> None:
    shutil.copy(home / "pipe" / "unet" / UNET, tmp_path / "any.safetensors")
    loraconv.fuse(home / "unet.safetensors", base=tmp_path / "any.safetensors", out=tmp_path / "out")
    loraconv.fuse(home / "unet.safetensors", base=home / "pipe" / "unet", out=tmp_path / "folder")
    one, other = load_file(tmp_path / "out" / "any.safetensors"), weights(tmp_path / "folder", "unet")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], tensor) for name, tensor in other.items())


def test_a_clip_model_of_older_transformers_has_the_same_homes(home: Path, tmp_path: Path) -> None:
    """Before version 5, ``save_pretrained`` wrote ``text_model.`` before the names of a ``CLIPTextModel``."""
    own = ["text_encoder.*"]
    loraconv.fuse(home / "diffusers", base=home / "pipe" / "text_encoder", out=tmp_path / "new", modules=own)
    old = tmp_path / "old"
    shutil.copytree(home / "pipe" / "text_encoder", old)
    save_file({f"text_model.{n}": t for n, t in weights(old, "text_encoder").items()}, old / "model.safetensors")
    loraconv.fuse(home / "diffusers", base=old, out=tmp_path / "out", modules=own)
    assert loraconv.verify(home / "diffusers", tmp_path / "out", base=old, modules=own).same
    want = weights(tmp_path / "new", "text_encoder")
    got = weights(tmp_path / "out", "text_encoder")
    assert got.keys() == {f"text_model.{name}" for name in want}
    assert all(torch.equal(got[f"text_model.{name}"], tensor) for name, tensor in want.items())


def test_in_place_and_back_restores_unet_and_kernels_bit_for_bit(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "pipe", tmp_path / "pipe")
    before = digests(tmp_path / "pipe")
    loraconv.fuse(home / "unet.safetensors", base=tmp_path / "pipe", in_place=True)
    after = digests(tmp_path / "pipe")
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == {f"unet/{name}" for name in (UNET, "loraconv.json", "loraconv.journal")}
    loraconv.unfuse(tmp_path / "pipe" / "unet", out=tmp_path / "back")
    assert digests(tmp_path / "back")[UNET] == before[f"unet/{UNET}"]


def test_a_copy_of_the_pipeline_gets_every_part_in_place_and_gives_each_back(home: Path, tmp_path: Path) -> None:
    file, copy = home / "kohya" / FORMATS["kohya"].file, tmp_path / "pipe"
    shutil.copytree(home / "pipe", copy)
    before = digests(copy)
    for part in PIPELINE:
        loraconv.fuse(file, base=copy / part, modules=[f"{part}.*"], in_place=True)
    pipe, want = loaded(copy), fused_by_diffusers(home, file)
    for part in PIPELINE:
        state = getattr(pipe, part).state_dict()
        assert [n for n, t in want[part].items() if not torch.equal(t.float(), state[n])] == []
        loraconv.unfuse(copy / part, out=tmp_path / part)
        assert digests(tmp_path / part)[WEIGHTS[part]] == before[f"{part}/{WEIGHTS[part]}"]


def test_a_whole_pipeline_comes_back_from_its_journal(home: Path, tmp_path: Path) -> None:
    loraconv.fuse(home / "unet.safetensors", base=home / "pipe", out=tmp_path / "out", journal=True)
    loraconv.unfuse(tmp_path / "out", out=tmp_path / "back")
    before, after = digests(home / "pipe"), digests(tmp_path / "back")
    assert {name: after[name] for name in before} == before


@pytest.mark.parametrize("base", ["pipe", "pipe/unet", "pipe/text_encoder", "pipe/text_encoder_2"])
def test_modules_of_other_parts_are_refused_with_the_command_that_leaves_them_out(
    home: Path, tmp_path: Path, base: str
) -> None:
    with pytest.raises(FormatError) as caught:
        loraconv.fuse(home / "diffusers", base=home / base, out=tmp_path / "out")
    own = "unet" if base == "pipe" else base.rpartition("/")[2]
    others = sorted(part for part in PIPELINE if part != own)
    assert caught.value.slug == "other-component"
    assert f"are of {' and '.join(others)}, and the base is {own}" in caught.value.what
    assert caught.value.hint is not None
    command = caught.value.hint.partition(";")[0]
    parsed_hint(command)
    assert f"--modules '{own}.*'" in command
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_another_part_alone_is_refused_by_its_name(home: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError) as caught:
        loraconv.fuse(home / "unet.safetensors", base=home / "pipe" / "text_encoder_2", out=tmp_path / "out")
    assert caught.value.slug == "other-component"
    assert caught.value.hint == "pass the pipeline's folder unet/ as --base"


def test_the_proof_says_that_modules_of_another_part_are_not_in_the_model(home: Path, tmp_path: Path) -> None:
    """A consumer that fuses the UNet and forgets the text encoders has not fused the adapter."""
    base = home / "pipe" / "unet"
    loraconv.fuse(home / "diffusers", base=base, out=tmp_path / "out", modules=["unet.*"])
    assert loraconv.verify(home / "unet.safetensors", tmp_path / "out", base=base).same
    found = loraconv.verify(home / "diffusers", tmp_path / "out", base=base)
    assert not found.same
    assert any("text_encoder.text_model" in finding.sentence for finding in found.findings)


def test_the_encoders_are_not_taken_for_each_other(home: Path, tmp_path: Path) -> None:
    """Names and, here, shapes of both are the same, but for the second's projection."""
    tensors = {n: t for n, t in factors().items() if n.startswith("text_encoder_2.") and "projection" not in n}
    second = write_adapter(tmp_path / "second.safetensors", tensors)
    first = write_adapter(
        tmp_path / "first.safetensors", {n.replace("encoder_2", "encoder"): t for n, t in tensors.items()}
    )
    for name, file, other in (("text_encoder", first, second), ("text_encoder_2", second, first)):
        base, out = home / "pipe" / name, tmp_path / name
        loraconv.fuse(file, base=base, out=out)
        assert loraconv.verify(file, out, base=base).same
        with pytest.raises(FormatError) as caught:
            loraconv.verify(other, out, base=base)
        assert caught.value.slug == "not-comparable"
        with pytest.raises(FormatError) as caught:
            loraconv.fuse(other, base=base, out=tmp_path / "none")
        assert caught.value.slug == "other-component"


@pytest.mark.parametrize("spoil", ["kernel turned", "kernel forgotten", "number of another layer"])
def test_the_proof_sees_a_wrong_kernel(home: Path, tmp_path: Path, spoil: str) -> None:
    base = home / "pipe" / "unet"
    out = loraconv.fuse(home / "unet.safetensors", base=base, out=tmp_path / "out").out
    tensors, before = weights(out, "unet"), weights(base, "unet")
    name = "down_blocks.0.resnets.0.conv1.weight"
    if spoil == "kernel turned":
        tensors[name] = before[name] + (tensors[name] - before[name]).transpose(2, 3)
    elif spoil == "kernel forgotten":
        tensors[name] = before[name]
    else:
        tensors["conv_norm_out.weight"] = tensors["conv_norm_out.weight"] + 1
    save_file({n: t.contiguous() for n, t in tensors.items()}, out / UNET, {"format": "pt"})
    found = loraconv.verify(home / "unet.safetensors", out, base=base)
    assert not found.same
    wrong = name if spoil.startswith("kernel") else "conv_norm_out.weight"
    assert any(wrong.removesuffix(".weight") in finding.sentence for finding in found.findings)


DORA = {
    "unet": {"lora_unet_input_blocks_1_0_in_layers_2": "down_blocks.0.resnets.0.conv1"},
    "text_encoder_2": {"lora_te2_text_model_encoder_layers_0_mlp_fc1": "text_model.encoder.layers.0.mlp.fc1"},
}


@pytest.mark.parametrize("part", DORA)
def test_a_dora_in_kohya_s_names_is_fused_by_its_definition(home: Path, tmp_path: Path, part: str) -> None:
    """``m * (W + s B A) / || W + s B A ||``, the norm over all numbers of an output channel, in float64."""
    before = weights(home / "pipe" / part, part)
    ((there, here),) = DORA[part].items()
    weight = before[f"{here}.weight"]
    out, inside, *kernel = weight.shape
    torch.manual_seed(8)
    down, up = torch.randn(RANK, inside, *kernel), torch.randn(out, RANK, *[1 for _ in kernel])
    magnitude = torch.rand(out, 1, *[1 for _ in kernel]) + 0.5
    sides = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(ALPHA), "dora_scale": magnitude}
    file = tmp_path / "dora.safetensors"
    save_file({f"{there}.{side}": tensor for side, tensor in sides.items()}, file)
    result = loraconv.fuse(file, base=home / "pipe" / part, out=tmp_path / "out")
    delta = ALPHA / RANK * (up.double().reshape(out, RANK) @ down.double().reshape(RANK, -1))
    total = weight.double().reshape(out, -1) + delta
    want = (magnitude.double().reshape(out, 1) * total / total.norm(dim=1, keepdim=True)).reshape(weight.shape)
    got = weights(result.out, part)
    assert torch.equal(got.pop(f"{here}.weight"), want.float())
    assert all(torch.equal(tensor, before[name]) for name, tensor in got.items())
    assert loraconv.verify(file, result.out, base=home / "pipe" / part).same
