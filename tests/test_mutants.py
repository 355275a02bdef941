"""The mistakes of ``mutants``: each is made alone, where code has a meaning, and nowhere else."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.mutants import mutants, spoilt

CODE = '''"""1 + 1 is a docstring."""
from __future__ import annotations
__all__ = ["f"]
LIMIT: int = 3
Alias = Callable[[list["f"]], tuple["g", "h"]]

def f(a: Literal[1], b: int | None = 0) -> list[1]:
    """a < b"""
    if a < b and not b:
        raise ValueError(f"{a - b}", a == 2, "x")
    for n in zip(a, b, strict=True):
        if n.startswith("q"):
            continue
        a.append(n)
    return a
'''


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "code.py").write_text(CODE)
    return tmp_path


def test_every_mistake_is_made_once_where_code_has_a_meaning(root: Path) -> None:
    told = [mutant.what.partition(": ")[2] for mutant in mutants(root, "code.py")]
    assert sorted(what for what in told if "\n" not in what) == sorted([
        "3  ->  4", "0  ->  1", "a < b and (not b)  ->  a < b or not b", "a < b and (not b)  ->  a < b and b",
        "a < b  ->  a <= b", "a < b  ->  a >= b", "n.startswith('q')  ->  n.startswith('qx')",
        "a.append(n)  ->  None", "return a  ->  return None", "continue  ->  nothing",
        "raise ValueError(f'{a - b}', a == 2, 'x')  ->  nothing",
    ])  # fmt: skip
    assert sum("if not n.startswith" in what for what in told) == 1


def test_a_mistake_is_alone_in_the_text(root: Path) -> None:
    made = mutants(root, "code.py")
    texts = [spoilt(root, mutant) for mutant in made]
    assert len(set(texts)) == len(made)
    for mutant, text in zip(made, texts, strict=True):
        compile(text, mutant.name, "exec")


def test_what_runs_at_import_is_told_from_what_a_function_runs(root: Path) -> None:
    at_import = {mutant.what for mutant in mutants(root, "code.py") if not mutant.in_function}
    assert at_import == {"4: 3  ->  4", "7: 0  ->  1"}
