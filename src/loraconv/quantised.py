"""How the usual tools mark a quantised model, so that it is refused with its reason instead of being fused wrongly.

Facts: beside a weight bitsandbytes writes ``.absmax``, ``.quant_map``, ``.quant_state.*`` (4 bit) and ``.SCB`` (8 bit),
ComfyUI's scaled fp8 ``scale_weight`` and ``scaled_fp8``, compressed-tensors and modelopt ``weight_scale``; in its place
optimum-quanto has ``weight._data`` and torchao ``_weight_qdata``, with the types in the header under ``tensor_names``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from loraconv.errors import FormatError
from loraconv.lazy import TensorRef
from loraconv.names import fold_names, printable

_MARKS = {
    "bitsandbytes, 4 bit":    re.compile(r".*\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..+)"),
    "bitsandbytes, 8 bit":    re.compile(r".*\.(SCB|weight_format)"),
    "fp8 with scales":        re.compile(r"(.*\.)?(scale_weight|scale_input|scaled_fp8|weight_scale(_inv|_2)?)"),
    "torchao":                re.compile(r".*\._?\w*_qdata"),
    "optimum-quanto":         re.compile(r".*\.weight\._(data|scale|shift)(\..+)?"),
    "GPTQ or AWQ":            re.compile(r".*\.(qweight|qzeros|g_idx)"),
}  # fmt: skip
_CODES = ("U8", "I8", "F8_E4M3", "F8_E5M2")


def refuse_quantised(
    path: Path, tensors: Mapping[str, TensorRef], metadata: Mapping[str, Mapping[str, str]], config: Any
) -> None:
    """Raise :class:`FormatError` (``base-quantised``) if header, names, dtypes or ``config.json`` say so."""
    found = next(_signs(tensors, metadata, config), None)
    if found is not None:
        kind, names = found
        raise FormatError(
            f"the base is quantised ({kind}): {printable(str(path), 1000)}",
            where="; ".join(fold_names(names)[:4]),
            why="a delta cannot be added to codes without quantising them again",
            hint="pass the model that it was made from, in fp32, fp16 or bf16",
            slug="base-quantised",
        )


def _signs(
    tensors: Mapping[str, TensorRef], metadata: Mapping[str, Mapping[str, str]], config: Any
) -> Iterator[tuple[str, list[str]]]:
    """``(kind, where)`` of everything that says so, the most telling first."""
    told = config.get("quantization_config") if isinstance(config, dict) else None
    if told:
        method = told.get("quant_method") if isinstance(told, dict) else None
        yield printable(str(method or "unknown method"), 40), ["config.json: quantization_config"]
    for kind, mark in _MARKS.items():
        if names := [name for name in tensors if mark.fullmatch(name)]:
            yield kind, names
    for shard, header in metadata.items():
        if "tensor_names" in header and any('"_type"' in value and "qdata" in value for value in header.values()):
            yield "torchao", [f"header of {shard}"]
    if names := [name for name, ref in tensors.items() if ref.dtype in _CODES and name.endswith("weight")]:
        yield f"weights stored as {tensors[names[0]].dtype}", names
