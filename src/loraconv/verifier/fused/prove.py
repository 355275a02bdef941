"""The proof of a fused model: exactly the base plus the adapters, each number rounded once, and nothing else changed.

Both models are read tensor by tensor in blocks of rows, so that memory does not grow with them. What the adapters add
is computed here from the formats' own definitions, in this package's own arithmetic (see ``rounding``).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from loraconv.errors import FormatError
from loraconv.lazy import TensorRef
from loraconv.names import fold_names, numel
from loraconv.verifier.diagnosis import Finding
from loraconv.verifier.fused.case import Case, TensorResult, Term, check_names, chosen, home_of
from loraconv.verifier.fused.controls import fused_controls
from loraconv.verifier.fused.diagnosis import diagnose_fused
from loraconv.verifier.fused.figures import MISROUNDED, Figures
from loraconv.verifier.fused.rounding import Delta, measure
from loraconv.verifier.numbers import same_bytes
from loraconv.verifier.parallel import in_parallel
from loraconv.verifier.proof import Check, Proof


@dataclass(frozen=True, slots=True)
class FusedReport:
    """The proof, why it failed (empty if it holds), the tensors that the adapters touch, and the sum of their figures.

    ``kept`` is the share of the delta that survived the rounding, None for a delta of zero: near 1 unless the adapter
    is so weak that most of it is less than half a unit of the base's numbers.
    """

    proof: Proof
    findings: tuple[Finding, ...]
    tensors: tuple[TensorResult, ...]
    total: Figures

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
) -> FusedReport:
    """Compare ``fused`` with ``base`` plus ``terms``.

    ``only`` are the modules that the user chose, None for all; ``dtype`` is the one that was asked for: every
    floating-point tensor is then rounded once to it. ``bound`` replaces the rule for the touched tensors by one on the
    relative Frobenius error of the delta.

    Raises :class:`FormatError` (``not-comparable``) where base and adapters, or base and fused model, have nothing in
    common.
    """
    modules = chosen(terms, only)
    vectors = {name for name in map(home_of, modules) if name in base and len(base[name].shape) == 1}
    base, fused = _with_columns(base, vectors), _with_columns(fused, vectors)
    case = Case(base, terms, fused, modules, dtype, bound)
    _refuse_strangers(case)
    touched, untouched = case.touched(), case.untouched()
    results = list(in_parallel(lambda name: _touched(case, name, touched[name]), _by_place(fused, touched)))
    same = in_parallel(lambda name: (name, _untouched(case, name)), _by_place(fused, untouched))
    changed = sorted(name for name, fine in same if not fine)
    order = {name: place for place, name in enumerate(touched)}
    tensors = tuple(sorted(results, key=lambda result: order[result.name]))
    checks = (
        check_names(base, fused, dtype),
        _check_homes(case),
        _check_untouched(len(untouched), changed, dtype),
        _check_touched(tensors, bound),
    )
    proof = Proof("fused", checks, fused_controls(case, touched, untouched))
    findings = () if all(check.passed for check in checks) else tuple(diagnose_fused(case, tensors, changed))
    return FusedReport(proof, findings, tensors, sum((t.figures for t in tensors), Figures()))


def _with_columns(tensors: Mapping[str, TensorRef], names: Collection[str]) -> dict[str, TensorRef]:
    """The tensors, of which the vectors of these names are columns: what is compared is a matrix."""
    return {n: replace(t, shape=(*t.shape, 1)) if n in names and len(t.shape) == 1 else t for n, t in tensors.items()}


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


def _untouched(case: Case, name: str) -> bool:
    base, stored = case.base[name], case.fused[name]
    if base.dtype == stored.dtype:
        return same_bytes(base, stored)
    return not measure(_matrix(base), _matrix(stored), _nothing(_matrix(base).shape)).misrounded


def _matrix(ref: TensorRef) -> TensorRef:
    """The same bytes as a matrix."""
    columns = ref.shape[-1] if ref.shape else 1
    return replace(ref, shape=(numel(ref.shape[:-1]), columns))


def _nothing(shape: tuple[int, ...]) -> Delta:
    """A delta of rank 0."""
    import numpy as np

    return Delta.of(np.zeros((shape[0], 0)), np.zeros((0, shape[1])))


def _check_homes(case: Case) -> Check:
    lost = [module for module in case.modules if not case.fits(module)]
    detail = f"no weight of that name and shape in the base: {'; '.join(fold_names(lost)[:4])}" if lost else ""
    what = "every module of the adapter has its weight in the base"
    return Check("L0", what, not lost, len(case.modules), detail=detail)


def _check_untouched(count: int, changed: list[str], dtype: str | None) -> Check:
    what = "what no adapter touches is byte for byte that of the base"
    if dtype is not None:
        what = f"what no adapter touches is that of the base, rounded once to {dtype}"
    detail = f"other content in {'; '.join(fold_names(changed)[:4])}" if changed else ""
    return Check("L1", what, not changed, count, detail=detail)


def _check_touched(tensors: Sequence[TensorResult], bound: float | None) -> Check:
    wrong = [tensor.name for tensor in tensors if not tensor.same]
    detail = f"not so in {'; '.join(fold_names(wrong)[:4])}" if wrong else ""
    if bound is not None:
        error = max((t.figures.error for t in tensors), default=0.0)
        return Check("L2", "the change is the delta", not wrong, len(tensors), error, bound, detail)
    share = max((t.figures.wrong / max(1, t.figures.elements) for t in tensors), default=0.0)
    what = "every weight is base + delta, rounded once"
    return Check("L2", what, not wrong, len(tensors), share, MISROUNDED, detail)
