"""The text of ``loraconv verify FOLDER``."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loraconv.verification.record import RecordResult


def verdict(result: RecordResult) -> str:
    return "unchanged since it was converted" if result.same else "CHANGED since it was converted"


def lines(result: RecordResult) -> list[str]:
    return [f"  {file.name}: {file.difference or 'as it was written'}" for file in result.files]
