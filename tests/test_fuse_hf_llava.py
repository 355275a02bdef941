"""``fuse --to hf-llava``: what is written is the model that transformers' own classes make of the same parts.

Oracle: ``LlavaForConditionalGeneration`` built from its configuration, given the tower, the run's projector and the
language model that peft merged in float64, rounded once, with one row for the image token. The weights must then be the
same bit for bit, and so must the logits: both models compute them with the same code.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionModel, LlavaConfig, LlavaForConditionalGeneration

import loraconv
from loraconv.errors import LoraconvError, ProofFailed
from tests.cli_support import Cli, assert_clear_error
from tests.llava_runs import (
    HIDDEN,
    VOCABULARY,
    WRAPPER,
    Made,
    Tensors,
    llama_config,
    make,
    pickled,
    projector,
    vision_tower,
)
from tests.support import raw

pytest_plugins = ["tests.cli_fixtures"]

IMAGE = VOCABULARY
PATCHES = 4


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(tmp_path_factory.mktemp("llava"), torch.float32)


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tower")
    vision_tower(folder)
    return folder


def assembled(made: Made, tower: Path) -> LlavaForConditionalGeneration:
    """The model by hand: each part is loaded into its own class of transformers."""
    clip = CLIPVisionModel.from_pretrained(tower)
    text = llama_config(vocab_size=VOCABULARY + 1)
    config = LlavaConfig(vision_config=clip.config, text_config=text, image_token_index=IMAGE)
    model = LlavaForConditionalGeneration(config).eval()
    model.model.vision_tower.load_state_dict(clip.state_dict())
    for layer, number in (("linear_1", 0), ("linear_2", 2)):
        parts = {end: made.beside[f"model.mm_projector.{number}.{end}"] for end in ("weight", "bias")}
        getattr(model.model.multi_modal_projector, layer).load_state_dict(parts)
    row, summed = torch.zeros(1, HIDDEN), {name: tensor.float() for name, tensor in made.summed.items()}
    state = {name.removeprefix("model."): t for name, t in summed.items() if name != "lm_head.weight"}
    state["embed_tokens.weight"] = torch.cat([state["embed_tokens.weight"], row])
    model.model.language_model.load_state_dict(state)
    model.lm_head.load_state_dict({"weight": torch.cat([summed["lm_head.weight"], row])})
    return model


def asked(model: LlavaForConditionalGeneration) -> torch.Tensor:
    """The logits for a picture between words."""
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(2))
    tokens = torch.tensor([[1, 5, *[IMAGE] * PATCHES, 9, 11]])
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=tokens, pixel_values=pixels.to(model.dtype)).logits
    return logits


def loaded(out: Path) -> LlavaForConditionalGeneration:
    model, info = LlavaForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def fused(made: Made, tower: Path, out: Path, **options: Any) -> LlavaForConditionalGeneration:
    result = loraconv.fuse(made.run, base=made.base, out=out, to="hf-llava", vision_tower=tower, **options)
    assert result.proofs[0].passed
    return loaded(out)


def test_the_model_computes_what_the_parts_compute_that_were_put_together_by_hand(
    tmp_path: Path, made: Made, tower: Path
) -> None:
    model, oracle = fused(made, tower, tmp_path / "out"), assembled(made, tower)
    state, want = model.state_dict(), oracle.state_dict()
    assert set(state) == set(want)
    for name in want:
        assert raw(state[name]) == raw(want[name]), name
    assert torch.equal(asked(model), asked(oracle))
    assert not torch.allclose(asked(oracle), asked(assembled(plain(made), tower)), atol=1e-3)


def plain(made: Made) -> Made:
    """The same run, with the base where peft's merge was."""
    return replace(made, summed=load_file(made.base / "model.safetensors"))


def test_the_settings_are_those_that_transformers_reads(tmp_path: Path, made: Made, tower: Path) -> None:
    config = fused(made, tower, tmp_path / "out").config
    assert (config.image_token_index, config.image_seq_length) == (IMAGE, PATCHES)
    assert (config.vision_feature_layer, config.vision_feature_select_strategy) == (-2, "default")
    assert config.text_config.vocab_size == VOCABULARY + 1
    assert config.vision_config.image_size == 28
    assert not [key for key in config.text_config.to_dict() if "mm_" in key]


@pytest.mark.parametrize("torch_files", [False, True])
def test_the_tower_may_be_half_of_a_clip_repository(tmp_path: Path, made: Made, torch_files: bool) -> None:
    whole = tmp_path / "clip"
    alone = tmp_path / "alone"
    vision_tower(whole, full=True)
    vision_tower(alone)
    (whole / "preprocessor_config.json").write_text('{"crop_size": 28}')
    if torch_files:
        pickled(whole)
    model = fused(made, whole, tmp_path / "out")
    assert torch.equal(asked(model), asked(assembled(made, alone)))
    assert (tmp_path / "out" / "preprocessor_config.json").read_text() == '{"crop_size": 28}'


def test_everything_is_stored_in_the_dtype_of_the_base_or_in_the_one_asked_for(tmp_path: Path, tower: Path) -> None:
    half = make(tmp_path, torch.float16)
    assert {t.dtype for t in fused(half, tower, tmp_path / "a").state_dict().values()} == {torch.float16}
    assert {t.dtype for t in fused(half, tower, tmp_path / "b", dtype="bf16").state_dict().values()} == {torch.bfloat16}
    got = load_file(tmp_path / "a" / "model.safetensors")["vision_tower.vision_model.pre_layrnorm.weight"]
    assert torch.equal(got, CLIPVisionModel.from_pretrained(tower).pre_layrnorm.weight.half())


def test_shards_have_an_index_by_the_new_names(tmp_path: Path, made: Made, tower: Path) -> None:
    model = fused(made, tower, tmp_path / "out", max_shard_size="30KB")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert "language_model.model.embed_tokens.weight" in index
    assert loraconv.verify(tmp_path / "out").same
    assert torch.equal(asked(model), asked(assembled(made, tower)))


def _is_fused(made: Made, tower: Path, out: Path) -> bool:
    return loraconv.verify(made.run, out, base=made.base, vision_tower=tower).same


def test_verify_compares_such_a_model_with_base_run_and_tower(tmp_path: Path, made: Made, tower: Path) -> None:
    out = tmp_path / "out"
    fused(made, tower, out)
    assert _is_fused(made, tower, out)
    state = load_file(out / "model.safetensors")
    for name in (
        "language_model.model.layers.0.mlp.up_proj.weight",
        "language_model.model.embed_tokens.weight",  # its last row is the image token's
        "multi_modal_projector.linear_2.bias",
        "vision_tower.vision_model.encoder.layers.1.mlp.fc1.bias",
    ):
        other = state | {name: torch.cat([state[name][:-1], state[name][-1:] + 1])}
        save_file(other, out / "model.safetensors", {"format": "pt"})
        assert not _is_fused(made, tower, out), name
    heads = ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight")
    for rows in (VOCABULARY, VOCABULARY + 2):
        other = state | {n: torch.cat([state[n], torch.zeros(1, HIDDEN)])[:rows].clone() for n in heads}
        save_file(other, out / "model.safetensors", {"format": "pt"})
        assert not _is_fused(made, tower, out), f"{rows} rows"
    save_file(state, out / "model.safetensors", {"format": "pt"})
    assert _is_fused(made, tower, out)


@pytest.mark.parametrize(
    "changed",
    [
        {"image_token_index": 1},
        {"vision_feature_layer": -1},
        {"vision_feature_select_strategy": "full"},
        {"text_config": {"rms_norm_eps": 1e-2}},
        {"text_config": {"vocab_size": VOCABULARY}},
        {"vision_config": {"patch_size": 7}},
    ],
    ids=str,
)
def test_verify_looks_at_the_settings_too(tmp_path: Path, made: Made, tower: Path, changed: dict[str, Any]) -> None:
    out = tmp_path / "out"
    fused(made, tower, out)
    file = out / "config.json"
    config = json.loads(file.read_text())
    for key, value in changed.items():
        config[key] = config[key] | value if isinstance(value, dict) else value
    file.write_text(json.dumps(config))
    result = loraconv.verify(made.run, out, base=made.base, vision_tower=tower)
    assert not result.same
    assert [finding.slug for finding in result.findings] == ["config"]


def test_verify_asks_for_the_tower_that_is_in_neither_base_nor_run(
    tmp_path: Path, made: Made, tower: Path, cli: Cli
) -> None:
    fused(made, tower, tmp_path / "out")
    done = cli("verify", made.run, tmp_path / "out", "--base", made.base)
    assert_clear_error(done)
    assert "--vision-tower" in done.err
    assert cli("verify", made.run, tmp_path / "out", "--base", made.base, "--vision-tower", tower).code == 0
    assert cli("verify", made.run, made.base, "--base", made.base, "--vision-tower", tower).code == 2
    assert cli("verify", made.run, tmp_path / "out", "--vision-tower", tower).code == 2


def test_a_tower_that_the_run_trained_is_taken_instead_of_the_given_one(tmp_path: Path, tower: Path) -> None:
    begin = "model.vision_tower.vision_tower.vision_model."
    trained = {begin + name: tensor * 2 for name, tensor in load_file(tower / "model.safetensors").items()}
    half = make(tmp_path, torch.float32, projector() | trained)
    state = fused(half, tower, tmp_path / "out").state_dict()
    assert loraconv.verify(half.run, tmp_path / "out", base=half.base).same
    for name, tensor in trained.items():
        assert raw(state["model.vision_tower." + name.removeprefix(begin)]) == raw(tensor)


# --- what is refused ----------------------------------------------------------------------------------------------


def _settings(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def _linear(run: Path, _tower: Path) -> None:
    _settings(run, mm_projector_type="linear")
    state = torch.load(run / "non_lora_trainables.bin")
    kept = {name.replace(".0.", "."): tensor for name, tensor in state.items() if ".0." in name}
    torch.save(kept, run / "non_lora_trainables.bin")


def _newline(run: Path, _tower: Path) -> None:
    state = torch.load(run / "non_lora_trainables.bin")
    torch.save(state | {f"{WRAPPER}model.image_newline": torch.zeros(HIDDEN)}, run / "non_lora_trainables.bin")


def _half_tower(_run: Path, tower: Path) -> None:
    state: Tensors = load_file(tower / "model.safetensors")
    del state["encoder.layers.1.mlp.fc1.bias"]
    save_file(state, tower / "model.safetensors", {"format": "pt"})


def _not_clip(_run: Path, tower: Path) -> None:
    _settings(tower, model_type="siglip_vision_model")


def _wide(_run: Path, tower: Path) -> None:
    _settings(tower, hidden_size=25)


def _plain_lora(run: Path, _tower: Path) -> None:
    for name in ("non_lora_trainables.bin", "config.json"):
        (run / name).unlink()


REFUSED: dict[str, tuple[Callable[[Path, Path], Any], str]] = {
    "a linear projector":        (_linear, "hf-llava"),
    "a separator of llava-next": (_newline, "hf-llava"),
    "half of a tower":           (_half_tower, "tower-incomplete"),
    "a tower of another kind":   (_not_clip, "tower-type"),
    "a tower of another width":  (_wide, "tower-type"),
    "a plain lora":              (_plain_lora, "not-llava"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_transformers_has_no_place_for_is_refused(
    tmp_path: Path, made: Made, tower: Path, cli: Cli, case: str
) -> None:
    run, vision = (Path(shutil.copytree(path, tmp_path / name)) for path, name in ((made.run, "run"), (tower, "clip")))
    spoil, slug = REFUSED[case]
    spoil(run, vision)
    with pytest.raises(LoraconvError) as caught:
        loraconv.fuse(run, base=made.base, out=tmp_path / "out", to="hf-llava", vision_tower=vision)
    assert caught.value.slug == slug
    words = ["fuse", run, "--base", made.base, "-o", tmp_path / "out", "--to", "hf-llava", "--vision-tower", vision]
    assert_clear_error(cli(*words))
    assert not (tmp_path / "out").exists()


def test_without_the_tower_the_error_says_which_one_and_how_to_get_it(tmp_path: Path, made: Made, cli: Cli) -> None:
    done = cli("fuse", made.run, "--base", made.base, "-o", tmp_path / "out", "--to", "hf-llava")
    assert_clear_error(done)
    assert "hf download openai/clip-vit-large-patch14-336" in done.err
    assert "--vision-tower" in done.err


@pytest.mark.parametrize("spoilt", ["language_model.lm_head.weight", "vision_tower.vision_model.pre_layrnorm.bias"])
def test_a_wrong_output_is_not_left_behind(
    tmp_path: Path, made: Made, tower: Path, monkeypatch: pytest.MonkeyPatch, spoilt: str
) -> None:
    """The last byte of a tensor changes between the writing and the proof: the image token's row, the tower's."""
    from loraconv.fusion import running

    write = running.write_shards

    def spoil(*arguments: Any, **options: Any) -> Any:
        files = write(*arguments, **options)
        (file,) = files.files.values()
        data = file.path.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        at = start + json.loads(data[8:start])[spoilt]["data_offsets"][1] - 1
        with file.path.open("r+b") as opened:
            opened.seek(at)
            opened.write(bytes([data[at] ^ 0x40]))
        return files

    monkeypatch.setattr(running, "write_shards", spoil)
    with pytest.raises(ProofFailed):
        loraconv.fuse(made.run, base=made.base, out=tmp_path / "out", to="hf-llava", vision_tower=tower)
    assert not (tmp_path / "out").exists()
