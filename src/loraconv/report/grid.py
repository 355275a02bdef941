"""Modules laid out for a heat map: a row for every layer, a column for every module that layers have."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from loraconv.adapter import natural

#: An attention's projections come in the order in which it computes with them, not in that of the alphabet.
_COMPUTED = (("to_q", "to_0"), ("to_k", "to_1"), ("to_v", "to_2"), ("to_out", "to_3"))


@dataclass(frozen=True, slots=True)
class Grid:
    """Modules with one title: ``transformer_blocks.{}.attn1`` has rows 0 to 41 and columns to_q to to_out.0.

    ``modules`` maps (row, column) to the module's name; a place that is not in it has no module.
    """

    title: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    modules: Mapping[tuple[str, str], str]


def grids(modules: Iterable[str]) -> list[Grid]:
    """One grid for every kind of block, then one for the modules outside of all blocks, a row each."""
    found: dict[str, dict[tuple[str, str], str]] = {}
    for module in modules:
        block, row, column = _place(module)
        found.setdefault(block, {})[row, column] = module
    return [_grid(block, places) for block, places in sorted(found.items(), key=lambda item: not item[0])]


def _place(module: str) -> tuple[str, str, str]:
    """Block, row and column of a module. A list of layers has a plural name: the 0 of ``to_out.0`` is no layer."""
    steps = module.split(".")
    numbered = [n for n, step in enumerate(steps) if n and step.isdecimal() and steps[n - 1].endswith("s")]
    if not numbered:
        return "", module, "module"
    head, tail = steps[: numbered[-1] + 1], steps[numbered[-1] + 1 :]
    block = ".".join("{}" if step.isdecimal() else step for step in head)
    return block, ".".join(step for step in head if step.isdecimal()), ".".join(tail) or "module"


def _grid(block: str, places: Mapping[tuple[str, str], str]) -> Grid:
    rows = sorted({row for row, _ in places}, key=natural)
    columns = sorted({column for _, column in places}, key=_order)
    shared = _shared_steps(columns) if block else ""
    short = tuple(column.removeprefix(shared) for column in columns)
    modules = {
        (row, name): places[row, column]
        for row in rows
        for name, column in zip(short, columns, strict=True)
        if (row, column) in places
    }
    return Grid(f"{block}.{shared}".strip("."), tuple(rows), short, modules)


def _order(column: str) -> list[tuple[int, int | str]]:
    for name, place in _COMPUTED:
        column = column.replace(name, place)
    return natural(column)


def _shared_steps(columns: list[str]) -> str:
    """The steps that all columns begin with, each with its dot; at least one step of every column remains."""
    shared = ""
    for step in columns[0].split(".")[:-1]:
        if not all(column.startswith(f"{shared}{step}.") for column in columns):
            break
        shared += f"{step}."
    return shared
