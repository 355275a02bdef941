"""The wheel as a user gets it: every package is in it, it runs from elsewhere; the same for a wheel of the sdist."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from loraconv.fusion import merging
from tests.support import refuse_to_skip_compiled_parts

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.packaging


def run(*argv: str | Path, cwd: Path, **env: str) -> str:
    done = subprocess.run(
        [str(a) for a in argv], cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tracked files, so that building leaves nothing in the checkout."""
    copy = tmp_path_factory.mktemp("sources") / "loraconv"
    tracked = run("git", "ls-files", cwd=ROOT).splitlines()
    for name in tracked:
        target = copy / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, target)
    return copy


def build(sources: Path, place: Path, hook: str, **env: str) -> Path:
    """Call the build backend itself, with the setuptools that is installed."""
    code = f"import setuptools.build_meta as b; print(b.{hook}({str(place)!r}))"
    return place / run(sys.executable, "-c", code, cwd=sources, **env).splitlines()[-1]


def installed(wheel: Path, place: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(place)
    return place


def check(place: Path, cwd: Path) -> None:
    """Run the demonstration from an installed copy, away from the checkout."""
    where = run(sys.executable, "-c", "import loraconv; print(loraconv.__file__)", cwd=cwd, PYTHONPATH=str(place))
    assert Path(where.strip()).is_relative_to(place)
    text = run(sys.executable, "-m", "loraconv", "demo", cwd=cwd, PYTHONPATH=str(place))
    assert "verdict" in text
    assert "NOT EQUAL" not in text


def test_the_wheel_holds_every_package_and_runs(sources: Path, tmp_path: Path) -> None:
    wheel = build(sources, tmp_path, "build_wheel")
    names = zipfile.ZipFile(wheel).namelist()
    for needed in (
        "loraconv/py.typed",
        "loraconv/converters/sat.py",
        "loraconv/converters/models/cogvideox.py",
        "loraconv/demo_run/reference.safetensors",
    ):
        assert needed in names
    assert sum(n.endswith("training_config.yaml") for n in names) == 1
    assert not [n for n in names if n.startswith(("tests/", "benchmarks/", "converters/", "fixtures/"))]
    check(installed(wheel, tmp_path / "site"), tmp_path)


def test_one_wheel_serves_every_version_of_python_and_holds_the_compiled_parts(sources: Path, tmp_path: Path) -> None:
    if merging._rounding is None:
        refuse_to_skip_compiled_parts()
    wheel = build(sources, tmp_path, "build_wheel")
    assert "-cp311-abi3-" in wheel.name
    compiled = sorted(name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so"))
    assert [name.rpartition("/")[2] for name in compiled] == ["_rounding.abi3.so", "_cells.abi3.so"]


def test_without_a_compiler_everything_runs_all_the_same(sources: Path, tmp_path: Path) -> None:
    shutil.rmtree(sources / "build", ignore_errors=True)
    wheel = build(sources, tmp_path, "build_wheel", CC="/bin/false")
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
    check(installed(wheel, tmp_path / "site"), tmp_path)


def test_a_wheel_made_of_the_source_distribution_runs(sources: Path, tmp_path: Path) -> None:
    archive = build(sources, tmp_path, "build_sdist")
    shutil.unpack_archive(archive, tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    check(installed(build(unpacked, tmp_path, "build_wheel"), tmp_path / "site"), tmp_path)


def test_an_editable_install_finds_the_tables(sources: Path, tmp_path: Path) -> None:
    python = tmp_path / "venv" / "bin" / "python"
    run(sys.executable, "-m", "venv", "--system-site-packages", tmp_path / "venv", cwd=tmp_path)
    for mode in ("", "--config-settings=editable_mode=strict"):
        options = ["--no-deps", "--no-build-isolation", "-q", *([mode] if mode else [])]
        paths = os.pathsep.join(p for p in sys.path if p.endswith("site-packages"))
        run(python, "-m", "pip", "install", *options, "-e", sources, cwd=tmp_path, PYTHONPATH=paths)
        code = "import loraconv, sys; print([f.name for f in loraconv.formats()], loraconv.__file__)"
        # Without the path that pip needed for setuptools: this interpreter's own editable install lies there.
        text = run(python, "-c", code, cwd=tmp_path, PYTHONPATH="")
        assert "'sat', 'diffusers', 'peft'" in text
        assert str(sources) in text
