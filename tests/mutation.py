"""How much the tests see: small mistakes in rules.py and in the verifier, and how many of them fail a test.

    python tests/mutation.py --seed 1 --count 400

draws mutants at random, the same share from every file, and runs for each, in a copy of the repository, the tests that
reach its line, the fast ones first, until one fails. A mutant that takes far more processor time than its tests do is
killed too. At the end the tests that failed are run on the untouched code, where they have to pass. Processes are
forks of one that has torch and diffusers loaded; a mutant takes a second or two.
"""

from __future__ import annotations

import argparse
import ast
import builtins
import contextlib
import hashlib
import importlib.util
import itertools
import json
import math
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mutants import Mutant, mutants, spoilt

ROOT = Path(__file__).resolve().parent.parent
SCOPE = ("src/loraconv/rules.py", "src/loraconv/verifier")
#: The test files that reach the scope without a process of their own.
TESTS = (
    "accounting", "algebra", "alpha_and_fused", "bases", "bfl_control", "causes", "changes", "consumer_rules",
    "consumers", "controls", "convolutions", "dialects", "difference", "diffusers_oracle", "exact_bounds", "exactness",
    "extension", "extract", "extracted", "file_oracles", "flux_dialects", "flux_text_encoder", "forward",
    "forward_verdict", "fuse", "fuse_hf_llava", "fuse_llava", "fuse_sdxl", "fused_case", "fused_causes",
    "fused_diagnosis", "fused_parts", "guesses", "kron", "llava_settings", "loadable", "lora_bias", "merge", "merging",
    "namespace_oracles", "namespaces", "naming", "norms", "numbers", "oracles", "parallel", "peft_tuners", "proof",
    "prove_fused", "public_lists", "readings", "registry", "report_html", "reshape_convolutions", "resize", "rounding",
    "roundtrip", "rules", "sat2diffusers", "sat_lora", "sdxl", "spectrum", "split", "trained", "unfuse", "variants",
    "verifier_parts", "verify", "verify_changes", "verify_forward", "verify_fused", "whole_changes", "written",
    "zero_shards",
)  # fmt: skip
#: Seconds of processor time a mutant may take besides five times that of its tests.
GRACE = 30
#: Seconds of processor time of the tests that a mutant is given at most, the fast ones first.
BUDGET = 90
#: What kills a mutant that takes too long, or breaks the process.
STOPPED = "stopped"

#: The name under which marked code finds what it tells that it is reached.
MARK = "__reached__"

#: The name under which what runs at import is kept among the tests.
IMPORT = "import"

Lines = set[tuple[str, int]]


class Trace:
    """A plugin of pytest: which test that passes reaches which statement in scope, and what it costs in processor time.
    The statements say so themselves, see :func:`marked`."""

    def __init__(self, modules: Iterable[str]) -> None:
        self.modules = modules
        self.reached: Lines = set()
        self.imported: Lines = set()
        self.shared: Lines = set()
        self.tests: dict[str, dict[str, Any]] = {}
        setattr(builtins, MARK, lambda place: self.reached.add(place))

    def pytest_collection_finish(self) -> None:
        """What functions do at import makes tables, which any test may look at."""
        for module in self.modules:
            importlib.import_module(module)
        self.imported = self.reached

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[Any]:
        forget_caches()
        self.reached = set()
        begin = processor_time()
        try:
            return (yield)
        finally:
            entry = self.tests.setdefault(item.nodeid, {"passed": False})
            entry |= {"cost": processor_time() - begin, "lines": self.reached}

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: pytest.FixtureDef[Any]) -> Iterator[Any]:
        """What a fixture of several tests reaches, every test of the file reaches."""
        before, self.reached = self.reached, set()
        try:
            return (yield)
        finally:
            if fixturedef.scope != "function":
                self.shared |= self.reached
            self.reached |= before

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            self.tests.setdefault(report.nodeid, {})["passed"] = report.passed

    def told(self) -> dict[str, Any]:
        """Test -> its cost and its lines, for those that passed; under :data:`IMPORT`, what runs at import."""
        return {IMPORT: {"cost": 0.0, "lines": sorted(self.imported)}} | {
            test: {"cost": entry["cost"], "lines": sorted(entry["lines"] | self.shared)}
            for test, entry in self.tests.items()
            if entry["passed"]
        }


@contextlib.contextmanager
def marked(root: Path, paths: Iterable[str]) -> Iterator[None]:
    """While it lasts, every statement of a function in these files of the copy tells that it is reached."""
    files = {root / path: ((root / path).read_bytes(), (root / path).stat()) for path in paths}
    for file, (text, _) in files.items():
        tree = ast.parse(text)
        _mark_functions(tree.body, str(file.relative_to(root)))
        first = next((n + 1 for n, step in enumerate(tree.body) if isinstance(step, ast.ImportFrom)), 0)
        # A process that a test starts has nothing to tell it to.
        tree.body[first:first] = ast.parse(f"import builtins\n{MARK} = getattr(builtins, {MARK!r}, id)").body
        file.write_text(ast.unparse(tree), encoding="utf-8")
    try:
        yield
    finally:
        for file, (text, times) in files.items():
            file.write_bytes(text)
            os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def _mark_functions(steps: list[ast.stmt], path: str) -> None:
    for step in steps:
        if isinstance(step, ast.FunctionDef):
            step.body = _with_marks(step.body, path)
        elif isinstance(step, ast.ClassDef):
            _mark_functions(step.body, path)


def _with_marks(steps: list[ast.stmt], path: str) -> list[ast.stmt]:
    made = []
    for step in steps:
        for part in (step, *getattr(step, "handlers", ()), *getattr(step, "cases", ())):
            for name in ("body", "orelse", "finalbody"):
                setattr(part, name, _with_marks(getattr(part, name, []), path))
        is_text = isinstance(step, ast.Expr) and isinstance(step.value, ast.Constant)
        made += [] if is_text else ast.parse(f"{MARK}(({path!r}, {step.lineno}))").body
        made.append(step)
    return made


def processor_time() -> float:
    """Seconds that this process and its children have run."""
    return sum(os.times()[:4])


def forget_caches() -> None:
    """Empty what functions of loraconv remember, so that no test stands in the shade of an earlier one."""
    for name, module in list(sys.modules.items()):
        if name.startswith("loraconv."):
            for value in list(vars(module).values()):
                if hasattr(value, "cache_clear"):
                    value.cache_clear()


class Chosen:
    """A plugin of pytest: only these tests, in this order; the name of the first that fails goes into a file."""

    def __init__(self, tests: list[str], failed: Path) -> None:
        self.order = {test: number for number, test in enumerate(tests)}
        self.failed = failed

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = sorted((i for i in items if i.nodeid in self.order), key=lambda i: self.order[i.nodeid])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            with self.failed.open("a", encoding="utf-8") as stream:
                stream.write(report.nodeid + "\n")


def run_tests(root: Path, files: Iterable[str], plugin: object, *options: str) -> int:
    """pytest in this process, in the copy of the repository at ``root``."""
    import hypothesis

    os.chdir(root)
    sys.path[:] = [str(root), str(root / "src"), *(p for p in sys.path if not p.startswith(str(ROOT)))]
    hypothesis.settings.register_profile(
        "mutation", deadline=None, database=None, derandomize=True, suppress_health_check=list(hypothesis.HealthCheck)
    )
    hypothesis.settings.load_profile("mutation")
    assert str(importlib.util.find_spec("loraconv").origin).startswith(str(root)), "another loraconv is in the way"
    options = (
        "-q",
        f"--basetemp={root.parent / 'temp'}",
        "-p",
        "no:xdist",
        "-p",
        "no:cacheprovider",
        "-o",
        "timeout=0",
        *options,
    )
    return int(pytest.main([*options, *files], plugins=[plugin]))


def forked(work: Callable[[], int], seconds: float, log: Path) -> int:
    """The exit status of ``work`` in a process of its own; not 0 if it takes over ``seconds`` of processor time."""
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(seconds), math.ceil(seconds) + 5))
        stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(stream, 1)
        os.dup2(stream, 2)
        code = 3
        try:
            code = work()
        finally:
            os._exit(code)
    until = time.monotonic() + 20 * seconds + 600
    done, status = 0, 0
    while not done and time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # what the child may have left, or the child itself
    if not done:
        os.waitpid(child, 0)
        return 124
    return os.waitstatus_to_exitcode(status)


def copy(root: Path) -> None:
    """The repository at ``root``, laid out so that no installed loraconv is needed."""
    names = ("benchmarks", "converters", "docs", "fixtures", "src", "tests")
    for name in names:
        shutil.rmtree(root / name, ignore_errors=True)
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy2(path, root / path.name)
    (root / "src/loraconv/converters").symlink_to(root / "converters")
    (root / "src/loraconv/demo_run").symlink_to(root / "fixtures/sat/cogvideox-2b-t2v")


def in_scope(root: Path) -> list[str]:
    """The files that are mutated, as paths in the repository."""
    found = [p for place in SCOPE for p in sorted([*(root / place).rglob("*.py")] or [root / place])]
    return [str(path.relative_to(root)) for path in found]


def digest(paths: Iterable[Path]) -> str:
    found = hashlib.sha256()
    for path in sorted(paths):
        found.update(str(path).encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:16]


def cover(root: Path, work: Path) -> tuple[dict[str, dict[str, Any]], Lines]:
    """Every test with its cost and the lines that it reaches, and the lines in functions that are reached at import;
    what is known from an earlier run is not run again."""
    known = digest([*(root / "src").rglob("*.py"), *(root / "converters").rglob("*.py"), root / "tests/sat_run.py"])
    found: dict[str, dict[str, Any]] = {}
    imported: Lines = set()
    for name in TESTS:
        path = root / f"tests/test_{name}.py"
        record = work / f"{name}-{known}-{digest([path])}.json"
        if not record.exists():

            def trace(path: Path = path, record: Path = record) -> int:
                plugin = Trace(p.removeprefix("src/").removesuffix(".py").replace("/", ".") for p in in_scope(root))
                run_tests(root, [str(path)], plugin)
                record.write_text(json.dumps(plugin.told()), encoding="utf-8")
                return 0

            with marked(root, in_scope(root)):
                forked(trace, 3600, work / "trace.log")
        told = json.loads(record.read_text(encoding="utf-8"))
        imported |= set(map(tuple, told.pop(IMPORT)["lines"]))
        found |= told
        print(f"{name}: {len(found)} tests so far", file=sys.stderr, flush=True)
    return found, imported


def file_of(test: str) -> str:
    return test.partition("::")[0]


class Coverage:
    """Which tests reach a line, in the order in which they are worth running."""

    def __init__(self, tests: dict[str, dict[str, Any]], imported: Lines) -> None:
        self.tests, self.imported = tests, imported
        self.by_line: dict[tuple[str, int], set[str]] = {}
        self.by_file: dict[str, set[str]] = {}
        for test, entry in tests.items():
            for path, line in entry["lines"]:
                self.by_line.setdefault((path, line), set()).add(test)
                self.by_file.setdefault(path, set()).add(test)

    def of(self, mutant: Mutant) -> list[str]:
        """The tests that reach the statement. Of one that runs at import, those of every test file that reaches its
        file (or its folder, where nothing in the file runs later): a test of a table may look at it and run nothing."""
        first, last = mutant.lines
        places = [(mutant.path, line) for line in range(first, last + 1)]
        found = set().union(*(self.by_line.get(place, ()) for place in places))
        if not mutant.in_function or self.imported.intersection(places):
            folder = mutant.path.rpartition("/")[0]
            near = (tests for path, tests in self.by_file.items() if path.rpartition("/")[0] == folder)
            files = {file_of(test) for test in self.by_file.get(mutant.path) or set().union(*near)}
            found |= {test for test in self.tests if file_of(test) in files}
        ordered = self.ordered(found)
        costs = list(itertools.accumulate(self.cost([test]) for test in ordered))
        return [test for test, cost in zip(ordered, costs, strict=True) if cost <= BUDGET or test == ordered[0]]

    def ordered(self, tests: Iterable[str]) -> list[str]:
        """Those that cost least first; a test with many parameters only counts as cheap for the first few of them, lest
        one test in a hundred forms takes the time of a hundred others."""
        by_function: dict[str, list[str]] = {}
        for test in sorted(tests, key=lambda t: (self.cost([t]), t)):
            by_function.setdefault(test.partition("[")[0], []).append(test)
        ranked = ((t, n) for forms in by_function.values() for n, t in enumerate(forms))
        found = sorted(ranked, key=lambda one: (round(math.log2((self.cost([one[0]]) + 0.02) * (1 + one[1]))), one[0]))
        return [test for test, _ in found]

    def cost(self, tests: Iterable[str]) -> float:
        """Seconds of processor time."""
        return sum(self.tests[test]["cost"] for test in tests)


class Bench:
    """The copy of the repository in which mutants live and die."""

    def __init__(self, work: Path) -> None:
        self.work, self.root = work, work / "copy"
        copy(self.root)
        self.coverage = Coverage(*cover(self.root, work))

    def run(self, tests: list[str]) -> list[str]:
        """The tests that fail, up to the first; ``[STOPPED]`` where they take too long, or the process breaks down."""
        failed = self.work / "failed"
        failed.write_text("", encoding="utf-8")
        files = list(dict.fromkeys(map(file_of, tests)))
        plugin = Chosen(tests, failed)
        limit = GRACE + 5 * self.coverage.cost(tests)
        code = forked(lambda: run_tests(self.root, files, plugin, "-x"), limit, self.work / "log")
        return failed.read_text(encoding="utf-8").split("\n")[:-1] or ([] if code == 0 else [STOPPED])

    def killed_by(self, mutant: Mutant) -> str:
        """The test that the mutant fails, empty if none does."""
        tests = self.coverage.of(mutant)
        if not tests:
            return ""
        path = self.root / mutant.path
        before, times = path.read_bytes(), path.stat()
        path.write_text(spoilt(self.root, mutant), encoding="utf-8")
        try:
            return next(iter(self.run(tests)), "")
        finally:
            path.write_bytes(before)
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def draw(everything: list[Mutant], count: int, seed: int) -> list[Mutant]:
    """A systematic sample: shuffled within each file, then every so manieth from a random start. In random order, so
    that what a stopped run has done is a sample too."""
    dice = random.Random(seed)
    by_file: dict[str, list[Mutant]] = {}
    for mutant in everything:
        by_file.setdefault(mutant.path, []).append(mutant)
    shuffled = [mutant for group in by_file.values() for mutant in dice.sample(group, len(group))]
    step = len(shuffled) / count
    start = dice.random() * step
    drawn = [shuffled[int(start + number * step)] for number in range(count)]
    return dice.sample(drawn, count)


def interval(share: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    z = 1.96
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return middle - half, middle + half


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--seed", type=int, default=1)
    words.add_argument("--count", type=int, default=400, help="how many mutants to draw")
    words.add_argument("--only", default="", help="only mutants whose name (path#number) has this in it")
    words.add_argument("--but", type=Path, action="append", default=[], help="not those that this earlier --out tells")
    words.add_argument("--out", type=Path, help="one line of JSON for each mutant; a run that was stopped goes on")
    words.add_argument("--work", type=Path, help="a folder for the copy and for what each test reaches; kept")
    options = words.parse_args()
    work = options.work or Path(tempfile.mkdtemp(prefix="mutation-"))
    work.mkdir(parents=True, exist_ok=True)
    for name in ("hypothesis", "peft", "torch", "diffusers.pipelines.cogvideo.pipeline_cogvideox"):
        importlib.import_module(name)
    bench = Bench(work.resolve())
    told = {name for path in options.but for name in results(path)}
    everything = [
        m for path in in_scope(ROOT) for m in mutants(ROOT, path) if options.only in m.name and m.name not in told
    ]
    chosen = draw(everything, min(options.count, len(everything)), options.seed)
    print(f"{len(everything)} mutants, {len(chosen)} drawn with seed {options.seed}", flush=True)
    report(bench, chosen, options.out)


def results(out: Path | None) -> dict[str, str]:
    """What an earlier run, or this one before it was stopped, wrote into ``out``: mutant -> the test that kills it."""
    if out is None or not out.exists():
        return {}
    told = map(json.loads, out.read_text(encoding="utf-8").splitlines())
    return {line["name"]: line["killed by"] for line in told}


def report(bench: Bench, chosen: list[Mutant], out: Path | None) -> None:
    """Run the mutants, say which survive, and the figure."""
    killers: dict[str, str] = results(out)
    for number, mutant in enumerate(chosen):
        if mutant.name in killers:
            continue
        begin = time.monotonic()
        killers[mutant.name] = bench.killed_by(mutant)
        line = {"name": mutant.name, "what": mutant.what, "killed by": killers[mutant.name]}
        line |= {"tests": len(bench.coverage.of(mutant)), "seconds": round(time.monotonic() - begin, 1)}
        if out is not None:
            with out.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(line) + "\n")
        if not killers[mutant.name]:
            print(f"[{number + 1}] survives {line['tests']} tests: {mutant.name} {mutant.what}", flush=True)
    killers = {mutant.name: killers[mutant.name] for mutant in chosen}
    tests = sorted({test for test in killers.values() if test not in ("", STOPPED)})
    flaky = set()
    for test in bench.run(tests):
        flaky.add(test)
        print(f"fails on the untouched code: {test}", flush=True)
    alive = [name for name, test in killers.items() if not test or test in flaky]
    share = 1 - len(alive) / len(chosen)
    low, high = interval(share, len(chosen))
    print(f"killed {len(chosen) - len(alive)} of {len(chosen)}: {share:.1%} (95 % interval {low:.1%} to {high:.1%})")


if __name__ == "__main__":
    main()
