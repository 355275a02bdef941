"""What the commands share: the options that every one has, and how a result is printed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import click

from loraconv.errors import WriteFailed

F = TypeVar("F", bound=Callable[..., Any])


def output_options(command: F) -> F:
    """Options that every command has."""
    command = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON (schema 1).")(command)
    command = click.option("-q", "--quiet", is_flag=True, help="Print errors only.")(command)
    return click.option("--debug", is_flag=True, help="Show a traceback if loraconv itself fails.")(command)


def words(_context: click.Context, _option: click.Parameter, value: str | tuple[str, ...]) -> tuple[str, ...]:
    """Words with commas between them, as a tuple."""
    return value if isinstance(value, tuple) else tuple(word.strip() for word in value.split(","))


def say(text: str, result: Any, as_json: bool, quiet: bool, notices: Iterable[str] = ()) -> None:
    """Print a result as text or JSON, and notices on stderr; raises :class:`WriteFailed` where stdout is broken."""
    if as_json:
        text = json.dumps(result, indent=1, sort_keys=True)
    elif quiet:
        return
    else:
        for notice in notices:
            click.echo(f"notice: {notice}", err=True)
    if sys.stdout is None:  # closed by the caller, who wants no result
        return
    try:
        print(text, flush=True)
    except BrokenPipeError:
        raise
    except OSError as failure:
        raise unprinted(failure) from None


def unprinted(failure: OSError) -> WriteFailed:
    """The error of a result that standard output does not take."""
    return WriteFailed(
        "cannot write to standard output",
        why=failure.strerror or str(failure),
        hint="an output folder that was asked for with -o is in place; only the text about it was not printed",
        slug="stdout",
    )
