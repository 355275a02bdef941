"""The deliberate mistakes of a proof are the mistakes that their names say: each is made here a second time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from loraconv.io.input_file import InputFile
from loraconv.io.safetensors_read import read_safetensors
from loraconv.verifier import base as base_proof
from loraconv.verifier.base import _mistakes as base_mistakes
from loraconv.verifier.controls import adapter_controls, comparison_controls
from loraconv.verifier.delta import compare_adapters
from loraconv.verifier.fused import controls as fused
from loraconv.verifier.fused.case import Case, Term
from loraconv.verifier.fused.prove import prove_fused
from loraconv.verifier.numbers import Expectation, Held, Pair, values

RANK = 2
Q, K, LATER = (f"transformer_blocks.{m}" for m in ("0.attn1.to_q", "0.attn1.to_k", "1.attn1.to_q"))


def pair(seed: int, out: int = 6, rank: int = RANK) -> Pair:
    rng = np.random.default_rng(seed)
    return Pair(Held(rng.normal(size=(rank, 8)), "F32"), Held(rng.normal(size=(out, rank)), "F16"), Fraction(3, 2))


def four_bits(array: Any) -> Any:
    """The nearest numbers with four bits of mantissa, one by one."""

    def rounded(x: float) -> float:
        unit = 2.0 ** (np.floor(np.log2(abs(x))) - 3) if x else 1.0
        return float(np.rint(x / unit) * unit)

    return np.vectorize(rounded)(array)


def made_in(given: dict[str, Pair]) -> dict[str, tuple[Expectation, dict[str, Pair]] | None]:
    """Mistake -> what the judge is shown: the expected part and the spoilt pairs; None where there is no place."""
    shown: list[Any] = []
    expected = Expectation(given, dict.fromkeys(given, ("F32", "F16")))
    controls = adapter_controls(expected, given, lambda part, spoilt: shown.append((part, spoilt)) or "seen")  # type: ignore[func-returns-value]
    assert [(c.caught, c.by) for c in controls if c.caught] == [(True, "seen")] * len(shown)
    assert all(c.by == "this adapter has no place for it" for c in controls if not c.caught)
    left = iter(shown)
    return {c.name: next(left) if c.caught else None for c in controls}


def same(one: Pair, other: Pair) -> bool:
    factors = ((one.up, other.up), (one.down, other.down))
    return one.scale == other.scale and all(np.array_equal(values(a), values(b)) for a, b in factors)


def test_the_mistakes_in_an_adapter_are_what_they_are_called() -> None:
    given = {Q: pair(1), K: pair(2), LATER: pair(3)}
    up, down = values(given[Q].up), values(given[Q].down)
    right = {
        "q and k swapped": {Q: given[K], K: given[Q]},
        "a module dropped": {},
        "scale doubled": {Q: replace(given[Q], scale=Fraction(3))},
        "scale divided by rank": {Q: replace(given[Q], scale=Fraction(3, 4))},
        "factors transposed": {Q: Pair(Held(up.T, "F16"), Held(down.T, "F32"), Fraction(3, 2))},
        "layers shifted by one": {Q: given[LATER]},
        "up zeroed": {Q: replace(given[Q], up=Held(np.zeros((6, RANK)), "F16"))},
        "stored in a lower precision": {Q: replace(given[Q], up=Held(four_bits(up), "F16"))},
    }
    made = made_in(given)
    assert list(made) == list(right)
    for name, spoilt in right.items():
        part, after = made[name] or (None, {})
        assert part is not None
        assert set(after) == set(spoilt)
        assert all(same(after[m], spoilt[m]) for m in spoilt)
        assert all(after[m].up.dtype == spoilt[m].up.dtype for m in spoilt)
        touched = {Q, K} if name == "q and k swapped" else {Q}
        assert part.pairs == {m: given[m] for m in touched}
        assert part.dtypes == dict.fromkeys(touched, ("F32", "F16"))


def test_mistakes_find_their_place_in_other_adapters() -> None:
    """A single layer gets the number of the next; without q and k, two modules of one shape change places."""
    (_, after) = made_in({K: pair(1)})["layers shifted by one"] or (None, {})
    assert list(after) == ["transformer_blocks.1.attn1.to_k"]
    assert same(next(iter(after.values())), pair(1))
    made = made_in({"proj": pair(1), "wide": pair(2, out=7), "embed": pair(3)})
    (_, after) = made["q and k swapped"] or (None, {})
    assert set(after) == {"embed", "proj"}
    assert same(after["proj"], pair(3))
    assert same(after["embed"], pair(1))
    assert made["layers shifted by one"] is None


@pytest.mark.parametrize(
    ("given", "without"),
    [
        ({"proj": pair(1), "wide": pair(2, out=7)}, {"q and k swapped", "layers shifted by one"}),
        ({K: pair(1, rank=1)}, {"q and k swapped", "scale divided by rank"}),
        ({Q: pair(1), LATER: pair(2, out=7)}, {"q and k swapped"}),
    ],
    ids=["two shapes", "rank 1", "no k"],
)
def test_a_mistake_without_a_place_is_not_made(given: dict[str, Pair], without: set[str]) -> None:
    assert {name for name, shown in made_in(given).items() if shown is None} == without


@pytest.mark.parametrize(
    ("other", "bound", "by"),
    [
        ({}, None, "numbers"),
        ({Q: replace(pair(1), up=Held(values(pair(1).up) * (1 + 2.0**-12), "F16"))}, None, "roundings"),
        ({Q: pair(5)}, 9.0, "delta"),
    ],
    ids=["equal", "rounded", "within a bound"],
)
def test_a_mistake_in_a_comparison_breaks_what_made_the_two_the_same(
    other: dict[str, Pair], bound: float | None, by: str
) -> None:
    one = {Q: pair(1), K: pair(2)}
    results = compare_adapters(one, one | other, bound=bound)
    assert all(result.same for result in results)
    controls = {c.name: c.by for c in comparison_controls(one, one | other, results, bound)}
    assert controls["a module dropped"] == "modules"
    assert controls["factors transposed"] == by


# --- a base ---------------------------------------------------------------------------------------------------------


def a_base(bias: float = 0.3) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    names = [f"transformer_blocks.{n}.attn1.{m}.weight" for n in (0, 1) for m in ("to_q", "to_k", "to_out.0")]
    made = {name: rng.normal(size=(6, 6)) for name in names}
    made["transformer_blocks.0.norm1.linear.bias"] = np.arange(12) * bias
    made["transformer_blocks.0.norm1.linear.weight"] = rng.normal(size=(12, 4))
    made["transformer_blocks.0.attn1.to_q.bias"] = rng.normal(size=6)
    return {name: Held(array, "F32") for name, array in made.items()}


def chunks(array: Any, order: tuple[int, ...]) -> Any:
    return array.reshape(6, 2, *array.shape[1:])[list(order)].reshape(array.shape)


@pytest.mark.parametrize("exact", [False, True])
def test_the_mistakes_in_a_base_are_what_they_are_called(exact: bool) -> None:
    """Where a bias is exact in four bits, another tensor takes its place."""
    stored = a_base(bias=0.5 if exact else 0.3)
    block = "transformer_blocks.0."
    q, k, out, later = (
        f"transformer_blocks.{m}.weight" for m in ("0.attn1.to_q", "0.attn1.to_k", "0.attn1.to_out.0", "1.attn1.to_q")
    )
    small = f"{block}attn1.to_q.bias" if exact else f"{block}norm1.linear.bias"
    chunked = f"{block}norm1.linear.weight" if exact else f"{block}norm1.linear.bias"
    array = {name: values(tensor) for name, tensor in stored.items()}
    right = {
        "q and k swapped": {q: array[k], k: array[q]},
        "a tensor doubled": {small: array[small] * 2},
        "a tensor halved": {small: array[small] / 2},
        "a weight transposed": {out: array[out].T},
        "layers shifted by one": {q: array[later]},
        "a tensor zeroed": {small: np.zeros_like(array[small])},
        "stored in a lower precision": {small: four_bits(array[small])},
        "modulation chunks left in their order": {chunked: chunks(array[chunked], (0, 3, 1, 4, 2, 5))},
    }
    made = {name: spoil() for name, spoil in base_mistakes(stored)}
    assert list(made) == list(right)
    for name, spoilt in right.items():
        assert set(made[name]) == set(spoilt)
        assert all(np.array_equal(values(made[name][n]), spoilt[n]) for n in spoilt), name


def test_a_base_of_one_layer_takes_the_output_projection_for_the_next_layer() -> None:
    stored = {name: tensor for name, tensor in a_base().items() if "blocks.1" not in name}
    q, out = (f"transformer_blocks.0.attn1.{m}.weight" for m in ("to_q", "to_out.0"))
    assert dict(base_mistakes(stored))["layers shifted by one"]() == {q: stored[out]}


def test_where_every_number_is_exact_in_few_bits_the_last_tensor_is_taken() -> None:
    stored = {name: Held(np.ones_like(values(tensor)), "F32") for name, tensor in a_base().items()}
    made = {name: spoil() for name, spoil in base_mistakes(stored)}
    assert list(made["a tensor doubled"]) == ["transformer_blocks.0.attn1.to_q.weight"]
    assert list(made["modulation chunks left in their order"]) == ["transformer_blocks.0.norm1.linear.weight"]


def test_a_proof_of_a_base_that_sees_nothing_misses_every_mistake_that_changes_a_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(base_proof, "_agrees", lambda *given: True)
    monkeypatch.setattr(base_proof, "source_of", lambda *given: None)
    drawn = a_base()
    ones = {name: Held(np.ones_like(values(tensor)), "F32") for name, tensor in drawn.items()}
    changing = {"a tensor doubled", "a tensor halved", "a tensor zeroed"}
    for stored, missed in ((drawn, {name for name, _ in base_mistakes(drawn)}), (ones, changing)):
        given: Any = [], stored, dict.fromkeys(stored), None
        controls = base_proof._controls(*given)
        assert {control.name: control.caught for control in controls} == {
            name: False if name in missed else None for name, _ in base_mistakes(stored)
        }
        assert {control.by for control in controls} == {""}


# --- a fused model --------------------------------------------------------------------------------------------------


@pytest.fixture
def read(tmp_path: Path) -> Iterator[Any]:
    """A function that writes arrays into a file and reads it."""
    files: list[InputFile] = []

    def tensors(name: str, arrays: dict[str, Any]) -> Any:
        save_file({n: np.ascontiguousarray(a) for n, a in arrays.items()}, tmp_path / name)
        files.append(InputFile(tmp_path / name))
        return read_safetensors(files[-1]).tensors

    yield tensors
    for file in files:
        file.close()


def half(array: Any) -> Any:
    return array.astype(np.float16)


def wrong_sums(
    read: Any, monkeypatch: pytest.MonkeyPatch, size: int = 8, modules: Any = (Q, K, LATER)
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Mistake -> the numbers that the proof is shown; and what goes into them: base, ups, downs."""
    rng = np.random.default_rng(2)
    base = {f"{m}.weight": half(rng.normal(size=(size, 8))) for m in (Q, K, LATER)}
    ups = {m: rng.normal(size=(size, RANK)) for m in (Q, K, LATER)}
    downs = {m: rng.normal(size=(RANK, 8)) for m in (Q, K, LATER)}
    more = {Q: (rng.normal(size=(size, 3)), rng.normal(size=(3, 8)))}
    scale, strength = Fraction(1, 2), Fraction(3, 4)
    terms = [
        Term({m: Pair(Held(downs[m], "F64"), Held(ups[m], "F64"), scale) for m in ups}, strength),
        Term({m: Pair(Held(down, "F64"), Held(up, "F64"), Fraction(1)) for m, (up, down) in more.items()}, Fraction(2)),
    ]
    right = {f"{m}.weight": half(base[f"{m}.weight"] + 0.375 * ups[m] @ downs[m]) for m in ups}
    extra = 2 * more[Q][0] @ more[Q][1]
    right[f"{Q}.weight"] = half(base[f"{Q}.weight"] + 0.375 * ups[Q] @ downs[Q] + extra)
    case = Case(read("base", base), terms, read("fused", right), modules, None, None)
    shown = []
    looked = fused.compare_block

    def spy(base: Any, stored: Any, *rest: Any) -> Any:
        shown.append(np.array(stored, dtype=np.float64))
        return looked(base, stored, *rest)

    monkeypatch.setattr(fused, "compare_block", spy)
    controls = fused.fused_controls(case, case.touched(), [])
    assert all(c.caught is not False for c in controls)
    left = iter(shown)
    told = {c.name: next(left) if c.by == "L2" else None for c in controls if c.by != "L0"}
    return told, {"base": base, "ups": ups, "downs": downs, "extra": extra, "more": more, "right": right}


def test_the_mistakes_in_a_fused_model_are_what_they_are_called(read: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    told, given = wrong_sums(read, monkeypatch)
    base, ups, downs, extra, more = (given[n] for n in ("base", "ups", "downs", "extra", "more"))
    own, product = base[f"{Q}.weight"].astype(np.float64), {m: 0.375 * ups[m] @ downs[m] for m in ups}
    right = {
        "q and k swapped": half(own + product[K]),
        "layers shifted by one": half(own + product[LATER]),
        "strength doubled": half(own + 2 * product[Q] + 2 * extra),
        "scale divided by rank": half(own + product[Q] / RANK + extra / 3),
        "up zeroed": half(own + extra),
        "delta transposed": half(own + product[Q].T + 2 * (more[Q][0] @ more[Q][1]).T),
        "stored in a lower precision": four_bits(given["right"][f"{Q}.weight"].astype(np.float64)),
    }
    for name, numbers in right.items():
        assert np.array_equal(told[name], numbers.astype(np.float64)), name
    exact, cut = own + product[Q] + extra, told["cut off instead of rounded"]
    assert np.all(np.abs(cut) <= np.abs(exact))
    assert np.all(np.abs(exact - cut) < np.spacing(np.abs(half(cut))).astype(np.float64))
    stored, flipped = given["right"][f"{Q}.weight"], half(told["a flipped bit"])
    bits = (stored.view(np.uint16) ^ flipped.view(np.uint16)).ravel()
    assert sorted(bits)[-2:] == [0, 1 << 9]
    assert np.argmax(bits) == np.argmax(np.abs(stored))


def test_the_last_layer_is_mistaken_for_the_one_before(read: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    told, given = wrong_sums(read, monkeypatch, modules=(LATER,))
    own, other = given["base"][f"{LATER}.weight"].astype(np.float64), 0.375 * given["ups"][Q] @ given["downs"][Q]
    assert np.array_equal(told["layers shifted by one"], half(own + other + given["extra"]).astype(np.float64))


def test_a_delta_that_is_no_square_is_not_transposed(read: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    told, _ = wrong_sums(read, monkeypatch, size=6)
    assert {name for name, numbers in told.items() if numbers is None} >= {"delta transposed"}


def test_mistakes_in_the_list_of_tensors_are_caught_by_it(read: Any) -> None:
    rng = np.random.default_rng(4)
    base = {
        f"{Q}.weight": half(rng.normal(size=(6, 8))),
        "norm.weight": half(rng.normal(size=4)),
        "big": half(rng.normal(size=9)),
    }
    whole = {"norm.weight": half(rng.normal(size=4)), "new": half(rng.normal(size=4))}
    up, down = rng.normal(size=(6, 2)), rng.normal(size=(2, 8))
    made = {**base, **whole, f"{Q}.weight": half(base[f"{Q}.weight"] + up @ down)}
    term = Term({Q: Pair(Held(down, "F64"), Held(up, "F64"), Fraction(1))}, Fraction(1))
    report = prove_fused(read("base", base), [term], read("fused", made), beside=read("whole", whole))
    assert report.proof.passed
    controls = {c.name: (c.caught, c.by) for c in report.proof.controls}
    assert controls["a module dropped"] == controls["a weight transposed"] == (True, "L0")
    assert controls["an untouched tensor changed"] == (True, "L1")
    assert controls["a tensor of the run left out"] == (True, "L0")
    assert controls["the base's own tensor in place of the run's"] == (True, "L1")
    assert [(check.count, check.detail) for check in report.proof.checks] == [
        (4, ""),
        (1, ""),
        (1, ""),
        (2, ""),
        (1, ""),
    ]
