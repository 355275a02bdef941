"""diffusers and peft load what was written, without a word or a scale, and compute what the real model computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel
from peft import PeftModel
from peft.tuners.lora import LoraLayer

import loraconv
from tests.conftest import Converted
from tests.forward import Tables, forward, make_transformer, relative_l2
from tests.sat_run import DIT, RunSpec, build
from tests.support import (
    RECORDED,
    Recorded,
    add_lora,
    expected,
    inputs_of,
    load_transformer,
    merged,
    no_warnings,
    scale_of,
    small,
)

BOUND = 1e-6
each_recorded = pytest.mark.parametrize("recorded", RECORDED, ids=lambda r: r.name)


def native(recorded: Recorded) -> dict[str, Any]:
    """Options that make the files fp32, in which alone such a bound can be met."""
    return {"dtype": "fp32"} if recorded.name.endswith("bf16") else {}


def tables(recorded: Recorded) -> Tables | None:
    """The rotary tables of a 16-bit checkpoint are rounded, and the real model computed with those."""
    if not recorded.name.endswith("bf16"):
        return None
    module = recorded.module
    cosine, sine = (module[f"{DIT}mixins.pos_embed.freqs_{name}"].float() for name in ("cos", "sin"))
    return cosine, sine


def pipeline_of(transformer: CogVideoXTransformer3DModel) -> CogVideoXPipeline:
    return CogVideoXPipeline(
        tokenizer=None, text_encoder=None, vae=None, transformer=transformer, scheduler=CogVideoXDDIMScheduler()
    )


def lora_layers(model: torch.nn.Module) -> list[LoraLayer]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def error(transformer: CogVideoXTransformer3DModel, recorded: Recorded, output: str) -> float:
    reference = recorded.reference
    return relative_l2(forward(transformer, reference, rotary=tables(recorded)), reference[output])


# --- recorded runs --------------------------------------------------------------------------------------------------


@each_recorded
def test_the_base_computes_what_the_real_base_computed(recorded: Recorded, converted: Converted) -> None:
    folder = converted(recorded, what="base", **native(recorded))
    with no_warnings():
        transformer = load_transformer(folder)
    # The base of the 16-bit run was recorded before its weights were rounded; its LoRA output, after.
    bound = 5e-3 if recorded.name.endswith("bf16") else BOUND
    assert error(transformer, recorded, "out_base") <= bound


@each_recorded
@pytest.mark.parametrize("scale_in", ["fold", "metadata"])
def test_the_adapter_computes_what_the_real_lora_computed(
    recorded: Recorded, scale_in: str, converted: Converted, record_property: Any
) -> None:
    transformer = load_transformer(converted(recorded, what="base", **native(recorded)))
    with no_warnings():
        add_lora(transformer, converted(recorded, scale_in=scale_in, **native(recorded)))
    assert len(lora_layers(transformer)) == 12
    found = error(transformer, recorded, "out_lora")
    record_property("relative_l2", found)
    assert found <= BOUND
    # It is the adapter that does it: without it the output is far away.
    transformer.disable_adapters()
    assert error(transformer, recorded, "out_lora") > 0.1


@each_recorded
@pytest.mark.parametrize("scale_in", ["fold", "metadata"])
def test_the_pipeline_loads_the_folder_and_computes_the_same(
    recorded: Recorded, scale_in: str, converted: Converted
) -> None:
    pipeline = pipeline_of(load_transformer(converted(recorded, what="base", **native(recorded))))
    with no_warnings():
        pipeline.load_lora_weights(converted(recorded, scale_in=scale_in, **native(recorded)))
    assert error(pipeline.transformer, recorded, "out_lora") <= BOUND


@each_recorded
def test_fusing_in_diffusers_equals_the_trainers_own_merge(recorded: Recorded, converted: Converted) -> None:
    pipeline = pipeline_of(load_transformer(converted(recorded, what="base", **native(recorded))))
    pipeline.load_lora_weights(converted(recorded, **native(recorded)))
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    assert lora_layers(pipeline.transformer) == []
    assert error(pipeline.transformer, recorded, "out_merged") <= BOUND


@each_recorded
def test_peft_loads_its_own_format_and_computes_the_same(
    recorded: Recorded, converted: Converted, tmp_path: Path
) -> None:
    loraconv.convert(recorded.run, out=tmp_path / "out", to="peft", **native(recorded))
    transformer = load_transformer(converted(recorded, what="base", **native(recorded)))
    with no_warnings():
        model = PeftModel.from_pretrained(transformer, tmp_path / "out").eval()
    assert {layer.scaling["default"] for layer in lora_layers(model)} == {0.25}
    assert error(model.get_base_model(), recorded, "out_lora") <= BOUND


@each_recorded
def test_both_parts_written_at_once_are_the_pair_that_was_trained(recorded: Recorded, converted: Converted) -> None:
    out = converted(recorded, what="all", **native(recorded))
    transformer = load_transformer(out / "transformer")
    with no_warnings():
        add_lora(transformer, out)
    assert error(transformer, recorded, "out_lora") <= BOUND


def test_a_bf16_adapter_as_written_is_the_real_one_after_widening_the_model(converted: Converted) -> None:
    recorded = RECORDED[-1]
    transformer = load_transformer(converted(recorded, what="base"), torch.bfloat16)
    with no_warnings():
        add_lora(transformer, converted(recorded))
    transformer.float()
    assert error(transformer, recorded, "out_lora") <= BOUND


def test_the_adapter_also_fits_a_base_that_did_not_come_from_us(converted: Converted) -> None:
    recorded = RECORDED[1]
    spec_base = make_transformer(recorded.config, load_transformer(converted(recorded, what="base")).state_dict())
    with no_warnings():
        add_lora(spec_base, converted(recorded))
    assert error(spec_base, recorded, "out_lora") <= BOUND


@pytest.mark.parametrize("wrong", [1.0, 1 / 16, 1 / 128])
def test_a_wrong_strength_would_not_pass(wrong: float, converted: Converted) -> None:
    recorded = RECORDED[0]
    transformer = load_transformer(converted(recorded, what="base"))
    add_lora(transformer, converted(recorded), adapter_name="lora")
    transformer.set_adapters(["lora"], [4 * wrong])
    assert error(transformer, recorded, "out_lora") > 0.05


# --- a scale that is no power of two --------------------------------------------------------------------------------

WIDENED = [
    pytest.param(
        small(rank=3, lora_alpha=4.0, dtype=torch.bfloat16, variant="5b", generation="late"), id="rank-3-bf16"
    ),
    pytest.param(small(rank=48, dtype=torch.float16, lora_alpha=16.0), id="rank-48-fp16"),
    pytest.param(small(rank=4, dtype=torch.bfloat16, lora_alpha=10.0), id="alpha-10-bf16"),
]


def truth(spec: RunSpec, out: Path) -> torch.Tensor:
    """The forward pass with the adapter added into the weights in float64."""
    config = dict(load_transformer(out / "transformer").config)
    return forward(make_transformer(config, merged(expected(spec), scale_of(spec))), inputs_of(spec))


@pytest.mark.parametrize("spec", WIDENED)
@pytest.mark.parametrize("through", ["model", "pipeline"])
def test_a_widened_adapter_is_exact_in_an_fp32_model(spec: RunSpec, through: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = loraconv.sat2diffusers(build(spec, tmp_path), out=out, what="all")
    assert any("F32" in notice for notice in result.notices)
    transformer = load_transformer(out / "transformer")
    with no_warnings():
        if through == "model":
            add_lora(transformer, out)
        else:
            pipeline_of(transformer).load_lora_weights(out)
    assert relative_l2(forward(transformer, inputs_of(spec)), truth(spec, out)) <= BOUND


@pytest.mark.parametrize("spec", WIDENED)
@pytest.mark.parametrize("through", ["model", "pipeline"])
def test_a_widened_adapter_runs_in_a_model_of_the_trained_dtype(spec: RunSpec, through: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    loraconv.sat2diffusers(build(spec, tmp_path), out=out, what="all")
    transformer = load_transformer(out / "transformer", spec.dtype)
    with no_warnings():
        if through == "model":
            add_lora(transformer, out)
        else:
            pipeline_of(transformer).load_lora_weights(out)
    output = forward(transformer, inputs_of(spec, spec.dtype))
    assert output.dtype == spec.dtype
    want = truth(spec, out)
    found = relative_l2(output, want)
    assert found < (0.05 if spec.dtype == torch.bfloat16 else 0.01)
    transformer.disable_adapters()
    assert relative_l2(forward(transformer, inputs_of(spec, spec.dtype)), want) > 3 * found
