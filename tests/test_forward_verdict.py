"""What the outputs of forward passes are called: near, far, at another strength, too weak; with made-up outputs.

Outputs are small vectors; a model is a few layers with random weights. Distances are written out by hand.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from loraconv.errors import FormatError
from loraconv.verifier.consumers import forward
from loraconv.verifier.consumers.forward import Passed, Request, _Lab

BASE = torch.tensor([1.0, 2.0, 2.0, 4.0]).double()
#: At right angles to each other, of length 1 and 2.
ADAPTER, ELSE = torch.tensor([1.0, 0.0, 0.0, 0.0]).double(), torch.tensor([0.0, 2.0, 0.0, 0.0]).double()
LIVE = BASE + ADAPTER
SIZE = math.sqrt(4 + 4 + 4 + 16)  # of LIVE


def lab(bound: float = 0.01, **changes: Any) -> _Lab:
    given: dict[str, Any] = {
        "model": Path("M"), "adapter": Path("A"), "modules": 1, "rank": 8, "dtypes": frozenset({"F32"}),
        "dtype": "fp32", "scratch": Path("S"),
    }  # fmt: skip
    return _Lab(Request(**given | changes), {}, bound)


def passed(output: Any, *, bound: float = 0.01, extra: float = 0.0, wrong: dict[str, Any] | None = None) -> Passed:
    made = lab(bound)
    made.seen["it"], made.extra = output, {"it": extra, "another": 1.0}
    return forward._passed(made, "it", BASE, LIVE, wrong or {})


@pytest.mark.parametrize("part", [0.0, 0.25, 1.0, 3.0, -1.0])
@pytest.mark.parametrize("beside", [0.0, 0.5])
def test_the_strength_is_the_adapters_share_in_the_output_whatever_is_beside_it(part: float, beside: float) -> None:
    found = passed(BASE + part * ADAPTER + beside * ELSE)
    assert found.strength == pytest.approx(part, abs=1e-12)
    assert found.distance == pytest.approx(math.hypot(part - 1, 2 * beside) / SIZE, abs=1e-12)
    assert found.allowed == 0.01
    assert found.within is ((part, beside) == (1.0, 0.0))
    assert bool(found.cause) is not found.within


def test_an_output_may_be_as_far_away_as_the_bound_and_what_is_its_own() -> None:
    output = LIVE + torch.tensor([0.0, 0.0, 0.0, 0.5]).double()
    apart = 0.5 / SIZE
    exact = passed(output).distance
    assert exact == pytest.approx(apart, rel=1e-12)
    for bound, extra, within in ((exact, 0.0, True), (exact * 0.99, 0.0, False), (exact / 2, exact / 2, True)):
        found = passed(output, bound=bound, extra=extra)
        assert (found.within, found.allowed) == (within, bound + extra)
        assert (found.cause == "") is within


def test_what_an_output_is_instead_is_the_first_wrong_one_within_the_same_bound() -> None:
    wrong = {"the other": BASE + 5 * ELSE, "twice": BASE + 2 * ADAPTER, "twice, too": BASE + 2 * ADAPTER}
    near = BASE + 2 * ADAPTER + 0.01 * ELSE
    assert passed(near, wrong=wrong).cause == "its output is twice"
    # 0.02 away from an output of length sqrt(33): just within, and just not.
    apart = 0.02 / math.sqrt(9 + 4 + 4 + 16)
    assert passed(near, bound=apart * 1.001, wrong=wrong).cause == "its output is twice"
    none = "it computes something else (in the adapter's direction, 2 times as much)"
    assert passed(near, bound=apart * 0.999, wrong=wrong).cause == none
    assert passed(near, bound=apart / 2, extra=apart * 0.501, wrong=wrong).cause == "its output is twice"
    broken = near * torch.nan
    assert passed(broken, wrong=wrong | {"NaN": broken}).cause == "its output holds NaN or Inf"
    assert passed(broken).distance == math.inf


@pytest.mark.parametrize(("least", "refused"), [(0.2, True), (0.1, True), (0.21, False)])
def test_an_adapter_is_too_weak_where_a_wrong_output_is_as_near_as_roundings_are(least: float, refused: bool) -> None:
    mistakes = {"far": 0.5, "near": least, "farther": 0.7}
    request = lab().request
    if not refused:
        forward._refuse_weak(request, mistakes, 0.2)
        return
    with pytest.raises(FormatError) as caught:
        forward._refuse_weak(request, mistakes, 0.2)
    assert caught.value.what.endswith("its output could be near")
    assert caught.value.why == f"they are {least:.1e} apart, and roundings may make 2.0e-01"
    assert caught.value.hint == "loraconv verify --base M A FUSED"


def test_a_coarse_dtype_is_given_up_before_the_check() -> None:
    with pytest.raises(FormatError) as caught:
        forward._refuse_weak(lab(dtype="fp16").request, {"x": 0.0}, 0.2)
    assert caught.value.hint == "run it again without --dtype"


def test_no_effect_and_numbers_that_are_none_are_two_errors() -> None:
    request = lab().request
    forward._refuse_no_effect(request, 1e-300)
    for effect, slug, where in ((0.0, "no-effect", "A"), (math.inf, "nonfinite", "M")):
        with pytest.raises(FormatError) as caught:
            forward._refuse_no_effect(request, effect)
        assert (caught.value.slug, caught.value.where) == (slug, where)
        assert caught.value.hint.startswith("loraconv inspect A")


class Model(torch.nn.Module):
    """A model that computes the base's output and the adapter's at a strength, and one that was rounded."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = (torch.nn.Parameter(torch.tensor([1 + 2.0**-9, 1 + 2.0**-12])) for _ in range(2))
        self.strength, self.asked = 1.0, list[tuple[list[str], list[float]]]()

    def set_adapters(self, names: list[str], strengths: list[float]) -> None:
        self.asked.append((names, strengths))
        (self.strength,) = strengths

    def forward(self, *, return_dict: bool) -> tuple[Any]:
        assert not return_dict
        assert not torch.is_grad_enabled()
        return (BASE + self.strength * ADAPTER,)


@pytest.mark.parametrize(("seen", "strengths"), [(LIVE, {"twice": 2.0, "half": 0.5}), (BASE, {"twice": 2.0,
    "half": 0.5, "8 times": 8.0, "1/8 of": 0.125})])  # fmt: skip
def test_outputs_that_are_wrong_on_purpose_are_at_the_strengths_that_they_are_called(
    seen: Any, strengths: dict[str, float]
) -> None:
    """Times and over the rank only where something is out of its bound."""
    made, model = lab(), Model()
    made.seen["it"] = seen
    wrong = forward._wrong_outputs(made, model, BASE, LIVE)
    right = {"the base model's, without the adapter": BASE} | {
        f"the adapter's at {name} its strength": BASE + strength * ADAPTER for name, strength in strengths.items()
    }
    assert list(wrong) == list(right)
    assert all(torch.equal(wrong[name], right[name]) for name in right)
    assert model.asked[-1] == (["live"], [1.0])


@pytest.mark.parametrize(("distance", "more"), [(0.99, False), (1.0, False), (1.01, True)])
def test_an_output_at_the_very_bound_is_within_it(distance: float, more: bool) -> None:
    bound = float(ADAPTER.norm() / LIVE.norm())
    made = lab(bound / distance)
    made.seen["it"] = BASE
    assert (len(forward._wrong_outputs(made, Model(), BASE, LIVE)) == 5) is more


def test_parameters_are_rounded_as_the_fused_model_stores_them(tmp_path: Path) -> None:
    one = torch.zeros(2)
    save_file({"weight": one.half()}, tmp_path / "a.safetensors")
    save_file({"bias": one.bfloat16(), "other": one.bfloat16()}, tmp_path / "b.safetensors")
    model = Model()
    assert forward._round_as(model, tmp_path)
    assert model.weight.tolist() == [1 + 2.0**-9, 1.0]
    assert model.bias.tolist() == [1.0, 1.0]
    for name in ("a", "b"):
        save_file({"weight": one, "bias": one.clone()}, tmp_path / f"{name}.safetensors")
    model = Model()
    assert not forward._round_as(model, tmp_path)
    assert model.weight.tolist() == model.bias.tolist() == [1 + 2.0**-9, 1 + 2.0**-12]
