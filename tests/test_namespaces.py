"""The tables of module names against the real classes, built with the released configurations on the meta device."""

from __future__ import annotations

import re
from functools import cache

import pytest

from loraconv.naming import components
from loraconv.registry import families
from loraconv.rules import Family, fill, match
from tests.released_models import ALL, RELEASED, adaptable, convolutions, norms, others

FAMILIES = {family.name: family for family in families()}


def test_every_family_is_compared_with_a_released_model() -> None:
    assert set(FAMILIES) == set(RELEASED)


@pytest.mark.parametrize(("family", "model"), ALL)
def test_the_table_has_every_module_of_the_model_and_nothing_else_of_it(family: str, model: str) -> None:
    table = FAMILIES[family]
    assert [name for name in adaptable(family, model) if not listed(table, name)] == []
    assert [name for name in others(family, model) if listed(table, name)] == []


@pytest.mark.parametrize("family", RELEASED)
def test_every_template_is_a_module_of_some_released_model(family: str) -> None:
    names = [name for model in RELEASED[family] for name in adaptable(family, model)]
    modules = FAMILIES[family].modules
    assert len(set(modules)) == len(modules)
    assert [t for t in modules if not any(match(t, name) is not None for name in names)] == []


@pytest.mark.parametrize("family", RELEASED)
def test_the_table_tells_which_modules_are_convolutions(family: str) -> None:
    every, table = [convolutions(family, model) for model in RELEASED[family]], FAMILIES[family]
    names = {name for model in RELEASED[family] for name in adaptable(family, model)}
    assert {name for name in names if table.may_convolve(name)} == set().union(*every)
    assert [end for end in table.convolutions if not any(f".{name}".endswith(f".{end}") for name in names)] == []


@pytest.mark.parametrize(("family", "model"), ALL)
def test_the_table_has_every_norm_of_the_model_that_has_a_weight(family: str, model: str) -> None:
    table = FAMILIES[family]
    if not components(table):
        assert table.norms == (), "no format that has differences of norms is for a language model"
        return
    fitting = [name for name in (*adaptable(family, model), *others(family, model)) if any_fits(table.norms, name)]
    assert sorted(fitting) == sorted(norms(family, model))


@pytest.mark.parametrize("family", RELEASED)
def test_every_template_of_a_norm_is_one_of_some_released_model(family: str) -> None:
    names = [name for model in RELEASED[family] for name in norms(family, model)]
    templates = FAMILIES[family].norms
    assert len(set(templates)) == len(templates)
    assert [t for t in templates if not any(match(t, name) is not None for name in names)] == []


def any_fits(templates: tuple[str, ...], name: str) -> bool:
    return any(match(template, name) is not None for template in templates)


def test_mistral_has_the_modules_of_llama() -> None:
    import torch
    import transformers

    with torch.device("meta"):
        model = transformers.MistralForCausalLM(transformers.MistralConfig())
    names = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear | torch.nn.Embedding)}
    assert names == set(adaptable("llama", "Llama-2-7b"))


def listed(table: Family, name: str) -> bool:
    """True if a template fits; then the family's own look-up must find it too."""
    fits = any_fits(table.modules, name)
    assert table.knows(name) or not fits
    return fits


# --- names in which every dot is an underscore ----------------------------------------------------------------------


@cache
def flat_patterns(templates: tuple[str, ...]) -> dict[str, re.Pattern[str]]:
    """Template -> what it matches when dots are underscores; written here, not taken from the code that reads them."""
    return {t: re.compile(re.sub(r"\\\{\w\\\}", "[0-9]+", re.escape(t.replace(".", "_")))) for t in templates}


def named(family: str, model: str) -> list[str]:
    """The modules that an adapter can be put on, and the norms where the family has any."""
    return [*adaptable(family, model), *(norms(family, model) if FAMILIES[family].norms else ())]


def templates_of_original(table: Family) -> tuple[str, ...]:
    spelling = table.spellings["original"]
    return tuple(rule.there for rule in (*spelling.rules, *spelling.norms))


def original_names(table: Family, family: str, model: str) -> set[str]:
    found = [table.spellings["original"].find_part(name) for name in named(family, model)]
    return {where[0] for where in found if where is not None}


@pytest.mark.parametrize(("family", "model"), ALL)
def test_a_flattened_name_stands_for_one_module(family: str, model: str) -> None:
    """Of the diffusers names and of the original ones: one template fits, so one module is meant."""
    table = FAMILIES[family]
    spelled = [((*table.modules, *table.norms), set(named(family, model)))]
    if "original" in table.spellings:
        spelled.append((templates_of_original(table), original_names(table, family, model)))
    for templates, names in spelled:
        patterns = flat_patterns(templates)
        for name in names:
            hits = [t for t, pattern in patterns.items() if pattern.fullmatch(name.replace(".", "_"))]
            assert [match(t, name) is not None for t in hits] == [True], name
        assert len({name.replace(".", "_") for name in names}) == len(names)


@pytest.mark.parametrize("family", RELEASED)
def test_a_flattened_name_tells_which_spelling_it_is_of(family: str) -> None:
    """A flattened name that both spellings have stands for the same module in both."""
    table = FAMILIES[family]
    for model in RELEASED[family]:
        ours = {name.replace(".", "_"): name for name in named(family, model)}
        theirs = original_names(table, family, model) if "original" in table.spellings else set()
        for name in theirs:
            here = ours.get(name.replace(".", "_"))
            if here is not None:
                assert table.spellings["original"].find_part(here) == (name, 0), name


# --- original names -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "model"), [(f, m) for f, m in ALL if "original" in FAMILIES[f].spellings])
def test_every_module_has_one_original_name_that_leads_back(family: str, model: str) -> None:
    spelling = FAMILIES[family].spellings["original"]
    parts = {}
    for name in named(family, model):
        where = spelling.find_part(name)
        assert where is not None, name
        found = spelling.find(where[0])
        assert found is not None
        rule, fields = found
        assert fill(rule.targets[where[1]], fields) == name
        parts[where] = name
    assert len(parts) == len(named(family, model))
