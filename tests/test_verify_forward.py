"""``verify --forward``: diffusers itself runs the model with the adapter live, fused, saved and loaded; wrong ones are
told apart, and where nothing would be proved, nothing is called the same.

Fused models are made here by diffusers' own ``fuse_lora``; distances are checked with torch, in double precision.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from safetensors.torch import load_file, save_file

import loraconv
from loraconv.cli import run as cli
from loraconv.errors import FormatError, LoraconvError
from loraconv.verification.forward import ForwardResult, verify_forward
from loraconv.verifier.consumers.inputs import make_inputs, rounding_bound
from tests.cli_support import tiny_run
from tests.conftest import Converted
from tests.sat_run import RunSpec, build
from tests.support import LORA_FILE, RECORDED, Recorded, small

#: A 2B whose adapter has rank 4 and scale 1/4.
TWO_B = RECORDED[0]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small products are slower on several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return CogVideoXTransformer3DModel.from_pretrained(folder, torch_dtype=dtype).eval()


def fused(out: Path, into: Path, *, scale: float = 1.0, dtype: torch.dtype = torch.float32, swap: bool = False) -> Path:
    """What diffusers makes of the base and the adapter in ``out``, saved."""
    model = load(out / "transformer")
    state = load_file(out / LORA_FILE)
    if swap:
        state = {n.replace("to_q", "?").replace("to_k", "to_q").replace("?", "to_k"): t for n, t in state.items()}
    model.load_lora_adapter({n: t.float() for n, t in state.items()}, prefix="transformer")
    model.fuse_lora(lora_scale=scale)
    model.unload_lora()
    model.to(dtype).save_pretrained(into)
    return into


def outputs(result: ForwardResult) -> dict[str, float]:
    return {output.what: output.distance for output in result.outputs}


def refused(call: Callable[[], object]) -> LoraconvError:
    with pytest.raises(LoraconvError) as caught:
        call()
    assert caught.value.hint
    return caught.value


# --- right ones -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recorded", RECORDED, ids=lambda r: r.name)
def test_live_fused_saved_and_loaded_compute_the_same(recorded: Recorded, converted: Converted, tmp_path: Path) -> None:
    out = converted(recorded, what="all")
    result = verify_forward(out / "transformer", recorded.run, fused(out, tmp_path / "fused"))
    assert result.same
    assert result.kind == "fused"
    assert set(outputs(result)) == {"the fused model", "the fused model, saved and loaded", "fused by diffusers"}
    assert max(outputs(result).values()) < 1e-6
    assert min(result.mistakes.values()) > 0.05
    assert result.changed == ()


@pytest.mark.parametrize("to", ["peft", "sat"])
def test_a_converted_adapter_computes_the_same(to: str, converted: Converted, tmp_path: Path) -> None:
    out = converted(TWO_B, what="all")
    loraconv.convert(TWO_B.run, out=tmp_path / to, to=to)
    result = verify_forward(out / "transformer", out / LORA_FILE, tmp_path / to)
    assert result.same
    assert result.kind == "adapter"
    assert outputs(result)["the other adapter"] < 1e-6
    assert "fused by diffusers, saved and loaded" in outputs(result)


def test_an_adapter_in_bf16_is_the_same_but_for_its_rounding(converted: Converted, tmp_path: Path) -> None:
    out = converted(TWO_B, what="all")
    loraconv.convert(TWO_B.run, out=tmp_path / "bf16", to="diffusers", dtype="bf16")
    result = verify_forward(out / "transformer", TWO_B.run, tmp_path / "bf16")
    assert result.same
    assert 1e-5 < outputs(result)["the other adapter"] < 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_fused_model_in_16_bit_is_the_same_but_for_its_rounding(
    dtype: torch.dtype, converted: Converted, tmp_path: Path
) -> None:
    out = converted(TWO_B, what="all")
    result = verify_forward(out / "transformer", TWO_B.run, fused(out, tmp_path / "fused", dtype=dtype))
    assert result.same
    assert outputs(result)["fused by diffusers"] < 1e-6
    assert 1e-5 < outputs(result)["the fused model"] < 0.05
    double = fused(out, tmp_path / "double", dtype=dtype, scale=2.0)
    assert not verify_forward(out / "transformer", TWO_B.run, double).same


def test_a_model_that_takes_an_offset_and_images_runs_too(tmp_path: Path) -> None:
    run = build(small(variant="1.5-5b-i2v", generation="late", lora_alpha=4.0), tmp_path / "run")
    loraconv.sat2diffusers(run, out=tmp_path / "out", what="all")
    model = load(tmp_path / "out" / "transformer")
    assert {"ofs", "image_rotary_emb"} <= set(make_inputs(model.config, "float32"))
    assert verify_forward(tmp_path / "out" / "transformer", run).same


def test_a_pipelines_folder_is_a_model(converted: Converted, tmp_path: Path) -> None:
    out = converted(TWO_B, what="all")
    shutil.copytree(out / "transformer", tmp_path / "pipe" / "transformer")
    (tmp_path / "pipe" / "model_index.json").write_text('{"_class_name": "CogVideoXPipeline"}')
    assert verify_forward(tmp_path / "pipe", TWO_B.run).same


# --- the figures ------------------------------------------------------------------------------------------------------


def test_the_effect_is_the_relative_distance_of_the_two_outputs(converted: Converted) -> None:
    out = converted(TWO_B, what="all")
    result = verify_forward(out / "transformer", TWO_B.run)
    model = load(out / "transformer")
    inputs = make_inputs(model.config, "float32")
    with torch.no_grad():
        base = model(**inputs).sample.double()
        model.load_lora_adapter(out, prefix="transformer", use_safetensors=True)
        live = model(**inputs).sample.double()
    assert result.effect == pytest.approx(float(torch.linalg.norm(base - live) / torch.linalg.norm(live)), rel=1e-6)
    assert result.mistakes["the base model's, without the adapter"] == result.effect


@pytest.mark.parametrize("recorded", RECORDED, ids=lambda r: r.name)
def test_the_error_of_single_precision_is_within_the_bound(recorded: Recorded, converted: Converted) -> None:
    """Against the same model in double precision."""
    folder = converted(recorded, what="base")
    exact, rounded = load(folder).double(), load(folder)
    inputs = make_inputs(rounded.config, "float32")
    wide = {
        name: tuple(t.double() for t in value) if isinstance(value, tuple) else value.double()
        for name, value in inputs.items()
        if name != "timestep"
    }
    with torch.no_grad():
        want = exact(timestep=inputs["timestep"], **wide).sample
        got = rounded(**inputs).sample.double()
    error = float((got - want).norm() / want.norm())
    assert 0 < error <= rounding_bound(rounded.config, inputs, 2.0**-24) < 1e-4


# --- wrong ones -------------------------------------------------------------------------------------------------------

WRONG = {2.0: "twice", 0.5: "half", 0.25: "1/4 of", 4.0: "4 times"}


@pytest.mark.parametrize("scale", WRONG)
def test_a_wrong_strength_is_named(scale: float, converted: Converted, tmp_path: Path) -> None:
    out = converted(TWO_B, what="all")
    wrong = fused(out, tmp_path / "fused", scale=scale)
    result = verify_forward(out / "transformer", TWO_B.run, wrong)
    assert not result.same
    sentences = [finding.sentence for finding in result.findings]
    assert len(sentences) == 2  # as it is, and saved and loaded; what diffusers fuses itself is right
    assert all(f"the adapter's at {WRONG[scale]} its strength" in sentence for sentence in sentences)
    assert all(finding.mend.startswith("loraconv fuse") for finding in result.findings)
    assert cli(["verify", "--forward", "--model", str(out / "transformer"), str(TWO_B.run), str(wrong)]) == 5


def test_a_base_without_the_adapter_is_named(converted: Converted) -> None:
    out = converted(TWO_B, what="all")
    result = verify_forward(out / "transformer", TWO_B.run, out / "transformer")
    assert not result.same
    assert all("without the adapter" in finding.sentence for finding in result.findings)


def test_swapped_modules_are_something_else(converted: Converted, tmp_path: Path) -> None:
    out = converted(TWO_B, what="all")
    result = verify_forward(out / "transformer", TWO_B.run, fused(out, tmp_path / "fused", swap=True))
    assert not result.same
    assert "something else" in result.findings[0].sentence


def test_nan_in_a_fused_model_is_named(converted: Converted, tmp_path: Path) -> None:
    out = converted(TWO_B, what="all")
    folder = fused(out, tmp_path / "fused")
    file = folder / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    state["proj_out.weight"][0, 0] = torch.nan
    save_file(state, file, {"format": "pt"})
    result = verify_forward(out / "transformer", TWO_B.run, folder)
    assert not result.same
    assert all("NaN" in finding.sentence for finding in result.findings)
    assert result.changed == ()
    json.dumps(result.to_dict(), allow_nan=False)


def test_nan_in_the_model_itself_proves_nothing(converted: Converted, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(converted(TWO_B, what="all") / "transformer", folder)
    file = folder / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    state["proj_out.weight"][0, 0] = torch.nan
    save_file(state, file, {"format": "pt"})
    assert refused(lambda: verify_forward(folder, TWO_B.run)).slug == "nonfinite"


def test_a_model_that_diffusers_does_not_load_is_refused_with_its_words(converted: Converted, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(converted(TWO_B, what="all") / "transformer", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attention_head_dim": config["attention_head_dim"] * 2}))
    error = refused(lambda: verify_forward(folder, TWO_B.run))
    assert error.slug == "not-loaded"
    assert "the model" in error.what


def test_an_adapter_that_peft_does_not_take_is_refused_with_its_words(converted: Converted, tmp_path: Path) -> None:
    out = converted(TWO_B, what="all")
    file = tmp_path / LORA_FILE
    config = {"transformer.r": 4, "transformer.lora_alpha": 1, "transformer.nonsense": 1}
    save_file(load_file(out / LORA_FILE), file, {"lora_adapter_metadata": json.dumps(config)})
    error = refused(lambda: verify_forward(out / "transformer", file))
    assert error.slug == "not-loaded"
    assert "the adapter" in error.what
    assert "could not be instantiated" in error.why


def test_another_adapter_at_half_the_strength_is_named(converted: Converted, tmp_path: Path) -> None:
    out = converted(TWO_B, what="all")
    loraconv.convert(TWO_B.run, out=tmp_path / "half", to="diffusers", alpha=0.5)
    result = verify_forward(out / "transformer", TWO_B.run, tmp_path / "half")
    (finding,) = result.findings
    assert finding.sentence == "the other adapter: its output is the adapter's at half its strength"
    assert finding.mend.startswith("loraconv verify ")


def test_a_tensor_that_saving_changes_is_named(converted: Converted, monkeypatch: pytest.MonkeyPatch) -> None:
    save = CogVideoXTransformer3DModel.save_pretrained

    def spoil(self: Any, folder: Path, **options: Any) -> None:
        save(self, folder, **options)
        state = load_file(folder / "diffusion_pytorch_model.safetensors")
        state["proj_out.bias"][0] += 1
        save_file(state, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})

    monkeypatch.setattr(CogVideoXTransformer3DModel, "save_pretrained", spoil)
    result = verify_forward(converted(TWO_B, what="all") / "transformer", TWO_B.run)
    assert not result.same
    assert result.changed == ("proj_out.bias",)
    assert {finding.slug for finding in result.findings} == {"forward", "reload"}


# --- where nothing would be proved ------------------------------------------------------------------------------------


def rescaled(out: Path, into: Path, factor: float) -> Path:
    into.mkdir()
    state = load_file(out / LORA_FILE)
    save_file({n: t * factor if ".lora_B." in n else t for n, t in state.items()}, into / LORA_FILE)
    return into


@pytest.mark.parametrize(("factor", "words"), [(0.0, "does not change the output at all"), (1e-5, "too weak")])
def test_an_adapter_without_effect_proves_nothing(
    factor: float, words: str, converted: Converted, tmp_path: Path
) -> None:
    out = converted(TWO_B, what="all")
    weak = rescaled(out, tmp_path / "weak", factor)
    error = refused(lambda: verify_forward(out / "transformer", weak))
    assert (error.slug, error.exit_code) == ("no-effect", 3)
    assert words in error.what
    assert cli(["verify", "--forward", "--model", str(out / "transformer"), str(weak)]) == 3


def test_a_fused_model_too_coarse_for_the_adapter_proves_nothing(converted: Converted, tmp_path: Path) -> None:
    out = converted(TWO_B, what="all")
    weak = rescaled(out, tmp_path / "weak", 0.01)
    assert verify_forward(out / "transformer", weak).same
    error = refused(lambda: verify_forward(out / "transformer", weak, fused(out, tmp_path / "f", dtype=torch.bfloat16)))
    assert error.slug == "no-effect"
    assert "loraconv verify --base" in error.hint


def test_a_model_that_cannot_be_saved_is_no_traceback(converted: Converted, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Any, folder: Path, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(CogVideoXTransformer3DModel, "save_pretrained", full)
    error = refused(lambda: verify_forward(converted(TWO_B, what="all") / "transformer", TWO_B.run))
    assert error.exit_code == 6
    assert "TMPDIR" in error.hint


def test_a_dtype_too_coarse_for_the_adapter_proves_nothing(converted: Converted) -> None:
    out = converted(TWO_B, what="all")
    error = refused(lambda: verify_forward(out / "transformer", TWO_B.run, dtype="bf16"))
    assert error.slug == "no-effect"
    assert error.hint == "run it again without --dtype"


def test_an_adapter_of_another_size_does_not_fit(converted: Converted, tmp_path: Path) -> None:
    out = converted(TWO_B, what="all")
    error = refused(lambda: verify_forward(out / "transformer", tiny_run(tmp_path)))
    assert (error.slug, error.exit_code) == ("wrong-model", 3)
    assert "16 x 16" in error.why


def test_an_adapter_with_more_layers_does_not_fit(converted: Converted, tmp_path: Path) -> None:
    model = load(converted(TWO_B, what="base"))
    spec = RunSpec(hidden=model.config.attention_head_dim * model.config.num_attention_heads, num_layers=7)
    error = refused(lambda: verify_forward(converted(TWO_B, what="base"), build(spec, tmp_path)))
    assert error.slug == "wrong-model"
    assert "no such module" in error.why


def test_a_fused_model_of_another_shape_is_refused(converted: Converted, tmp_path: Path) -> None:
    out = converted(TWO_B, what="all")
    loraconv.sat2diffusers(tiny_run(tmp_path), out=tmp_path / "other", what="base")
    error = refused(lambda: verify_forward(out / "transformer", TWO_B.run, tmp_path / "other"))
    assert error.slug == "wrong-model"


def test_a_file_whose_keys_diffusers_drops_is_refused(converted: Converted, tmp_path: Path) -> None:
    out = converted(TWO_B, what="all")
    state = {name.removeprefix("transformer."): tensor for name, tensor in load_file(out / LORA_FILE).items()}
    save_file(state, tmp_path / LORA_FILE)
    error = refused(lambda: verify_forward(out / "transformer", tmp_path / LORA_FILE))
    assert (error.slug, error.exit_code) == ("not-loaded", 3)
    assert "0 of the 12 modules" in error.what
    assert "--consumers" in error.hint


def test_what_is_no_cogvideox_is_refused(converted: Converted, tmp_path: Path) -> None:
    shutil.copytree(converted(TWO_B, what="base"), tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "_class_name": "WanTransformer3DModel"}))
    error = refused(lambda: verify_forward(tmp_path / "model", TWO_B.run))
    assert (error.slug, error.exit_code) == ("wrong-model", 3)


def test_a_model_with_tensors_missing_is_refused(converted: Converted, tmp_path: Path) -> None:
    shutil.copytree(converted(TWO_B, what="base"), tmp_path / "model")
    file = tmp_path / "model" / "diffusion_pytorch_model.safetensors"
    save_file({n: t for n, t in load_file(file).items() if n != "proj_out.bias"}, file, {"format": "pt"})
    error = refused(lambda: verify_forward(tmp_path / "model", TWO_B.run))
    assert (error.slug, error.exit_code) == ("not-loaded", 3)
    assert "proj_out.bias" in error.why


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_prints_what_was_run_and_the_json_has_the_documented_keys(
    converted: Converted, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(converted(TWO_B, what="all") / "transformer")
    assert cli(["verify", "--forward", "--model", model, str(TWO_B.run)]) == 0
    text = capsys.readouterr().out
    assert text.startswith("verdict the same forward pass\n  inputs: latents 1x2x16x4x6, ")
    assert "the adapter changes the output by" in text
    assert cli(["verify", "--forward", "--model", model, str(TWO_B.run), "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert set(value) == {
        *("schema", "mode", "same", "findings", "model", "one", "other", "kind", "dtype", "inputs", "effect", "bound"),
        *("outputs", "mistakes", "changed"),
    }
    assert set(value["outputs"][0]) == {"what", "distance", "allowed", "strength", "within"}


@pytest.mark.parametrize(
    "words",
    [
        ["--forward", "A"],
        ["--model", "DIR", "A"],
        ["--forward", "--model", "DIR"],
        ["--forward", "--model", "DIR", "A", "B", "C"],
        ["--forward", "--model", "DIR", "A", "--bound", "1"],
        ["--forward", "--model", "DIR", "A", "--consumers"],
        ["--consumers", "A", "B"],
        ["--consumers", "A", "--dtype", "fp32"],
    ],
)
def test_options_that_do_not_go_together_are_refused(words: list[str]) -> None:
    assert cli(["verify", *words]) == 2


def test_a_model_that_is_not_there_is_no_traceback(tmp_path: Path) -> None:
    error = refused(lambda: verify_forward(tmp_path / "nowhere", TWO_B.run))
    assert error.exit_code == 2
    (tmp_path / "empty").mkdir()
    assert isinstance(refused(lambda: verify_forward(tmp_path / "empty", TWO_B.run)), FormatError | LoraconvError)
