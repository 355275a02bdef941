"""Module names, flattened and back; detection by everything but the prefix alone; verify across dialects."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import loraconv
from loraconv.io.input_file import InputFile
from loraconv.io.safetensors_read import read_safetensors
from loraconv.lazy import Number, Padded, Rows, TensorRef, Zeros, read
from loraconv.naming import Naming, Vocabulary, components, namings
from loraconv.registry import dialects, families
from loraconv.rules import Family, Rename, fill
from loraconv.verifier.original_names import here
from tests.dialect_files import FORMATS, MODELS, READ_ONLY, write

WAYS = [
    pytest.param(way, id=f"{d.name}-{f.name}-{n}")
    for d in dialects()
    for f in families()
    for n, way in enumerate(namings(d.name, f.name))
]


@pytest.mark.parametrize("way", WAYS)
def test_every_module_has_a_name_of_its_own_that_leads_back_to_it(way: Naming) -> None:
    own = (*way.family.modules, *way.family.norms)
    templates = (*way.spelling.heres, *way.spelling.norm_heres) if way.spelling else own
    beside = way.family.beside
    # Where one prefix stands before several components, the file does not say which of them it is.
    told = len(set(way.prefixes.values())) == len(way.prefixes)
    for template in (*templates, *beside):
        module = fill(template, {"i": "7", "j": "3"})
        found = way.write(module)
        if found is None:
            assert not way.family.component or template in beside, "only another component may be without a name"
            continue
        written, _, part = found
        back = way.find(written)
        assert back is not None
        again = fill(back[0].targets[part], back[1])
        assert again == module if told else again.partition(".")[2] == module.partition(".")[2]


ORIGINAL = [f for f in families() if "original" in f.spellings and f.component == "transformer"]


def rows_of(chunks: tuple[int, ...], of: int) -> list[int]:
    """The rows that these equal chunks of 840 have, in their order."""
    return [row for n in chunks for row in range(n * 840 // of, (n + 1) * 840 // of)]


@pytest.mark.parametrize("family", ORIGINAL, ids=lambda family: family.name)
def test_the_proof_and_the_table_say_the_same_of_every_original_name(family: Family) -> None:
    fields = {"i": "7", "j": "3"}
    rules = (*family.spellings["original"].rules, *family.spellings["original"].norms)
    said = here([fill(rule.there, fields) for rule in rules], original=True)
    for rule, shares in zip(rules, said, strict=True):
        for ratio in {1.0, getattr(rule, "ratio", 1.0)}:
            columns = int(840 / ratio)
            pieces = rule.pieces(840, columns)
            table = {
                fill(t, fields): rows_of(n, sum(map(len, pieces))) for t, n in zip(rule.targets, pieces, strict=True)
            }
            proof = {s.module: rows_of(s.chunks, s.of) for s in (share.sized(840, columns) for share in shares)}
            assert proof == {module: rows for module, rows in table.items() if rows}, rule


def rename(name: str) -> tuple[str, tuple[Rename, int]]:
    return name, (Rename(name, name), 0)


def test_two_names_that_are_one_when_flattened_fail_when_the_table_is_read() -> None:
    names = [rename("img_attn.proj"), rename("img.attn_proj")]
    Vocabulary(names, ".")
    with pytest.raises(ValueError, match="ambiguous"):
        Vocabulary(names, "_")


@pytest.mark.parametrize(
    "name", ["blocks_x_to_q", "blocks_01_to_q", "blocks_1_to_k", "blocks__to_q", "", "blocks_٣_to_q"]
)
def test_a_flattened_name_that_the_family_lacks_is_not_guessed(name: str) -> None:
    words = Vocabulary([rename("blocks.{i}.to_q")], "_")
    assert words.find(name) is None
    assert words.find("blocks_12_to_q") == (Rename("blocks.{i}.to_q", "blocks.{i}.to_q"), 0, {"i": "12"})


def test_a_pipeline_of_several_components_is_known_and_a_language_model_is_none() -> None:
    by_name = {f.name: components(f) for f in families()}
    assert by_name["sdxl"] == ("unet", "text_encoder", "text_encoder_2")
    assert by_name["flux"] == ("transformer", "text_encoder")
    assert by_name["llama"] == ()
    assert by_name["wan"] == ("transformer",)


# --- detection ------------------------------------------------------------------------------------------------------


def test_a_prefix_does_not_decide_original_names_behind_transformer_are_comfyui(tmp_path: Path) -> None:
    """As diffusion-pipe writes HunyuanVideo."""
    write(FORMATS["comfyui"], "hunyuan-video", tmp_path / "in")
    tensors = load_file(tmp_path / "in" / FORMATS["comfyui"].file)
    swapped = {name.replace("diffusion_model.", "transformer."): t for name, t in tensors.items()}
    save_file(swapped, tmp_path / "x.safetensors")
    assert loraconv.inspect(tmp_path / "x.safetensors").dialect == "comfyui"


@pytest.mark.parametrize("ends", [("lora_down", "lora_up"), ("lora_A.default", "lora_B.default")])
def test_comfyui_reads_every_spelling_of_the_factors(ends: tuple[str, str], tmp_path: Path) -> None:
    write(FORMATS["comfyui"], "wan", tmp_path / "in")
    tensors = load_file(tmp_path / "in" / FORMATS["comfyui"].file)
    spelled = {n.replace("lora_A", ends[0]).replace("lora_B", ends[1]): t for n, t in tensors.items()}
    save_file(spelled, tmp_path / "x.safetensors")
    loraconv.convert(tmp_path / "x.safetensors", out=tmp_path / "one", to="diffusers")
    loraconv.convert(tmp_path / "in", out=tmp_path / "two", to="diffusers")
    one, two = (load_file(tmp_path / n / FORMATS["diffusers"].file) for n in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in two)


def test_peft_keys_with_the_name_they_have_in_memory_are_read(tmp_path: Path) -> None:
    write(FORMATS["peft"], "cogvideox", tmp_path / "in")
    file = tmp_path / "in" / FORMATS["peft"].file
    named = {n.replace(".weight", ".default.weight"): t for n, t in load_file(file).items()}
    plain = load_file(file)
    save_file(named, file)
    loraconv.convert(tmp_path / "in", out=tmp_path / "out", to="peft")
    written = load_file(tmp_path / "out" / FORMATS["peft"].file)
    assert all(torch.equal(written[name], tensor) for name, tensor in plain.items())


def test_processor_keys_of_old_diffusers_are_their_projections(tmp_path: Path) -> None:
    noise = torch.Generator().manual_seed(0)
    tensors = {}
    for name in ("to_q", "to_k", "to_v", "to_out"):
        begin = f"transformer.transformer_blocks.0.attn1.processor.{name}_lora"
        tensors[f"{begin}.down.weight"] = torch.randn(4, 8, generator=noise)
        tensors[f"{begin}.up.weight"] = torch.randn(8, 4, generator=noise)
    save_file(tensors, tmp_path / "x.safetensors")
    loraconv.convert(tmp_path / "x.safetensors", out=tmp_path / "out", to="diffusers")
    made = load_file(tmp_path / "out" / FORMATS["diffusers"].file)
    want = tensors["transformer.transformer_blocks.0.attn1.processor.to_out_lora.up.weight"]
    assert torch.equal(made["transformer.transformer_blocks.0.attn1.to_out.0.lora_B.weight"], want)
    assert len(made) == 8


def test_finetrainers_alpha_is_the_one_in_its_own_header_key(tmp_path: Path) -> None:
    write(FORMATS["finetrainers"], "wan", tmp_path / "in")
    facts = loraconv.inspect(tmp_path / "in").adapter
    assert facts is not None
    assert facts.scales == ("1/2",)
    assert facts.alpha_sources == ("header lora_config",)


def test_a_file_that_says_no_alpha_names_the_trainers_that_do_not_mean_one(tmp_path: Path) -> None:
    write(FORMATS["simpletuner"], "cogvideox", tmp_path / "in")
    tensors = load_file(tmp_path / "in" / FORMATS["simpletuner"].file)
    save_file({n.replace("base_model.model.", ""): t for n, t in tensors.items()}, tmp_path / "x.safetensors")
    assert any("CogVideo's finetune/" in notice for notice in loraconv.inspect(tmp_path / "x.safetensors").notices)


# --- verify ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [name for name in FORMATS if name not in READ_ONLY])
def test_verify_sees_across_dialects_and_notices_another_alpha(target: str, tmp_path: Path) -> None:
    write(FORMATS["kohya"], "flux", tmp_path / "in")
    loraconv.convert(tmp_path / "in", out=tmp_path / "out", to=target)
    assert loraconv.verify(tmp_path / "in", tmp_path / "out").same
    file = tmp_path / "in" / FORMATS["kohya"].file
    doubled = {n: t * 2 if n.endswith(".alpha") else t for n, t in load_file(file).items()}
    save_file(doubled, file)
    assert not loraconv.verify(tmp_path / "in", tmp_path / "out").same


def test_the_output_record_says_what_the_source_said(tmp_path: Path) -> None:
    write(FORMATS["kohya"], "wan", tmp_path / "in")
    loraconv.convert(tmp_path / "in", out=tmp_path / "out", to="comfyui")
    record = json.loads((tmp_path / "out" / "loraconv.json").read_text())
    assert record["source"]["dialect"] == "kohya"
    assert record["source"]["adapter"]["alpha_sources"] == ["alpha tensors"]


# --- lazy tensors ---------------------------------------------------------------------------------------------------


@pytest.fixture
def matrix(tmp_path: Path) -> tuple[TensorRef, np.ndarray]:
    values = torch.arange(42, dtype=torch.float32).reshape(6, 7)
    save_file({"x": values}, tmp_path / "m.safetensors")
    return read_safetensors(InputFile(tmp_path / "m.safetensors")).tensors["x"], values.double().numpy()


@pytest.mark.parametrize(("start", "stop"), [(0, 7), (0, 1), (3, 5), (6, 7), (4, 4)])
def test_columns_and_rows_of_columns_are_those_of_the_matrix(
    matrix: tuple[TensorRef, np.ndarray], start: int, stop: int
) -> None:
    ref, values = matrix
    assert np.array_equal(read(ref.columns(start, stop)), values[:, start:stop])
    assert np.array_equal(read(ref.rows(2, 5).columns(start, stop)), values[2:5, start:stop])
    assert np.array_equal(read(ref.columns(start, stop).rows(2, 5)), values[2:5, start:stop])
    with pytest.raises(ValueError, match="columns"):
        ref.columns(3, 8)


def test_rows_padding_zeros_and_numbers_hold_what_they_say(matrix: tuple[TensorRef, np.ndarray]) -> None:
    ref, values = matrix
    padded = Padded(ref.columns(1, 3), 2, 6)
    assert np.array_equal(read(padded), np.pad(values[:, 1:3], ((0, 0), (2, 2))))
    assert np.array_equal(read(Rows(padded, 4, 6)), read(padded)[4:6])
    assert np.array_equal(read(Zeros("BF16", (2, 3))), np.zeros((2, 3)))
    assert read(Number(0.1, "F32")) == np.float32(0.1)
    assert Number(0.1, "F32").shape == ()


def test_every_model_of_the_fixtures_is_a_family() -> None:
    assert set(MODELS) <= {f.name for f in families()}
