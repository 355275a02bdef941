"""An adapter saved in other formats one after another and at last in its own again: is it still the same, bit for bit?

Every hop is a conversion with its proof, and is compared once more with the adapter at the start.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from loraconv.conversion import ConvertResult, convert
from loraconv.detect import detect
from loraconv.errors import UsageError
from loraconv.names import quoted
from loraconv.registry import dialect
from loraconv.source import open_source
from loraconv.verification.adapters import AdaptersResult, adapter_pairs, verify_adapters
from loraconv.verification.result import VerifyResult
from loraconv.verifier.diagnosis import Finding, addressed, finding
from loraconv.verifier.numbers import Computed, Held, Pair, Tensor, same_bytes, same_numbers, values
from loraconv.verifier.proof import Proof, caught


@dataclass(frozen=True, slots=True)
class Hop:
    """One conversion on the way: what it wrote, its proof, and the comparison with the adapter at the start.

    ``equal`` of ``modules`` modules are that adapter number for number; ``error`` is the greatest relative error of
    the others. ``same`` is the comparison's verdict, ``controls`` what it caught (``8/8``).
    """

    to: str
    bytes: int
    proof: Proof
    same: bool
    modules: int
    equal: int
    error: float
    controls: str

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict."""
        return {
            "to": self.to,
            "bytes": self.bytes,
            "proof": self.proof.to_dict(),
            "same": self.same,
            "modules": self.modules,
            "equal": self.equal,
            "error": self.error,
            "controls": self.controls,
        }


@dataclass(frozen=True, slots=True)
class RoundtripResult(VerifyResult):
    """The way of an adapter and its end. ``same`` is true if every factor has the bytes, and every module the scale,
    that it had at the start; ``factors`` counts the former, ``identical`` those that do. ``alpha`` says whether every
    module has its alpha again."""

    mode: ClassVar[str] = "roundtrip"

    source: str = ""
    format: str = ""
    hops: tuple[Hop, ...] = ()
    factors: int = 0
    identical: int = 0
    alpha: bool = False

    def details(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "format": self.format,
            "hops": [hop.to_dict() for hop in self.hops],
            "factors": self.factors,
            "identical": self.identical,
            "alpha": self.alpha,
        }


def roundtrip(
    src: str | Path,
    *,
    through: Sequence[str] = ("diffusers", "peft"),
    family: str | None = None,
    alpha: float | None = None,
) -> RoundtripResult:
    """Convert the adapter in ``src`` to each format of ``through`` in turn, then to its own, in a temporary folder, and
    compare the end with the start byte by byte.

    ``family`` is the model's, where the adapter's names fit several; ``alpha`` is that of ``src`` where its files do
    not say it. Raises what :func:`convert` raises, for instance where a format on the way cannot hold the adapter.
    """
    if not through or isinstance(through, str):
        raise UsageError("no format to go through was named", hint="--through diffusers,peft")
    names = [dialect(name).name for name in through]
    with open_source(src) as source:
        own = detect(source).dialect.name
    hops: list[Hop] = []
    with tempfile.TemporaryDirectory(prefix="loraconv-") as folder:
        here: str | Path = src
        for number, name in enumerate([*names, own] if names[-1] != own else names):
            out = Path(folder) / f"{number}-{name}"
            converted = convert(here, out=out, to=name, family=family, alpha=alpha if number == 0 else None)
            hops.append(_hop(src, out, converted, alpha))
            here = out
        return _compare(src, here, own, alpha, tuple(hops))


def _hop(src: str | Path, out: Path, converted: ConvertResult, alpha: float | None) -> Hop:
    compared: AdaptersResult = verify_adapters(src, out, alpha=alpha)
    apart = [module for module in compared.modules if not module.equal]
    return Hop(
        converted.to,
        sum(file.bytes for file in converted.files),
        converted.proofs[0],
        compared.same,
        len(compared.modules),
        len(compared.modules) - len(apart),
        max((module.error for module in apart), default=0.0),
        caught(compared.controls),
    )


def _compare(src: str | Path, end: str | Path, own: str, alpha: float | None, hops: tuple[Hop, ...]) -> RoundtripResult:
    """Every factor's bytes and every module's alpha at the end against those at the start."""
    with open_source(src) as first, open_source(end) as last:
        start, stop = adapter_pairs(first, alpha), adapter_pairs(last, None)
        factors = {
            f"{module}.{side}": (getattr(pair, side), getattr(stop[module], side) if module in stop else None)
            for module, pair in start.items()
            for side in ("down", "up")
        }
        changed = [name for name, (one, other) in factors.items() if other is None or not _same(one, other)]
        scales = [module for module, pair in start.items() if module in stop and _alpha(pair) != _alpha(stop[module])]
        first.check_unchanged()
    findings = [*_findings(changed, scales, hops), *_beside(list(stop), start)]
    lossy = next((hop for hop in hops if hop.equal < hop.modules), hops[0])
    words = {"src": quoted(src), "to": lossy.to}
    identical = len(factors) - len(changed)
    return RoundtripResult(
        not findings, addressed(findings, **words), str(src), own, hops, len(factors), identical, not scales
    )


def _same(one: Tensor, other: Tensor) -> bool:
    """The same bytes; of what was computed from several ranks, the same numbers."""
    if isinstance(one, Held | Computed) or isinstance(other, Held | Computed):
        return one.dtype == other.dtype and same_numbers(values(one), values(other))
    return same_bytes(one, other)


def _alpha(pair: Pair) -> Any:
    return pair.scale * pair.shape[1]


def _findings(changed: list[str], scales: list[str], hops: tuple[Hop, ...]) -> list[Finding]:
    found = []
    if changed:
        lossy = next((hop for hop in hops if hop.equal < hop.modules), None)
        why = (
            f" (on the way to {lossy.to} the scale was no power of two, so that the product was rounded)"
            if lossy is not None and lossy.same
            else ""
        )
        found.append(
            finding(
                "bytes",
                f"the bytes of {len(changed)} factors are not those of the start{why}:",
                changed,
                "loraconv convert {src} -o OUT --to {to} --scale-in metadata keeps every bit",
            )
        )
    if scales:
        text = "alpha is not that of the start, in"
        found.append(finding("alpha", text, scales, "loraconv convert {src} -o OUT --to {to} --scale-in metadata"))
    return found


def _beside(modules: list[str], start: dict[str, Pair]) -> list[Finding]:
    more = [module for module in modules if module not in start]
    text = "modules appeared that the start does not have:"
    return [finding("extra", text, more, "please report this")] if more else []
