"""The loop: what a step computes, and how every number that is not finite is stopped and named."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from loraconv.data import Sample
from loraconv.errors import TrainingStopped
from loraconv.trainer import loop, run
from loraconv.trainer.loss_scale import GROWTH_STEPS, START, LossScale
from loraconv.trainer.measures import delta_ratios
from loraconv.trainer.settings import (
    BatchSettings,
    CheckpointSettings,
    LogSettings,
    LoraSettings,
    ModelSettings,
    OptimizerSettings,
    SafetySettings,
    ValidationSettings,
)
from tests.train_support import Clips, full, opener, rows, session, short, train, weights

pytest_plugins = ["tests.train_fixtures"]


def logged(made: loop.Session) -> list[dict[str, Any]]:
    """Run the session and return what it logged."""
    said: list[dict[str, Any]] = []
    made.log = said.append
    loop.run(made)
    return said


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return sorted(one) == sorted(other) and all(torch.equal(one[n], other[n]) for n in one)


def frozen(made: loop.Session, module: str) -> torch.Tensor:
    """The weight of an adapted layer itself."""
    weight: torch.Tensor = made.base.transformer.get_submodule(module).base_layer.weight
    return weight


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The greatest relative distance of two tensors."""
    return max(float((one[n] - other[n]).norm() / one[n].norm()) for n in one if one[n].any())


# --- what a step computes ---------------------------------------------------------------------------------------------


def test_accumulated_batches_make_the_step_of_one_large_batch() -> None:
    steps = []
    for size, accumulate in ((4, 1), (2, 2), (1, 4)):
        made = session(short(steps=1, batch=BatchSettings(size=size, accumulate=accumulate)))
        made.base.transformer.double()
        gradients = {}

        def keep(_: Any, made: loop.Session = made, gradients: dict[str, torch.Tensor] = gradients) -> None:
            gradients |= {t.name: t.parameter.grad.clone() for t in made.trainees.parameters}

        made.optimizer.register_step_pre_hook(lambda *_, keep=keep: keep(None))
        (row,) = logged(made)
        steps.append((row["loss"], gradients))
    for loss, gradients in steps[1:]:
        # The model computes in float64 here; only its output is rounded to float32, and so is the loss.
        assert loss == pytest.approx(steps[0][0], rel=2.0**-22)
        assert apart(steps[0][1], gradients) < 2.0**-22


@pytest.mark.parametrize("clip", [1e-4, 1e4])
def test_gradients_are_clipped_to_the_norm_and_the_norm_before_is_logged(clip: float) -> None:
    made = session(short(steps=1, optimizer=OptimizerSettings(rate=1e-2, clip=clip)))
    norms: list[float] = []

    def measure(*_: Any) -> None:
        norms.append(math.sqrt(sum(float(t.parameter.grad.double().square().sum()) for t in made.trainees.parameters)))

    made.optimizer.register_step_pre_hook(measure)
    (row,) = logged(made)
    assert norms[0] == pytest.approx(min(clip, row["gradient_norm"]), rel=1e-2)
    assert row["gradient_norm"] > 1e-4


def test_one_step_is_that_of_adamw_on_the_mean_loss() -> None:
    settings = short(steps=1, optimizer=OptimizerSettings(rate=1e-2, weight_decay=0.1, betas=(0.8, 0.9), eps=1e-6))
    made = session(settings)
    before, gradients = weights(made), {}

    def keep(*_: Any) -> None:
        gradients.update({t.name: t.parameter.grad.clone() for t in made.trainees.parameters})

    made.optimizer.register_step_pre_hook(keep)
    loop.run(made)
    for name, now in weights(made).items():
        g, w = gradients[name].double(), before[name].double()
        # The first step of Adam: both moments, corrected for their start, are g and g squared.
        want = w * (1 - 1e-2 * 0.1) - 1e-2 * g / (g.abs() + 1e-6)
        assert torch.allclose(now.double(), want, rtol=1e-5, atol=1e-8), name


def test_gradient_checkpointing_changes_nothing() -> None:
    plain, saving = (
        session(short(model=ModelSettings(tiny="5b", gradient_checkpointing=c), lora=LoraSettings(rank=4, dropout=0.3)))
        for c in (False, True)
    )
    loop.run(plain)
    loop.run(saving)
    assert saving.base.transformer.gradient_checkpointing
    assert same(weights(plain), weights(saving))


def test_the_same_run_twice_is_bit_identical_and_another_seed_is_another_run() -> None:
    made = [session(short(seed=seed, lora=LoraSettings(rank=4, dropout=0.2))) for seed in (0, 0, 1)]
    torch.manual_seed(9)
    loop.run(made[0])
    torch.manual_seed(10)
    for other in made[1:]:
        loop.run(other)
    assert same(weights(made[0]), weights(made[1]))
    assert not same(weights(made[0]), weights(made[2]))


def test_dropout_is_at_work_in_training_and_off_in_validation() -> None:
    dry, wet = (session(short(steps=2, lora=LoraSettings(rank=4, dropout=d))) for d in (0.0, 0.9))
    for made in (dry, wet):
        made.base.transformer.train()
        with torch.no_grad():
            for m in made.trainees.modules:
                m.up.fill_(0.5)
    assert loop.held_out_loss(wet) == loop.held_out_loss(dry)
    loop.run(dry)
    loop.run(wet)
    assert not same(weights(dry), weights(wet))
    assert wet.base.transformer.training


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("kind", [short, full])
def test_sixteen_bits_learn_what_fp32_learns(precision: str, kind: Any) -> None:
    settings = kind(steps=8, optimizer=OptimizerSettings(rate=1e-2))
    plain, narrow = session(settings), session(replace(settings, model=ModelSettings(tiny="2b", precision=precision)))
    start = weights(plain)
    loop.run(plain)
    loop.run(narrow)
    moved, rough = ({n: w - start[n] for n, w in weights(s).items()} for s in (plain, narrow))
    along = sum(float((moved[n] * rough[n]).sum()) for n in moved)
    sizes = [math.sqrt(sum(float(w.square().sum()) for w in m.values())) for m in (moved, rough)]
    # In thousands of dimensions, directions that have nothing to do with each other are at right angles.
    assert along / (sizes[0] * sizes[1]) > 0.5
    assert not same(weights(plain), weights(narrow))


def test_the_log_has_norms_and_the_size_of_the_adapter_beside_its_weights() -> None:
    made = session(short(steps=3))
    row = logged(made)[-1]
    norm = math.sqrt(sum(float(w.double().square().sum()) for w in weights(made).values()))
    assert row["weight_norm"] == pytest.approx(norm, rel=1e-6)
    for block in (0, 1):
        deltas = weight = 0.0
        for m in made.trainees.modules:
            if m.module.startswith(f"transformer_blocks.{block}."):
                deltas += float((0.5 * (m.up.detach().double() @ m.down.detach().double())).square().sum())
                weight += float(frozen(made, m.module).double().square().sum())
        assert row["delta_ratio"][f"transformer_blocks.{block}"] == pytest.approx(math.sqrt(deltas / weight), rel=1e-5)
    assert set(delta_ratios(made.trainees.modules)) == {"transformer_blocks.0", "transformer_blocks.1"}


# --- validation and early stopping ------------------------------------------------------------------------------------


def test_the_held_out_loss_is_measured_when_due_and_the_best_is_remembered() -> None:
    made = session(short(steps=6, validation=ValidationSettings(every=4), log=LogSettings(every=100)))
    said = logged(made)
    assert [row["step"] for row in said if "held_out_loss" in row] == [4, 6]
    losses = {row["step"]: row["held_out_loss"] for row in said}
    assert made.progress.best == min(losses.values())
    assert losses[made.progress.best_step] == made.progress.best
    assert losses[6] == pytest.approx(loop.held_out_loss(made), rel=0)


def test_a_run_that_no_longer_improves_is_stopped() -> None:
    how = ValidationSettings(every=1, patience=2, improvement=10.0)
    made = session(short(steps=50, validation=how))
    said = logged(made)
    assert made.progress.stopped
    # The first validation is always an improvement; then two without one.
    assert (said[-1]["step"], made.progress.best_step) == (3, 1)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_held_out_loss_that_is_not_finite_is_never_the_best_and_is_said(
    monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    made = session(short(steps=3, validation=ValidationSettings(every=1), log=LogSettings(every=100)))
    monkeypatch.setattr(loop, "held_out_loss", lambda _: value)
    said = logged(made)
    assert (made.progress.best, made.progress.best_step) == (None, None)
    assert [row["step"] for row in said if "held_out_fault" in row] == [1, 2, 3]
    json.dumps(said, allow_nan=False)


# --- numbers that are not finite --------------------------------------------------------------------------------------


def spoiled(value: float, index: int = 2, part: str = "latents") -> Any:
    def spoil(at: int, sample: Sample) -> Sample:
        if at == index:
            tensor = getattr(sample, part).clone()
            tensor.view(-1)[5] = value
            return replace(sample, **{part: tensor})
        return sample

    return spoil


def step_of(made: loop.Session, index: int) -> int:
    """The first step that learns from the sample at this place of the data."""
    return next(n for n in range(100) if made.order.index(n) == index)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("part", ["latents", "prompt"])
def test_a_bad_sample_is_named_and_its_step_makes_no_update(value: float, part: str) -> None:
    made = session(short(), spoil=spoiled(value, part=part))
    step = step_of(made, 2)
    seen: dict[int, dict[str, torch.Tensor]] = {}
    real = loop.train_step

    def watch(s: loop.Session, at: int) -> loop.Row:
        seen[at] = weights(s)
        return real(s, at)

    loop.train_step = watch
    try:
        said = logged(made)
    finally:
        loop.train_step = real
    (fault,) = [row for row in said if "fault" in row]
    assert (fault["fault"], fault["step"], fault["action"]) == ("data", step + 1, "skip")
    assert "clip-2" in fault["where"]
    assert part in fault["where"]
    assert made.progress.faulty == [step]
    if step < 5:
        assert same(seen[step], seen[step + 1])
    assert made.progress.step == 6


def test_a_bad_loss_names_the_sample_and_the_first_module() -> None:
    made = session(short(steps=1, safety=SafetySettings(nonfinite="stop")))
    with torch.no_grad():
        made.base.transformer.transformer_blocks[1].attn1.norm_q.weight[0] = math.inf
    with pytest.raises(TrainingStopped) as error:
        loop.run(made)
    assert "transformer_blocks.1.attn1.norm_q" in error.value.where
    assert f"clip-{made.order.index(0)}" in error.value.where
    assert error.value.exit_code == 5


def test_the_first_bad_module_is_named_without_the_adapters_own_names() -> None:
    made = session(short(steps=1, safety=SafetySettings(nonfinite="stop")))
    with torch.no_grad():
        frozen(made, made.trainees.modules[0].module)[0, 0] = math.nan
    with pytest.raises(TrainingStopped) as error:
        loop.run(made)
    assert "first in transformer_blocks.0.attn1.to_q" in error.value.where
    assert "base_layer" not in error.value.where


def spoil_gradient(made: loop.Session, steps: list[int]) -> None:
    """Make the gradient of one factor infinite in these steps (counted from the first backward)."""
    count = iter(range(100))

    def hook(gradient: torch.Tensor) -> torch.Tensor:
        return gradient * math.inf if next(count) in steps else gradient

    made.trainees.modules[3].down.register_hook(hook)


def test_a_bad_gradient_names_its_parameter_and_is_skipped() -> None:
    made = session(short(steps=3))
    with torch.no_grad():
        made.trainees.modules[3].up.fill_(0.1)
    spoil_gradient(made, [1])
    said = logged(made)
    (fault,) = [row for row in said if "fault" in row]
    assert (fault["fault"], fault["step"]) == ("gradient", 2)
    assert fault["where"] == f"{made.trainees.modules[3].module}.lora_A.weight"
    assert all(bool(torch.isfinite(w).all()) for w in weights(made).values())


def test_a_norm_that_overflows_though_no_gradient_does_is_a_fault() -> None:
    made = session(short(steps=1))
    made.trainees.modules[3].up.register_hook(lambda gradient: torch.full_like(gradient, 1e30))
    (fault, _) = logged(made)
    assert (fault["fault"], fault["where"]) == ("gradient", "the norm of all together is too large for float32")


def test_too_many_faults_end_the_run_and_say_how_many() -> None:
    made = session(
        short(steps=9, safety=SafetySettings(limit=2)), spoil=lambda _, s: replace(s, latents=s.latents * math.nan)
    )
    with pytest.raises(TrainingStopped) as error:
        loop.run(made)
    assert made.progress.step == 2
    assert "2 are allowed" in error.value.why
    assert "--resume" in error.value.hint


def test_a_ruined_weight_without_a_checkpoint_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    made = session(short(steps=9))
    ruin(made, monkeypatch, {1})
    with pytest.raises(TrainingStopped) as error:
        loop.run(made)
    assert "no checkpoint" in error.value.why
    assert error.value.where.startswith("weight: transformer_blocks.0.attn1.to_k.lora_A.weight")


def ruin(made: loop.Session, monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """Let the optimizer leave NaN in a weight after these of its steps."""
    count = iter(range(1000))
    real = made.optimizer.step

    def step(*given: Any) -> None:
        real(*given)
        if next(count) in steps:
            made.trainees.modules[1].down.data[0, 0] = math.nan

    monkeypatch.setattr(made.optimizer, "step", step)


def test_a_ruined_weight_goes_back_to_the_last_checkpoint_and_never_into_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "open_dataset", opener())
    real = run._session

    def ruined(*given: Any) -> loop.Session:
        made = real(*given)
        ruin(made, monkeypatch, {4})
        return made

    monkeypatch.setattr(run, "_session", ruined)
    settings = short(steps=8, checkpoints=CheckpointSettings(every=2, keep=9))
    outcome = train(settings, tmp_path / "run")
    assert outcome.progress.faulty == [4]
    said = rows(tmp_path / "run")
    fault = next(i for i, row in enumerate(said) if "fault" in row)
    assert (said[fault]["action"], said[fault]["step"]) == ("rollback", 5)
    assert [row["step"] for row in said[:fault]] == [1, 2, 3, 4]
    assert [row["step"] for row in said[fault + 1 :]] == [5, 6, 7, 8]
    assert "loss" not in said[fault + 1]
    for file in (tmp_path / "run").rglob("*.safetensors"):
        from safetensors.torch import load_file

        assert all(bool(torch.isfinite(t).all()) for t in load_file(file).values()), file


def test_rolling_back_repeats_the_steps_since_the_checkpoint_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = short(steps=6, safety=SafetySettings(nonfinite="rollback"), checkpoints=CheckpointSettings(every=3))
    monkeypatch.setattr(run, "open_dataset", opener(spoil=spoiled(math.nan)))
    outcome = train(settings, tmp_path / "back")
    (faulty,) = outcome.progress.faulty
    train(replace(settings, safety=SafetySettings()), tmp_path / "skip")
    from safetensors.torch import load_file

    one, other = (load_file(tmp_path / name / "last/peft/adapter_model.safetensors") for name in ("back", "skip"))
    assert same(one, other)
    again = [row["step"] for row in rows(tmp_path / "back") if "fault" not in row]
    assert again == [*range(1, faulty + 1), *range(faulty // 3 * 3 + 1, 7)]


def test_saving_refuses_nan_whatever_let_it_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "open_dataset", opener())
    monkeypatch.setattr(loop, "finite", lambda _: True)
    real = run._session

    def ruined(*given: Any) -> loop.Session:
        made = real(*given)
        ruin(made, monkeypatch, {2})
        return made

    monkeypatch.setattr(run, "_session", ruined)
    with pytest.raises(TrainingStopped, match="no checkpoint was written"):
        train(short(steps=3, validation=ValidationSettings(every=0)), tmp_path / "run")
    assert not list((tmp_path / "run" / "checkpoints").rglob("*.safetensors"))
    assert not (tmp_path / "run" / "last").exists()


def test_a_bad_held_out_sample_is_said_and_the_run_goes_on() -> None:
    made = session(short(steps=2, validation=ValidationSettings(every=1)))
    made.held_out = Clips(made.training.needs, 2, spoil=spoiled(math.nan, 1))
    said = logged(made)
    assert ["held_out_fault" in row for row in said] == [True, True]
    assert "clip-1" in said[0]["held_out_fault"]
    assert made.progress.step == 2


# --- loss scale -------------------------------------------------------------------------------------------------------


def test_an_overflow_in_fp16_halves_the_scale_and_is_no_fault() -> None:
    made = session(short(steps=3, model=ModelSettings(tiny="2b", precision="fp16")))
    with torch.no_grad():
        made.trainees.modules[3].up.fill_(0.1)
    spoil_gradient(made, [1])
    said = logged(made)
    assert [row.get("skipped") is not None for row in said] == [False, True, False]
    assert [row["loss_scale"] for row in said] == [START, START / 2, START / 2]
    assert made.progress.faulty == []


def test_a_gradient_that_no_scale_helps_is_a_fault() -> None:
    made = session(
        short(steps=1, model=ModelSettings(tiny="2b", precision="fp16"), safety=SafetySettings(nonfinite="stop"))
    )
    made.progress.scale.value = 1.0
    with torch.no_grad():
        made.trainees.modules[3].up.fill_(0.1)
    spoil_gradient(made, [0])
    with pytest.raises(TrainingStopped) as error:
        loop.run(made)
    assert error.value.where.startswith("gradient")


def first_gradients(precision: str, scale: float) -> dict[str, torch.Tensor]:
    """The gradients of the first step, with factors so small that fp16 alone takes many gradients for zero."""
    made = session(
        short(steps=1, model=ModelSettings(tiny="2b", precision=precision), optimizer=OptimizerSettings(clip=1e9))
    )
    made.progress.scale.value = scale
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for m in made.trainees.modules:
            m.up.copy_(1e-5 * torch.randn(m.up.shape, generator=noise))
    kept: dict[str, torch.Tensor] = {}

    def keep(*_: Any) -> None:
        kept.update({t.name: t.parameter.grad.clone() for t in made.trainees.parameters})

    made.optimizer.register_step_pre_hook(keep)
    loop.run(made)
    return kept


def test_the_scale_does_not_change_what_is_learned_and_rescues_small_gradients() -> None:
    exact, bare, scaled = first_gradients("fp32", 1.0), first_gradients("fp16", 1.0), first_gradients("fp16", 2.0**16)
    downs = [n for n in exact if ".lora_A." in n]
    lost, kept = (apart({n: exact[n] for n in downs}, {n: g[n] for n in downs}) for g in (bare, scaled))
    assert kept < 0.1
    assert lost > 3 * kept


def test_the_scale_grows_after_many_good_steps_and_stops_at_its_limit() -> None:
    scale = LossScale(2.0**23, dynamic=True)
    for _ in range(GROWTH_STEPS - 1):
        scale.went_well()
    assert scale.value == 2.0**23
    scale.went_well()
    assert (scale.value, scale.good) == (2.0**24, 0)
    for _ in range(GROWTH_STEPS):
        scale.went_well()
    assert scale.value == 2.0**24


def test_without_fp16_there_is_no_scale() -> None:
    scale = LossScale()
    assert not scale.overflowed()
    for _ in range(GROWTH_STEPS):
        scale.went_well()
    assert (scale.value, scale.row()) == (1.0, {})
