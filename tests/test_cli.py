"""The command line: exit codes, messages, what goes where, and what it does not import."""

from __future__ import annotations

import inspect
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

import loraconv
from loraconv.cli.commands import root
from tests.cli_driver import COMMANDS, CONVERSIONS, argv
from tests.cli_support import (
    Cli,
    assert_clear_error,
    error_json,
    harmless,
    launch,
    parsed_hint,
    rank_file,
    snapshot,
    tiny_run,
)

pytest_plugins = ["tests.cli_fixtures"]

HEAVY = ("torch", "numpy", "diffusers", "peft", "transformers", "huggingface_hub")
EVERY = sorted(root.commands)
ONLY_ON_THE_LINE = {"as_json", "quiet", "debug", "verbose"}


@pytest.fixture(scope="module")
def sat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run."""
    return tiny_run(tmp_path_factory.mktemp("sat"))


@pytest.fixture(scope="module")
def adapter(sat: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same adapter for diffusers."""
    out = tmp_path_factory.mktemp("adapter") / "lora"
    loraconv.sat2diffusers(sat, out=out)
    return out


# --- help and signatures ----------------------------------------------------------------------------------------------


def test_the_commands_are_the_documented_ones() -> None:
    others = ["check-data", "demo", "formats", "inspect", "roundtrip", "train", "verify"]
    writers = ["convert", "extract", "fuse", "merge", "resize", "sat2diffusers", "split", "unfuse"]
    assert sorted([*others, *writers]) == EVERY


@pytest.mark.parametrize("words", [["--help"], ["-h"], *([name, "--help"] for name in EVERY)], ids=" ".join)
def test_help_is_exit_0_on_stdout(cli: Cli, words: list[str]) -> None:
    done = cli(*words)
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("Usage: loraconv")
    assert max(map(len, done.out.splitlines())) <= 110


def test_every_command_and_every_option_says_what_it_does(cli: Cli) -> None:
    for command in root.commands.values():
        assert command.help
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help, f"{command.name} {parameter.name}"
                assert f"--{parameter.name.replace('_', '-')}".replace("--as-json", "--json") in parameter.opts


def test_the_version_is_that_of_the_package(cli: Cli) -> None:
    done = cli("--version")
    assert (done.code, done.out) == (0, f"loraconv, version {loraconv.__version__}\n")


def test_no_words_at_all_show_the_help_as_a_usage_error(cli: Cli) -> None:
    done = cli()
    assert done.code == 2
    assert "Usage: loraconv" in done.err + done.out


def _default(option: click.Parameter, command: click.Command) -> Any:
    """What the function gets when the option is not typed; newer versions of click have a value of their own for it."""
    value = option.get_default(click.Context(command))
    return None if "UNSET" in repr(value) else value


@pytest.mark.parametrize("name", EVERY)
def test_a_command_has_the_parameters_and_defaults_of_its_function(name: str) -> None:
    function = inspect.signature(getattr(loraconv, name.replace("-", "_"))).parameters
    on_line = {p.name: p for p in root.commands[name].params if p.name not in ONLY_ON_THE_LINE}
    assert set(on_line) == set(function)
    for parameter in function.values():
        option = on_line[parameter.name]
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            assert option.nargs == -1
            continue
        if parameter.default is inspect.Parameter.empty:
            assert option.required, parameter.name
        else:
            assert _default(option, root.commands[name]) == parameter.default, parameter.name
            assert not option.required
        is_argument = isinstance(option, click.Argument)
        assert is_argument == (parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD), parameter.name


@pytest.mark.parametrize("name", EVERY)
def test_every_command_has_the_same_output_options(name: str) -> None:
    assert {p.name for p in root.commands[name].params} >= ONLY_ON_THE_LINE - {"verbose"}


# --- JSON -------------------------------------------------------------------------------------------------------------

SUMMARY = {
    "schema",
    "path",
    "container",
    "ranks",
    "bytes",
    "dialect",
    "reason",
    "model",
    "config",
    "adapter",
    "problem",
    "contents",
    "notices",
    "next",
}
ADAPTER = {"ranks", "alphas", "alpha_sources", "scales", "targets", "modules", "layers", "dtypes"}
GROUP = {"what", "tensors", "bytes", "names"}
CONVERSION = {
    *("schema", "out", "to", "dry_run", "source", "files", "plan"),
    *("dropped", "kept", "notices", "proofs", "crc32"),
}
FILE = {"name", "bytes", "sha256"}
PLANNED = {"file", "name", "dtype", "shape", "how", "exact"}
PROOF = {"subject", "checks", "controls"}
CHECK = {"level", "name", "passed", "count", "figure", "bound", "detail"}
CONTROL = {"name", "caught", "by"}
FORMAT = {"name", "title", "file", "keys", "scale", "carries", "cannot_carry", "models", "facts"}
ERROR = {"message_type", "code", "slug", "message", "where", "why", "hint"}


def test_inspect_as_json_has_schema_1_and_the_documented_keys(cli: Cli, sat: Path) -> None:
    done = cli("inspect", sat, "--json")
    value = json.loads(done.out)
    assert (done.code, done.err, value["schema"]) == (0, "", 1)
    assert set(value) == SUMMARY
    assert set(value["adapter"]) == ADAPTER
    assert {frozenset(group) for group in value["contents"]} == {frozenset(GROUP)}


@pytest.mark.parametrize("command", CONVERSIONS)
@pytest.mark.parametrize("dry", [False, True])
def test_a_conversion_as_json_has_schema_1_and_the_documented_keys(
    cli: Cli, sat: Path, tmp_path: Path, command: str, dry: bool
) -> None:
    done = cli(*argv(command, sat, tmp_path / "out", "--json", *(["--dry-run"] if dry else [])))
    value = json.loads(done.out)
    assert (done.code, done.err, value["schema"], value["dry_run"]) == (0, "", 1, dry)
    assert set(value) == CONVERSION
    assert set(value["source"]) == SUMMARY
    assert {frozenset(tensor) for tensor in value["plan"]} == {frozenset(PLANNED)}
    assert bool(value["files"]) == bool(value["proofs"]) == (tmp_path / "out").exists() == (not dry)
    assert all(set(file) == FILE for file in value["files"])
    for proof in value["proofs"]:
        assert set(proof) == PROOF
        assert {frozenset(check) for check in proof["checks"]} == {frozenset(CHECK)}
        assert {frozenset(control) for control in proof["controls"]} == {frozenset(CONTROL)}


def test_the_manifest_has_the_same_keys_less_the_place(cli: Cli, sat: Path, tmp_path: Path) -> None:
    assert cli(*argv("convert", sat, tmp_path / "out")).code == 0
    manifest = json.loads((tmp_path / "out/loraconv.json").read_text())
    assert set(manifest) == CONVERSION - {"out", "dry_run"} | {"options", "versions"}
    assert str(sat.parent) not in (tmp_path / "out/loraconv.json").read_text()


@pytest.mark.parametrize("words", [[], ["peft"]], ids=["all", "one"])
def test_formats_as_json_has_schema_1_and_the_documented_keys(cli: Cli, words: list[str]) -> None:
    done = cli("formats", *words, "--json")
    value = json.loads(done.out)
    assert (done.code, done.err, set(value), value["schema"]) == (0, "", {"schema", "formats"}, 1)
    assert {frozenset(entry) for entry in value["formats"]} == {frozenset(FORMAT)}
    converters = Path(__file__).parent.parent / "converters"
    tables = {path.stem.replace("_", "-") for path in converters.glob("[a-z]*.py")}
    assert {entry["name"] for entry in value["formats"]} == set(words or tables)


@pytest.mark.parametrize(
    ("words", "code", "slug"),
    [
        (["inspect", "nowhere"], 2, "not-found"),
        (["formats", "pfet"], 3, "format-unknown"),
        (["inspect"], 2, "usage"),
        (["inspect", "x", "--typo"], 2, "usage"),
        (["convert", "x", "-o", "y", "--to", "peft", "--dtype", "int8"], 2, "usage"),
    ],
)
def test_with_json_an_error_is_one_line_of_json_on_stderr(cli: Cli, words: list[str], code: int, slug: str) -> None:
    done = cli(*words, "--json")
    value = error_json(done.err)
    assert (done.code, done.out, len(done.err.splitlines())) == (code, "", 1)
    assert (value["code"], value["slug"]) == (code, slug)
    assert value["message"]
    assert set(value) <= ERROR
    if slug != "usage":
        assert set(value) == ERROR
        assert value["hint"]


# --- streams ----------------------------------------------------------------------------------------------------------


def test_the_result_goes_to_stdout_and_notices_go_to_stderr(cli: Cli, tmp_path: Path) -> None:
    bare = tiny_run(tmp_path, yaml=False)
    done = cli(*argv("sat2diffusers", bare, tmp_path / "out"))
    assert done.code == 0
    assert [line.split()[0] for line in done.out.splitlines()] == ["wrote", "lora", "proof", "next"]
    assert done.err.splitlines()
    assert all(line.startswith("notice: ") for line in done.err.splitlines())
    assert "--alpha" in done.err


@pytest.mark.parametrize("command", COMMANDS)
def test_quiet_prints_nothing_but_errors(cli: Cli, sat: Path, tmp_path: Path, command: str) -> None:
    done = cli(*argv(command, sat, tmp_path / "out", "-q"))
    assert (done.code, done.out, done.err) == (0, "", "")
    assert (tmp_path / "out").exists() == (command != "inspect")
    done = cli(*argv(command, tmp_path / "nowhere", tmp_path / "out", "-q"))
    assert_clear_error(done, {2})


@pytest.mark.parametrize("command", COMMANDS)
def test_a_reader_who_leaves_ends_the_command_quietly(sat: Path, tmp_path: Path, command: str) -> None:
    read, write = os.pipe()
    os.close(read)
    done = launch(argv(command, sat, tmp_path / "out", "--json"), stdout=write)
    os.close(write)
    assert done.returncode in (0, 141, -signal.SIGPIPE)
    assert done.stderr == ""


def test_a_reader_who_takes_one_line_gets_it(sat: Path) -> None:
    line = f"{sys.executable} -m loraconv inspect {sat} --json | head -1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", line], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("{\n", "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="NO /dev/full HERE: a full stdout is not tested")
@pytest.mark.parametrize("words", [["inspect"], ["formats"], ["--help"]], ids=" ".join)
def test_a_stdout_that_is_full_is_exit_6(sat: Path, words: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = launch([*words, *([sat] if words == ["inspect"] else [])], stdout=full)
    assert done.returncode == 6
    assert "Traceback" not in done.stderr
    assert "standard output" in done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_closed_descriptors_make_no_traceback_and_harm_no_file(sat: Path, tmp_path: Path, command: str) -> None:
    before = snapshot(sat)
    line = [sys.executable, "-m", "loraconv", *argv(command, sat, tmp_path / "out")]
    for closed in (">&-", "2>&-", ">&- 2>&-", "<&-"):
        shell = f'exec "$@" {closed}'
        done = subprocess.run(["bash", "-c", shell, "x", *line, *([] if command == "inspect" else ["--overwrite"])],
                              capture_output=True, text=True, timeout=60)  # fmt: skip
        assert done.returncode in (0, 6), (closed, done.stderr)
        assert "Traceback" not in done.stderr, closed
        assert snapshot(sat) == before


def test_colour_and_width_of_the_terminal_change_nothing(sat: Path) -> None:
    plain = launch(["inspect", sat]).stdout
    for env in ({"NO_COLOR": "1"}, {"TERM": "dumb"}, {"COLUMNS": "60"}, {"FORCE_COLOR": "1"}):
        assert launch(["inspect", sat], env=env).stdout == plain
    assert harmless(plain)


@pytest.mark.parametrize("locale", ["C", "POSIX", "C.UTF-8"])
def test_a_name_outside_ascii_is_printed_in_every_locale(tmp_path: Path, locale: str) -> None:
    run = tiny_run(tmp_path / "läuft")
    env = {"LC_ALL": locale, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = launch(["inspect", run], env=env, errors="replace")
    assert (done.returncode, done.stderr) == (0, "")
    refused = launch(["inspect", run.with_name("fehlt-ü")], env=env, errors="replace")
    assert refused.returncode == 2
    assert "Traceback" not in refused.stderr


# --- what is not imported ---------------------------------------------------------------------------------------------

IMPORTED = f"""
import sys
from loraconv.cli import run
code = run(sys.argv[1:])
print("imported", code, *sorted(set({HEAVY!r}) & set(sys.modules)), file=sys.stderr)
"""


@pytest.mark.parametrize("words", [["--help"], ["inspect", "--help"], ["formats"], ["inspect"], ["inspect", "--json"]])
def test_help_formats_and_inspect_import_none_of_the_heavy_libraries(
    sat: Path, adapter: Path, words: list[str]
) -> None:
    sources = [sat, adapter] if words[0] == "inspect" and "--help" not in words else [None]
    for source in sources:
        done = launch([*words, *([source] if source else [])], code=IMPORTED)
        assert done.stderr.splitlines()[-1] == "imported 0"


def test_a_conversion_imports_neither_torch_nor_diffusers_nor_peft(sat: Path, adapter: Path, tmp_path: Path) -> None:
    lines = {
        "lora": argv("sat2diffusers", sat, tmp_path / "a"),
        "all": argv("sat2diffusers", sat, tmp_path / "b", "--what", "all"),
        "peft": argv("convert", adapter, tmp_path / "c"),
        "sat": ["convert", str(adapter), "-o", str(tmp_path / "d"), "--to", "sat"],
    }
    for name, line in lines.items():
        last = launch(line, code=IMPORTED).stderr.splitlines()[-1].split()
        assert last[:2] == ["imported", "0"], name
        assert not {"torch", "diffusers", "peft", "transformers"} & set(last), name


# --- what a newcomer types --------------------------------------------------------------------------------------------


def _unrelated(folder: Path) -> Path:
    folder.mkdir()
    (folder / "holiday.jpg").write_bytes(b"\xff\xd8\xff")
    (folder / "notes.txt").write_text("buy milk")
    return folder


def _empty(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _bare_file(folder: Path) -> Path:
    """A .pt without its run folder."""
    folder.mkdir()
    source = tiny_run(folder / "whole", yaml=False)
    return rank_file(source).rename(folder / "mp_rank_00_model_states.pt")


def _two_iterations(folder: Path) -> Path:
    run = tiny_run(folder)
    (run / "latest").unlink()
    os.rename(run / "2", run / "1000")
    tiny_run(folder)
    (run / "latest").unlink()
    return run


Mistake = tuple[Callable[[Path, Path, Path], list[Any]], int, str, str]

#: What was typed (folder, run, adapter) -> words; the exit code; a word of the message; a word of the hint.
MISTAKES: dict[str, Mistake] = {
    "a path that does not exist": (lambda f, r, a: ["inspect", f / "no/where"], 2, "no such file", "ls "),
    "a folder of unrelated files": (lambda f, r, a: ["inspect", _unrelated(f / "x")], 3, "holiday.jpg", "loraconv"),
    "an unrelated file": (lambda f, r, a: ["inspect", _unrelated(f / "x") / "notes.txt"], 3, "notes.txt", ""),
    "an empty folder": (lambda f, r, a: ["inspect", _empty(f / "x")], 3, "empty", "loraconv"),
    "a bare file where alpha must be known": (
        lambda f, r, a: ["sat2diffusers", _bare_file(f / "x"), "-o", f / "out", "--strict"], 3, "alpha", "--alpha",
    ),
    "a format with a typo": (lambda f, r, a: ["convert", r, "-o", f / "out", "--to", "pefft"], 3, "pefft", "--to peft"),
    "a format that is far off": (
        lambda f, r, a: ["convert", r, "-o", f / "out", "--to", "onnx"], 3, "onnx", "loraconv formats",
    ),
    "a format in capitals": (
        lambda f, r, a: ["convert", r, "-o", f / "out", "--to", "PEFT"], 3, "PEFT", "--to peft",
    ),
    "source and output swapped": (lambda f, r, a: ["sat2diffusers", f / "out", "-o", r], 2, "no such file", "ls "),
    "an output that exists": (
        lambda f, r, a: ["sat2diffusers", r, "-o", _unrelated(f / "x")], 6, "exists", "--overwrite",
    ),
    "an output that is somebody's folder": (
        lambda f, r, a: ["sat2diffusers", r, "-o", _unrelated(f / "x"), "--overwrite"], 6, "holiday.jpg", "-o",
    ),
    "an output that is a file": (
        lambda f, r, a: ["sat2diffusers", r, "-o", _unrelated(f / "x") / "notes.txt"], 6, "not a folder", "-o",
    ),
    "an output inside the input": (lambda f, r, a: ["sat2diffusers", r, "-o", r / "lora"], 2, "inside", "-o"),
    "the input as output": (lambda f, r, a: ["convert", r, "-o", r, "--to", "peft", "--overwrite"], 2, "input", "-o"),
    "an option with a typo": (lambda f, r, a: ["inspect", r, "--verbos"], 2, "--verbos", "--verbose"),
    "a command with a typo": (lambda f, r, a: ["sat2diffuser", r], 2, "sat2diffuser", "sat2diffusers"),
    "a missing output": (lambda f, r, a: ["sat2diffusers", r], 2, "--out", "--help"),
    "a missing format": (lambda f, r, a: ["convert", r, "-o", f / "out"], 2, "--to", "--help"),
    "what is no SAT run given as one": (
        lambda f, r, a: ["sat2diffusers", a, "-o", f / "out"], 3, "not a SAT", "loraconv convert",
    ),
    "a run with several iterations": (
        lambda f, r, a: ["inspect", _two_iterations(f / "x")], 2, "several iterations", "1000",
    ),
    "alpha that is no number": (lambda f, r, a: ["inspect", r, "--alpha", "one"], 2, "--alpha", "--help"),
    "alpha of zero": (
        lambda f, r, a: ["convert", r, "-o", f / "out", "--to", "peft", "--alpha", "0"], 2, "above", "--alpha",
    ),
    "negative alpha": (lambda f, r, a: ["sat2diffusers", r, "-o", f / "out", "--alpha", "-1"], 2, "--alpha", "--alpha"),
    "alpha of zero to inspect": (lambda f, r, a: ["inspect", r, "--alpha", "0"], 2, "above", "--alpha"),
    "alpha that is not a number": (lambda f, r, a: ["inspect", r, "--alpha", "nan"], 2, "alpha", "--alpha"),
    "infinite alpha": (lambda f, r, a: ["sat2diffusers", r, "-o", f / "out", "--alpha", "inf"], 2, "alpha", "--alpha"),
    "a shard size without a unit": (
        lambda f, r, a: ["sat2diffusers", r, "-o", f / "out", "--max-shard-size", "5"], 2, "not a size", "10GB",
    ),
    "a dtype with a typo": (lambda f, r, a: ["sat2diffusers", r, "-o", f / "out", "--dtype", "f16"], 2, "f16", "fp16"),
    "nothing as path": (lambda f, r, a: ["sat2diffusers", r, "-o", ""], 2, "name", "-o"),
    "a base asked of an adapter": (
        lambda f, r, a: ["sat2diffusers", a, "-o", f / "out", "--what", "base"], 3, "not a SAT", "loraconv convert",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("place", ["plain", "with spaces and 'quotes'"])
def test_a_wrong_command_says_what_is_wrong_and_what_to_type(
    cli: Cli, sat: Path, adapter: Path, tmp_path: Path, mistake: str, place: str
) -> None:
    words, code, what, hint = MISTAKES[mistake]
    folder = tmp_path / place
    folder.mkdir()
    if place != "plain":
        sat, adapter = folder / "sat", folder / "adapter"
        tiny_run(folder).rename(sat)
        loraconv.sat2diffusers(sat, out=adapter)
    line = words(folder, sat, adapter)
    before = snapshot(folder), snapshot(sat), snapshot(adapter)
    done = cli(*line)
    assert (snapshot(folder), snapshot(sat), snapshot(adapter)) == before
    assert_clear_error(done, {code})
    assert what in done.err
    assert hint in done.err
    if not done.err.startswith("Usage: "):
        value = error_json(cli(*line, "--json").err)
        assert value["message"]
        assert value["hint"], "no hint"
        if value["hint"].startswith("loraconv "):
            parsed_hint(value["hint"])


def test_an_output_of_an_earlier_run_needs_overwrite_and_is_then_replaced(cli: Cli, sat: Path, tmp_path: Path) -> None:
    line = argv("sat2diffusers", sat, tmp_path / "out")
    assert cli(*line).code == 0
    refused = cli(*line)
    assert_clear_error(refused, {6})
    assert "--overwrite" in refused.err
    assert cli(*line, "--overwrite", "--dtype", "fp16").code == 0
    assert os.listdir(tmp_path) == ["out"]


def test_the_next_command_that_inspect_and_conversions_name_can_be_typed(cli: Cli, tmp_path: Path) -> None:
    folder = tmp_path / "my runs"
    run = tiny_run(folder)
    value = json.loads(cli("inspect", run, "--json").out)
    parsed_hint(value["next"])
    done = cli("convert", run, "-o", folder / "b a c k", "--to", "sat")
    last = done.out.splitlines()[-1]
    assert last.startswith("next ")
    parsed_hint(last.removeprefix("next").strip())


def test_a_defect_is_exit_1_and_asks_for_a_report(cli: Cli, monkeypatch: pytest.MonkeyPatch, sat: Path) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("made for this test")

    monkeypatch.setattr("loraconv.describe.inspect", broken)
    done = cli("inspect", sat)
    assert (done.code, done.out) == (1, "")
    assert "--debug" in done.err
    assert "Traceback" not in done.err
    with pytest.raises(ZeroDivisionError):
        cli("inspect", sat, "--debug")


def test_a_defect_with_json_is_a_line_of_json_too(cli: Cli, monkeypatch: pytest.MonkeyPatch, sat: Path) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("made for this test")

    monkeypatch.setattr("loraconv.describe.inspect", broken)
    assert error_json(cli("inspect", sat, "--json").err)["code"] == 1


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_that_is_turned_into_another_error_on_its_way_is_still_no_defect(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, sat: Path, number: signal.Signals, code: int
) -> None:
    # As the interpreter itself does with whatever is raised while a class is being made, in an import for example.
    def interrupted(*_: Any, **__: Any) -> None:
        try:
            signal.raise_signal(number)
        except BaseException as error:
            raise RuntimeError("Error calling __set_name__") from error

    monkeypatch.setattr("loraconv.describe.inspect", interrupted)
    done = cli("inspect", sat)
    assert (done.code, done.out) == (code, "")
    assert "defect" not in done.err
    assert "Traceback" not in done.err
