"""A LLaVA run, told by what is in its files and never by the name of its folder.

Facts: haotian-liu/LLaVA ``llava/train/train.py`` (what is saved), ``llava/model/builder.py`` (what is loaded). The
finished run has ``adapter_model``, ``non_lora_trainables.bin`` and ``config.json``; its ``checkpoint-N`` folders have
the adapter alone, though the projector was trained on (haotian-liu/LLaVA#922); a pretrained projector is
``mm_projector.bin`` alone. LLaVA's own loader takes one way or another by the folder's name (haotian-liu/LLaVA#1416).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loraconv.errors import FormatError, UsageError
from loraconv.fusion.adapters import Used, split_strength
from loraconv.fusion.llava.landing import check_config, landed
from loraconv.fusion.llava.tokenizer import FILES
from loraconv.fusion.rest import Kept
from loraconv.io.input_file import InputFile
from loraconv.io.sidecar import read_json
from loraconv.io.torch_read import read_tensors
from loraconv.lazy import TensorRef, nbytes
from loraconv.model_folder import CONFIG, Model, inside
from loraconv.names import DTYPE_WORDS, FLOAT_DTYPES, fold_names, printable, quoted

#: What was trained whole, by LLaVA's names of the two files that may hold it.
TRAINED, PROJECTOR = "non_lora_trainables.bin", "mm_projector.bin"
_ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
#: Settings that only a LLaVA model has.
_MARKS = ("mm_vision_tower", "mm_projector_type")
#: A field of LLaVA's ``TrainingArguments`` alone, as it stands in the pickle of them.
_ARGUMENT, _ARGUMENTS, _ARGUMENTS_BYTES = b"mm_projector_lr", "training_args.bin", 1 << 20


@dataclass(frozen=True, slots=True)
class Run:
    """What a LLaVA run holds besides the adapter: ``tensors`` under the base's names, ``config`` of the whole model,
    ``kept`` the tokenizer's files, if it has its own."""

    folder: Path
    file: InputFile
    tensors: Mapping[str, TensorRef]
    config: dict[str, Any]
    kept: tuple[Kept, ...]

    def joined(self, model: Model) -> Model:
        """The base with the run's tensors in place of its own, and those that it lacks; with the run's settings."""
        return replace(model, tensors={**model.tensors, **self.tensors}, config=self.config)


def refuse_projector_only(given: Iterable[str | Path]) -> None:
    """Raise :class:`FormatError` (``projector-only``) for a folder of the first stage of a LLaVA training."""
    for path, _ in map(split_strength, given):
        if (path / PROJECTOR).is_file() and not _has_adapter(path):
            raise FormatError(
                f"{printable(str(path), 1000)} holds a pretrained projector and no LoRA",
                where=PROJECTOR,
                why="the first stage of LLaVA's training trains the projector alone; the language model is the base's",
                hint=f"pass the run that was trained on from it (--pretrain_mm_mlp_adapter {quoted(path / PROJECTOR)})",
                slug="projector-only",
            )


def open_run(model: Model, used: Sequence[Used], stack: ExitStack) -> Run | None:
    """The LLaVA run that one of the adapters belongs to; None where there is none. ``stack`` closes its file.

    Raises :class:`UsageError` (``run-ambiguous``) for two of them, :class:`FormatError` for an unfinished one
    (``projector-missing``), for one of another base, and for tensors that have no place (``no-home``),
    :class:`UnsafeCheckpoint` for a link that leads out of the run's folder.
    """
    folders = list(dict.fromkeys(_folder(one.source.path) for one in used))
    for folder in folders:
        refuse_unfinished(folder)
    runs = [(folder, name) for folder in folders if (name := trained_whole(folder))]
    if len(runs) > 1:
        raise UsageError(
            "two of the adapters bring a projector, and a model has one",
            where=", ".join(printable(str(folder), 300) for folder, _ in runs),
            hint="fuse one run; of the others pass the adapter alone, in a folder of its own",
            slug="run-ambiguous",
        )
    return _opened(model, *runs[0], stack) if runs else None


def _opened(model: Model, folder: Path, name: str, stack: ExitStack) -> Run:
    file = stack.enter_context(InputFile(inside(folder, name)))
    config = read_json(inside(folder, CONFIG))
    check_config(config, model, folder)
    tensors = landed(read_tensors(file), model, config, file)
    files = [inside(folder, one) for one in FILES if (folder / one).is_file()]
    kept = tuple(Kept(path, path.name, os.stat(path).st_size) for path in files)
    return Run(folder, file, tensors, config, kept)


def _folder(path: Path) -> Path:
    return path if path.is_dir() else path.parent


def _has_adapter(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _ADAPTERS)


def trained_whole(folder: Path) -> str | None:
    """The name of the file in a folder that holds what was trained whole; None where there is none."""
    return next((name for name in (TRAINED, PROJECTOR) if (folder / name).is_file()), None)


def _is_llava(folder: Path) -> bool:
    """True if the settings in a folder are a LLaVA model's."""
    return (folder / CONFIG).is_file() and any(mark in read_json(folder / CONFIG) for mark in _MARKS)


def refuse_unfinished(folder: Path) -> None:
    """Raise :class:`FormatError` for a checkpoint on the way: it has the adapter of its step, and no projector."""
    trained, finished = trained_whole(folder), folder.absolute().parent
    if trained and (folder / CONFIG).is_file():
        return
    whole = _has_adapter(finished) and trained_whole(finished) is not None
    told = [
        f"its {CONFIG} is that of a LLaVA model" if not trained and _is_llava(folder) else "",
        f"its {trained} is of a LLaVA run" if trained else "",
        f"its {_ARGUMENTS} is of LLaVA's trainer" if _names_llava(folder / _ARGUMENTS) else "",
        "the folder around it is a finished LLaVA run" if whole and _is_llava(finished) else "",
    ]
    if any(told):
        lacks = [
            name for name in (TRAINED, CONFIG) if not (folder / name).is_file() and not (name == TRAINED and trained)
        ]
        raise FormatError(
            f"{printable(str(folder), 1000)} lacks {' and '.join(lacks)}",
            why=f"{next(filter(None, told))}, and LLaVA saves both only when the training ends; those of another"
            " step are not its own: the projector was trained on",
            hint=f"fuse the finished run: loraconv fuse {quoted(finished if whole else 'RUN')} --base BASE -o OUT",
            slug="projector-missing",
        )


def _names_llava(arguments: Path) -> bool:
    """True if the pickled arguments of a training are LLaVA's. The bytes are searched; nothing is unpickled."""
    if not arguments.is_file():
        return False
    with InputFile(arguments) as file:
        return _ARGUMENT in file.pread(0, min(file.size, _ARGUMENTS_BYTES))


def run_notices(model: Model, used: Sequence[Used], run: Run | None) -> list[str]:
    """What has to be said about the projector: that it is the base's, or that a strength does not apply to it."""
    if run is None and any(mark in (model.config or {}) for mark in _MARKS):
        return ["the projector is that of the base: the adapter brings none"]
    if run is not None and any(one.strength != 1 for one in used):
        return ["the strength is the adapter's alone: what the run trained whole (the projector) is taken as it is"]
    return []


def one_dtype(model: Model, whole: Model, asked: str | None) -> tuple[str, list[str]]:
    """``(dtype of every floating tensor of the output, notices)``: the one that was asked for, else the one of most of
    the base; ``whole`` is the base with all that is put into it. LLaVA's own merge makes everything float16."""
    sizes = dict.fromkeys(FLOAT_DTYPES, 0)
    for ref in model.tensors.values():
        if ref.dtype in FLOAT_DTYPES:
            sizes[ref.dtype] += nbytes(ref)
    dtype = asked or max(sizes, key=lambda name: sizes[name])
    other = [name for name, ref in whole.tensors.items() if ref.dtype in FLOAT_DTYPES and ref.dtype != dtype]
    if asked or not other:
        return dtype, []
    word = next((word for word, name in DTYPE_WORDS.items() if name == dtype), dtype)
    shown = "; ".join(fold_names(other)[:2])
    return dtype, [f"{len(other)} tensors are rounded once to {word}, as the base is (--dtype for another): {shown}"]
