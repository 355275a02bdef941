"""A little program that writes three files through ``output_folder``: what the fault tests kill, starve and interrupt.

Its one argument is a JSON object, see :func:`write`. It prints ``done`` when the output is in place.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

from loraconv.errors import LoraconvError
from loraconv.io.atomic import output_folder

NAMES = ("a.bin", "transformer/b.bin")


class Terminated(BaseException):
    """SIGTERM, as the command line raises it."""


def content(version: int, name: str, size: int) -> bytes:
    """What file ``name`` of the output ``version`` holds."""
    line = f"{version}:{name}\n".encode()
    return (line * (size // len(line) + 1))[:size]


def write(
    target: str,
    version: int = 1,
    size: int = 1000,
    needed: int = 0,
    inputs: tuple[str, ...] = (),
    overwrite: bool = False,
    ready: str = "",
    go: str = "",
) -> None:
    """Write the output ``version``; with ``go``, make the file ``ready``, then wait until ``go`` exists."""
    with output_folder(target, inputs=inputs, needed=needed, overwrite=overwrite) as folder:
        listed = []
        for name in NAMES:
            data = content(version, name, size)
            with folder.file(name) as file:
                for start in range(0, size, size // 2 or 1):
                    file.write(data[start : start + (size // 2 or 1)])
            assert file.sha256 == hashlib.sha256(data).hexdigest()
            listed.append({"name": name, "sha256": file.sha256})
        if go:
            Path(ready).touch()
            while not os.path.exists(go):
                time.sleep(0.002)
        with folder.file("loraconv.json") as file:
            file.write(json.dumps({"version": version, "size": size, "files": listed}).encode())


def terminate(*_: object) -> None:
    raise Terminated


def main(options: dict[str, Any]) -> int:
    signal.signal(signal.SIGTERM, terminate)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts with & has it ignored
    limit = options.pop("fsize", resource.RLIM_INFINITY)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        write(**options)
        print("done", flush=True)
    except LoraconvError as error:
        print(json.dumps(error.to_dict()), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except Terminated:
        return 143
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the work is over: a late signal just ends the process
    return 0


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
