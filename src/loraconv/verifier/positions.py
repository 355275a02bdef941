"""The table of positions that diffusers computes for a CogVideoX without rotary embeddings.

Such a model (2B) keeps no table in its diffusers weights: it is computed from the configuration. So that is
right only if the computation gives the table that the model was trained with, which its SAT checkpoint holds.

Definition: ``diffusers.models.embeddings.get_3d_sincos_pos_embed``: a quarter of the width for the frame, three eighths
each for column and row; in each part the sines of ``position / 10000 ** (2 i / width)``, then the cosines.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from loraconv.lazy import TensorRef, read
from loraconv.verifier.numbers import HALF_ULP

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]


def frames_of(config: Mapping[str, Any]) -> Iterator[Array]:
    """The table in float32, piece by piece: the rows of the text, which are zero, then each frame's
    ``(rows * columns, width)``, in the same memory."""
    import numpy as np

    width = config["num_attention_heads"] * config["attention_head_dim"]
    frames, rows, columns = _grid(config)
    spatial, temporal = config["spatial_interpolation_scale"], config["temporal_interpolation_scale"]
    by_frame = _waves(np.arange(frames) / temporal, width // 4)
    by_row = _waves(np.arange(rows) / spatial, width * 3 // 8)[:, None, :]
    by_column = _waves(np.arange(columns) / spatial, width * 3 // 8)[None, :, :]
    yield np.zeros((config["max_text_seq_length"], width), np.float32)
    table = np.empty((rows, columns, width), np.float32)
    ends = width // 4, width // 4 + by_column.shape[-1]
    table[..., ends[0] : ends[1]], table[..., ends[1] :] = by_column, by_row
    for own in by_frame:
        table[..., : ends[0]] = own
        yield table.reshape(-1, width)


def _grid(config: Mapping[str, Any]) -> tuple[int, int, int]:
    patch = config["patch_size"]
    frames = (config["sample_frames"] - 1) // config["temporal_compression_ratio"] + 1
    return frames, config["sample_height"] // patch, config["sample_width"] // patch


def _waves(positions: Array, width: int) -> Array:
    import numpy as np

    angles = np.outer(positions, 10000.0 ** -(np.arange(width // 2) / (width / 2)))
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def _single(tensor: TensorRef) -> Array:
    """A tensor's values in float32, in memory of their own."""
    import numpy as np

    if tensor.dtype == "F16":
        return np.frombuffer(b"".join(tensor.pieces()), dtype="<f2").astype(np.float32).reshape(tensor.shape)
    return read(tensor).astype(np.float32)


def agrees(stored: TensorRef, config: Mapping[str, Any]) -> tuple[bool, float, float]:
    """``(agrees, greatest difference, bound)`` of a checkpoint's table ``(1, positions, width)`` against ours.

    The bound: half a unit in the last place of the stored dtype at 1, and the angle, at most the greatest position,
    from four float32 roundings (position, scale, frequency, product) in whoever computed it.
    """
    import numpy as np

    # Working in float32 rounds either number once, and the difference, which is at most 2.
    bound = HALF_ULP[stored.dtype][0] + (max(_grid(config)) * 4 + 4) * HALF_ULP["F32"][0]
    frames, rows, columns = _grid(config)
    width = config["num_attention_heads"] * config["attention_head_dim"]
    if stored.shape != (1, config["max_text_seq_length"] + frames * rows * columns, width):
        return False, float("inf"), bound
    flat = replace(stored, shape=stored.shape[1:], strides=stored.strides[1:] if stored.strides else None)
    at, gap = 0, 0.0
    for own in frames_of(config):
        off = _single(flat.rows(at, at + len(own)))
        off -= own
        gap = float(np.maximum(gap, np.max(np.abs(off, out=off), initial=0.0)))  # NaN stays
        at += len(own)
    return gap <= bound, gap, bound
