"""One adapter and the consumers of a table: would each load it, what would it drop, and at what scale would it apply
every module, against the scale as trained?

``same`` is true if some consumer of the table is made for the file's format, and each of those applies every module at
the scale as trained and drops nothing that matters. What the other consumers would do is told, and judged by nobody:
no file suits all of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from loraconv.adapter import read_adapter
from loraconv.detect import Detected, detect
from loraconv.errors import FormatError, LoraconvError
from loraconv.names import fold_names, printable, quoted
from loraconv.scale import given_alpha
from loraconv.source import Source, open_source
from loraconv.verification.adapters import adapter_pairs
from loraconv.verification.result import VerifyResult, number
from loraconv.verifier.consumers.prediction import read_with, spelled_scales
from loraconv.verifier.consumers.reading import AdapterFile, Reading, Scale
from loraconv.verifier.consumers.table import CONSUMERS, ByConfig, ByName, Consumer
from loraconv.verifier.diagnosis import Finding
from loraconv.verifier.spelled import sort_keys

Scales = Mapping[str, Scale]


@dataclass(frozen=True, slots=True)
class Use:
    """What one consumer does with the file. ``meant``: the file's format is made for it. ``exact``: it applies the
    adapter as trained. ``sentence`` says it in words, and ``mend`` is the command that makes it exact, if any does."""

    consumer: str
    meant: bool
    exact: bool
    sentence: str
    mend: str
    reading: Reading


@dataclass(frozen=True, slots=True)
class ConsumersResult(VerifyResult):
    """``format`` is the file's, empty if loraconv knows none like it; ``trained`` is module -> scale as trained."""

    mode: ClassVar[str] = "consumers"

    path: str = ""
    format: str = ""
    trained: Scales = field(default_factory=dict)
    uses: tuple[Use, ...] = ()

    def details(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "format": self.format,
            "consumers": [
                {
                    "consumer": use.consumer,
                    "meant": use.meant,
                    "exact": use.exact,
                    "sentence": use.sentence,
                    "mend": use.mend,
                    "why": use.reading.why,
                    "error": use.reading.error,
                    "unsure": use.reading.unsure,
                    "scales": [
                        {
                            "scale": float(scale),
                            "trained": None if trained is None else float(trained),
                            "ratio": None if not trained else number(float(scale) / float(trained)),
                            "modules": modules,
                        }
                        for (scale, trained), modules in _groups(use.reading.scales, self.trained).items()
                    ],
                    "undefined": list(use.reading.undefined),
                    "dropped": list(use.reading.dropped),
                    "needs": use.reading.needs,
                }
                for use in self.uses
            ],
        }


def verify_consumers(path: str | Path, *, alpha: float | None = None) -> ConsumersResult:
    """Ask every consumer of the table. ``alpha`` is what the adapter was trained with, where its files do not say it.

    Raises :class:`FormatError` (``not-comparable``) where it is no CogVideoX adapter, and what opening it raises.
    """
    with open_source(path) as source:
        detected, why = _detected(source)
        trained = _trained(source, detected, alpha, why)
        unreadable = why or _unreadable(source, alpha)
        settings = source.config if source.config_path and source.config_path.suffix == ".json" else None
        training = bool(source.extras) or len(source.ranks) > 1
        file = AdapterFile(str(source.files[0].path), source.tensors, source.metadata, settings, training)
        format_name = detected.dialect.name if detected else ""
        command = f"loraconv convert {quoted(path)} -o OUT" + ("" if alpha is None else f" --alpha {alpha}")
        magnitudes, mixed, uses = bool(sort_keys(source.tensors).magnitudes), _mixed(source), []
        for consumer in CONSUMERS:
            reading = read_with(consumer, file)
            exact = _is_exact(reading, trained)
            mend = "" if exact else _mend(consumer, command, mixed, unreadable)
            sentence = _sentence(reading, trained, magnitudes)
            uses.append(Use(consumer.name, format_name in consumer.meant_for, exact, sentence, mend, reading))
        source.check_unchanged()
    same = any(use.meant for use in uses) and all(use.exact for use in uses if use.meant)
    findings = () if same else tuple(_findings(uses, command, unreadable))
    return ConsumersResult(same, findings, str(path), format_name, trained, tuple(uses))


def _detected(source: Source) -> tuple[Detected | None, LoraconvError | None]:
    """What the source is in the tables, or why it is nothing in them."""
    try:
        detected = detect(_plain(source))
    except FormatError as error:
        return None, error
    if detected.family.name != "cogvideox":
        raise FormatError(
            f"the consumers are known for CogVideoX, and {printable(str(source.path))} is for {detected.family.title}",
            hint=f"loraconv inspect {quoted(source.path)}",
            slug="not-comparable",
        )
    return detected, None


def _plain(source: Source) -> Source:
    """The source with its keys as its format defines them, less magnitudes."""
    return replace(source, ranks=[sort_keys(source.tensors).plain, *source.ranks[1:]])


def _trained(source: Source, detected: Detected | None, alpha: float | None, why: LoraconvError | None) -> Scales:
    """Module -> scale, from what says most: ``alpha``, the settings or header of the format, ``.alpha`` tensors, the
    format's convention."""
    stated = alpha is not None or source.config or {"lora_adapter_metadata", "lora_config"} & {*source.metadata}
    by_tensor = not stated and any(name.endswith(".alpha") for name in source.tensors)
    if detected is not None and not by_tensor:
        names = set(detected.ledger.factors)
        plain = _plain(source)
        ranks = [{name: ref for name, ref in tensors.items() if name in names} for tensors in plain.ranks]
        try:
            return {module: pair.scale for module, pair in adapter_pairs(replace(plain, ranks=ranks), alpha).items()}
        except FormatError as error:
            why = error
    scales = spelled_scales(source.tensors, given_alpha(alpha))
    if not scales:
        raise why or FormatError(
            f"{printable(str(source.path))} holds no factor of a CogVideoX module",
            hint=f"loraconv inspect {quoted(source.path)}",
            slug="not-comparable",
        )
    return scales


def _unreadable(source: Source, alpha: float | None) -> LoraconvError | None:
    """Why loraconv itself would not convert the source; None if it would."""
    try:
        read_adapter(source, detect(source), alpha=given_alpha(alpha))
    except LoraconvError as error:
        return error
    return None


def _mend(consumer: Consumer, command: str, mixed: bool, unreadable: LoraconvError | None) -> str:
    if isinstance(consumer, ByConfig) and consumer.config == "nowhere" and mixed:
        return "pip install -U diffusers"  # ranks that differ need a header, whatever the scale
    if unreadable is not None:
        return ""
    if consumer.mend:
        return f"{command} --to {consumer.mend}"
    instead = consumer.instead if isinstance(consumer, ByName) else ""
    return f"{command} --to diffusers, for {instead}" if instead else ""


def _mixed(source: Source) -> bool:
    """Whether the factors have different ranks, by the side that peft calls B."""
    return len({ref.shape[1] for name, ref in source.tensors.items() if "lora_B" in name and len(ref.shape) > 1}) > 1


def _is_exact(reading: Reading, trained: Scales) -> bool:
    scales = reading.scales
    return (
        not (reading.why or reading.unsure or reading.undefined or reading.needs)
        and set(scales) == set(trained)
        and all(_same(scales[module], scale) for module, scale in trained.items())
        and not _lost(reading)
    )


def _lost(reading: Reading) -> list[str]:
    """The dropped keys besides alpha, which counts by what it does to the scale."""
    return [name for name in reading.dropped if not name.endswith(".alpha")]


def _same(one: Scale, other: Scale) -> bool:
    return one == other or math.isclose(one, other, rel_tol=2.0**-50)


def _groups(scales: Scales, trained: Scales) -> dict[tuple[Scale, Scale | None], list[str]]:
    """(applied, trained) -> modules."""
    groups: dict[tuple[Scale, Scale | None], list[str]] = {}
    for module, scale in scales.items():
        groups.setdefault((scale, trained.get(module)), []).append(module)
    return groups


def _sentence(reading: Reading, trained: Scales, magnitudes: bool) -> str:
    if reading.why:
        return f"does not load it: {reading.why}" + (f' ("{reading.error}")' if reading.error else "")
    if reading.unsure:
        return f"cannot be told: {reading.unsure}"
    parts = [_strength(reading, trained)]
    if reading.undefined:
        shown = _folded(reading.undefined)
        parts.append(f"makes layers that it never fills, which give an error or arbitrary numbers: {shown}")
    if magnitudes and reading.scales and not reading.magnitudes:
        parts.append("leaves DoRA's magnitudes out, which makes it another adapter")
    if reading.dropped and reading.scales:
        parts.append(f"drops {_folded(reading.dropped)}")
    if reading.needs:
        parts.append(f"needs {reading.needs} or later, which knows every field of the configuration")
    return "; ".join([*parts, *([reading.note] if reading.note else [])])


def _strength(reading: Reading, trained: Scales) -> str:
    """How many modules it applies, and how strong against the training."""
    if not reading.scales:
        return "applies nothing and does not raise" + (": it drops every key" if reading.dropped else "")
    applied = f"applies {len(reading.scales)} of {len({*trained, *reading.scales})} modules"
    wrong = {
        (scale, told): modules
        for (scale, told), modules in _groups(reading.scales, trained).items()
        if told is not None and not _same(scale, told)
    }
    if not wrong:
        return f"{applied} at the scale as trained"
    told = [
        f"{_times(*scales)} as strong as trained"
        + ("" if len(modules) == len(reading.scales) else f" in {_folded(modules)}")
        for scales, modules in wrong.items()
    ]
    return f"{applied}, {'; '.join(told)}"


def _times(scale: Scale, trained: Scale | None) -> str:
    return f"{float(scale) / float(trained):.6g} times" if trained else "infinitely"


def _folded(names: Sequence[str]) -> str:
    folded = fold_names(names)
    return ", ".join(folded[:2]) + (f" and {len(folded) - 2} more" if len(folded) > 2 else "")


def _findings(uses: list[Use], command: str, unreadable: LoraconvError | None) -> list[Finding]:
    """What the file is not, for the consumers that it is meant for, and the one command that mends them."""
    why = f"; and loraconv cannot convert it: {unreadable.what}" if unreadable else ""
    if not any(use.meant for use in uses):
        mend = unreadable.hint if unreadable else f"{command} --to diffusers"
        return [Finding("no-consumer", f"no consumer of the table is made for a file of this format{why}", mend, ())]
    by_mend: dict[str, list[str]] = {}
    for use in uses:
        if use.meant and not use.exact:
            by_mend.setdefault(use.mend or (unreadable.hint if unreadable else ""), []).append(use.consumer)
    return [
        Finding("not-as-trained", f"it is not the adapter as trained in {', '.join(names)}{why}", mend, ())
        for mend, names in by_mend.items()
    ]
