"""``resize``: the nearest adapter of a smaller rank, chosen by rank, by energy or by error, from the factors alone."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from loraconv.errors import UsageError
from loraconv.registry import dialect
from loraconv.reshaping.opening import dtype_name, open_for
from loraconv.reshaping.result import ReshapeResult
from loraconv.reshaping.summing import Summed, finish, sum_up
from loraconv.truncation import wanted

_HINT = "loraconv resize ADAPTER -o OUT --rank 16"


def resize(
    adapter: str | Path,
    *,
    out: str | Path,
    rank: int | None = None,
    energy: float | None = None,
    max_error: float | None = None,
    to: str | None = None,
    alpha: float | None = None,
    dtype: str | None = None,
    strict: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
) -> ReshapeResult:
    """Write an adapter of smaller rank into the folder ``out``: of each module the nearest delta in the Frobenius norm.

    One of three says how far to go: ``rank`` (modules of a smaller one keep theirs), ``energy`` (the share of the
    squared singular values to keep), or ``max_error`` (the relative error that each module may have, the rounding of
    what is stored included). The result states the rank and the error of every module. ``to`` is the format of the
    output (None: the adapter's own), ``dtype`` that of its factors (None: ``fp32``). The other options are those of
    :func:`merge`, and so are the errors; :class:`UsageError` (``nothing-to-cut``) where every module would keep its
    rank.
    """
    how = wanted(rank, energy, max_error, _HINT)
    options = {
        "alpha": alpha, "dtype": dtype, "energy": energy, "max_error": max_error, "rank": rank, "strict": strict,
    }  # fmt: skip
    with ExitStack() as opened:
        used = open_for([adapter], opened, alpha=alpha, strict=strict, hint=_HINT)
        target = dialect(to or used[0].detected.dialect.name)
        summed = sum_up(used, how, target, dtype_name(dtype))
        _refuse_whole(summed)
        planned = ReshapeResult("resized", Path(out), target.name, (), options=options, dry_run=dry_run)
        return finish(planned, used, summed, overwrite=overwrite)


def _refuse_whole(summed: Summed) -> None:
    ranks = [fact.rank for fact in summed.facts]
    if all(fact.rank == fact.rank_before for fact in summed.facts):
        least, most = min(ranks), max(ranks)
        raise UsageError(
            "nothing would be cut: every module keeps its rank",
            why=f"the adapter's rank is {most}" if least == most else f"its ranks are {least} to {most}",
            hint=f"loraconv resize ADAPTER -o OUT --rank {max(most // 2, 1)}",
            slug="nothing-to-cut",
        )
