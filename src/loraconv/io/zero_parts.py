"""The tensors of a DeepSpeed checkpoint out of the parts that ZeRO left of them, without reading a number.

Facts: microsoft/DeepSpeed ``utils/zero_to_fp32.py``, whose results these are bit for bit, ``runtime/zero/stage3.py``,
``stage_1_and_2.py``, ``runtime/bf16_optimizer.py``. ZeRO 1 and 2 lay the fp32 copies of a parameter group end to end,
with padding behind a parameter or behind all, and cut that into one piece a rank. ZeRO 3 cuts every parameter into as
many pieces of one length as there are ranks, the last one padded; a rank's pieces lie end to end in its groups.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from loraconv.errors import CorruptCheckpoint, FormatError
from loraconv.gathered import cut, gathered
from loraconv.io.torch_read import bare
from loraconv.io.zero_shards import ZeroStep, refuse_missing
from loraconv.lazy import TensorRef, number
from loraconv.names import FLOAT_DTYPES, numel, printable

#: What is at the root of a file; its keys are whatever the file has.
Root = Mapping[Any, Any]
_OPTIMIZER, _ZERO_3, _ZERO_1 = "optimizer_state_dict", "fp32_flat_groups", "single_partition_of_fp32_groups"


@dataclass(frozen=True, slots=True)
class Merged:
    """``tensors`` by name, those in ``trained`` in the dtype of the optimizer's copies (fp32), the others as saved.
    ``whole`` has the trained ones as the model ran with them; ZeRO 3 does not save those."""

    stage: int
    tensors: dict[str, TensorRef]
    trained: frozenset[str]
    whole: dict[str, TensorRef]


def merged(step: ZeroStep, models: Sequence[Root], optimizers: Sequence[Root]) -> Merged:
    """The whole tensors of a step; the roots are those of its files, in their order.

    Raises :class:`FormatError` (``rank-missing``, ``zero-shards``: files that are no such parts, parts of experts) and
    :class:`CorruptCheckpoint` (``rank-extra``, ``rank-mixed``: other ranks, runs, steps or stages; ``zero-parts``: the
    parts are not as long as the shapes ask for).
    """
    states = [_state(step, root, n) for n, root in enumerate(optimizers)]
    stage = _check_run(step, models, optimizers, states)
    groups = _shapes(models[0].get("param_shapes"))
    flats = [_flats(step, state.get(_ZERO_3 if stage == 3 else _ZERO_1)) for state in states]
    module = models[0].get("module")
    if groups is None or not isinstance(module, dict):
        raise _no_parts(step, f"{step.models[0].name} does not say what its tensors are (param_shapes, module)")
    try:
        if len({flat.dtype for held in flats for flat in held}) > 1:
            raise ValueError("the ranks' copies are of several dtypes")
        if stage == 3:
            trained = dict(_of_zero_3({name: shape for group in groups for name, shape in group.items()}, flats))
            tensors = _kept(module, models[0].get("buffer_names") or ()) | dict(_frozen(models))
        else:
            trained = dict(_of_zero_2(groups, flats, states[0].get("param_alignment_paddings")))
            tensors = _kept(module, module)
    except (ValueError, TypeError, LookupError) as error:
        raise CorruptCheckpoint(
            f"the parts of tensors in {printable(str(step.folder))} do not make up the whole ones",
            why=printable(str(error)),
            hint="copy the files of all ranks of this step again",
            slug="zero-parts",
        ) from None
    whole = {name: tensors[name] for name in trained if name in tensors}
    tensors |= trained
    shared = models[0].get("shared_params")
    same = {str(a): str(b) for a, b in shared.items() if b in tensors} if isinstance(shared, dict) else {}
    tensors |= {name: replace(tensors[source], name=name) for name, source in same.items()}
    every = frozenset([*trained, *(name for name, of in same.items() if of in trained)])
    return Merged(stage, tensors, every, whole)


def _state(step: ZeroStep, root: Root, rank: int) -> Root:
    state = root.get(_OPTIMIZER) if isinstance(root, dict) else None
    if not isinstance(state, dict) or not (_ZERO_1 in state or _ZERO_3 in state):
        raise _no_parts(step, f"{step.optimizers[rank].name} holds no fp32 copies ({_ZERO_1}, {_ZERO_3})")
    return state


def _check_run(step: ZeroStep, models: Sequence[Root], optimizers: Sequence[Root], states: Sequence[Root]) -> int:
    """The ZeRO stage, once all files are seen to be of one step of one run."""
    files, ranks = step.optimizers, len(step.optimizers)
    # DeepSpeed's optimizer for bfloat16 (ZeRO 1) does not note a stage.
    stage = _agreed(step, "zero_stage", [state.get("zero_stage", 1) for state in states], files)
    if stage not in (1, 2, 3) or (stage == 3) == step.whole:
        raise _mixed(step, f"its optimizer's files are of ZeRO {stage!s:.20}, {step.models[0].name} is not")
    counts = [_partitions(step, state) for state in states]
    for what, of in (("global_steps", models), ("dp_world_size", models), ("ds_version", [*models, *optimizers])):
        _agreed(step, what, [root.get(what) for root in of], (*step.models, *files))
    _agreed(step, "the shapes", [root.get("param_shapes") for root in models], step.models)
    _agreed(step, "the optimizer's step", [sorted(set(_steps(state))) for state in states], files)
    count: int = _agreed(step, "partition_count", counts, files)
    refuse_missing(step.folder, "*_optim_states.pt", list(range(ranks)), count)
    if count < ranks:
        why = f"{ranks} ranks have files, and the run had {count}"
        raise _mixed(step, why, "rank-extra")
    if models[0].get("mp_world_size") not in (None, 1):
        raise _no_parts(step, "they are of one of several model-parallel ranks")
    return int(stage)


def _agreed(step: ZeroStep, what: str, values: Sequence[Any], files: Sequence[Any]) -> Any:
    for value, file in zip(values, files, strict=False):
        if value != values[0]:
            said = "" if isinstance(value, list) and len(str(value)) > 60 else f": {values[0]!s:.60} and {value!s:.60}"
            raise _mixed(step, f"{what} of {files[0].name} and of {file.name} differ{printable(said)}")
    return values[0]


def _partitions(step: ZeroStep, state: Root) -> int:
    told = state.get("partition_count")
    counts = told if isinstance(told, list) and told else [told]
    if "ds_zero_partition_groups" in state or len(set(map(str, counts))) > 1:
        raise _no_parts(step, "some parameters are experts, and were cut up among fewer ranks than others")
    if type(counts[0]) is not int or not 1 <= counts[0] <= 1 << 20:
        raise _no_parts(step, f"partition_count is {printable(str(counts[0]), 60)}")
    return counts[0]


def _steps(state: object) -> Iterator[float]:
    """Every count of steps in an optimizer's state."""
    if isinstance(state, list):
        for item in state:
            yield from _steps(item)
    for key, value in state.items() if isinstance(state, dict) else ():
        tensor = bare(value)
        if key == "step" and tensor is not None and numel(tensor.shape) == 1 and tensor.dtype in (*FLOAT_DTYPES, "I64"):
            yield number(tensor)
        elif key == "step" and type(value) in (int, float):
            yield value
        else:
            yield from _steps(value)


def _shapes(groups: object) -> list[dict[str, tuple[int, ...]]] | None:
    """``param_shapes``: one mapping a parameter group; None where it is something else."""
    if not isinstance(groups, list) or not groups or not all(isinstance(group, dict) for group in groups):
        return None
    plain = all(_is_shape(shape) for group in groups for shape in group.values())
    return [{str(name): shape for name, shape in group.items()} for group in groups] if plain else None


def _is_shape(shape: object) -> bool:
    return isinstance(shape, tuple) and all(type(size) is int and 0 <= size < 1 << 40 for size in shape)


def _flats(step: ZeroStep, groups: object) -> list[TensorRef]:
    flats = [bare(group) for group in groups] if isinstance(groups, list) else []
    fine = [f for f in flats if f is not None and len(f.shape) == 1 and f.strides is None and f.dtype in FLOAT_DTYPES]
    if not fine or len(fine) != len(flats):
        raise _no_parts(step, "the fp32 copies are no flat tensors")
    return fine


def _of_zero_2(
    groups: Sequence[Mapping[str, tuple[int, ...]]], flats: Sequence[Sequence[TensorRef]], paddings: Any
) -> Iterator[tuple[str, TensorRef]]:
    """``paddings``: the numbers behind each parameter of each group, None where there are none (before DeepSpeed 0.19).

    The ends may differ by what fills up ``2 * ranks``, which some releases save and others do not.
    """
    align = 2 * len(flats)
    for n, (shapes, parts) in enumerate(zip(groups, zip(*flats, strict=True), strict=True)):
        at, behind = 0, paddings[n] if paddings else [0] * len(shapes)
        for (name, shape), padding in zip(shapes.items(), behind, strict=True):
            yield name, gathered(name, shape, cut(parts, at, at + numel(shape)))
            at += numel(shape) + padding
        _same(-(-at // align), -(-sum(part.shape[0] for part in parts) // align), f"blocks of {align} numbers")


def _of_zero_3(
    shapes: Mapping[str, tuple[int, ...]], flats: Sequence[Sequence[TensorRef]]
) -> Iterator[tuple[str, TensorRef]]:
    at = 0
    for name, shape in shapes.items():
        share = -(-numel(shape) // len(flats))
        yield name, _cut_up(name, shape, [part for flat in flats for part in cut(flat, at, at + share)])
        at += share
    for flat in flats:
        _same(at, sum(part.shape[0] for part in flat), "numbers a rank")


def _frozen(models: Sequence[Root]) -> Iterator[tuple[str, TensorRef]]:
    """The parameters that were not trained; none where the run saved none."""
    shapes, fragments = models[0].get("frozen_param_shapes"), [model.get("frozen_param_fragments") for model in models]
    for name, shape in shapes.items() if isinstance(shapes, dict) and any(fragments) else ():
        parts = [bare(fragment[name]) if isinstance(fragment, dict) else None for fragment in fragments]
        if not _is_shape(shape) or not all(part is not None and len(part.shape) == 1 for part in parts):
            raise ValueError(f"{name} is frozen, and its parts are no flat tensors")
        yield str(name), _cut_up(str(name), shape, [part for part in parts if part is not None])


def _cut_up(name: str, shape: tuple[int, ...], parts: Sequence[TensorRef]) -> TensorRef:
    """A parameter out of the ranks' parts of it, without what fills up the last one."""
    return gathered(name, shape, cut(parts, 0, numel(shape)))


def _same(asked: int, found: int, what: str) -> None:
    if asked != found:
        raise ValueError(f"the shapes ask for {asked} {what}, and there are {found}")


def _kept(module: Root, names: Iterable[Any]) -> dict[str, TensorRef]:
    found = {str(name): bare(module.get(name)) for name in names}
    return {name: replace(ref, name=name) for name, ref in found.items() if ref is not None}


def _no_parts(step: ZeroStep, why: str) -> FormatError:
    return FormatError(
        f"{printable(str(step.folder))} holds parts of tensors that cannot be put together",
        why=printable(why),
        hint="save the model whole: stage3_gather_16bit_weights_on_model_save, or DeepSpeed's own zero_to_fp32.py",
        slug="zero-shards",
    )


def _mixed(step: ZeroStep, why: str, slug: str = "rank-mixed") -> CorruptCheckpoint:
    return CorruptCheckpoint(
        f"the files in {printable(str(step.folder))} belong to different steps or runs",
        why=printable(why),
        hint="copy the files of all ranks of one step of one run into a folder of their own",
        slug=slug,
    )
