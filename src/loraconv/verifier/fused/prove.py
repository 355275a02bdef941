"""The proof of a fused model: exactly the base plus the adapters, each number rounded once, and nothing else changed.

Both models are read tensor by tensor in blocks of rows, so that memory does not grow with them. What the adapters add
is computed here from the formats' own definitions, in this package's own arithmetic (see ``rounding``).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod

from loraconv.errors import FormatError
from loraconv.io.crc import crc32
from loraconv.lazy import TensorRef
from loraconv.names import fold_names
from loraconv.verifier.diagnosis import Finding
from loraconv.verifier.fused.case import NOTHING, Case, TensorResult, Tensors, Term, check_names, chosen, home_of
from loraconv.verifier.fused.controls import beside_controls, fused_controls
from loraconv.verifier.fused.diagnosis import diagnose_fused
from loraconv.verifier.fused.figures import MISROUNDED, Figures
from loraconv.verifier.fused.parts import in_base
from loraconv.verifier.fused.rounding import is_rounded, measure
from loraconv.verifier.parallel import beside_it, in_parallel
from loraconv.verifier.proof import Check, Proof


@dataclass(frozen=True, slots=True)
class FusedReport:
    """The proof, why it failed (empty if it holds), the tensors that the adapters touch, and the sum of their figures.

    ``kept`` is the share of the delta that survived the rounding, None for a delta of zero: near 1 unless the adapter
    is so weak that most of it is less than half a unit of the base's numbers. ``crc32`` (eight hexadecimal digits) are
    the checksums of the tensors that were seen to have the base's bytes, as they are in the fused model.
    """

    proof: Proof
    findings: tuple[Finding, ...]
    tensors: tuple[TensorResult, ...]
    total: Figures
    crc32: Mapping[str, str] = field(default_factory=dict)

    @property
    def kept(self) -> float | None:
        return self.total.kept


def prove_fused(
    base: Mapping[str, TensorRef],
    terms: Sequence[Term],
    fused: Mapping[str, TensorRef],
    *,
    only: Collection[str] | None = None,
    dtype: str | None = None,
    bound: float | None = None,
    beside: Mapping[str, TensorRef] = NOTHING,
) -> FusedReport:
    """Compare ``fused`` with ``base`` plus ``terms``. ``beside`` are tensors that were trained whole, under the base's
    names: each stands in the place of the base's own, or is one more.

    ``only`` are the modules that the user chose, None for all, named as in ``terms``; ``dtype`` is the one that was
    asked for: every floating-point tensor is then rounded once to it. ``bound`` replaces the rule for the touched
    tensors by one on the relative Frobenius error of the delta.

    Raises :class:`FormatError` (``not-comparable``) where base and adapters, or base and fused model, have nothing in
    common.
    """
    every = {**base, **beside}
    terms, only = in_base(terms, only, every)
    modules = chosen(terms, only)
    names = check_names(every, fused, dtype)
    others = {name for name in map(home_of, modules) if name in every and len(every[name].shape) not in (0, 2)}
    fused = _as_matrices(fused, {name for name in others if name in fused and fused[name].shape})
    case = Case(_as_matrices(every, others), terms, fused, modules, dtype, bound)
    _refuse_strangers(case)
    touched, untouched = case.touched(), case.untouched()
    with beside_it(lambda: fused_controls(case, touched, untouched)) as mistakes:
        results = list(in_parallel(lambda name: _touched(case, name, touched[name]), _by_place(fused, touched)))
        same = list(in_parallel(lambda name: (name, *_untouched(case, name)), _by_place(fused, untouched)))
        changed = sorted(name for name, fine, _ in same if not fine)
    order = {name: place for place, name in enumerate(touched)}
    tensors = tuple(sorted(results, key=lambda result: order[result.name]))
    checks = (
        names,
        _check_homes(case),
        _check_untouched(untouched, changed, dtype, beside),
        *([_check_beside(untouched, changed, dtype, beside)] if beside else []),
        _check_touched(tensors, bound),
    )
    controls = (*mistakes.result(), *beside_controls(case, base, beside))
    proof = Proof("fused", checks, controls)
    findings = () if all(check.passed for check in checks) else tuple(diagnose_fused(case, tensors, changed))
    sums = {name: crc for name, fine, crc in same if fine and crc}
    return FusedReport(proof, findings, tensors, sum((t.figures for t in tensors), Figures()), sums)


def _as_matrices(tensors: Tensors, names: Collection[str]) -> dict[str, TensorRef]:
    """The tensors, of which those of these names are matrices: a vector is a column, a kernel (out, all the rest)."""
    matrices = {n: replace(t, shape=(t.shape[0], prod(t.shape[1:]))) for n, t in tensors.items() if n in names}
    return {**tensors, **matrices}


def _refuse_strangers(case: Case) -> None:
    if not any(name in case.fused for name in case.base):
        raise FormatError(
            "the fused model and the base have no tensor in common, so they cannot be compared",
            where=f"base: {'; '.join(fold_names(case.base)[:2])}; fused: {'; '.join(fold_names(case.fused)[:2])}",
            hint="loraconv verify --base BASE ADAPTER FUSED, with the transformer folders of one model",
            slug="not-comparable",
        )
    if case.modules and not any(case.fits(module) for module in case.modules):
        raise FormatError(
            "the adapter does not belong to this base: none of its modules is a weight of it, in its shape",
            where="; ".join(fold_names(case.modules)[:3]),
            why=_misfit(case, case.modules[0]),
            hint="pass the base that the adapter was trained on: loraconv inspect ADAPTER",
            slug="not-comparable",
        )


def _misfit(case: Case, module: str) -> str:
    home = case.base.get(home_of(module))
    if home is None:
        return f"the base has no {home_of(module)}"
    shapes = " and ".join(str(list(shape)) for shape in sorted(case.shapes(module)))
    return f"{home_of(module)} is {home.dtype} {list(home.shape)} in the base, {shapes} by the adapter"


def _by_place(fused: Mapping[str, TensorRef], names: Iterable[str]) -> list[str]:
    """In the order of the bytes on disk."""
    return sorted(names, key=lambda name: (str(fused[name].file.path), fused[name].offset))


def _touched(case: Case, name: str, module: str) -> TensorResult:
    figures = measure(case.base[name], case.fused[name], case.delta(module))
    return TensorResult(name, module, case.accepts(figures), figures)


def _untouched(case: Case, name: str) -> tuple[bool, str]:
    """Whether a tensor is that of the base, and the CRC-32 of its bytes where it has to have the same; else empty."""
    crc = 0

    def add(piece: bytes) -> None:
        nonlocal crc
        crc = crc32(piece, crc)

    base, stored = case.base[name], case.fused[name]
    return is_rounded(base, stored, add), f"{crc:08x}" if base.dtype == stored.dtype else ""


def _check_homes(case: Case) -> Check:
    lost = [module for module in case.modules if not case.fits(module)]
    detail = f"no weight of that name and shape in the base: {'; '.join(fold_names(lost)[:4])}" if lost else ""
    what = "every module of the adapter has its weight in the base"
    return Check("L0", what, not lost, len(case.modules), detail=detail)


def _check_untouched(untouched: Sequence[str], changed: Sequence[str], dtype: str | None, beside: Tensors) -> Check:
    own = [name for name in untouched if name not in beside]
    return _check_bytes("what no adapter touches is {} that of the base", own, changed, dtype)


def _check_beside(untouched: Sequence[str], changed: Sequence[str], dtype: str | None, beside: Tensors) -> Check:
    whole = [name for name in untouched if name in beside]
    return _check_bytes("what was trained whole is {} that of the run", whole, changed, dtype)


def _check_bytes(what: str, names: Sequence[str], changed: Sequence[str], dtype: str | None) -> Check:
    wrong = [name for name in changed if name in set(names)]
    detail = f"other content in {'; '.join(fold_names(wrong)[:4])}" if wrong else ""
    said = what.format("byte for byte") if dtype is None else f"{what.replace('{} ', '')}, rounded once to {dtype}"
    return Check("L1", said, not wrong, len(names), detail=detail)


def _check_touched(tensors: Sequence[TensorResult], bound: float | None) -> Check:
    wrong = [tensor.name for tensor in tensors if not tensor.same]
    detail = f"not so in {'; '.join(fold_names(wrong)[:4])}" if wrong else ""
    if bound is not None:
        error = max((t.figures.error for t in tensors), default=0.0)
        return Check("L2", "the change is the delta", not wrong, len(tensors), error, bound, detail)
    share = max((t.figures.wrong / max(1, t.figures.elements) for t in tensors), default=0.0)
    what = "every weight is base + delta, rounded once"
    return Check("L2", what, not wrong, len(tensors), share, MISROUNDED, detail)
