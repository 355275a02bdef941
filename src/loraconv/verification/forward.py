"""Level L3: the real consumer. diffusers loads a model and an adapter, and seeded forward passes are compared: the
adapter live, fused, saved and loaded again, and another adapter or a fused model beside it.

An adapter in another format than diffusers' is converted to a temporary folder first; a diffusers file is loaded as it
is. ``same`` is true if every output is the live adapter's within what roundings can make, and saving changed no tensor.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from loraconv.conversion import convert
from loraconv.detect import detect
from loraconv.errors import FormatError
from loraconv.model_folder import CONFIG, PIPELINE, Model, open_model, part_of
from loraconv.names import ROUNDING, fold_names, printable, quoted
from loraconv.source import open_source
from loraconv.verification.adapters import adapter_pairs
from loraconv.verification.result import VerifyResult, number
from loraconv.verifier.consumers.forward import OTHER, Forward, Request, run_forward
from loraconv.verifier.diagnosis import Finding
from loraconv.verifier.numbers import Pair

_CLASS = "CogVideoXTransformer3DModel"
_HINT = "loraconv verify --forward --model TRANSFORMER_FOLDER ADAPTER"


@dataclass(frozen=True, slots=True)
class Output:
    """One output against that of the live adapter: relative L2 distance, what is allowed, and the adapter's strength
    in it by projection (1 as the live one, 0 as the base alone)."""

    what: str
    distance: float
    allowed: float
    strength: float
    within: bool


@dataclass(frozen=True, slots=True)
class ForwardResult(VerifyResult):
    """``kind`` says what ``other`` is (``adapter``, ``fused``, or empty). ``effect`` is how much the adapter changes
    the base's output; ``bound`` what roundings can make; ``mistakes`` the distances of outputs that are wrong on
    purpose, all above the bound; ``changed`` the tensors that saving and loading changed."""

    mode: ClassVar[str] = "forward"

    model: str = ""
    one: str = ""
    other: str = ""
    kind: str = ""
    dtype: str = "fp32"
    inputs: str = ""
    effect: float = 0.0
    bound: float = 0.0
    outputs: tuple[Output, ...] = ()
    mistakes: dict[str, float] = field(default_factory=dict)
    changed: tuple[str, ...] = ()

    def details(self) -> dict[str, Any]:
        plain = ("model", "one", "other", "kind", "dtype", "inputs", "effect", "bound")
        return {
            **{name: getattr(self, name) for name in plain},
            "outputs": [
                {**asdict(output), "distance": number(output.distance), "strength": number(output.strength)}
                for output in self.outputs
            ],
            "mistakes": {name: number(distance) for name, distance in self.mistakes.items()},
            "changed": list(self.changed),
        }


def verify_forward(
    model: str | Path,
    one: str | Path,
    other: str | Path | None = None,
    *,
    alpha: float | None = None,
    dtype: str | None = None,
) -> ForwardResult:
    """Run the model in ``model`` with the adapter ``one``, and compare. ``other`` is an adapter, or the folder of a
    model with ``one`` fused in; ``alpha`` is what ``one`` was trained with, where its files do not say it; ``dtype`` is
    what to compute in (None: fp32).

    Raises :class:`FormatError` where something does not fit or load, and where nothing would be proved (an adapter
    without effect), and what opening and converting raise.
    """
    kind = "" if other is None else "fused" if _is_model(Path(other)) else "adapter"
    with tempfile.TemporaryDirectory(prefix="loraconv-") as scratch, open_model(model) as base:
        _check_class(base)
        request = _request(base, one, alpha, dtype or "fp32", Path(scratch))
        if other is not None and kind == "fused":
            request = replace(request, fused=_fused_folder(other, base))
        elif other is not None:
            second, pairs = _adapter(other, Path(scratch) / "other", base, None)
            request = replace(request, other=second, other_modules=len(pairs), apart=_apart(request.dtypes, pairs))
        found = run_forward(request)
        base.check_unchanged()
    outputs = tuple(Output(p.what, p.distance, p.allowed, p.strength, p.within) for p in found.passes)
    findings = tuple(_findings(found, model, one, other))
    told = (str(model), str(one), str(other or ""), kind, request.dtype, found.inputs, found.effect, found.bound)
    return ForwardResult(not findings, findings, *told, outputs, dict(found.mistakes), found.changed)


def _request(base: Model, one: str | Path, alpha: float | None, dtype: str, scratch: Path) -> Request:
    file, pairs = _adapter(one, scratch / "one", base, alpha)
    rank = max(pair.shape[1] for pair in pairs.values())
    return Request(base.folder, file, len(pairs), rank, _dtypes(pairs), dtype, scratch)


def _is_model(path: Path) -> bool:
    """A folder with weights of a model; a folder with an adapter beside a model is taken for the model."""
    marks = (path / PIPELINE, part_of(path) / CONFIG)
    return any(mark.is_file() for mark in marks) or any(path.glob("diffusion_pytorch_model*"))


def _check_class(model: Model) -> None:
    name = (model.config or {}).get("_class_name")
    if name != _CLASS:
        raise FormatError(
            f"{printable(str(model.path))} is no {_CLASS} with its {CONFIG}",
            why=f"its {CONFIG} says {printable(repr(name), 60)}" if model.config else f"it has no {CONFIG}",
            hint=_HINT,
            slug="wrong-model",
        )


def _adapter(path: str | Path, out: Path, base: Model, alpha: float | None) -> tuple[Path, dict[str, Pair]]:
    """The diffusers file of an adapter, converted into ``out`` if it is in another format, and its factors."""
    with open_source(path) as source:
        pairs = adapter_pairs(source, alpha)
        _check_fit(path, pairs, base)
        if detect(source).dialect.name == "diffusers" and alpha is None:
            return source.files[0].path, pairs
    convert(path, out=out, to="diffusers", alpha=alpha)
    return out / "pytorch_lora_weights.safetensors", pairs


def _check_fit(path: str | Path, pairs: Mapping[str, Pair], base: Model) -> None:
    """Every module of the adapter is one of the model, of its size."""
    wrong = {}
    for module, pair in pairs.items():
        weight = base.tensors.get(f"{module}.weight")
        rows, _, columns = pair.shape
        if weight is None or weight.shape[:2] != (rows, columns):
            wrong[module] = f"{rows} x {columns}", weight and " x ".join(map(str, weight.shape))
    if wrong:
        size, there = next(iter(wrong.values()))
        raise FormatError(
            f"the adapter does not fit the model: {len(wrong)} of its {len(pairs)} modules",
            where="; ".join(fold_names(wrong)[:4]),
            why=f"the adapter is for {size}, and the model has {there or 'no such module'}",
            hint=f"loraconv inspect {quoted(path)}",
            slug="wrong-model",
        )


def _fused_folder(path: str | Path, base: Model) -> Path:
    """The folder of the fused model, which has the base's tensors in name and shape."""
    with open_model(path) as fused:
        _check_class(fused)
        shapes = [{name: ref.shape for name, ref in model.tensors.items()} for model in (base, fused)]
        if shapes[0] != shapes[1]:
            apart = sorted(n for n in {**shapes[0], **shapes[1]} if shapes[0].get(n) != shapes[1].get(n))
            raise FormatError(
                f"{printable(str(path))} is not that model with an adapter fused in",
                where="; ".join(fold_names(apart)[:4]),
                why="these tensors are missing, unexpected or of another shape",
                hint=_HINT,
                slug="wrong-model",
            )
        return fused.folder


def _dtypes(pairs: Mapping[str, Pair]) -> frozenset[str]:
    return frozenset(tensor.dtype for pair in pairs.values() for tensor in (pair.down, pair.up))


def _apart(dtypes: frozenset[str], others: Mapping[str, Pair]) -> float:
    """What storing both factors in another dtype can make of a delta, relative to it."""
    both = dtypes | _dtypes(others)
    return 0.0 if len(both) == 1 else 2 * max(ROUNDING[dtype] for dtype in both)


def _findings(found: Forward, model: str | Path, one: str | Path, other: str | Path | None) -> Iterator[Finding]:
    for output in found.passes:
        if output.cause:
            mend = f"loraconv fuse {quoted(one)} --base {quoted(model)} -o OUT"
            if other is not None and output.what == OTHER:
                mend = f"loraconv verify {quoted(one)} {quoted(other)}"
            yield Finding("forward", f"{output.what}: {output.cause}", mend, ())
    if found.changed:
        names = "; ".join(fold_names(found.changed)[:4])
        yield Finding("reload", f"saving and loading the model changed {names}", _HINT, ())
