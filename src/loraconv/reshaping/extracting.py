"""``extract``: a LoRA from a full fine-tune, the nearest to what its linear weights differ by from the base's."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from fractions import Fraction
from functools import partial
from pathlib import Path

from loraconv.adapter import Adapter, Factor
from loraconv.errors import FormatError
from loraconv.model_folder import Model, open_model
from loraconv.names import fold_names, printable
from loraconv.patterns import choose
from loraconv.plan import Plan, plan_adapter
from loraconv.registry import dialect, families
from loraconv.reshaping.approximation import approximate
from loraconv.reshaping.comparing import Changes, changes, delta_of
from loraconv.reshaping.opening import dtype_name
from loraconv.reshaping.result import Input, ModuleFacts, ReshapeResult
from loraconv.reshaping.writing import Planned, write
from loraconv.rules import Family
from loraconv.scale import Scale
from loraconv.truncation import Cut, wanted
from loraconv.verifier.extracted import prove_extracted
from loraconv.verifier.reshaped import Claims

_HINT = "loraconv extract TUNED --base BASE -o OUT --rank 64"


def extract(
    tuned: str | Path,
    *,
    base: str | Path,
    out: str | Path,
    rank: int | None = None,
    energy: float | None = None,
    max_error: float | None = None,
    modules: Sequence[str] = (),
    ignore_other: bool = False,
    to: str = "diffusers",
    dtype: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
) -> ReshapeResult:
    """Write into the folder ``out`` the LoRA that is nearest to what the full fine-tune ``tuned`` changed in ``base``.

    Both are models as ``fuse`` takes them: a transformer folder, a pipeline's, a safetensors file, a cached Hub id.
    They are compared tensor by tensor; each linear weight that differs becomes a module, its rank given by ``rank``,
    ``energy`` or ``max_error`` as in :func:`resize`, and the result states the relative error of each. ``modules`` are
    patterns such as ``transformer_blocks.{0-9}.*``. Changed tensors that no LoRA can hold (norms, biases, embeddings,
    convolutions) are an error, unless ``ignore_other`` leaves them out; the result lists them. ``to`` is the format of
    the output, ``dtype`` that of its factors (None: ``fp32``). Memory: a few copies of the largest weight, and the
    adapter.

    Raises :class:`UsageError`, :class:`FormatError` (among them ``base-mismatch``, ``no-difference``,
    ``other-changed``, ``base-quantised``), :class:`CorruptCheckpoint` (damage, NaN), :class:`UnsafeCheckpoint`,
    :class:`ProofFailed` and :class:`WriteFailed`; then ``out`` is as it was, as after a failed ``convert``.
    """
    how = wanted(rank, energy, max_error, _HINT)
    options = {
        "dtype": dtype, "energy": energy, "ignore_other": ignore_other, "max_error": max_error,
        "modules": list(modules), "rank": rank,
    }  # fmt: skip
    stored = dtype_name(dtype) or "F32"
    with ExitStack() as opened:
        new, old = (opened.enter_context(open_model(path)) for path in (tuned, base))
        found = changes(new, old)
        _refuse_nothing(found, new, old)
        chosen = choose(found.modules, modules) if modules else list(found.modules)
        _refuse_other(found, ignore_other)
        family = _family(new, chosen)
        cuts = {module: approximate(delta_of(new, old, module), how, stored) for module in chosen}
        plan = plan_adapter(_adapter(cuts), dialect(to), family)
        unchosen = sorted(set(found.modules) - set(chosen))
        result = ReshapeResult(
            kind="extracted",
            out=Path(out),
            to=to,
            inputs=(Input(str(tuned), "tuned"), Input(str(base), "base")),
            modules=tuple(_facts(new, module, cut) for module, cut in cuts.items()),
            other=found.other,
            notices=(*plan.notices, *_left_out(found.other, unchosen)),
            options=options,
            dry_run=dry_run,
        )
        if dry_run:
            return result
        left = frozenset([*found.other, *(f"{module}.weight" for module in unchosen)])
        claims = Claims({module: cut.error for module, cut in cuts.items()}, how.error, stored)
        return _write(result, plan, (new, old), claims, left, overwrite)


def _write(
    result: ReshapeResult,
    plan: Plan,
    models: tuple[Model, Model],
    claims: Claims,
    left: frozenset[str],
    overwrite: bool,
) -> ReshapeResult:
    def unchanged() -> None:
        for model in models:
            model.check_unchanged()

    prove = partial(
        prove_extracted,
        kind=plan.dialect.name,
        files=[file.name for file in plan.files],
        settings_file=plan.dialect.sidecar,
        tuned=models[0].tensors,
        base=models[1].tensors,
        claims=claims,
        left=left,
        scale_ignored=not plan.dialect.every_consumer_reads_alpha,
    )
    inputs = [path for model in models for path in _paths(model)]
    return write(result, [Planned("", plan)], inputs=inputs, unchanged=unchanged, prove=prove, overwrite=overwrite)


def _paths(model: Model) -> list[Path]:
    """What the output may not touch. The folder that holds a single file is no input."""
    return [*(file.path for file in model.files.values()), *([] if model.single else [model.pipeline or model.folder])]


def _adapter(cuts: dict[str, Cut]) -> Adapter:
    ranks = {module: cut.down.shape[0] for module, cut in cuts.items()}
    return Adapter(
        tuple(
            Factor(module, cut.down, cut.up, Scale(Fraction(ranks[module]), ranks[module], "extracted at scale 1"))
            for module, cut in cuts.items()
        )
    )


def _facts(model: Model, module: str, cut: Cut) -> ModuleFacts:
    whole = min(model.tensors[f"{module}.weight"].shape)
    return ModuleFacts(module, whole, cut.down.shape[0], cut.norm, cut.error)


def _family(model: Model, modules: Sequence[str]) -> Family:
    """The family whose class the model's config.json names, or else one that knows all the modules."""
    known = [family for family in families() if all(map(family.knows, modules))]
    named = (model.config or {}).get("_class_name")
    known.sort(key=lambda family: family.model_class != named)
    if known:
        return known[0]
    raise FormatError(
        f"no known model has these modules, so nothing could say how an adapter of them is spelled: {len(modules)}",
        where="; ".join(fold_names(modules)[:4]),
        why=f"config.json says {printable(str(named), 60)}"
        if named
        else "there is no config.json that names the model",
        hint="take only modules that are known: --modules 'transformer_blocks.*'; loraconv formats",
        slug="module-unknown",
    )


def _refuse_nothing(found: Changes, tuned: Model, base: Model) -> None:
    if not found.modules:
        also = f"; {len(found.other)} other tensors differ" if found.other else ""
        raise FormatError(
            f"no linear weight differs from the base's, so there is no LoRA to extract{also}",
            where="; ".join(fold_names(found.other)[:4]),
            why=f"{len(base.tensors)} tensors of {printable(str(tuned.path), 500)} were compared",
            hint="pass the fine-tuned model first, and the one that it was started from with --base",
            slug="no-difference",
        )


def _refuse_other(found: Changes, ignore: bool) -> None:
    if found.other and not ignore:
        raise FormatError(
            f"the fine-tune changed {len(found.other)} tensors that no LoRA can hold",
            where="; ".join(fold_names(found.other)[:6]),
            why="a LoRA adds to weights of linear layers; norms, biases, embeddings and convolutions would be lost",
            hint="leave them out, and know that the adapter is not all of the fine-tune: --ignore-other",
            slug="other-changed",
        )


def _left_out(other: Sequence[str], unchosen: Sequence[str]) -> list[str]:
    said = []
    if other:
        shown = "; ".join(fold_names(other)[:6])
        said.append(f"{len(other)} tensors that the fine-tune changed are NOT in the adapter: {shown}")
    if unchosen:
        shown = "; ".join(fold_names(unchosen)[:4])
        said.append(f"{len(unchosen)} changed modules do not fit --modules and are not in the adapter: {shown}")
    return said
