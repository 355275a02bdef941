"""Tables read the same way in both directions, a bad table fails when it is made, and tables are nothing but data."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraconv.registry import dialects, families
from loraconv.rules import Blocks, Fused, Kernel, Modulation, Regrouped, Rename, Rule, Same, Spelling, fill, match
from tests.sat_run import RunSpec, Variant, dit_shapes

CONVERTERS = sorted((Path(__file__).parent.parent / "converters").rglob("*.py"))
COGVIDEOX = families()[0]
SAT = COGVIDEOX.spellings["sat"]

numbers = st.integers(0, 10**6).map(str)
steps = st.text("abcxyz_0123456789{}[]()*+?^$|\\", min_size=1, max_size=6).filter(lambda s: "{" not in s)
plain_names = st.lists(steps, min_size=1, max_size=4).map(".".join)


# --- templates ------------------------------------------------------------------------------------------------------


@given(st.lists(steps, min_size=2, max_size=4), st.lists(numbers, min_size=3, max_size=3))
def test_filling_a_template_and_matching_it_gives_the_fields_back(parts: list[str], values: list[str]) -> None:
    fields = dict(zip(("i", "j", "k"), values, strict=True))
    used = dict(list(fields.items())[: len(parts) - 1])
    template = parts[0] + "".join(f".{{{name}}}.{part}" for name, part in zip(used, parts[1:], strict=False))
    assert match(template, fill(template, used)) == used


@given(plain_names)
def test_a_template_without_fields_matches_itself_alone(name: str) -> None:
    assert match(name, name) == {}
    assert match(name, name + "x") is None
    assert match(name, "x" + name) is None
    assert match(name, name + "\n") is None


@pytest.mark.parametrize("number", ["", "x", "-1", "+1", "01", "00", " 1", "1 ", "1.2", "1\n", "¹", "٣", "1e3"])
def test_a_number_field_takes_plain_decimal_numbers_only(number: str) -> None:
    assert match("blocks.{i}.to_q", f"blocks.{number}.to_q") is None


@pytest.mark.parametrize("number", ["0", "7", "10", "123456789012345678901234567890"])
def test_a_number_field_takes_any_count_of_digits(number: str) -> None:
    assert match("blocks.{i}.to_q", f"blocks.{number}.to_q") == {"i": number}


def test_a_module_field_takes_dotted_names_and_a_param_field_one_step() -> None:
    assert match("{module}.lora_A.weight", "a.b.0.c.lora_A.weight") == {"module": "a.b.0.c"}
    assert match("{module}.original.{param}", "a.b.original.bias") == {"module": "a.b", "param": "bias"}
    assert match("{module}.original.{param}", "a.original.b.c") is None
    assert match("{module}.lora_A.weight", "lora_A.weight") is None


@given(st.lists(steps, min_size=1, max_size=3).map(".".join), numbers)
def test_a_factor_name_gives_module_and_part_back(module: str, part: str) -> None:
    for dialect in dialects():
        for template in (dialect.down, dialect.up):
            name = fill(template, {"module": module, "part": part})
            found = match(template, name)
            assert found is not None
            assert found["module"] == module
            assert found.get("part", part) == part


# --- rules ----------------------------------------------------------------------------------------------------------


@given(numbers)
def test_every_diffusers_module_leads_to_one_module_of_the_trainer_and_back(number: str) -> None:
    for rule in SAT.rules:
        for part, template in enumerate(rule.targets):
            here = fill(template, {"i": number})
            where = SAT.find_part(here)
            assert where is not None
            assert where[1] == part
            found = SAT.find(where[0])
            assert found is not None
            back, fields = found
            assert back is rule
            assert fill(back.targets[part], fields) == here


@given(numbers)
def test_every_module_of_the_trainer_is_found_by_one_rule_alone(number: str) -> None:
    for rule in SAT.rules:
        name = fill(rule.there, {"i": number})
        assert [r for r in SAT.rules if match(r.there, name) is not None] == [rule]
        assert SAT.find(name) == (rule, {"i": number} if "{i}" in rule.there else {})


@given(numbers)
def test_no_diffusers_module_is_the_target_of_two_rules(number: str) -> None:
    names = [fill(template, {"i": number}) for rule in SAT.rules for template in rule.targets]
    for name in names:
        hits = [template for rule in SAT.rules for template in rule.targets if match(template, name) is not None]
        assert len(hits) == 1


@given(st.one_of(plain_names, st.sampled_from(["", ".", "transformer.layers.0", "transformer.layers.x.mlp"])))
def test_a_foreign_module_is_found_by_no_rule(name: str) -> None:
    assert SAT.find(name) is None
    assert SAT.find_part(name) is None
    assert not SAT.can_adapt(name)
    assert not COGVIDEOX.knows(name)


@given(numbers)
def test_the_trainer_adapts_the_attention_projections_alone(number: str) -> None:
    able = {rule.there for rule in SAT.rules if SAT.can_adapt(fill(rule.there, {"i": number}))}
    layer = "transformer.layers.{i}.attention."
    assert able == {f"{layer}query_key_value", f"{layer}dense"}


ONE_POINT_ZERO: list[Variant] = ["2b", "5b", "5b-i2v"]
LATE: list[Variant] = [*ONE_POINT_ZERO, "1.5-5b", "1.5-5b-i2v"]


@pytest.mark.parametrize(
    ("variant", "generation"), [*((v, "early") for v in ONE_POINT_ZERO), *((v, "late") for v in LATE)]
)
def test_the_table_explains_every_tensor_of_every_model(variant: Variant, generation: Any) -> None:
    for name in dit_shapes(RunSpec(variant=variant, generation=generation, kind="full")):
        rule = SAT.find(name.rpartition(".")[0])
        assert (rule is not None) != (SAT.drops(name) != "") or name.startswith("mixins.pos_embed."), name


def test_the_table_has_the_parallel_split_of_the_real_framework() -> None:
    """Column-parallel layers split their rows over ranks, row-parallel ones their columns; the rest is copied."""
    split = {rule.there.rpartition(".")[2]: getattr(rule, "parallel", "whole") for rule in SAT.rules}
    assert {name: how for name, how in split.items() if how != "whole"} == {
        "query_key_value": "rows",
        "dense": "columns",
        "dense_h_to_4h": "rows",
        "dense_4h_to_h": "columns",
    }


# --- what each target has of the rows -------------------------------------------------------------------------------

SPELLINGS = [(f.name, s) for f in families() for s in f.spellings.values()]


def cut(rule: Rule, rows: list[int], columns: int) -> list[list[int]]:
    pieces = rule.pieces(len(rows), columns)
    size = len(rows) // sum(map(len, pieces))
    return [[row for n in piece for row in rows[n * size : (n + 1) * size]] for piece in pieces]


@pytest.mark.parametrize("spelling", [s for _, s in SPELLINGS], ids=[name for name, _ in SPELLINGS])
@given(st.integers(1, 3).map(lambda n: 84 * n), st.sampled_from((1, 42, 84, 168)))
def test_every_row_goes_to_one_target_and_back_to_its_place(spelling: Spelling, count: int, columns: int) -> None:
    rows = list(range(count))
    for rule in spelling.rules:
        pieces, parts = rule.pieces(count, columns), cut(rule, rows, columns)
        size = count // sum(map(len, pieces))
        back = {
            n: part[k * size : (k + 1) * size]
            for piece, part in zip(pieces, parts, strict=True)
            for k, n in enumerate(piece)
        }
        assert [row for n in sorted(back) for row in back[n]] == rows
        assert len(parts) == len(rule.targets)


def test_the_parts_of_each_kind_of_rule() -> None:
    assert cut(Rename("a", "b"), [0, 1, 2], 7) == [[0, 1, 2]]
    assert cut(Fused("a", ("q", "k", "v")), [0, 1, 2, 3, 4, 5], 7) == [[0, 1], [2, 3], [4, 5]]
    assert cut(Regrouped("a", {"x": (2, 0), "y": (1,)}), [0, 1, 2, 3, 4, 5], 7) == [[4, 5, 0, 1], [2, 3]]


def test_a_modulation_is_that_of_the_last_block_by_its_shape() -> None:
    swapped = Modulation("m.{i}", here={"a.{i}": (0,)}, last={"a.{i}": (1, 0)}, ratio=2)
    assert cut(swapped, list(range(12)), 2) == [list(range(12))]
    assert cut(swapped, [0, 1, 2, 3], 2) == [[2, 3, 0, 1]]
    renamed = Modulation("m", here={"a": (0,)}, last={"b": (0,)}, ratio=0.5)
    assert renamed.targets == ("a", "b")
    assert cut(renamed, [0, 1, 2, 3], 4) == [[0, 1, 2, 3], []]
    assert cut(renamed, [0, 1], 4) == [[], [0, 1]]


def test_blocks_and_same_stand_for_one_rename_a_module() -> None:
    blocks = Blocks({"in.4.{i}": "down.1.{i}", "in.5": "down.2"}, {"q.{j}": "to_q.{j}", "o": "out"})
    assert [(r.there, r.here) for r in blocks.renames] == [
        ("in.4.{i}.q.{j}", "down.1.{i}.to_q.{j}"),
        ("in.4.{i}.o", "down.1.{i}.out"),
        ("in.5.q.{j}", "down.2.to_q.{j}"),
        ("in.5.o", "down.2.out"),
    ]
    assert [(r.there, r.here) for r in Same(("a.{i}", "b")).renames] == [("a.{i}", "a.{i}"), ("b", "b")]


# --- bad tables -----------------------------------------------------------------------------------------------------


def test_a_rename_that_loses_or_invents_a_field_fails() -> None:
    for there, here in (("a.{i}", "b"), ("a", "b.{i}"), ("a.{i}", "b.{j}"), ("a.{i}.{j}", "b.{i}")):
        with pytest.raises(ValueError, match="same fields"):
            Rename(there, here)
    assert Rename("a.{i}.{j}", "b.{j}.{i}").targets == ("b.{j}.{i}",)


@pytest.mark.parametrize("here", [("q.{i}", "q.{i}"), ("q.{i}", "k"), ("q.{i}", "k.{j}")])
def test_a_fused_rule_with_a_repeated_part_or_other_fields_fails(here: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="repeat or do not have the same fields"):
        Fused("qkv.{i}", here)


@pytest.mark.parametrize("chunks", [((0, 1), (1, 2)), ((0,), (2,)), ((1, 2), (3,)), ((0, 0), (1,)), ((-1, 0), (1,))])
def test_a_regrouping_that_does_not_deal_out_each_chunk_once_fails(chunks: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ValueError, match="not each dealt out once"):
        Regrouped("m.{i}", {f"n{k}.{{i}}": part for k, part in enumerate(chunks)})


def test_a_regrouping_with_other_fields_fails() -> None:
    with pytest.raises(ValueError, match="same fields"):
        Regrouped("m.{i}", {"a.{i}": (0,), "b": (1,)})
    assert Regrouped("m.{i}", {"a.{i}": (0, 2), "b.{i}": (1,)}).chunks == 3


def test_a_modulation_that_loses_a_chunk_or_a_field_fails() -> None:
    with pytest.raises(ValueError, match="not each dealt out once"):
        Modulation("m.{i}", here={"a.{i}": (0,)}, last={"a.{i}": (1,)}, ratio=2)
    with pytest.raises(ValueError, match="same fields"):
        Modulation("m.{i}", here={"a.{i}": (0,)}, last={"b": (0,)}, ratio=2)


def test_a_kernel_with_other_fields_fails() -> None:
    with pytest.raises(ValueError, match="same fields"):
        Kernel("proj.{i}", "proj", size="patch_size", flat_if="patch_size_t")


@pytest.mark.parametrize(
    "rules",
    [
        (Rename("a", "x"), Rename("a", "y")),
        (Rename("a", "x"), Rename("b", "x")),
        (Rename("q", "x"), Fused("f", ("x", "y"))),
        (Regrouped("m", {"x": (0,), "y": (1,)}), Rename("n", "y")),
    ],
)
def test_a_table_that_names_a_module_twice_fails(rules: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match="more than once"):
        Spelling(rules)


@pytest.mark.parametrize(
    "rules",
    [
        (Rename("a.{i}", "x.{i}"), Rename("a.0", "y")),
        (Rename("a.{i}", "x.{i}"), Rename("a.{j}", "y.{j}")),
        (Rename("a.{i}", "x.{i}"), Rename("b.{j}", "x.{j}")),
        (Rename("a.{i}", "x.{i}"), Rename("b", "x.3")),
    ],
)
def test_a_table_in_which_two_templates_fit_one_name_fails(rules: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match="ambiguous"):
        Spelling(rules)


def test_a_table_that_adapts_a_module_without_a_rule_fails() -> None:
    with pytest.raises(ValueError, match="without a rule"):
        Spelling((Rename("a.{i}", "x.{i}"),), adapts=("b.{i}",))


# --- converters -----------------------------------------------------------------------------------------------------

FORBIDDEN = (
    ast.For,
    ast.AsyncFor,
    ast.While,
    ast.If,
    ast.IfExp,
    ast.Match,
    ast.Try,
    ast.With,
    ast.BoolOp,
    ast.comprehension,
    ast.FunctionDef,
    ast.AsyncFunctionDef,
    ast.Lambda,
    ast.ClassDef,
    ast.Subscript,
)


@pytest.mark.parametrize("file", CONVERTERS, ids=lambda p: p.stem)
def test_a_converter_is_a_declaration_without_code(file: Path) -> None:
    tree = ast.parse(file.read_text())
    found = [f"line {node.lineno}: {type(node).__name__}" for node in ast.walk(tree) if isinstance(node, FORBIDDEN)]
    assert found == []
    assert ast.get_docstring(tree)


@pytest.mark.parametrize("file", CONVERTERS, ids=lambda p: p.stem)
def test_a_converter_imports_the_vocabulary_alone(file: Path) -> None:
    modules = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and not node.level:
            modules.add(node.module)
    assert modules <= {"loraconv.rules", "loraconv.adapter", "loraconv.names"}


@pytest.mark.parametrize("file", CONVERTERS, ids=lambda p: p.stem)
def test_a_converter_calls_constructors_only(file: Path) -> None:
    calls = [node.func for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
    assert all(isinstance(func, ast.Name) and re.fullmatch(r"[A-Z]\w*", func.id) for func in calls)


def test_the_converters_are_found() -> None:
    assert {"sat", "diffusers", "peft", "cogvideox"} <= {file.stem for file in CONVERTERS}
