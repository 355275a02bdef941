"""The commands. Each parses its options and calls the public function of the same name; bodies import lazily, so that
``--help`` costs nothing."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import click

from loraconv import __version__
from loraconv.errors import WriteFailed

F = TypeVar("F", bound=Callable[..., Any])


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="loraconv")
def root() -> None:
    """Convert LoRA checkpoints, and prove that the conversion is right."""


def _output_options(command: F) -> F:
    """Options that every command has."""
    command = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON (schema 1).")(command)
    command = click.option("-q", "--quiet", is_flag=True, help="Print errors only.")(command)
    return click.option("--debug", is_flag=True, help="Show a traceback if loraconv itself fails.")(command)


_CONVERSION = (
    click.option("--alpha", type=float, metavar="A", help="The lora_alpha it was trained with (scale = A / rank)."),
    click.option("--dtype", type=click.Choice(["fp32", "fp16", "bf16"]), help="Store in this dtype [default: keep]."),
    click.option(
        "--scale-in",
        type=click.Choice(["auto", "fold", "metadata"]),
        default="auto",
        show_default=True,
        help="Where a diffusers file carries the scale: folded into lora_B, or in the header only.",
    ),
    click.option("--strict", is_flag=True, help="Refuse an alpha that only a convention says."),
    click.option("--nearest", is_flag=True, help="Accept a model-parallel LoRA: write the nearest single adapter."),
    click.option("--allow-nonfinite", is_flag=True, help="Convert although there are NaN or Inf."),
    click.option("--overwrite", is_flag=True, help="Replace an earlier output of loraconv."),
    click.option("--dry-run", is_flag=True, help="Print the plan and write nothing."),
)


def _conversion_options(command: F) -> F:
    for option in reversed(_CONVERSION):
        command = option(command)
    return command


def _say(text: str, result: Any, as_json: bool, quiet: bool, notices: Iterable[str] = ()) -> None:
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


@root.command()
@click.argument("src")
@click.option("--alpha", type=float, metavar="A", help="The lora_alpha it was trained with.")
@click.option("-v", "--verbose", is_flag=True, help="List every name, folded by layer.")
@_output_options
def inspect(src: str, alpha: float | None, verbose: bool, as_json: bool, quiet: bool, debug: bool) -> None:
    """Say what a checkpoint is: format, model, rank, alpha, scale, layers, and everything else in it."""
    from loraconv.describe import inspect as run
    from loraconv.report import text

    result = run(src, alpha=alpha)
    _say(text.summary(result, verbose=verbose), result.to_dict(), as_json, quiet)


@root.command()
@click.argument("src")
@click.option("-o", "--out", required=True, help="The folder to write.")
@click.option(
    "--what",
    type=click.Choice(["lora", "base", "all"]),
    default="lora",
    show_default=True,
    help="The LoRA, the base transformer in the same checkpoint, or both.",
)
@click.option("--max-shard-size", default="10GB", show_default=True, help="The size of a base shard.")
@_conversion_options
@_output_options
def sat2diffusers(as_json: bool, quiet: bool, debug: bool, **options: Any) -> None:
    """Convert a SAT run (folder or .pt) to what diffusers loads at the trained strength."""
    from loraconv.conversion import sat2diffusers as run

    _converted(run(**options), as_json, quiet)


@root.command()
@click.argument("src")
@click.option("-o", "--out", required=True, help="The folder to write.")
@click.option("--to", required=True, metavar="FORMAT", help="diffusers, peft or sat (see `loraconv formats`).")
@_conversion_options
@_output_options
def convert(as_json: bool, quiet: bool, debug: bool, **options: Any) -> None:
    """Convert an adapter from any known format to any other."""
    from loraconv.conversion import convert as run

    _converted(run(**options), as_json, quiet)


def _converted(result: Any, as_json: bool, quiet: bool) -> None:
    from loraconv.report import text

    _say(text.conversion(result), result.to_dict(), as_json, quiet, result.notices)


@root.command()
@click.argument("paths", nargs=-1, metavar="A [B]")
@click.option("--alpha", type=float, metavar="A", help="The lora_alpha of A, where its files do not say it.")
@click.option("--bound", type=float, metavar="E", help="Allow this relative error [default: what the dtypes allow].")
@_output_options
def verify(paths: tuple[str, ...], as_json: bool, quiet: bool, debug: bool, **options: Any) -> int:
    """Prove that A and B are the same adapter, in any formats; A alone: that it is as it was converted.

    Exits with 0 if they are the same, 5 if not, 3 if they cannot be compared.
    """
    from loraconv.report import text
    from loraconv.verification import verify as run

    result = run(*paths, **options)
    _say(text.verification(result), result.to_dict(), as_json, quiet)
    return 0 if result.same else 5


@root.command()
@click.argument("name", required=False)
@_output_options
def formats(name: str | None, as_json: bool, quiet: bool, debug: bool) -> None:
    """List the formats known and what each can carry."""
    from loraconv.catalog import formats as run
    from loraconv.report import text

    infos = run(name)
    _say(text.catalogue(infos), {"schema": 1, "formats": [i.to_dict() for i in infos]}, as_json, quiet)


@root.command()
@click.option("-o", "--out", help="Keep the converted adapter here [default: a temporary folder].")
@_output_options
def demo(out: str | None, as_json: bool, quiet: bool, debug: bool) -> None:
    """Do the main job on a checkpoint that ships with loraconv: inspect, convert, prove."""
    from loraconv.demonstration import demo as run
    from loraconv.report import text

    result = run(out=out)
    _say(text.demonstration(result), result.to_dict(), as_json, quiet)
