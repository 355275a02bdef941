"""Learning rates over the run and by factor and module; warnings where rate x scale cannot train."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from loraconv.errors import UsageError
from loraconv.trainer import loop
from loraconv.trainer.schedule import make_optimizer, set_rates, share, warnings
from loraconv.trainer.settings import LoraSettings, OptimizerSettings, ScheduleSettings
from tests.train_support import full, session, short, weights

pytest_plugins = ["tests.train_fixtures"]


def shares(steps: int = 10, **schedule: Any) -> list[float]:
    return [share(ScheduleSettings(**schedule), step, steps) for step in range(steps)]


def test_warm_up_climbs_evenly_and_then_the_rate_stays() -> None:
    assert shares(6, warmup=3) == pytest.approx([1 / 4, 2 / 4, 3 / 4, 1, 1, 1])


def test_linear_decay_goes_from_the_full_rate_to_the_end() -> None:
    assert shares(5, kind="linear", warmup=0, end=0.5) == pytest.approx([1, 0.9, 0.8, 0.7, 0.6])
    assert share(ScheduleSettings(kind="linear", warmup=0, end=0.5), 5, 5) == pytest.approx(0.5)


def test_cosine_decay_is_half_a_period() -> None:
    want = [(1 + math.cos(math.pi * step / 8)) / 2 for step in range(8)]
    assert shares(10, kind="cosine", warmup=2)[2:] == pytest.approx(want)


def test_cosine_decay_ends_above_zero_where_asked() -> None:
    assert share(ScheduleSettings(kind="cosine", warmup=0, end=0.1), 10, 10) == pytest.approx(0.1)
    assert shares(kind="cosine", warmup=0, end=0.1)[5] == pytest.approx(0.55)


def test_steps_multiply_the_rate() -> None:
    assert shares(7, kind="step", warmup=1, every=2, gamma=0.1)[1:] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


def test_down_and_up_and_single_modules_have_rates_of_their_own() -> None:
    settings = short(
        lora=LoraSettings(rank=2),
        optimizer=OptimizerSettings(
            rate=1.0, down=2.0, up=3.0, rates={"attn1.to_v": 4.0, "transformer_blocks.1.*": 5.0}
        ),
    )
    made = session(settings)
    set_rates(made.optimizer, ScheduleSettings(warmup=1), 0, 10)
    rate = {id(p): group["lr"] for group in made.optimizer.param_groups for p in group["params"]}
    got = {t.name: 2 * rate[id(t.parameter)] for t in made.trainees.parameters}
    assert got["transformer_blocks.0.attn1.to_q.lora_A.weight"] == 2.0
    assert got["transformer_blocks.0.attn1.to_q.lora_B.weight"] == 3.0
    assert got["transformer_blocks.0.attn1.to_v.lora_A.weight"] == 4.0
    assert got["transformer_blocks.1.attn1.to_v.lora_B.weight"] == 5.0
    assert len(rate) == len(got) == 16


def test_a_full_fine_tune_has_one_rate_and_those_of_its_patterns() -> None:
    made = session(full(optimizer=OptimizerSettings(rate=1.0, up=9.0, rates={"patch_embed.*": 0.5})))
    optimizer = make_optimizer(made.trainees, made.settings.optimizer)
    assert sorted(group["full_rate"] for group in optimizer.param_groups) == [0.5, 1.0]


def test_a_rate_for_a_module_that_is_not_trained_is_an_error() -> None:
    with pytest.raises(UsageError, match="rates matches nothing"):
        session(short(optimizer=OptimizerSettings(rates={"ff.*": 1e-3})))


# --- the range that trains --------------------------------------------------------------------------------------------


def said(rate: float, rank: int = 4, alpha: float = 4.0, steps: int = 100, **lora: Any) -> list[str]:
    settings = short(
        steps=steps, lora=LoraSettings(rank=rank, alpha=alpha, **lora), optimizer=OptimizerSettings(rate=rate)
    )
    return warnings(session(settings).trainees, settings)


@pytest.mark.parametrize(
    ("rate", "rank", "alpha", "steps"),
    [
        (1e-4, 64, 64.0, 3000),  # huggingface/finetrainers' recipe for CogVideoX
        (2e-5, 128, 64.0, 3000),  # zai-org/CogVideo finetune/
        (1e-3, 128, 1.0, 1000),  # zai-org/CogVideo sat/: "between 1E-3 and 5E-4 for LoRA", lora_alpha 1
        (1e-3, 128, 1.0, 500),
    ],
)
def test_published_recipes_are_not_warned_of(rate: float, rank: int, alpha: float, steps: int) -> None:
    assert said(rate, rank, alpha, steps) == []


def test_a_rate_meant_for_alpha_1_is_too_much_at_the_scale_of_others() -> None:
    (text,) = said(1e-2, 64, 128.0)
    assert "too large" in text
    assert "attn1.to_q" in text


def test_a_rate_of_full_fine_tuning_is_too_little_at_the_scale_of_sat() -> None:
    (text,) = said(1e-5, 128, 1.0, 500)
    assert "too small" in text
    assert "no visible effect" in text


def test_rslora_is_counted_with_its_own_scale() -> None:
    assert said(1e-2, 64, 32.0) == []
    assert "too large" in said(1e-2, 64, 32.0, rslora=True)[0]


def good_model() -> dict[str, torch.Tensor]:
    """The weights of a model that was trained with all its parameters: one that has something to lose."""
    good = session(full(steps=80, optimizer=OptimizerSettings(rate=5e-3)))
    untrained = loop.held_out_loss(good)
    loop.run(good)
    assert loop.held_out_loss(good) < untrained
    return weights(good)


def change(rate: float, learned: dict[str, torch.Tensor], steps: int = 12) -> float:
    """By how much a LoRA at this rate changes the held-out loss of a good model, as a share of it."""
    made = session(short(steps=steps, lora=LoraSettings(rank=4, alpha=4.0), optimizer=OptimizerSettings(rate=rate)))
    with torch.no_grad():
        for name, parameter in made.base.transformer.named_parameters():
            if ".lora_" not in name:
                parameter.copy_(learned[name.replace(".base_layer.", ".")])
    before = loop.held_out_loss(made)
    loop.run(made)
    return loop.held_out_loss(made) / before - 1


def test_the_warnings_are_true_of_a_good_model() -> None:
    """Too small a rate changes next to nothing, too large a one does harm, and one between the two helps."""
    assert "no visible effect" in said(1e-5, steps=12)[0]
    assert said(1e-3, steps=12) == []
    assert "too large" in said(0.5, steps=12)[0]
    learned = good_model()
    weak, fine, strong = (change(rate, learned) for rate in (1e-5, 1e-3, 0.5))
    assert fine < 0 < strong
    # A hundredth of the rate: about a hundredth of the way for each factor, and what they add is their product.
    assert abs(weak) < abs(fine) / 10


@pytest.mark.parametrize("optimizer", [{"rate": 0.0}, {"rate": 1e-2, "up": 0.0}])
def test_a_rate_of_zero_leaves_every_bit_and_is_said(optimizer: dict[str, float]) -> None:
    settings = short(optimizer=OptimizerSettings(**optimizer))
    made = session(settings)
    with torch.no_grad():  # Adam adds -0.0 * something: the sign of a zero would change
        made.trainees.modules[0].up.fill_(-0.0)
    before = weights(made)
    loop.run(made)
    resting = [n for n in before if settings.optimizer.rate == 0 or ".lora_B." in n]
    for name in resting:
        now = weights(made)[name]
        assert torch.equal(now, before[name])
        assert torch.equal(torch.signbit(now), torch.signbit(before[name])), name
    assert any("rate of 0" in text for text in warnings(made.trainees, settings))
