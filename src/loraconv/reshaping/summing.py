"""``merge``: several adapters as one, exactly, by stacking their factors; or the nearest to that of a smaller rank.

``sum(w * up @ down)`` is ``[w1 up1, w2 up2, ...] @ [down1; down2; ...]``: ranks add up, and no product of one adapter's
up with another's down comes in. ``resize`` is the same with one adapter. Factors of convolutions, down (rank, in,
height, width) and up (out, rank, 1, 1), are stacked as they are, and cut as matrices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from math import prod
from pathlib import Path

from loraconv.adapter import Adapter, Factor, natural
from loraconv.errors import FormatError, UsageError
from loraconv.fold import cast, fits, folded, refuse_ruin
from loraconv.fusion.adapters import Used
from loraconv.fusion.merging import Term, stack
from loraconv.lazy import Joined, Lazy, Viewed
from loraconv.names import fold_names, printable
from loraconv.ordered import in_order, workers
from loraconv.plan import plan_adapter
from loraconv.products import with_kernel
from loraconv.registry import dialect
from loraconv.reshaping.opening import dtype_name, input_of, notices_of, open_for
from loraconv.reshaping.result import ModuleFacts, ReshapeResult
from loraconv.reshaping.writing import Planned, adapter_paths, check_unchanged, proven_term, write
from loraconv.rules import Dialect
from loraconv.scale import LARGEST_ALPHA, Scale
from loraconv.truncation import Cut, Wanted, cut, wanted
from loraconv.verifier.reshaped import Claims, prove_reshaped

_HINT = "loraconv merge A@0.8 B@0.5 -o OUT"

Terms = Mapping[str, Sequence[Term]]


def merge(
    *adapters: str | Path,
    out: str | Path,
    to: str = "diffusers",
    rank: int | None = None,
    alpha: float | None = None,
    dtype: str | None = None,
    strict: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
) -> ReshapeResult:
    """Write one adapter of the format ``to`` into the folder ``out`` that adds what all ``adapters`` add together.

    ``PATH@0.8`` gives an adapter a strength. The factors are stacked and the ranks add up, which is exact; strength and
    scale are multiplied into ``up``, in float32 where the adapters' own dtype would round that. With ``rank``, every
    module gets the nearest delta of that rank, in float32, and the result states the relative error of each.
    ``alpha`` overrides what the files of an only adapter say; ``dtype`` (``fp32``, ``fp16``, ``bf16``) is for all
    factors; ``strict`` refuses a scale that only a convention says; ``overwrite`` replaces an earlier output of
    loraconv; ``dry_run`` writes nothing.

    Raises :class:`UsageError`, :class:`FormatError` (among them ``merge-mismatch``: other models, other shapes),
    :class:`CorruptCheckpoint` (damage, NaN), :class:`UnsafeCheckpoint`, :class:`ProofFailed` and :class:`WriteFailed`;
    then ``out`` is as it was, as after a failed ``convert``.
    """
    how = None if rank is None else wanted(rank, None, None, _HINT)
    options = {"alpha": alpha, "dtype": dtype, "rank": rank, "strict": strict}
    with ExitStack() as opened:
        used = open_for(adapters, opened, alpha=alpha, strict=strict, hint=_HINT)
        _refuse_twice(used)
        summed = sum_up(used, how, dialect(to), dtype_name(dtype))
        planned = ReshapeResult("merged", Path(out), to, (), options=options, dry_run=dry_run)
        return finish(planned, used, summed, overwrite=overwrite)


@dataclass(frozen=True, slots=True)
class Summed:
    """The sum of adapters before it is written: its plan, what is known of each module, and what the proof has to
    confirm."""

    planned: Planned
    facts: tuple[ModuleFacts, ...]
    claims: Claims
    notices: tuple[str, ...]


def sum_up(used: Sequence[Used], how: Wanted | None, target: Dialect, dtype: str | None) -> Summed:
    """The sum of the adapters in the format ``target``, its rank cut as ``how`` says.

    Raises :class:`FormatError` (``merge-mismatch``, ``dtype-range``, what the target cannot carry).
    """
    terms = _terms(used)
    _refuse_kernels(terms, used, target)
    cuts, norms = _cuts(terms, how, dtype or "F32") if how else ({}, {})
    stored = dtype or ("F32" if cuts else _keeping(terms, target))
    factors = [
        _of_cut(module, cuts[module], ones) if module in cuts else _stacked(module, ones, target, stored)
        for module, ones in terms.items()
    ]
    plan = plan_adapter(Adapter(tuple(factors)), target, used[0].detected.family)
    facts = tuple(
        ModuleFacts(f.module, sum(_rank(t.down) for t in terms[f.module]), f.rank, norms.get(f.module), _error(f, cuts))
        for f in factors
    )
    asked = how.error if how else None
    claims = Claims({m: one.error for m, one in cuts.items()}, asked, stored if dtype or cuts else None)
    said = () if dtype or cuts else _rounded(plan.exact, stored, terms)
    return Summed(Planned("", plan), facts, claims, (*plan.notices, *said))


def finish(planned: ReshapeResult, used: Sequence[Used], summed: Summed, *, overwrite: bool) -> ReshapeResult:
    """Write and prove a sum of adapters; with ``dry_run`` in ``planned``, only say what it would be."""
    plan = summed.planned.plan
    result = replace(
        planned,
        inputs=tuple(map(input_of, used)),
        modules=summed.facts,
        notices=tuple(dict.fromkeys([*notices_of(used), *summed.notices])),
    )
    if result.dry_run:
        return result
    prove = partial(
        prove_reshaped,
        kind=plan.dialect.name,
        files=[file.name for file in plan.files],
        settings_file=plan.dialect.sidecar,
        terms=[proven_term(one) for one in used],
        claims=summed.claims,
        scale_ignored=not plan.dialect.every_consumer_reads_alpha,
    )
    return write(
        result,
        [summed.planned],
        inputs=adapter_paths(used),
        unchanged=partial(check_unchanged, used),
        prove=prove,
        overwrite=overwrite,
    )


# ---------------------------------------------------------------------------------------------------------------------
# what is added up


def _refuse_twice(used: Sequence[Used]) -> None:
    digests = [one.digest for one in used]
    twice = next((one for one in used if digests.count(one.digest) > 1), None)
    if twice is not None:
        raise UsageError(
            f"{twice.name} is named twice",
            why="its delta would count double, at twice the rank",
            hint="add up its strengths: loraconv merge A@1.5 B -o OUT",
            slug="merged-twice",
        )


def _terms(used: Sequence[Used]) -> Terms:
    """Module -> what each adapter adds to it, the modules in natural order."""
    _refuse_other_models(used)
    found: dict[str, list[Term]] = {}
    for one in used:
        for factor in one.adapter.factors:
            scale = factor.scale.exact
            weight = one.strength * (Fraction(factor.scale.value) if scale is None else scale)
            found.setdefault(factor.module, []).append(Term(factor.up, factor.down, weight))
    _refuse_other_shapes(found)
    return {module: found[module] for module in sorted(found, key=natural)}


def _refuse_other_models(used: Sequence[Used]) -> None:
    families = {one.detected.family.name: one for one in used}
    if len(families) > 1:
        raise FormatError(
            "the adapters belong to different models, and no adapter can hold both",
            where="; ".join(f"{one.name}: {one.detected.family.title}" for one in families.values()),
            hint=_HINT,
            slug="merge-mismatch",
        )


def _refuse_other_shapes(terms: Mapping[str, Sequence[Term]]) -> None:
    sizes = {module: {(t.up.shape[0], *t.down.shape[1:]) for t in ones} for module, ones in terms.items()}
    wrong = [module for module, found in sizes.items() if len(found) > 1]
    if wrong:
        told = " and ".join("x".join(map(str, size)) for size in sorted(sizes[wrong[0]]))
        raise FormatError(
            f"the adapters were trained on models of different sizes: {len(wrong)} modules have several shapes",
            where=f"{'; '.join(fold_names(wrong)[:4])}: {printable(told)}",
            hint="merge adapters of one model; what each is for: loraconv inspect ADAPTER",
            slug="merge-mismatch",
        )


def _refuse_kernels(terms: Terms, used: Sequence[Used], target: Dialect) -> None:
    """Raise :class:`FormatError` (``cannot-carry``) for convolutions in a format that is for linear layers."""
    kernels = [module for module, ones in terms.items() if _kernel(ones)]
    own = all(one.detected.dialect.name == target.name for one in used)  # what has them can carry them
    if kernels and not own and not target.convolutions:
        raise FormatError(
            f"{target.name} cannot carry the factors of {len(kernels)} convolutions",
            where="; ".join(fold_names(kernels)[:4]),
            why="its files hold pairs of factors for linear layers",
            hint="write another format: --to comfyui",
            slug="cannot-carry",
        )


# ---------------------------------------------------------------------------------------------------------------------
# the factors of the sum


def _cuts(terms: Terms, how: Wanted, dtype: str) -> tuple[dict[str, Cut], dict[str, float]]:
    """``(module -> factors of the smaller rank, module -> norm)``; one that keeps its rank is in the second only."""

    def work(ones: Sequence[Term]) -> Cut | float:
        both = stack([replace(one, up=_as_matrix(one.up), down=_as_matrix(one.down)) for one in ones])
        return cut(both.up, both.down.T, how, dtype)

    with workers() as pool:
        made = dict(zip(terms, in_order(pool, [partial(work, ones) for ones in terms.values()]), strict=True))
    cuts = {module: one for module, one in made.items() if isinstance(one, Cut)}
    return cuts, {module: one.norm if isinstance(one, Cut) else one for module, one in made.items()}


def _as_matrix(side: Lazy) -> Lazy:
    """A factor of a convolution as (rank, in * height * width) or (out, rank); that of a linear layer as it is."""
    return Viewed(side, (side.shape[0], prod(side.shape[1:]))) if len(side.shape) > 2 else side


def _kernel(terms: Sequence[Term]) -> tuple[int, ...]:
    """The sizes of the kernel of a module's convolution; empty for a linear layer."""
    return terms[0].down.shape[2:]


def _of_cut(module: str, made: Cut, terms: Sequence[Term]) -> Factor:
    rank = _rank(made.down)
    return with_kernel(Factor(module, made.down, made.up, _scale_one(rank)), _kernel(terms))


def _stacked(module: str, terms: Sequence[Term], target: Dialect, dtype: str) -> Factor:
    """All factors of a module side by side, in ``dtype``, every number rounded at most once."""
    unit = _unit(terms, target, dtype)
    downs = [cast(term.down, dtype) for term in terms]
    ups = [folded(term.up, term.factor / unit, dtype) for term in terms]
    refuse_ruin({f"{module}.{number}": part for number, part in enumerate([*downs, *ups])})
    down, up = _side_by_side(downs, 0), _side_by_side(ups, 1)
    rank = _rank(down)
    return Factor(module, down, up, Scale(unit * rank, rank, "the first adapter's strength and scale"))


def _unit(terms: Sequence[Term], target: Dialect, dtype: str) -> Fraction:
    """The scale that the output says: that of the first adapter, whose factors then keep their bytes; 1 where some
    consumer would not read it, or alpha cannot say it. An alpha tensor is float32, which rounds more than ``up``."""
    import numpy as np

    unit = abs(terms[0].factor)
    alpha = unit * sum(_rank(term.down) for term in terms)
    if not target.every_consumer_reads_alpha or dtype == "F64" or not 0 < alpha <= LARGEST_ALPHA:
        return Fraction(1)
    if target.alpha and Fraction(float(np.float32(alpha))) != alpha:
        return Fraction(1)
    return unit


def _side_by_side(parts: Sequence[Lazy], dim: int) -> Lazy:
    return parts[0] if len(parts) == 1 else Joined(tuple(parts), dim)


def _keeping(terms: Terms, target: Dialect) -> str:
    """The dtype of all factors: the adapters' own where it holds every product with a scale; else float32."""
    everything = [term for ones in terms.values() for term in ones]
    dtypes = {side.dtype for term in everything for side in (term.up, term.down)}
    own = dtypes.pop() if len(dtypes) == 1 else "F64" if "F64" in dtypes else "F32"
    if own in ("F32", "F64"):
        return own
    exact = all(fits(term.up, term.factor / _unit(ones, target, own), own) for ones in terms.values() for term in ones)
    return own if exact else "F32"


def _rounded(exact: bool, stored: str, terms: Terms) -> list[str]:
    narrow = sorted({t.up.dtype for ones in terms.values() for t in ones} - {"F32", "F64"})
    said = []
    if narrow and stored not in narrow:
        said.append(f"strength times scale would round in {', '.join(narrow)}, so the factors are written in {stored}")
    if not exact:
        said.append(f"a strength times a scale is no power of two, so lora_B is rounded once in {stored}")
    return said


def _scale_one(rank: int) -> Scale:
    return Scale(Fraction(rank), rank, "computed at scale 1")


def _rank(down: Lazy) -> int:
    return down.shape[0]


def _error(factor: Factor, cuts: Mapping[str, Cut]) -> float:
    return cuts[factor.module].error if factor.module in cuts else 0.0
