"""The report of a verification as a file: there if the verification came to a verdict, and whole if it is there."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import ParamSpec

from loraconv.errors import UsageError
from loraconv.io.atomic import output_file
from loraconv.verification.result import VerifyResult

P = ParamSpec("P")

#: Room that is asked for before the comparison begins: the page of 42 layers with 4 modules of rank 128.
_BYTES = 1 << 20

#: The parameters of ``verify`` that name something to read, besides its arguments.
_PATHS = ("before", "after", "base", "model")


def reporting(compare: Callable[P, VerifyResult]) -> Callable[P, VerifyResult]:
    """A comparison that writes its page, too, where it is called with ``report``.

    Whether the page may be written is looked at before the comparison begins; if that raises, nothing is written.
    """

    @wraps(compare)
    def reported(*args: P.args, **kwargs: P.kwargs) -> VerifyResult:
        report, overwrite = kwargs.get("report"), bool(kwargs.get("overwrite"))
        if not isinstance(report, str | Path):
            if overwrite:
                raise UsageError("--overwrite needs --report", hint="loraconv verify A B --report out.html --overwrite")
            return compare(*args, **kwargs)
        from loraconv.report.html import MARK, page

        named = [*args, *(kwargs.get(name) for name in _PATHS)]
        inputs = [path for path in map(_there, named) if path is not None]
        mark = MARK.encode()
        with output_file(
            report, inputs=inputs, needed=_BYTES, mark=mark, option="--report", overwrite=overwrite
        ) as file:
            result = compare(*args, **kwargs)
            file.write(page(result).encode())
        return result

    return reported


def _there(named: object) -> str | None:
    """A path that exists, less its ``@STRENGTH``; what does not exist is for the comparison to complain about."""
    text = os.fspath(named) if isinstance(named, str | Path) else ""
    return next((path for path in (text, text.rpartition("@")[0]) if path and os.path.lexists(path)), None)
