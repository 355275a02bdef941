"""Every format against lists of keys that real files have: told from all others, every key known, converted, proved.

``detect`` tries every dialect on every list, and raises where two that are no kin explain as much.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import loraconv
from loraconv.accounting import leave_behind
from loraconv.detect import detect
from loraconv.errors import FormatError
from loraconv.registry import dialects
from loraconv.source import open_source
from tests.public_lists import PublicList, every_step, public_lists, unfolded, write, write_headers
from tests.support import FIXTURES

LISTS = public_lists()
WRITTEN = {d.name for d in dialects() if not d.read_only}


def by_name(listed: PublicList) -> str:
    return listed.name


def test_every_dialect_has_a_list_that_says_where_it_is_from() -> None:
    assert {d.name for d in dialects()} <= {listed.dialect for listed in LISTS}
    assert [listed.name for listed in LISTS if not listed.says or not listed.origin] == []
    assert [o for listed in LISTS for o in listed.origin if not o.startswith(("https://", "run: "))] == []


def test_a_folded_key_stands_for_all_its_keys() -> None:
    assert list(unfolded("a.{9-11}.{q,k}.0", every_step)) == [f"a.{n}.{m}.0" for n in (9, 10, 11) for m in "qk"]


@pytest.mark.parametrize("listed", LISTS, ids=by_name)
def test_a_real_file_is_told_from_every_other_format_and_every_key_of_it_is_known(
    listed: PublicList, tmp_path: Path
) -> None:
    make = write if listed.file.endswith(".pt") else write_headers
    make(listed, tmp_path / "in")
    with open_source(listed.within(tmp_path / "in")) as whole:
        source, _ = leave_behind(whole, listed.drop)
        found = detect(source)
        assert found.dialect.name == listed.dialect
        assert listed.family in {found.family.name, *(f.name for f in found.alike)}
        ledger = found.ledger
        assert (ledger.unknown, ledger.base, ledger.dropped, ledger.foreign) == ([], [], {}, {})
        assert len(ledger.factors) + len(ledger.alphas) + len(ledger.more) == len(source.tensors)


@pytest.mark.parametrize("listed", LISTS, ids=by_name)
def test_a_real_file_is_converted_with_a_proof_and_back(listed: PublicList, tmp_path: Path) -> None:
    write(listed, tmp_path / "in")
    there = loraconv.convert(
        listed.within(tmp_path / "in"),
        out=tmp_path / "there",
        to=listed.to,
        family=listed.family,
        drop=listed.drop,
    )
    assert [proof.passed for proof in there.proofs] == [True]
    if listed.one_way:
        with pytest.raises(FormatError) as caught:
            loraconv.convert(tmp_path / "there", out=tmp_path / "back", to=listed.dialect, family=listed.family)
        assert caught.value.slug == "cannot-carry"
    elif listed.dialect in WRITTEN:
        back = loraconv.convert(tmp_path / "there", out=tmp_path / "back", to=listed.dialect, family=listed.family)
        assert [proof.passed for proof in back.proofs] == [True]
        assert listed.drop or loraconv.verify(listed.within(tmp_path / "in"), tmp_path / "back").same


def named(name: str) -> PublicList:
    return next(listed for listed in LISTS if listed.name == name)


def test_a_dora_of_columns_is_refused_where_the_target_divides_the_rows_otherwise(tmp_path: Path) -> None:
    """FLUX's q, k and v are one module in ComfyUI: the norm of its columns would be one over the rows of all three."""
    listed = named("onetrainer/flux-dora-with-text-encoder")
    write(listed, tmp_path / "in")
    source = listed.within(tmp_path / "in")
    with pytest.raises(FormatError) as caught:
        loraconv.convert(source, out=tmp_path / "out", to="comfyui", family="flux", drop=listed.drop)
    assert caught.value.slug == "cannot-carry"
    assert "attn_to_k" in caught.value.where
    assert not (tmp_path / "out").exists()


def test_what_is_left_behind_is_no_part_of_the_proof_of_an_approximated_adapter(tmp_path: Path) -> None:
    listed = named("lycoris/wan-loha")
    write(listed, tmp_path / "in")
    result = loraconv.convert(
        listed.within(tmp_path / "in"),
        out=tmp_path / "out",
        to="diffusers",
        drop=["lycoris_blocks_*_attn1_*", "lycoris_blocks_*_ffn_*"],
        approximate="svd",
        rank=64,
    )
    checks = {check.name: check for check in result.proofs[0].checks}
    assert result.proofs[0].passed
    assert checks["keys left behind on purpose"].count == len(result.dropped) == 60


@pytest.mark.slow
def test_the_real_writers_still_make_the_lists_that_they_made(tmp_path: Path) -> None:
    """But for the order in which they write the names of a set, and for their own versions."""
    subprocess.run([sys.executable, FIXTURES / "make_lists.py", tmp_path], check=True, capture_output=True)
    ran = [listed for listed in LISTS if listed.origin[0].startswith("run:")]
    assert {listed.path.relative_to(FIXTURES) for listed in ran} == {
        p.relative_to(tmp_path) for p in tmp_path.glob("*/*")
    }
    for listed in ran:
        made = json.loads((tmp_path / listed.path.relative_to(FIXTURES)).read_text())
        kept = json.loads(listed.path.read_text())
        for facts in (made, kept):
            facts["header"] = sorted(facts.get("header", {}))
            facts["settings"] = sorted(facts.get("settings", {}).get("content", {}))
        assert made == kept
