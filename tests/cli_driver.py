"""Runs command lines where a test needs a process of its own: under an audit hook, under limits, without privileges.

One argument names the job, the others are its own; every job prints one JSON object.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from loraconv.cli import run
from tests import hostile

CONVERSIONS = ("sat2diffusers", "convert")
COMMANDS = ("inspect", *CONVERSIONS)

#: Listing folders is what every command does.
HARMLESS = ("os.listdir", "os.scandir", "import_module")


def argv(command: str, src: str | Path, out: str | Path, *more: str) -> list[str]:
    """The line of ``command``; ``inspect`` has no output."""
    if command == "inspect":
        return [command, str(src), *more]
    return [command, str(src), "-o", str(out), *(["--to", "peft"] if command == "convert" else []), *more]


def quietly(words: list[str]) -> tuple[int, str]:
    """Exit code and stderr of one command line in this process."""
    said = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        code = run(words)
    return code, said.getvalue()


def audit(every: int) -> dict[str, Any]:
    """Give each malicious and structural case to a command under an audit hook; what happened, as counts."""
    hits: list[str] = []
    watching: list[str] = []

    def hook(event: str, args: tuple[object, ...]) -> None:
        if not watching or event in HARMLESS:
            return
        inside = event == "open" and str(args[0]).startswith(watching[0])
        if event.startswith(hostile.WATCHED) or (event == "open" and not inside):
            hits.append(f"{event} {args!r:.200}")

    with tempfile.TemporaryDirectory() as name:
        folder, canary = Path(name), Path(name, "canary")
        (folder / "in").mkdir()
        cases = [*list(hostile.malicious(canary))[::every], *hostile.structural(canary)]
        for data in (hostile.small_checkpoint(), b"nothing", hostile.legacy(hostile.BENIGN), cases[0][1], cases[1][1]):
            for command in COMMANDS:  # the imports, before the hook
                path = hostile.write(("warm", data), folder / "in")
                quietly(argv(command, path, folder / "out"))
        sys.addaudithook(hook)
        wrong: list[str] = []
        for case in cases:
            path = hostile.write(case, folder / "in")
            for command in COMMANDS:
                watching[:] = [str(folder / "in")]
                code, err = quietly(argv(command, path, folder / "out"))
                watching.clear()
                if code != 4 or "Traceback" in err or not err.startswith("error: "):
                    wrong.append(f"{case[0]} {command}: {code} {err[:200]}")
            path.unlink()
        seen = list(hits)
        watching[:] = [str(folder / "in")]
        os.system("true")
        watching.clear()
        return {
            "cases": len(cases),
            "runs": len(cases) * len(COMMANDS),
            "hits": seen[:20],
            "control": len(hits) > len(seen),
            "executed": canary.exists(),
            "left": sorted(set(os.listdir(folder)) - {"in"}),
            "not exit 4": wrong[:20],
        }


def measure(words: list[str]) -> dict[str, Any]:
    """Run one command line under 2 GB of address space and 15 seconds; its time, and its memory beyond the imports."""
    import numpy  # noqa: F401  (part of the baseline)
    import yaml  # noqa: F401

    quietly(["inspect", "/nonexistent"])
    resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
    signal.alarm(15)
    before, start = hostile._peak_kilobytes(), time.perf_counter()
    code, err = quietly(words)
    seconds = time.perf_counter() - start
    megabytes = (hostile._peak_kilobytes() - before) // 1000
    return {"code": code, "err": err, "seconds": round(seconds, 3), "megabytes": megabytes}


def nobody(plan: dict[str, Any]) -> dict[str, Any]:
    """Run the lines of ``warm`` for their imports, take all rights from ``lock``, run ``line`` without privileges."""
    import concurrent.futures.thread  # noqa: F401  (the library may be out of reach afterwards)
    import difflib  # noqa: F401

    warm = [quietly(line) for line in plan["warm"]]
    os.chmod(plan["lock"], 0)
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    return {"warm": warm, "done": quietly(plan["line"])}


if __name__ == "__main__":
    job, *rest = sys.argv[1:]
    if job == "audit":
        print(json.dumps(audit(int(rest[0]))))
    elif job == "measure":
        print(json.dumps(measure(rest)))
    else:
        print(json.dumps(nobody(json.loads(rest[0]))))
