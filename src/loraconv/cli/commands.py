"""The commands. Each parses its options and calls the public function of the same name; bodies import lazily, so that
``--help`` costs nothing."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import click

from loraconv import __version__
from loraconv.cli.options import output_options, say, words

F = TypeVar("F", bound=Callable[..., Any])


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="loraconv")
def root() -> None:
    """Convert LoRA checkpoints, and prove that the conversion is right."""


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


@root.command()
@click.argument("src")
@click.option("--alpha", type=float, metavar="A", help="The lora_alpha it was trained with.")
@click.option("-v", "--verbose", is_flag=True, help="List every name, folded by layer.")
@output_options
def inspect(src: str, alpha: float | None, verbose: bool, as_json: bool, quiet: bool, debug: bool) -> None:
    """Say what a checkpoint is: format, model, rank, alpha, scale, layers, and everything else in it."""
    from loraconv.describe import inspect as run
    from loraconv.report import text

    result = run(src, alpha=alpha)
    say(text.summary(result, verbose=verbose), result.to_dict(), as_json, quiet)


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
@output_options
def sat2diffusers(as_json: bool, quiet: bool, debug: bool, **options: Any) -> None:
    """Convert a SAT run (folder or .pt) to what diffusers loads at the trained strength."""
    from loraconv.conversion import sat2diffusers as run

    _converted(run(**options), as_json, quiet)


@root.command()
@click.argument("src")
@click.option("-o", "--out", required=True, help="The folder to write.")
@click.option("--to", required=True, metavar="FORMAT", help="diffusers, peft, kohya ... (see `loraconv formats`).")
@click.option("--family", metavar="MODEL", help="The model's family, where the adapter's names fit several.")
@click.option("--approximate", type=click.Choice(["svd"]), help="Make a plain LoRA of LoHa, LoKr and full differences.")
@click.option("--max-error", type=float, metavar="E", help="With --approximate: the relative error a module may have.")
@click.option("--rank", type=int, metavar="R", help="With --approximate: the rank, instead of --max-error.")
@click.option("--drop", multiple=True, default=(), metavar="PATTERN", help="Leave keys behind: 'lora_te*'.")
@click.option("--keep-unknown", is_flag=True, help="Copy tensors that no rule knows, under their own names.")
@_conversion_options
@output_options
def convert(as_json: bool, quiet: bool, debug: bool, **options: Any) -> None:
    """Convert an adapter from any known format to any other."""
    from loraconv.conversion import convert as run

    _converted(run(**options), as_json, quiet)


def _converted(result: Any, as_json: bool, quiet: bool) -> None:
    from loraconv.report import text

    say(text.conversion(result), result.to_dict(), as_json, quiet, result.notices)


@root.command()
@click.argument("paths", nargs=-1, metavar="A [B]")
@click.option("--alpha", type=float, metavar="A", help="The lora_alpha of A, where its files do not say it.")
@click.option("--bound", type=float, metavar="E", help="Allow this relative error [default: what the dtypes allow].")
@click.option("--base", metavar="BASE", help="Is the last path BASE plus the adapters before it (A@0.8 B@0.5 FUSED)?")
@click.option(
    "--dtype",
    type=click.Choice(["fp32", "fp16", "bf16"]),
    help="With --base: FUSED was cast to this. With --forward: compute in this [default: fp32].",
)
@click.option(
    "--modules", multiple=True, default=(), metavar="PATTERN", help="With --base: only these, as in fuse --modules."
)
@click.option("--vision-tower", metavar="DIR", help="With --base: the CLIP model of a FUSED that is --to hf-llava.")
@click.option("--before", metavar="CKPT", help="A checkpoint of any kind before a training, a save or a load ...")
@click.option("--after", metavar="CKPT", help="... and after it: what became of every tensor?")
@click.option(
    "--expect",
    type=click.Choice(["identical", "only-lora"]),
    help="What a run with --before and --after may have changed: nothing, or the LoRA alone [default: nothing].",
)
@click.option("--consumers", is_flag=True, help="What would diffusers, peft, ComfyUI and others make of the file A?")
@click.option("--forward", is_flag=True, help="Run --model in diffusers: A live, against B, or FUSED with A in it.")
@click.option("--model", metavar="DIR", help="With --forward: the model's folder, of a transformer or a pipeline.")
@click.option("--report", metavar="FILE", help="Write an HTML page of it, too, that needs no network.")
@click.option("--overwrite", is_flag=True, help="Replace FILE even if it is no earlier report of loraconv.")
@output_options
def verify(paths: tuple[str, ...], as_json: bool, quiet: bool, debug: bool, **options: Any) -> int:
    """Prove that A and B are the same adapter, in any formats; A alone: that it is as it was converted.
    With --before and --after: what became of every tensor of a checkpoint. With --base: that a model is the base plus
    adapters, each weight rounded once, and nothing else changed: verify --base BASE A@0.8 B@0.5 FUSED.

    Exits with 0 if they are the same, 5 if not, 3 if they cannot be compared.
    """
    from loraconv.report import text
    from loraconv.verification import verify as run

    result = run(*paths, **options)
    say(text.verification(result), result.to_dict(), as_json, quiet)
    return 0 if result.same else 5


@root.command()
@click.argument("path")
@click.option(
    "--kind",
    type=click.Choice(["folder", "csv", "jsonl", "latents", "conversations"]),
    help="What the data is [default: told from PATH].",
)
@click.option("--frames", type=int, metavar="N", help="The frames of a video that training will ask for.")
@click.option("--height", type=int, metavar="H", help="The height in pixels that training will ask for.")
@click.option("--width", type=int, metavar="W", help="The width in pixels that training will ask for.")
@click.option("--fps", type=float, metavar="R", help="The frames a second that training will ask for.")
@click.option("--video-field", default="video", show_default=True, help="The column or key of the video's path.")
@click.option("--prompt-field", default="prompt", show_default=True, help="The column or key of the prompt.")
@click.option("--images", metavar="DIR", help="Where image paths start [default: the folder of the JSON].")
@click.option("--fix", metavar="OUT", help="Write a list of the good samples into this new folder.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier output of loraconv.")
@click.option("-v", "--verbose", is_flag=True, help="List every sample that has a problem.")
@output_options
def check_data(path: str, verbose: bool, as_json: bool, quiet: bool, debug: bool, **options: Any) -> int:
    """Find what is wrong with training data: videos and prompts, latents, or LLaVA's image conversations.

    Exits with 0 if every sample can be trained on (there may be warnings), 4 if not, 3 if PATH is not a dataset.
    """
    from loraconv.data_check import check_data as run
    from loraconv.report import data

    result = run(path, **options)
    say(data.data(result, verbose=verbose), result.to_dict(), as_json, quiet)
    return 0 if result.fine else 4


@root.command()
@click.option("-o", "--out", required=True, help="The folder of the run.")
@click.option("--config", metavar="FILE", help="The settings: a TOML file [default: those that suit --tiny].")
@click.option(
    "--tiny",
    type=click.Choice(["2b", "5b", "5b-i2v", "1.5", "1.5-i2v"]),
    help="Train a small random model of this kind, in less than a minute on a CPU.",
)
@click.option("--steps", type=int, metavar="N", help="Train this many steps, whatever the settings say.")
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint, as if the run had never stopped.")
@click.option("--dry-run", is_flag=True, help="Say what would be trained and write nothing.")
@output_options
def train(as_json: bool, quiet: bool, debug: bool, **options: Any) -> None:
    """Train a LoRA, or a whole CogVideoX transformer, and write checkpoints for SAT, diffusers and peft."""
    from loraconv.cli.progress import training_progress
    from loraconv.report.training import training
    from loraconv.training import train as run

    with training_progress(not (as_json or quiet)):
        result = run(**options)
    if os.environ.get("RANK", "0") == "0":  # of several processes, the first one speaks
        say(training(result), result.to_dict(), as_json, quiet, result.notices)


@root.command()
@click.argument("src")
@click.option(
    "--through",
    type=click.UNPROCESSED,
    callback=words,
    default=("diffusers", "peft"),
    show_default="diffusers,peft",
    metavar="FORMATS",
    help="The formats to go through, in this order, with commas between them.",
)
@click.option("--family", metavar="MODEL", help="The model's family, where the adapter's names fit several.")
@click.option("--alpha", type=float, metavar="A", help="The lora_alpha of SRC, where its files do not say it.")
@output_options
def roundtrip(as_json: bool, quiet: bool, debug: bool, **options: Any) -> int:
    """Convert an adapter through other formats and back, and prove that it is the same bit for bit.

    Nothing is kept. Exits with 0 if every byte of every factor and alpha are those of the start, 5 if not.
    """
    from loraconv.report import roundtrip as text
    from loraconv.roundtripping import roundtrip as run

    result = run(**options)
    say(text.roundtrip(result), result.to_dict(), as_json, quiet)
    return 0 if result.same else 5


@root.command()
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER[@STRENGTH]...")
@click.option("--base", required=True, metavar="MODEL", help="A model folder, a pipeline, a file or a cached Hub id.")
@click.option("-o", "--out", metavar="DIR", help="The folder to write.")
@click.option("--in-place", is_flag=True, help="Replace the model's folder, with a journal in it, instead of -o.")
@click.option("--alpha", type=float, metavar="A", help="The lora_alpha it was trained with (scale = A / rank).")
@click.option("--rank", type=int, metavar="R", help="The rank it was trained with; it must be the tensors'.")
@click.option("--modules", multiple=True, default=(), metavar="PATTERN", help="Only 'transformer_blocks.{0-9}.*'.")
@click.option("--dtype", type=click.Choice(["fp32", "fp16", "bf16"]), help="Store in this dtype [default: keep].")
@click.option("--max-shard-size", metavar="SIZE", help="Make new shards of this size [default: keep the model's].")
@click.option("--journal", is_flag=True, help="Write what `loraconv unfuse` needs beside the model.")
@click.option("--prove/--no-prove", " /--no-proof", default=True, help="Prove the result (the default), or do not.")
@click.option(
    "--rest",
    type=click.Choice(["copy", "link"]),
    default="copy",
    show_default=True,
    help="Copy the other parts of a pipeline, or link them.",
)
@click.option("--to", type=click.Choice(["hf-llava"]), help="Of a LLaVA run: LlavaForConditionalGeneration.")
@click.option("--vision-tower", metavar="DIR", help="With --to hf-llava: the CLIP model that the run was trained with.")
@click.option("--strict", is_flag=True, help="Refuse an alpha that only a convention says.")
@click.option("--nearest", is_flag=True, help="Accept a model-parallel LoRA: add the nearest single adapter.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier output of loraconv.")
@click.option("--dry-run", is_flag=True, help="Say what would be fused and write nothing.")
@output_options
def fuse(adapters: tuple[str, ...], as_json: bool, quiet: bool, debug: bool, **options: Any) -> None:
    """Add adapters to a model's weights, at the scale they were trained with, each at its own strength."""
    from loraconv.cli.progress import byte_progress
    from loraconv.fusion import fuse as run
    from loraconv.report.fuse import fused

    with byte_progress("loraconv.fusion", not (as_json or quiet)):
        result = run(*adapters, **options)
    say(fused(result), result.to_dict(), as_json, quiet, result.notices)


@root.command()
@click.argument("fused")
@click.option("-o", "--out", required=True, help="The folder to write.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier output of loraconv.")
@click.option("--dry-run", is_flag=True, help="Check what can be restored and write nothing.")
@output_options
def unfuse(as_json: bool, quiet: bool, debug: bool, **options: Any) -> None:
    """Turn a fused model back into its base, bit for bit, from the journal written beside it."""
    from loraconv.cli.progress import byte_progress
    from loraconv.report.unfuse import unfused
    from loraconv.unfusing import unfuse as run

    with byte_progress("loraconv.unfusing", not (as_json or quiet)):
        result = run(**options)
    say(unfused(result), result.to_dict(), as_json, quiet)


@root.command()
@click.argument("name", required=False)
@output_options
def formats(name: str | None, as_json: bool, quiet: bool, debug: bool) -> None:
    """List the formats known and what each can carry."""
    from loraconv.catalog import formats as run
    from loraconv.report import text

    infos = run(name)
    say(text.catalogue(infos), {"schema": 1, "formats": [i.to_dict() for i in infos]}, as_json, quiet)


@root.command()
@click.option("-o", "--out", help="Keep the converted adapter here [default: a temporary folder].")
@output_options
def demo(out: str | None, as_json: bool, quiet: bool, debug: bool) -> None:
    """Do the main job on a checkpoint that ships with loraconv: inspect, convert, prove."""
    from loraconv.demonstration import demo as run
    from loraconv.report import text

    result = run(out=out)
    say(text.demonstration(result), result.to_dict(), as_json, quiet)
