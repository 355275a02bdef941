"""The house rules that no linter knows: who may open a file for writing, who may unpickle, what a table file may be."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted([*(ROOT / "src").rglob("*.py"), *(ROOT / "converters").rglob("*.py")])


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """Every call in a file with its dotted name."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def shown(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", SOURCES, ids=shown)
def test_nothing_unpickles_or_executes(path: Path) -> None:
    banned = {"eval", "exec", "compile", "torch.load", "pickle.load", "pickle.loads", "yaml.load", "yaml.unsafe_load"}
    used = {name for name, _ in calls(path)} & banned
    assert not used, f"{shown(path)} calls {used}"
    assert "trust_remote_code" not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", SOURCES, ids=shown)
def test_nothing_imports_pickle(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [a.name for a in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
        assert not {"pickle", "dill", "cloudpickle", "joblib"} & {*names, module}, shown(path)


@pytest.mark.parametrize("path", [p for p in SOURCES if p.name not in ("atomic.py", "output_file.py")], ids=shown)
def test_only_atomic_writes(path: Path) -> None:
    for name, call in calls(path):
        assert not name.endswith((".write_text", ".write_bytes", ".touch", ".mkdir")), f"{shown(path)}: {name}"
        if name == "open":
            pytest.fail(f"{shown(path)} uses open(); inputs are read through InputFile")
        if name == "os.open":
            flags = ast.unparse(call.args[1])
            assert "O_RDONLY" in flags or "devnull" in ast.unparse(call.args[0]), f"{shown(path)}: os.open({flags})"


VERIFIER = [p for p in SOURCES if "verifier" in p.parts]
RUNNING = ("consumers/forward.py", "consumers/inputs.py", "consumers/recorded.py")


@pytest.mark.parametrize("path", VERIFIER, ids=shown)
def test_of_the_verifier_only_the_consumers_load_torch_and_diffusers(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    at_once = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        heavy = {"torch", "diffusers", "peft", "transformers"} & {name.partition(".")[0] for name in names}
        assert not heavy or str(path).endswith(RUNNING), f"{shown(path)}: {heavy}"
        assert not heavy or id(node) not in at_once, f"{shown(path)} imports {heavy} when it is imported"


def test_no_module_bears_the_name_of_a_public_function() -> None:
    import loraconv

    modules = {p.stem for p in (ROOT / "src" / "loraconv").glob("*.py")}
    folders = {p.name for p in (ROOT / "src" / "loraconv").iterdir() if p.is_dir()}
    assert not set(loraconv.__all__) & (modules | folders)
