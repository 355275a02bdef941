"""Precomputed latents and embeddings: names, shapes, finite numbers, and a scale that can be right.

Numbers are looked at a piece at a time, in float64; torch is not needed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from loraconv.data.check_videos import Wanted
from loraconv.data.fields import missing
from loraconv.data.latents import file_digest
from loraconv.data.problems import Findings
from loraconv.data.settings import SPATIAL, TEMPORAL
from loraconv.data.tensors import TORCH_DTYPES
from loraconv.errors import LoraconvError
from loraconv.io.input_file import InputFile
from loraconv.io.safetensors_read import read_safetensors
from loraconv.lazy import TensorRef, decode
from loraconv.names import printable

CHANNELS = 16
DIMENSIONS = {"latents": 4, "prompt_embeds": 2, "image_latents": 4}

#: A VAE's scaling factor makes the standard deviation of latents about 1 over its training data; single videos differ.
LEAST, GREATEST = 0.1, 5.0

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Moments:
    """Of all numbers of a tensor; ``deviation`` is meaningless unless ``finite``."""

    finite: bool
    deviation: float
    greatest: float


def check_latents(files: list[Path], wanted: Wanted, findings: Findings) -> None:
    """Check every sample file of a folder."""
    contents: dict[str, str] = {}
    shapes: dict[str, Shapes] = {}
    for path in files:
        name = printable(path.name)
        try:
            earlier = contents.setdefault(file_digest(path), name)
            if earlier != name:
                findings.add("content-duplicate", name, f"as {earlier}")
                continue
            with InputFile(path) as file:
                shapes[name] = _check_file(name, read_safetensors(file).tensors, wanted, findings)
        except LoraconvError as error:
            findings.add("tensors-unreadable", name, error.why or error.what)
    _check_majority(shapes, findings)


def _check_file(name: str, tensors: Mapping[str, TensorRef], wanted: Wanted, findings: Findings) -> Shapes:
    """Check one file; returns the shapes of the tensors that can be compared with other samples'."""
    shapes: Shapes = {}
    for key, dimensions in DIMENSIONS.items():
        if key not in tensors:
            if key != "image_latents":
                findings.add("tensor-missing", name, missing(key, tensors))
            continue
        ref = tensors[key]
        problem = _wrong_shape(key, ref, dimensions, wanted)
        if ref.dtype not in TORCH_DTYPES:
            findings.add("tensors-unreadable", name, f"{key} holds {ref.dtype}")
        elif problem:
            findings.add("tensor-shape", name, problem)
        else:
            shapes[key] = ref.shape
            _check_numbers(name, key, ref, findings)
    if "latents" in shapes:
        findings.count("latents", " x ".join(map(str, shapes["latents"])))
    if "image_latents" in shapes:
        _check_image(name, tensors["image_latents"], shapes, findings)
    return shapes


def _wrong_shape(key: str, ref: TensorRef, dimensions: int, wanted: Wanted) -> str:
    shape = list(ref.shape)
    if len(shape) != dimensions or 0 in shape:
        return f"{key} is {shape}, not {dimensions} dimensions"
    if dimensions != 4:
        return ""
    if shape[1] != CHANNELS and shape[0] == CHANNELS:
        return f"{key} is {shape}: its channels stand before its frames"
    needed = [
        wanted.frames and (wanted.frames - 1) // TEMPORAL + 1,
        None,
        wanted.height and wanted.height // SPATIAL,
        wanted.width and wanted.width // SPATIAL,
    ]
    # CogVideoX 1.5 has one frame more where the number is odd.
    if needed[0] and shape[0] == needed[0] + needed[0] % 2:
        needed[0] = shape[0]
    if any(want and want != have for want, have in zip(needed, shape, strict=True)):
        return f"{key} is {shape}, not [{', '.join(str(want or 'any') for want in needed)}]"
    return ""


def _check_numbers(name: str, key: str, ref: TensorRef, findings: Findings) -> None:
    moments = _moments(ref)
    if not moments.finite:
        findings.add("not-finite", name, key)
    elif key == "prompt_embeds":
        if moments.greatest == 0:
            findings.add("embeds-zero", name)
    elif key == "latents" and not LEAST <= moments.deviation <= GREATEST:
        findings.add("latents-scale", name, f"standard deviation {moments.deviation:.3g}, about 1 is usual")


def _moments(ref: TensorRef) -> Moments:
    import numpy as np

    count, total, squares, greatest = 0, 0.0, 0.0, 0.0
    for piece in ref.pieces():
        values = decode(piece, ref.dtype)
        if not np.isfinite(values).all():
            return Moments(False, math.nan, math.nan)
        # float64 overflows on what float64 files may hold; infinity is then the honest answer.
        with np.errstate(over="ignore"):
            total, squares = total + float(values.sum()), squares + float((values * values).sum())
        count, greatest = count + values.size, max(greatest, float(np.abs(values).max()))
    variance = squares / count - (total / count) ** 2
    return Moments(True, math.inf if math.isnan(variance) else math.sqrt(max(0.0, variance)), greatest)


def _check_image(name: str, ref: TensorRef, shapes: Shapes, findings: Findings) -> None:
    """The image is the first frame; CogVideoX 1.5 may repeat it once; every other frame is zero."""
    if shapes.get("latents", ref.shape) != ref.shape:
        findings.add("tensor-shape", name, f"image_latents is {list(ref.shape)}, latents {list(shapes['latents'])}")
        return
    first = b"".join(ref.rows(0, 1).pieces())
    for number in range(1, ref.shape[0]):
        frame = b"".join(ref.rows(number, number + 1).pieces())
        if any(frame) and not (number == 1 and frame == first):
            findings.add("image-rest", name, f"frame {number} is not zero")
            return


def _check_majority(shapes: dict[str, Shapes], findings: Findings) -> None:
    for key in DIMENSIONS:
        have = {name: found[key] for name, found in shapes.items() if key in found}
        for most, count in Counter(have.values()).most_common(1):
            if count * 2 <= len(have):
                continue
            for name, shape in have.items():
                if shape != most:
                    findings.add("shape-mixed", name, f"{key} is {list(shape)}, most are {list(most)}")
        if key == "image_latents" and have:
            for name in sorted(set(shapes) - set(have)):
                findings.add("tensor-missing", name, "no 'image_latents'; other samples have them")
