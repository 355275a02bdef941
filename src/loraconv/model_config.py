"""The configuration of a base model, told by its tensors first, by the trainer's own settings second.

Where neither tells, the released models' value is used. Two that contradict each other are an error.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from loraconv.errors import FormatError
from loraconv.io.sidecar import at
from loraconv.lazy import TensorRef
from loraconv.names import numel, printable
from loraconv.rules import By, Family, Has, Layers, Release, Setting, Size, match

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """diffusers' ``config.json``, and which of its values neither tensors nor settings tell."""

    values: dict[str, Any]
    assumed: tuple[str, ...]


def infer_config(family: Family, tensors: dict[str, TensorRef], sidecar: dict[str, Any] | None) -> ModelConfig:
    """The configuration of a base model whose tensors (trainer's names, prefix and ``.original`` removed) are given.

    Raises :class:`FormatError` where tensors and settings contradict each other or a value is missing or senseless.
    """
    shapes = {name: ref.shape for name, ref in tensors.items()}
    config: dict[str, Any] = {}
    assumed = []
    for setting in family.settings:
        known, config[setting.key] = _value(setting, shapes, sidecar, config)
        if not known and setting.sidecar:
            assumed.append(setting.key)
    return ModelConfig({"_class_name": family.model_class, **config}, tuple(assumed))


def _value(
    setting: Setting, shapes: Shapes, sidecar: dict[str, Any] | None, config: dict[str, Any]
) -> tuple[bool, Any]:
    """``(known, value)``: false where only the released models tell the value."""
    told = _from_sidecar(setting, sidecar)
    known, shown = _from_tensors(setting, shapes, config)
    if known and told is not None and told != shown:
        raise FormatError(
            f"the settings file says {setting.key} = {told}, the tensors say {shown}",
            why="the settings file belongs to another run",
            hint="put the settings file of this very run beside the checkpoint, or move it away",
            slug="config-contradiction",
        )
    if known or told is not None:
        return True, shown if known else told
    default = setting.default
    if isinstance(default, By):
        if config[default.key] not in default.cases:
            raise _underdetermined(setting.key)
        default = default.cases[config[default.key]]
    if default is None and isinstance(setting.tensors, Layers):
        raise _underdetermined(setting.key)
    return False, default


def _from_sidecar(setting: Setting, sidecar: dict[str, Any] | None) -> Any:
    """The trainer's own value, or None; raises :class:`FormatError` for one of another kind."""
    told = at(sidecar, setting.sidecar) if setting.sidecar and sidecar else None
    if setting.last and isinstance(told, list) and told:
        told = told[-1]
    if told is None:
        return None
    count = type(told) is int and 0 < told < 1 << 31
    fine = {
        "count": count,
        "number": count or (type(told) is float and 0 < told < math.inf),
        "flag": type(told) is bool,
    }[setting.kind]
    if not fine:
        raise FormatError(
            f"the settings file says {setting.key} = {printable(repr(told), 60)}",
            where=setting.sidecar,
            why=f"it must be a {setting.kind} ({'true or false' if setting.kind == 'flag' else 'above zero'})",
            hint="correct the settings file, or move it away",
            slug="config-senseless",
        )
    return told


def _from_tensors(setting: Setting, shapes: Shapes, config: dict[str, Any]) -> tuple[bool, Any]:
    """``(known, value)``: what the tensors alone say."""
    how = setting.tensors
    if isinstance(how, Has):
        every = all(name in shapes for name in how.every)
        return True, every and (not how.any_of or any(name in shapes for name in how.any_of))
    if isinstance(how, Layers):
        numbers = {int(fields["i"]) for name in shapes if (fields := match(how.name, name))}
        if numbers and numbers != set(range(len(numbers))):
            raise FormatError(
                f"layers are missing: the base holds {len(numbers)} of {max(numbers) + 1}", slug="layers-missing"
            )
        return bool(numbers), len(numbers)
    if isinstance(how, Size) and how.name in shapes:
        return True, _size(setting.key, how, shapes[how.name], config)
    return False, None


def _size(key: str, how: Size, shape: tuple[int, ...], config: dict[str, Any]) -> int | None:
    if any(dim >= len(shape) for dim in how.dims):
        raise _underdetermined(key)
    value = numel(shape[dim] for dim in how.dims) if how.dims else numel(shape)
    for name in how.over:
        divisor = 1 if config[name] is None else config[name]
        if type(divisor) is not int or divisor < 1 or value % divisor:
            raise FormatError(
                f"{key} does not follow from {how.name}",
                why=f"its shape {list(shape)} is not a multiple of {name} = {divisor}",
                hint="put the run's own settings file beside the checkpoint",
                slug="config-contradiction",
            )
        value //= divisor
    return None if value == how.none_if else value


def _underdetermined(key: str) -> FormatError:
    return FormatError(
        f"the model's {key} is unknown",
        why="neither the tensors nor a settings file beside the checkpoint tell it",
        hint="put the run's training_config.yaml into its folder",
        slug="config-unknown",
    )


def check_positions(family: Family, tensors: dict[str, TensorRef], config: dict[str, Any], told: bool) -> None:
    """Raise :class:`FormatError` where a table of positions in the checkpoint does not fit the sample size.

    ``told`` says that a settings file told the sample size.
    """
    frames = (config["sample_frames"] - 1) // config["temporal_compression_ratio"] + 1
    patch = config["patch_size"]
    area = (config["sample_height"] // patch) * (config["sample_width"] // patch)
    for table in family.positions:
        if table.name not in tensors:
            continue
        shape = tensors[table.name].shape
        rows = shape[table.dim] if len(shape) > table.dim else -1
        expected = frames * area + (config["max_text_seq_length"] if table.text else 0)
        if rows != expected:
            raise FormatError(
                f"the sample size does not fit the checkpoint's table of positions: {rows} rows, {expected} expected",
                why="the settings file belongs to another run"
                if told
                else "without the run's settings file only the released models' sample size is known",
                hint="put the run's own training_config.yaml into its folder",
                slug="config-contradiction" if told else "config-unknown",
            )


def release_of(family: Family, config: dict[str, Any]) -> tuple[Release | None, bool]:
    """The released model with this layout, and whether its size is that of the release too."""
    for release in family.releases:
        if all(config.get(key) == value for key, value in release.layout.items()):
            return release, all(config.get(key) == value for key, value in release.size.items())
    return None, False
