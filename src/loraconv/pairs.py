"""The pairs of factors in a checkpoint by module (diffusers name), each checked for shape and dtype.

Where one module of the file is several of diffusers (q, k and v in one), their ups are its rows, and each has a copy of
its down. A pair that is several side by side (up is zero outside of its blocks) gives back what it was made of.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from loraconv.detect import Detected, FactorKey, factor_key, is_there
from loraconv.errors import CorruptCheckpoint, FormatError
from loraconv.lazy import Joined, Lazy, TensorRef, read
from loraconv.names import FLOAT_DTYPES, fold_names, printable
from loraconv.ranks import of_rank
from loraconv.rules import Fused, Rename, Rule, fill
from loraconv.source import Source


@dataclass(frozen=True, slots=True)
class Halves:
    """The two factors of one module. ``stated`` is the rank that the file's alpha belongs to: that of the pair which
    they were cut out of."""

    down: Lazy
    up: Lazy
    stated: int


def read_pairs(source: Source, detected: Detected, tensors: dict[str, TensorRef]) -> dict[str, Halves]:
    """Module (diffusers name) -> its factors in one rank.

    Raises :class:`CorruptCheckpoint` (a factor missing, shapes) and :class:`FormatError` (what is no plain LoRA).
    """
    dialect, naming = detected.dialect, detected.naming
    by_block = any(is_there(mark, source) for mark in dialect.alpha_of_block)
    made: dict[str, Halves] = {}
    for key, (down, up) in _written(source, detected, tensors).items():
        found = naming.find(key.module)
        assert found is not None
        rule, fields = found
        _check_pair(source, key.module, down, up)
        if dialect.by_part:
            parts = [(_part(detected, rule, key), Halves(down, up, down.shape[0]))]
        else:
            parts = list(_cut(rule, down, up, by_block))
        for template, halves in parts:
            module = fill(template, fields)
            if module in made:
                raise _twice(source, module)
            made[module] = halves
    return made


def _written(
    source: Source, detected: Detected, tensors: dict[str, TensorRef]
) -> dict[FactorKey, tuple[TensorRef, TensorRef]]:
    """The pairs by their module as it is spelled in the file."""
    halves: dict[FactorKey, dict[str, TensorRef]] = {}
    for name in detected.ledger.factors:
        key = factor_key(detected.dialect, name)
        assert key is not None
        sides = halves.setdefault(FactorKey(key.module, key.part, ""), {})
        if key.side in sides:
            raise _twice(source, key.module)
        sides[key.side] = of_rank(tensors, name)
    for name in detected.ledger.alphas:
        key = factor_key(detected.dialect, name)
        assert key is not None
        halves.setdefault(FactorKey(key.module, key.part, ""), {})  # an alpha belongs to a pair
    broken = [_shown(detected, key) for key, sides in halves.items() if len(sides) != 2]
    if broken:
        raise CorruptCheckpoint(
            f"{len(broken)} modules do not have both LoRA factors",
            where="; ".join(fold_names(broken)[:4]),
            hint="save the checkpoint again, or copy it again from where it was trained",
            slug="factor-missing",
        )
    return {key: (sides["down"], sides["up"]) for key, sides in halves.items()}


def _shown(detected: Detected, key: FactorKey) -> str:
    """The diffusers name of the (first) module that a pair belongs to."""
    found = detected.naming.find(key.module)
    assert found is not None
    rule, fields = found
    return fill(rule.targets[min(key.part, len(rule.targets) - 1)], fields)


def _twice(source: Source, module: str) -> FormatError:
    return FormatError(
        f"two pairs of factors are there for one module: {printable(module)}",
        where=printable(str(source.path)),
        why="it is spelled in two ways, or the file holds two adapters",
        hint="loraconv inspect FILE --verbose",
        slug="factor-twice",
    )


def _part(detected: Detected, rule: Rule, key: FactorKey) -> str:
    if not isinstance(rule, Rename | Fused) or key.part >= len(rule.targets):
        raise FormatError(
            f"{printable(key.module)} has a part {key.part}, and the module has {len(rule.targets)}",
            why=f"the {detected.family.title} table knows no such part",
            hint="loraconv formats",
            slug="part-unknown",
        )
    return rule.targets[key.part]


def _cut(rule: Rule, down: TensorRef, up: TensorRef, by_block: bool) -> Iterator[tuple[str, Halves]]:
    """The target templates of one pair and the factors of each. With ``by_block``, alpha is that of one block."""
    dealt = zip(rule.targets, rule.pieces(up.shape[0], down.shape[1]), strict=True)
    targets = [(here, own) for here, own in dealt if own]
    pieces = [own for _, own in targets]
    rank, count = down.shape[0], sum(map(len, pieces))
    chunk, left = divmod(up.shape[0], count)
    if left:
        raise CorruptCheckpoint(
            f"{printable(up.name)} has {up.shape[0]} rows, which are not {count} equal chunks",
            hint="save the checkpoint again, or copy it again from where it was trained",
            slug="factor-shape",
        )
    ups = [[up.rows(n * chunk, (n + 1) * chunk) for n in own] for own in pieces]
    width = _block_width(ups, rank)
    for number, ((here, _), parts) in enumerate(zip(targets, ups, strict=True)):
        start, stop = (number * width, (number + 1) * width) if width else (0, rank)
        if width and not (read(down.rows(start, stop)).any() or any(read(p.columns(start, stop)).any() for p in parts)):
            continue  # a block of zeros stands for a part that has no adapter
        rows = up.rows(pieces[number][0] * chunk, (pieces[number][-1] + 1) * chunk)
        whole: Lazy = rows.columns(start, stop)
        if rows.shape[0] != chunk * len(parts) or list(pieces[number]) != sorted(pieces[number]):
            whole = Joined(tuple(part.columns(start, stop) for part in parts), 0)
        yield here, Halves(down.rows(start, stop), whole, width if width and by_block else rank)


def _block_width(ups: Sequence[Sequence[TensorRef]], rank: int) -> int:
    """The rank of each block where ``up`` is block-diagonal, one block of columns for the rows of each target; else 0.

    The first row of the first target tells nearly always that it is not, so that little is read.
    """
    width, left = divmod(rank, len(ups))
    if left or len(ups) == 1:
        return 0
    first = read(ups[0][0].rows(0, 1))
    if first[:, width:].any():
        return 0
    filled = 0
    for number, parts in enumerate(ups):
        own = slice(number * width, (number + 1) * width)
        blocks = [read(part) for part in parts]
        inside = any(block[:, own].any() for block in blocks)
        for block in blocks:
            block[:, own] = 0
        filled += inside
        if any(block.any() for block in blocks):
            return 0
    return width if filled > 1 else 0


def _check_pair(source: Source, module: str, down: TensorRef, up: TensorRef) -> None:
    if len(down.shape) == len(up.shape) > 2:
        raise FormatError(
            f"the adapter holds a LoRA on a convolution: {printable(module)}",
            where=printable(str(source.path)),
            why=f"down is {list(down.shape)}, up is {list(up.shape)}; this command is for linear layers",
            hint="loraconv convert, fuse, merge, resize and split take it; or leave such modules out: --drop 'NAME*'",
            slug="not-plain-lora",
        )
    flat = len(down.shape) == 2 and len(up.shape) == 2
    if not flat or down.shape[0] != up.shape[1] or not down.shape[0]:
        empty = (0,) in (down.shape, up.shape)
        cause = ": saved under DeepSpeed ZeRO-3 without being gathered, the file holds no number" if empty else ""
        hint = "save the checkpoint again, or copy it again from where it was trained"
        raise CorruptCheckpoint(
            f"the two LoRA factors of {printable(module)} do not fit together",
            where=printable(str(source.path)),
            why=f"down is {list(down.shape)}, up is {list(up.shape)}{cause}",
            hint="save it with stage3_gather_16bit_weights_on_model_save, or train with stage 2" if empty else hint,
            slug="factor-shape",
        )
    for tensor in (down, up):
        if tensor.dtype not in FLOAT_DTYPES:
            raise FormatError(
                f"{printable(tensor.name)} is {tensor.dtype}, not a floating dtype",
                hint="save the adapter in fp32, fp16 or bf16",
                slug="dtype-unsupported",
            )
