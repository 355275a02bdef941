"""Prove that two checkpoints are the same, and say in which way they are not.

One module for each kind of comparison; the mathematics is in ``loraconv.verifier``, which knows no converter.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from loraconv.errors import UsageError
from loraconv.verification.page import reporting
from loraconv.verification.result import VerifyResult

__all__ = ["VerifyResult", "verify"]


@reporting
def verify(
    *paths: str | Path,
    alpha: float | None = None,
    bound: float | None = None,
    before: str | Path | None = None,
    after: str | Path | None = None,
    expect: str | None = None,
    base: str | Path | None = None,
    dtype: str | None = None,
    modules: Sequence[str] = (),
    vision_tower: str | Path | None = None,
    consumers: bool = False,
    forward: bool = False,
    model: str | Path | None = None,
    report: str | Path | None = None,
    overwrite: bool = False,
) -> VerifyResult:
    """Compare two adapters, or, with one path alone, a converted folder or file with the record beside it.

    ``alpha`` is that of the first adapter where its files do not say it; ``bound`` replaces the relative error that the
    dtypes allow. ``before`` and ``after`` instead are any checkpoint in two states, of which ``expect`` says whether
    they should be ``identical`` or differ in LoRA factors alone (``only-lora``).

    With ``base``, the last path is a model that is to be that base plus the adapters before it (``PATH@STRENGTH``), in
    all modules or in those that fit the patterns ``modules``, cast to ``dtype`` if given; ``vision_tower`` is the CLIP
    model of one that was fused to ``hf-llava``. ``consumers`` asks of one
    adapter what diffusers, peft, ComfyUI and others would make of it. ``forward`` runs the ``model`` in diffusers with
    the first path's adapter, and compares it with the second's, or with a model that it is fused into; in ``dtype``,
    else fp32.

    ``report`` is an HTML page to write, in place of an earlier one or, with ``overwrite``, of any file. Raises
    :class:`FormatError` where the two cannot be compared, what opening them raises, and :class:`WriteFailed`.
    """
    if bound is not None and not bound >= 0:
        raise UsageError(f"--bound must not be negative, and is {bound}", hint="--bound 1e-6")
    if consumers or forward or model is not None:
        others = (bound, before, after, expect, base)
        return _consumed(paths, consumers, model if forward else None, alpha, dtype, others)
    if base is not None:
        from loraconv.verification.fused import verify_fused

        if (before, after, expect) != (None, None, None):
            raise UsageError("--base does not go with --before", hint="loraconv verify --base BASE ADAPTER FUSED")
        return verify_fused(
            base, paths, alpha=alpha, dtype=dtype, bound=bound, modules=modules, vision_tower=vision_tower
        )
    if dtype is not None or modules or vision_tower is not None:
        word = "--dtype" if dtype is not None else "--modules" if modules else "--vision-tower"
        raise UsageError(f"{word} needs --base", hint=f"loraconv verify --base BASE ADAPTER FUSED {word} ...")
    if (before, after, expect) != (None, None, None):
        return _changes(paths, before, after, expect, (alpha, bound))
    if len(paths) == 1:
        from loraconv.verification.record import verify_record

        if alpha is not None or bound is not None:
            raise UsageError("--alpha and --bound need two checkpoints", hint="loraconv verify A B")
        return verify_record(Path(paths[0]))
    if len(paths) != 2:
        raise UsageError(f"two checkpoints are compared, and {len(paths)} are named", hint="loraconv verify A B")
    from loraconv.verification.adapters import verify_adapters

    return verify_adapters(*paths, alpha=alpha, bound=bound, evidence=report is not None)


def _changes(
    paths: tuple[str | Path, ...],
    before: str | Path | None,
    after: str | Path | None,
    expect: str | None,
    others: tuple[object, ...],
) -> VerifyResult:
    from loraconv.verification.changes import verify_changes

    if before is None or after is None or paths or others != (None,) * len(others):
        raise UsageError(
            "two states of a checkpoint are --before and --after, both of them, and nothing else but --expect",
            hint="loraconv verify --before CKPT --after CKPT --expect identical",
        )
    return verify_changes(before, after, expect=expect)


def _consumed(
    paths: tuple[str | Path, ...],
    consumers: bool,
    model: str | Path | None,
    alpha: float | None,
    dtype: str | None,
    others: tuple[object, ...],
) -> VerifyResult:
    alone = others == (None,) * len(others)
    if consumers and model is None and dtype is None and len(paths) == 1 and alone:
        from loraconv.verification.consumers import verify_consumers

        return verify_consumers(paths[0], alpha=alpha)
    if consumers or model is None or len(paths) not in (1, 2) or not alone:
        raise UsageError(
            "--consumers takes one adapter, and --forward a --model and one or two paths, and no other comparison",
            hint="loraconv verify --consumers FILE, or loraconv verify --forward --model DIR A [B | FUSED]",
        )
    from loraconv.verification.forward import verify_forward

    return verify_forward(model, *paths, alpha=alpha, dtype=dtype)
