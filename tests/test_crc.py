"""Checksums of parts make the checksum of the whole, whatever the parts."""

from __future__ import annotations

import zlib

from hypothesis import given
from hypothesis import strategies as st

from loraconv.io.crc import combine


@given(st.lists(st.binary(max_size=300), max_size=6))
def test_the_checksum_of_a_whole_follows_from_those_of_its_parts(parts: list[bytes]) -> None:
    crc = 0
    for part in parts:
        crc = combine(crc, zlib.crc32(part), len(part))
    assert crc == zlib.crc32(b"".join(parts))


def test_long_runs_of_zeros_count() -> None:
    head, tail = b"loraconv", bytes(5 << 20)
    assert combine(zlib.crc32(head), zlib.crc32(tail), len(tail)) == zlib.crc32(head + tail)
