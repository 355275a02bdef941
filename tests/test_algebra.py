"""LoHa, LoKr, full, Tucker and DoRA: what they are, compared with LyCORIS and peft themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import loraconv
from loraconv.detect import detect
from loraconv.errors import CorruptCheckpoint, FormatError
from loraconv.source import open_source
from loraconv.verifier.numbers import Held, Pair, Tensor, values
from loraconv.verifier.oracles import pairs_of
from loraconv.verifier.spelled import sort_keys
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


# --- deltas -----------------------------------------------------------------------------------------------------------


def plain_lora(deltas: dict[str, torch.Tensor], folder: Path, dtype: torch.dtype = torch.float64) -> Path:
    """A diffusers file whose factors are each delta and an identity, which it therefore holds exactly."""
    tensors = {}
    for module, delta in deltas.items():
        flat = delta.reshape(len(delta), -1)
        tensors[f"transformer.{module}.lora_A.weight"] = torch.eye(flat.shape[1], dtype=dtype)
        tensors[f"transformer.{module}.lora_B.weight"] = flat.to(dtype).contiguous()
    folder.mkdir(parents=True)
    save_file(tensors, folder / "pytorch_lora_weights.safetensors")
    return folder


@pytest.mark.parametrize("kind", sorted(WORDS))
def test_the_delta_of_every_kind_is_that_of_lycoris(kind: str, tmp_path: Path) -> None:
    saved(kind, tmp_path / "in")
    deltas = saved(kind, tmp_path / "comfyui", flat=False)
    pairs = pairs_in(tmp_path / "in" / "lycoris.safetensors")
    assert pairs.keys() == deltas.keys() == pairs_in(tmp_path / "comfyui" / "lycoris.safetensors").keys()
    for module, delta in deltas.items():
        flat = delta.reshape(len(delta), -1)
        got = torch.from_numpy(product(pairs[module])).reshape(flat.shape)
        assert (got - flat).norm() <= 1e-6 * flat.norm()


def pairs_in(file: Path) -> dict[str, Pair]:
    """The adapter as the verifier knows it, less its magnitudes."""
    with open_source(file) as source:
        plain = sort_keys(source.tensors).plain
        pairs = pairs_of(detect(source).dialect.name, [plain], source.metadata, None, None)
        return {m: Pair(held(p.down), held(p.up), p.scale) for m, p in pairs.items()}


def held(tensor: Tensor) -> Held:
    return Held(values(tensor), tensor.dtype)


def product(pair: Pair) -> np.ndarray[Any, Any]:
    return np.asarray(float(pair.scale) * (values(pair.up) @ values(pair.down)))


@pytest.mark.parametrize("kind", sorted(WORDS.keys() - {"dora", "dora-in"}))
def test_verify_finds_the_delta_in_a_plain_lora_that_holds_it(kind: str, tmp_path: Path) -> None:
    deltas = saved(kind, tmp_path / "in")
    weights = {module: delta for module, delta in deltas.items() if not module.endswith(".bias")}
    if kind == "full":
        tensors = load_file(tmp_path / "in" / "lycoris.safetensors")
        save_file(
            {n: t for n, t in tensors.items() if not n.endswith("diff_b")}, tmp_path / "in" / "lycoris.safetensors"
        )
    file = tmp_path / "in" / "lycoris.safetensors"
    assert loraconv.verify(file, plain_lora(weights, tmp_path / "right"), bound=1e-6).same
    module = next(iter(weights))
    weights[module] = weights[module] * 1.001
    assert not loraconv.verify(file, plain_lora(weights, tmp_path / "wrong"), bound=1e-6).same


def test_verify_tells_a_lost_or_a_changed_magnitude(tmp_path: Path) -> None:
    saved("dora", tmp_path / "in")
    saved("dora", tmp_path / "other", flat=False)
    files = [tmp_path / name / "lycoris.safetensors" for name in ("in", "other")]
    result = loraconv.verify(*files)
    assert result.same
    assert result.magnitudes.equal == 6
    tensors = load_file(files[1])
    name = next(n for n in tensors if n.endswith("dora_scale"))
    save_file({**tensors, name: tensors[name] * 1.01}, files[1])
    assert [f.slug for f in loraconv.verify(*files).findings] == ["dora-differs"]
    save_file({n: t for n, t in tensors.items() if not n.endswith("dora_scale")}, files[1])
    assert [f.slug for f in loraconv.verify(*files).findings] == ["dora-lost"]


def test_magnitudes_of_rows_and_of_columns_are_not_the_same(tmp_path: Path) -> None:
    both = {"lora_down.weight": torch.ones(2, 8), "lora_up.weight": torch.ones(8, 2), "alpha": torch.tensor(2.0)}
    for folder, shape in (("rows", (8, 1)), ("columns", (1, 8))):
        (tmp_path / folder).mkdir()
        tensors = {f"lora_unet_blocks_0_self_attn_q.{side}": t for side, t in both.items()}
        tensors["lora_unet_blocks_0_self_attn_q.dora_scale"] = torch.arange(1.0, 9.0).reshape(shape)
        save_file(tensors, tmp_path / folder / "a.safetensors")
    result = loraconv.verify(tmp_path / "rows" / "a.safetensors", tmp_path / "columns" / "a.safetensors")
    assert [f.slug for f in result.findings] == ["dora-differs"]
