"""The proof of a fused model where tensors are no matrices, are missing, or nothing is touched; its checks in words."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from loraconv.errors import FormatError
from loraconv.verifier.fused import prove
from loraconv.verifier.fused.case import Case, TensorResult, Term
from loraconv.verifier.fused.figures import Figures
from loraconv.verifier.fused.prove import FusedReport, prove_fused
from loraconv.verifier.numbers import Held, Pair
from loraconv.verifier.proof import Check
from tests.test_fused_causes import RIGHT, SIZE, WEIGHTS, Q, World, rounded, world

__all__ = ["world"]

BIAS, KERNEL = "proj.bias", "conv"


class Wider(World):
    """And a bias and a convolution that have a delta as well."""

    def __init__(self, folder: Path, dtype: str = "F16") -> None:
        super().__init__(folder, dtype)
        rng = np.random.default_rng(8)
        self.base[BIAS] = rounded(rng.normal(size=SIZE), dtype)
        self.base[f"{KERNEL}.weight"] = rounded(rng.normal(size=(SIZE, 2, 3, 3)), dtype)
        self.more = {BIAS: rng.normal(size=(SIZE, 1)), KERNEL: rng.normal(size=(SIZE, 18))}

    def terms(self) -> list[Term]:
        one = Held(np.ones((1, 1)), "F64")
        _, singular, right = np.linalg.svd(self.more[KERNEL], full_matrices=False)
        left = self.more[KERNEL] @ right.T
        assert len(singular) == 18
        more = {
            BIAS: Pair(one, Held(self.more[BIAS], "F64"), Fraction(5, 2)),
            KERNEL: Pair(Held(right, "F64"), Held(left, "F64"), Fraction(5, 2), kernel=(3, 3)),
        }
        (term,) = super().terms()
        return [replace(term, pairs={**term.pairs, **more})]

    def right(self) -> dict[str, Any]:
        bias = self.base[BIAS] + RIGHT * self.more[BIAS][:, 0]
        kernel = self.base[f"{KERNEL}.weight"] + RIGHT * self.more[KERNEL].reshape(SIZE, 2, 3, 3)
        return super().right() | {BIAS: rounded(bias, "F16"), f"{KERNEL}.weight": rounded(kernel, "F16")}


@pytest.fixture
def wider(tmp_path: Path) -> Any:
    made = Wider(tmp_path)
    yield made
    for file in made.files:
        file.close()


def found(report: FusedReport) -> dict[str, tuple[str, ...]]:
    return {finding.slug: finding.modules for finding in report.findings}


def test_biases_and_kernels_are_looked_at_number_for_number(wider: Wider) -> None:
    right = wider.right()
    report = wider.report(right)
    assert report.proof.passed
    assert {t.name for t in report.tensors} == {*WEIGHTS, BIAS, f"{KERNEL}.weight"}
    for name in (BIAS, f"{KERNEL}.weight"):
        spoilt = right[name].copy()
        spoilt.flat[5] += 1
        # Of a bias, one number is more than a few.
        slug = "other" if name == BIAS else "damaged"
        assert found(wider.report(right | {name: spoilt})) == {slug: (name,)}
        assert found(wider.report(right | {name: wider.base[name]})) == {"unfused": (name,)}


@pytest.mark.parametrize("name", [BIAS, f"{KERNEL}.weight"])
def test_what_is_no_matrix_may_be_missing_or_of_another_shape(name: str, wider: Wider) -> None:
    right = wider.right()
    assert found(wider.report({n: a for n, a in right.items() if n != name})) == {"missing": (name,)}
    for shape in ((), (SIZE + 1,), (SIZE, 2)):
        assert found(wider.report(right | {name: np.zeros(shape)})) == {"other-base": (name,)}


def test_tensors_are_told_in_the_order_of_the_adapter_whatever_their_place_in_the_file(world: Any) -> None:
    made: World = world()
    terms = made.terms()
    turned = [replace(terms[0], pairs=dict(reversed(terms[0].pairs.items())))]
    report = prove_fused(made.stored("base", made.base), turned, made.stored("fused", made.right()))
    assert [tensor.name for tensor in report.tensors] == list(reversed(WEIGHTS))


def test_models_with_nothing_in_common_are_no_pair(world: Any) -> None:
    made: World = world()
    base = made.stored("base", made.base)
    with pytest.raises(FormatError) as caught:
        prove_fused(base, made.terms(), made.stored("fused", {"x": np.zeros(2), "y": np.zeros(2)}))
    assert caught.value.slug == "not-comparable"
    assert caught.value.where.endswith("fused: x; y")
    pair = Pair(Held(np.zeros((1, 3)), "F16"), Held(np.zeros((4, 1)), "F16"), 1)
    for module, why in (
        ("nowhere", "the base has no nowhere.weight"),
        (Q, f"{Q}.weight is F16 [{SIZE}, {SIZE}] in the base, [4, 3] by the adapter"),
    ):
        with pytest.raises(FormatError) as caught:
            prove_fused(base, [Term({module: pair}, Fraction(1))], base)
        assert (caught.value.slug, caught.value.why, caught.value.where) == ("not-comparable", why, module)
    both = [Term({Q: pair}, Fraction(1)), Term({Q: made.terms()[0].pairs[Q]}, Fraction(1))]
    with pytest.raises(FormatError, match="does not belong") as caught:
        prove_fused(base, both, base)
    assert caught.value.why.endswith(f"[4, 3] and [{SIZE}, {SIZE}] by the adapter")
    assert prove_fused(base, [Term({}, Fraction(1))], base).total == Figures()


# --- checks in words --------------------------------------------------------------------------------------------------


def result(name: str, same: bool, **figures: Any) -> TensorResult:
    return TensorResult(name, "", same, Figures(**figures))


def test_the_check_of_touched_tensors_has_the_worst_figure_of_all() -> None:
    what, bounded = "every weight is base + delta, rounded once", "the change is the delta"
    tensors = (
        result("a", True, elements=1000, wrong=1, rest=1.0, size=4.0), result("b", False, elements=100, wrong=7),
        result("c", True),
    )  # fmt: skip
    assert prove._check_touched((), None) == Check("L2", what, True, 0, 0.0, 1e-3)
    assert prove._check_touched((), 0.5) == Check("L2", bounded, True, 0, 0.0, 0.5)
    assert prove._check_touched(tensors, None) == Check("L2", what, False, 3, 0.07, 1e-3, "not so in b")
    assert prove._check_touched(tensors, 0.6) == Check("L2", bounded, False, 3, 0.5, 0.6, "not so in b")
    assert prove._check_touched(tensors[:1], 0.6) == Check("L2", bounded, True, 1, 0.5, 0.6)
    many = tuple(result(word, False) for word in "pqrstu")
    assert prove._check_touched(many, None).detail == "not so in p; q; r; s"


def test_what_is_untouched_and_what_was_trained_whole_are_two_checks() -> None:
    untouched, changed, beside = ["a", "b", "c", "d"], ["a", "c", "x"], {"c": None, "d": None, "e": None}
    given: Any = untouched, changed, None, beside
    base, run = "what no adapter touches is byte for byte that of the base", "what was trained whole is byte for byte"
    assert prove._check_untouched(*given) == Check("L1", base, False, 2, detail="other content in a")
    assert prove._check_beside(*given) == Check("L1", f"{run} that of the run", False, 2, detail="other content in c")
    given = untouched, [], "BF16", beside
    base, run = "what no adapter touches is that of the base", "what was trained whole is that of the run"
    assert prove._check_untouched(*given) == Check("L1", f"{base}, rounded once to BF16", True, 2)
    assert prove._check_beside(*given) == Check("L1", f"{run}, rounded once to BF16", True, 2)
    many: Any = list("pqrstu"), list("pqrstu"), None, {}
    assert prove._check_untouched(*many).detail == "other content in p; q; r; s"


def test_modules_without_a_home_are_counted_and_four_are_named() -> None:
    pair = Pair(Held(np.zeros((1, 3)), "F16"), Held(np.zeros((4, 1)), "F16"), 1)
    home: Any = SimpleNamespace(shape=(4, 3), dtype="F16")
    modules = list("pqrstu")
    case = Case({"q.weight": home}, [Term(dict.fromkeys(modules, pair), Fraction(1))], {}, modules, None, None)
    what = "every module of the adapter has its weight in the base"
    detail = "no weight of that name and shape in the base: p; r; s; t"
    assert prove._check_homes(case) == Check("L0", what, False, 6, detail=detail)
    assert prove._check_homes(replace(case, modules=["q"])) == Check("L0", what, True, 1)


def test_the_share_that_a_rounding_leaves_is_that_of_all_tensors_together(world: Any) -> None:
    """An adapter a thousand times as weak: most of it is less than half a unit of float16."""
    made: World = world()
    for downs in made.downs:
        for module in downs:
            downs[module] /= 2.0**12
    report = made.report(made.right())
    assert report.proof.passed
    right, exact = made.right(), {name: made.exact(name.removesuffix(".weight")) for name in WEIGHTS}
    change, delta = ({n: x[n] - made.base[n] for n in WEIGHTS} for x in (right, exact))
    kept = sum(np.sum(change[n] * delta[n]) for n in WEIGHTS) / sum(np.sum(delta[n] ** 2) for n in WEIGHTS)
    assert report.kept == pytest.approx(kept, rel=1e-4)
    assert report.total.changed == sum(np.count_nonzero(change[n]) for n in WEIGHTS)
