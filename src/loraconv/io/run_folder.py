"""Which files make up a checkpoint that a trainer left as a folder: the pointer, the iteration, the rank files."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from loraconv.errors import CorruptCheckpoint, FormatError, UsageError
from loraconv.io.sidecar import read_text
from loraconv.names import printable, quoted

_STEP = re.compile(r"global_step[0-9]{1,12}")
_ITERATION = re.compile(r"[0-9]{1,12}(-[A-Za-z]{1,16})?")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunLayout:
    """A folder of torch files, one a model-parallel rank, as a trainer leaves it.

    ``{rank}`` in ``shard`` and ``partial`` is the rank's number; ``partial`` files hold one data-parallel rank's part
    of each tensor and spell keys with ``partial_prefix`` in front. ``sidecar`` is looked for in the iteration folder
    and its parent.
    """

    pointer: str
    shard: str
    partial: str
    partial_prefix: str
    sidecar: str
    root: tuple[str, ...]
    world_size: str
    trained: str


@dataclass(frozen=True, slots=True)
class RunFiles:
    """The rank files of one iteration, in rank order.

    ``partial`` if they are data-parallel parts; ``named`` if their names fit the layout (a single file may have been
    renamed, and is then taken alone).
    """

    layout: RunLayout
    files: tuple[Path, ...]
    sidecar: Path | None
    partial: bool = False
    named: bool = True
    notices: tuple[str, ...] = ()


def find_run(path: Path, layout: RunLayout) -> RunFiles | None:
    """The files of the run, iteration folder or rank file at ``path``; None if nothing of this layout lies there.

    Raises :class:`CorruptCheckpoint` for a pointer that leads nowhere and for missing or doubled ranks,
    :class:`UsageError` where several iterations could be meant.
    """
    if path.is_file():
        return _from_file(path, layout)
    if _rank_files(path, layout):
        return _from_iteration(path, layout)
    iterations = sorted(p.name for p in _children(path) if _ITERATION.fullmatch(p.name) and _rank_files(p, layout))
    pointer = path / layout.pointer
    if pointer.is_file() and not _is_of_deepspeed(path, pointer):
        return _from_pointer(path, pointer, iterations, layout)
    if not iterations:
        return None
    if len(iterations) > 1:
        raise UsageError(
            f"{printable(str(path))} has several iterations and no '{layout.pointer}' file",
            why=f"found {', '.join(iterations)}",
            hint=f"pass one of them: {quoted(path / iterations[-1])}",
            slug="iteration-ambiguous",
        )
    notice = f"no '{layout.pointer}' file; the only iteration, {iterations[0]}, was taken"
    return replace(_from_iteration(path / iterations[0], layout), notices=(notice,))


def _is_of_deepspeed(path: Path, pointer: Path) -> bool:
    """True if the pointer names a step as DeepSpeed itself does: then the folder is another trainer's."""
    name = read_text(pointer).strip()
    return _STEP.fullmatch(name) is not None and (path / name).is_dir()


def _children(path: Path) -> list[Path]:
    try:
        return [p for p in path.iterdir() if p.is_dir()]
    except OSError as error:
        raise UsageError(f"cannot list {printable(str(path))}", why=str(error), slug="unreadable") from None


def _from_pointer(path: Path, pointer: Path, iterations: list[str], layout: RunLayout) -> RunFiles:
    name = read_text(pointer).strip()
    where = printable(str(pointer))
    if not _ITERATION.fullmatch(name):
        raise CorruptCheckpoint(
            f"{where} does not name an iteration",
            why=f"it holds {printable(name, 60)!r}",
            hint=f"pass an iteration folder of {printable(str(path))}",
            slug="pointer",
        )
    # The trainer names the EMA copy for a moment only; a run that was stopped then still has both folders.
    if name not in iterations:
        raise CorruptCheckpoint(
            f"{where} names iteration {name}, which is not there",
            why=f"found {', '.join(iterations) or 'no iteration'}",
            hint=f"pass the iteration folder yourself: {quoted(path / (iterations or [name])[-1])}",
            slug="pointer",
        )
    return _from_iteration(path / name, layout)


def _from_iteration(folder: Path, layout: RunLayout) -> RunFiles:
    partial = not _ranks(folder, layout.shard)
    found = _ranks(folder, layout.partial if partial else layout.shard)
    return RunFiles(layout, _in_order(folder, found), find_sidecar(folder, layout), partial)


def _from_file(path: Path, layout: RunLayout) -> RunFiles:
    for template, partial in ((layout.shard, False), (layout.partial, True)):
        if _rank_of(path.name, template) is not None:
            found = _ranks(path.parent, template)
            return RunFiles(layout, _in_order(path.parent, found), find_sidecar(path.parent, layout, path), partial)
    return RunFiles(layout, (path,), find_sidecar(path.parent, layout, path), named=False)


def _rank_files(folder: Path, layout: RunLayout) -> bool:
    return bool(_ranks(folder, layout.shard) or _ranks(folder, layout.partial))


def _ranks(folder: Path, template: str) -> list[tuple[int, Path]]:
    try:
        names = sorted(p.name for p in folder.iterdir())
    except OSError as error:
        raise UsageError(f"cannot list {printable(str(folder))}", why=str(error), slug="unreadable") from None
    found = [(_rank_of(name, template), folder / name) for name in names]
    return [(rank, path) for rank, path in found if rank is not None]


def _rank_of(name: str, template: str) -> int | None:
    head, _, tail = template.partition("{rank}")
    digits = name[len(head) : len(name) - len(tail)]
    fits = name.startswith(head) and name.endswith(tail) and digits.isascii() and digits.isdigit()
    return int(digits) if fits and len(digits) <= 6 else None


def _in_order(folder: Path, found: list[tuple[int, Path]]) -> tuple[Path, ...]:
    ranks = [rank for rank, _ in found]
    where = printable(str(folder))
    if len(set(ranks)) != len(ranks):
        raise CorruptCheckpoint(
            f"{where} holds one rank twice",
            why=", ".join(path.name for _, path in found),
            hint="move the files that do not belong to this run away",
            slug="rank-duplicate",
        )
    check_ranks(where, sorted(ranks), max(ranks) + 1)
    return tuple(path for _, path in sorted(found))


def check_ranks(where: str, ranks: list[int], world: int) -> None:
    """Raise :class:`FormatError` unless ``ranks`` is exactly ``0 .. world - 1``."""
    missing = sorted(set(range(world)) - set(ranks))
    if missing:
        raise FormatError(
            f"{where} lacks {'a rank' if len(missing) == 1 else 'ranks'} of its model-parallel checkpoint",
            why=f"rank {', '.join(map(str, missing[:8]))} of {world} is missing",
            hint="copy every mp_rank file of the iteration into the same folder",
            slug="rank-missing",
        )


def find_sidecar(folder: Path, layout: RunLayout, file: Path | None = None) -> Path | None:
    """The settings file of the iteration in ``folder``, also where a link leads there from elsewhere."""
    real = (file or folder).resolve()
    real = real.parent if file else real
    for place in (folder, folder.absolute().parent, real, real.parent):
        if (place / layout.sidecar).is_file():
            return place / layout.sidecar
    return None
