"""What is added to a base, part by part, against full matrices in float64; and what is compared with what."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from loraconv.verifier.fused import controls
from loraconv.verifier.fused.case import Case, Part, Term, check_names, chosen, delta_of, home_of, stored_dtype
from loraconv.verifier.fused.figures import Figures
from loraconv.verifier.fused.whole import Dora, Kron, Turned
from loraconv.verifier.numbers import Held, Pair
from loraconv.verifier.proof import Check, Control

Array = np.ndarray[Any, Any]
OUT, RANK, IN = 7, 3, 5


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng((seed, *shape)).normal(size=shape)


class Stored:
    """A matrix of a file."""

    def __init__(self, array: Array, dtype: str = "F64") -> None:
        self.array, self.shape, self.dtype = array, array.shape, dtype

    def rows(self, start: int, stop: int) -> Held:
        return Held(self.array[start:stop], self.dtype)


@pytest.fixture(params=[1, 12, 1 << 18])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Rows one by one, two at a time, and all at once."""
    monkeypatch.setattr("loraconv.verifier.fused.whole._BLOCK", request.param)
    return int(request.param)


def lora(scale: Fraction = Fraction(3, 4)) -> tuple[Pair, Array]:
    """A pair, and its delta with the scale."""
    up, down = normal(OUT, RANK), normal(RANK, IN)
    return Pair(Held(down, "F64"), Held(up, "F64"), scale), float(scale) * up @ down


def by_rows(whole: Any, *ends: int) -> Array:
    return np.concatenate([whole.rows(start, stop) for start, stop in pairwise(ends)])


# --- deltas that are no product ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(OUT,), (OUT, 1), (OUT, 1, 1, 1)])
def test_a_dora_of_rows_gives_every_row_its_own_length(shape: tuple[int, ...], block: int) -> None:
    pair, delta = lora()
    weight, size = normal(OUT, IN, seed=1), np.abs(normal(OUT))
    whole: Any = Dora.of(Stored(weight), pair, Held(size.reshape(shape), "F64"))  # type: ignore[arg-type]
    total = weight + delta
    right = total * (size / np.linalg.norm(total, axis=1))[:, None] - weight
    assert whole.shape == (OUT, IN)
    np.testing.assert_allclose(by_rows(whole, 0, 2, 3, OUT), right, rtol=1e-13, atol=1e-14)
    np.testing.assert_allclose(by_rows(Turned(whole), 0, 1, 4, IN), right.T, rtol=1e-13, atol=1e-14)
    assert Turned(whole).shape == (IN, OUT)


@pytest.mark.parametrize("shape", [(1, IN), (1, IN, 1, 1)])
def test_a_dora_of_columns_gives_every_column_its_own_length(shape: tuple[int, ...], block: int) -> None:
    pair, delta = lora()
    weight, size = normal(OUT, IN, seed=1), np.abs(normal(IN))
    whole: Any = Dora.of(Stored(weight), pair, Held(size.reshape(shape), "F64"))  # type: ignore[arg-type]
    total = weight + delta
    right = total * (size / np.linalg.norm(total, axis=0)) - weight
    np.testing.assert_allclose(by_rows(whole, 0, 2, 3, OUT), right, rtol=1e-13, atol=1e-14)


def test_a_dora_of_a_single_row_is_one_of_rows() -> None:
    up, down = normal(1, RANK), normal(RANK, IN)
    pair, weight = Pair(Held(down, "F64"), Held(up, "F64"), Fraction(1)), normal(1, IN, seed=1)
    whole: Any = Dora.of(Stored(weight), pair, Held(np.full((1, 1), 2.5), "F64"))  # type: ignore[arg-type]
    total = weight + up @ down
    np.testing.assert_allclose(whole.rows(0, 1), total * 2.5 / np.linalg.norm(total) - weight, rtol=1e-13)


def kron() -> tuple[Pair, Array]:
    one, other = normal(3, 2), normal(4, 5)
    pair = Pair(Held(other.reshape(1, -1), "F64"), Held(one.reshape(-1, 1), "F64"), Fraction(5, 2), (3, 2, 4, 5))
    return pair, np.kron(one, other)


def test_rows_of_a_kronecker_product_are_those_of_the_whole(block: int) -> None:
    pair, right = kron()
    whole = Kron.of(pair)
    assert whole.shape == right.shape == (12, 10)
    for start, stop in ((0, 12), (0, 4), (3, 5), (5, 7), (4, 8), (7, 12), (11, 12)):
        np.testing.assert_allclose(whole.rows(start, stop), right[start:stop], rtol=1e-14)
    np.testing.assert_allclose(by_rows(Turned(whole), 0, 3, 10), right.T, rtol=1e-14)


# --- parts and their sums ---------------------------------------------------------------------------------------------


def test_the_rows_of_a_part_and_the_sizes_that_bound_their_errors() -> None:
    """Of a product, that of the lengths of row and column; of any other delta, that of its own row."""
    up, down = normal(OUT, RANK), normal(RANK, IN)
    part = Part(up, down, Fraction(3, 2), Fraction(1, 4), 0, RANK)
    assert part.factor == 0.375
    made, sizes = part.rows(1, 4)
    np.testing.assert_allclose(made, (up @ down)[1:4], rtol=1e-14)
    lengths = np.outer(np.linalg.norm(up, axis=1), np.linalg.norm(down, axis=0))
    np.testing.assert_allclose(sizes, lengths[1:4] * (RANK + 8), rtol=1e-14)
    made, _ = part.turned.rows(0, 2)
    np.testing.assert_allclose(made, (up @ down).T[:2], rtol=1e-14)
    assert not part.zeroed.rows(0, OUT)[0].any()
    pair, right = kron()
    whole = Part(np.zeros((12, 0)), np.zeros((0, 10)), pair.scale, Fraction(1), 0, 4, Kron.of(pair))
    made, sizes = whole.rows(2, 9)
    np.testing.assert_allclose(made, right[2:9], rtol=1e-14)
    np.testing.assert_allclose(sizes, np.outer(np.linalg.norm(right[2:9], axis=1), np.full(10, 12.0)), rtol=1e-14)
    np.testing.assert_allclose(whole.turned.rows(0, 10)[0], right.T, rtol=1e-14)
    assert whole.zeroed.whole is None
    assert not whole.zeroed.rows(0, 12)[0].any()


def test_the_sum_of_all_adapters_has_products_krons_and_doras_each_at_its_strength() -> None:
    plain, delta = lora()
    up, down = normal(OUT, 1), normal(1, IN)
    grid = Pair(Held(down, "F64"), Held(up, "F64"), Fraction(1, 3), (OUT, 1, 1, IN))
    other, changed = lora(Fraction(2))
    weight, size = normal(OUT, IN, seed=1), np.abs(normal(OUT))
    base: Any = {"m.weight": Stored(weight)}
    terms = [
        Term({"m": plain}, Fraction(1, 2)), Term({"other": plain}, Fraction(9)), Term({"m": grid}, Fraction(-3)),
        Term({"m": other}, Fraction(5, 4), {"m": Held(size, "F64")}),
    ]  # fmt: skip
    case = Case(base, terms, {}, ["m"], None, None)
    parts = case.parts("m")
    assert [(p.number, p.rank, p.strength) for p in parts] == [
        (0, 3, Fraction(1, 2)), (2, 1, Fraction(-3)), (3, 3, Fraction(5, 4))
    ]  # fmt: skip
    total = weight + changed
    dora = total * (size / np.linalg.norm(total, axis=1))[:, None] - weight
    right = delta / 2 - up @ down + 1.25 * dora
    np.testing.assert_allclose(case.delta("m").rows(0, OUT), right, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(delta_of(parts[:2]).rows(2, 5), (delta / 2 - up @ down)[2:5], rtol=1e-12, atol=1e-13)


# --- what is compared with what ---------------------------------------------------------------------------------------


def ref(*shape: int, dtype: str = "F16") -> Any:
    return SimpleNamespace(shape=shape, dtype=dtype)


def case_of(base: dict[str, Any], fused: dict[str, Any], modules: Any = (), dtype: str | None = None) -> Case:
    pair = Pair(Held(np.zeros((1, IN)), "F16"), Held(np.zeros((OUT, 1)), "F16"), 1)
    return Case(base, [Term(dict.fromkeys(modules, pair), Fraction(1))], fused, list(modules), dtype, None)


def test_a_tensor_is_touched_where_a_module_fits_it_and_the_fused_model_kept_its_form() -> None:
    modules = ["right", "flat.bias", "wide", "whole", "lost", "gone", "cast"]
    base = {
        "right.weight": ref(OUT, IN), "flat.bias": ref(OUT, IN), "wide.weight": ref(OUT, IN + 1),
        "whole.weight": ref(OUT, IN, dtype="I64"), "gone.weight": ref(OUT, IN), "cast.weight": ref(OUT, IN),
        "free.weight": ref(3), "moved.weight": ref(3), "dropped.weight": ref(3),
    }  # fmt: skip
    fused = {n: r for n, r in base.items() if n not in ("gone.weight", "dropped.weight")}
    fused |= {"cast.weight": ref(OUT, IN, dtype="F32"), "moved.weight": ref(4), "new": ref(1)}
    case = case_of(base, fused, modules)
    assert [m for m in modules if case.fits(m)] == ["right", "flat.bias", "gone", "cast"]
    assert case.touched() == {"right.weight": "right", "flat.bias": "flat.bias"}
    assert case.untouched() == ["free.weight"]
    assert (home_of("a.b"), home_of("a.bias"), home_of("bias")) == ("a.b.weight", "a.bias", "bias.weight")


def test_every_tensor_keeps_its_shape_and_floating_ones_get_the_dtype_that_was_asked_for() -> None:
    base = {"a": ref(2), "b": ref(3, dtype="I64"), "c": ref(4, dtype="F32")}
    name = "every tensor of the base, its shape and dtype"
    assert check_names(base, dict(base), None) == Check("L0", name, True, 3)
    asked = {"a": ref(2, dtype="BF16"), "b": ref(3, dtype="I64"), "c": ref(4, dtype="BF16")}
    assert check_names(base, asked, "BF16").passed
    assert [stored_dtype(base[n], "BF16") for n in base] == ["BF16", "I64", "BF16"]
    assert [stored_dtype(base[n], None) for n in base] == ["F16", "I64", "F32"]
    what = "missing, unexpected, or of another shape or dtype: "
    for fused, wrong in (
        (asked, "a; c"), ({"a": base["a"]}, "b; c"), (base | {"d": ref(1)}, "d"), (base | {"a": ref(3)}, "a"),
    ):  # fmt: skip
        assert check_names(base, fused, None) == Check("L0", name, False, 3, detail=what + wrong)
    many = {word: ref(1) for word in ("p", "q", "r", "s", "t", "u", "v")}
    assert check_names({}, many, None).detail == what + "p; q; r; s; t; u"


def test_the_modules_of_all_adapters_come_in_order_or_those_that_were_chosen() -> None:
    pair, _ = lora()
    terms = [Term({"b": pair, "a": pair}, Fraction(1)), Term({"c": pair, "a": pair}, Fraction(1))]
    assert chosen(terms, None) == ["b", "a", "c"]
    assert chosen(terms, ["a", "c", "x"]) == ["a", "c"]
    assert chosen(terms, []) == []


@pytest.mark.parametrize(("bound", "right"), [(None, False), (0.5, True), (0.49, False), (0.51, True)])
def test_a_bound_replaces_the_rule_of_a_single_rounding(bound: float | None, right: bool) -> None:
    figures = Figures(elements=10, wrong=5, size=4.0, rest=1.0)
    assert Case({}, [], {}, [], None, bound).accepts(figures) is right


# --- controls ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoilt", "accepted", "control"),
    [
        (None, True, Control("x", None, "this adapter has no place for it")),
        ([1.0, np.nan], True, Control("x", None, "it changes no number here")),
        ([2.0, np.nan], True, Control("x", False, "")),
        ([2.0, np.nan], False, Control("x", True, "L2")),
        ([1.0, 1.0], False, Control("x", True, "L2")),
    ],
)
def test_a_mistake_in_numbers_is_caught_or_missed_or_none(spoilt: Any, accepted: bool, control: Control) -> None:
    block: Any = SimpleNamespace(right=np.array([1.0, np.nan]), accepts=lambda stored: accepted)
    assert controls._numbers_control(block, "x", None if spoilt is None else np.array(spoilt)) == control


@pytest.mark.parametrize(("ranks", "divided"), [((1, 1), False), ((1, 2), True), ((3,), True)])
@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32", "F64"])
@pytest.mark.parametrize("shape", [(2, 2), (2, 3)])
def test_mistakes_that_have_no_place_are_not_made(
    ranks: tuple[int, ...], divided: bool, dtype: str, shape: tuple[int, int]
) -> None:
    """A scale over a rank of 1 is itself, only a square is transposed, and wide numbers are rounded in many ways."""
    parts = [Part(normal(shape[0], r), normal(r, shape[1]), Fraction(1), Fraction(1), 0, r) for r in ranks]
    case = SimpleNamespace(parts=lambda module: parts, modules=["m"], shapes=lambda module: {shape})
    base = normal(*shape)
    block: Any = SimpleNamespace(
        case=case, module="m", sum=lambda parts: parts, shape=shape, dtype=dtype, right=base, base=base, delta=None,
        rows=lambda delta: base,
    )  # fmt: skip
    made = dict(controls._wrong_numbers(block))
    none = {name for name, spoilt in made.items() if spoilt is None}
    assert none == {"q and k swapped", "layers shifted by one"} | {
        *(() if divided else ("scale divided by rank",)), *(() if shape == (2, 2) else ("delta transposed",)),
        *(() if dtype in ("F16", "BF16") else ("cut off instead of rounded",)),
    }  # fmt: skip
    assert [p.strength for p in made["strength doubled"]] == [2] * len(ranks)  # type: ignore[union-attr]
    if divided:
        assert [p.scale for p in made["scale divided by rank"]] == [Fraction(1, r) for r in ranks]  # type: ignore[union-attr]


class Bytes:
    """A tensor of bytes that counts how often it is read."""

    def __init__(self, raw: bytes, dtype: str = "F16") -> None:
        self.raw, self.dtype, self.shape, self.read = raw, dtype, (len(raw) // {"F16": 2, "F32": 4}[dtype],), 0

    def pieces(self) -> Any:
        self.read += 1
        return iter([self.raw])


def test_one_bit_is_turned_in_the_smallest_tensor_that_kept_its_bytes() -> None:
    base: Any = {
        "large": Bytes(b"abcdef"), "small": Bytes(b"abcd"), "wide": Bytes(b"abcd" * 2, "F32"), "cast": Bytes(b"ab"),
        "empty": Bytes(b""),
    }  # fmt: skip
    fused = base | {"cast": Bytes(b"abcd", "F32")}
    what = "an untouched tensor changed"
    assert list(controls._byte_controls(case_of(base, fused), list(base))) == [Control(what, True, "L1")]
    assert [name for name in base if base[name].read] == ["small"]
    for none in ([], ["cast"], ["empty"], ["cast", "empty"]):
        (missed,) = controls._byte_controls(case_of(base, fused), none)
        assert missed == Control(what, None, "there is none that keeps its bytes")
    list(controls._byte_controls(case_of(base, fused), ["large", "wide"]))
    assert base["large"].read > 0 == base["wide"].read


def test_mistakes_in_the_list_of_tensors_are_what_they_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the fused models that the check of names is shown."""
    shown: list[dict[str, Any]] = []

    def spy(base: Any, fused: Any, dtype: Any) -> Check:
        shown.append(dict(fused))
        return check_names(base, fused, dtype)

    monkeypatch.setattr(controls, "check_names", spy)
    own: Any = {"w.weight": Matrix((2, 3)), "s.weight": Matrix((2, 2)), "norm": Bytes(b"abcd")}
    run: Any = {"norm": Bytes(b"abce"), "more": Bytes(b"ab")}
    base = own | run
    case = case_of(base, dict(base))
    assert [(c.name, c.caught, c.by) for c in controls._structure_controls(case, "w.weight")] == [
        ("a module dropped", True, "L0"), ("a weight transposed", True, "L0")
    ]  # fmt: skip
    dropped, turned = shown
    assert set(dropped) == set(base) - {"w.weight"}
    assert {name: ref.shape for name, ref in turned.items()} == {n: r.shape for n, r in base.items()} | {
        "w.weight": (3, 2)
    }
    assert [c.name for c in controls._structure_controls(case, "s.weight")] == ["a module dropped"]
    shown.clear()
    assert [(c.name, c.caught, c.by) for c in controls.beside_controls(case, own, run)] == [
        ("a tensor of the run left out", True, "L0"), ("the base's own tensor in place of the run's", True, "L1")
    ]  # fmt: skip
    left_out, replaced = shown
    assert left_out == {n: r for n, r in base.items() if n != "more"}
    assert replaced == base | {"norm": own["norm"]}
    assert list(controls.beside_controls(case, own, {"norm": own["norm"]})) == []
    wider: Any = {"norm": Bytes(b"abcd", "F32")}
    (kept,) = controls.beside_controls(case_of(own | wider, own | wider), own, wider)
    assert (kept.caught, kept.by) == (True, "L0")


@dataclass(frozen=True)
class Matrix:
    """The shape of a tensor."""

    shape: tuple[int, ...]
    dtype: str = "F16"
