"""The journal beside a fused model, from which its base comes back bit for bit."""

from __future__ import annotations

from loraconv.journal.read import read_journal
from loraconv.journal.write import write_journal

__all__ = ["read_journal", "write_journal"]
