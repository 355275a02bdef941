"""The model of a run and what is trained in it: the architecture of every variant, factors where they were asked
for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler, CogVideoXTransformer3DModel
from safetensors.torch import load_file, save_file

from loraconv.data import DataSettings
from loraconv.errors import CorruptCheckpoint, FormatError, TrainingStopped, UsageError
from loraconv.trainer import run
from loraconv.trainer.adapters import prepare
from loraconv.trainer.model import Base, load_base
from loraconv.trainer.settings import LoraSettings, ModelSettings
from loraconv.trainer.tiny import CONFIGS
from loraconv.trainer.world import joined
from tests.train_support import VARIANTS, full, session, short

pytest_plugins = ["tests.train_fixtures"]

# config.json and scheduler_config.json of THUDM/CogVideoX-2b, -5b, -5b-I2V, CogVideoX1.5-5B and CogVideoX1.5-5B-I2V:
# rotary, learned, patch_size_t, in_channels, ofs_embed_dim, patch_bias, snr_shift_scale.
RELEASED: dict[str, tuple[Any, ...]] = {
    "2b":      (False, False, None, 16, None, True, 3.0),
    "5b":      (True, False, None, 16, None, True, 1.0),
    "5b-i2v":  (True, True, None, 32, None, True, 1.0),
    "1.5":     (True, False, 2, 16, None, False, 1.0),
    "1.5-i2v": (True, False, 2, 32, True, False, 1.0),
}  # fmt: skip


def tiny(variant: str, **changes: Any) -> Base:
    return load_base(ModelSettings(tiny=variant, **changes), 0, "lora")


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_tiny_model_has_the_architecture_of_the_released_one(variant: str) -> None:
    base = tiny(variant)
    config, ofs = base.config, RELEASED[variant][4]
    assert (
        config.use_rotary_positional_embeddings,
        config.use_learned_positional_embeddings,
        config.patch_size_t,
        config.in_channels,
        config.ofs_embed_dim and True,
        config.patch_bias,
        base.scheduler.config.snr_shift_scale,
    ) == RELEASED[variant]
    assert (base.image, config.ofs_embed_dim is not None) == (variant.endswith("i2v"), ofs is True)
    needs = base.needs(DataSettings(), "fp32", "cpu")
    assert needs.image == base.image
    assert needs.frames % (config.patch_size_t or 1) == 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_scheduler_has_zero_terminal_snr_and_predicts_v(variant: str) -> None:
    scheduler = tiny(variant).scheduler
    assert float(scheduler.alphas_cumprod[-1]) == 0
    assert scheduler.config.prediction_type == "v_prediction"


def test_the_same_seed_makes_the_same_model_and_another_seed_another() -> None:
    one, same, other = (load_base(ModelSettings(tiny="2b"), seed, "lora") for seed in (3, 3, 4))
    assert one.fingerprint == same.fingerprint != other.fingerprint


def test_the_fingerprint_changes_with_a_single_bit_a_name_or_a_shape() -> None:
    from loraconv.data.tensors import InMemory
    from loraconv.trainer.model import fingerprint

    tensor = torch.arange(6.0)
    nearly = tensor.clone()
    nearly[3] = torch.nextafter(nearly[3], torch.tensor(9.0))
    kinds = [{"a": tensor}, {"b": tensor}, {"a": nearly}, {"a": tensor.view(2, 3)}, {"a": tensor.double()}]
    assert len({fingerprint({n: InMemory(t) for n, t in kind.items()}) for kind in kinds}) == len(kinds)


def test_making_a_model_leaves_the_random_state_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    session(short())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_base_is_in_the_precision_asked_for_and_the_factors_are_fp32(precision: str) -> None:
    made = session(short(model=ModelSettings(tiny="2b", precision=precision)))
    base = {t.dtype for n, t in made.base.transformer.state_dict().items() if ".lora_" not in n}
    assert base == {{"bf16": torch.bfloat16, "fp16": torch.float16}[precision]}
    assert {t.parameter.dtype for t in made.trainees.parameters} == {torch.float32}


def test_a_full_fine_tune_keeps_every_weight_in_fp32() -> None:
    made = session(full(model=ModelSettings(tiny="2b", precision="bf16")))
    assert {t.parameter.dtype for t in made.trainees.parameters} == {torch.float32}
    assert len(made.trainees.parameters) == len(list(made.base.transformer.parameters()))


# --- from a folder ----------------------------------------------------------------------------------------------------


def pipeline(folder: Path, variant: str = "5b", **scheduler: Any) -> CogVideoXTransformer3DModel:
    """A pipeline folder as diffusers writes it, without VAE and text encoder."""
    model = CogVideoXTransformer3DModel(**CONFIGS[variant])
    model.save_pretrained(folder / "transformer")
    if scheduler:
        CogVideoXDPMScheduler(**scheduler).save_pretrained(folder / "scheduler")
    return model


def test_a_pipeline_folder_is_read_with_its_own_scheduler(tmp_path: Path) -> None:
    model = pipeline(tmp_path, prediction_type="v_prediction", snr_shift_scale=2.0, rescale_betas_zero_snr=True)
    base = load_base(ModelSettings(path=str(tmp_path)), 0, "lora")
    assert isinstance(base.scheduler, CogVideoXDPMScheduler)
    assert base.scheduler.config.snr_shift_scale == 2.0
    for name, tensor in model.state_dict().items():
        assert torch.equal(base.transformer.state_dict()[name], tensor), name


@pytest.mark.parametrize(("variant", "shift"), [("2b", 3.0), ("5b", 1.0)])
def test_a_transformer_folder_alone_gets_the_scheduler_of_the_released_model(
    tmp_path: Path, variant: str, shift: float
) -> None:
    pipeline(tmp_path, variant)
    base = load_base(ModelSettings(path=str(tmp_path / "transformer")), 0, "lora")
    assert isinstance(base.scheduler, CogVideoXDDIMScheduler)
    assert base.scheduler.config.snr_shift_scale == shift


def test_the_fingerprint_of_a_folder_is_that_of_its_bytes_in_any_precision(tmp_path: Path) -> None:
    pipeline(tmp_path)
    made = [load_base(ModelSettings(path=str(tmp_path), precision=p), 0, "lora").fingerprint for p in ("fp32", "bf16")]
    assert len(set(made)) == 1


def test_another_model_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "WanTransformer3DModel"}))
    with pytest.raises(FormatError, match="no CogVideoX") as error:
        load_base(ModelSettings(path=str(tmp_path)), 0, "lora")
    assert "WanTransformer3DModel" in error.value.why


def test_a_scheduler_that_predicts_noise_is_refused(tmp_path: Path) -> None:
    pipeline(tmp_path, prediction_type="epsilon")
    with pytest.raises(FormatError, match="v-prediction"):
        load_base(ModelSettings(path=str(tmp_path)), 0, "lora")


@pytest.mark.parametrize("path", ["no/such", "not a name", "/nowhere/at/all"])
def test_a_model_that_is_nowhere_is_an_error_without_a_look_at_the_network(path: str) -> None:
    with pytest.raises(UsageError, match="not in the local cache"):
        load_base(ModelSettings(path=path), 0, "lora")


@pytest.mark.parametrize("both", [{}, {"path": "x", "tiny": "2b"}])
def test_no_model_and_two_models_are_usage_errors(both: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="one model"):
        load_base(ModelSettings(**both), 0, "lora")


# --- what is trained --------------------------------------------------------------------------------------------------


def modules(**lora: Any) -> dict[str, tuple[int, float]]:
    """Module -> rank and the scale that peft applies."""
    base = tiny("2b")
    made = prepare(base.transformer, short(lora=LoraSettings(**lora)))
    layers = {m.module: base.transformer.get_submodule(m.module) for m in made.modules}
    return {name: (layer.r["default"], layer.scaling["default"]) for name, layer in layers.items()}


def test_the_default_targets_are_the_attention_projections_of_every_layer() -> None:
    kinds = ("to_q", "to_k", "to_v", "to_out.0")
    assert sorted(modules()) == sorted(f"transformer_blocks.{i}.attn1.{k}" for i in (0, 1) for k in kinds)


def test_targets_ranks_alphas_and_layers_go_by_pattern() -> None:
    made = modules(
        rank=4, alpha=2.0, targets=("attn1.to_q", "ff.*"), layers="1", ranks={"ff.*": 8, "ff.net.2": 2},
        alphas={"ff.net.2": 3.0},
    )  # fmt: skip
    block = "transformer_blocks.1."
    assert made == {
        f"{block}attn1.to_q": (4, 0.5),
        f"{block}ff.net.0.proj": (8, 0.25),
        f"{block}ff.net.2": (2, 1.5),
    }


def test_rslora_divides_by_the_root_of_the_rank() -> None:
    assert {scale for _, scale in modules(rank=16, alpha=8.0, rslora=True).values()} == {2.0}


def test_dora_trains_the_magnitudes_too() -> None:
    base = tiny("2b")
    made = prepare(base.transformer, short(lora=LoraSettings(dora=True, targets=("attn1.to_q",))))
    assert [t.side for t in made.parameters] == ["down", "up", "other"] * 2
    weight = base.transformer.get_submodule(made.modules[0].module).base_layer.weight
    assert torch.allclose(made.modules[0].magnitude, weight.norm(dim=1))


def test_only_the_factors_learn_and_up_begins_at_zero() -> None:
    base = tiny("5b")
    made = prepare(base.transformer, short("5b"))
    learning = {id(p) for p in base.transformer.parameters() if p.requires_grad}
    assert learning == {id(t.parameter) for t in made.parameters}
    assert all(not m.up.any() and m.down.any() for m in made.modules)


@pytest.mark.parametrize(
    "lora",
    [
        {"targets": ("attn2.to_q",)},
        {"ranks": {"attn3": 4}},
        {"alphas": {"attn3": 4.0}},
        {"layers": "5"},
        {"layers": "a-b"},
    ],
)
def test_a_pattern_or_layer_that_is_not_there_is_an_error(lora: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        modules(**lora)


def test_frozen_parts_of_a_full_fine_tune_do_not_learn() -> None:
    made = prepare(tiny("2b").transformer, full(frozen=("patch_embed.*", "*.bias", "norm_final")))
    names = [t.name for t in made.parameters]
    assert names
    assert not [n for n in names if n.startswith(("patch_embed.", "norm_final.")) or n.endswith(".bias")]


@pytest.mark.parametrize("frozen", [("no_such_part",), ("*",)])
def test_freezing_nothing_or_everything_is_an_error(frozen: tuple[str, ...]) -> None:
    with pytest.raises(UsageError):
        prepare(tiny("2b").transformer, full(frozen=frozen))


@pytest.mark.parametrize("damage", ["missing", "renamed", "cut", "gone"])
def test_a_base_that_is_not_whole_is_refused_rather_than_filled_with_random_numbers(
    tmp_path: Path, damage: str
) -> None:
    pipeline(tmp_path)
    file = tmp_path / "transformer/diffusion_pytorch_model.safetensors"
    state = load_file(file)
    tensor = state.pop("proj_out.bias")
    if damage == "renamed":
        state["proj_out.offset"] = tensor
    save_file(state, file)
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-8])
    if damage == "gone":
        file.unlink()
    with pytest.raises(CorruptCheckpoint) as error:
        load_base(ModelSettings(path=str(tmp_path)), 0, "lora")
    assert error.value.slug == "base-incomplete"
    if damage in ("missing", "renamed"):
        assert "proj_out.bias" in error.value.why


@pytest.mark.parametrize("device", ["cuda:7", "tpu", ""])
def test_a_device_that_is_not_there_is_an_error(device: str) -> None:
    with pytest.raises(UsageError, match="no device"), joined(device):
        pass


def test_too_little_memory_says_what_helps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    monkeypatch.setattr(run, "_session", full)
    with pytest.raises(TrainingStopped) as error:
        run.perform(short(), tmp_path / "run", resume=False, dry_run=False, say=lambda *_: None)
    assert "gradient_checkpointing" in error.value.hint


def test_a_base_with_nan_is_refused_before_the_first_step(tmp_path: Path) -> None:
    from loraconv.trainer.run import perform

    model = pipeline(tmp_path / "model")
    with torch.no_grad():
        model.transformer_blocks[1].ff.net[2].weight[0, 0] = torch.nan
    model.save_pretrained(tmp_path / "model" / "transformer")
    settings = short(model=replace(ModelSettings(), path=str(tmp_path / "model")))
    with pytest.raises(FormatError, match="NaN") as error:
        perform(settings, tmp_path / "run", resume=False, dry_run=False, say=lambda *_: None)
    assert "transformer_blocks.1.ff.net.2.weight" in error.value.where
    assert not (tmp_path / "run").exists()


def test_a_real_model_without_its_encoders_is_not_trained_on_stand_ins(tmp_path: Path) -> None:
    from loraconv.trainer.run import perform

    CogVideoXTransformer3DModel(**{**CONFIGS["2b"], "text_embed_dim": 64}).save_pretrained(tmp_path / "model")
    settings = short(model=ModelSettings(path=str(tmp_path / "model")))
    with pytest.raises(UsageError, match="text encoder"):
        perform(settings, tmp_path / "run", resume=False, dry_run=False, say=lambda *_: None)


def test_the_data_may_ask_for_another_size_unless_positions_are_learned() -> None:
    asked = DataSettings(frames=17, height=32, width=48)
    needs = {variant: tiny(variant).needs(asked, "fp32", "cpu") for variant in ("2b", "5b", "5b-i2v", "1.5")}
    assert (needs["2b"].frames, needs["2b"].height, needs["2b"].width) == (5, 4, 6)
    assert (needs["5b"].frames, needs["5b"].height, needs["5b"].width) == (5, 4, 6)
    assert (needs["5b-i2v"].height, needs["5b-i2v"].width) == (8, 12)
    assert (needs["1.5"].frames, needs["1.5"].height, needs["1.5"].width) == (6, 4, 6)


def test_the_native_size_of_1_5_is_not_the_reach_of_its_positions() -> None:
    model = CogVideoXTransformer3DModel(**{**CONFIGS["1.5"], "sample_height": 300, "sample_width": 300})
    needs = replace(tiny("1.5"), transformer=model).needs(DataSettings(), "fp32", "cpu")
    assert (needs.height * 8, needs.width * 8) == (768, 1360)
