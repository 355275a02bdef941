"""Level L3 on a user's own model: diffusers loads it and the adapter, and seeded forward passes are compared.

One model is in memory at a time. Of the verifier, only this module and the ``consumer`` ones import torch or diffusers.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loraconv.errors import FormatError, WriteFailed
from loraconv.names import printable, quoted
from loraconv.verifier.consumers.inputs import COMPUTE, described, distance, make_inputs, rounding_bound

_ALONE = "the base model's, without the adapter"
#: What the second adapter's output is called.
OTHER = "the other adapter"


@dataclass(frozen=True, slots=True)
class Request:
    """What to run: the folder of a transformer; an adapter (a diffusers file), the number of its modules, its rank and
    the dtypes of its factors; what to compute in; an empty folder to use; and another adapter and the number of its
    modules, or the folder of a model into which the first was fused.

    ``apart`` is what the roundings of the two adapters' stored factors can make of the delta, relative to it.
    """

    model: Path
    adapter: Path
    modules: int
    rank: int
    dtypes: frozenset[str]
    dtype: str
    scratch: Path
    other: Path | None = None
    other_modules: int = 0
    apart: float = 0.0
    fused: Path | None = None


@dataclass(frozen=True, slots=True)
class Passed:
    """One output against that of the live adapter: relative L2 distance, what is allowed, the ``strength`` (the
    adapter's share in it by projection: 1 as the live one, 0 as the base alone), and in words what it is where it is
    out of its bound."""

    what: str
    distance: float
    allowed: float
    strength: float
    cause: str = ""

    @property
    def within(self) -> bool:
        return self.distance <= self.allowed


@dataclass(frozen=True, slots=True)
class Forward:
    """``effect``: how much the live adapter changes the base's output (relative L2). ``bound``: what roundings alone
    make of two ways to compute the same. ``mistakes``: the distances of outputs that are wrong on purpose, all of them
    greater than the bound. ``changed``: tensors that are others after saving and loading."""

    inputs: str
    effect: float
    bound: float
    passes: tuple[Passed, ...]
    mistakes: Mapping[str, float]
    changed: tuple[str, ...]


@dataclass(slots=True)
class _Lab:
    """The inputs, and the outputs that were seen."""

    request: Request
    inputs: dict[str, Any]
    bound: float
    seen: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, float] = field(default_factory=dict)
    changed: tuple[str, ...] = ()

    @property
    def saved(self) -> Path:
        return self.request.scratch / "saved"

    def run(self, model: Any) -> Any:
        """The output of a forward pass, in double precision."""
        import torch

        with torch.no_grad():
            return model(**self.inputs, return_dict=False)[0].double()


def run_forward(request: Request) -> Forward:
    """Run the base, the live adapter, and whatever is compared with it.

    Raises :class:`FormatError` where diffusers does not load something, and where nothing would be proved: the adapter
    changes nothing, or too little to be told from roundings.
    """
    model = _open(request.fused or request.model, request.dtype)
    inputs = make_inputs(model.config, COMPUTE[request.dtype][0])
    lab = _Lab(request, inputs, rounding_bound(model.config, inputs, COMPUTE[request.dtype][1]))
    if request.fused is not None:
        lab.seen["the fused model"] = lab.run(model)
        _save(lab, model)
        del model
        lab.seen["the fused model, saved and loaded"] = lab.run(_open(lab.saved, request.dtype))
        model = _open(request.model, request.dtype)
    base = lab.run(model)
    if request.other is not None:
        _load_adapter(model, request.other, request.other_modules)
        lab.seen[OTHER] = lab.run(model)
        model.unload_lora()
    _load_adapter(model, request.adapter, request.modules)
    live = lab.run(model)
    effect = distance(base, live)
    _refuse_no_effect(request, effect)
    lab.extra[OTHER] = request.apart * effect
    wrong = _wrong_outputs(lab, model, base, live)
    mistakes = {name: distance(output, live) for name, output in wrong.items()}
    _fuse(lab, model, live)
    del model
    _refuse_weak(request, mistakes, lab.bound + max(lab.extra.values()))
    if request.fused is None:
        lab.seen["fused by diffusers, saved and loaded"] = lab.run(_open(lab.saved, request.dtype))
    passes = tuple(_passed(lab, what, base, live, wrong) for what in lab.seen)
    return Forward(described(inputs, request.dtype), effect, lab.bound, passes, mistakes, lab.changed)


def _open(folder: Path, dtype: str) -> Any:
    """The transformer in ``folder``, whole; raises :class:`FormatError` where diffusers cannot make it."""
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    import torch
    from diffusers import CogVideoXTransformer3DModel
    from diffusers.utils import logging

    logging.disable_progress_bar()
    load: Any = CogVideoXTransformer3DModel.from_pretrained
    try:
        model, info = load(
            folder,
            torch_dtype=getattr(torch, COMPUTE[dtype][0]),
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:  # whatever diffusers raises for a model that it cannot load
        raise _not_loaded(folder, "the model", error) from error
    lost = [*info["missing_keys"], *info["mismatched_keys"]]
    if lost:
        raise _not_loaded(folder, "the model", ValueError(f"{len(lost)} tensors are missing, first {lost[0]}"))
    return model.eval()


def _load_adapter(model: Any, file: Path, modules: int) -> None:
    """Make the adapter live; raises :class:`FormatError` if diffusers leaves a module out."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    try:
        model.load_lora_adapter(
            file.parent, weight_name=file.name, prefix="transformer", adapter_name="live", use_safetensors=True
        )
    except Exception as error:  # whatever diffusers and peft raise for an adapter that they cannot load
        raise _not_loaded(file, "the adapter", error) from error
    made = sum(isinstance(module, BaseTunerLayer) for module in model.modules())
    if made != modules:
        raise FormatError(
            f"diffusers applies {made} of the {modules} modules of {printable(str(file))}",
            why="it passes over keys that it does not know, with a warning or without",
            hint=f"loraconv verify --consumers {quoted(file)}",
            slug="not-loaded",
        )


def _not_loaded(path: Path, what: str, error: Exception) -> FormatError:
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return FormatError(
        f"diffusers does not load {what} in {printable(str(path))}",
        why=printable(f"{type(error).__name__}: {' '.join(lines[:2]).strip()}", 400),
        hint=f"loraconv inspect {quoted(path)}",
        slug="not-loaded",
    )


def _refuse_no_effect(request: Request, effect: float) -> None:
    if effect == math.inf:
        raise FormatError(
            "the output of the model holds NaN or Inf, so nothing can be compared",
            where=printable(str(request.model)),
            hint=f"loraconv inspect {quoted(request.adapter)}; and compute in fp32",
            slug="nonfinite",
        )
    if effect == 0:
        raise FormatError(
            "the adapter does not change the output at all, so that nothing would be proved",
            where=printable(str(request.adapter)),
            why="its factors are zero, as they are before the first step of a training",
            hint=f"loraconv inspect {quoted(request.adapter)}",
            slug="no-effect",
        )


def _wrong_outputs(lab: _Lab, model: Any, base: Any, live: Any) -> dict[str, Any]:
    """Outputs that are wrong on purpose: without the adapter, at twice and half its strength; and, where something is
    out of the bound, times and over the rank, which are the usual mistakes."""
    strengths = {"twice": 2.0, "half": 0.5}
    if any(distance(output, live) > lab.bound for output in lab.seen.values()):
        rank = lab.request.rank
        strengths |= {f"{rank} times": float(rank), f"1/{rank} of": 1 / rank}
    wrong = {_ALONE: base}
    for name, strength in strengths.items():
        model.set_adapters(["live"], [strength])
        wrong[f"the adapter's at {name} its strength"] = lab.run(model)
    model.set_adapters(["live"], [1.0])
    return wrong


def _refuse_weak(request: Request, mistakes: Mapping[str, float], allowed: float) -> None:
    """``allowed`` is the most that any output may be away from the live one."""
    name, least = min(mistakes.items(), key=lambda item: item[1])
    if not least > allowed:
        weights = f"loraconv verify --base {quoted(request.model)} {quoted(request.adapter)} FUSED"
        raise FormatError(
            f"the adapter is too weak to be told from roundings: its output could be {name}",
            why=f"they are {least:.1e} apart, and roundings may make {allowed:.1e}",
            hint="run it again without --dtype" if request.dtype != "fp32" else weights,
            slug="no-effect",
        )


def _fuse(lab: _Lab, model: Any, live: Any) -> None:
    """Fuse the live adapter in memory; measure what storing the fused weights as the fused model does would cost."""
    model.fuse_lora()
    model.unload_lora()
    lab.seen["fused by diffusers"] = lab.run(model)
    if lab.request.fused is None:
        _save(lab, model)
    elif _round_as(model, lab.request.fused):
        cost = distance(lab.run(model), live)
        # A fused weight may have been rounded twice: as the product of the factors, and as the sum.
        lab.extra |= {what: 2 * cost for what in lab.seen if what.startswith("the fused model")}


def _round_as(model: Any, folder: Path) -> bool:
    """Round every parameter to the dtype in which ``folder`` stores it; False if that changes no dtype."""
    import torch
    from safetensors import safe_open

    stored: dict[str, Any] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt", backend="pread") as opened:
            stored |= {name: opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118
    narrow = {"F16": torch.float16, "BF16": torch.bfloat16}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if stored.get(name) in narrow:
                parameter.copy_(parameter.to(narrow[stored[name]]))
    return bool(narrow.keys() & set(stored.values()))


def _save(lab: _Lab, model: Any) -> None:
    """Save the model and compare every tensor of the files with it, bit for bit; raises :class:`WriteFailed`."""
    import torch
    from safetensors import SafetensorError, safe_open

    def raw(tensor: Any) -> Any:
        return tensor.contiguous().ravel().view(torch.uint8)

    try:
        model.save_pretrained(lab.saved, safe_serialization=True)
    except (OSError, SafetensorError) as error:
        raise WriteFailed(
            "the model cannot be saved, to be loaded again",
            where=printable(str(lab.saved)),
            why=printable(str(error), 300),
            hint="TMPDIR=FOLDER_WITH_ROOM loraconv verify --forward ...",
        ) from error
    left = dict(model.state_dict())
    changed = []
    for file in sorted(lab.saved.glob("*.safetensors")):
        with safe_open(file, "pt", backend="pread") as opened:
            for name in opened.keys():  # noqa: SIM118
                changed += [] if torch.equal(raw(opened.get_tensor(name)), raw(left.pop(name))) else [name]
    lab.changed = (*changed, *left)


def _passed(lab: _Lab, what: str, base: Any, live: Any, wrong: Mapping[str, Any]) -> Passed:
    output = lab.seen[what]
    allowed = lab.bound + lab.extra.get(what, 0.0)
    apart = distance(output, live)
    strength = float(((output - base) * (live - base)).sum() / ((live - base) ** 2).sum())
    if apart <= allowed:
        return Passed(what, apart, allowed, strength)
    same = [name for name, other in wrong.items() if distance(output, other) <= allowed]
    if apart == math.inf:
        cause = "its output holds NaN or Inf"
    elif same:
        cause = f"its output is {same[0]}"
    else:
        cause = f"it computes something else (in the adapter's direction, {strength:.3g} times as much)"
    return Passed(what, apart, allowed, strength, cause)
