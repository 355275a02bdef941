"""Which sums are guessed for a wrong fuse, and when a guess fits: each rule alone, its bounds from definitions."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from loraconv.verifier.fused import guesses
from loraconv.verifier.fused.case import Part
from loraconv.verifier.fused.guesses import Cause, Product, Sample, Sum, Way
from tests.test_fused_causes import MODULES, RANK, RIGHT, SIZE, WEIGHTS, Q, World, of_all, only, rounded, world

__all__ = ["world"]

K, V = MODULES[1:3]


# --- which guesses there are ------------------------------------------------------------------------------------------


def part(scale: Fraction | float, strength: Fraction, rank: int) -> Part:
    return Part(np.ones((2, rank)), np.ones((rank, 2)), scale, strength, 0, rank)


def multiples(*parts: Part) -> list[tuple[str, list[float], float | None]]:
    """Text, factors and constant of every wrong multiple."""
    own = [Product(np.ones((2, 2)), np.ones((2, 2)), p.factor) for p in parts]
    case = SimpleNamespace(parts=lambda module: list(parts))
    sample: Any = SimpleNamespace(case=case, module="m", own=own, base=np.zeros((2, 2)))
    made = list(guesses._multiples(sample))
    assert {guess.slug for guess in made} == {"scale"}
    return [(guess.text, [p.factor for p in guess.products], guess.constant) for guess in made]


def test_wrong_factors_that_are_one_number_are_one_guess_and_the_right_one_is_none() -> None:
    """At scale 2 and strength 1 the right factor is 2, also where the strength was ignored."""
    assert multiples(part(Fraction(2), Fraction(1), 8)) == [
        ("alpha was ignored or halved", [1.0], 0.5),
        ("the scale was applied twice or fused twice", [4.0], 2.0),
        ("multiplied by the rank", [16.0], 8.0),
        ("divided by the rank", [0.25], 0.125),
        ("subtracted instead of added", [-2.0], -1.0),
        ("fused twice", [2.0, 2.0], 2.0),
    ]


def test_of_two_adapters_each_has_its_own_wrong_factor_and_the_first_tells_the_constant() -> None:
    first, second = part(Fraction(3), Fraction(1, 2), 4), part(Fraction(1, 2), Fraction(1), 2)
    assert multiples(first, second) == [
        ("alpha was ignored", [0.5, 1.0], 1 / 3),
        ("the strength was ignored", [3.0, 0.5], 2.0),
        ("the scale was applied twice", [4.5, 0.25], 3.0),
        ("multiplied by the rank", [6.0, 1.0], 4.0),
        ("divided by the rank", [0.375, 0.25], 0.25),
        ("fused twice", [3.0, 1.0], 2.0),
        ("halved", [0.75, 0.25], 0.5),
        ("subtracted instead of added", [-1.5, -0.5], -1.0),
        ("fused twice", [1.5, 0.5, 1.5, 0.5], 2.0),
    ]


def test_of_an_adapter_at_strength_zero_only_the_strength_can_have_been_ignored() -> None:
    assert multiples(part(Fraction(2), Fraction(0), 4)) == [
        ("the strength was ignored", [2.0], None), ("fused twice", [0.0, 0.0], 2.0)
    ]  # fmt: skip


def test_modules_of_another_size_are_not_taken_for_one_that_changed_places(world: Any) -> None:
    """Keys and values of fewer heads than queries, as in Llama."""
    made: World = world()
    for module in MODULES:
        if not module.endswith("to_q"):
            made.base[f"{module}.weight"] = made.base[f"{module}.weight"][: SIZE // 2]
            made.ups[0][module] = made.ups[0][module][: SIZE // 2]
    wrong = rounded(np.random.default_rng(5).normal(size=(SIZE, SIZE)), "F16")
    found = only(made.report(made.right() | {WEIGHTS[0]: wrong}))
    assert (found.slug, found.modules) == ("other", WEIGHTS[:1])
    swapped = made.right() | {
        f"{m}.weight": rounded(made.base[f"{m}.weight"] + RIGHT * made.product(n), "F16") for m, n in ((K, V), (V, K))
    }
    found = only(made.report(swapped))
    assert (found.slug, found.modules) == ("swapped", WEIGHTS[1:3])
    assert "to_k and to_v are swapped" in found.sentence


def test_the_delta_of_a_module_that_the_base_does_not_have_may_be_the_one_that_was_fused(world: Any) -> None:
    made: World = world()
    del made.base[f"{V}.weight"]
    fused = dict(made.base)
    for module in MODULES:
        if module != V:
            there = V if module == Q else module
            fused[f"{module}.weight"] = rounded(made.base[f"{module}.weight"] + RIGHT * made.product(there), "F16")
    report = made.report(fused)
    assert {f.slug: f.modules for f in report.findings} == {"homeless": (V,), "swapped": WEIGHTS[:1]}
    (sentence,) = [f.sentence for f in report.findings if f.slug == "swapped"]
    assert "to_q and to_v are swapped, in" in sentence


# --- when a guess fits ------------------------------------------------------------------------------------------------

COUNT = 10_000


def fits(stored: Any, exact: Any, base: Any, products: Sequence[Product] = (), more: float = 0.0) -> bool:
    sample = Sample.__new__(Sample)
    sample.dtype, sample.stored = "F16", stored
    return sample.fits(Sum("", "", base, products), lambda base, products, dtype: exact, more)


@pytest.mark.parametrize(
    ("wrong", "moved", "more", "right"),
    [
        (10, COUNT, 0, True), (11, COUNT, 0, False),  # one in a thousand
        (10, 100, 0, True), (10, 99, 0, False), (1, 10, 0, True), (1, 9, 0, False),  # one in ten of those that moved
        (0, 0, 0, True), (15, COUNT, 5, True), (16, COUNT, 5, False), (5, 5, 5, True), (6, 10, 5, True),
        (7, 10, 5, False), (7, 5, 5, False),
    ],
)  # fmt: skip
def test_a_guess_may_miss_a_few_numbers_of_all_and_of_those_that_moved(
    wrong: int, moved: int, more: float, right: bool
) -> None:
    """Of ``moved`` numbers the base has others; the wrong ones are among them as far as they go."""
    exact = np.ones((100, 100))
    stored, base = exact.copy(), exact.copy()
    stored.flat[:wrong] = 3
    base.flat[:moved] = 0
    base.flat[moved:wrong] = 3
    assert fits(stored, exact, base, more=more) is right


@pytest.mark.parametrize(
    ("factor", "sizes", "right"),
    [(1, 32, True), (-1, 32, True), (1 / 4, 128, True), (1, 0, False), (1 / 32, 32, False)],
)
def test_products_in_float32_excuse_what_their_sizes_make(factor: float, sizes: float, right: bool) -> None:
    """1 + 2**-11 is in the middle of two numbers of float16. 2**-20 beyond it, 16 of float32's roundings are needed."""
    exact = np.full((2, 2), 1 + 2.0**-11 + 2.0**-20)
    product = Product(np.zeros((2, 2)), np.full((2, 2), float(sizes)), factor)
    assert fits(np.ones((2, 2)), exact, np.zeros((2, 2)), [product]) is right
    half = Product(np.zeros((2, 2)), np.full((2, 2), sizes / 2), factor)
    assert fits(np.ones((2, 2)), exact, np.zeros((2, 2)), [half, half]) is right


@pytest.mark.parametrize(
    ("shape", "start", "rows"),
    [
        ((1000, 1024), 5, (5, 133)), ((1000, 1024), 950, (950, 1000)), ((9, 1 << 20), 3, (3, 4)),
        ((9, 0), 2, (2, 9)), ((1 << 18, 1), 0, (0, 1 << 17)),
    ],
)  # fmt: skip
def test_a_sample_has_whole_rows_of_an_eighth_of_a_million_numbers(
    shape: tuple[int, int], start: int, rows: tuple[int, int]
) -> None:
    ref: Any = SimpleNamespace(shape=shape)
    assert guesses._rows(ref, start) == rows


# --- roundings on the way ---------------------------------------------------------------------------------------------


def ways(stored_as: str, base_as: str) -> dict[tuple[str, str], Way]:
    case = SimpleNamespace(base={"w": SimpleNamespace(dtype=base_as)})
    sample: Any = SimpleNamespace(dtype=stored_as, case=case, name="w")
    return {(way.slug, way.text): way for way in guesses._arithmetics(sample)}


@pytest.mark.parametrize(
    ("stored", "base", "products", "through", "casts"),
    [
        ("F16", "F16", ("F16", "BF16"), ("BF16",), ("BF16",)),
        ("BF16", "BF16", ("BF16", "F16"), ("F16",), ("F16",)),
        ("F16", "F32", ("F16", "BF16"), ("BF16",), ("BF16", "F16")),
        ("F32", "F32", ("BF16", "F16"), ("BF16", "F16"), ("BF16", "F16")),
        ("F32", "BF16", ("BF16", "F16"), ("BF16", "F16"), ("F16", "F32")),
        ("F64", "F64", ("BF16", "F16"), ("F32", "BF16", "F16"), ("F32", "BF16", "F16")),
    ],
)
def test_the_dtypes_that_numbers_may_have_gone_through(
    stored: str, base: str, products: tuple[str, ...], through: tuple[str, ...], casts: tuple[str, ...]
) -> None:
    """A base that is stored as it is was not cast, and products are only ever rounded to 16 bits."""
    wanted = {("", ""), ("rounding", "the sum was rounded after each adapter")}
    wanted |= {("truncated", "the numbers were cut off instead of rounded")}
    for low in products:
        text = f"the products were rounded to {low} before they were added"
        wanted |= {("rounding", text), ("rounding", f"{text}, and before they were scaled")}
    wanted |= {("precision", f"the numbers were cast through {low}") for low in through}
    wanted |= {("precision", f"the base was cast to {low} before the adapter was added") for low in casts}
    assert set(ways(stored, base)) == wanted


def test_each_way_rounds_where_it_says() -> None:
    """In float16, at 1, half a unit upwards is 2**-11 and downwards 2**-12; bfloat16's are 2**-8 and 2**-9."""
    base = np.array([1.0, 1.0 + 2.0**-9])
    raw, more = np.array([2.0**-11 + 2.0**-22, 2.0**-11]), np.array([2.0**-12, 2.0**-11])
    products = [Product(raw, raw, 1.0), Product(more, more, -2.0)]
    exact = base + raw - 2 * more
    half = rounded(raw, "F16")

    def text_of(text: str) -> Any:
        found = {t: way for (_, t), way in ways("F16", "F32").items()}
        return found[text].sum(base, products, "F16")

    assert text_of("").tolist() == exact.tolist()
    assert (
        text_of("the sum was rounded after each adapter").tolist() == (rounded(base + raw, "F16") - 2 * more).tolist()
    )
    added = "the products were rounded to {} before they were added"
    for low in ("F16", "BF16"):
        first, second = rounded(raw, low), rounded(-2 * more, low)
        total = rounded(base + first, "F16") + second
        assert text_of(added.format(low)).tolist() == total.tolist()
    tripled = [Product(raw, raw, 3.0)]
    scaled = {t: way for (_, t), way in ways("F16", "F32").items()}[
        f"{added.format('F16')}, and before they were scaled"
    ]
    assert scaled.sum(base, tripled, "F16").tolist() == (base + rounded(3 * half, "F16")).tolist()
    assert text_of("the numbers were cast through BF16").tolist() == rounded(exact, "BF16").tolist()
    cast = text_of("the base was cast to BF16 before the adapter was added")
    assert cast.tolist() == (rounded(base, "BF16") + raw - 2 * more).tolist()
    down = text_of("the numbers were cut off instead of rounded")
    assert (exact.tolist(), down.tolist()) == ([1 + 2.0**-22, 1 + 2.0**-9 - 2.0**-11], [1.0, 1 + 2.0**-10])


def constant_of(times: float, size: int = 64, dtype: str = "F32") -> Cause | None:
    """What is found of a delta that was multiplied."""
    rng = np.random.default_rng(3)
    base, delta = rounded(rng.normal(size=(size, size)), dtype), rng.normal(size=(size, size))
    sample = Sample.__new__(Sample)
    sample.base, sample.dtype, sample.stored = base, dtype, rounded(base + times * delta, dtype)
    sample.own = [Product(delta, np.abs(delta), 1.0)]
    return guesses._some_constant(sample, list(ways(dtype, dtype).values()))


@pytest.mark.parametrize("times", [1.7, -0.3, 40.0])
@pytest.mark.parametrize("dtype", ["F32", "F16"])
def test_any_constant_is_found_whatever_the_rounding_takes_of_it(times: float, dtype: str) -> None:
    found = constant_of(times, dtype=dtype)
    assert found is not None
    assert (found.slug, found.text, found.how) == ("scale", "", "")
    assert found.constant == pytest.approx(times, rel=1e-3)


def test_there_is_no_constant_of_what_does_not_move_or_is_no_number() -> None:
    delta = np.ones((4, 4))
    for stored, own in ((np.ones((4, 4)), delta), (np.full((4, 4), 2.0), delta * 0), (np.full((4, 4), np.inf), delta)):
        sample = Sample.__new__(Sample)
        sample.base, sample.dtype, sample.stored = np.ones((4, 4)), "F32", stored
        sample.own = [Product(own, own, 1.0)]
        with np.errstate(invalid="ignore"):
            assert guesses._some_constant(sample, list(ways("F32", "F32").values())) is None


def test_the_cause_of_one_tensor_is_tried_first_in_the_next(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """All are made for the first, one for each of the others: a constant that has no name, then one that has."""
    made: World = world()
    tried = list[str]()
    fitting = Sample.fits

    def fits(self: Sample, guess: Sum, *rest: Any) -> bool:
        tried.append(f"{self.name} {guess.text}")
        return fitting(self, guess, *rest)

    monkeypatch.setattr(Sample, "fits", fits)

    def multiplied(factor: float) -> Any:
        return of_all(made, lambda m: made.base[f"{m}.weight"] + factor * made.product(m))

    found = only(made.report(multiplied(1.7)))
    assert (found.slug, found.modules) == ("scale", WEIGHTS)
    later = [text for text in tried if not text.startswith(WEIGHTS[0])]
    assert later == [f"{name} " for name in WEIGHTS[1:]]
    tried.clear()
    only(made.report(multiplied(RANK * RIGHT)))
    later = [text for text in tried if not text.startswith(WEIGHTS[0])]
    assert later == [f"{name} multiplied by the rank" for name in WEIGHTS[1:]]
