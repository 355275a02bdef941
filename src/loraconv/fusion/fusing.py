"""The order of a fusion: open, match, plan, write, prove, commit."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from loraconv import __version__
from loraconv.errors import FormatError, UsageError
from loraconv.fusion.adapters import Used, open_adapters
from loraconv.fusion.llava import Joined, join, refuse_projector_only
from loraconv.fusion.match import FUSED_KEY, fused_before, refuse_fused_twice, terms_of
from loraconv.fusion.planned import Plan, Rest
from loraconv.fusion.rest import Kept, listing, refuse_loss, rest_of, settings_of
from loraconv.fusion.result import FusedAdapter, FusedFile, FuseResult
from loraconv.fusion.running import run
from loraconv.fusion.shards import Shard, plan_shards
from loraconv.io.atomic import clear_remains
from loraconv.io.target import JOURNAL
from loraconv.lazy import nbytes
from loraconv.model_folder import COMPONENTS, Model, in_hub_cache, open_model
from loraconv.names import DTYPE_WORDS, printable, quoted
from loraconv.plan_base import parse_size
from loraconv.products import read_products

Target = Literal["hf-llava"]


def fuse(
    *adapters: str | Path,
    base: str | Path,
    out: str | Path | None = None,
    alpha: float | None = None,
    rank: int | None = None,
    modules: Sequence[str] = (),
    dtype: str | None = None,
    max_shard_size: str | None = None,
    in_place: bool = False,
    journal: bool = False,
    prove: bool = True,
    rest: Rest = "copy",
    strict: bool = False,
    nearest: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    to: Target | None = None,
    vision_tower: str | Path | None = None,
) -> FuseResult:
    """Write the model ``base`` with the adapters added to its weights into the folder ``out``.

    Each weight becomes ``round(base + sum(strength * scale * up @ down))``, the exact sum rounded once; all other
    tensors keep their bytes. An adapter is anything that loraconv reads, ``PATH@0.8`` gives it a strength. ``base`` is
    the folder of a transformer, a UNet or a text encoder, a pipeline's folder (its ``transformer/`` or ``unet/`` is
    meant), a language model's folder, a safetensors file or the id of a Hub repository in the local cache. Of a LLaVA
    run, what was trained whole (the projector) goes in as well; ``to`` (``hf-llava``) makes a
    ``LlavaForConditionalGeneration`` of it, with the CLIP model in the folder ``vision_tower``.

    ``alpha`` overrides what the files say, ``rank`` must be that of the tensors; ``modules`` are patterns such as
    ``transformer_blocks.{0-9}.*``; ``dtype`` (``fp32``, ``fp16``, ``bf16``) is for every floating tensor;
    ``max_shard_size`` (``5GB``) makes new shards; ``in_place`` replaces the base's folder instead of writing to ``out``
    and, as ``journal`` does, leaves a journal from which ``unfuse`` restores it; without ``prove`` the result is not
    proved; ``rest`` copies or links a pipeline's other parts; ``strict`` refuses a scale that only a convention says;
    ``nearest`` accepts a model-parallel adapter; ``overwrite`` replaces an earlier output of loraconv; ``dry_run``
    writes nothing.

    Raises :class:`UsageError`, :class:`FormatError` (among them ``base-quantised``, ``base-mismatch``, ``no-home``,
    ``other-component``, ``rank-contradiction``, ``alpha-unknown``), :class:`CorruptCheckpoint` (damage, NaN,
    ``overflow``),
    :class:`UnsafeCheckpoint`, :class:`ProofFailed` and :class:`WriteFailed`. On all of them ``out`` and ``base`` are
    as they were, except a WriteFailed of the slugs ``durability-unknown`` and ``old-remains``: then the output is in
    place.
    """
    options: dict[str, Any] = {
        "alpha": alpha, "dtype": dtype, "in_place": in_place, "journal": journal or in_place,
        "max_shard_size": max_shard_size, "modules": list(modules), "nearest": nearest, "prove": prove, "rank": rank,
        "rest": rest, "strict": strict, "to": to,
    }  # fmt: skip
    if to not in (None, "hf-llava") or (to is None and vision_tower is not None):
        raise UsageError(
            "--to is hf-llava, and --vision-tower is for it alone", hint="--to hf-llava --vision-tower DIR"
        )
    if in_place == (out is not None):
        raise UsageError("either an output folder or --in-place", hint="loraconv fuse ADAPTER --base MODEL -o OUT")
    if in_place and not dry_run:
        for place in (Path(base), *(Path(base) / part for part in COMPONENTS)):  # of an earlier run that was killed
            clear_remains(place)
    with ExitStack() as opened:
        model = opened.enter_context(open_model(base))
        refuse_projector_only(adapters)
        used = open_adapters(
            adapters, opened, alpha=alpha, rank=rank, strict=strict, nearest=nearest, special=read_products
        )
        joined = join(model, used, opened, hf=to is not None, tower=vision_tower, dtype=_dtype(dtype))
        plan, said = _plan(model, used, joined, options)
        notices = tuple(dict.fromkeys([*(notice for one in used for notice in one.notices), *said]))
        result = _planned(plan, model.folder if out is None else Path(out), notices, options)
        if dry_run:
            return replace(result, dry_run=True)
        return run(plan, result, overwrite=overwrite, journal=options["journal"], prove=prove)


def _plan(model: Model, used: tuple[Used, ...], joined: Joined, options: dict[str, Any]) -> tuple[Plan, list[str]]:
    """The plan, and what has to be said about the base and what is put into it."""
    size = None if options["max_shard_size"] is None else parse_size(options["max_shard_size"])
    said = [*refuse_fused_twice(model, used), *joined.notices]
    modules, terms = terms_of(joined.whole, used, options["modules"])
    _refuse_narrow_journal(model, joined.dtype, options["journal"])
    _refuse_other_journal(model, joined.other, options["journal"])
    shards, index = plan_shards(joined.whole, terms, joined.dtype, size, joined.names, joined.more)
    entire = not options["in_place"]
    kept, left = rest_of(model, whole=entire, own_index=size is None and not index)
    settings = {**settings_of(joined.whole, joined.told, other=joined.other), **joined.texts}
    replaces = None
    if options["in_place"]:
        _refuse_in_place(model, left)
        replaces = listing(model.folder)
    plan = Plan(
        model=model,
        joined=joined,
        used=used,
        terms=terms,
        only=modules if options["modules"] else None,
        dtype=joined.dtype,
        place=model.place if entire else "",
        shards=[replace(shard, metadata=_header(shard, joined.whole, used, options["prove"])) for shard in shards],
        texts={**index, **settings},
        kept=_with_own(kept, settings, joined.kept),
        rest=options["rest"],
        replaces=replaces,
    )
    return plan, [*said, *left]


def _with_own(kept: list[Kept], settings: dict[str, str], own: list[Kept]) -> list[Kept]:
    """What is kept of the base, less what is written anew, with ``own`` files in the place of the base's."""
    names = {*settings, *(one.name for one in own)}
    return [*(one for one in kept if one.name not in names), *own]


def _dtype(word: str | None) -> str | None:
    if word is not None and word not in DTYPE_WORDS:
        raise UsageError(f"unknown dtype: {word!r}", hint=f"use one of {', '.join(DTYPE_WORDS)}")
    return None if word is None else DTYPE_WORDS[word]


def _refuse_narrow_journal(model: Model, dtype: str | None, journal: bool) -> None:
    if journal and dtype is not None and any(ref.dtype != dtype for ref in model.tensors.values()):
        raise FormatError(
            "no journal can be written with another dtype",
            why="it holds differences between numbers of one dtype, from which the base comes back bit for bit",
            hint="leave --dtype out, or leave --journal and --in-place out and keep the base",
            slug="journal-dtype",
        )


def _refuse_other_journal(model: Model, other: bool, journal: bool) -> None:
    if journal and (other or model.layout.pickled):
        raise FormatError(
            "no journal can be written for this model",
            why="it holds differences to the tensors of a safetensors base; "
            + ("this run replaces tensors of the base, or adds some" if other else "the base is a torch file"),
            hint="leave --journal and --in-place out and keep the base: -o OUT",
            slug="journal-run",
        )


def _refuse_in_place(model: Model, left: list[str]) -> None:
    """Raise where no folder can be replaced, or something in it would be lost."""
    if model.single is not None or in_hub_cache(model.folder):
        what = "a single file" if model.single is not None else "a model of the Hub's cache"
        raise UsageError(
            f"--in-place replaces a folder, and the base is {what}: {printable(str(model.path), 1000)}",
            hint="write to a new folder: -o OUT",
            slug="in-place",
        )
    if os.path.lexists(model.folder / JOURNAL):
        left = [f"{JOURNAL}, from which the model comes back that was fused before", *left]
    refuse_loss(model, left)


def _header(shard: Shard, model: Model, used: Sequence[Used], prove: bool) -> dict[str, str]:
    """The header of a file: the base's own, what is fused into it, and what was proved."""
    adapters = [
        {"adapter": one.name, "digest": one.digest, "scale": str(_most(one)), "strength": str(one.strength)}
        for one in used
    ]
    claim = {"controls": "all caught", "numbers": "the exact sum, rounded once", "tensors": len(model.tensors)}
    return {
        "format": "pt",
        **{key: value for key, value in shard.metadata.items() if not key.startswith("loraconv.")},
        FUSED_KEY: json.dumps([*fused_before(model), *adapters], sort_keys=True),
        "loraconv.proof": json.dumps(claim, sort_keys=True) if prove else "none: it was not asked for",
        "loraconv.version": __version__,
    }


def _most(used: Used) -> object:
    scale = next(iter(used.scales))
    return scale.exact if scale.exact is not None else scale.value


def _planned(plan: Plan, out: Path, notices: tuple[str, ...], options: dict[str, Any]) -> FuseResult:
    """The result before anything is written."""
    model, place = plan.joined.whole, plan.place
    files = [FusedFile(kept.name, kept.bytes, linked=plan.links(kept)) for kept in plan.kept]
    files += [FusedFile(place + shard.name, shard.bytes) for shard in plan.shards]
    files += [FusedFile(place + name, len(text)) for name, text in plan.texts.items()]
    return FuseResult(
        out=out,
        base=model.path,
        next=_next(plan, out),
        adapters=tuple(FusedAdapter.of(one) for one in plan.used),
        base_files=tuple(FusedFile(name, file.size) for name, file in model.files.items()),
        fused=tuple(plan.terms),
        fused_bytes=sum(nbytes(model.tensors[name]) for name in plan.terms),
        tensors=len(model.tensors),
        beside=tuple(n for n, ref in model.tensors.items() if plan.model.tensors.get(n) is not ref),
        files=tuple(files),
        notices=notices,
        options=options,
        journal=JOURNAL if options["journal"] else None,
    )


def _next(plan: Plan, out: Path) -> str:
    """What to do with the output."""
    shown = printable(str(out), 1000).replace('"', '\\"')
    if plan.place:
        return f'DiffusionPipeline.from_pretrained("{shown}")'
    config = plan.model.config or {}
    kind = config.get("_class_name")
    if isinstance(classes := config.get("architectures"), list) and classes:
        kind = classes[0]
    if plan.joined.hf is not None:
        kind = "LlavaForConditionalGeneration"
    if isinstance(kind, str) and kind.isidentifier():
        return f'{kind}.from_pretrained("{shown}")'
    return f"loraconv verify {quoted(out)}"
