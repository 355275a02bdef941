"""Two states of a checkpoint in memory: what each change is called, what it is put down to, and what may be.

Names and numbers are made here; figures are computed with numpy.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from loraconv.verifier.changes.comparison import Figures, compare_states, elements, measure
from loraconv.verifier.changes.diagnosis import diagnose_changes
from loraconv.verifier.changes.states import Expect, States, remarks

DTYPES = {"float16": "F16", "float32": "F32", "float64": "F64", "int64": "I64", "uint8": "U8", "bool": "BOOL"}


class Tensor:
    """An array as the verifier reads it, in pieces of ``piece`` bytes; ``place`` is the storage that it is part of."""

    def __init__(self, array: Any, dtype: str = "", place: str = "", piece: int = 1 << 20, offset: int = 0) -> None:
        array = np.asarray(array)
        self.dtype, self.shape = dtype or DTYPES[array.dtype.name], array.shape
        self.raw, self.piece, self.strides, self.offset = np.ascontiguousarray(array).tobytes(), piece, None, offset
        if dtype == "BF16":
            self.raw = torch.from_numpy(array).to(torch.bfloat16).view(torch.int16).numpy().tobytes()
        self.file, self.storage = SimpleNamespace(inode=1), ("", place)

    def pieces(self) -> Any:
        return (self.raw[at : at + self.piece] for at in range(0, len(self.raw), self.piece))


def f32(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def states(before: dict[str, Any], after: dict[str, Any], expect: Expect | None = None, **more: Any) -> States:
    one, two = ({n: t if isinstance(t, Tensor) else Tensor(t) for n, t in s.items()} for s in (before, after))
    given: Any = one, two
    return States(*given, tuple(compare_states(*given)), expect, **more)


def found(*given: Any, **more: Any) -> dict[str, tuple[str, ...]]:
    """Slug -> the names that the finding explains."""
    findings = diagnose_changes(states(*given, **more))
    assert len({f.slug for f in findings}) == len(findings)
    return {f.slug: f.modules for f in findings}


def sentence(slug: str, *given: Any, **more: Any) -> str:
    (text,) = [f.sentence for f in diagnose_changes(states(*given, **more)) if f.slug == slug]
    return text


# --- figures --------------------------------------------------------------------------------------------------------


def test_the_figures_of_a_change_are_numpys() -> None:
    one, two = f32(6, 5), f32(6, 5)
    two[2] += f32(5, seed=1)
    wide = [x.astype(np.float64) for x in (one, two)]
    gap = np.linalg.norm(wide[1] - wide[0]) / np.linalg.norm(wide[0])
    figures: Any = measure(Tensor(one), Tensor(two, piece=7))  # type: ignore[arg-type]
    assert figures.relative == pytest.approx(gap, rel=1e-12)
    assert figures.greatest == np.max(np.abs(wide[1] - wide[0]))
    assert (figures.changed, figures.count, figures.nonfinite, figures.rounded) == (5, 30, 0, "")


@pytest.mark.parametrize(
    ("one", "two", "right"),
    [
        ([0.0, 0.0], [0.0, 3.0], Figures(float("inf"), 3.0, 1, 2, 0, "")),
        ([0.0, 0.0], [0.0, 0.0], Figures(0.0, 0.0, 0, 2, 0, "")),
        ([3.0, np.nan], [3.0, np.nan], Figures(0.0, 0.0, 0, 2, 0, "")),
        ([3.0, np.nan], [3.0, 1.0], Figures(0.0, 0.0, 1, 2, 0, "")),
        ([3.0, 1.0], [3.0, np.nan], Figures(0.0, 0.0, 1, 2, 1, "")),
        ([4.0, np.inf], [2.0, np.inf], Figures(0.5, 2.0, 1, 2, 0, "")),
        ([4.0, 1.0], [4.0, -np.inf], Figures(0.0, 0.0, 1, 2, 1, "")),
    ],
)
def test_numbers_that_are_none_are_counted_and_left_out(one: Any, two: Any, right: Figures) -> None:
    assert measure(Tensor(one), Tensor(two)) == right  # type: ignore[arg-type]


@pytest.mark.parametrize("piece", [1, 7, 8, 24, 1000])
def test_elements_come_in_order_whatever_the_pieces_of_the_file(piece: int) -> None:
    array = np.arange(10.0)
    chunks = list(elements(Tensor(array, piece=piece), count=4))  # type: ignore[arg-type]
    assert np.concatenate(chunks).tolist() == array.tolist()
    assert [len(chunk) for chunk in chunks] == [4, 4, 2]


@pytest.mark.parametrize("kind", ["BF16", "F16"])
def test_a_rounding_is_told_by_its_dtype_even_beside_nan(kind: str) -> None:
    one = np.append(f32(9), np.float32(np.nan))
    half = one.astype(np.float16) if kind == "F16" else torch.from_numpy(one).to(torch.bfloat16).float().numpy()
    figures = [
        measure(Tensor(one), Tensor(half.astype(np.float32))),  # type: ignore[arg-type]
        measure(Tensor(one), Tensor(half if kind == "F16" else one, kind)),  # type: ignore[arg-type]
    ]
    assert [f.rounded for f in figures if f is not None] == [kind, kind]
    spoilt = half.astype(np.float32)
    spoilt[0] += 1
    other: Any = measure(Tensor(one), Tensor(spoilt))  # type: ignore[arg-type]
    assert other.rounded == ""


def test_whole_numbers_are_compared_and_other_dtypes_are_not() -> None:
    figures: Any = measure(Tensor(np.array([3, 4])), Tensor(np.array([3, 9])))  # type: ignore[arg-type]
    assert (figures.relative, figures.greatest, figures.changed, figures.rounded) == (1.0, 5.0, 1, "")
    assert measure(Tensor(np.array([3, 4])), Tensor(np.array([3, 4]), "F8_E4M3")) is None  # type: ignore[arg-type]


def test_every_tensor_is_one_of_seven_things() -> None:
    a, b, c, d, e = (f32(2, 3, seed=n) for n in range(5))
    before = {"same": a, "moved": b, "wide": c, "turned": d, "gone": e, "fewer": a, "cast": b}
    after = {
        "same": a, "net.x": b, "wide": c.astype(np.float64), "turned": d.reshape(3, 2), "fewer": a[:1], "more": f32(1),
        "cast": Tensor(c, "BF16"),
    }  # fmt: skip
    changes = {c.name: c for c in states(before, after).changes}
    assert {name: change.kind for name, change in changes.items()} == {
        "same": "identical", "moved": "renamed", "wide": "retyped", "turned": "reshaped", "gone": "missing",
        "fewer": "reshaped", "more": "new", "cast": "changed",
    }  # fmt: skip
    assert {name: c.other for name, c in changes.items() if c.other} == {"moved": "net.x"}
    assert changes["gone"].before == ("F32", (2, 3))
    assert changes["gone"].after is changes["more"].before is None
    assert changes["more"].after == ("F32", (1,))
    assert (changes["turned"].before, changes["turned"].after) == (("F32", (2, 3)), ("F32", (3, 2)))
    assert changes["fewer"].figures is None
    assert {change.rank for change in changes.values()} == {0}
    assert {change.rank for change in compare_states({"w": Tensor(a)}, {"x": Tensor(b)}, 3)} == {3}  # type: ignore[dict-item]
    assert changes["turned"].figures == Figures(0.0, 0.0, 0, 6, 0, "")


# --- tables of positions ----------------------------------------------------------------------------------------------

WAVES = np.concatenate([np.sin(x := np.arange(6)[:, None] * [1.0, 0.1]), np.cos(x)], axis=1).astype(np.float32)
LEARNED = f32(6, 4)
UNIT = 2.0**-24
TABLES: dict[str, tuple[str, Any, Any, str]] = {
    "never used": ("transformer.position_embeddings.weight", LEARNED, f32(6, 4, seed=1), "table-unused"),
    "never used, missing": ("transformer.position_embeddings.weight", LEARNED, None, "table-unused"),
    "lost": ("pos_embed", LEARNED, None, "table-lost"),
    "left out": ("pos_embed", WAVES, None, "table-uncomputed"),
    "left out, computed in part": ("pos_embed", np.concatenate([WAVES, LEARNED]), None, "table-lost"),
    "left out, with rows of zeros": ("pos_embed", np.concatenate([WAVES * 0, WAVES]), None, "table-uncomputed"),
    "trained on": ("pos_embed", LEARNED, LEARNED * np.float32(1.5), "changed"),
    "doubled": ("pos_embed", LEARNED, LEARNED * np.float32(2), "table-remade"),
    "in its place a computed one": ("pos_embed", LEARNED, WAVES, "table-remade"),
    "of another size": ("pos_embed", LEARNED, LEARNED[:3], "table-remade"),
    "reshaped": ("pos_embed", LEARNED, LEARNED[None], "reshaped"),
    "computed, of another size": ("pos_embed", WAVES, WAVES[:3], "table-resized"),
    "computed again": ("pos_embed", WAVES, WAVES + np.float32(2 * UNIT), "table-recomputed"),
    "computed, then trained": ("pos_embed", WAVES, WAVES * np.float32(1.5), "changed"),
    # Two stored numbers of float32 and eight roundings of an angle of one row.
    "frequencies, as far as roundings go": (
        "rope.inv_freq", np.float64([0.5, 0]), np.float64([0.5 + (2.0**-53 * 2 + 8 * UNIT), 0]), "table-recomputed",
    ),
    "frequencies, farther": ("rope.inv_freq", np.float64([0.5, 0]), np.float64([0.5 + 9 * UNIT, 0]), "table-resized"),
    "frequencies of whole numbers": ("rope.inv_freq", np.array([5, 2]), np.array([5, 3]), "table-resized"),
    "cosines of three rows": (
        "rope.freqs_cos", np.full((3, 2), 0.5), np.full((3, 2), 0.5 + 24 * UNIT), "table-recomputed",
    ),
    "cosines of three rows, farther": (
        "rope.freqs_cos", np.full((3, 2), 0.5), np.full((3, 2), 0.5 + 25 * UNIT), "table-resized",
    ),
    "no table": ("pos", LEARNED, LEARNED * 2, "changed"),
}  # fmt: skip


@pytest.mark.parametrize("case", TABLES)
def test_what_became_of_a_table_of_positions(case: str) -> None:
    name, before, after, slug = TABLES[case]
    rest = {"w": f32(2)}
    assert found({name: before} | rest, rest if after is None else {name: after} | rest) == {slug: (name,)}


# --- causes -----------------------------------------------------------------------------------------------------------

A, B = "blocks.0.lora_A.weight", "blocks.0.lora_B.weight"
BASE = {"blocks.0.weight": f32(3, 3), "blocks.1.weight": f32(3, 3, seed=1), "norm": f32(3)}
FACTORS = {A: f32(1, 3), B: f32(3, 1)}


def test_an_average_differs_in_what_was_trained() -> None:
    one, two = BASE | FACTORS, BASE | FACTORS | {A: f32(1, 3, seed=5), "norm": BASE["norm"] + 1}
    for averaged in ((True, False), (False, True)):
        assert found(one, two, averaged=averaged) == {"ema": (A,), "base-moved": ("norm",)}
        assert found(one, two, averaged=averaged, trained=frozenset({"norm"})) == {"ema": ("norm", A)}
        which = sentence("ema", one, two, averaged=averaged)
        assert f"the {'first' if averaged[0] else 'second'} is the moving average" in which
    for averaged in ((True, True), (False, False)):
        assert found(one, two, averaged=averaged) == {"base-moved": ("norm",), "changed": (A,)}


def test_a_base_moves_only_under_a_lora() -> None:
    two = {n: a + 1 for n, a in BASE.items()}
    assert found(BASE, two) == {"changed": tuple(BASE)}
    assert found(BASE, two | FACTORS, "only-lora") == {"base-moved": tuple(BASE)}
    assert "3 of 3 tensors" in sentence("base-moved", BASE, two | FACTORS, "only-lora")
    two = BASE | {"norm": BASE["norm"] + 1, "extra": f32(1)} | FACTORS
    assert "1 of 3 tensors" in sentence("base-moved", BASE, two, "only-lora")


def test_how_far_the_base_moved_is_the_most_of_any_tensor() -> None:
    two = BASE | {"blocks.0.weight": BASE["blocks.0.weight"] * 2, "norm": BASE["norm"] + np.float32(0.125)} | FACTORS
    text = sentence("base-moved", BASE, two, "only-lora")
    assert "1.0e+00 relative" in text
    assert f"{np.max(np.abs(BASE['blocks.0.weight'])):.1e} absolute" in text
    odd = {"x": Tensor([1.0], "F8_E4M3")}, {"x": Tensor([2.0], "F8_E4M3")}
    odd[1]["x"].shape = odd[0]["x"].shape = (8,)
    assert "in bytes that are no numbers" in sentence("changed", *odd)


def test_numbers_that_became_none_are_told_first_and_counted() -> None:
    spoilt = {n: np.where(np.arange(a.size).reshape(a.shape) < 2, np.float32(np.inf), a) for n, a in BASE.items()}
    assert found(BASE, spoilt | {"norm": BASE["norm"]}) == {"nonfinite": ("blocks.0.weight", "blocks.1.weight")}
    assert sentence("nonfinite", BASE, spoilt).startswith("6 numbers became NaN or Inf")


def test_tensors_that_were_one_are_missed_where_only_some_of_them_changed() -> None:
    one = {name: Tensor(BASE["norm"], place="s") for name in ("head", "embed", "tail")}
    two = {name: Tensor(BASE["norm"], place=name) for name in one}
    assert found(one, two) == {}
    (text,) = remarks(states(one, two))
    assert "were one tensor before" in text
    assert all(name in text for name in one)
    assert found(one, two | {"head": Tensor(BASE["norm"] * 3, place="x")}) == {"split": ("head",)}
    missing = {name: tensor for name, tensor in two.items() if name != "tail"}
    assert found(one, missing) == {"split": ("tail",)}
    assert found(one, two | {"head": Tensor(BASE["norm"].astype(np.float64), place="x")}) == {"split": ("head",)}
    every = {name: Tensor(BASE["norm"] * 3, place=name) for name in one}
    assert found(one, every) == {"changed": tuple(one)}
    kept = {name: Tensor(BASE["norm"], place="t") for name in one}
    assert not list(remarks(states(one, kept)))
    parts = {name: Tensor(BASE["norm"], place="s", offset=n) for n, name in enumerate(one)}
    assert not list(remarks(states(parts, two)))


CASTS: dict[str, tuple[Any, Any, str]] = {
    "wider": (f32(4), f32(4).astype(np.float64), "retyped"),
    "narrower": (f32(4), f32(4).astype(np.float16), "rounded"),
    "there and back": (f32(4), f32(4).astype(np.float16).astype(np.float32), "rounded"),
    "narrower and in another shape": (f32(4), f32(4).astype(np.float16).reshape(2, 2), "reshaped"),
    "other numbers in another shape": (f32(4), f32(4, seed=1).reshape(2, 2), "reshaped"),
    "other bytes of the same numbers": (np.zeros(4, np.float32), -np.zeros(4, np.float32), "changed"),
    "other numbers in another dtype": (f32(4), f32(4, seed=1).astype(np.float16), "changed"),
}


@pytest.mark.parametrize("case", CASTS)
def test_a_cast_is_told_from_a_change(case: str) -> None:
    before, after, slug = CASTS[case]
    assert found({"x": before}, {"x": after}) == {slug: ("x",)}
    words = {
        "wider": "stored as F64 now", "narrower": "rounded once to F16, stored as F16 now",
        "there and back": "rounded once to F16, stored as F32 as before",
        "narrower and in another shape": "rounded once to F16", "other numbers in another shape": "have another shape",
    }  # fmt: skip
    assert words.get(case, "changed") in sentence(slug, {"x": before}, {"x": after})


def test_casts_are_grouped_by_what_was_cast_to_what() -> None:
    one = {name: f32(4, seed=n) for n, name in enumerate("abc")}
    two = {"a": one["a"].astype(np.float16), "b": one["b"].astype(np.float64), "c": one["c"].astype(np.float16)}
    assert found(one, two) == {"rounded": ("a", "c"), "retyped": ("b",)}


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"])
def test_whole_numbers_are_subtracted_too(dtype: str) -> None:
    word = dtype.upper().replace("UINT", "U").replace("INT", "I")
    one, two = np.array([0, 1, 1, 0]).astype(dtype), np.array([0, 1, 0, 1]).astype(dtype)
    figures = measure(Tensor(one, word), Tensor(two, word))  # type: ignore[arg-type]
    assert figures is not None
    assert (figures.changed, figures.greatest) == (2, 1.0)
    assert figures.relative == pytest.approx(1.0)


PREFIXES: dict[str, tuple[tuple[str, str], tuple[str, str], str]] = {
    "one more": (("a.b.w", "a.c.w"), ("m.a.b.w", "m.a.c.w"), "begin with 'm.' instead of ''"),
    "one less": (("m.a.b.w", "m.a.c.w"), ("a.b.w", "a.c.w"), "begin with '' instead of 'm.'"),
    "one more before two steps": (("a.w", "c.w"), ("m.a.w", "m.c.w"), "begin with 'm.' instead of ''"),
    "another": (("m.a.b.w", "m.a.c.w"), ("n.o.a.b.w", "n.o.a.c.w"), "begin with 'n.o.' instead of 'm.'"),
}


@pytest.mark.parametrize("case", PREFIXES)
def test_another_prefix_is_told_with_the_call_that_mends_it(case: str) -> None:
    old, new, words = PREFIXES[case]
    one, two = (dict(zip(names, (f32(3), f32(4)), strict=True)) for names in (old, new))
    assert found(one, two) == {"prefix": old}
    assert words in sentence("prefix", one, two)
    assert "none of 2 tensors" in sentence("prefix", one, two)
    (finding,) = diagnose_changes(states(one, two))
    call = finding.mend.partition("key")[2].replace("{{", "{").replace("}}", "}")
    assert tuple(eval(f"key{call}", {"key": name}) for name in new) == old
    changed = {name: array + 1 for name, array in two.items()}
    assert set(found(one, changed)) == {"prefix", "changed"}


def test_a_name_that_ends_in_another_way_is_only_renamed() -> None:
    assert found({"a.b.w": f32(3), "x": f32(1)}, {"a.b.v": f32(3), "x": f32(1)}) == {"renamed": ("a.b.w",)}
    assert found({"w": f32(3), "x": f32(1)}, {"m.w": f32(3), "x": f32(1)}) == {"renamed": ("w",)}


def test_the_mark_of_an_adapted_layer_put_in_and_taken_out() -> None:
    bare, marked = {"a.b.weight": f32(3)}, {"a.b.original.weight": f32(3)}
    assert found(bare, marked) == {"lora-inserted": ("a.b.weight",)}
    assert found(bare, marked, "only-lora") == {}
    assert found(marked, bare, "only-lora") == {"original-lost": ("a.b.original.weight",)}
    assert "was not merged" in sentence("original-lost", marked, bare)
    merged = {"a.b.weight": f32(3) + 1}
    assert "as merging does" in sentence("original-lost", marked, merged)


def test_what_a_lora_run_may_do_and_what_it_may_not() -> None:
    one = BASE | FACTORS
    trained = one | {A: f32(1, 3, seed=4)}
    assert found(one, trained, "only-lora") == {}
    assert set(found(one, trained, "identical")) == set(found(one, trained)) == {"changed"}
    for name in ("model_ema.blocks", "optimizer.state", "blocks.0.exp_avg", "blocks.0.exp_avg_sq"):
        assert found(one, one | {name: f32(1)}, "only-lora") == {}
        assert found(one, one | {name: f32(1)}, "identical") == {"new": (name,)}
        assert found(one | {name: f32(1)}, one, "only-lora") == {"missing": (name,)}
    assert found(one, one | {"first_stage_model.x": f32(1)}, "only-lora") == {}
    assert found(one, one | {"first_stage_model.x": f32(1)}) == {"component": ("first_stage_model.x",)}
    assert "holds the VAE" in sentence("component", one, one | {"first_stage_model.x": f32(1)})
    assert "holds the text encoder" in sentence("component", one, one | {"conditioner.x": f32(1)})
    vae = {"first_stage_model.y": f32(1)}
    assert found(one | vae, one | vae | {"first_stage_model.x": f32(1)}, "only-lora") == {
        "new": ("first_stage_model.x",)
    }
    mends = {f.slug: f.mend for f in diagnose_changes(states(BASE, BASE | {"norm": f32(3) + 1}, "only-lora"))}
    assert "--expect" not in mends["changed"]  # that was the command
    assert "verify --base {before} ADAPTER {after}" in mends["changed"]
    (other,) = diagnose_changes(states(BASE, BASE | {"norm": f32(3) + 1}))
    assert "--expect only-lora" in other.mend
    assert found(one, BASE, "only-lora") == {"lora-lost": (A, B)}
    assert found(one, BASE | {B: FACTORS[B]}, "only-lora") == {"lora-lost": (A,)}


def test_a_lora_that_does_nothing_is_a_cause_only_of_what_should_not_be() -> None:
    zero = BASE | {A: f32(1, 3), B: np.zeros((3, 1), np.float32)}
    assert found(BASE, zero, "only-lora") == {}
    assert set(found(BASE, zero | {"norm": f32(3) + 1}, "only-lora")) == {"untrained", "base-moved"}
    assert "all 1 up factors" in sentence("untrained", BASE, zero | {"norm": f32(3) + 1}, "only-lora")
    moved = BASE | FACTORS | {"norm": f32(3) + 1}
    assert set(found(BASE, moved, "only-lora")) == {"base-moved"}


def test_what_is_left_is_told_as_it_is_and_factors_are_called_so() -> None:
    assert sentence("missing", BASE | FACTORS, {A: FACTORS[A], B: FACTORS[B]}).startswith("3 tensors are not in the")
    assert sentence("new", BASE, BASE | FACTORS).startswith("2 LoRA factors are only in the second")
    assert sentence("new", BASE, BASE | FACTORS | {"x": f32(1)}).startswith("3 tensors are only in the second")


def test_remarks_about_a_lora_run() -> None:
    marked = {n.replace(".weight", ".original.weight"): a for n, a in BASE.items()}
    said = list(remarks(states(BASE, marked | FACTORS, "only-lora", averaged=(False, True))))
    assert said[0].startswith("2 weights have the mark of an adapted layer now")
    assert said[1:] == ["2 LoRA factors: new", "the second is the moving average (EMA) of the weights"]
    (first,) = [s for s in remarks(states(BASE, BASE, "only-lora", averaged=(True, False))) if "EMA" in s]
    assert first.startswith("the first is")
    assert list(remarks(states(BASE, BASE, "only-lora"))) == ["no tensor is a LoRA factor"]
    assert list(remarks(states(BASE, marked | FACTORS, "identical"))) == []
    both = BASE | {"conditioner.a": f32(1), "first_stage_model.b": f32(1), "conditioner.c": f32(1)}
    assert list(remarks(states(BASE, both, "only-lora")))[-1] == (
        "the second also holds the text encoder and the VAE, of which the first has nothing to compare with"
    )
