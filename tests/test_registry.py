"""Formats that another package adds by an entry point, as seen by a program of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TABLE = """
from loraconv.rules import Dialect
ACME = Dialect(name="acme", title="acme LoRA", container="safetensors-file", file="acme.safetensors",
    down="{module}.lora_down.weight", up="{module}.lora_up.weight", prefixes=("net.",), default_alpha="rank",
    default_why="acme scales by 1", facts="acme")
NOT_A_TABLE = 3
"""


def add_package(site: Path, target: str) -> None:
    (site / "acme_formats.py").write_text(TABLE)
    info = site / "acme_formats-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-formats\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[loraconv.formats]\nacme = {target}\n")


def loraconv(site: Path, *words: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(site)}
    argv = [sys.executable, "-m", "loraconv", *words]
    return subprocess.run(argv, env=env, capture_output=True, text=True, check=False)


def test_a_format_of_another_package_is_listed(tmp_path: Path) -> None:
    assert loraconv(tmp_path, "formats", "acme").returncode == 3
    add_package(tmp_path, "acme_formats:ACME")
    done = loraconv(tmp_path, "formats", "acme")
    assert done.returncode == 0, done.stderr
    assert "net.{module}.lora_down.weight" in done.stdout


def test_an_entry_point_that_is_no_table_is_refused_by_name(tmp_path: Path) -> None:
    add_package(tmp_path, "acme_formats:NOT_A_TABLE")
    done = loraconv(tmp_path, "formats")
    assert done.returncode == 3
    assert "acme_formats:NOT_A_TABLE" in done.stderr


def test_an_entry_point_that_cannot_be_loaded_is_refused_by_name(tmp_path: Path) -> None:
    add_package(tmp_path, "acme_formats:MISSING")
    done = loraconv(tmp_path, "formats")
    assert done.returncode == 3
    assert "acme_formats:MISSING" in done.stderr
    assert "Traceback" not in done.stderr
