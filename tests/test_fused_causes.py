"""Why a fused model is wrong: each cause alone, on matrices of 64 by 64, with the tensors that it explains.

What each mistake stores is computed here in float64 and rounded by numpy's and torch's own casts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from loraconv.io.input_file import InputFile
from loraconv.io.safetensors_read import read_safetensors
from loraconv.verifier.diagnosis import Finding
from loraconv.verifier.fused.case import Term
from loraconv.verifier.fused.prove import FusedReport, prove_fused
from loraconv.verifier.numbers import Held, Pair

Arrays = dict[str, Any]
KINDS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
SIZE, RANK = 64, 4
MODULES = [f"transformer_blocks.{n}.attn1.{m}" for n in (0, 1) for m in ("to_q", "to_k", "to_v")]
Q = MODULES[0]
SCALE, STRENGTH = Fraction(5, 2), Fraction(3, 4)
RIGHT = 1.875


def rounded(array: Any, dtype: str) -> Any:
    return torch.from_numpy(np.asarray(array)).to(KINDS[dtype]).double().numpy()


class World:
    """A base of ``dtype``, adapters, and what they add: module -> ``up @ down``, unscaled."""

    def __init__(self, folder: Path, dtype: str = "F16", adapters: int = 1) -> None:
        rng = np.random.default_rng(0)
        self.folder, self.dtype, self.files = folder, dtype, list[InputFile]()
        self.base = {f"{m}.weight": rounded(rng.normal(size=(SIZE, SIZE)), dtype) for m in MODULES}
        self.base |= {f"norm{n}.weight": rounded(rng.normal(size=SIZE), dtype) for n in range(4)}
        self.ups = [{m: rng.normal(size=(SIZE, RANK)) for m in MODULES} for _ in range(adapters)]
        self.downs = [{m: rng.normal(size=(RANK, SIZE)) for m in MODULES} for _ in range(adapters)]

    def product(self, module: str, number: int = 0) -> Any:
        return self.ups[number][module] @ self.downs[number][module]

    def terms(self) -> list[Term]:
        return [
            Term({m: Pair(Held(downs[m], "F64"), Held(ups[m], "F64"), SCALE) for m in MODULES}, STRENGTH)
            for ups, downs in zip(self.ups, self.downs, strict=True)
        ]

    def exact(self, module: str) -> Any:
        """The right sum, not yet rounded."""
        return self.base[f"{module}.weight"] + RIGHT * sum(self.product(module, n) for n in range(len(self.ups)))

    def right(self) -> Arrays:
        return self.base | {f"{m}.weight": rounded(self.exact(m), self.dtype) for m in MODULES}

    def stored(self, name: str, arrays: Arrays, dtype: str = "", file: str = "weights.safetensors") -> Any:
        path = self.folder / f"{name}-{len(self.files)}"
        path.mkdir()
        kind = KINDS[dtype or self.dtype]
        tensors = {n: torch.from_numpy(np.ascontiguousarray(a)).to(kind) for n, a in arrays.items()}
        save_file(tensors, path / file)
        self.files.append(InputFile(path / file))
        return read_safetensors(self.files[-1]).tensors

    def report(self, fused: Arrays, stored_as: str = "", **options: Any) -> FusedReport:
        tensors = self.stored("fused", fused, stored_as)
        return prove_fused(self.stored("base", self.base), self.terms(), tensors, **options)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[Any]:
    made: list[World] = []

    def build(*args: Any) -> World:
        made.append(World(tmp_path, *args))
        return made[-1]

    yield build
    for one in made:
        for file in one.files:
            file.close()


def of_all(world: World, how: Any) -> Arrays:
    """The fused model whose touched weights are ``how(module)``, rounded."""
    return world.base | {f"{m}.weight": rounded(how(m), world.dtype) for m in MODULES}


def only(report: FusedReport) -> Finding:
    assert not report.proof.passed
    (found,) = report.findings
    return found


WEIGHTS = tuple(f"{m}.weight" for m in MODULES)


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
def test_a_right_fuse_has_no_cause(world: Any, dtype: str) -> None:
    made = world(dtype)
    report = made.report(made.right())
    assert report.proof.passed
    assert report.findings == ()
    assert report.kept == pytest.approx(1, abs=0.01)
    assert [t.name for t in report.tensors] == list(WEIGHTS)
    assert report.total.elements == len(MODULES) * SIZE * SIZE
    assert report.total.ulps == pytest.approx(0.5, abs=0.001)
    assert [check.count for check in report.proof.checks] == [10, 6, 4, 6]


@pytest.mark.parametrize(
    ("factor", "times", "words"),
    [
        (0.75, "0.4 times", "alpha was ignored"), (2.5, "1.333 times", "the strength was ignored"),
        (4.6875, "2.5 times", "the scale was applied twice"), (7.5, "4 times", "multiplied by the rank"),
        (RIGHT / 4, "0.25 times", "divided by the rank"), (RIGHT * 2, "2 times", "fused twice"),
        (RIGHT / 2, "0.5 times", "halved"), (-RIGHT, "-1 times", "subtracted instead of added"),
        (RIGHT * 1.7, "1.7 times", "as it should, in"),
    ],
)  # fmt: skip
def test_a_wrong_factor_is_told_with_its_reason(world: Any, factor: float, times: str, words: str) -> None:
    made = world()
    found = only(made.report(of_all(made, lambda m: made.base[f"{m}.weight"] + factor * made.product(m))))
    assert (found.slug, found.modules) == ("scale", WEIGHTS)
    assert times in found.sentence
    assert words in found.sentence
    assert found.mend.startswith("fuse it again with its own scale")


def test_nothing_fused_and_less_than_all_fused_are_two_things(world: Any) -> None:
    made = world()
    found = only(made.report(dict(made.base)))
    assert (found.slug, found.modules) == ("unfused", WEIGHTS)
    assert found.sentence.startswith("nothing was fused: it is the base")
    assert "--modules" not in found.mend
    found = only(made.report(made.right() | {WEIGHTS[1]: made.base[WEIGHTS[1]]}))
    assert (found.slug, found.modules) == ("unfused", WEIGHTS[1:2])
    assert found.sentence.startswith("the adapter was ignored")
    assert "--modules PATTERN" in found.mend


def partner(module: str, one: str, other: str) -> str:
    ends = {one: other, other: one}
    head, _, end = module.rpartition(".")
    return f"{head}.{ends.get(end, end)}"


@pytest.mark.parametrize(("one", "other"), [("to_q", "to_k"), ("to_q", "to_v"), ("to_k", "to_v")])
@pytest.mark.parametrize("whole", [False, True])
def test_projections_that_changed_places_are_named(world: Any, one: str, other: str, whole: bool) -> None:
    made = world()

    def swapped(m: str) -> Any:
        there = partner(m, one, other)
        return made.base[f"{there if whole else m}.weight"] + RIGHT * made.product(there)

    found = only(made.report(of_all(made, swapped)))
    names = tuple(n for n in WEIGHTS if partner(n[:-7], one, other) != n[:-7])
    assert (found.slug, found.modules) == ("swapped", names)
    first, second = sorted((one, other))
    assert f"{first} and {second} are swapped" in found.sentence
    assert ("(whole weights)" in found.sentence) is whole
    assert found.mend.startswith("fuse it again: loraconv fuse")


@pytest.mark.parametrize(("layer", "words"), [(0, "one layer on was"), (1, "one layer before was")])
def test_layers_that_moved_are_named(world: Any, layer: int, words: str) -> None:
    made = world()
    name, there = (f"transformer_blocks.{n}.attn1.to_q" for n in (layer, 1 - layer))
    fused = made.right() | {f"{name}.weight": rounded(made.base[f"{name}.weight"] + RIGHT * made.product(there), "F16")}
    found = only(made.report(fused))
    assert (found.slug, found.modules) == ("shifted", (f"{name}.weight",))
    assert words in found.sentence


def test_a_transposed_delta_is_named(world: Any) -> None:
    made = world()
    found = only(made.report(of_all(made, lambda m: made.base[f"{m}.weight"] + RIGHT * made.product(m).T)))
    assert (found.slug, found.modules) == ("transposed", WEIGHTS)


@pytest.mark.parametrize("count", [2, 3])
def test_an_adapter_that_was_left_out_is_named_by_its_number(world: Any, count: int) -> None:
    made = world("F16", count)
    for out in range(count):
        fused = of_all(made, lambda m, out=out: made.exact(m) - RIGHT * made.product(m, out))
        found = only(made.report(fused))
        assert (found.slug, found.modules) == ("left-out", WEIGHTS)
        assert f"adapter {out + 1} was left out" in found.sentence
        assert found.mend.startswith("fuse all in one pass")
    alone = only(made.report(of_all(made, lambda m: made.base[f"{m}.weight"] + RIGHT * made.product(m, count - 1))))
    assert ("adapter 1 was left out" if count == 2 else "adapter 3 alone was fused") in alone.sentence


def cut(array: Any, dtype: str) -> Any:
    """Towards zero, on float16's or bfloat16's grid of normal numbers."""
    digits = {"F16": 11, "BF16": 8}[dtype]
    mantissa, exponent = np.frexp(array)
    return np.ldexp(np.trunc(np.ldexp(mantissa, digits)), exponent - digits)


def ways(made: World) -> dict[str, tuple[Arrays, str, str]]:
    """Way -> what it stores, its slug and words of its text."""
    low, base = made.dtype, made.base

    def each(m: str) -> Any:
        total = base[f"{m}.weight"]
        for n in range(len(made.ups)):
            total = rounded(total + RIGHT * made.product(m, n), low)
        return total

    def products(m: str, twice: bool) -> Any:
        raw = rounded(made.product(m), low) if twice else made.product(m)
        return base[f"{m}.weight"] + rounded(RIGHT * raw, low)

    other = {"F16": "BF16", "BF16": "F16"}[low]
    return {
        "each": (of_all(made, each), "rounding", "after each adapter"),
        "products": (of_all(made, lambda m: products(m, False)), "rounding", f"rounded to {low} before they were"),
        "scaled": (of_all(made, lambda m: products(m, True)), "rounding", "and before they were scaled"),
        "cut off": (of_all(made, lambda m: cut(made.exact(m), low)), "truncated", "cut off instead of rounded"),
        "cast": (of_all(made, lambda m: rounded(made.exact(m), other)), "precision", f"cast through {other}"),
        "base": (
            of_all(made, lambda m: rounded(base[f"{m}.weight"], other) + RIGHT * made.product(m)),
            "precision", f"the base was cast to {other} before",
        ),
    }  # fmt: skip


# float16 has more digits than bfloat16, so that a cast through it changes next to nothing.
@pytest.mark.parametrize(
    ("way", "dtype"),
    [(w, d) for d in ("F16", "BF16") for w in ("each", "products", "scaled", "cut off")]
    + [("cast", "F16"), ("base", "F16")],
)
def test_a_rounding_on_the_way_is_named_with_what_it_did(world: Any, way: str, dtype: str) -> None:
    made = world(dtype, 2 if way == "each" else 1)
    fused, slug, words = ways(made)[way]
    found = only(made.report(fused))
    assert (found.slug, found.modules) == (slug, WEIGHTS)
    assert words in found.sentence
    assert ("before they were scaled" in found.sentence) is (way == "scaled")
    right = made.right()
    share = np.mean([np.mean(fused[n] != right[n]) for n in WEIGHTS])
    told = float(found.sentence.partition("so ")[2].partition("%")[0]) / 100
    assert told == pytest.approx(share, abs=0.0002)
    assert found.mend.startswith("fuse it again" if slug == "precision" else "fuse it with sums in float32")


def test_a_wrong_factor_and_a_rounding_on_the_way_are_both_told(world: Any) -> None:
    made = world()
    fused = of_all(made, lambda m: made.base[f"{m}.weight"] + rounded(0.75 * made.product(m), "BF16"))
    found = only(made.report(fused))
    assert found.slug == "scale"
    assert "alpha was ignored); and the products were rounded to BF16 before they were added, in" in found.sentence


# --- the model as a whole ---------------------------------------------------------------------------------------------


def test_another_list_of_tensors_is_named(world: Any) -> None:
    made = world()
    right = made.right()
    found = only(made.report({n: a for n, a in right.items() if n != "norm1.weight"}))
    assert (found.slug, found.modules) == ("missing", ("norm1.weight",))
    found = only(made.report(right | {"more": np.zeros(2)}))
    assert (found.slug, found.modules) == ("extra", ("more",))
    found = only(made.report(right | {"norm1.weight": np.zeros(3)}))
    assert (found.slug, found.modules) == ("other-base", ("norm1.weight",))


def test_another_dtype_is_named_with_the_word_for_it(world: Any) -> None:
    made = world()
    report = made.report(made.right(), stored_as="F32")
    found = {f.slug: f for f in report.findings}["retyped"]
    assert set(found.modules) == set(made.base)
    assert "F32 instead of F16" in found.sentence
    assert found.mend == "if that was asked for: loraconv verify ... --dtype fp32"
    exact = made.base | {f"{m}.weight": made.exact(m) for m in MODULES}
    report = made.report(exact, stored_as="F32", dtype="F32")
    assert report.proof.passed
    assert "rounded once to F32" in report.proof.checks[2].name


def test_modules_without_a_weight_are_named_with_the_nearest(world: Any) -> None:
    made = world()
    for stock in (made.ups[0], made.downs[0]):
        stock["transformer_blocks.1.attn1.to_w"] = stock[Q]
    terms = made.terms()
    pairs = terms[0].pairs | {"transformer_blocks.1.attn1.to_w": terms[0].pairs[Q]}
    fused = made.stored("fused", made.right())
    report = prove_fused(made.stored("base", made.base), [replace(terms[0], pairs=pairs)], fused)
    found = only(report)
    assert (found.slug, found.modules) == ("homeless", ("transformer_blocks.1.attn1.to_w",))
    assert "the nearest name in the base is transformer_blocks.1.attn1.to_" in found.sentence
    assert report.proof.checks[1].detail.endswith("transformer_blocks.1.attn1.to_w")


def test_a_tensor_that_no_adapter_touches_may_not_change(world: Any) -> None:
    made = world()
    found = only(made.report(made.right() | {"norm1.weight": made.base["norm1.weight"] + 1}))
    assert (found.slug, found.modules) == ("touched", ("norm1.weight",))


def test_another_base_is_told_by_what_no_adapter_touches(world: Any) -> None:
    """Half of the numbers that nothing touches, or more."""
    made = world()
    moved = {f"norm{n}.weight": made.base[f"norm{n}.weight"] + 1 for n in range(4)}
    for count, slug in ((1, "touched"), (2, "other-base"), (4, "other-base")):
        some = dict(list(moved.items())[:count])
        found = only(made.report(made.right() | some))
        assert (found.slug, found.modules) == (slug, tuple(some))
    other = {n: rounded(a + 0.5, "F16") for n, a in made.right().items()}
    found = only(made.report(other))
    assert found.slug == "other-base"
    assert "a different base model" in found.sentence
    cast = {n: rounded(a, "BF16") for n, a in made.base.items() if "norm" in n}
    found = only(made.report(made.right() | cast))
    assert (found.slug, found.modules) == ("precision", tuple(cast))
    assert "the whole base was cast through BF16" in found.sentence


@pytest.mark.parametrize("old", ["the base", "another version"])
def test_a_shard_that_is_wrong_as_a_whole_is_stale(world: Any, old: str) -> None:
    made = world()
    right = made.right()
    first = {n: made.base[n] if old == "the base" else rounded(right[n] + right[n][::-1], "F16") for n in WEIGHTS[:3]}
    second = {n: a for n, a in right.items() if n not in first}
    shards = made.stored("a", first, file="a.safetensors") | made.stored("b", second, file="b.safetensors")
    found = only(prove_fused(made.stored("base", made.base), made.terms(), shards))
    assert (found.slug, found.modules) == ("stale-shard", WEIGHTS[:3])
    assert "the shard a.safetensors is stale" in found.sentence
    assert ("the base without the adapter" if old == "the base" else "another version of the model") in found.sentence
    assert found.mend.startswith("fetch or copy FUSED again")


def test_damage_and_numbers_that_are_none_are_counted(world: Any) -> None:
    made = world()
    right = made.right()
    damaged, broken = right[WEIGHTS[0]].copy(), right[WEIGHTS[4]].copy()
    damaged[3, 5:7] *= 2
    broken[1, :3] = np.nan
    broken[2, 0] = np.inf
    report = made.report(right | {WEIGHTS[0]: damaged, WEIGHTS[4]: broken})
    found = {f.slug: f for f in report.findings}
    assert {slug: f.modules for slug, f in found.items()} == {"damaged": WEIGHTS[:1], "nonfinite": WEIGHTS[4:5]}
    assert "damaged numbers among many that are right, 2 times" in found["damaged"].sentence
    assert "NaN or Inf where the base has numbers, 4 times" in found["nonfinite"].sentence
    assert report.total.nonfinite == 4


def test_what_nothing_explains_is_neither_base_nor_sum(world: Any) -> None:
    made = world()
    rng = np.random.default_rng(9)
    found = only(made.report(made.right() | {n: rounded(rng.normal(size=(SIZE, SIZE)), "F16") for n in WEIGHTS[2:4]}))
    assert (found.slug, found.modules) == ("other", WEIGHTS[2:4])


def test_modules_that_were_not_chosen_are_untouched(world: Any) -> None:
    made = world()
    fused = made.base | {WEIGHTS[0]: made.right()[WEIGHTS[0]]}
    assert made.report(fused, only=[Q]).proof.passed
    found = only(made.report(made.right(), only=MODULES[:5]))
    assert (found.slug, found.modules) == ("other-base", WEIGHTS[5:])


def test_a_bound_is_on_the_error_of_the_delta(world: Any) -> None:
    made = world()
    fused = of_all(made, lambda m: made.base[f"{m}.weight"] + RIGHT * 1.01 * made.product(m))
    for bound, right in ((0.02, True), (0.009, False)):
        check = made.report(fused, bound=bound).proof.checks[-1]
        assert (check.passed, check.bound) == (right, bound)
        assert check.figure == pytest.approx(0.01, rel=0.01)
