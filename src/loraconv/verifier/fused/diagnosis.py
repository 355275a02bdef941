"""Why a fused model is not its base plus the adapters, in the words a user needs, and the command that mends it.

As with two adapters, each finding is a hypothesis that was tested on the numbers, and a right fuse never has one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches

from loraconv.names import DTYPE_WORDS, FLOAT_DTYPES, fold_names, numel, printable
from loraconv.verifier.diagnosis import Finding
from loraconv.verifier.fused.case import Case, TensorResult, home_of, stored_dtype
from loraconv.verifier.fused.figures import rounded
from loraconv.verifier.fused.guesses import TWICE, Cause, Sample, explain
from loraconv.verifier.fused.rounding import numbers
from loraconv.verifier.numbers import same_numbers

#: After so many tensors without an explanation, none is looked for any more.
_TRIES = 8
_AGAIN = "fuse it again: loraconv fuse ADAPTER --base BASE -o OUT"
_MEANT = f"{_AGAIN}; if they were left out on purpose: loraconv verify ... --modules PATTERN"
_COPY = "fetch or copy FUSED again, or fuse it again: loraconv fuse ADAPTER --base BASE -o OUT"


def diagnose_fused(case: Case, tensors: Sequence[TensorResult], changed: Sequence[str]) -> Iterator[Finding]:
    """The causes of every difference; ``changed`` are the tensors that no adapter touches and that differ."""
    yield from _by_name(case)
    strict = [tensor for tensor in tensors if not tensor.same and tensor.figures.rounded_once]
    yield from _strict_bound(case, strict)
    wrong = [tensor for tensor in tensors if not tensor.same and tensor not in strict]
    causes = _causes(case, wrong)
    for finding in _stale_shards(case, tensors, causes, changed):
        yield finding
        changed = [name for name in changed if name not in finding.modules]
        causes = {name: cause for name, cause in causes.items() if name not in finding.modules}
    other = _other_base(case, changed)
    if other is not None:
        yield other
        changed, causes = [], {name: cause for name, cause in causes.items() if cause is not None}
    yield from _broken(wrong, causes)
    yield from _explained(tensors, causes)
    if changed:
        yield _finding("touched", "tensors that no adapter touches are not those of the base:", changed, _AGAIN)


def _finding(slug: str, text: str, names: Sequence[str], mend: str) -> Finding:
    return Finding(slug, f"{text} {'; '.join(fold_names(names)[:4])}", mend, tuple(names))


def _strict_bound(case: Case, tensors: Sequence[TensorResult]) -> Iterator[Finding]:
    """Tensors that are right, and yet not within the bound that the user gave."""
    if tensors:
        error = max(tensor.figures.error for tensor in tensors)
        dtypes = " and ".join(sorted({case.fused[tensor.name].dtype for tensor in tensors}))
        text = f"every number is the nearest to base + delta; rounding to {dtypes} alone makes an error of {error:.1e},"
        text += f" more than the bound {case.bound:g}, in"
        names = [tensor.name for tensor in tensors]
        yield _finding("strict-bound", text, names, "leave --bound out, or give a larger one")


def _by_name(case: Case) -> Iterator[Finding]:
    missing = [name for name in case.base if name not in case.fused]
    extra = [name for name in case.fused if name not in case.base]
    if missing:
        yield _finding("missing", "the fused model lacks", missing, _AGAIN)
    if extra:
        text = "the fused model has what the base has not, such as an adapter beside the weights:"
        yield _finding("extra", text, extra, _AGAIN)
    both = [name for name in case.base if name in case.fused and not case.kept(name)]
    reshaped = [name for name in both if case.base[name].shape != case.fused[name].shape]
    if reshaped:
        yield _finding("other-base", "the fused model is of another size, in", reshaped, "pass the base it was made of")
    yield from _retyped(case, [name for name in both if name not in reshaped])
    homeless = [module for module in case.modules if not case.fits(module)]
    if homeless:
        yield _homeless(case, homeless)


def _retyped(case: Case, names: Sequence[str]) -> Iterator[Finding]:
    if not names:
        return
    dtypes = {case.fused[name].dtype for name in names}
    word = next((w for w, d in DTYPE_WORDS.items() if dtypes == {d}), None)
    right = stored_dtype(case.base[names[0]], case.dtype)
    mend = _AGAIN if word is None else f"if that was asked for: loraconv verify ... --dtype {word}"
    yield _finding("retyped", f"the fused model has {' and '.join(sorted(dtypes))} instead of {right} in", names, mend)


def _homeless(case: Case, modules: Sequence[str]) -> Finding:
    near = get_close_matches(home_of(modules[0]), case.base)
    hint = f"; the nearest name in the base is {printable(near[0])}" if near else ""
    text = "; ".join(fold_names(modules)[:4])
    return Finding(
        "homeless",
        f"the base has no weight for these modules of the adapter, so they had to be ignored: {text}{hint}",
        "pass the base that the adapter was trained on: loraconv inspect ADAPTER",
        tuple(modules),
    )


def _causes(case: Case, wrong: Sequence[TensorResult]) -> dict[str, Cause | None]:
    """Tensor -> what explains it, None where nothing does. Tensors with NaN or Inf of their own are left out."""
    causes: dict[str, Cause | None] = {}
    before = None
    for tensor in wrong:
        if not tensor.figures.nonfinite:
            lost = before is None and len(causes) >= _TRIES
            causes[tensor.name] = None if lost else explain(Sample(case, tensor), before)
            before = causes[tensor.name] or before
    return causes


def _other_base(case: Case, changed: Sequence[str]) -> Finding | None:
    """Most of what no adapter touches is other than in the base: cast on the way, or of another model."""
    sizes = {n: numel(case.base[n].shape) for n in case.untouched() if case.base[n].dtype in FLOAT_DTYPES}
    if not changed or sum(sizes.get(name, 0) for name in changed) * 2 < sum(sizes.values()):
        return None
    for low in ("BF16", "F16"):
        if all(_cast_through(case, name, low) for name in changed):
            text = f"the whole base was cast through {low} on its way, in"
            mend = f"fuse into the base as it is, without --dtype or torch_dtype; {_AGAIN}"
            return _finding("precision", text, changed, mend)
    text = "it was fused into a different base model: what no adapter touches is other than in this base, in"
    return _finding("other-base", text, changed, "pass the base it was made of, or " + _AGAIN)


def _cast_through(case: Case, name: str, low: str) -> bool:
    """True if the first rows of a tensor are the base's, rounded to ``low``, and that changes them."""
    base, stored = case.base[name], case.fused[name]
    if low == base.dtype or base.dtype not in FLOAT_DTYPES or stored.dtype not in FLOAT_DTYPES:
        return False
    rows = min(64, base.shape[0]) if base.shape else 0
    one, other = (numbers(ref.rows(0, rows) if base.shape else ref, "F64") for ref in (base, stored))
    return same_numbers(rounded(rounded(one, low), stored.dtype), other)


def _stale_shards(
    case: Case, tensors: Sequence[TensorResult], causes: Mapping[str, Cause | None], changed: Sequence[str]
) -> Iterator[Finding]:
    """Whole shards that are wrong where others are right: left over from another version, or from the base."""
    wrong = {*causes, *changed}
    shards: dict[str, list[str]] = {}
    for name in (*(tensor.name for tensor in tensors), *changed):
        shards.setdefault(case.fused[name].file.path.name, []).append(name)
    # One wrong tensor says nothing of its shard.
    stale = {shard: names for shard, names in shards.items() if len(names) > 1 and wrong.issuperset(names)}
    if not stale or len(stale) == len(shards) or not wrong.issubset(n for names in stale.values() for n in names):
        return
    for shard, names in stale.items():
        found = {cause.slug if (cause := causes.get(name)) else "" for name in names}
        if found == {"unfused"}:
            yield _stale(shard, names, "the base without the adapter")
        elif "" in found or len(found) > 1:
            yield _stale(shard, names, "another version of the model")


def _stale(shard: str, names: Sequence[str], what: str) -> Finding:
    text = f"the shard {printable(shard)} is stale: it holds {what}, while the other shards are right. This concerns"
    return _finding("stale-shard", text, names, _COPY)


def _broken(wrong: Sequence[TensorResult], causes: Mapping[str, Cause | None]) -> Iterator[Finding]:
    """NaN, and numbers that are damaged among right ones."""
    broken = [tensor for tensor in wrong if tensor.figures.nonfinite]
    if broken:
        count = sum(tensor.figures.nonfinite for tensor in broken)
        text = f"NaN or Inf where the base has numbers, {count} times, in"
        mend = "see whether the adapter holds them: loraconv inspect ADAPTER; if not, " + _AGAIN
        yield _finding("nonfinite", text, [tensor.name for tensor in broken], mend)
    damaged = [tensor for tensor in wrong if causes.get(tensor.name) == Cause(constant=1.0)]
    if damaged:
        count = sum(max(tensor.figures.wrong, tensor.figures.far) for tensor in damaged)
        text = f"damaged numbers among many that are right, {count} times, in"
        yield _finding("damaged", text, [tensor.name for tensor in damaged], _COPY)


def _explained(tensors: Sequence[TensorResult], causes: Mapping[str, Cause | None]) -> Iterator[Finding]:
    groups: dict[Cause | None, list[str]] = {}
    for name, cause in causes.items():
        if cause != Cause(constant=1.0):
            groups.setdefault(_near(cause, groups), []).append(name)
    results = {tensor.name: tensor for tensor in tensors}
    for cause, names in groups.items():
        if cause is None:
            text = "what is stored is neither the base nor base + delta, in"
            yield _finding("other", text, names, "pass the very base and adapters that it was made of, or " + _AGAIN)
        elif cause.slug == "unfused":
            whole = len(names) == len(tensors)
            text = "nothing was fused: it is the base, in" if whole else "the adapter was ignored, not fused, in"
            yield _finding("unfused", text, names, _AGAIN if whole else _MEANT)
        elif cause.slug:
            yield _finding(cause.slug, f"{_strength(cause)}{_also(cause)}, in", names, _mend(cause))
        else:
            text = cause.how_text + _effect([results[name] for name in names])
            yield _finding(cause.how, f"{text}, in", names, _mend(cause))


def _near(cause: Cause | None, groups: Mapping[Cause | None, list[str]]) -> Cause | None:
    """The group of the same words, whatever the constant if words tell it, else with nearly the same constant."""
    for other in groups:
        if cause is None or other is None:
            if cause is other:
                return None
        elif replace(cause, constant=None) == replace(other, constant=None) and (cause.text or _close(cause, other)):
            return other
    return cause


def _close(one: Cause, other: Cause) -> bool:
    a, b = one.constant or 0.0, other.constant or 0.0
    return abs(a - b) <= 0.02 * abs(b)


def _strength(cause: Cause) -> str:
    if cause.slug != "scale" or cause.constant is None:
        return cause.text
    why = f" ({cause.text})" if cause.text else ""
    return f"the adapter counts {cause.constant:.4g} times as much as it should{why}"


def _also(cause: Cause) -> str:
    return f"; and {cause.how_text}" if cause.how and cause.text != TWICE else ""


def _effect(tensors: Sequence[TensorResult]) -> str:
    """How much a rounding on the way did."""
    total = sum(tensor.figures.elements for tensor in tensors)
    share = sum(tensor.figures.misrounded for tensor in tensors) / max(1, total)
    ulps = max(tensor.figures.ulps for tensor in tensors)
    return f", so {share:.2%} of the numbers are not the nearest, by up to {ulps:.3g} units in the last place"


def _mend(cause: Cause) -> str:
    if cause.slug == "scale":
        return (
            "fuse it again with its own scale: loraconv fuse ADAPTER --base BASE -o OUT (--alpha ALPHA if it is lost)"
        )
    if cause.slug == "left-out":
        return "fuse all in one pass: loraconv fuse A@STRENGTH B@STRENGTH --base BASE -o OUT"
    if cause.slug or cause.how == "precision":
        return _AGAIN
    return "fuse it with sums in float32, rounded once: loraconv fuse ADAPTER --base BASE -o OUT"
