"""diffusers' own conversion functions, which nobody here wrote: ours must give the delta that theirs give.

Each file has what the function expects of a real one (every projection of a block), and nothing that it refuses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from diffusers.loaders import lora_conversion_utils as theirs
from safetensors.torch import load_file, save_file

import loraconv
from loraconv.errors import FormatError

Tensors = dict[str, torch.Tensor]
HIDDEN = 8


def adapter(modules: dict[str, int], ends: tuple[str, str], alpha: float | None, rank: int = 4) -> Iterator[tuple]:
    """Random factors for modules (as the file names them) of so many rows."""
    noise = torch.Generator().manual_seed(0)
    for module, rows in modules.items():
        yield f"{module}.{ends[0]}.weight", torch.randn(rank, HIDDEN, generator=noise)
        yield f"{module}.{ends[1]}.weight", torch.randn(rows, rank, generator=noise)
        if alpha is not None:
            yield f"{module}.alpha", torch.tensor(alpha)


AB, DOWN_UP = ("lora_A", "lora_B"), ("lora_down", "lora_up")
WAN = [f"{a}_attn.{q}" for a in ("self", "cross") for q in "qkvo"] + ["ffn.0", "ffn.2"]
FLUX_DOUBLE = {
    **{f"{s}_attn_qkv": 24 for s in ("img", "txt")},
    **{f"{s}_attn_proj": 8 for s in ("img", "txt")},
    **{f"{s}_mlp_0": 32 for s in ("img", "txt")},
    **{f"{s}_mlp_2": 8 for s in ("img", "txt")},
    **{f"{s}_mod_lin": 48 for s in ("img", "txt")},
}
FLUX_SINGLE = {"linear1": 56, "linear2": 8, "modulation_lin": 24}
LTX = [f"attn{n}.to_{q}" for n in (1, 2) for q in ("q", "k", "v", "out.0")] + ["ff.net.0.proj", "ff.net.2"]
HUNYUAN_DOUBLE = {
    **{f"{s}_attn_qkv": 24 for s in ("img", "txt")},
    **{f"{s}_attn_proj": 8 for s in ("img", "txt")},
    **{f"{s}_mlp.fc1": 32 for s in ("img", "txt")},
    **{f"{s}_mlp.fc2": 8 for s in ("img", "txt")},
    **{f"{s}_mod.linear": 48 for s in ("img", "txt")},
}
HUNYUAN_SINGLE = {"linear1": 56, "linear2": 8, "modulation.linear": 24}
QWEN = [f"attn.{m}" for m in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj")]

Z_IMAGE = [f"attention.{m}" for m in ("to_q", "to_k", "to_v", "to_out.0")] + [f"feed_forward.w{n}" for n in (1, 2, 3)]


def kohya(modules: dict[str, int]) -> dict[str, int]:
    return {"lora_unet_" + module.replace(".", "_"): rows for module, rows in modules.items()}


def layers(name: str, count: int, modules: dict[str, int]) -> dict[str, int]:
    return {f"{name}.{n}.{module}": rows for n in range(count) for module, rows in modules.items()}


def eights(modules: list[str]) -> dict[str, int]:
    return dict.fromkeys(modules, HIDDEN)


def wide(modules: dict[str, int]) -> dict[str, int]:
    """The rows of the real models: these functions know no other width than 3072."""
    return {module: rows // HIDDEN * 3072 for module, rows in modules.items()}


FLUX = wide({**layers("double_blocks", 1, FLUX_DOUBLE), **layers("single_blocks", 2, FLUX_SINGLE)})
HUNYUAN = wide({**layers("double_blocks", 1, HUNYUAN_DOUBLE), **layers("single_blocks", 2, HUNYUAN_SINGLE)})


def comfy(modules: dict[str, int]) -> dict[str, int]:
    return {f"diffusion_model.{module}": rows for module, rows in modules.items()}


CASES = {
    "wan": ("_convert_non_diffusers_wan_lora_to_diffusers", comfy(layers("blocks", 2, eights(WAN))), AB, None),
    "wan-down-up": (
        "_convert_non_diffusers_wan_lora_to_diffusers",
        comfy(layers("blocks", 2, eights(WAN))),
        DOWN_UP,
        2.0,
    ),
    "musubi-wan": (
        "_convert_musubi_wan_lora_to_diffusers",
        kohya(layers("blocks", 2, eights(WAN))),
        DOWN_UP,
        2.0,
    ),
    "flux-kohya": ("_convert_kohya_flux_lora_to_diffusers", kohya(FLUX), DOWN_UP, 2.0),
    "hunyuan-video": ("_convert_hunyuan_video_lora_to_diffusers", comfy(HUNYUAN), AB, None),
    "ltx-video": (
        "_convert_non_diffusers_ltxv_lora_to_diffusers",
        comfy(layers("transformer_blocks", 2, eights(LTX))),
        AB,
        None,
    ),
    "qwen-image": (
        "_convert_non_diffusers_qwen_lora_to_diffusers",
        comfy(layers("transformer_blocks", 2, eights(QWEN))),
        AB,
        None,
    ),
    "z-image": (
        "_convert_non_diffusers_z_image_lora_to_diffusers",
        comfy(layers("layers", 2, eights(Z_IMAGE))),
        AB,
        2.0,
    ),
    "z-image-kohya": (
        "_convert_non_diffusers_z_image_lora_to_diffusers",
        kohya(layers("layers", 2, eights(Z_IMAGE))),
        DOWN_UP,
        2.0,
    ),
    "z-image-fused-kohya": (
        "_convert_non_diffusers_z_image_lora_to_diffusers",
        kohya(layers("layers", 2, {"attention.qkv": 24, "attention.out": 8, "adaLN_modulation.0": 32})),
        DOWN_UP,
        2.0,
    ),
    "qwen-image-kohya": (
        "_convert_non_diffusers_qwen_lora_to_diffusers",
        kohya(layers("transformer_blocks", 2, eights(QWEN))),
        DOWN_UP,
        2.0,
    ),
}


def products(tensors: Tensors) -> Tensors:
    names = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
    assert len(tensors) == 2 * len(names)
    made = {n: tensors[f"{n}.lora_B.weight"].double() @ tensors[f"{n}.lora_A.weight"].double() for n in names}
    return {name.removeprefix("transformer."): delta for name, delta in made.items()}


@pytest.mark.parametrize("case", CASES)
def test_the_delta_is_the_one_of_diffusers_own_conversion(case: str, tmp_path: Path) -> None:
    function, modules, ends, alpha = CASES[case]
    tensors = dict(adapter(modules, ends, alpha))
    save_file(tensors, tmp_path / "adapter.safetensors")
    convert: Callable[[Tensors], Tensors] = getattr(theirs, function)
    want = products(convert({name: tensor.clone() for name, tensor in tensors.items()}))
    family = case.removesuffix("-kohya").removesuffix("-down-up").removesuffix("-fused").removeprefix("musubi-")
    loraconv.convert(tmp_path / "adapter.safetensors", out=tmp_path / "out", to="diffusers", family=family)
    got = products(load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors"))
    assert sorted(got) == sorted(want)
    for module, delta in want.items():
        # Every scale is a power of two, which rounds nothing: only the order of float64 sums may differ.
        torch.testing.assert_close(got[module], delta, rtol=1e-12, atol=1e-12, msg=module)


def test_a_file_of_wan_2_2_is_for_the_transformer_that_its_user_says(tmp_path: Path) -> None:
    """diffusers has one prefix for both transformers: ``transformer_2.`` is what it neither writes nor loads."""
    tensors = dict(adapter(comfy(layers("blocks", 2, eights(WAN))), DOWN_UP, 2.0))
    save_file(tensors, tmp_path / "low_noise.safetensors")
    loraconv.convert(tmp_path / "low_noise.safetensors", out=tmp_path / "out", to="diffusers")
    small = {"num_attention_heads": 1, "attention_head_dim": HIDDEN, "num_layers": 2, "ffn_dim": HIDDEN}
    models = [WanTransformer3DModel(**small, text_dim=HIDDEN, freq_dim=HIDDEN) for _ in range(2)]
    pipe = WanPipeline(None, None, None, None, transformer=models[0], transformer_2=models[1])
    pipe.load_lora_weights(str(tmp_path / "out"), load_into_transformer_2=True)
    found = {name: layer for name, layer in models[1].named_modules() if hasattr(layer, "get_delta_weight")}
    want = products(theirs._convert_non_diffusers_wan_lora_to_diffusers(dict(tensors)))
    assert sorted(found) == sorted(want)
    for name, layer in found.items():
        got = layer.get_delta_weight("default_0").double()
        # float32 sums of four products of which each is below 32: 4 * 4 * 32 * 2**-24 < 4e-5
        torch.testing.assert_close(got, want[name], rtol=0, atol=4e-5, msg=name)
    assert not getattr(models[0], "peft_config", None)


def test_a_second_transformer_s_prefix_is_not_guessed_to_be_the_first_s(tmp_path: Path) -> None:
    names = {f"transformer_2.blocks.0.attn1.to_{q}": HIDDEN for q in "qkv"}
    save_file(dict(adapter(names, AB, None)), tmp_path / "x.safetensors")
    with pytest.raises(FormatError) as caught:
        loraconv.convert(tmp_path / "x.safetensors", out=tmp_path / "out", to="kohya")
    assert caught.value.slug == "format-unknown"
