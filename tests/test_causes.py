"""Why two adapters differ: each cause alone, in memory, with the modules that it explains and whose fault it is.

Deltas are made here with numpy in float64; norms and singular values are those of the full products.
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from loraconv.verifier.delta import (
    ModuleResult,
    compare_adapters,
    compare_module,
    is_finite,
    is_zero,
    projection,
    relative_room,
    rounded_through,
    transposed,
)
from loraconv.verifier.diagnosis import Finding, addressed, diagnose, finding, shown
from loraconv.verifier.numbers import Held, Pair

AGAIN = "loraconv convert {one} -o OUT --to {to}"
Q, K, V, OUT = (f"transformer_blocks.1.attn1.{m}" for m in ("to_q", "to_k", "to_v", "to_out.0"))
WIDTH, RANK = 8, 4


def single(array: Any) -> Any:
    """Float32 numbers, in float64."""
    return np.asarray(array, dtype=np.float32).astype(np.float64)


def pair(seed: int, rank: int = RANK, out: int = WIDTH, scale: Any = Fraction(1, 2)) -> Pair:
    rng = np.random.default_rng(seed)
    return Pair(
        Held(single(rng.normal(size=(rank, WIDTH))), "F32"), Held(single(rng.normal(size=(out, rank))), "F32"), scale
    )


def delta(p: Pair) -> Any:
    return float(p.scale) * (p.up.values @ p.down.values)  # type: ignore[union-attr]


def with_up(p: Pair, how: Any) -> Pair:
    return replace(p, up=Held(how(p.up.values), p.up.dtype))  # type: ignore[union-attr]


def times(p: Pair, factor: float) -> Pair:
    return with_up(p, lambda up: single(up * factor))


def adapter(*names: str, seed: int = 0, **options: Any) -> dict[str, Pair]:
    return {name: pair(seed + n, **options) for n, name in enumerate(names)}


def causes(one: dict[str, Pair], other: dict[str, Pair], trained: Any = ({}, {})) -> list[Finding]:
    return diagnose(one, other, compare_adapters(one, other), trained)


def told(one: dict[str, Pair], other: dict[str, Pair]) -> dict[str, tuple[str, ...]]:
    """Slug -> the modules that the finding explains."""
    found = causes(one, other)
    assert len({f.slug for f in found}) == len(found)
    return {f.slug: f.modules for f in found}


ONE = adapter(Q, K, V)


# --- one module -------------------------------------------------------------------------------------------------------


def test_the_figures_of_a_module_are_those_of_the_full_products() -> None:
    one, other = pair(1), pair(2, rank=3, scale=Fraction(3))
    result = compare_module("m", one, other)
    norm = np.linalg.norm(delta(one))
    assert (result.module, result.equal, result.near, result.same) == ("m", False, False, False)
    assert result.norm == pytest.approx(norm, rel=1e-12)
    assert result.error == pytest.approx(np.linalg.norm(delta(one) - delta(other)) / norm, rel=1e-9)
    rooms = []
    for p in (one, other):
        up, down = p.up.values, p.down.values  # type: ignore[union-attr]
        half = 2.0**-24 * (1 + 2.0**-20)
        spectral, whole = (lambda x: np.linalg.norm(x, 2)), np.linalg.norm
        sizes = whole(up) * spectral(down) + spectral(up) * whole(down) + half * whole(up) * whole(down)
        rooms.append(float(p.scale) * (half * sizes + whole(up) * whole(down) * 2.0**-45))
    assert result.bound == pytest.approx(max(rooms) / norm, rel=1e-9)
    assert compare_module("m", one, other, bound=0.25).bound == pytest.approx(0.25)


def test_the_same_numbers_are_equal_and_their_bound_is_the_users() -> None:
    one = pair(1)
    assert compare_module("m", one, one) == ModuleResult("m", True, 0.0, 0.0, compare_module("m", one, one).norm, True)
    assert compare_module("m", one, one, bound=0.5).bound == 0.5
    rounded = with_up(one, lambda up: np.float32(up * (1 + 2.0**-25)).astype(np.float64) + 0)
    assert compare_module("m", one, rounded).near
    wide = replace(one, up=Held(one.up.values * (1 + 2.0**-25), "F64"))  # type: ignore[union-attr]
    for first, second in ((one, wide), (wide, one)):
        result = compare_module("m", first, second)
        assert (result.equal, result.near, result.same) == (False, True, True)


def test_a_module_of_another_size_is_infinitely_far_and_one_of_zero_is_measured_absolutely() -> None:
    one, other = pair(1), pair(1, out=WIDTH + 1)
    result = compare_module("m", one, other)
    assert (result.error, result.bound, result.same) == (float("inf"), 0.0, False)
    assert projection(one, other) == (0.0, float("inf"))
    zero = times(one, 0)
    result = compare_module("m", zero, one)
    assert (result.norm, result.error) == (0, pytest.approx(np.linalg.norm(delta(one)), rel=1e-9))
    assert relative_room(zero) == float("inf")
    assert not ModuleResult("m", False, 0.0, float("inf"), 1.0).same
    assert not ModuleResult("m", False, 0.2, 0.1, 1.0).same
    assert ModuleResult("m", False, 0.1, 0.1, 1.0).same


def test_a_projection_finds_the_constant_and_what_is_left() -> None:
    one, other = pair(1), pair(2)
    first, second = delta(one), delta(other)
    constant = float(np.sum(first * second) / np.sum(first * first))
    rest = np.linalg.norm(second - constant * first) / np.linalg.norm(second)
    assert projection(one, other) == (pytest.approx(constant, rel=1e-9), pytest.approx(rest, rel=1e-9))
    for none in (times(one, 0), with_up(one, lambda up: up * np.nan)):
        assert projection(one, none) == projection(none, one) == (0.0, float("inf"))


def test_what_is_zero_or_infinite_or_short_is_told_by_either_factor() -> None:
    one = pair(1)
    short = replace(one, down=Held(np.ones((RANK, WIDTH)), "F32"), up=Held(np.ones((WIDTH, RANK)) * 1.5, "F32"))
    assert not is_zero(one)
    assert is_finite(one)
    assert rounded_through(short, "BF16")
    for side in ("up", "down"):
        array = getattr(one, side).values
        assert is_zero(replace(one, **{side: Held(array * 0, "F32")}))
        assert not is_finite(replace(one, **{side: Held(np.where(array == array[0, 0], np.inf, array), "F32")}))
        assert not rounded_through(replace(short, **{side: getattr(one, side)}), "BF16")
    assert is_zero(replace(one, scale=Fraction(0)))
    assert np.array_equal(delta(transposed(one)), delta(one).T)


# --- causes -----------------------------------------------------------------------------------------------------------


def test_the_same_adapter_has_no_cause() -> None:
    assert told(ONE, dict(ONE)) == {}


def test_modules_that_only_one_has_are_named() -> None:
    assert told(ONE, {Q: ONE[Q]}) == {"missing": (K, V)}
    assert told({Q: ONE[Q]}, ONE) == {"extra": (K, V)}
    assert [f.mend for f in causes(ONE, {Q: ONE[Q], OUT: ONE[Q]})] == [AGAIN, AGAIN]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_numbers_that_are_none_are_put_down_to_whoever_holds_them(bad: float) -> None:
    spoilt = {m: with_up(p, lambda up: np.where(up == up[0, 0], bad, up)) for m, p in ONE.items()}
    for one, other, words, mend in (
        (ONE, spoilt, "the second holds NaN or Inf", AGAIN), (spoilt, ONE, "the first holds NaN or Inf", "the first"),
        (spoilt, {m: with_up(p, lambda up: up + 1) for m, p in spoilt.items()}, "both hold NaN or Inf", "earlier"),
    ):  # fmt: skip
        (found,) = causes(one, other)
        assert (found.slug, found.modules) == ("nonfinite", (Q, K, V))
        assert words in found.sentence
        assert mend in found.mend
    assert told(ONE, ONE | {K: spoilt[K]}) == {"nonfinite": (K,)}


CONSTANTS: dict[str, tuple[float, Any, Any, set[str]]] = {
    "the rank": (RANK, 1, 1, {"multiplied by the rank"}),
    "over the rank": (1 / RANK, 1, 1, {"divided by the rank"}),
    "alpha, in the first": (0.3125, Fraction(16, 5), 1, {"alpha ignored in the second"}),
    "alpha, twice": (3.2, Fraction(16, 5), 1, {"the scale squared: applied twice in the second"}),
    "alpha, in the second": (3.2, 1, Fraction(16, 5), {"alpha ignored in the first"}),
    "alpha of the second, twice": (0.3125, 1, Fraction(16, 5), {"the scale squared: applied twice in the first"}),
    "the sign": (-1, 1, 1, {"the sign turned"}),
    "two": (2, 1, 1, {"doubled"}),
    "half": (0.5, 1, 1, {"halved"}),
    "two ways": (2, Fraction(1, 2), 1, {"alpha ignored in the second", "doubled"}),
    "a scale of zero tells nothing": (
        2,
        0,
        Fraction(1, 2),
        {"doubled", "the scale squared: applied twice in the first"},
    ),
    "nearly two": (2.0015, 1, 1, {"doubled"}),
    "not two": (2.0025, 1, 1, set()),
}


@pytest.mark.parametrize("case", CONSTANTS)
def test_a_constant_is_explained_by_rank_and_scale(case: str) -> None:
    """The scales that the trainers recorded count before those that are applied."""
    constant, first, second, reasons = CONSTANTS[case]
    one = {m: replace(p, scale=Fraction(1)) for m, p in ONE.items()}
    other = {m: times(p, constant) for m, p in one.items()}
    (found,) = causes(one, other, ({"": Fraction(first)}, {"": Fraction(second)}))
    assert (found.slug, found.modules) == ("scale", (Q, K, V))
    assert f"{constant:.6g} times as strong" in found.sentence
    inside = found.sentence.partition("(")[2].partition(") in")[0]
    assert set(inside.split(" or ")) == (reasons or {"the first is applied at scale 1, the second at 1"})
    (by_module,) = causes(one, other, ({Q: Fraction(first), "": Fraction(7)}, {Q: Fraction(second), "": Fraction(7)}))
    assert by_module.sentence == found.sentence


def test_without_a_record_the_scale_is_the_one_that_is_applied() -> None:
    one = {m: replace(p, scale=Fraction(16, 5)) for m, p in ONE.items()}
    (found,) = causes(one, {m: times(replace(p, scale=Fraction(1)), 1.0) for m, p in one.items()})
    assert "(alpha ignored in the second)" in found.sentence
    (found,) = causes(ONE, {m: times(replace(p, scale=Fraction(1)), 3) for m, p in ONE.items()})
    assert "the first is applied at scale 0.5, the second at 1" in found.sentence


def test_modules_are_grouped_by_the_constant() -> None:
    other = {Q: times(ONE[Q], 3), K: times(ONE[K], 3.002), V: times(ONE[V], 7)}
    assert [f.modules for f in causes(ONE, other)] == [(Q, K), (V,)]
    other[K] = times(ONE[K], 3.01)
    assert [f.modules for f in causes(ONE, other)] == [(Q,), (K,), (V,)]


def test_an_adapter_that_does_nothing_is_named_on_its_side() -> None:
    zero = {m: times(p, 0) for m, p in ONE.items()}
    ((second,), (first,)) = causes(ONE, zero), causes(zero, ONE)
    assert (second.slug, second.modules, second.mend) == ("zero", (Q, K, V), AGAIN)
    assert second.sentence.startswith("the second does nothing")
    assert first.sentence.startswith("the first does nothing")
    assert first.mend.startswith("use a later checkpoint than the first")
    assert told(ONE, ONE | {K: zero[K]}) == {"zero": (K,)}


def exactly(sizes: list[float], rank: int) -> Pair:
    """A delta with these singular values, cut to a rank."""
    left, right = (np.linalg.qr(np.random.default_rng(n).normal(size=(WIDTH, WIDTH)))[0] for n in (1, 2))
    return Pair(Held(right[:rank], "F64"), Held(left[:, :rank] * sizes[:rank], "F64"), Fraction(1))


def test_the_best_approximation_of_a_lower_rank_says_how_much_it_holds() -> None:
    """2**2 + 1 of 2**2 + 1 + 1 + 0.5**2: 80 %; the least share of all modules counts."""
    whole, low = exactly([2, 1, 1, 0.5], 4), exactly([2, 1, 1, 0.5], 2)
    (second,), (first,) = causes({Q: whole}, {Q: low}), causes({Q: low}, {Q: whole})
    assert (second.slug, second.modules) == ("rank", (Q,))
    assert "the second has rank 2 of 4" in second.sentence
    assert "holds 80.00% of the delta" in second.sentence
    assert second.mend == AGAIN
    assert "the first has rank 2 of 4" in first.sentence
    assert first.mend == "use the second, which has the whole rank"
    (both,) = causes({Q: whole, K: exactly([1, 1, 1, 1], 4)}, {Q: low, K: exactly([1, 1, 1, 1], 2)})
    assert "holds 50.00%" in both.sentence
    three = exactly([2, 1, 1, 0.5], 3)
    assert [f.modules for f in causes({Q: whole, K: whole}, {Q: low, K: three})] == [(Q,), (K,)]


def test_what_is_no_best_approximation_is_another_adapter() -> None:
    whole, low = exactly([2, 1, 1, 0.5], 4), exactly([2, 1, 1, 0.5], 2)
    assert set(told({Q: whole}, {Q: times(low, 0.99)})) == {"other"}
    wider = Pair(low.down, Held(np.concatenate([low.up.values, np.ones((1, 2))]), "F64"), low.scale)  # type: ignore[union-attr]
    assert set(told({Q: whole}, {Q: wider})) == {"other"}
    assert "up to inf apart" in causes({Q: whole}, {Q: wider})[0].sentence


@pytest.mark.parametrize(("first", "second"), [(Q, K), (Q, V), (K, V)])
def test_projections_that_changed_places_are_named(first: str, second: str) -> None:
    (found,) = causes(ONE, ONE | {first: ONE[second], second: ONE[first]})
    assert (found.slug, set(found.modules), found.mend) == ("swapped", {first, second}, AGAIN)
    assert f"{first.rpartition('.')[2]} and {second.rpartition('.')[2]} are swapped" in found.sentence
    (found,) = causes(ONE, ONE | {first: ONE[second]})
    assert (found.slug, found.modules) == ("duplicated", (first,))


def layers(*numbers: int, seed: int = 0) -> dict[str, Pair]:
    return adapter(*(f"transformer_blocks.{n}.attn1.to_out.0" for n in numbers), seed=seed)


@pytest.mark.parametrize("step", [1, -1])
def test_layers_that_moved_on_by_one_are_named_with_the_direction(step: int) -> None:
    one = layers(*range(9, 13))
    names = list(one)
    other = {name: one.get(names[(n + step) % 4], one[name]) for n, name in enumerate(names)}
    found = {f.slug: f for f in causes(one, other)}
    inner = names[:-1] if step == 1 else names[1:]
    assert set(found) == {"shifted", "moved"}
    assert found["shifted"].modules == tuple(inner)
    assert f"the first's layer {step:+d} in" in found["shifted"].sentence
    assert found["moved"].modules == (names[-1 if step == 1 else 0],)
    assert found["shifted"].mend == found["moved"].mend == AGAIN


def test_factors_that_stand_in_another_module_as_well_or_instead() -> None:
    one = adapter("proj", "embed", "other")
    assert told(one, one | {"embed": one["proj"]}) == {"duplicated": ("embed",)}
    (found,) = causes(one, one | {"embed": one["proj"]})
    assert "in another as well (embed those of proj)" in found.sentence
    turned = {"proj": one["embed"], "embed": one["other"], "other": one["proj"]}
    (found,) = causes(one, turned)
    assert (found.slug, found.modules, found.mend) == ("moved", ("proj", "embed", "other"), AGAIN)
    assert "in the place of another (proj those of embed)" in found.sentence
    beside = layers(3, 4) | {"proj": pair(9)}
    first, second, _ = beside
    assert told(beside, beside | {first: beside[second]}) == {"duplicated": (first,)}


def test_a_transposed_delta_is_named() -> None:
    assert told(ONE, ONE | {K: transposed(ONE[K])}) == {"transposed": (K,)}


def cast(p: Pair, kind: torch.dtype, dtype: str = "F32") -> Pair:
    down, up = (torch.from_numpy(f.values).to(kind).double().numpy() for f in (p.down, p.up))  # type: ignore[union-attr]
    return Pair(Held(down, dtype), Held(up, dtype), p.scale)


@pytest.mark.parametrize(("kind", "dtype"), [(torch.bfloat16, "BF16"), (torch.float16, "F16")])
def test_numbers_cast_on_their_way_are_put_down_to_the_side_that_was_cast(kind: torch.dtype, dtype: str) -> None:
    low = {m: cast(p, kind) for m, p in ONE.items()}
    (second,), (first,) = causes(ONE, low), causes(low, ONE)
    assert (second.slug, second.modules, second.mend) == ("precision", (Q, K, V), AGAIN)
    assert f"the second was cast through {dtype}" in second.sentence
    assert f"the first was cast through {dtype}" in first.sentence
    assert first.mend.startswith("use the second")
    assert told(ONE, ONE | {K: low[K]}) == {"precision": (K,)}
    assert set(told(low, {m: times(p, 1 + 2.0**-6) for m, p in low.items()})) == {"scale"}


def test_what_nothing_explains_is_said_with_the_worst_error() -> None:
    other = ONE | {Q: pair(50), V: pair(51)}
    (found,) = causes(ONE, other)
    errors = [np.linalg.norm(delta(ONE[m]) - delta(other[m])) / np.linalg.norm(delta(ONE[m])) for m in (Q, V)]
    assert (found.slug, found.modules) == ("other", (Q, V))
    assert f"up to {max(errors):.1e} apart" in found.sentence


def test_each_module_has_one_cause() -> None:
    other = {Q: times(ONE[Q], 0), K: times(ONE[K], 3), V: pair(77), OUT: pair(5)}
    assert told(ONE, other) == {"extra": (OUT,), "scale": (K,), "zero": (Q,), "other": (V,)}


def test_of_many_names_four_are_shown_and_the_others_counted() -> None:
    names = [f"{c}.weight" for c in "abcdef"]
    assert shown(names[:4]) == "a.weight; b.weight; c.weight; d.weight"
    assert shown(names) == "a.weight; b.weight; c.weight; d.weight; and 2 more like these"
    assert shown(names[:5]).endswith("and 1 more like these")
    found = finding("slug", "text:", iter(names[:2]), "do {one} then {to}")
    assert found == Finding("slug", "text: a.weight; b.weight", "do {one} then {to}", ("a.weight", "b.weight"))
    assert addressed([found], one="x", to="peft")[0].mend == "do x then peft"
