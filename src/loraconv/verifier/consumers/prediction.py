"""What the consumers of the table would do with an adapter file: load it or raise, which keys they would drop, and at
what scale they would apply each module. Computed from the file's keys, shapes, header and settings, without them.

How many layers the model has is not known here: those that the file names are taken to be there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction

from loraconv.lazy import TensorRef
from loraconv.verifier.consumers.layers import read_by_config
from loraconv.verifier.consumers.reading import AdapterFile, Reading, Refused, Scale, Unsure, template
from loraconv.verifier.consumers.table import (
    CONSUMERS,
    DOTTED,
    FACTORS,
    MODULES,
    UNDERSCORED,
    ByConfig,
    ByName,
    Consumer,
)
from loraconv.verifier.numbers import values

Tensors = Mapping[str, TensorRef]
_BY_NAME = {consumer.name: consumer for consumer in CONSUMERS}
#: Nobody's rules: every spelling that some consumer knows.
_ANYONE = ByName(
    name="",
    meant_for=(),
    mend="",
    facts="",
    names=tuple((name, name) for name in MODULES),
    factors=FACTORS,
    dotted=DOTTED,
    underscored=UNDERSCORED,
)


def read_with(consumer: Consumer, file: AdapterFile) -> Reading:
    """What one consumer makes of the file."""
    if file.training:
        return Reading(consumer.name, why="it is a trainer's checkpoint, with more in it than an adapter")
    try:
        return read_by_config(consumer, file) if isinstance(consumer, ByConfig) else _read_by_name(consumer, file)
    except Refused as refusal:
        return Reading(consumer.name, why=refusal.why, error=refusal.message)
    except Unsure as doubt:
        return Reading(consumer.name, unsure=str(doubt))


@dataclass(frozen=True, slots=True)
class _Found:
    """The factors of one module by name, and the stem that they share."""

    stem: str
    down: str
    up: str


def _read_by_name(consumer: ByName, file: AdapterFile) -> Reading:
    word, other = consumer.delegates
    if word and any(word in key for key in file.tensors):
        reading = read_with(_BY_NAME[other], file)
        note = "; ".join([f"as the diffusers does that it runs with, here {other}", *_fusing(consumer, file)])
        return replace(reading, consumer=consumer.name, note=note)
    found = dict(_factors(consumer, file.tensors))
    used, scales, magnitudes = set(), {}, 0
    for module, factors in found.items():
        if factors.down not in file.tensors:
            raise Refused(factors.down, f"{factors.up} stands there without the other factor")
        scales[module] = _scale(file.tensors, factors)
        beside = [factors.stem + ".alpha", *([factors.stem + consumer.magnitude] if consumer.magnitude else [])]
        used |= {factors.down, factors.up, *(key for key in beside if key in file.tensors)}
        magnitudes += bool(consumer.magnitude) and beside[-1] in file.tensors
    dropped = tuple(key for key in file.tensors if key not in used)
    if dropped and consumer.unknown == "raises":
        raise Refused("Can't recognize LoRA", "it can place every key only if all are VideoX-Fun's or diffusers'")
    return Reading(consumer.name, scales=scales, dropped=dropped, magnitudes=magnitudes > 0, note=consumer.lacks)


def _factors(consumer: ByName, tensors: Tensors) -> Iterator[tuple[str, _Found]]:
    for key in tensors:
        for down, up in consumer.factors:
            stem = key.removesuffix(up)
            module = _module(consumer, stem) if stem != key else ""
            if module:
                yield module, _Found(stem, stem + down, key)
                break


def _module(consumer: ByName, stem: str) -> str:
    """The diffusers name of the module that a key's stem spells for the consumer, or an empty string."""
    for prefixes, underscored in ((consumer.dotted, False), (consumer.underscored, True)):
        for prefix in prefixes:
            if stem.startswith(prefix) and (module := _translated(stem[len(prefix) :], consumer.names, underscored)):
                return module
    return ""


def _translated(name: str, names: tuple[tuple[str, str], ...], underscored: bool) -> str:
    for theirs, ours in names:
        match = template(theirs, underscored).fullmatch(name)
        if match:
            return ours.replace("{i}", match.group(1)) if match.groups() else ours
    return ""


def _scale(tensors: Tensors, factors: _Found) -> Scale:
    alpha, rank = tensors.get(factors.stem + ".alpha"), tensors[factors.down].shape[0]
    if alpha is None:
        return Fraction(1)
    told = values(alpha).ravel()
    if told.size != 1:
        raise Refused("only one element tensors", f"{factors.stem}.alpha is no single number")
    return Fraction(float(told[0])) / rank if rank else Fraction(0)


def _fusing(consumer: ByName, file: AdapterFile) -> list[str]:
    return [
        f"with fuse_lora on it divides by the rank once more, because the file's path contains {word}"
        for word in consumer.divides
        if word in file.path.lower()
    ][:1]


def spelled_scales(tensors: Tensors, alpha: Fraction | None) -> dict[str, Scale]:
    """Module (diffusers name) -> scale of a file that spells its names in any way that some consumer knows: by
    ``alpha`` if it is given, else by the ``.alpha`` tensors beside the factors, else 1."""
    return {
        module: _scale(tensors, factors) if alpha is None else alpha / tensors[factors.down].shape[0]
        for module, factors in _factors(_ANYONE, tensors)
        if factors.down in tensors and tensors[factors.down].shape[0]
    }
