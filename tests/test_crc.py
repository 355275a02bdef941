"""Checksums of parts make the checksum of the whole, whatever the parts."""

from __future__ import annotations

import random
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraconv.io import crc
from loraconv.io.crc import combine


@given(st.lists(st.binary(max_size=300), max_size=6))
def test_the_checksum_of_a_whole_follows_from_those_of_its_parts(parts: list[bytes]) -> None:
    whole = 0
    for part in parts:
        whole = combine(whole, zlib.crc32(part), len(part))
    assert whole == zlib.crc32(b"".join(parts))


def test_long_runs_of_zeros_count() -> None:
    head, tail = b"loraconv", bytes(5 << 20)
    assert combine(zlib.crc32(head), zlib.crc32(tail), len(tail)) == zlib.crc32(head + tail)


@pytest.mark.parametrize("size", [0, 1, 7, 64, 4096, (1 << 18) + 5])
def test_the_checksum_is_that_of_zlib_whoever_computes_it(size: int) -> None:
    data = random.Random(size).randbytes(size)
    assert crc.crc32(data) == zlib.crc32(data)
    assert crc.crc32(memoryview(data)[size // 3 :], crc.crc32(data[: size // 3])) == zlib.crc32(data)
