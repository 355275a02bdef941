"""LoHa, LoKr, full, Tucker and DoRA: what they are, compared with LyCORIS and peft themselves."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import loraconv
from loraconv.detect import detect
from loraconv.errors import CorruptCheckpoint, FormatError, LoraconvError, ProofFailed, UsageError
from loraconv.source import open_source
from loraconv.verifier.numbers import Pair, in_memory, values
from loraconv.verifier.oracles import pairs_of
from loraconv.verifier.spelled import sort_keys
from tests.lycoris_files import CONV, IN, KINDS, MODULES, OUT, delta_of, made, saved, weight_decompose

WORDS = {
    "loha": "LoHa",
    "loha-rs": "LoHa",
    "lokr-half": "LoKr",
    "lokr-both": "LoKr",
    "lokr-full": "LoKr",
    "full": "full with bias",
    "dora": "DoRA",
    "dora-in": "DoRA",
    "dora-loha": "DoRA of LoHa",
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


MISFITS: dict[str, dict[str, tuple[int, ...]]] = {
    "ranks of LoHa": {"hada_w1_a": (24, 2), "hada_w1_b": (3, 16), "hada_w2_a": (24, 2), "hada_w2_b": (2, 16)},
    "rows of LoHa": {"hada_w1_a": (24, 2), "hada_w1_b": (2, 16), "hada_w2_a": (20, 2), "hada_w2_b": (2, 16)},
    "dimensions of LoHa": {"hada_w1_a": (24,), "hada_w1_b": (2, 16), "hada_w2_a": (24, 2), "hada_w2_b": (2, 16)},
    "nothing in it": {"hada_w1_a": (24, 0), "hada_w1_b": (0, 16), "hada_w2_a": (24, 2), "hada_w2_b": (2, 16)},
    "cores of LoHa": {
        **{"hada_w1_a": (2, 24), "hada_w1_b": (2, 16), "hada_t1": (2, 2, 3, 3)},
        **{"hada_w2_a": (2, 24), "hada_w2_b": (2, 16), "hada_t2": (2, 2, 3, 1)},
    },
    "ranks of LoKr": {"lokr_w1": (4, 4), "lokr_w2_a": (6, 2), "lokr_w2_b": (3, 4)},
    "dimensions of LoKr": {"lokr_w1": (4,), "lokr_w2": (6, 4)},
    "core of a LoRA": {
        "lora_down.weight": (2, 16, 1, 1),
        "lora_up.weight": (24, 2, 1, 1),
        "lora_mid.weight": (2, 3, 3, 3),
    },
    "ranks of a convolution": {"lora_down.weight": (2, 16, 3, 3), "lora_up.weight": (24, 3, 1, 1)},
    "up with a kernel": {"lora_down.weight": (2, 16, 3, 3), "lora_up.weight": (24, 2, 3, 3)},
    "full": {"diff": (24,)},
    "bias": {"diff": (24, 16), "diff_b": (23,)},
    "magnitudes": {"lora_down.weight": (2, 16), "lora_up.weight": (24, 2), "dora_scale": (23, 1)},
}


@pytest.mark.parametrize("shapes", MISFITS.values(), ids=MISFITS)
def test_tensors_that_do_not_fit_together_are_refused(shapes: dict[str, tuple[int, ...]], tmp_path: Path) -> None:
    adapter, base = tmp_path / "a.safetensors", a_base(tmp_path / "base")
    save_file({f"lora_unet_blocks_0_self_attn_q.{side}": torch.ones(*shape) for side, shape in shapes.items()}, adapter)
    commands = [
        lambda: loraconv.convert(adapter, out=tmp_path / "out", to="comfyui"),
        lambda: loraconv.convert(adapter, out=tmp_path / "out", to="peft", approximate="svd", rank=2),
        lambda: loraconv.fuse(adapter, base=base, out=tmp_path / "out"),
        lambda: loraconv.verify(adapter, adapter),
    ]
    for command in commands[: 3 if "dora_scale" in shapes else 4]:  # magnitudes are compared apart, as they are
        with pytest.raises(CorruptCheckpoint) as caught:
            command()
        assert caught.value.slug == "factor-shape"
    assert not (tmp_path / "out").exists()


def test_a_module_of_two_kinds_is_refused(tmp_path: Path) -> None:
    saved("loha", tmp_path / "in")
    file = tmp_path / "in" / "lycoris.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "lora_unet_blocks_0_ffn_0.diff": torch.ones(24, 16)}, file)
    with pytest.raises(FormatError) as caught:
        loraconv.inspect(file)
    assert caught.value.slug == "not-plain-lora"


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"lora", "locon"}))
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
        return {m: replace(p, down=in_memory(p.down), up=in_memory(p.up)) for m, p in pairs.items()}


def product(pair: Pair) -> np.ndarray[Any, Any]:
    if pair.grid is not None:
        one, other = values(pair.up).reshape(pair.grid[:2]), values(pair.down).reshape(pair.grid[2:])
        return float(pair.scale) * np.kron(one, other)
    return np.asarray(float(pair.scale) * (values(pair.up) @ values(pair.down)))


@pytest.mark.parametrize("kind", sorted(w for w in WORDS if "dora" not in w))
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


# --- conversion: what the target holds is held ------------------------------------------------------------------------


def sides(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Module, with underscores and without its prefix -> the end of a name -> tensor."""
    made: dict[str, dict[str, torch.Tensor]] = {}
    (file,) = folder.glob("*.safetensors")
    for name, tensor in load_file(file).items():
        bare = name.removeprefix("lora_unet_").removeprefix("diffusion_model.")
        module, end = re.fullmatch(r"(.+?)\.((?:lora_(?:down|up|mid|A|B)\.weight)|[a-z0-9_]+)", bare).groups()  # type: ignore[union-attr]
        end = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}.get(end, end)
        made.setdefault(module.replace(".", "_"), {})[end] = tensor
    return made


@pytest.mark.parametrize("kind", sorted([*WORDS, "locon"]))
def test_kohya_and_comfyui_hold_every_tensor_byte_for_byte_there_and_back(kind: str, tmp_path: Path) -> None:
    saved(kind, tmp_path / "in")
    there = loraconv.convert(tmp_path / "in" / "lycoris.safetensors", out=tmp_path / "mid", to="comfyui")
    back = loraconv.convert(tmp_path / "mid", out=tmp_path / "out", to="kohya")
    for proof in (*there.proofs, *back.proofs):
        assert proof.passed
        assert not proof.rounded
    want = sides(tmp_path / "in")
    for folder in ("mid", "out"):
        got = sides(tmp_path / folder)
        assert {m: set(ends) for m, ends in got.items()} == {m: set(ends) for m, ends in want.items()}
        assert all(torch.equal(tensor, got[m][end]) for m, ends in want.items() for end, tensor in ends.items())
    assert (
        load_file(tmp_path / "out" / "kohya_lora.safetensors").keys()
        == load_file(tmp_path / "in" / "lycoris.safetensors").keys()
    )


@pytest.mark.parametrize(
    ("kind", "way"),
    [
        ("loha", "--approximate svd"),
        ("lokr-half", "--approximate svd"),
        ("full", "comfyui"),
        ("tucker", "--approximate"),
    ],
)
@pytest.mark.parametrize("target", ["diffusers", "peft"])
def test_what_a_format_of_pairs_cannot_hold_is_refused_with_a_way_out(
    kind: str, way: str, target: str, tmp_path: Path
) -> None:
    saved(kind, tmp_path / "in")
    with pytest.raises(FormatError) as caught:
        loraconv.convert(tmp_path / "in" / "lycoris.safetensors", out=tmp_path / "out", to=target)
    assert caught.value.slug == "cannot-carry"
    assert way in caught.value.hint
    assert not (tmp_path / "out").exists()


# --- DoRA -------------------------------------------------------------------------------------------------------------


def test_dora_from_kohya_is_what_peft_computes(tmp_path: Path) -> None:
    saved("dora", tmp_path / "in")
    file = tmp_path / "in" / "lycoris.safetensors"
    loraconv.convert(file, out=tmp_path / "peft", to="peft")
    model = Wan()
    before = {here: model.get_submodule(here).weight.detach().clone() for here in MODULES.values()}
    peft = PeftModel.from_pretrained(model, tmp_path / "peft").merge_and_unload()
    tensors = load_file(file)
    for there, here in MODULES.items():
        name = f"lora_unet_{there.replace('.', '_')}"
        up, down = tensors[f"{name}.lora_up.weight"].double(), tensors[f"{name}.lora_down.weight"].double()
        summed = before[here].double() + 2 / 4 * up @ down
        want = tensors[f"{name}.dora_scale"].double() * summed / summed.norm(dim=1, keepdim=True)
        assert (peft.get_submodule(here).weight - want).norm() <= 1e-6 * want.norm()


def test_dora_comes_back_from_peft_byte_for_byte(tmp_path: Path) -> None:
    saved("dora", tmp_path / "in")
    loraconv.convert(tmp_path / "in" / "lycoris.safetensors", out=tmp_path / "peft", to="peft")
    loraconv.convert(tmp_path / "peft", out=tmp_path / "out", to="kohya", family="wan")
    want, got = (
        load_file(tmp_path / "in" / "lycoris.safetensors"),
        load_file(tmp_path / "out" / "kohya_lora.safetensors"),
    )
    assert want.keys() == got.keys()
    assert all(torch.equal(tensor, got[name]) for name, tensor in want.items())
    assert loraconv.verify(tmp_path / "peft", tmp_path / "out").same


def test_dora_of_a_fused_module_is_cut_by_rows_and_put_together_again(tmp_path: Path) -> None:
    name = "lora_unet_double_blocks_3_img_attn_qkv"
    noise = torch.Generator().manual_seed(1)
    tensors = {
        f"{name}.lora_down.weight": torch.randn(4, 8, generator=noise),
        f"{name}.lora_up.weight": torch.randn(24, 4, generator=noise),
        f"{name}.alpha": torch.tensor(2.0),
        f"{name}.dora_scale": torch.rand(24, 1, generator=noise),
    }
    save_file(tensors, tmp_path / "flux.safetensors")
    loraconv.convert(tmp_path / "flux.safetensors", out=tmp_path / "peft", to="peft", family="flux")
    stored = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    for number, part in enumerate(("to_q", "to_k", "to_v")):
        vector = stored[f"base_model.model.transformer_blocks.3.attn.{part}.lora_magnitude_vector"]
        assert torch.equal(vector, tensors[f"{name}.dora_scale"][8 * number : 8 * number + 8, 0])
    loraconv.convert(tmp_path / "peft", out=tmp_path / "out", to="kohya", family="flux")
    back = load_file(tmp_path / "out" / "kohya_lora.safetensors")
    assert torch.equal(back[f"{name}.dora_scale"], tensors[f"{name}.dora_scale"])


@pytest.mark.parametrize(("kind", "target"), [("dora", "diffusers"), ("dora-in", "diffusers"), ("dora-in", "peft")])
def test_dora_for_who_does_not_normalise_as_it_does_is_refused(kind: str, target: str, tmp_path: Path) -> None:
    saved(kind, tmp_path / "in")
    with pytest.raises(FormatError) as caught:
        loraconv.convert(tmp_path / "in" / "lycoris.safetensors", out=tmp_path / "out", to=target)
    assert caught.value.slug == "cannot-carry"
    options = {"approximate": "svd", "rank": 2}
    with pytest.raises(FormatError):
        loraconv.convert(tmp_path / "in" / "lycoris.safetensors", out=tmp_path / "out", to=target, **options)


class Wan(torch.nn.Module):
    """Linear layers under diffusers' names for Wan."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        for here in MODULES.values():
            place: torch.nn.Module = self
            for step in here.split(".")[:-1]:
                if not hasattr(place, step):
                    place.add_module(step, torch.nn.Module())
                place = getattr(place, step)
            place.add_module(here.split(".")[-1], torch.nn.Linear(IN, OUT))


# --- approximation ----------------------------------------------------------------------------------------------------


def relative(pairs: dict[str, Pair], deltas: dict[str, torch.Tensor]) -> dict[str, float]:
    gaps = {m: torch.from_numpy(product(pairs[m])) - delta for m, delta in deltas.items()}
    return {m: float(gap.norm() / deltas[m].norm()) for m, gap in gaps.items()}


@pytest.mark.parametrize("kind", ["loha", "loha-rs", "lokr-half", "lokr-both", "lokr-full"])
@pytest.mark.parametrize("target", ["diffusers", "peft", "kohya"])
def test_the_nearest_lora_is_as_near_as_was_asked_for_and_no_rank_too_large(
    kind: str, target: str, tmp_path: Path
) -> None:
    deltas = saved(kind, tmp_path / "in")
    options = {"approximate": "svd", "max_error": 0.1}
    result = loraconv.convert(tmp_path / "in" / "lycoris.safetensors", out=tmp_path / "out", to=target, **options)
    assert any("relative error" in notice for notice in result.notices)
    (file,) = (tmp_path / "out").glob("*.safetensors")
    pairs = pairs_in(file)
    for module, error in relative(pairs, deltas).items():
        values = torch.linalg.svdvals(deltas[module])
        rank = pairs[module].shape[1]
        assert error <= 0.1
        assert error == pytest.approx(float(values[rank:].norm() / values.norm()), abs=1e-6)
        assert float(values[rank - 1 :].norm() / values.norm()) > 0.1 - 1e-6


@pytest.mark.parametrize("kind", ["loha", "lokr-half", "lokr-both", "lokr-full"])
def test_with_every_singular_value_nothing_but_rounding_is_lost(kind: str, tmp_path: Path) -> None:
    deltas = saved(kind, tmp_path / "in")
    options = {"approximate": "svd", "max_error": 1e-6}
    loraconv.convert(tmp_path / "in" / "lycoris.safetensors", out=tmp_path / "out", to="peft", **options)
    pairs = pairs_in(tmp_path / "out")
    assert max(relative(pairs, deltas).values()) <= 1e-6
    assert all(pairs[m].shape[1] == int(torch.linalg.matrix_rank(delta)) for m, delta in deltas.items())


@pytest.mark.parametrize("kind", ["loha", "lokr-half", "lokr-full", "full"])
def test_an_untrained_adapter_becomes_a_lora_of_zeros(kind: str, tmp_path: Path) -> None:
    saved(kind, tmp_path / "in")
    file = tmp_path / "in" / "lycoris.safetensors"
    tensors = {n: t if n.endswith("alpha") else t * 0 for n, t in load_file(file).items() if not n.endswith("diff_b")}
    save_file(tensors, file)
    loraconv.convert(file, out=tmp_path / "out", to="peft", approximate="svd", max_error=0.01)
    assert not any(product(pair).any() for pair in pairs_in(tmp_path / "out").values())


def test_the_parts_of_a_fused_module_are_approximated_one_by_one(tmp_path: Path) -> None:
    name, noise = "lora_unet_double_blocks_3_img_attn_qkv", torch.Generator().manual_seed(1)
    whole = {"w1_a": (24, 2), "w1_b": (2, 8), "w2_a": (24, 2), "w2_b": (2, 8)}
    tensors = {f"{name}.hada_{side}": torch.randn(*shape, generator=noise) for side, shape in whole.items()}
    save_file({**tensors, f"{name}.alpha": torch.tensor(-1.0)}, tmp_path / "flux.safetensors")
    with pytest.raises(LoraconvError):  # as for any LoRA, no trainer has a negative alpha
        loraconv.convert(tmp_path / "flux.safetensors", out=tmp_path / "no", to="peft", approximate="svd", rank=3)
    save_file({**tensors, f"{name}.alpha": torch.tensor(1.0)}, tmp_path / "flux.safetensors")
    loraconv.convert(tmp_path / "flux.safetensors", out=tmp_path / "out", to="peft", approximate="svd", rank=3)
    w1a, w1b, w2a, w2b = (tensors[f"{name}.hada_{side}"].double() for side in whole)
    rows = (0.5 * (w1a @ w1b) * (w2a @ w2b)).chunk(3)
    deltas = {f"transformer_blocks.3.attn.to_{n}": part for n, part in zip("qkv", rows, strict=True)}
    for module, error in relative(pairs_in(tmp_path / "out"), deltas).items():
        values = torch.linalg.svdvals(deltas[module])
        assert error == pytest.approx(float(values[3:].norm() / values.norm()), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "error", "slug"),
    [
        ({"rank": 2}, UsageError, None),
        ({"max_error": 0.1}, UsageError, None),
        ({"approximate": "svd"}, UsageError, None),
        ({"approximate": "svd", "rank": 2, "max_error": 0.1}, UsageError, None),
        ({"approximate": "svd", "max_error": 1e-9}, FormatError, "max-error"),
        ({"approximate": "svd", "max_error": 1e-4, "dtype": "bf16"}, FormatError, "max-error"),
    ],
    ids=str,
)
def test_a_senseless_approximation_is_refused(
    options: dict[str, Any], error: type[LoraconvError], slug: str | None, tmp_path: Path
) -> None:
    saved("loha", tmp_path / "in")
    with pytest.raises(error) as caught:
        loraconv.convert(tmp_path / "in" / "lycoris.safetensors", out=tmp_path / "out", to="peft", **options)
    assert slug is None or caught.value.slug == slug
    assert not (tmp_path / "out").exists()


# --- fuse -------------------------------------------------------------------------------------------------------------


WEIGHTS = "diffusion_pytorch_model.safetensors"


def a_base(folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A model of one file that has the modules, and a tensor that no adapter touches."""
    folder.mkdir()
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in Wan().state_dict().items()}
    save_file({**tensors, "blocks.0.norm1.weight": torch.ones(4, dtype=dtype)}, folder / WEIGHTS)
    return folder


@pytest.mark.parametrize("kind", ["loha", "lokr-half", "lokr-both", "lokr-full", "full"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_fused_weight_is_base_plus_what_lycoris_adds_rounded_once(
    kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    deltas = saved(kind, tmp_path / "in")
    base = a_base(tmp_path / "base", dtype)
    result = loraconv.fuse(f"{tmp_path / 'in' / 'lycoris.safetensors'}@0.5", base=base, out=tmp_path / "out")
    assert result.proofs[0].passed
    before, after = load_file(base / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    touched = {m if m.endswith(".bias") else f"{m}.weight": delta for m, delta in deltas.items()}
    assert set(touched) == set(result.fused)
    for name, tensor in before.items():
        want = tensor if name not in touched else (tensor.double() + 0.5 * touched[name]).to(dtype)
        # LyCORIS' own delta is rounded in float64: a sum very near to a tie may fall to the other side.
        assert (want != after[name]).sum() <= (0 if name not in touched else 1)


def test_verify_tells_a_fused_model_with_another_delta(tmp_path: Path) -> None:
    saved("full", tmp_path / "in")
    adapter, base = tmp_path / "in" / "lycoris.safetensors", a_base(tmp_path / "base")
    loraconv.fuse(adapter, base=base, out=tmp_path / "out")
    assert loraconv.verify(adapter, tmp_path / "out", base=base).same
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    tensors["blocks.0.attn1.to_q.bias"][3] *= 1.1
    (tmp_path / "wrong").mkdir()
    save_file(tensors, tmp_path / "wrong" / WEIGHTS)
    assert not loraconv.verify(adapter, tmp_path / "wrong", base=base).same


@pytest.mark.parametrize("kind", ["loha", "lokr-half", "full"])
def test_unfuse_restores_the_base_bit_for_bit(kind: str, tmp_path: Path) -> None:
    saved(kind, tmp_path / "in")
    base = a_base(tmp_path / "base")
    loraconv.fuse(tmp_path / "in" / "lycoris.safetensors", base=base, out=tmp_path / "out", journal=True)
    loraconv.unfuse(tmp_path / "out", out=tmp_path / "back")
    before, after = load_file(base / WEIGHTS), load_file(tmp_path / "back" / WEIGHTS)
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.parametrize("kind", ["dora", "dora-in", "dora-loha"])
def test_a_fused_dora_is_what_lycoris_merges(kind: str, tmp_path: Path) -> None:
    saved(kind, tmp_path / "in")
    base, adapter = a_base(tmp_path / "base", torch.float32), tmp_path / "in" / "lycoris.safetensors"
    result = loraconv.fuse(adapter, base=base, out=tmp_path / "out")
    assert result.proofs[0].passed
    assert loraconv.verify(adapter, tmp_path / "out", base=base).same
    before, after = load_file(base / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    tensors = load_file(adapter)
    for number, (there, here) in enumerate(MODULES.items()):
        delta = delta_of(made(kind, "", number))
        size = tensors[f"lora_unet_{there.replace('.', '_')}.dora_scale"].double()
        want = weight_decompose(before[f"{here}.weight"].double() + delta, size, 1, kind != "dora-in")
        assert (after[f"{here}.weight"] - want).norm() <= 1e-7 * want.norm()


def test_a_fused_dora_is_what_peft_merges(tmp_path: Path) -> None:
    saved("dora", tmp_path / "in")
    loraconv.convert(tmp_path / "in" / "lycoris.safetensors", out=tmp_path / "peft", to="peft")
    base = a_base(tmp_path / "base", torch.float32)
    loraconv.fuse(tmp_path / "peft", base=base, out=tmp_path / "out")
    after = load_file(tmp_path / "out" / WEIGHTS)
    for name, weight in PeftModel.from_pretrained(Wan(), tmp_path / "peft").merge_and_unload().state_dict().items():
        assert (after[name] - weight).norm() <= 1e-6 * weight.norm()


def test_a_wrong_magnitude_is_noticed_in_a_fused_model(tmp_path: Path) -> None:
    saved("dora", tmp_path / "in")
    adapter, base = tmp_path / "in" / "lycoris.safetensors", a_base(tmp_path / "base")
    loraconv.fuse(adapter, base=base, out=tmp_path / "out")
    tensors = load_file(adapter)
    name = next(n for n in tensors if n.endswith("dora_scale"))
    tensors[name][5] *= 1.05
    save_file(tensors, tmp_path / "other.safetensors")
    assert not loraconv.verify(tmp_path / "other.safetensors", tmp_path / "out", base=base).same


def test_a_dora_is_fused_alone_and_at_strength_1(tmp_path: Path) -> None:
    saved("dora", tmp_path / "in")
    saved("loha", tmp_path / "loha")
    adapter, base = tmp_path / "in" / "lycoris.safetensors", a_base(tmp_path / "base")
    with pytest.raises(UsageError, match="strength 1 only"):
        loraconv.fuse(f"{adapter}@0.5", base=base, out=tmp_path / "out")
    with pytest.raises(FormatError) as caught:
        loraconv.fuse(adapter, tmp_path / "loha" / "lycoris.safetensors", base=base, out=tmp_path / "out")
    assert caught.value.slug == "merge-mismatch"


def test_the_bias_of_a_peft_lora_is_fused_as_peft_does(tmp_path: Path) -> None:
    torch.manual_seed(3)
    config = LoraConfig(r=2, lora_alpha=3, target_modules=list(MODULES.values()), lora_bias=True)
    model = get_peft_model(Wan(), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "peft")
    assert loraconv.inspect(tmp_path / "peft").contents[0].what == "LoRA with bias, 6 modules"
    loraconv.fuse(tmp_path / "peft", base=a_base(tmp_path / "base", torch.float32), out=tmp_path / "out")
    after = load_file(tmp_path / "out" / WEIGHTS)
    for name, weight in model.merge_and_unload().state_dict().items():
        assert (after[name] - weight).norm() <= 1e-6 * weight.norm()


# --- a wrong output does not pass its proof ---------------------------------------------------------------------------


def test_magnitudes_of_another_module_do_not_pass_the_proof(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from loraconv import renaming

    def shifted(*_: Any) -> list[Any]:
        outputs = written(*_)
        return [replace(o, tensor=outputs[n - 1].tensor) for n, o in enumerate(outputs)]

    written = renaming._written
    monkeypatch.setattr(renaming, "_written", shifted)
    saved("dora", tmp_path / "in")
    with pytest.raises(ProofFailed, match="magnitudes of DoRA"):
        loraconv.convert(tmp_path / "in" / "lycoris.safetensors", out=tmp_path / "out", to="peft")
    assert not (tmp_path / "out").exists()


def test_a_renamed_tensor_of_another_side_does_not_pass_the_proof(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loraconv import renaming

    def swapped(target: Any, module: str, side: str) -> str:
        return spelled(target, module, {"hada_w1_a": "hada_w2_a", "hada_w2_a": "hada_w1_a"}.get(side, side))

    spelled = renaming._spelled
    monkeypatch.setattr(renaming, "_spelled", swapped)
    saved("loha", tmp_path / "in")
    with pytest.raises(ProofFailed, match="another delta"):
        loraconv.convert(tmp_path / "in" / "lycoris.safetensors", out=tmp_path / "out", to="comfyui")


@pytest.mark.parametrize(("options", "match"), [({"rank": 2}, "nearer"), ({"max_error": 0.3}, "nearer")], ids=str)
def test_an_approximation_that_is_not_the_nearest_does_not_pass_its_proof(
    options: dict[str, Any], match: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loraconv import approximating

    def unsorted(one: Any, other: Any) -> Any:
        whole = kron(one, other)
        left, right = whole.vectors(len(whole.values))
        return approximating.Decomposed(whole.values, lambda rank: (left[:, ::-1][:, :rank], right[:, ::-1][:, :rank]))

    kron = approximating._kron
    monkeypatch.setattr(approximating, "_kron", unsorted)
    saved("lokr-full", tmp_path / "in")
    with pytest.raises(ProofFailed, match=match):
        loraconv.convert(
            tmp_path / "in" / "lycoris.safetensors", out=tmp_path / "out", to="peft", approximate="svd", **options
        )
