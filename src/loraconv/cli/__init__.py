"""The command line: a thin skin over the public functions. Results go to stdout, everything else to stderr.

Exit codes: 0 ok, 1 a defect in loraconv, 2 usage, 3 format unknown, ambiguous or lacking a value, 4 unsafe or corrupt
input, 5 proof failed, 6 write failed, 7 hub or network, 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
from contextlib import suppress
from types import FrameType

import click

from loraconv.cli.commands import root
from loraconv.cli.options import unprinted
from loraconv.cli.reshaping import COMMANDS
from loraconv.errors import LoraconvError

for _command in COMMANDS:
    root.add_command(_command)


class _Stopped(BaseException):
    """SIGINT or SIGTERM, as an exception, so that temporary files are removed on the way out."""


#: The commands that go through gigabytes.
_HEAVY = {"convert", "extract", "fuse", "merge", "resize", "roundtrip", "sat2diffusers", "split", "unfuse", "verify"}

#: The signals that stop a command: exit code and word.
_SIGNALS = {signal.SIGINT: (130, "interrupted"), signal.SIGTERM: (143, "terminated")}
_received: list[int] = []


def _stop(number: int, _frame: FrameType | None) -> None:
    _received.append(number)
    raise _Stopped


def main(argv: list[str] | None = None) -> None:
    """Run the command line and exit with the documented code."""
    words = sys.argv[1:] if argv is None else argv
    if words and words[0] in _HEAVY:
        from loraconv.cli.allocator import keep_freed_memory

        keep_freed_memory()
        gc.set_threshold(50_000, 20, 20)  # the modules alone make it look at everything a dozen times
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # they have threads of their own, which BLAS's would hinder
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_DFL)  # before and after the command, a signal just ends the process
    sys.exit(run(words))


def run(argv: list[str]) -> int:
    """Run one command line and return its exit code."""
    as_json = "--json" in argv
    _received.clear()
    before = {number: signal.signal(number, _stop) for number in _SIGNALS}
    try:
        return _run(argv, as_json)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run(argv: list[str], as_json: bool) -> int:
    try:
        code = root.main(argv, prog_name="loraconv", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except LoraconvError as failure:
        return _report(failure, as_json)
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.ClickException as wrong:
        return _usage(wrong, as_json)
    except (_Stopped, KeyboardInterrupt, click.Abort):
        return _stopped(as_json)
    except (BrokenPipeError, SystemExit):  # click answers a closed pipe with SystemExit
        return _closed_pipe()
    except OSError as failure:
        return _report(unprinted(failure), as_json)
    except Exception as bug:
        if _received:  # an import or a class body may wrap the exception that the signal raised
            return _stopped(as_json)
        if "--debug" in argv:
            raise
        return _end(f"this is a defect in loraconv: {type(bug).__name__}: {bug}", 1, "defect", as_json)


def _stopped(as_json: bool) -> int:
    code, word = _SIGNALS[signal.Signals(_received[0])] if _received else _SIGNALS[signal.SIGINT]
    return _end(word, code, word, as_json)


def _closed_pipe() -> int:
    """The reader of stdout went away, which is its right: stop quietly."""
    with suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _report(failure: LoraconvError, as_json: bool) -> int:
    from loraconv.report.text import error

    if failure.slug == "stdout":
        _closed_pipe()
    text = json.dumps({"message_type": "exit_error", **failure.to_dict()}) if as_json else error(failure)
    return _last_words(text, failure.exit_code)


def _usage(wrong: click.ClickException, as_json: bool) -> int:
    if as_json:
        return _end(wrong.format_message(), wrong.exit_code, "usage", as_json)
    wrong.show(sys.stderr)
    return wrong.exit_code


def _end(message: str, code: int, slug: str, as_json: bool) -> int:
    hint = "run again with --debug and report it" if code == 1 else ""
    if as_json:
        value = {"message_type": "exit_error", "code": code, "slug": slug, "message": message, "hint": hint}
        return _last_words(json.dumps(value), code)
    return _last_words(f"{message}\n  hint: {hint}" if hint else message, code)


def _last_words(text: str, code: int) -> int:
    with suppress(OSError, ValueError, AttributeError):  # stderr may be closed or full
        print(text, file=sys.stderr, flush=True)
    return code
