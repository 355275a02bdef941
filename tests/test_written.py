"""What was written is read again and proved: each thing that can be wrong with it, given to the proof alone."""

from __future__ import annotations

import json
from contextlib import ExitStack, nullcontext
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from peft import LoraConfig
from safetensors.numpy import save_file

from loraconv.errors import FormatError, ProofFailed
from loraconv.io.input_file import InputFile
from loraconv.io.safetensors_read import read_safetensors
from loraconv.verifier.check import _check_index, as_failure, prove_written, read_adapter_files
from loraconv.verifier.loadable import check_written
from loraconv.verifier.numbers import Held, Pair
from loraconv.verifier.origin import record, recorded_dtypes, source_record
from loraconv.verifier.parts import PartOf, prove_parts
from loraconv.verifier.proof import Proof

RNG = np.random.default_rng(3)
MODULES = tuple(f"transformer_blocks.{n}.attn1.{m}" for n in (0, 1) for m in ("to_q", "to_k"))
RANK, SIZE = 2, 6
FACTORS = {m: (RNG.normal(size=(RANK, SIZE)), RNG.normal(size=(SIZE, RANK))) for m in MODULES}
MAGNITUDES = {m: RNG.normal(size=SIZE) + 4 for m in MODULES}
FILE = "adapter_model.safetensors"


def peft_folder(
    folder: Path, modules: Any = MODULES, alpha: float = 3, dora: Any = (), dtype: str = "float32", more: Any = None
) -> Path:
    """A folder as peft writes it: the file and its configuration; ``dora`` are the modules with magnitudes."""
    begin, arrays = "base_model.model.", dict[str, Any]()
    for module in modules:
        down, up = FACTORS[module]
        arrays |= {f"{begin}{module}.lora_A.weight": down, f"{begin}{module}.lora_B.weight": up}
    arrays |= {f"{begin}{module}.lora_magnitude_vector": MAGNITUDES[module] for module in dora}
    arrays |= more or {}
    folder.mkdir(parents=True)
    save_file({name: np.ascontiguousarray(a.astype(dtype)) for name, a in arrays.items()}, folder / FILE)
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": alpha, "target_modules": [*modules]}
    (folder / "adapter_config.json").write_text(json.dumps(settings | ({"use_dora": True} if dora else {})))
    return folder


def source(stack: ExitStack, folder: Path) -> Any:
    """A folder of peft as the verifier is given it."""
    read = read_safetensors(stack.enter_context(InputFile(folder / FILE)))
    config = json.loads((folder / "adapter_config.json").read_text())
    return SimpleNamespace(ranks=[read.tensors], metadata=read.metadata, config=config)


def proof(one: Path, other: Path, **more: Any) -> Proof:
    """That of ``other``, made of ``one``."""
    with ExitStack() as stack:
        given = source(stack, one)
        return prove_written(other, kind="peft", files=[FILE], source_kind="peft", source=given, **more)


def failed(found: Proof) -> list[str]:
    return [check.name for check in found.checks if not check.passed]


# --- an adapter -----------------------------------------------------------------------------------------------------


def test_magnitudes_that_are_lost_or_new_fail_the_proof(tmp_path: Path) -> None:
    plain, dora = (peft_folder(tmp_path / name, dora=m) for name, m in (("plain", ()), ("dora", MODULES)))
    right = proof(dora, peft_folder(tmp_path / "again", dora=MODULES))
    assert right.passed
    assert right.checks[-1].name == "magnitudes of DoRA"
    assert all(check.name != "magnitudes of DoRA" for check in proof(plain, plain).checks)
    assert failed(proof(dora, plain)) == failed(proof(plain, dora)) == ["magnitudes of DoRA"]


def test_what_the_user_asked_for_is_what_is_proved(tmp_path: Path) -> None:
    three, six = peft_folder(tmp_path / "3"), peft_folder(tmp_path / "6", alpha=6)
    assert failed(proof(three, six)) != []
    assert failed(proof(three, six, alpha=Fraction(6))) == []
    half = peft_folder(tmp_path / "half", dtype="float16")
    assert failed(proof(three, half)) == ["every module, shape and dtype"]
    assert failed(proof(three, half, dtype="F16")) == []
    assert failed(proof(three, three, every_consumer=True)) == ["same strength where the header is not read"]
    one = peft_folder(tmp_path / "1", alpha=RANK)
    assert failed(proof(one, one, every_consumer=True)) == []


def test_a_name_that_is_kept_is_no_part_of_the_adapter(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "it", more={"steps": np.arange(3)})
    with ExitStack() as stack, pytest.raises(ProofFailed):
        read_adapter_files(folder, "peft", [FILE], "", stack)
    with ExitStack() as stack:
        found = read_adapter_files(folder, "peft", [FILE], "", stack, ["steps", "elsewhere"])
        assert (list(found.kept), set(found.pairs)) == (["steps"], set(MODULES))
        assert found.settings is not None
        assert found.settings["lora_alpha"] == 3


@pytest.mark.parametrize("field", ["use_dora", "lora_bias"])
def test_what_pefts_own_defaults_say_is_plain_lora(tmp_path: Path, field: str) -> None:
    """As the installed peft writes its configuration, every field of it; and one that asks for more."""
    tensors: Any = {
        f"base_model.model.{m}.lora_{s}.weight": Held(np.ones(shape), "F32")
        for m in ("a.q", "a.k") for s, shape in (("A", (2, 4)), ("B", (4, 2)))
    }  # fmt: skip
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["a.q", "a.k"])
    for asked in (False, True):
        setattr(config, field, asked)
        config.save_pretrained(str(tmp_path))
        settings = json.loads((tmp_path / "adapter_config.json").read_text())
        assert len(settings) > 20
        with pytest.raises(ProofFailed) if asked else nullcontext():
            check_written("peft", tensors, {}, settings)
    settings |= {field: False, "megatron_core": "another"}
    with pytest.raises(ProofFailed, match="megatron_core"):
        check_written("peft", tensors, {}, settings)


# --- what goes wrong ------------------------------------------------------------------------------------------------


def test_whose_error_it_is_goes_by_the_folder_that_it_names(tmp_path: Path) -> None:
    def raised(error: BaseException) -> BaseException:
        with pytest.raises((Exception, MemoryError)) as caught, as_failure(tmp_path):
            raise error
        return caught.value

    own = raised(FormatError("cut off", where=str(tmp_path / "x.safetensors"), why="too short"))
    assert isinstance(own, ProofFailed)
    assert own.why == "cut off; too short"
    bare = raised(FormatError(f"{tmp_path} is cut off"))
    assert isinstance(bare, ProofFailed)
    assert bare.why == f"{tmp_path} is cut off"
    for kept in (FormatError("cut off", where="/elsewhere/x"), ProofFailed("no"), MemoryError()):
        assert raised(kept) is kept
    odd = raised(KeyError("r"))
    assert isinstance(odd, ProofFailed)
    assert odd.why == "KeyError: 'r'"


A, B = (f"diffusion_pytorch_model-0000{n}-of-00002.safetensors" for n in (1, 2))
ONE = "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    ("shards", "index", "right"),
    [
        ({A: "xy", B: "z"}, {"x": A, "y": A, "z": B}, True), ({A: "xy", B: "z"}, {"x": A, "y": B, "z": B}, False),
        ({A: "xy", B: "z"}, {"x": A, "y": A}, False), ({A: "xy", B: "yz"}, {"x": A, "y": B, "z": B}, False),
        ({ONE: "x"}, None, True), ({ONE: "x"}, {"x": ONE}, True), ({ONE: "x"}, {"x": A}, False),
    ],
)  # fmt: skip
def test_the_index_says_of_every_tensor_the_one_shard_that_it_is_in(
    tmp_path: Path, shards: dict[str, str], index: Any, right: bool
) -> None:
    if index is not None:
        file = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
        file.write_text(json.dumps({"metadata": {}, "weight_map": index}))
    one: Any = SimpleNamespace()
    with nullcontext() if right else pytest.raises(ProofFailed, match="index of the shards"):
        _check_index(tmp_path, {name: dict.fromkeys(tensors, one) for name, tensors in shards.items()})


def test_shards_without_an_index_are_no_base(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        _check_index(tmp_path, {A: {}, B: {}})


# --- records --------------------------------------------------------------------------------------------------------


def test_the_record_of_the_header_goes_before_that_of_the_settings() -> None:
    one, two = {"": {"alpha": "1"}}, {"": {"alpha": "2"}}
    settings = {"loraconv": {"origin": two}}
    assert record({"loraconv.origin": json.dumps(one)}, settings) == one
    assert record({"other": json.dumps(one)}, settings) == two
    nothing: list[Any] = [None, {}, {"loraconv": 7}, {"loraconv": {}}, {"origin": two}]
    for none in nothing:
        assert record({}, none) is None
        assert source_record({}, none) == {}
    with pytest.raises(TypeError):
        record({}, {"loraconv": {"origin": [1]}})
    assert source_record({}, {"loraconv": {"origin": [1]}}) == {}


def test_the_dtypes_of_a_record_are_those_that_are_some() -> None:
    told = {"": {"dtype": "BF16"}, "a": {"dtype": "F16", "rank": 4}, "b": {"dtype": "I8"}, "c": {}, "d": 7,
            "e": {"dtype": ["F16"]}}  # fmt: skip
    assert recorded_dtypes(told) == {"": "BF16", "a": "F16"}


# --- parts ----------------------------------------------------------------------------------------------------------


def parts(folder: Path, **changes: Any) -> Proof:
    """The proof of an adapter in two parts, one a layer; ``changes`` are those of what is written as the second."""
    written = [peft_folder(folder / "0", MODULES[:2]), peft_folder(folder / "1", **{"modules": MODULES[2:]} | changes)]
    planned = [
        PartOf(path.name, "peft", (FILE,), "", frozenset(modules))
        for path, modules in zip(written, (MODULES[:2], MODULES[2:]), strict=True)
    ]
    with ExitStack() as stack:
        stored = read_safetensors(stack.enter_context(InputFile(peft_folder(folder / "whole") / FILE))).tensors
        sides = {m: [stored[f"base_model.model.{m}.lora_{s}.weight"] for s in "AB"] for m in MODULES}
        pairs = {m: Pair(down, up, Fraction(3, RANK)) for m, (down, up) in sides.items()}
        return prove_parts(folder, parts=planned, source=pairs)


def test_parts_are_the_whole_and_every_module_is_in_its_own(tmp_path: Path) -> None:
    right = parts(tmp_path / "right")
    assert right.passed
    assert [(check.level, check.count, check.detail) for check in right.checks[:3]] == [
        ("L0", 4, ""), ("L0", 2, ""), ("L1", 8, ""),
    ]  # fmt: skip
    twice = parts(tmp_path / "twice", modules=MODULES[1:])
    assert (failed(twice), twice.checks[1].detail) == (["each module in its own part"], "1")
    less = parts(tmp_path / "less", modules=MODULES[3:])
    assert set(failed(less)) == {"each module in its own part", "every module, shape and dtype"}


def test_a_part_with_another_scale_has_not_kept_its_bytes(tmp_path: Path) -> None:
    found = parts(tmp_path / "it", alpha=6)
    (bytes_check,) = [check for check in found.checks if check.level == "L1"]
    assert (bytes_check.passed, bytes_check.detail) == (False, "only 6 of 8 factors keep their bytes")
