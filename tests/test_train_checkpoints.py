"""Checkpoints hold what was trained, in the layouts that SAT, diffusers and peft read, and say how they were made."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import CogVideoXTransformer3DModel
from safetensors import safe_open
from safetensors.torch import load_file

import loraconv
from loraconv.data.tensors import InMemory
from loraconv.errors import ProofFailed, UsageError
from loraconv.trainer import checkpoints, layouts, run
from loraconv.trainer.loop import Session
from loraconv.trainer.loss import predict
from loraconv.trainer.settings import (
    CheckpointSettings,
    LoraSettings,
    ModelSettings,
    OptimizerSettings,
    Settings,
    ValidationSettings,
)
from tests import sat_run
from tests.sat_run import DIT, RunSpec, peer_mapping
from tests.support import add_lora, deltas, merge_ranks, module_of, no_warnings, same_bits
from tests.test_train_loss import batch_of
from tests.train_support import SAT_VARIANTS, VARIANTS, contents, full, opener, short, train

pytest_plugins = ["tests.train_fixtures"]

STEPS = 3
Made = tuple[Path, Session]
Make = Callable[[Settings], Made]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """``make(settings)``: the run folder and the session as it was at the end, made once for the same settings."""
    known: dict[str, Made] = {}

    def made(settings: Settings) -> Made:
        key = repr(settings)
        if key not in known:
            out, sessions = tmp_path_factory.mktemp("run") / "run", []
            real = run._session
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(run, "open_dataset", opener())
                patch.setattr(run, "_session", lambda *given: sessions.append(real(*given)) or sessions[-1])
                train(settings, out)
            known[key] = out, sessions[0]
        return known[key]

    return made


def lora(variant: str = "2b", **changes: Any) -> Settings:
    return short(variant, **{"steps": STEPS, **changes})


def mp(settings: Settings) -> Settings:
    return replace(settings, checkpoints=CheckpointSettings(model_parallel=2))


def live(made: Session) -> dict[str, torch.Tensor]:
    """Module -> delta in float64, from the weights in memory and peft's own scale."""
    layers = {m.module: made.base.transformer.get_submodule(m.module) for m in made.trainees.modules}
    return {
        name: layer.scaling["default"]
        * layer.lora_B["default"].weight.detach().double()
        @ layer.lora_A["default"].weight.detach().double()
        for name, layer in layers.items()
    }


def same_deltas(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    """Equal to what float64 can tell: the factors are stored exactly, the scale is a power of two."""
    assert sorted(got) == sorted(want)
    for name, delta in want.items():
        assert delta.any(), name
        assert float((got[name] - delta).norm() / delta.norm()) < 1e-14, name


def spec_of(settings: Settings, **changes: Any) -> RunSpec:
    """The run of the real stack that has the sizes of the tiny models."""
    variant = SAT_VARIANTS[settings.model.tiny]
    given: dict[str, Any] = {
        "variant": variant,
        "generation": "late" if variant.startswith("1.5") else "early",
        "kind": settings.kind,
        "num_layers": 2,
        "hidden": 48,
        "heads": 3,
        "rank": settings.lora.rank,
        "time_embed_dim": 32,
        "text_hidden": 32,
        "text_length": 16,
        "latent_height": 8,
        "latent_width": 12,
        "num_frames": 13 if variant.startswith("1.5") else 9,
        "vae_channels": 0,
        "mp_size": settings.checkpoints.model_parallel,
        "iteration": STEPS,
    }
    return RunSpec(**(given | changes))


def rank_file(out: Path, rank: int = 0) -> Path:
    sat = out / "last" / "sat"
    return sat / (sat / "latest").read_text() / f"mp_rank_{rank:02d}_model_states.pt"


# --- the SAT layout ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("kind", [lora, full])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_sat_layout_has_the_keys_and_shapes_of_a_real_run(make: Make, variant: str, kind: Any, world: int) -> None:
    settings = kind(variant, steps=STEPS)
    settings = mp(settings) if world == 2 else settings
    out, _ = make(settings)
    spec = spec_of(settings)
    for rank in range(world):
        got = {name: tuple(t.shape) for name, t in module_of(rank_file(out, rank)).items()}
        want = {name: tuple(t.shape) for name, t in sat_run.rank_state(spec, rank).items() if name.startswith(DIT)}
        assert got == want
    assert len(list(rank_file(out).parent.iterdir())) == world


@pytest.mark.parametrize("kind", [lora, full])
def test_the_payload_has_the_entries_of_a_real_run_without_rng(make: Make, kind: Any) -> None:
    settings = kind("5b", steps=STEPS)
    out, made = make(settings)
    spec = spec_of(settings, rng=False)
    real = sat_run.payload(spec, sat_run.full_state(spec))
    got = torch.load(rank_file(out), weights_only=False)
    assert list(got) == list(real)
    for key in (
        "buffer_names",
        "optimizer",
        "lr_scheduler",
        "data_sampler",
        "mp_world_size",
        "iteration",
        "global_steps",
    ):
        assert got[key] == real[key], key
    assert list(got["client_lr_scheduler"]) == list(real["client_lr_scheduler"])
    bare = [n for n in real["param_shapes"][0] if n.startswith(DIT)]
    assert sorted(got["param_shapes"][0]) == sorted(bare)
    assert all(got["param_shapes"][0][n] == real["param_shapes"][0][n] for n in bare)
    assert isinstance(got["param_shapes"][0][bare[0]], torch.Size)
    assert got["global_samples"] == STEPS * made.settings.batch.size
    frozen = {n for n in real["frozen_param_shapes"] if n.startswith(DIT)}
    assert set(got["frozen_param_shapes"]) == set(got["frozen_param_fragments"]) == frozen
    for name, tensor in got["frozen_param_fragments"].items():
        assert tensor.data_ptr() == got["module"][name].data_ptr(), name


def test_torch_reads_the_payload_without_unpickling_anything_else(make: Make) -> None:
    out, _ = make(lora())
    assert sorted(torch.load(rank_file(out), weights_only=True)) == sorted(
        torch.load(rank_file(out), weights_only=False)
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_settings_say_what_a_real_run_says(make: Make, variant: str) -> None:
    settings = lora(variant)
    out, _ = make(settings)
    real = sat_run.training_config(spec_of(settings, lora_alpha=2))
    got = yaml.safe_load((out / "last/sat/training_config.yaml").read_text())
    assert got["model"]["network_config"] == real["model"]["network_config"] | {
        "params": real["model"]["network_config"]["params"]
        | {
            "transformer_args": real["model"]["network_config"]["params"]["transformer_args"]
            | {"checkpoint_activations": False}
        }
    }
    assert list(got)[:4] == list(real)[:4]
    model = json.loads((out / "last/sat/model_config.json").read_text())
    assert model == {"model_class": "SATVideoDiffusionEngine", "model_parallel_size": 1}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_sat_tensors_are_the_trained_ones(make: Make, variant: str) -> None:
    out, made = make(lora(variant))
    told = peer_mapping(module_of(rank_file(out)), variant=SAT_VARIANTS[variant])  # type: ignore[arg-type]
    same_deltas(deltas(told.adapter, 2.0 / 4), live(made))
    base = load_file(out / "base/transformer/diffusion_pytorch_model.safetensors")
    same_bits(told.base, base)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_full_fine_tune_is_the_same_in_sat_and_diffusers(make: Make, variant: str) -> None:
    out, made = make(full(variant, steps=STEPS))
    told = peer_mapping(module_of(rank_file(out)), variant=SAT_VARIANTS[variant])  # type: ignore[arg-type]
    want = {name: t.detach() for name, t in made.base.transformer.state_dict().items()}
    same_bits(told.base, want)
    model = CogVideoXTransformer3DModel.from_pretrained(out / "last/diffusers", torch_dtype=torch.float32)
    same_bits(model.state_dict(), want)
    untrained = load_file(out / "base/transformer/diffusion_pytorch_model.safetensors")
    assert sum(not torch.equal(untrained[n], t) for n, t in want.items()) > len(want) / 2


def test_two_ranks_hold_the_base_of_one(make: Make) -> None:
    out, made = make(mp(full("5b", steps=STEPS)))
    whole = merge_ranks([module_of(rank_file(out, rank)) for rank in (0, 1)])
    same_bits(peer_mapping(whole, variant="5b").base, made.base.transformer.state_dict())


def test_the_nearest_adapter_of_two_ranks_is_the_trained_one(make: Make, tmp_path: Path) -> None:
    out, made = make(mp(lora("5b")))
    loraconv.sat2diffusers(out / "last/sat", out=tmp_path / "lora", nearest=True)
    loraded = load_file(tmp_path / "lora/pytorch_lora_weights.safetensors")
    with safe_open(tmp_path / "lora/pytorch_lora_weights.safetensors", "pt") as file:
        stated = json.loads(file.metadata()["lora_adapter_metadata"])
    same_deltas(deltas(loraded, stated["transformer.lora_alpha"] / stated["transformer.r"]), live(made))


def test_a_layer_range_is_in_the_settings_and_the_other_layers_are_bare(make: Make) -> None:
    settings = lora(lora=LoraSettings(rank=4, alpha=2.0, layers="1"))
    out, _ = make(settings)
    names = sorted(module_of(rank_file(out)))
    assert names == sorted(n for n in sat_run.shapes(spec_of(settings, layer_range=(1,))) if n.startswith(DIT))
    config = yaml.safe_load((out / "last/sat/training_config.yaml").read_text())
    params = config["model"]["network_config"]["params"]["modules"]["lora_config"]["params"]
    assert params == {"r": 4, "lora_alpha": 2, "layer_range": [1]}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_base_keeps_its_precision_in_the_sat_layout(make: Make, precision: str) -> None:
    out, _ = make(lora(model=ModelSettings(tiny="5b", precision=precision)))
    kinds = {t.dtype for n, t in module_of(rank_file(out)).items() if ".matrix_" not in n}
    assert kinds == {{"bf16": torch.bfloat16, "fp16": torch.float16}[precision]}


# --- the way through loraconv -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_train_convert_verify_agree_for_every_variant(make: Make, variant: str, tmp_path: Path) -> None:
    out, made = make(lora(variant))
    result = loraconv.sat2diffusers(out / "last/sat", out=tmp_path / "out", what="all", strict=True)
    assert [p.passed for p in result.proofs] == [True, True]
    assert result.notices == ()
    for layout in ("sat", "diffusers", "peft"):
        found = loraconv.verify(out / "last" / layout, tmp_path / "out/pytorch_lora_weights.safetensors")
        assert found.same, (layout, found.findings)
    base = load_file(out / "base/transformer/diffusion_pytorch_model.safetensors")
    same_bits(load_file(tmp_path / "out/transformer/diffusion_pytorch_model.safetensors"), base)
    config = json.loads((tmp_path / "out/transformer/config.json").read_text())
    assert config == {k: v for k, v in made.base.config.items() if k in config} | {"_class_name": config["_class_name"]}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_trained_adapter_is_fused_and_the_fused_model_runs_as_the_trained_one(
    make: Make, variant: str, tmp_path: Path
) -> None:
    out, made = make(lora(variant))
    loraconv.fuse(out / "last/sat", base=out / "base", out=tmp_path / "fused")
    fused = tmp_path / "fused/transformer"
    assert loraconv.verify(out / "last/peft", fused, base=out / "base/transformer").same
    assert loraconv.verify(out / "last/diffusers", fused, forward=True, model=out / "base/transformer").same
    weights = load_file(fused / "diffusion_pytorch_model.safetensors")
    base = load_file(out / "base/transformer/diffusion_pytorch_model.safetensors")
    for module, delta in live(made).items():
        want = base[f"{module}.weight"].double() + delta
        # One rounding to float32.
        assert float((weights[f"{module}.weight"].double() - want).abs().max()) <= 2.0**-24 * float(want.abs().max())
    model = CogVideoXTransformer3DModel.from_pretrained(fused)
    want = output(made.base.transformer, made)
    assert float((output(model, made) - want).norm() / want.norm()) < 1e-6


def test_between_two_checkpoints_only_the_factors_change(make: Make) -> None:
    out, _ = make(lora(steps=2, checkpoints=CheckpointSettings(every=1, keep=9)))
    states = {"before": out / "checkpoints/step-00000001/sat", "after": out / "checkpoints/step-00000002/sat"}
    assert loraconv.verify(**states, expect="only-lora").same
    assert not loraconv.verify(**states, expect="identical").same


def output(model: CogVideoXTransformer3DModel, made: Session) -> torch.Tensor:
    batch = batch_of(made.base)
    with torch.no_grad():
        return predict(replace(made.base, transformer=model.eval()), batch.latents, batch)


@pytest.mark.parametrize("variant", VARIANTS)
def test_diffusers_and_peft_load_what_was_trained(make: Make, variant: str) -> None:
    out, made = make(lora(variant))
    want = output(made.base.transformer, made)
    bare = CogVideoXTransformer3DModel.from_pretrained(out / "base/transformer")
    without = output(bare, made)
    assert float((without - want).norm() / want.norm()) > 1e-3
    with no_warnings():
        add_lora(bare, out / "last/diffusers")
    # The scale, a power of two, is folded into lora_B: the sums are those of the live model.
    assert float((output(bare, made) - want).norm() / want.norm()) < 1e-6
    from peft import PeftModel

    base = CogVideoXTransformer3DModel.from_pretrained(out / "base/transformer")
    loaded = PeftModel.from_pretrained(base, str(out / "last/peft"))
    assert float((output(loaded.base_model.model, made) - want).norm() / want.norm()) < 1e-6


@pytest.mark.parametrize(
    "adapter",
    [
        LoraSettings(rank=4, alpha=3.0, dora=True),
        LoraSettings(rank=4, alpha=3.0, rslora=True),
        LoraSettings(rank=3, alpha=5.0, targets=("attn1.to_q", "ff.*"), ranks={"ff.*": 2}, alphas={"ff.net.2": 1.0}),
    ],
    ids=["dora", "rslora", "patterns"],
)
def test_peft_loads_what_sat_cannot_carry(make: Make, adapter: LoraSettings) -> None:
    from peft import PeftModel

    out, made = make(lora(lora=adapter))
    assert not (out / "last/sat").exists()
    base = CogVideoXTransformer3DModel.from_pretrained(out / "base/transformer")
    before = output(base, made)
    want = output(made.base.transformer, made)
    loaded = PeftModel.from_pretrained(base, str(out / "last/peft"))
    got = output(loaded.base_model.model, made)
    assert float((got - want).norm() / want.norm()) < 1e-6
    assert float((got - before).norm() / want.norm()) > 1e-3
    if not adapter.dora:
        bare = CogVideoXTransformer3DModel.from_pretrained(out / "base/transformer")
        add_lora(bare, out / "last/diffusers")
        assert float((output(bare, made) - want).norm() / want.norm()) < 1e-6


@pytest.mark.parametrize("variant", VARIANTS)
def test_with_a_rate_of_zero_every_weight_stays_as_it_was_through_all_layouts(
    make: Make, tmp_path: Path, variant: str
) -> None:
    resting = lora(variant, steps=4, optimizer=OptimizerSettings(rate=0.0))
    out, made = make(resting)
    from tests.train_support import session, weights

    fresh = session(resting)
    same_bits(weights(made), weights(fresh))
    same_bits(made.base.transformer.state_dict(), fresh.base.transformer.state_dict())
    loraconv.sat2diffusers(out / "last/sat", out=tmp_path / "out", what="all")
    base = load_file(tmp_path / "out/transformer/diffusion_pytorch_model.safetensors")
    clean = {
        n.replace(".base_layer.", "."): t for n, t in fresh.base.transformer.state_dict().items() if ".lora_" not in n
    }
    same_bits(base, clean)
    model = CogVideoXTransformer3DModel.from_pretrained(tmp_path / "out/transformer", torch_dtype=torch.float32)
    same_bits(model.state_dict(), clean)
    add_lora(model, tmp_path / "out")
    for parameter in model.parameters():  # where torch puts them, not where they lie in the file: kernels round by that
        parameter.data = parameter.data.clone()
    assert torch.equal(output(model, made), output(fresh.base.transformer, fresh))
    untrained = {"before": out / "base/transformer", "after": tmp_path / "out/transformer"}
    assert loraconv.verify(**untrained, expect="identical").same


@pytest.mark.parametrize("variant", VARIANTS)
def test_with_a_rate_of_zero_a_full_fine_tune_is_the_base_bit_for_bit(make: Make, tmp_path: Path, variant: str) -> None:
    out, _ = make(full(variant, steps=4, optimizer=OptimizerSettings(rate=0.0)))
    base = load_file(out / "base/transformer/diffusion_pytorch_model.safetensors")
    loraconv.sat2diffusers(out / "last/sat", out=tmp_path / "out", what="base")
    same_bits(load_file(tmp_path / "out/diffusion_pytorch_model.safetensors"), base)
    same_bits(load_file(out / "last/diffusers/diffusion_pytorch_model.safetensors"), base)
    states = {"before": out / "base/transformer", "after": out / "last/diffusers"}
    assert loraconv.verify(**states, expect="identical").same


# --- what a checkpoint says of itself ---------------------------------------------------------------------------------


def records(out: Path) -> dict[str, dict[str, Any]]:
    last = out / "last"
    made = {"manifest": json.loads((last / "loraconv.json").read_text())["training"]}
    for layout, name in (("diffusers", "pytorch_lora_weights.safetensors"), ("peft", "adapter_model.safetensors")):
        with safe_open(last / layout / name, "pt") as file:
            made[layout] = json.loads(file.metadata()["loraconv.training"])
    made["sat"] = yaml.safe_load((last / "sat/training_config.yaml").read_text())["loraconv"]
    return made


def test_every_layout_records_how_it_was_made(make: Make) -> None:
    out, made = make(lora())
    for place, record in records(out).items():
        assert record["tool"] == f"loraconv {loraconv.__version__}", place
        assert (record["seed"], record["step"]) == (0, STEPS)
        assert record["base"] == {"name": "tiny-2b", "fingerprint": made.base.fingerprint}
        assert (record["adapter"]["rank"], record["adapter"]["alpha"]) == (4, 2.0)
        assert record["adapter"]["targets"] == [m.module for m in made.trainees.modules]
        assert record["settings"]["optimizer"]["rate"] == 1e-2
        assert record["data"]["fingerprint"] == made.training.fingerprint


def test_the_fingerprint_is_that_of_the_base_folder(make: Make) -> None:
    from loraconv.trainer.model import load_base

    out, made = make(lora())
    assert load_base(ModelSettings(path=str(out / "base")), 0, "lora").fingerprint == made.base.fingerprint


def test_a_run_can_go_on_from_the_folder_of_its_base(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _ = make(lora())
    monkeypatch.setattr(run, "open_dataset", opener())
    settings = lora(
        model=ModelSettings(path=str(out / "base")), checkpoints=CheckpointSettings(layouts=("sat", "peft"))
    )
    train(settings, tmp_path / "run")
    same_bits(
        load_file(tmp_path / "run/last/peft/adapter_model.safetensors"),
        load_file(out / "last/peft/adapter_model.safetensors"),
    )


def test_the_files_hold_neither_a_time_nor_the_place_they_were_made_in(make: Make, tmp_path: Path) -> None:
    out, _ = make(lora())
    raw = b"".join(contents(out / "last").values())
    assert str(out.parent).encode() not in raw
    assert b"seconds" not in raw


def test_loraconv_verify_holds_on_a_checkpoint_and_sees_a_flipped_bit(make: Make, tmp_path: Path) -> None:
    import shutil

    out, _ = make(lora())
    place = tmp_path / "copy"
    shutil.copytree((out / "last").resolve(), place)
    assert loraconv.verify(place).same
    file = place / "sat" / str(STEPS) / "mp_rank_00_model_states.pt"
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)
    assert not loraconv.verify(place).same


# --- which ones stay --------------------------------------------------------------------------------------------------


def test_the_last_ones_and_the_best_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from loraconv.trainer import loop

    monkeypatch.setattr(run, "open_dataset", opener())
    losses = iter([3.0, 1.0, 2.0, 2.0, 2.0, 2.0])
    monkeypatch.setattr(loop, "held_out_loss", lambda _: next(losses))
    settings = short(steps=6, checkpoints=CheckpointSettings(every=1, keep=2), validation=ValidationSettings(every=1))
    train(settings, tmp_path / "run")
    kept = sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir())
    assert kept == ["step-00000002", "step-00000005", "step-00000006"]
    assert (tmp_path / "run/best").resolve().name == "step-00000002"
    assert (tmp_path / "run/last").resolve().name == "step-00000006"


def test_a_checkpoint_that_is_half_deleted_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "open_dataset", opener())
    monkeypatch.setattr(checkpoints.shutil, "rmtree", lambda *_, **__: None)  # killed before the first file is gone
    train(short(steps=2, checkpoints=CheckpointSettings(every=1, keep=1)), tmp_path / "run")
    assert (tmp_path / "run/checkpoints/step-00000001/state").is_dir()
    assert checkpoints.RunFolder(tmp_path / "run").steps() == [2]


def test_an_improvement_is_saved_when_it_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from loraconv.trainer import loop

    monkeypatch.setattr(run, "open_dataset", opener())
    losses = iter([1.0, 2.0, 2.0])
    monkeypatch.setattr(loop, "held_out_loss", lambda _: next(losses))
    train(
        short(steps=6, checkpoints=CheckpointSettings(every=100), validation=ValidationSettings(every=2)),
        tmp_path / "run",
    )
    assert (tmp_path / "run/best").resolve().name == "step-00000002"


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "adapter",
    [
        LoraSettings(rslora=True, rank=4),
        LoraSettings(targets=("ff.*",), rank=4),
        LoraSettings(targets=("attn1.to_q",), rank=4),
        LoraSettings(ranks={"attn1.to_q": 8}, rank=4),
        LoraSettings(alphas={"attn1.to_q": 8.0}, rank=4),
    ],
)
def test_a_layout_that_cannot_carry_the_adapter_is_refused_where_it_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adapter: LoraSettings
) -> None:
    monkeypatch.setattr(run, "open_dataset", opener())
    settings = lora(lora=adapter, checkpoints=CheckpointSettings(layouts=("sat",)))
    with pytest.raises(UsageError, match="sat layout cannot carry"):
        train(settings, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    outcome = train(replace(settings, checkpoints=CheckpointSettings()), tmp_path / "run")
    assert outcome.layouts == ("diffusers", "peft")
    assert any("no sat layout" in text for text in outcome.notices)


def test_a_layout_that_does_not_hold_what_was_trained_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "open_dataset", opener())
    module = layouts.sat_module

    def swapped(*given: Any, **options: Any) -> Any:
        made = module(*given, **options)
        names = [n for n in made.tensors if n.endswith("query_key_value.matrix_B.0")]
        for name in names:
            other = name[:-1] + "1"
            made.tensors[name], made.tensors[other] = made.tensors[other], made.tensors[name]
        return made

    monkeypatch.setattr(layouts, "sat_module", swapped)
    with pytest.raises(ProofFailed, match="sat layout"):
        train(lora(), tmp_path / "run")
    assert not list((tmp_path / "run/checkpoints").glob("*"))


@pytest.mark.parametrize("change", [lambda t: t * 0, None], ids=["changed", "missing"])
def test_a_transformer_folder_that_is_not_what_was_trained_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any
) -> None:
    monkeypatch.setattr(run, "open_dataset", opener())
    real = layouts.plan_base

    def plan(tensors: dict[str, Any], *given: Any, **options: Any) -> Any:
        """What is written, not what it is compared with."""
        value = tensors.pop("proj_out.bias")
        if change is not None:
            tensors["proj_out.bias"] = InMemory(change(value.tensor))
        return real(tensors, *given, **options)

    monkeypatch.setattr(layouts, "plan_base", plan)
    settings = full(steps=1, checkpoints=CheckpointSettings(layouts=("diffusers",)))
    with pytest.raises(ProofFailed, match="diffusers layout") as error:
        train(settings, tmp_path / "run")
    assert "proj_out.bias" in error.value.why
    assert not list((tmp_path / "run/checkpoints").glob("*"))


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from loraconv.errors import WriteFailed

    monkeypatch.setattr(run, "open_dataset", opener())
    real, calls = checkpoints.write_state, iter(range(9))

    def full_disk(*given: Any) -> None:
        if next(calls):
            raise WriteFailed("no space")
        real(*given)

    monkeypatch.setattr(checkpoints, "write_state", full_disk)
    with pytest.raises(WriteFailed):
        train(short(steps=6), tmp_path / "run")
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000003"]
    assert loraconv.verify(tmp_path / "run/last").same
