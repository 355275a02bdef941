"""The commands that make adapters out of others: ``merge``, ``resize``, ``extract`` and ``split``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from loraconv.cli.options import output_options, say, words

F = TypeVar("F", bound=Callable[..., Any])

_OUT = click.option("-o", "--out", required=True, help="The folder to write.")
_ALPHA = click.option("--alpha", type=float, metavar="A", help="The lora_alpha it was trained with (scale = A / rank).")
_STRICT = click.option("--strict", is_flag=True, help="Refuse an alpha that only a convention says.")
_OVERWRITE = click.option("--overwrite", is_flag=True, help="Replace an earlier output of loraconv.")
_DRY_RUN = click.option("--dry-run", is_flag=True, help="State ranks and errors, and write nothing.")
_ENERGY = click.option("--energy", type=float, metavar="E", help="Keep this share of the squared singular values.")
_MAX_ERROR = click.option("--max-error", type=float, metavar="E", help="Let no module's relative error exceed this.")


def _dtype(default: str) -> Callable[[F], F]:
    kinds = click.Choice(["fp32", "fp16", "bf16"])
    return click.option("--dtype", type=kinds, help=f"Store in this dtype [default: {default}].")


def _done(result: Any, as_json: bool, quiet: bool) -> None:
    from loraconv.report.reshape import reshaped

    say(reshaped(result), result.to_dict(), as_json, quiet, result.notices)


@click.command()
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER[@STRENGTH]...")
@_OUT
@click.option("--to", default="diffusers", show_default=True, metavar="FORMAT", help="The format of the output.")
@click.option("--rank", type=int, metavar="N", help="The nearest of this rank [default: exact; ranks add up].")
@_ALPHA
@_dtype("keep, or fp32")
@_STRICT
@_OVERWRITE
@_DRY_RUN
@output_options
def merge(adapters: tuple[str, ...], as_json: bool, quiet: bool, debug: bool, **options: Any) -> None:
    """Make one adapter that adds what several add together, each at its own strength."""
    from loraconv.reshaping import merge as run

    _done(run(*adapters, **options), as_json, quiet)


@click.command()
@click.argument("adapter")
@_OUT
@click.option("--rank", type=int, metavar="N", help="Cut every module to this rank.")
@_ENERGY
@_MAX_ERROR
@click.option("--to", metavar="FORMAT", help="The format of the output [default: the adapter's own].")
@_ALPHA
@_dtype("fp32")
@_STRICT
@_OVERWRITE
@_DRY_RUN
@output_options
def resize(as_json: bool, quiet: bool, debug: bool, **options: Any) -> None:
    """Cut an adapter to a smaller rank, to an energy or to an error, and state what that costs in each module."""
    from loraconv.reshaping import resize as run

    _done(run(**options), as_json, quiet)


@click.command()
@click.argument("tuned")
@click.option("--base", required=True, metavar="MODEL", help="The model that the fine-tune was started from.")
@_OUT
@click.option("--rank", type=int, metavar="N", help="The rank of every module.")
@_ENERGY
@_MAX_ERROR
@click.option("--modules", multiple=True, default=(), metavar="PATTERN", help="Only 'transformer_blocks.{0-9}.*'.")
@click.option("--ignore-other", is_flag=True, help="Leave out what no LoRA can hold: norms, biases, embeddings.")
@click.option("--to", default="diffusers", show_default=True, metavar="FORMAT", help="The format of the output.")
@_dtype("fp32")
@_OVERWRITE
@_DRY_RUN
@output_options
def extract(as_json: bool, quiet: bool, debug: bool, **options: Any) -> None:
    """Make a LoRA of what a full fine-tune changed in its base, and state what the rank costs in each module."""
    from loraconv.reshaping import extract as run

    _done(run(**options), as_json, quiet)


@click.command()
@click.argument("adapter")
@_OUT
@click.option(
    "--by",
    type=click.Choice(["layers", "component", "module"]),
    default="layers",
    show_default=True,
    help="One part for each layer, component of the pipeline, or kind of module.",
)
@click.option(
    "--layers",
    type=click.UNPROCESSED,
    callback=words,
    default=(),
    metavar="RANGES",
    help="One part for each of these ranges, with commas between them: 0-13,14-27.",
)
@_ALPHA
@_STRICT
@_OVERWRITE
@_DRY_RUN
@output_options
def split(as_json: bool, quiet: bool, debug: bool, **options: Any) -> None:
    """Split an adapter into several of the same format; every factor keeps its bytes, and nothing is lost."""
    from loraconv.reshaping import split as run

    _done(run(**options), as_json, quiet)


COMMANDS = (extract, merge, resize, split)
