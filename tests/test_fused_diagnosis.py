"""The rules by which a wrong fuse is put into words, each alone: shards, casts, groups, what is said and what mends it.

Causes and figures are made up; tensors are files of a few numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from loraconv.io.input_file import InputFile
from loraconv.io.safetensors_read import read_safetensors
from loraconv.verifier.fused import diagnosis
from loraconv.verifier.fused.case import TensorResult
from loraconv.verifier.fused.figures import Figures
from loraconv.verifier.fused.guesses import TWICE, Cause
from loraconv.verifier.fused.prove import prove_fused
from tests.test_fused_causes import MODULES, RIGHT, WEIGHTS, World, only, rounded, world

__all__ = ["world"]

UNFUSED, DOUBLED, DAMAGED = Cause("unfused"), Cause("scale", "doubled", constant=2.0), Cause(constant=1.0)


# --- shards -----------------------------------------------------------------------------------------------------------


def stale(
    shards: Mapping[str, Sequence[str]], causes: Mapping[str, Cause | None], changed: Sequence[str] = ()
) -> dict[str, tuple[tuple[str, ...], str]]:
    """Shard -> the tensors that are put down to it, and what it is said to hold. Touched tensors begin with a ``t``."""
    where = {name: shard for shard, names in shards.items() for name in names}
    refs = {name: SimpleNamespace(file=SimpleNamespace(path=Path(f"folder/{shard}"))) for name, shard in where.items()}
    case: Any = SimpleNamespace(fused=refs)
    touched = [TensorResult(name, "", name not in causes, Figures()) for name in where if name.startswith("t")]
    found = {}
    for finding in diagnosis._stale_shards(case, touched, causes, changed):
        assert finding.slug == "stale-shard"
        assert finding.mend.startswith("fetch or copy FUSED again")
        shard = finding.sentence.removeprefix("the shard ").partition(" ")[0]
        held = finding.sentence.partition("it holds ")[2].partition(",")[0]
        found[shard] = (finding.modules, held)
    return found


BASE, VERSION = "the base without the adapter", "another version of the model"
AB = {"a": ("t.x", "t.y"), "b": ("t.z", "t.w")}


@pytest.mark.parametrize(
    ("shards", "causes", "changed", "found"),
    [
        (AB, {"t.x": UNFUSED, "t.y": UNFUSED}, (), {"a": (("t.x", "t.y"), BASE)}),
        (AB, {"t.x": None, "t.y": None}, (), {"a": (("t.x", "t.y"), VERSION)}),
        (AB, {"t.x": None, "t.y": UNFUSED}, (), {"a": (("t.x", "t.y"), VERSION)}),
        (AB, {"t.x": DOUBLED, "t.y": UNFUSED}, (), {"a": (("t.x", "t.y"), VERSION)}),
        (AB, {"t.x": DOUBLED, "t.y": DOUBLED}, (), {}),  # one mistake explains it
        (AB, {}, (), {}),
        (AB, {"t.x": UNFUSED}, (), {}),  # half a shard
        (AB, {"t.x": UNFUSED, "t.y": UNFUSED, "t.z": UNFUSED}, (), {}),  # and more beside it
        (AB, dict.fromkeys(("t.x", "t.y", "t.z", "t.w")), (), {}),  # no shard is right
        ({"a": ("t.x",), "b": ("t.z", "t.w")}, {"t.x": None}, (), {}),  # one tensor says nothing of its shard
        ({"a": ("t.x", "n"), "b": ("t.z",)}, {"t.x": UNFUSED}, ("n",), {"a": (("t.x", "n"), VERSION)}),
        ({"a": ("n", "m"), "b": ("t.z",)}, {}, ("n", "m"), {"a": (("n", "m"), VERSION)}),
        ({**AB, "c": ("t.1", "t.2")}, {"t.x": UNFUSED, "t.y": UNFUSED, "t.1": None, "t.2": None}, (),
         {"a": (("t.x", "t.y"), BASE), "c": (("t.1", "t.2"), VERSION)}),
    ],
)  # fmt: skip
def test_a_shard_is_stale_where_all_of_it_is_wrong_and_nothing_else_is(
    shards: Any, causes: Any, changed: Any, found: Any
) -> None:
    assert stale(shards, causes, changed) == found


# --- casts of the base ------------------------------------------------------------------------------------------------


@pytest.fixture
def stored(tmp_path: Path) -> Iterator[Any]:
    files: list[InputFile] = []

    def read(tensor: torch.Tensor) -> Any:
        path = tmp_path / f"{len(files)}.safetensors"
        save_file({"x": tensor.contiguous()}, path)
        files.append(InputFile(path))
        return read_safetensors(files[-1]).tensors["x"]

    yield read
    for file in files:
        file.close()


def is_cast(stored: Any, base: torch.Tensor, fused: torch.Tensor, low: str = "BF16") -> bool:
    case: Any = SimpleNamespace(base={"x": stored(base)}, fused={"x": stored(fused)})
    return diagnosis._cast_through(case, "x", low)


@pytest.mark.parametrize("shape", [(), (3,), (100,), (3, 5), (70, 2), (2, 3, 2), (0, 2)])
def test_a_tensor_that_went_through_another_dtype_is_known_in_any_shape(shape: tuple[int, ...], stored: Any) -> None:
    base = torch.randn(shape, generator=torch.Generator().manual_seed(2)).half()
    cast = base.bfloat16().half()
    assert is_cast(stored, base, cast)
    assert is_cast(stored, base, base.bfloat16())
    assert is_cast(stored, base.float(), base.float().half(), "F16")
    if base.numel():
        assert not is_cast(stored, base, base)
        assert not is_cast(stored, base, cast * 1.5)
        assert not is_cast(stored, base, cast, "F16")


def test_what_is_of_that_dtype_already_or_no_number_was_not_cast(stored: Any) -> None:
    short, whole = torch.randn(4).bfloat16(), torch.arange(4)
    assert not is_cast(stored, short, short)
    assert not is_cast(stored, short, short.float())
    assert not is_cast(stored, whole, whole.float())
    assert not is_cast(stored, whole.float(), whole)
    assert not is_cast(stored, whole, whole)


@pytest.mark.parametrize(("row", "found"), [(63, False), (64, True)])
def test_the_first_64_rows_tell_a_cast(row: int, found: bool, stored: Any) -> None:
    base = torch.randn(80, 2).half()
    cast = base.bfloat16().half()
    cast[row] += 1
    assert is_cast(stored, base, cast) is found


# --- explanations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("constants", "groups"),
    [
        ((1.7, 1.71, 1.733), 1), ((1.0, 0.9801), 1), ((-1.7, -1.71), 1), ((1.7, 1.735), 2), ((1.0, 0.98), 2),
        ((1.7, -1.7), 2),
    ],
)  # fmt: skip
def test_factors_that_no_word_tells_are_one_finding_within_two_percent(constants: Any, groups: int) -> None:
    """Of the first of them."""
    causes = {f"t{n}": Cause("scale", "", constant=c) for n, c in enumerate(constants)}
    found = list(diagnosis._explained([], causes))
    assert len(found) == groups
    assert found[0].sentence.startswith(f"the adapter counts {constants[0]:.4g} times as much as it should, in ")


def test_causes_of_the_same_words_are_one_finding_whatever_the_constant() -> None:
    causes = {"a": Cause("scale", "halved", constant=0.5), "b": Cause("scale", "halved", constant=0.4), "c": None,
              "d": Cause("scale", "halved", "rounding", "by hand", 0.5), "e": None, "f": DAMAGED, "g": UNFUSED,
              "h": Cause("swapped", "q and k are swapped")}  # fmt: skip
    results = [TensorResult(name, "", False, Figures()) for name in causes]
    found = [(f.slug, f.modules) for f in diagnosis._explained(results, causes)]
    assert found == [
        ("scale", ("a", "b")), ("other", ("c", "e")), ("scale", ("d",)), ("unfused", ("g",)), ("swapped", ("h",))
    ]  # fmt: skip


OWN_SCALE = "fuse it again with its own scale: loraconv fuse ADAPTER --base BASE -o OUT (--alpha ALPHA if it is lost)"
AGAIN = "fuse it again: loraconv fuse ADAPTER --base BASE -o OUT"


@pytest.mark.parametrize(
    ("cause", "sentence", "mend"),
    [
        (Cause("scale", "halved", constant=0.5), "the adapter counts 0.5 times as much as it should (halved), in t",
         OWN_SCALE),
        (Cause("scale", "halved", "rounding", "by hand", 0.5),
         "the adapter counts 0.5 times as much as it should (halved); and by hand, in t", OWN_SCALE),
        (Cause("scale", TWICE, "rounding", "by hand", 2.0),  # twice is two roundings of itself
         "the adapter counts 2 times as much as it should (fused twice), in t", OWN_SCALE),
        (Cause("scale", "the strength was ignored"), "the strength was ignored, in t", OWN_SCALE),
        (Cause("left-out", "adapter 2 was left out"), "adapter 2 was left out, in t",
         "fuse all in one pass: loraconv fuse A@STRENGTH B@STRENGTH --base BASE -o OUT"),
        (Cause("swapped", "to_k and to_q are swapped", "precision", "cast"),
         "to_k and to_q are swapped; and cast, in t", AGAIN),
        (Cause(how="precision", how_text="cast", constant=1.0),
         "cast, so 2.50% of the numbers are not the nearest, by up to 3.25 units in the last place, in t", AGAIN),
        (Cause(how="truncated", how_text="cut off", constant=1.0),
         "cut off, so 2.50% of the numbers are not the nearest, by up to 3.25 units in the last place, in t",
         "fuse it with sums in float32, rounded once: loraconv fuse ADAPTER --base BASE -o OUT"),
        (None, "what is stored is neither the base nor base + delta, in t",
         f"pass the very base and adapters that it was made of, or {AGAIN}"),
        (UNFUSED, "nothing was fused: it is the base, in t", AGAIN),
    ],
)  # fmt: skip
def test_each_cause_has_its_sentence_and_the_command_that_mends_it(
    cause: Cause | None, sentence: str, mend: str
) -> None:
    result = TensorResult("t", "m", False, Figures(elements=200, misrounded=5, ulps=3.25))
    (found,) = diagnosis._explained([result], {"t": cause})
    assert (found.sentence, found.mend, found.modules) == (sentence, mend, ("t",))


def test_the_effect_of_a_rounding_is_that_of_all_its_tensors_together() -> None:
    cause = Cause(how="rounding", how_text="rounded", constant=1.0)
    results = [
        TensorResult("a", "", False, Figures(elements=100, misrounded=1, ulps=0.75)),
        TensorResult("b", "", False, Figures(elements=300, misrounded=7, ulps=0.625)),
        TensorResult("c", "", True, Figures(elements=300, misrounded=9, ulps=7.0)),
    ]
    (found,) = diagnosis._explained(results, {"a": cause, "b": cause})
    assert "so 2.00% of the numbers are not the nearest, by up to 0.75 units" in found.sentence


def test_broken_and_damaged_numbers_are_counted_over_all_tensors() -> None:
    wrong = [
        TensorResult("a", "", False, Figures(wrong=3, far=1)), TensorResult("b", "", False, Figures(wrong=2, far=4)),
        TensorResult("c", "", False, Figures(wrong=9, nonfinite=2)), TensorResult("d", "", False, Figures(nonfinite=1)),
        TensorResult("e", "", False, Figures(wrong=9, far=9)),
    ]  # fmt: skip
    broken, damaged = diagnosis._broken(wrong, {"a": DAMAGED, "b": DAMAGED, "e": DOUBLED})
    assert broken.sentence == "NaN or Inf where the base has numbers, 3 times, in c; d"
    assert broken.mend == f"see whether the adapter holds them: loraconv inspect ADAPTER; if not, {AGAIN}"
    assert damaged.sentence == "damaged numbers among many that are right, 7 times, in a; b"
    assert damaged.mend.startswith("fetch or copy FUSED again")
    assert list(diagnosis._broken(wrong[:2], {})) == []


def test_after_eight_tensors_without_an_explanation_none_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[tuple[str, Cause | None]]()
    answers: dict[str, Cause] = {}

    def explain(sample: str, before: Cause | None) -> Cause | None:
        asked.append((sample, before))
        return answers.get(sample)

    monkeypatch.setattr(diagnosis, "explain", explain)
    monkeypatch.setattr(diagnosis, "Sample", lambda case, tensor: tensor.name)
    names = [f"t{n}" for n in range(12)]
    wrong = [TensorResult(name, "", False, Figures(nonfinite=name == "t3")) for name in names]
    case: Any = None
    causes = diagnosis._causes(case, wrong)
    assert [name for name, _ in asked] == [n for n in names if n != "t3"][:8]
    assert causes == dict.fromkeys(n for n in names if n != "t3")
    asked.clear()
    answers |= {"t1": DOUBLED, "t5": UNFUSED}
    causes = diagnosis._causes(case, wrong)
    assert [name for name, _ in asked] == list(causes)
    assert [before for _, before in asked] == [None, None, *[DOUBLED] * 3, *[UNFUSED] * 6]
    assert {name: cause for name, cause in causes.items() if cause} == answers


# --- by name ----------------------------------------------------------------------------------------------------------


def of_names(base: Mapping[str, str], modules: Sequence[str]) -> Any:
    return SimpleNamespace(base=base, modules=modules, fits=lambda module: False)


def test_modules_without_a_weight_are_told_with_a_name_that_is_like_the_first_if_there_is_one() -> None:
    modules = [f"{word}.proj" for word in ("alpha", "beta", "gamma", "delta", "epsilon")]
    finding = diagnosis._homeless(
        of_names({"alpha.pro.weight": "", "alpha.prom.weight": "", "q": ""}, modules), modules
    )
    assert finding.modules == tuple(modules)
    assert finding.sentence.endswith(
        ": alpha.proj; beta.proj; gamma.proj; delta.proj; the nearest name in the base is alpha.pro.weight"
    )
    finding = diagnosis._homeless(of_names({"q": "", "v": ""}, modules), modules)
    assert finding.sentence.endswith("so they had to be ignored: alpha.proj; beta.proj; gamma.proj; delta.proj")


def test_two_dtypes_in_place_of_one_have_no_option_that_asks_for_them(world: Any) -> None:
    made: World = world()
    mixed = made.stored("a", {WEIGHTS[0]: made.right()[WEIGHTS[0]]}, "F32")
    mixed |= made.stored("b", {WEIGHTS[1]: made.right()[WEIGHTS[1]]}, "BF16")
    fused = made.stored("c", {n: a for n, a in made.right().items() if n not in WEIGHTS[:2]}) | mixed
    base = made.stored("base", made.base)
    case: Any = SimpleNamespace(base=base, fused=fused, modules=[], dtype=None)
    case.kept = lambda name: base[name].dtype == fused[name].dtype
    (finding,) = diagnosis._by_name(case)
    assert (finding.slug, set(finding.modules), finding.mend) == ("retyped", set(WEIGHTS[:2]), AGAIN)
    assert finding.sentence.startswith("the fused model has BF16 and F32 instead of F16 in ")


def test_another_base_is_told_once_and_only_what_has_a_cause_besides(world: Any) -> None:
    """Fused into another base at twice the strength: what the sums are off by there is no finding of its own."""
    made: World = world()
    other = {n: rounded(a + 0.5, "F16") for n, a in made.base.items()}
    doubled = {f"{m}.weight": rounded(made.exact(m) + RIGHT * made.product(m), "F16") for m in MODULES[:2]}
    report = made.report(other | doubled)
    assert {f.slug: f.modules for f in report.findings} == {
        "other-base": tuple(n for n in made.base if n.startswith("norm")), "scale": WEIGHTS[:2]
    }  # fmt: skip
    assert "fused twice" in report.findings[1].sentence


def test_a_stale_shard_takes_its_tensors_out_of_every_other_finding(world: Any) -> None:
    made: World = world()
    right = made.right()
    first = {n: made.base[n] for n in WEIGHTS[:2]} | {"norm0.weight": made.base["norm0.weight"] + 1}
    second = {n: a for n, a in right.items() if n not in first}
    shards = made.stored("a", first, file="a.safetensors") | made.stored("b", second, file="b.safetensors")
    found = only(prove_fused(made.stored("base", made.base), made.terms(), shards))
    assert (found.slug, set(found.modules)) == ("stale-shard", {*WEIGHTS[:2], "norm0.weight"})
    assert "another version of the model" in found.sentence
