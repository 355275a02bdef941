"""``split``: one adapter as several, by layers, component or kind of module; every factor keeps its bytes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Literal

from loraconv.adapter import Adapter, Factor, layer_of
from loraconv.errors import FormatError, UsageError
from loraconv.fusion.adapters import Used
from loraconv.names import fold_names, printable, ranges
from loraconv.plan import plan_adapter
from loraconv.reshaping.opening import input_of, notices_of, open_for
from loraconv.reshaping.result import ModuleFacts, Part, ReshapeResult
from loraconv.reshaping.writing import Planned, adapter_paths, check_unchanged, proven_term, write
from loraconv.verifier.parts import PartOf, prove_parts

By = Literal["layers", "component", "module"]

_HINT = "loraconv split ADAPTER -o FOLDER --by layers"
_RANGE = re.compile(r"(\d{1,4})(?:-(\d{1,4}))?")
#: The parts of a pipeline, where a module's name begins with one.
_COMPONENT = re.compile(r"(text_encoder(?:_\d+)?|transformer(?:_\d+)?|unet)\.")


def split(
    adapter: str | Path,
    *,
    out: str | Path,
    by: By = "layers",
    layers: Sequence[str] = (),
    alpha: float | None = None,
    strict: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
) -> ReshapeResult:
    """Write the parts of an adapter as adapters of the same format, each into a folder of its own below ``out``.

    ``by`` makes one part of each layer, of each component of the pipeline, or of each kind of module (``attn1.to_q`` of
    all layers). ``layers`` are ranges such as ``0-13``, one part each; they must cover every layer once. Modules
    without a layer number are a part named ``other``. Every factor keeps its bytes and its scale, and the parts
    together are the adapter: that is proved. The other options are those of :func:`merge`, and so are the errors;
    :class:`FormatError` (``one-part``) where there is only one part.
    """
    options = {"alpha": alpha, "by": by, "layers": list(layers), "strict": strict}
    if layers and by != "layers":
        raise UsageError("--layers are ranges of layers, and --by says something else", hint=_HINT)
    with ExitStack() as opened:
        (used,) = open_for([adapter], opened, alpha=alpha, strict=strict, hint=_HINT)
        if used.strength != 1:
            raise UsageError("a split keeps every byte, so that no strength can be applied", hint=_HINT)
        groups = _groups(used, by, [_span(text) for text in layers])
        planned = [_planned(used, name, factors) for name, factors in groups.items()]
        notices = [*notices_of([used]), *(notice for one in planned for notice in one.plan.notices)]
        result = ReshapeResult(
            kind="split",
            out=Path(out),
            to=used.detected.dialect.name,
            inputs=(input_of(used),),
            modules=tuple(ModuleFacts(f.module, f.rank, f.rank, None) for f in used.adapter.factors),
            parts=tuple(Part(name, tuple(f.module for f in factors)) for name, factors in groups.items()),
            notices=tuple(dict.fromkeys(notices)),
            options=options,
            dry_run=dry_run,
        )
        if dry_run:
            return result
        return write(
            result,
            planned,
            inputs=adapter_paths([used]),
            unchanged=partial(check_unchanged, [used]),
            prove=partial(prove_parts, parts=[_part_of(one) for one in planned], source=proven_term(used).pairs),
            overwrite=overwrite,
        )


def _planned(used: Used, name: str, factors: Sequence[Factor]) -> Planned:
    # In the header the scale needs no number of a factor to change.
    target = used.detected.dialect
    return Planned(f"{name}/", plan_adapter(Adapter(tuple(factors)), target, used.detected.family, scale_in="metadata"))


def _part_of(planned: Planned) -> PartOf:
    plan = planned.plan
    modules = frozenset(factor.module for factor in plan.factors)
    return PartOf(
        planned.place, plan.dialect.name, tuple(file.name for file in plan.files), plan.dialect.sidecar, modules
    )


# ---------------------------------------------------------------------------------------------------------------------
# groups


def _groups(used: Used, by: By, spans: Sequence[tuple[int, int]]) -> Mapping[str, list[Factor]]:
    """Name of a part -> its factors, both in the order of the adapter."""
    found: dict[str, list[Factor]] = {f"layers-{_shown(span)}": [] for span in spans}
    for factor in used.adapter.factors:
        found.setdefault(_group(factor.module, by, spans, used.detected.family.component), []).append(factor)
    _check_spans(used, found, spans)
    if len(found) < 2:
        raise FormatError(
            f"there is nothing to split: by {by}, the adapter has one part, {next(iter(found))}",
            why=f"it has {'; '.join(fold_names(f.module for f in used.adapter.factors)[:4])}",
            hint=_HINT if by != "layers" else "loraconv split ADAPTER -o FOLDER --by module",
            slug="one-part",
        )
    return found


def _group(module: str, by: By, spans: Sequence[tuple[int, int]], component: str) -> str:
    """The name of the part that a module belongs to; it becomes the name of a folder."""
    layer = layer_of(module)
    if by == "component":
        own = _COMPONENT.match(module)
        return own.group(1) if own else component
    if by == "module":
        return re.sub(r"[^A-Za-z0-9_.-]", "_", ".".join(step for step in _kind(module, layer).split(".") if step))
    if layer is None:
        return "other"
    span = next((span for span in spans if span[0] <= layer <= span[1]), (layer, layer))
    return f"layers-{_shown(span)}"


def _kind(module: str, layer: int | None) -> str:
    """``attn1.to_q`` of ``transformer_blocks.3.attn1.to_q``."""
    return module if layer is None else module.partition(f".{layer}.")[2] or module


def _shown(span: tuple[int, int]) -> str:
    return str(span[0]) if span[0] == span[1] else f"{span[0]}-{span[1]}"


def _span(text: str) -> tuple[int, int]:
    found = _RANGE.fullmatch(text)
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
    if first > last:
        raise UsageError(f"not a range of layers: {printable(text, 60)}", hint="--layers 0-13,14-27")
    return first, last


def _check_spans(used: Used, found: Mapping[str, list[Factor]], spans: Sequence[tuple[int, int]]) -> None:
    """Every layer in one range, and every range with a layer; without ranges, any layer will do."""
    if not spans:
        return
    outside = [layer for layer in used.adapter.layers if not any(a <= layer <= b for a, b in spans)]
    twice = [layer for layer in used.adapter.layers if sum(a <= layer <= b for a, b in spans) > 1]
    empty = [name for name, factors in found.items() if not factors]
    if outside or twice or empty:
        told = [("in no range", outside), ("in several", twice)]
        why = [f"{what}: {ranges(numbers)}" for what, numbers in told if numbers]
        raise UsageError(
            "the ranges of --layers are not the adapter's layers, each once",
            why="; ".join([*why, *(f"nothing in {name}" for name in empty)]),
            hint=f"the adapter has layers {ranges(used.adapter.layers)}",
            slug="layers",
        )
