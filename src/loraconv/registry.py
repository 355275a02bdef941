"""Which formats and model families exist: the tables in ``loraconv.converters``, and those that other packages add.

Another package adds a table by an entry point of the group ``loraconv.formats`` that names a :class:`Dialect` or a
:class:`Family`. Nothing registers itself by being imported.
"""

from __future__ import annotations

import importlib
import os
import sys
from dataclasses import replace
from difflib import get_close_matches
from functools import cache
from pathlib import Path

from loraconv.errors import FormatError
from loraconv.rules import Dialect, Family

_GROUP = "loraconv.formats"
_TABLES = {
    "loraconv.converters.sat":                  "SAT",
    "loraconv.converters.diffusers":            "DIFFUSERS",
    "loraconv.converters.peft":                 "PEFT",
    "loraconv.converters.ai_toolkit":          "AI_TOOLKIT",
    "loraconv.converters.bfl_control":         "BFL_CONTROL",
    "loraconv.converters.comfyui":             "COMFYUI",
    "loraconv.converters.diffsynth":           "DIFFSYNTH",
    "loraconv.converters.diffusers_old":       "DIFFUSERS_OLD",
    "loraconv.converters.diffusion_pipe":      "DIFFUSION_PIPE",
    "loraconv.converters.finetrainers":        "FINETRAINERS",
    "loraconv.converters.genmo":               "GENMO",
    "loraconv.converters.kohya":               "KOHYA",
    "loraconv.converters.lycoris":             "LYCORIS",
    "loraconv.converters.onetrainer":          "ONETRAINER",
    "loraconv.converters.sat_lora":            "SAT_LORA",
    "loraconv.converters.simpletuner":         "SIMPLETUNER",
    "loraconv.converters.tencent":             "TENCENT",
    "loraconv.converters.videox_fun":          "VIDEOX_FUN",
    "loraconv.converters.xlabs":               "XLABS",
    "loraconv.converters.models.cogvideox":     "COGVIDEOX",
    "loraconv.converters.models.flux":          "FLUX",
    "loraconv.converters.models.hunyuan_video": "HUNYUAN_VIDEO",
    "loraconv.converters.models.llama":         "LLAMA",
    "loraconv.converters.models.llava":         "LLAVA",
    "loraconv.converters.models.ltx_video":     "LTX_VIDEO",
    "loraconv.converters.models.mochi":         "MOCHI",
    "loraconv.converters.models.qwen_image":    "QWEN_IMAGE",
    "loraconv.converters.models.sd3":           "SD3",
    "loraconv.converters.models.sdxl":          "SDXL",
    "loraconv.converters.models.wan":           "WAN",
    "loraconv.converters.models.z_image":       "Z_IMAGE",
}  # fmt: skip


@cache
def _tables() -> tuple[Dialect | Family, ...]:
    own = [getattr(importlib.import_module(module), name) for module, name in _TABLES.items()]
    return (*own, *_third_party())


def _third_party() -> list[Dialect | Family]:
    if not _some_package_adds_formats():
        return []
    from importlib.metadata import entry_points

    found: list[Dialect | Family] = []
    for point in entry_points(group=_GROUP):
        try:
            table = point.load()
        except Exception as error:  # another package's code: whatever it raises, the user needs its name
            raise _not_a_table(point.name, point.value, f"{type(error).__name__}: {error}") from None
        if not isinstance(table, Dialect | Family):
            raise _not_a_table(point.name, point.value, f"it is {type(table).__name__}")
        found.append(table)
    return found


def _not_a_table(name: str, value: str, why: str) -> FormatError:
    return FormatError(
        f"the entry point {name} of the group {_GROUP} gives neither a Dialect nor a Family",
        where=value,
        why=why,
        hint=f"uninstall or correct the package that declares {value}",
        slug="format-plugin",
    )


def _some_package_adds_formats() -> bool:
    """True if an installed package declares the entry-point group (much cheaper to find out than with importlib)."""
    for place in dict.fromkeys(sys.path):
        try:
            infos = [e.path for e in os.scandir(place or ".") if e.name.endswith((".dist-info", ".egg-info"))]
        except OSError:
            continue
        for info in infos:
            try:
                text = Path(info, "entry_points.txt").read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                continue
            if f"[{_GROUP}]" in text:
                return True
    return False


def dialects() -> tuple[Dialect, ...]:
    """Every known dialect, loraconv's own first."""
    return tuple(t for t in _tables() if isinstance(t, Dialect))


@cache
def families() -> tuple[Family, ...]:
    """Every known model family, loraconv's own first. A second table of a family's name adds its spellings to it."""
    merged: dict[str, Family] = {}
    for table in _tables():
        if not isinstance(table, Family):
            continue
        known = merged.get(table.name)
        spellings = {**(known.spellings if known else {}), **table.spellings}
        merged[table.name] = replace(known or table, spellings=spellings)
    return tuple(merged.values())


def dialect(name: str) -> Dialect:
    """The dialect of this name; raises :class:`FormatError` with the nearest known name."""
    known = {d.name: d for d in dialects()}
    if name in known:
        return known[name]
    near = get_close_matches(name.lower(), known, n=1)
    raise FormatError(
        f"unknown format: {name!r}",
        why=f"known formats are {', '.join(known)}",
        hint=f"--to {near[0]}" if near else "loraconv formats",
        slug="format-unknown",
    )
