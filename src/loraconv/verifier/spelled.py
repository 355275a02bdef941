"""The keys of an adapter file as they really stand: names that its consumers pass over, magnitudes beside the factors.

In memory peft writes the adapter's own name into a key (``lora_A.default.weight``), and ``save_pretrained`` takes it
out; a trainer that dumps its state dict leaves it in. DoRA keeps a magnitude for every row: ``lora_magnitude_vector``
in peft and diffusers, ``dora_scale`` in kohya's spelling.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

from loraconv.lazy import Joined, TensorRef
from loraconv.names import FLOAT_DTYPES
from loraconv.verifier.diagnosis import Finding, finding
from loraconv.verifier.numbers import HALF_ULP, Tensor, rounded_once, same_numbers, values
from loraconv.verifier.original_names import Share, here
from loraconv.verifier.pipeline_names import of_pipeline, of_text_encoders
from loraconv.verifier.proof import Check

Tensors = Mapping[str, TensorRef]

_IN_MEMORY = re.compile(r"(.+\.lora_[AB])\.([^.]+)(\.weight)")
_MAGNITUDE = re.compile(r"(.+?)\.(?:lora_magnitude_vector(?:\.[^.]+){0,2}|dora_scale)")
_ORIGINAL = ("lora_unet_", "lora_transformer_", "lycoris_", "diffusion_model.")
_PREFIXES = ("base_model.model.", "transformer.", *_ORIGINAL)
#: What the names of a UNet's and of text encoders' modules begin with, in any format.
_OF_PARTS = {
    "base_model.model.": "unet",
    "diffusion_model.": "unet",
    "lora_unet_": "unet",
    "lycoris_": "unet",
    "lora_te1_": "text_encoder",
    "text_encoders.clip_l.transformer.": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "text_encoders.clip_g.transformer.": "text_encoder_2",
}


@dataclass(frozen=True, slots=True)
class Keys:
    """``plain``: everything but magnitudes, under the names that the format defines. ``magnitudes``: by module
    (diffusers name). ``in_memory``: key -> the adapter's name in it."""

    plain: dict[str, TensorRef]
    magnitudes: dict[str, Tensor]
    in_memory: dict[str, str]


def sort_keys(tensors: Tensors) -> Keys:
    """The keys of an adapter, sorted; a key that is no adapter's stays as it is."""
    keys, magnitudes = Keys({}, {}, {}), dict[str, TensorRef]()
    for name, ref in tensors.items():
        magnitude, named = _MAGNITUDE.fullmatch(name), _IN_MEMORY.fullmatch(name)
        if magnitude is not None and ref.dtype in FLOAT_DTYPES:
            magnitudes[magnitude.group(1)] = ref
        elif named is not None and named.group(1) + named.group(3) not in tensors:
            keys.in_memory[name] = named.group(2)
            keys.plain[named.group(1) + named.group(3)] = ref
        else:
            keys.plain[name] = ref
    keys.magnitudes.update(magnitudes_of(magnitudes))
    return keys


def apart(tensors: Tensors) -> tuple[dict[str, TensorRef], dict[str, Tensor]]:
    """``(everything else, magnitudes by diffusers module)``."""
    found = {name: _MAGNITUDE.fullmatch(name) for name in tensors}
    magnitudes = {match[1]: tensors[name] for name, match in found.items() if match is not None}
    return {name: ref for name, ref in tensors.items() if found[name] is None}, magnitudes_of(magnitudes)


def magnitudes_of(spelled: Tensors) -> dict[str, Tensor]:
    """Module (diffusers name) -> magnitudes, from those by the module's name in the file."""
    if modules := of_pipeline(list(spelled), _OF_PARTS):
        return dict(zip(modules, spelled.values(), strict=True))
    if encoders := of_text_encoders(list(spelled), _OF_PARTS):
        rest = magnitudes_of({name: ref for name, ref in spelled.items() if name not in encoders})
        return {**{module: spelled[name] for name, module in encoders.items()}, **rest}
    bare = [next((name[len(p) :] for p in _PREFIXES if name.startswith(p)), name) for name in spelled]
    flattened = any(name.startswith(_ORIGINAL) for name in spelled)
    shares = here(bare, original=True) if flattened else [[Share(name)] for name in bare]
    made: dict[str, Tensor] = {}
    for ref, parts in zip(spelled.values(), shares, strict=True):
        if ref.shape[0] == 1:
            # Columns have one norm over the rows of all parts, which is that of no part.
            made[" and ".join(share.module for share in parts)] = ref
            continue
        for share in parts:
            height = ref.shape[0] // share.of
            made[share.module] = Joined(tuple(ref.rows(n * height, (n + 1) * height) for n in share.chunks), 0)
    return made


def passed_over(keys: Keys, kind: str, prefix: str, has_settings: bool) -> Iterator[Finding]:
    """What the consumers of a format would not load, though the numbers are there.

    ``kind`` is the format, ``prefix`` what stands before its module names, ``has_settings`` whether peft's settings
    file is beside it. Facts: diffusers 0.42 ``loaders/peft.py`` (keys without the component's prefix are dropped, since
    0.33), peft 0.21 ``utils/save_and_load.py`` (the adapter's name is put in unless it is there already).
    """
    foreign = [name for name, adapter in keys.in_memory.items() if kind != "peft" or adapter != "default"]
    if foreign:
        yield finding(
            "in-memory-names",
            "the second's keys hold an adapter's name, as in memory; diffusers loads nothing of them, and peft only"
            " under that very name:",
            foreign,
            "loraconv convert {one} -o OUT --to {to}",
        )
    if kind == "diffusers" and not prefix:
        yield finding(
            "no-prefix",
            "the second's keys lack the prefix transformer., so load_lora_weights of diffusers 0.33 and later passes"
            " over:",
            keys.plain,
            f"loraconv convert {'{one}' if keys.in_memory else '{other}'} -o OUT --to diffusers",
        )
    if kind == "diffusers" and has_settings:
        yield finding(
            "peft-prefix",
            "there is an adapter_config.json beside the second, but its keys lack the prefix base_model.model., so that"
            " peft passes over:",
            keys.plain,
            "loraconv convert {one} -o OUT --to peft",
        )
    if kind == "peft" and not has_settings:
        yield finding(
            "foreign-prefix",
            "the second's keys are peft's and there is no adapter_config.json beside them: peft cannot load the file,"
            " and diffusers 0.33 and later passes over:",
            keys.plain,
            "loraconv convert {one} -o OUT --to diffusers",
        )


@dataclass(frozen=True, slots=True)
class Magnitudes:
    """The DoRA magnitudes of two adapters: how many modules of each have them, and in how many they are equal."""

    one: int
    other: int
    equal: int


def compare_magnitudes(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> tuple[Magnitudes, list[Finding]]:
    """The magnitudes of two adapters by module, and what is wrong with those of the second."""
    findings = []
    lost, gained = [m for m in one if m not in other], [m for m in other if m not in one]
    differing = [m for m in one if m in other and not _same_values(one[m], other[m])]
    if lost:
        findings.append(
            finding(
                "dora-lost",
                "the second lost the DoRA magnitudes: what is left is a plain LoRA, which computes something else, in",
                lost,
                "keep {one}, or fuse it into its base: loraconv fuse {one} --base BASE -o OUT",
            )
        )
    if gained:
        text = "only the second has DoRA magnitudes, in"
        findings.append(finding("dora-gained", text, gained, "loraconv inspect {other} --verbose"))
    if differing:
        text = "the DoRA magnitudes differ in"
        findings.append(finding("dora-differs", text, differing, "copy them from {one} again"))
    return Magnitudes(len(one), len(other), len(one) - len(lost) - len(differing)), findings


def check_magnitudes(expected: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> Check:
    """Every magnitude of a DoRA, the same number as in the source."""
    _, findings = compare_magnitudes(expected, stored)
    narrowed = any(stored[m].dtype != ref.dtype for m, ref in expected.items() if m in stored)
    detail = "; ".join([f.sentence for f in findings] + ["in another dtype"] * narrowed)
    return Check("L1", "magnitudes of DoRA", not detail, len(expected), detail=detail)


def by_column(magnitudes: Tensor) -> bool:
    """True for magnitudes of the columns of the weight, (1, in), and not of its rows, (out,) or (out, 1)."""
    return len(magnitudes.shape) > 1 and magnitudes.shape[0] == 1 < prod(magnitudes.shape)


def _same_values(one: Tensor, other: Tensor) -> bool:
    """Equal numbers, in any shape of one size; in two dtypes, within a rounding to the narrower."""
    first, second = values(one).ravel(), values(other).ravel()
    if first.shape != second.shape or by_column(one) != by_column(other):
        return False
    if one.dtype == other.dtype:
        return same_numbers(first, second)
    return rounded_once(first, second, max(one.dtype, other.dtype, key=HALF_ULP.__getitem__))
