"""What the documents say is true: the setup lines, the commands, the example of a new format."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from loraconv.cli.commands import root
from loraconv.rules import Dialect

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "benchmarks/README.md",
    *sorted((ROOT / "docs").iterdir()),
]


def test_the_readme_has_exactly_two_setup_lines() -> None:
    assert len(re.findall(r"^python3 -m venv ", README, re.MULTILINE)) == 2


def test_every_command_is_in_the_readme() -> None:
    for name in root.commands:
        assert f"loraconv {name}" in README


def test_every_command_line_in_the_readme_parses() -> None:
    lines = re.findall(r"^loraconv ([^#\n]*?)(?:\s{2,}.*)?$", README, re.MULTILINE)
    assert len(lines) >= 6
    for line in lines:
        words = shlex.split(line.replace("base|all", "all").replace("diffusers|peft|sat", "peft"))
        command = root.commands[words[0]]
        command.make_context(words[0], words[1:], resilient_parsing=False)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} -> {target}"


def test_the_exit_codes_in_the_readme_are_those_of_the_errors() -> None:
    from loraconv import errors

    codes = {
        kind.exit_code
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, errors.LoraconvError)
    }
    for code in codes | {0, 130, 143}:
        assert re.search(rf"^\| ({code}|\d+, {code}|{code}, \d+) \|", README, re.MULTILINE), code


def test_the_example_of_a_new_format_is_a_valid_table() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    block = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert block
    code = "\n".join(line.removeprefix("   ") for line in block.group(1).splitlines())
    names: dict[str, object] = {}
    exec(compile(code, "CONTRIBUTING.md", "exec"), names)
    assert isinstance(names["ACME"], Dialect)
