"""Numbers at a bound and tables at an edge: what is just within and what is just not, with numbers that are exact."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from loraconv.errors import FormatError
from loraconv.model_config import _from_sidecar
from loraconv.rules import Family, Rename, Setting, Spelling
from loraconv.verifier import base, delta, extracted, parallel
from loraconv.verifier.changes.renames import match_content, match_names
from loraconv.verifier.changes.tables import _is_computed
from loraconv.verifier.config import check_config, expected_config
from loraconv.verifier.coverage import check_coverage
from loraconv.verifier.delta import rows_of
from loraconv.verifier.fused import guesses, rounding, whole
from loraconv.verifier.fused.rounding import _reach, _spacing
from loraconv.verifier.numbers import Held, Pair, difference_norm, gram_norm
from loraconv.verifier.partners import in_layer, other_projections

DIT = "model.diffusion_model."


# --- tables of sines and cosines ------------------------------------------------------------------------------------


class Table:
    """A stored table."""

    strides = None

    def __init__(self, array: Any) -> None:
        self.array, self.shape, self.dtype = array, array.shape, {2: "F16", 8: "F64"}[array.itemsize]

    def pieces(self) -> Any:
        yield self.array.tobytes()


@pytest.mark.parametrize(
    ("dtype", "row", "computed"),
    [
        # Of width 4 the squares sum up to 2. Room in float16: 4 * (2 * 2**-11 + 2**-20) = 2**-8 + 2**-18.
        ("float16", [1, 1, 2.0**-4, 2.0**-9], True), ("float16", [1, 1, 2.0**-4, 2.0**-8], False),
        ("float16", [1, 1 - 2.0**-9, 2.0**-6, 2.0**-9], True), ("float16", [1, 1 - 2.0**-8, 0, 0], False),
        # In float64 the room for the sines themselves is all of it: 2**-18.
        ("float64", [1, 1, 2.0**-9, 0], True), ("float64", [1, 1, 2.0**-9, 2.0**-20], False),
        ("float64", [1, 1, 2.0**-9, 2.0**-25], True), ("float64", [1, 1, 2.0**-9, 2.0**-24], False),
        ("float64", [0, 0, 0, 0], False),
    ],
)  # fmt: skip
def test_a_row_of_sines_and_cosines_is_one_up_to_its_roundings(dtype: str, row: list[float], computed: bool) -> None:
    """Where a table is computed, so it is with rows of zeros and of other angles; one other row spoils it."""
    exact = np.array([row]).astype(dtype)
    assert exact.tolist() == [row]
    waves, text = np.array([[0.6, 0, 0.8, 1]]).astype(dtype), np.zeros((2, 4), dtype)
    for table in (exact, np.concatenate([text, exact]), *([np.concatenate([waves, exact, text])] if any(row) else [])):
        assert _is_computed("t", Table(table)) is computed  # type: ignore[arg-type]


# --- roundings ------------------------------------------------------------------------------------------------------

TORCH = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


@pytest.mark.parametrize(("dtype", "work"), [("F16", "float32"), ("BF16", "float32"), ("F32", "float64")])
def test_the_numbers_that_surely_round_to_a_stored_one_are_all_but_two_of_those_that_do(dtype: str, work: str) -> None:
    """By torch's own rounding, counted in the numbers of the dtype worked in; the next one is a tie."""
    stored = np.array([1.5], work)
    reach, bits = _reach(stored, dtype), stored.view(f"i{stored.itemsize}")
    for steps, same in ((reach, True), (reach + 1, True), (reach + 3, False)):
        for side in (-1, 1):
            near = torch.from_numpy((bits + side * steps).view(work)).to(TORCH[dtype])
            assert (near.item() == 1.5) is same
    tie = float((bits + reach + 2).view(work)[0])
    assert tie == 1.5 + torch.finfo(TORCH[dtype]).eps / 2
    assert _reach(np.zeros(1), "F64") == 0


@pytest.mark.parametrize(("dtype", "work"), [("F16", "float32"), ("BF16", "float32"), ("F32", "float64")])
def test_below_the_normal_numbers_what_surely_rounds_is_hardly_less_than_half_a_step(dtype: str, work: str) -> None:
    """In the dtype worked in, too, where it is compared."""
    told = torch.finfo(TORCH[dtype])
    tiny, near = _spacing(np.zeros(1, work), dtype)
    half = told.tiny * told.eps / 2
    assert tiny == told.tiny
    assert half * (1 - 2.0**-11) <= np.dtype(work).type(near) < half


@pytest.mark.parametrize("size", [1.0, 2.0**500, 2.0**530, 2.0**-530])
@pytest.mark.parametrize("rank", [1, 3])
def test_factors_whose_squares_are_no_numbers_have_a_distance_all_the_same(rank: int, size: float) -> None:
    """Scaled against each other by a power of two, the factors have the same product."""
    for seed in range(8):
        rng = np.random.default_rng(seed)
        up, other_up = rng.normal(size=(2, 7, rank))
        down, other_down = rng.normal(size=(2, rank, 5))
        right = np.linalg.norm(up @ down - other_up @ other_down)
        with np.errstate(over="ignore", invalid="ignore", under="ignore"):
            assert difference_norm(up, down, other_up / size, other_down * size) == pytest.approx(right, rel=1e-9)
            assert difference_norm(up * size, down / size, other_up, other_down) == pytest.approx(right, rel=1e-9)
            assert gram_norm(up / size, down * size) == pytest.approx(np.linalg.norm(up @ down), rel=1e-9)


def test_any_rows_of_a_product_are_those_of_the_whole() -> None:
    rng = np.random.default_rng(5)
    sizes = (3, 2), (4, 5), (12, 3), (3, 10)
    one, two, up, down = (rng.integers(-9, 10, size=size).astype(float) for size in sizes)
    kron = Pair(Held(two.reshape(1, -1), "F64"), Held(one.reshape(-1, 1), "F64"), Fraction(1), (3, 2, 4, 5))
    plain = Pair(Held(down, "F64"), Held(up, "F64"), Fraction(7))  # whose scale is not counted in
    for start in range(12):
        for stop in range(start + 1, 13):
            assert np.array_equal(rows_of(kron, start, stop), np.kron(one, two)[start:stop])
            assert np.array_equal(rows_of(plain, start, stop), (up @ down)[start:stop])


BLOCKS: list[tuple[int, int, list[int]]] = [
    # Rows, columns of float32, and where blocks of at most 2**18 numbers begin.
    (3, 1 << 20, [0, 1, 2]), (3, 1 << 18, [0, 1, 2]), (5, 1 << 17, [0, 2, 4]), (4, 1 << 17, [0, 2]),
    ((1 << 18) + 1, 1, [0, 1 << 18]), (1 << 18, 1, [0]), ((1 << 17) + 1, 2, [0, 1 << 17]), (3, 0, [0]), (0, 4, []),
]  # fmt: skip


@pytest.mark.parametrize(("rows", "columns", "starts"), BLOCKS)
def test_blocks_have_as_many_rows_as_there_is_room_for_and_one_at_least(
    monkeypatch: pytest.MonkeyPatch, rows: int, columns: int, starts: list[int]
) -> None:
    right = list(pairwise([*starts, rows])) if starts else []
    for module, name, size in ((whole, "_BLOCK", 1 << 18), (rounding, "BLOCK_BYTES", 1 << 20)):
        monkeypatch.setattr(module, name, size)
    assert list(whole._blocks((rows, columns))) == right
    ref: Any = SimpleNamespace(shape=(rows, columns), dtype="F32", rows=lambda *ends: ends)
    assert list(rounding.row_blocks(ref)) == right
    monkeypatch.setattr(extracted, "_BLOCK", 1 << 18)
    looked: Any = extracted.Models({"m.weight": ref}, {"m.weight": ref}).rows("m")
    assert list(looked) == [(slice(*ends), ends, ends) for ends in right]
    monkeypatch.setattr(guesses, "_SAMPLE", 1 << 18)
    assert [guesses._rows(ref, start) for start in starts] == right
    nothing = Pair(Held(np.empty((0, columns)), "F32"), Held(np.empty((rows, 0)), "F32"), Fraction(1))
    sizes = [(one.shape, other.shape) for one, other in delta._both(nothing, nothing)]
    assert sizes == [((stop - start, columns),) * 2 for start, stop in right]


# --- names ----------------------------------------------------------------------------------------------------------


def test_a_prefix_may_have_seven_steps_and_no_more() -> None:
    for steps, found in ((7, True), (8, False)):
        prefix = ".".join("abcdefgh"[:steps])
        old, new = [f"{prefix}.q.w", f"{prefix}.k.w"], ["q.w", "k.w"]
        assert match_names(old, new) == (dict(zip(old, new, strict=True)) if found else {})


def test_only_what_may_have_a_counterpart_is_read_for_its_bytes() -> None:
    class Unread(Table):
        def pieces(self) -> Any:
            raise AssertionError("it is read")

    one, other = np.arange(4.0), np.arange(6.0)
    before: Any = {"a": Table(one), "b": Unread(other), "c": Unread(one.reshape(2, 2))}
    after: Any = {"x": Table(one), "y": Unread(other.astype(np.float16))}
    assert match_content(before, after) == {"a": "x"}
    assert match_content(after, before) == {"x": "a"}


def test_the_modules_that_one_may_be_mistaken_for() -> None:
    assert list(other_projections("a.0.to_q")) == ["a.0.to_k", "a.0.to_v"]
    assert list(other_projections("a.0.to_v")) == ["a.0.to_q", "a.0.to_k"]
    assert list(other_projections("a.0.to_out")) == list(other_projections("to_q.proj")) == []
    assert in_layer("blocks.3.net.0.proj", 1) == "blocks.4.net.0.proj"
    assert in_layer("blocks.3.net.0.proj", -2) == "blocks.1.net.0.proj"
    assert in_layer("9", 1) == "10"
    assert in_layer("proj_out", 1) is None


# --- the configuration and the coverage of a base -------------------------------------------------------------------


def shapes(depth: int = 1, channels: int = 16) -> Any:
    """What the configuration is told from: width 128, heads of 64, patches of 2."""
    told = {
        "mixins.final_layer.linear.weight": (channels * 4 * depth, 128), "time_embed.0.weight": (512, 128),
        "mixins.adaln_layer.query_layernorm_list.0.weight": (64,), "transformer.final_layernorm.weight": (128,),
        "mixins.patch_embed.proj.weight": (128, 16, 2, 2), "mixins.patch_embed.text_proj.weight": (128, 4096),
    }  # fmt: skip
    return {DIT + name: SimpleNamespace(shape=shape) for name, shape in told.items()}


def settings(**params: Any) -> Any:
    return {"model": {"network_config": {"params": params}}}


def test_settings_that_are_no_mapping_say_nothing() -> None:
    released = expected_config(shapes(), None)
    odd = {"model": {"network_config": [1]}}
    for none in ({}, {"model": 7}, odd, settings(), settings(modules=3), settings(out_channels=None)):
        assert expected_config(shapes(), none) == released


def test_a_patch_of_frames_rows_and_columns_has_the_size_of_its_sides() -> None:
    for told in (2, [2], [1, 2, 2], [7, 5, 2]):
        assert expected_config(shapes(), settings(patch_size=told))["patch_size"] == 2
    assert expected_config(shapes(channels=8), settings(out_channels=8))["out_channels"] == 8


def test_of_many_wrong_values_four_are_named() -> None:
    right = dict.fromkeys("abcdef", 1)
    detail = check_config(right, dict.fromkeys("abcdef", 2)).detail
    assert detail == "; ".join(f"{key} = 2 instead of 1" for key in "abcd")
    long = check_config({"a": 1}, {"a": "x" * 500}).detail
    assert long == f"a = '{'x' * 395}... (519 characters)"  # 400 of them, and how many there are


def test_a_copy_in_another_rank_is_the_same_bytes_or_lost(read: Any) -> None:
    array = np.arange(6, dtype=np.float32)
    first = read({f"{DIT}a": array, "elsewhere": array})
    made = [first[f"{DIT}a"]]
    for other, passed in ((array, True), (array + 1, False)):
        check = check_coverage([first, read({f"{DIT}a": other})], made)
        assert (check.passed, check.count) == (passed, 2)
        assert check.detail == ("" if passed else f"lost on the way: {DIT}a")
    assert not check_coverage([first, read({f"{DIT}b": array})], made).passed
    assert not check_coverage([first], [made[0].rows(0, 5)]).passed
    assert check_coverage([first], [made[0].rows(0, 2), made[0].rows(2, 6)]).passed


TABLE = f"{DIT}mixins.pos_embed.pos_embedding"
ROTARY = (f"{DIT}mixins.pos_embed.freqs_sin", f"{DIT}transformer.position_embeddings.weight")


@pytest.mark.parametrize("rotary", [None, *ROTARY])
def test_a_learned_table_of_positions_is_not_left_out(read: Any, rotary: str | None) -> None:
    """That of a model without rotary positions is computed again, and so are sines and cosines."""
    one = np.ones((2, 2), np.float32)
    names = [TABLE, f"{DIT}mixins.pos_embed.freqs_cos", *([rotary] if rotary else [])]
    check = check_coverage([read(dict.fromkeys(names, one))], [])
    assert (check.passed, check.count) == (rotary is None, int(rotary is not None))
    assert check.detail == (f"lost on the way: {TABLE}" if rotary else "")


# --- cores ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def pools(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many threads each pool is made with."""
    seen = list[int]()

    class Counted(ThreadPoolExecutor):
        def __init__(self, count: int) -> None:
            seen.append(count)
            super().__init__(count)

    for module in (base, parallel):
        monkeypatch.setattr(module, "ThreadPoolExecutor", Counted)
    return seen


CORES = [(None, 1, 1), (1, 1, 1), (2, 2, 1), (3, 3, 2), (4, 4, 3), (5, 4, 4), (64, 4, 4)]


@pytest.mark.parametrize(("cores", "threads", "beside_the_writer"), CORES)
def test_four_cores_are_taken_at_most_and_one_is_left_to_the_writer(
    monkeypatch: pytest.MonkeyPatch, read: Any, pools: list[int], cores: int | None, threads: int,
    beside_the_writer: int,
) -> None:  # fmt: skip
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    assert list(parallel.in_parallel(str, [1, 2])) == ["1", "2"]
    monkeypatch.setattr(base, "expected_config", lambda *given: {})
    monkeypatch.setattr(base, "model_shapes", lambda config: {"x": (1,)})
    monkeypatch.setattr(base, "_controls", lambda *given: ())
    monkeypatch.setattr(base, "source_of", lambda ranks, name, shape: ranks[0][name])
    given = read({"x": np.ones(1, np.float32)})
    assert base.prove_base([given], None, given, {}, None).checks[1].passed
    assert pools == [threads, beside_the_writer]


# --- tables of formats ----------------------------------------------------------------------------------------------


def test_what_is_derived_from_a_table_is_no_part_of_what_it_says() -> None:
    rules = Rename("a.{i}", "b.{i}"), Rename("c", "d")
    one, same = Spelling(rules), Spelling(rules)
    assert (hash(one), repr(one)) == (hash(same), f"Spelling(rules={rules!r}, dropped=(), adapts=(), norms=())")
    assert one == same != Spelling(rules[:1])
    family = Family(name="f", title="F", model_class="C", component="t", modules=("m.{i}",), beside=("e.{i}",))
    assert repr(family).count("m.{i}") == 1
    assert family.knows("m.3")
    assert family.knows("e.0")
    assert not family.knows("m.x")


def test_a_list_in_the_settings_counts_only_where_an_entry_takes_its_last_number() -> None:
    told = {"sizes": [1, 2, 3]}
    assert _from_sidecar(Setting("key", sidecar="sizes", last=True), told) == 3
    for setting in (Setting("key", sidecar="sizes"), Setting("key", sidecar="sizes", kind="number")):
        with pytest.raises(FormatError, match="key"):
            _from_sidecar(setting, told)
    with pytest.raises(FormatError, match="must be a count"):
        _from_sidecar(Setting("key", sidecar="sizes"), {"sizes": 1.5})
