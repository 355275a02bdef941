"""The proof of an extracted LoRA on models whose differences are known: whole numbers, so that sums are exact."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from loraconv.io.input_file import InputFile
from loraconv.io.safetensors_read import read_safetensors
from loraconv.verifier.extracted import ALL, prove_extracted
from loraconv.verifier.proof import Proof
from loraconv.verifier.reshaped import ASKED, NAMES, STATED, Claims

Q, K = (f"transformer_blocks.0.attn1.{m}" for m in ("to_q", "to_k"))
FILE = "pytorch_lora_weights.safetensors"
RANK, OUT, IN = 2, 1100, 1000  # a weight of more than a million numbers is looked at in parts


class Case:
    """A base, an adapter for q and k, and the fine-tune that is their sum."""

    def __init__(self, folder: Path) -> None:
        rng = np.random.default_rng(0)
        self.folder, self.files, self.count = folder, list[InputFile](), 0
        self.factors = {m: (self.whole(rng, OUT, RANK), self.whole(rng, RANK, IN)) for m in (Q, K)}
        self.base = {f"{m}.weight": self.whole(rng, OUT, IN) for m in (Q, K)} | {"norm.weight": self.whole(rng, 4)}
        self.base["steps"] = np.arange(3)
        self.tuned = dict(self.base)
        for module, (up, down) in self.factors.items():
            self.tuned[f"{module}.weight"] = self.base[f"{module}.weight"] + up @ down

    @staticmethod
    def whole(rng: Any, *shape: int) -> Any:
        return rng.integers(-8, 9, size=shape).astype(np.float32)

    def read(self, arrays: dict[str, Any]) -> Any:
        self.count += 1
        path = self.folder / f"{self.count}.safetensors"
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path)
        self.files.append(InputFile(path))
        return read_safetensors(self.files[-1]).tensors

    def proof(
        self, *, alpha: int = RANK, left: Any = (), errors: Any = None, asked: float | None = None,
        dtype: str = "F32", ignored: bool = False,
    ) -> Proof:  # fmt: skip
        self.count += 1
        out = self.folder / f"out{self.count}"
        out.mkdir()
        arrays = {}
        for module, (up, down) in self.factors.items():
            arrays |= {f"transformer.{module}.lora_A.weight": down, f"transformer.{module}.lora_B.weight": up}
        config = {"r": RANK, "lora_alpha": alpha, "target_modules": list(self.factors)}
        header = json.dumps({f"transformer.{key}": value for key, value in config.items()})
        save_file(
            {n: np.ascontiguousarray(a) for n, a in arrays.items()}, out / FILE, {"lora_adapter_metadata": header}
        )
        errors = dict.fromkeys(self.factors, 0.0) if errors is None else errors
        return prove_extracted(
            out, kind="diffusers", files=[FILE], settings_file="", tuned=self.read(self.tuned),
            base=self.read(self.base), claims=Claims(errors, asked, dtype), left=frozenset(left),
            scale_ignored=ignored,
        )  # fmt: skip


@pytest.fixture
def case(tmp_path: Path) -> Iterator[Case]:
    made = Case(tmp_path)
    yield made
    for file in made.files:
        file.close()


def failed(proof: Proof) -> dict[str, str]:
    return {check.name: check.detail for check in proof.checks if not check.passed}


def test_an_exact_difference_has_no_error_and_its_mistakes_are_found(case: Case) -> None:
    proof = case.proof(asked=0.5, ignored=True)
    assert proof.passed
    names = [(c.level, c.name, c.count) for c in proof.checks]
    assert names[:4] == [("L0", NAMES, 2), ("L0", ALL, 4), ("L2", STATED, 2), ("L2", ASKED, 2)]
    assert len(names) == 5
    _, _, stated, asked, _ = proof.checks
    assert stated.figure == asked.figure == 0.0
    assert asked.bound == 0.5
    rooms = [
        np.linalg.norm(up) * np.linalg.norm(down) / np.linalg.norm(up @ down) for up, down in case.factors.values()
    ]
    assert stated.bound is not None
    assert 2.0**-24 < stated.bound < 2.0**-23 * max(rooms)
    assert {control.name: control.by for control in proof.controls}["a module dropped"] == NAMES
    assert {control.name: control.by for control in proof.controls}["scale doubled"] == STATED


def test_the_error_is_that_of_all_rows_of_the_weights(case: Case) -> None:
    """The last row of q is off by 1 in every number."""
    delta = case.factors[Q][0] @ case.factors[Q][1]
    case.tuned[f"{Q}.weight"] = case.tuned[f"{Q}.weight"].copy()
    case.tuned[f"{Q}.weight"][-1] += 1
    delta = delta.astype(np.float64)
    delta[-1] += 1
    error = float(np.sqrt(IN) / np.linalg.norm(delta))
    right = {Q: error, K: 0.0}
    proof = case.proof(errors=right, asked=error * 1.0001)
    assert proof.passed
    assert proof.checks[2].figure == pytest.approx(error, rel=1e-9)
    assert proof.checks[2].bound == pytest.approx(error, rel=1e-3)
    assert failed(case.proof()) == {STATED: Q}
    assert failed(case.proof(errors={Q: error * 1.01, K: 0.0})) == {STATED: Q}
    wrong = case.proof(errors=right, asked=error * 0.999)
    assert failed(wrong) == {ASKED: Q}
    assert wrong.controls == ()


def test_every_changed_tensor_is_a_module_or_said_to_be_left_out(case: Case) -> None:
    case.tuned["norm.weight"] = case.base["norm.weight"] + 1
    assert failed(case.proof()) == {ALL: "norm.weight"}
    assert case.proof(left=["norm.weight"]).passed
    case.tuned["steps"] = case.base["steps"] + 1
    assert failed(case.proof(left=["norm.weight"])) == {ALL: "steps"}
    assert failed(case.proof(left=["norm.weight", "steps", "x"])) == {ALL: "x"}
    case.tuned["norm.weight"] = case.base["norm.weight"].astype(np.float64)
    assert case.proof(left=["steps"]).passed
    case.tuned["norm.weight"] = case.base["norm.weight"].astype(np.int64)
    assert failed(case.proof(left=["steps"])) == {ALL: "norm.weight"}


def test_of_many_tensors_four_are_named(case: Case) -> None:
    for name in "abcdef":
        case.base[name], case.tuned[name] = np.zeros(2, np.float32), np.ones(2, np.float32)
    assert failed(case.proof()) == {ALL: "a; b; c; d"}


def test_a_module_that_changed_nothing_or_is_not_there_is_named(case: Case) -> None:
    case.tuned[f"{K}.weight"] = case.base[f"{K}.weight"]
    assert failed(case.proof()) == {ALL: f"{K}.weight"}
    del case.factors[K]
    assert case.proof().passed
    case.tuned["more"] = case.base["norm.weight"]
    assert list(failed(case.proof())) == [ALL]


def test_sizes_dtype_and_scale_are_looked_at(case: Case) -> None:
    assert failed(case.proof(dtype="F16")) == {NAMES: f"{K}; {Q}"}
    twice = case.proof(alpha=2 * RANK, ignored=True)
    assert set(failed(twice)) >= {STATED}
    assert len(failed(twice)) == 2
    up, down = case.factors[K]
    case.factors[K] = up[:-1], down
    assert failed(case.proof()) == {NAMES: K}
    case.factors[K] = up, down[:, :-1]
    assert failed(case.proof()) == {NAMES: K}
    assert case.proof().controls == ()
