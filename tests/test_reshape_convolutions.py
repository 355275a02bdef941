"""``merge``, ``resize`` and ``split`` of adapters with convolutions.

Oracles: what torch's own convolutions compute with the factors, numpy's SVD of the delta as a matrix, diffusers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import loraconv
from loraconv import products
from loraconv.errors import FormatError, ProofFailed
from loraconv.reshaping import summing
from tests import test_fuse_sdxl as sdxl
from tests.cli_support import parsed_hint
from tests.dialect_files import FORMATS, PIPELINE
from tests.support import header
from tests.test_sdxl import pipeline

Tensors = dict[str, torch.Tensor]
KOHYA, DIFFUSERS = FORMATS["kohya"].file, FORMATS["diffusers"].file
#: kohya's name -> that of diffusers, and the shape of the weight: two kernels, one of a single number, a linear layer.
MODULES = {
    "lora_unet_input_blocks_1_0_in_layers_2": ("unet.down_blocks.0.resnets.0.conv1", (12, 8, 3, 3)),
    "lora_unet_input_blocks_4_0_skip_connection": ("unet.down_blocks.1.resnets.0.conv_shortcut", (10, 8, 1, 1)),
    "lora_unet_middle_block_1_proj_in": ("unet.mid_block.attentions.0.proj_in", (9, 8)),
    "lora_te1_text_model_encoder_layers_0_mlp_fc1": ("text_encoder.text_model.encoder.layers.0.mlp.fc1", (16, 8)),
}
KERNEL = "unet.down_blocks.0.resnets.0.conv1"
#: Each number of up is rounded once; see test_merge.
ONCE = 2.0**-24 * 16


def factors(shape: tuple[int, ...], rank: int, noise: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    out, inside, *kernel = shape
    down = torch.randn((rank, inside, *kernel), generator=noise)
    return down, torch.randn((out, rank, *[1 for _ in kernel]), generator=noise)


def locon(file: Path, seed: int, rank: int, alpha: float, modules: Mapping[str, Any] = MODULES) -> Path:
    """A file of kohya's, as LyCORIS' LoCon writes it."""
    noise, tensors = torch.Generator().manual_seed(seed), {}
    for name, (_, shape) in modules.items():
        tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"] = factors(shape, rank, noise)
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, file)
    return file


def delta(down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """What the two add to a weight, told by torch: each input channel and place of the kernel is set to 1 by itself."""
    down, up = down.double(), up.double()
    if down.ndim == 2:
        return up @ down
    _, inside, *kernel = down.shape
    count = inside * int(np.prod(kernel))
    ones = torch.eye(count, dtype=torch.float64).reshape(count, inside, *kernel)
    convolve = torch.nn.functional.conv2d if down.ndim == 4 else torch.nn.functional.conv3d
    return convolve(convolve(ones, down), up).reshape(count, -1).T.reshape(-1, inside, *kernel)


def of_kohya(file: Path, strength: float = 1.0) -> dict[str, torch.Tensor]:
    tensors, made = load_file(file), {}
    for name, down in tensors.items():
        if name.endswith(".lora_down.weight"):
            module = name.removesuffix(".lora_down.weight")
            scale = tensors[f"{module}.alpha"].item() / down.shape[0]
            made[MODULES[module][0]] = strength * scale * delta(down, tensors[f"{module}.lora_up.weight"])
    return made


def of_diffusers(file: Path) -> dict[str, torch.Tensor]:
    """At scale 1, which is what the header has to say."""
    told = json.loads(header(file)["lora_adapter_metadata"])
    assert all(told[f"{part}.lora_alpha"] == told[f"{part}.r"] for part in PIPELINE if f"{part}.r" in told)
    tensors = load_file(file)
    modules = [name.removesuffix(".lora_A.weight") for name in tensors if ".lora_A." in name]
    return {m: delta(tensors[f"{m}.lora_A.weight"], tensors[f"{m}.lora_B.weight"]) for m in modules}


def added(*deltas: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    made: dict[str, torch.Tensor] = {}
    for one in deltas:
        for module, value in one.items():
            made[module] = made[module] + value if module in made else value
    return made


def apart(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> dict[str, float]:
    assert sorted(one) == sorted(other)
    assert {m: t.shape for m, t in one.items()} == {m: t.shape for m, t in other.items()}
    return {m: float((one[m] - other[m]).norm() / other[m].norm()) for m in other}


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    """Two adapters of different rank and scale, on modules that they share in part."""
    some = dict(list(MODULES.items())[:3])
    return locon(tmp_path / "a.safetensors", 1, 4, 2.0), locon(tmp_path / "b.safetensors", 2, 3, 6.0, some)


# --- merge ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["diffusers", "kohya"])
def test_a_merged_kernel_is_the_sum_of_the_kernels(two: tuple[Path, Path], tmp_path: Path, to: str) -> None:
    a, b = two
    result = loraconv.merge(f"{a}@0.8", f"{b}@-0.5", out=tmp_path / "out", to=to)
    want = added(of_kohya(a, 0.8), of_kohya(b, -0.5))
    file = tmp_path / "out" / FORMATS[to].file
    made = of_kohya(file) if to == "kohya" else of_diffusers(file)
    assert max(apart(made, want).values()) < ONCE
    assert result.error == 0
    assert json.loads(header(file)["loraconv.proof"])["numbers"] == "within half a unit in the last place"


def test_powers_of_two_leave_every_bit_of_a_kernel(two: tuple[Path, Path], tmp_path: Path) -> None:
    a, b = two
    result = loraconv.merge(a, f"{b}@0.5", out=tmp_path / "out")
    made, one, other = load_file(tmp_path / "out" / DIFFUSERS), load_file(a), load_file(b)
    for there, (here, _) in list(MODULES.items())[:3]:
        down, up = f"{there}.lora_down.weight", f"{there}.lora_up.weight"
        assert torch.equal(made[f"{here}.lora_A.weight"], torch.cat([one[down], other[down]]))
        assert torch.equal(made[f"{here}.lora_B.weight"], torch.cat([one[up] / 2, other[up]], dim=1))
    assert result.proofs[0].checks[1].figure == 0
    assert json.loads(header(tmp_path / "out" / DIFFUSERS)["loraconv.proof"])["numbers"] == "equal"


def test_diffusers_adds_the_sum_to_a_real_unet(tmp_path: Path) -> None:
    """Every layer of the pipeline, one adapter in diffusers' names and one in kohya's."""
    one = sdxl.write_adapter(tmp_path / "one" / DIFFUSERS, sdxl.factors(4))
    other = sdxl.write_adapter(tmp_path / "other" / DIFFUSERS, sdxl.factors(5))
    loraconv.convert(other, out=tmp_path / "kohya", to="kohya")
    loraconv.merge(f"{one}@0.75", f"{tmp_path / 'kohya'}@-0.5", out=tmp_path / "out")
    first, second = (load_file(file) for file in (one, other))
    pipe = pipeline()
    before = {name: layer.weight.detach().clone() for name, layer in sdxl.layers(pipe).items()}
    pipe.load_lora_weights(str(tmp_path / "out"), weight_name=DIFFUSERS)
    pipe.fuse_lora(components=list(PIPELINE))
    pipe.unload_lora_weights()
    for name, layer in sdxl.layers(pipe).items():
        down, up = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
        scale = sdxl.ALPHA / sdxl.RANK
        want = scale * (0.75 * delta(first[down], first[up]) - 0.5 * delta(second[down], second[up]))
        got = layer.weight.detach().double() - before[name].double()
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("rank", [None, 2])
def test_kernels_of_three_dimensions_are_merged(tmp_path: Path, rank: int | None) -> None:
    noise = torch.Generator().manual_seed(6)
    modules = {"transformer.patch_embedding": (12, 4, 1, 2, 2), "transformer.blocks.0.attn1.to_q": (8, 8)}
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for file in files:
        made: Tensors = {}
        for name, shape in modules.items():
            made[f"{name}.lora_A.weight"], made[f"{name}.lora_B.weight"] = factors(shape, 3, noise)
        told = {"transformer.r": 3, "transformer.lora_alpha": 3}
        save_file(made, file, {"format": "pt", "lora_adapter_metadata": json.dumps(told)})
    loraconv.merge(*files, out=tmp_path / "out", rank=rank)
    got, want = of_diffusers(tmp_path / "out" / DIFFUSERS), added(*map(of_diffusers, files))
    if rank is None:
        assert max(apart(got, want).values()) < ONCE
    else:
        assert apart(got, want) == pytest.approx({m: best(t, rank) for m, t in want.items()}, rel=1e-5)


# --- resize -----------------------------------------------------------------------------------------------------------


def best(weight: torch.Tensor, rank: int) -> float:
    """The relative error of the nearest matrix of this rank (Eckart and Young), by numpy's SVD of the whole delta."""
    values = np.linalg.svd(weight.reshape(weight.shape[0], -1).numpy(), compute_uv=False)
    return float(np.linalg.norm(values[rank:]) / np.linalg.norm(values))


@pytest.mark.parametrize("to", ["diffusers", "kohya", None])
def test_a_resized_kernel_is_the_nearest_of_its_rank(two: tuple[Path, Path], tmp_path: Path, to: str | None) -> None:
    a, _ = two
    result = loraconv.resize(a, out=tmp_path / "out", rank=2, to=to)
    want = of_kohya(a)
    made = of_diffusers(tmp_path / "out" / DIFFUSERS) if to == "diffusers" else of_kohya(tmp_path / "out" / KOHYA)
    errors = {module: best(weight, 2) for module, weight in want.items()}
    assert apart(made, want) == pytest.approx(errors, rel=1e-5)
    assert {m.module: m.error for m in result.modules} == pytest.approx(errors, rel=1e-9)


def test_a_kernel_keeps_the_share_of_energy_that_was_asked_for(two: tuple[Path, Path], tmp_path: Path) -> None:
    a, _ = two
    result = loraconv.resize(a, out=tmp_path / "out", energy=0.8)
    want, made = of_kohya(a), of_kohya(tmp_path / "out" / KOHYA)
    ranks = {module.module: module.rank for module in result.modules}
    for module, error in apart(made, want).items():
        assert error**2 <= 0.2
        assert ranks[module] == 1 or best(want[module], ranks[module] - 1) ** 2 > 0.2


def test_peft_loads_a_resized_kernel_and_computes_with_it(tmp_path: Path) -> None:
    from peft import PeftModel

    there = "lora_unet_input_blocks_1_0_in_layers_2"
    a = locon(tmp_path / "a.safetensors", 7, 4, 4.0, {there: MODULES[there]})
    loraconv.resize(a, out=tmp_path / "out", rank=2, to="peft")
    path, base = KERNEL.removeprefix("unet.").split("."), torch.nn.Conv2d(8, 12, 3, padding=1)
    model: torch.nn.Module = base
    for step in reversed(path):
        parent = torch.nn.Module()
        parent.add_module(step, model)
        model = parent
    before = base.weight.detach().clone()
    merged = PeftModel.from_pretrained(model, tmp_path / "out").merge_and_unload()
    after = merged.get_submodule(".".join(path)).weight.detach()
    assert apart({KERNEL: (after - before).double()}, of_kohya(a))[KERNEL] == pytest.approx(
        best(of_kohya(a)[KERNEL], 2), rel=1e-4
    )


# --- split ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["component", "module"])
def test_a_split_leaves_every_byte_and_shape_of_a_kernel(two: tuple[Path, Path], tmp_path: Path, by: Any) -> None:
    a, _ = two
    result = loraconv.split(a, out=tmp_path / "out", by=by)
    seen: Tensors = {}
    for part in result.parts:
        seen |= load_file(tmp_path / "out" / part.name / KOHYA)
    whole = load_file(a)
    assert seen.keys() == whole.keys()
    assert all(torch.equal(seen[name], tensor) for name, tensor in whole.items())


# --- what cannot be done ----------------------------------------------------------------------------------------------


def error_of(call: Any) -> FormatError:
    with pytest.raises(FormatError) as caught:
        call()
    assert caught.value.hint
    return caught.value


@pytest.mark.parametrize("shape", [(12, 8, 3, 1), (12, 8, 1, 3), (12, 24, 1, 1), (12, 24), (10, 8, 3, 3)])
def test_kernels_of_different_shapes_are_not_added(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """As matrices, all but the last are (12, 24)."""
    there, (here, _) = next(iter(MODULES.items()))
    first = (12, 8, 1, 3) if shape == (12, 8, 3, 1) else (12, 8, 3, 1)
    a = locon(tmp_path / "a.safetensors", 1, 2, 1.0, {there: (here, first)})
    b = locon(tmp_path / "b.safetensors", 2, 2, 1.0, {there: (here, shape)})
    error = error_of(lambda: loraconv.merge(a, b, out=tmp_path / "out"))
    assert error.slug == "merge-mismatch"
    assert "x".join(map(str, shape)) in error.where
    assert not (tmp_path / "out").exists()


def test_a_format_for_linear_layers_gets_no_kernel(two: tuple[Path, Path], tmp_path: Path) -> None:
    a, b = two
    error = error_of(lambda: loraconv.merge(a, b, out=tmp_path / "out", to="lycoris"))
    assert error.slug == "cannot-carry"
    assert "2 convolutions" in error.what


@pytest.mark.parametrize("command", ["merge", "resize", "split"])
def test_a_tucker_core_is_refused_with_the_way_to_a_plain_lora(tmp_path: Path, command: str) -> None:
    there = "lora_unet_input_blocks_1_0_in_layers_2"
    tensors = {
        f"{there}.lora_down.weight": torch.randn(2, 8, 1, 1),
        f"{there}.lora_mid.weight": torch.randn(2, 2, 3, 3),
        f"{there}.lora_up.weight": torch.randn(12, 2, 1, 1),
        f"{there}.alpha": torch.tensor(1.0),
    }
    save_file(tensors, tmp_path / "tucker.safetensors")
    calls = {
        "merge": lambda: loraconv.merge(tmp_path / "tucker.safetensors", out=tmp_path / "out"),
        "resize": lambda: loraconv.resize(tmp_path / "tucker.safetensors", out=tmp_path / "out", rank=1),
        "split": lambda: loraconv.split(tmp_path / "tucker.safetensors", out=tmp_path / "out", by="component"),
    }
    error = error_of(calls[command])
    assert error.slug == "not-plain-lora"
    assert "--approximate svd" in str(error.hint)
    parsed_hint(str(error.hint))
    plain = loraconv.convert(
        tmp_path / "tucker.safetensors", out=tmp_path / "plain", to="peft", approximate="svd", max_error=1e-3
    )
    loraconv.resize(plain.out, out=tmp_path / "small", rank=1)


@pytest.mark.parametrize("command", ["merge", "resize", "split"])
def test_a_kernel_on_a_linear_layer_is_refused(tmp_path: Path, command: str) -> None:
    there = "lora_unet_middle_block_1_proj_in"
    a = locon(tmp_path / "a.safetensors", 1, 2, 1.0, {there: (MODULES[there][0], (9, 8, 3, 3))})
    calls = {
        "merge": lambda: loraconv.merge(a, out=tmp_path / "out"),
        "resize": lambda: loraconv.resize(a, out=tmp_path / "out", rank=1),
        "split": lambda: loraconv.split(a, out=tmp_path / "out", by="module"),
    }
    assert error_of(calls[command]).slug == "factor-shape"


# --- the proof --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["merge", "resize"])
@pytest.mark.parametrize("kernel", [(3, 1), (1, 1), ()], ids=["turned", "lost", "flat"])
def test_a_kernel_of_another_shape_does_not_pass_the_proof(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, kernel: tuple[int, ...]
) -> None:
    there, (here, _) = next(iter(MODULES.items()))
    a, b = (locon(tmp_path / f"{n}.safetensors", n, 3, 1.0, {there: (here, (12, 8, 1, 3))}) for n in (1, 2))
    right = summing.with_kernel

    def wrong(factor: Any, _: tuple[int, ...]) -> Any:
        return right(factor, kernel)

    monkeypatch.setattr(summing, "with_kernel", wrong)
    calls = {
        "merge": lambda: loraconv.merge(a, b, out=tmp_path / "out", rank=2),
        "resize": lambda: loraconv.resize(a, out=tmp_path / "out", rank=2),
    }
    with pytest.raises(ProofFailed) as caught:
        calls[command]()
    assert "every module, its size and dtype" in str(caught.value.where)
    assert not (tmp_path / "out").exists()


def test_sources_of_different_kernels_do_not_pass_the_proof(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there, (here, _) = next(iter(MODULES.items()))
    shapes = [(12, 8, 1, 3), (12, 8, 3, 1)]
    files = [locon(tmp_path / f"{shape[2]}.safetensors", 1, 2, 1.0, {there: (here, shape)}) for shape in shapes]
    monkeypatch.setattr(summing, "_refuse_other_shapes", lambda terms: None)
    with pytest.raises(ProofFailed) as caught:
        loraconv.merge(*files, out=tmp_path / "out", rank=1)
    assert f"of another size in another source: {here}" in str(caught.value.where)


def test_a_converted_kernel_that_became_a_matrix_does_not_pass_the_proof(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = next(iter(MODULES))
    a = locon(tmp_path / "a.safetensors", 1, 2, 1.0, {there: MODULES[there]})
    monkeypatch.setattr(products, "with_kernel", lambda factor, kernel: factor)
    with pytest.raises(ProofFailed, match="every module, shape and dtype"):
        loraconv.convert(a, out=tmp_path / "out", to="diffusers")


def test_an_approximated_kernel_is_not_called_equal(tmp_path: Path) -> None:
    there = next(iter(MODULES))
    a = locon(tmp_path / "a.safetensors", 1, 4, 2.0, {there: MODULES[there]})
    loraconv.resize(a, out=tmp_path / "out", rank=2)
    assert json.loads(header(tmp_path / "out" / KOHYA)["loraconv.proof"])["numbers"] != "equal"
