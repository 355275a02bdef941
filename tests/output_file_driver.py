"""A little program that writes one file through ``output_file``: what the fault tests kill and starve.

Its one argument is a JSON object, see :func:`write`. It prints ``done`` when the file is in place.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from loraconv.errors import LoraconvError
from loraconv.io.atomic import output_file

MARK = b"our mark, version "


def content(version: int) -> bytes:
    """What the file holds: the mark, then a kilobyte."""
    return MARK + b"%d\n" % version + b"%d" % version * 1000


def write(target: str, version: int = 1, inputs: tuple[str, ...] = (), overwrite: bool = False) -> None:
    """Write one version of the file, in two parts."""
    data = content(version)
    with output_file(
        target, inputs=inputs, needed=len(data), mark=MARK, option="--report", overwrite=overwrite
    ) as file:
        file.write(data[:500])
        file.write(data[500:])


def main(options: dict[str, Any]) -> int:
    try:
        write(**options)
        print("done", flush=True)
    except LoraconvError as error:
        print(json.dumps(error.to_dict()), file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
