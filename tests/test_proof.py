"""The proof fails on a wrong output. Each mistake is made in the converter itself, on its way to the disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loraconv
from loraconv import conversion
from loraconv.errors import ProofFailed
from loraconv.io.safetensors_write import write_safetensors
from loraconv.lazy import Lazy, TensorRef, decode, encode
from loraconv.verify.numbers import Expectation, Held, Pair, compare, relative_error, slack
from loraconv.verify.proof import Check, Control, Proof
from tests.sat_run import RunSpec, build

Tensors = dict[str, Lazy]
Q, K = (f"transformer.transformer_blocks.0.attn1.to_{x}.lora_" for x in "qk")


class Made:
    """A tensor out of an array, to be written in place of another."""

    def __init__(self, values: Any, dtype: str) -> None:
        self.values, self.dtype, self.shape = values, dtype, tuple(values.shape)

    def pieces(self) -> Iterable[bytes]:
        yield encode(self.values, self.dtype)

    def leaves(self) -> Iterable[TensorRef]:
        return iter(())


def changed(tensor: Lazy, how: Callable[[Any], Any]) -> Made:
    values = decode(b"".join(tensor.pieces()), tensor.dtype).reshape(tensor.shape)
    return Made(how(values), tensor.dtype)


def swap(tensors: Tensors, one: str, other: str) -> Tensors:
    return {**tensors, one: tensors[other], other: tensors[one]}


def on(name: str, how: Callable[[Any], Any]) -> Callable[[Tensors], Tensors]:
    return lambda t: {**t, name: changed(t[name], how)}


def every_up(how: Callable[[Any], Any]) -> Callable[[Tensors], Tensors]:
    return lambda t: {n: changed(x, how) if ".lora_B." in n else x for n, x in t.items()}


def renamed(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda t: {n.replace(old, new): x for n, x in t.items()}


ADAPTER_MISTAKES: dict[str, Callable[[Tensors], Tensors]] = {
    "q and k swapped": lambda t: swap(swap(t, Q + "A.weight", K + "A.weight"), Q + "B.weight", K + "B.weight"),
    "only the up of q and k swapped": lambda t: swap(t, Q + "B.weight", K + "B.weight"),
    "alpha ignored": every_up(lambda x: x * 4),
    "scale applied twice": every_up(lambda x: x / 4),
    "one module too strong": on(Q + "B.weight", lambda x: x * 2),
    "sign lost": on(Q + "B.weight", np.abs),
    "one number off by one unit": on(Q + "B.weight", lambda x: np.where(x == x.flat[0], x * (1 + 2.0**-22), x)),
    "one number of down off by one unit": on(Q + "A.weight", lambda x: np.where(x == x.flat[0], x * (1 + 2.0**-22), x)),
    "a module missing": lambda t: {n: x for n, x in t.items() if not n.startswith(Q)},
    "a factor missing": lambda t: {n: x for n, x in t.items() if n != Q + "A.weight"},
    "a module too many": lambda t: {**t, **{n.replace("_blocks.0.", "_blocks.9."): x for n, x in t.items()}},
    "layers renumbered": renamed("_blocks.0.", "_blocks.7."),
    "the prefix lost": renamed("transformer.transformer", "transformer"),
    "rows reversed": on(Q + "B.weight", lambda x: x[::-1]),
    "up zeroed": on(Q + "B.weight", lambda x: x * 0),
    "not a number": on(Q + "B.weight", lambda x: x + np.nan),
}

BLOCK = "transformer_blocks.0."
BASE_MISTAKES: dict[str, Callable[[Tensors], Tensors]] = {
    "q and k swapped": lambda t: swap(t, BLOCK + "attn1.to_q.weight", BLOCK + "attn1.to_k.weight"),
    "q and k biases swapped": lambda t: swap(t, BLOCK + "attn1.to_q.bias", BLOCK + "attn1.to_k.bias"),
    "norms swapped": lambda t: swap(t, BLOCK + "attn1.norm_q.weight", BLOCK + "attn1.norm_k.weight"),
    "modulations swapped": lambda t: swap(t, BLOCK + "norm1.linear.weight", BLOCK + "norm2.linear.weight"),
    "final norms swapped": lambda t: swap(t, "norm_final.weight", "norm_out.norm.weight"),
    "output projection transposed": on(BLOCK + "attn1.to_out.0.weight", lambda x: x.T),
    "patch kernel in another order": on("patch_embed.proj.weight", lambda x: x.transpose(0, 1, 3, 2)),
    "a tensor missing": lambda t: {n: x for n, x in t.items() if n != BLOCK + "ff.net.2.bias"},
    "a tensor too many": lambda t: {**t, "patch_embed.pos_embedding": t["norm_final.weight"]},
    "one number off by one unit": on("proj_out.weight", lambda x: np.where(x == x.flat[0], x * (1 + 2.0**-22), x)),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(RunSpec(variant="2b", rank=4, num_layers=2), tmp_path_factory.mktemp("run"))


def write_wrongly(monkeypatch: pytest.MonkeyPatch, mistake: Callable[[Tensors], Tensors]) -> None:
    def write(file: Any, tensors: Iterable[tuple[str, Lazy]], metadata: Mapping[str, str]) -> None:
        write_safetensors(file, mistake(dict(tensors)).items(), metadata)

    monkeypatch.setattr(conversion, "write_safetensors", write)


@pytest.mark.parametrize("mistake", ADAPTER_MISTAKES)
def test_a_wrong_adapter_is_never_left_behind(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mistake: str
) -> None:
    write_wrongly(monkeypatch, ADAPTER_MISTAKES[mistake])
    with pytest.raises(ProofFailed) as failure:
        loraconv.sat2diffusers(run, out=tmp_path / "out")
    assert failure.value.exit_code == 5
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mistake", BASE_MISTAKES)
def test_a_wrong_base_is_never_left_behind(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mistake: str
) -> None:
    write_wrongly(monkeypatch, BASE_MISTAKES[mistake])
    with pytest.raises(ProofFailed):
        loraconv.sat2diffusers(run, out=tmp_path / "out", what="base")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("to", ["peft", "sat", "diffusers"])
def test_a_wrong_alpha_in_what_is_written_beside_fails(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    """The settings file, or the header, that carries alpha."""
    real = conversion.plan_adapter

    def wrong(*args: Any, **options: Any) -> Any:
        plan = real(*args, **options)
        texts = {
            n: t.replace('"lora_alpha": 1', '"lora_alpha": 2').replace("lora_alpha: 1", "lora_alpha: 2")
            for n, t in plan.texts.items()
        }
        files = []
        for file in plan.files:
            header = dict(file.metadata)
            if "lora_adapter_metadata" in header:
                config = json.loads(header["lora_adapter_metadata"])
                config["transformer.lora_alpha"] *= 2
                header["lora_adapter_metadata"] = json.dumps(config)
            files.append(replace(file, metadata=header))
        return replace(plan, texts=texts, files=tuple(files))

    monkeypatch.setattr(conversion, "plan_adapter", wrong)
    with pytest.raises(ProofFailed):
        loraconv.convert(run, out=tmp_path / "out", to=to)
    assert list(tmp_path.iterdir()) == []


def test_a_right_output_has_every_check_and_all_eight_controls(run: Path, tmp_path: Path) -> None:
    result = loraconv.sat2diffusers(run, out=tmp_path / "out", what="all")
    adapter, base = result.proofs
    assert adapter.caught == base.caught == "8/8"
    assert [c.level for c in adapter.checks] == ["L0", "L1", "L2", "L2"]
    assert [c.level for c in base.checks][:2] == ["L0", "L1"]
    assert adapter.passed
    assert base.passed
    manifest = json.loads((tmp_path / "out" / "loraconv.json").read_text())
    assert [Proof.from_dict(p) for p in manifest["proofs"]] == [adapter, base]


def test_an_untrained_adapter_says_which_controls_mean_nothing(tmp_path: Path) -> None:
    run = build(RunSpec(variant="2b", num_layers=2, zero_b=True), tmp_path / "run")
    (proof,) = loraconv.sat2diffusers(run, out=tmp_path / "out").proofs
    silent = {c.name for c in proof.controls if c.caught is None}
    assert silent == {"scale doubled", "scale divided by rank", "up zeroed", "stored in a lower precision"}
    assert proof.passed


def test_a_proof_without_a_caught_control_is_none() -> None:
    check = Check("L0", "x", True, 1)
    assert not Proof("adapter", (check,), ()).passed
    assert not Proof("adapter", (check,), (Control("a", None, ""),)).passed
    assert not Proof("adapter", (check,), (Control("a", True, ""), Control("b", False, ""))).passed
    assert Proof("adapter", (check,), (Control("a", True, ""), Control("b", None, ""))).passed


def random_pair(seed: int, scale: Fraction | float = Fraction(1, 4)) -> Pair:
    rng = np.random.default_rng(seed)
    return Pair(Held(rng.normal(size=(4, 24)), "F64"), Held(rng.normal(size=(16, 4)), "F64"), scale)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_rounding_once_is_within_the_bound_and_rounding_coarser_is_not(dtype: str) -> None:
    exact = random_pair(1)

    def stored(kind: str) -> Pair:
        sides = (exact.down, exact.up)
        down, up = (decode(encode(s.values, kind), kind).reshape(s.shape) for s in sides if isinstance(s, Held))
        return Pair(Held(down, dtype), Held(up, dtype), exact.scale)

    assert compare(exact, stored(dtype)).within
    assert not compare(exact, stored({"F32": "BF16", "F16": "BF16", "BF16": "BF16"}[dtype])).within or dtype == "BF16"
    error, bound = relative_error(exact, stored(dtype))
    assert 0 < error <= bound


def test_the_error_of_a_pair_is_that_of_the_full_products() -> None:
    one, other = random_pair(1), random_pair(2, 0.3)
    full = [np.asarray(p.scale, dtype=float) * (p.up.values @ p.down.values) for p in (one, other)]  # type: ignore[union-attr]
    expected = np.linalg.norm(full[0] - full[1]) / np.linalg.norm(full[0])
    assert relative_error(one, other)[0] == pytest.approx(expected, rel=1e-12)


def test_half_a_unit_is_the_distance_to_the_nearest_number_at_most() -> None:
    values = np.concatenate([np.random.default_rng(3).normal(size=1000) * 10.0**e for e in range(-9, 4)])
    for dtype in ("F32", "F16", "BF16"):
        stored = decode(encode(values, dtype), dtype)
        assert np.all(np.abs(stored - values) <= slack(values, dtype))
        assert np.any(np.abs(stored - values) > slack(values, dtype) / 2)


def test_an_expectation_says_the_dtype_of_both_factors() -> None:
    pair = random_pair(4)
    assert Expectation({"m": pair}, {"m": ("F64", "F64")}).pairs["m"] is pair
