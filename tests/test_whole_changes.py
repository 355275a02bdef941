"""What is fused without two small factors (LoHa, LoKr, full, DoRA): every number is the nearest to the exact one."""

from __future__ import annotations

import tracemalloc
from decimal import Decimal, localcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import loraconv

WEIGHTS = "diffusion_pytorch_model.safetensors"
THERE, HERE = "lora_unet_blocks_0_self_attn_q", "blocks.0.attn1.to_q.weight"
Tensors = dict[str, torch.Tensor]


def fused(folder: Path, weight: torch.Tensor, *adapters: Tensors) -> torch.Tensor:
    """The weight after a fusion of these adapters, whose proof has passed."""
    folder.mkdir(exist_ok=True)
    (folder / "base").mkdir()
    save_file({HERE: weight.contiguous()}, folder / "base" / WEIGHTS)
    for number, tensors in enumerate(adapters):
        save_file({f"{THERE}.{side}": t.contiguous() for side, t in tensors.items()}, folder / f"{number}.safetensors")
    files = [folder / f"{number}.safetensors" for number in range(len(adapters))]
    assert loraconv.fuse(*files, base=folder / "base", out=folder / "out").proofs[0].passed
    return load_file(folder / "out" / WEIGHTS)[HERE]


def numbers(tensor: torch.Tensor) -> list[list[Decimal]]:
    return [[Decimal(value) for value in row] for row in tensor.double().tolist()]


def times(one: list[list[Decimal]], other: list[list[Decimal]]) -> list[list[Decimal]]:
    return [
        [sum(a * b for a, b in zip(row, column, strict=True)) for column in zip(*other, strict=True)] for row in one
    ]


def nearest(exact: list[list[Decimal]]) -> torch.Tensor:
    """To bfloat16, ties to even: by the two neighbours of a first guess."""
    made = torch.tensor([[float(value) for value in row] for row in exact]).bfloat16()
    for row, line in enumerate(exact):
        for column, value in enumerate(line):
            guess = made[row, column]
            near = [guess, *(torch.nextafter(guess, torch.tensor(end).bfloat16()) for end in (-1e30, 1e30))]
            distances = [(abs(Decimal(one.item()) - value), one.view(torch.int16).item() & 1) for one in near]
            made[row, column] = near[distances.index(min(distances))]
    return made


def dora(weight: torch.Tensor, tensors: Tensors) -> list[list[Decimal]]:
    """By the definition, with a hundred digits."""
    delta = times(numbers(tensors["lora_up.weight"]), numbers(tensors["lora_down.weight"]))
    scale = Decimal(tensors["alpha"].item()) / tensors["lora_down.weight"].shape[0]
    rows = zip(numbers(weight), delta, strict=True)
    total = [[w + scale * d for w, d in zip(*row, strict=True)] for row in rows]
    size, by_column = numbers(tensors["dora_scale"]), tensors["dora_scale"].shape[0] == 1
    lines = list(zip(*total, strict=True)) if by_column else total
    norms = [sum(x * x for x in line).sqrt() for line in lines]
    return [
        [x * (size[0][j] / norms[j] if by_column else size[i][0] / norms[i]) for j, x in enumerate(row)]
        for i, row in enumerate(total)
    ]


@pytest.mark.parametrize("shape", [(24, 1), (1, 16)], ids=["rows", "columns"])
def test_a_dora_is_the_nearest_number_to_what_a_hundred_digits_give(shape: tuple[int, int], tmp_path: Path) -> None:
    torch.manual_seed(1)
    tensors = {"lora_down.weight": torch.randn(3, 16), "lora_up.weight": torch.randn(24, 3), "alpha": torch.tensor(1.0)}
    tensors["dora_scale"] = torch.rand(shape) + 1
    weight = torch.randn(24, 16).bfloat16()
    with localcontext(prec=100):
        want = nearest(dora(weight, tensors))
    assert torch.equal(fused(tmp_path, weight, tensors), want)


@pytest.mark.parametrize(("rest", "want"), [(0.0, 1 + 2**-6), (2.0**-40, 1 + 2**-7)], ids=["a tie", "a little less"])
@pytest.mark.parametrize("by_column", [False, True], ids=["rows", "columns"])
def test_a_dora_is_rounded_right_where_float64_sees_a_tie(
    rest: float, want: float, by_column: bool, tmp_path: Path
) -> None:
    torch.manual_seed(4)
    weight, size, up = torch.randn(24, 16), torch.rand(24, 1) + 1, torch.randn(24, 3)
    weight[0] = 0
    weight[0, 0], weight[0, 1], size[0], up[0] = (
        1.0,
        rest,
        1 + 2**-7 + 2**-8,
        0,
    )  # the norm is the root of 1 + rest ** 2
    tensors = {"lora_down.weight": torch.randn(3, 16), "lora_up.weight": up, "dora_scale": size}
    if by_column:
        weight, tensors = (
            weight.T,
            {"lora_down.weight": up.T, "lora_up.weight": torch.randn(16, 3), "dora_scale": size.T},
        )
    assert fused(tmp_path, weight.bfloat16(), tensors)[0, 0].item() == want


@pytest.mark.parametrize(("more", "want"), [(0.0, 1.0), (2.0**-70, 1 + 2**-7), (-(2.0**-70), 1.0)])
def test_a_sum_of_two_kinds_is_rounded_right_where_float64_sees_a_tie(more: float, want: float, tmp_path: Path) -> None:
    lokr = {"lokr_w1": torch.full((2, 2), 2.0**-4), "lokr_w2": torch.full((1, 1), 2.0**-4)}
    full = {"diff": torch.full((2, 2), more)}
    full["diff"][1, 1] = 0.5
    made = fused(tmp_path, torch.ones(2, 2).bfloat16(), lokr, full)
    assert made[0].tolist() == [want, want]
    assert made[1, 1].item() == 1.5  # 1.50390625 is a tie too


KINDS = {
    "lokr": ({"lokr_w1": (4, 4), "lokr_w2_a": (6, 2), "lokr_w2_b": (2, 4)}, lambda t: torch.kron(*t)),
    "loha": ({f"hada_w{n}_{s}": d for n in (1, 2) for s, d in (("a", (24, 2)), ("b", (2, 16)))}, lambda t: t[0] * t[1]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_number_of_a_sum_of_loras_is_the_nearest(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(2)
    shapes, combined = KINDS[kind]
    tensors = {side: torch.randn(*shape) for side, shape in shapes.items()}
    lora = {"lora_down.weight": torch.randn(3, 16), "lora_up.weight": torch.randn(24, 3)}
    weight = torch.randn(24, 16).bfloat16()
    wide = {side: tensor.double() for side, tensor in (tensors | lora).items()}
    if kind == "lokr":
        delta = combined([wide["lokr_w1"], wide["lokr_w2_a"] @ wide["lokr_w2_b"]])
    else:
        delta = combined([wide["hada_w1_a"] @ wide["hada_w1_b"], wide["hada_w2_a"] @ wide["hada_w2_b"]])
    exact = weight.double() + delta + wide["lora_up.weight"] @ wide["lora_down.weight"]
    assert torch.equal(fused(tmp_path, weight, tensors, lora), exact.bfloat16())


@pytest.mark.parametrize("kind", [pytest.param("rows", marks=pytest.mark.slow), "columns", "lokr"])
def test_no_more_than_a_few_blocks_are_in_memory(kind: str, tmp_path: Path) -> None:
    size = 2048
    if kind == "lokr":
        tensors = {"lokr_w1": torch.rand(16, 16), "lokr_w2": torch.rand(128, 128)}
    else:
        tensors = {"lora_down.weight": torch.ones(4, size), "lora_up.weight": torch.ones(size, 4)}
        shape = (1, size) if kind == "columns" else (size, 1)
        tensors["dora_scale"] = torch.rand(shape) + 1  # another one in every block of rows
    weight = torch.randn(size, size).bfloat16()
    tracemalloc.start()
    fused(tmp_path, weight, tensors)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # The blocks of all threads take two thirds of this, whatever the size; one whole matrix in float64 would be beyond.
    assert peak < 2.5 * size * size * 8
