"""The command line: a thin skin over the public functions. Results go to stdout, everything else to stderr.

Exit codes: 0 ok, 1 a defect in loraconv, 2 usage, 3 format unknown, ambiguous or lacking a value, 4 unsafe or corrupt
input, 5 proof failed, 6 write failed, 7 hub or network, 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
from types import FrameType

import click

from loraconv.cli.commands import root
from loraconv.errors import LoraconvError


class _Terminated(BaseException):
    """SIGTERM, as an exception, so that temporary files are removed on the way out."""


def _terminate(_number: int, _frame: FrameType | None) -> None:
    raise _Terminated


def main(argv: list[str] | None = None) -> None:
    """Run the command line and exit with the documented code."""
    sys.exit(run(sys.argv[1:] if argv is None else argv))


def run(argv: list[str]) -> int:
    """Run one command line and return its exit code."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        code = root.main(argv, prog_name="loraconv", standalone_mode=False)
        return _flushed(code if isinstance(code, int) else 0)
    except LoraconvError as failure:
        return _report(failure, "--json" in argv)
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.ClickException as wrong:
        return _usage(wrong, "--json" in argv)
    except (KeyboardInterrupt, click.Abort):
        return _last_words("interrupted", 130)
    except _Terminated:
        return _last_words("terminated", 143)
    except BrokenPipeError:
        return _closed_pipe()
    except Exception as bug:
        if "--debug" in argv:
            raise
        why = f"{type(bug).__name__}: {bug}"
        return _last_words(f"this is a defect in loraconv: {why}\n  hint: run again with --debug and report it", 1)


def _flushed(code: int) -> int:
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        return _closed_pipe()
    except OSError as failure:
        name = errno.errorcode.get(failure.errno or 0, "")
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _last_words(f"error: cannot write to standard output: {failure.strerror} ({name})", 6)
    return code


def _closed_pipe() -> int:
    """The reader of stdout went away, which is its right: stop quietly."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _report(failure: LoraconvError, as_json: bool) -> int:
    from loraconv.report.text import error

    if as_json:
        text = json.dumps({"message_type": "exit_error", **failure.to_dict()})
    else:
        text = error(failure)
    return _last_words(text, failure.exit_code)


def _usage(wrong: click.ClickException, as_json: bool) -> int:
    if as_json:
        value = {"message_type": "exit_error", "code": wrong.exit_code, "slug": "usage", "message": wrong.format_message()}
        return _last_words(json.dumps(value), wrong.exit_code)
    wrong.show(sys.stderr)
    return wrong.exit_code


def _last_words(text: str, code: int) -> int:
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        pass
    return code
