"""LoHa, LoKr, full, Tucker and DoRA: what they are, compared with LyCORIS and peft themselves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import loraconv
from loraconv.errors import CorruptCheckpoint, FormatError
from tests.lycoris_files import CONV, KINDS, saved

WORDS = {
    "loha": "LoHa",
    "loha-rs": "LoHa",
    "lokr-half": "LoKr",
    "lokr-both": "LoKr",
    "lokr-full": "LoKr",
    "full": "full with bias",
    "dora": "DoRA",
    "dora-in": "DoRA",
    "tucker": "LoRA with a Tucker core",
    "loha-tucker": "LoHa with Tucker cores",
    "loha-conv": "LoHa",
    "lokr-tucker": "LoKr with a Tucker core",
}


@pytest.mark.parametrize("flat", [True, False], ids=["kohya", "comfyui"])
@pytest.mark.parametrize("kind", WORDS)
def test_inspect_says_what_kind_every_module_is(kind: str, flat: bool, tmp_path: Path) -> None:
    saved(kind, tmp_path / "in", flat=flat)
    summary = loraconv.inspect(tmp_path / "in" / "lycoris.safetensors")
    assert summary.dialect == ("kohya" if flat else "comfyui")
    count = 1 if kind in CONV else 6
    assert summary.contents[0].what == f"{WORDS[kind]}, {count} modules"
    assert not any(group.what == "not understood" for group in summary.contents)
    assert sum(group.tensors for group in summary.contents) == len(load_file(tmp_path / "in" / "lycoris.safetensors"))


def changed(tmp_path: Path, kind: str, end: str, value: torch.Tensor | None = None) -> Path:
    """A file of this kind less one tensor, or with another in its place."""
    saved(kind, tmp_path / "in")
    file = tmp_path / "in" / "lycoris.safetensors"
    tensors = load_file(file)
    name = next(n for n in tensors if n.endswith(end))
    tensors.pop(name)
    save_file(tensors if value is None else {**tensors, name: value}, file)
    return file


@pytest.mark.parametrize(("kind", "end"), [("loha", "hada_w2_b"), ("lokr-half", "lokr_w1"), ("lokr-both", "lokr_w2_a")])
def test_a_module_with_a_tensor_missing_is_refused(kind: str, end: str, tmp_path: Path) -> None:
    with pytest.raises(CorruptCheckpoint) as caught:
        loraconv.inspect(changed(tmp_path, kind, end))
    assert caught.value.slug == "factor-missing"


def test_a_module_of_two_kinds_is_refused(tmp_path: Path) -> None:
    saved("loha", tmp_path / "in")
    file = tmp_path / "in" / "lycoris.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "lora_unet_blocks_0_ffn_0.diff": torch.ones(24, 16)}, file)
    with pytest.raises(FormatError) as caught:
        loraconv.inspect(file)
    assert caught.value.slug == "not-plain-lora"


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"lora"}))
@pytest.mark.parametrize("command", ["resize", "merge", "split"])
def test_commands_for_plain_lora_refuse_it_by_name(kind: str, command: str, tmp_path: Path) -> None:
    saved(kind, tmp_path / "in")
    options = {"rank": 2} if command == "resize" else {"by": "layers"} if command == "split" else {}
    with pytest.raises(FormatError) as caught:
        getattr(loraconv, command)(tmp_path / "in" / "lycoris.safetensors", out=tmp_path / "out", **options)
    assert caught.value.slug == "not-plain-lora"
    assert not (tmp_path / "out").exists()
