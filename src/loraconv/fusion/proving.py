"""The proof of what a fusion has written: base, adapters and output, read by the formats' own definitions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from loraconv.errors import ProofFailed
from loraconv.fusion.planned import Plan
from loraconv.io.torch_read import read_tensors
from loraconv.lazy import TensorRef
from loraconv.verifier.fused import FusedReport, Term, prove_fused
from loraconv.verifier.llava import as_original, tower_beside, trained_beside
from loraconv.verifier.numbers import Tensor
from loraconv.verifier.oracles import pairs_of
from loraconv.verifier.spelled import apart


def prove(plan: Plan, made: Mapping[str, TensorRef]) -> FusedReport:
    """Compare what is on disk with base and adapters by the formats' own definitions."""
    terms = []
    for one in plan.used:
        source = one.source
        ranks, magnitudes = [*source.ranks], dict[str, Tensor]()
        if len(ranks) == 1:
            ranks[0], magnitudes = apart(ranks[0])
        pairs = pairs_of(one.detected.dialect.name, list(ranks), source.metadata, source.config, one.alpha)
        terms.append(Term(pairs, one.strength, magnitudes))
    base, beside, rows = plan.model.tensors, _beside(plan), None
    if plan.joined.hf is not None:
        made, rows = as_original(made, {**base, **beside})
    report = prove_fused(base, terms, made, only=plan.only, dtype=plan.dtype, beside=beside)
    if rows is not None:
        report = replace(report, proof=replace(report.proof, checks=(*report.proof.checks, rows)))
    if report.proof.passed:
        return report
    raise ProofFailed(
        "the fused model is not the base plus the adapters; nothing was left behind",
        where="; ".join(report.proof.failures()[:4]) or "no control could be made",
        why="; ".join(finding.sentence for finding in report.findings[:2]) or "a defect in loraconv, or a damaged disk",
        hint="run the same command again; if it fails again, please report it",
    )


def _beside(plan: Plan) -> dict[str, TensorRef]:
    """What was trained whole, and the tower that the base lacks, as the verifier names them."""
    run, hf = plan.joined.run, plan.joined.hf
    tower = {} if hf is None else tower_beside(hf.tower.tensors)
    trained = {} if run is None else trained_beside(read_tensors(run.file))
    return {**{name: ref for name, ref in tower.items() if name not in plan.model.tensors}, **trained}
