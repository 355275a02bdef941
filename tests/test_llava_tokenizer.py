"""``fuse --to hf-llava``: the image token in the tokenizer's files, and the processor's settings.

Oracle: transformers' ``AutoTokenizer`` and ``AutoProcessor``, with the model that was written beside them.
"""

from __future__ import annotations

import json
import shlex
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoProcessor, AutoTokenizer, LlavaForConditionalGeneration, PreTrainedTokenizerFast

import loraconv
from loraconv.errors import CorruptCheckpoint
from loraconv.fusion.llava.tokenizer import with_image_token
from tests.llava_runs import VOCABULARY, Made, make, vision_tower

SPECIAL = ("<unk>", "<s>", "</s>")
IMAGES = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": 28},
    "crop_size": {"height": 28, "width": 28},
}


def tokenizer(folder: Path, count: int = VOCABULARY) -> None:
    """A tokenizer of words with ``count`` tokens, as transformers saves it."""
    words = {word: n for n, word in enumerate([*SPECIAL, *(f"w{n}" for n in range(3, count))])}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    names = dict(zip(("unk_token", "bos_token", "eos_token"), SPECIAL, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=made, **names).save_pretrained(folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(tmp_path_factory.mktemp("llava"), torch.float32)


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tower")
    vision_tower(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(IMAGES))
    return folder


def fused(made: Made, tower: Path, place: Path, where: str = "base", count: int = VOCABULARY) -> tuple[Path, str]:
    """``(the output, what was said)`` with a tokenizer beside the base or the run."""
    base, run = (Path(shutil.copytree(path, place / path.name)) for path in (made.base, made.run))
    tokenizer({"base": base, "run": run}[where], count)
    result = loraconv.fuse(run, base=base, out=place / "out", to="hf-llava", vision_tower=tower)
    assert loraconv.verify(place / "out").same
    return place / "out", "\n".join(result.notices)


@pytest.mark.parametrize("where", ["base", "run"])
def test_the_processor_puts_the_image_where_the_model_looks_for_it(
    tmp_path: Path, made: Made, tower: Path, where: str
) -> None:
    out, said = fused(made, tower, tmp_path, where)
    assert "<image> in the tokenizer" in said
    processor = AutoProcessor.from_pretrained(out)
    picture = np.random.default_rng(0).integers(0, 255, (40, 28, 3), dtype=np.uint8)
    given = processor(images=picture, text="w5 <image> w9", return_tensors="pt")
    assert given["input_ids"].tolist() == [[5, *[VOCABULARY] * 4, 9]]
    model = LlavaForConditionalGeneration.from_pretrained(out)
    with torch.no_grad():
        logits = model(**given).logits
        blank = model(**{**given, "pixel_values": torch.zeros_like(given["pixel_values"])}).logits
    assert logits.shape == (1, 6, VOCABULARY + 1)
    assert not torch.equal(logits, blank)


def test_the_tokens_that_were_there_keep_their_numbers(tmp_path: Path, made: Made, tower: Path) -> None:
    out, _ = fused(made, tower, tmp_path)
    before, after = AutoTokenizer.from_pretrained(tmp_path / "base"), AutoTokenizer.from_pretrained(out)
    assert after.get_vocab() == {**before.get_vocab(), "<image>": VOCABULARY}
    assert after("w5 w6 none").input_ids == before("w5 w6 none").input_ids
    assert (after.bos_token, after.eos_token, after.pad_token) == ("<s>", "</s>", "<unk>")
    assert after.decode([5, VOCABULARY], skip_special_tokens=True).strip() == "w5"


def test_a_vocabulary_with_unused_rows_is_left_alone_and_the_command_completes_it(
    tmp_path: Path, made: Made, tower: Path
) -> None:
    out, said = fused(made, tower, tmp_path, count=VOCABULARY - 5)
    assert f"has {VOCABULARY - 5} tokens" in said
    assert (out / "tokenizer.json").read_bytes() == (tmp_path / "base" / "tokenizer.json").read_bytes()
    command = next(line for line in said.splitlines() if "python -c" in line)
    words = shlex.split(command[command.index("python -c") :])
    subprocess.run([sys.executable, "-c", words[2], str(out)], check=True)
    assert AutoTokenizer.from_pretrained(out).convert_tokens_to_ids("<image>") == VOCABULARY
    assert AutoProcessor.from_pretrained(out).patch_size == 14


def test_a_model_without_tokenizer_is_said_to_lack_one(tmp_path: Path, made: Made, tower: Path) -> None:
    result = loraconv.fuse(made.run, base=made.base, out=tmp_path / "out", to="hf-llava", vision_tower=tower)
    assert any("no tokenizer" in notice and "add_tokens" in notice for notice in result.notices)


def test_a_tower_without_settings_for_images_is_said_to_lack_them(tmp_path: Path, made: Made, tower: Path) -> None:
    bare = Path(shutil.copytree(tower, tmp_path / "bare"))
    (bare / "preprocessor_config.json").unlink()
    assert "preprocessor_config.json" in fused(made, bare, tmp_path)[1]


# --- tokenizers of SentencePiece, as LLaMA's and Vicuna's repositories have them --------------------------------------


def field(number: int, content: bytes) -> bytes:
    assert len(content) < 128
    return bytes([number << 3 | 2, len(content)]) + content


def sentencepiece(count: int) -> bytes:
    """A ``ModelProto``: pieces (text, score, kind), and settings that hold the same field numbers inside."""
    pieces = [field(1, f"p{n}".encode()) + b"\x15" + struct.pack("<f", -n) + b"\x18\x01" for n in range(count)]
    return b"".join(field(1, piece) for piece in pieces) + field(2, field(1, b"in") + field(2, b"out")) + field(3, b"")


def slow(folder: Path, **files: Any) -> dict[str, Path]:
    (folder / "tokenizer.model").write_bytes(sentencepiece(300))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return {path.name: path for path in folder.iterdir()}


def decoder(texts: Any) -> dict[str, str]:
    config = json.loads(texts["tokenizer_config.json"])
    return {number: one["content"] for number, one in config["added_tokens_decoder"].items()}


def test_a_sentencepiece_tokenizer_gets_the_token_behind_its_pieces(tmp_path: Path) -> None:
    special = {"pad_token": "<unk>", "bos_token": "<s>"}
    files = slow(tmp_path, tokenizer_config={"tokenizer_class": "LlamaTokenizer"}, special_tokens_map=special)
    texts = with_image_token(files, 300, 14, "default").texts
    assert decoder(texts) == {"300": "<image>"}
    config = json.loads(texts["tokenizer_config.json"])
    assert {key: config[key] for key in special} == special, "once there is a decoder, the old file is not read"
    assert json.loads(texts["processor_config.json"])["patch_size"] == 14
    assert "tokenizer.json" not in texts
    assert set(with_image_token(files, 301, 14, "default").texts) == {"processor_config.json"}


def test_a_tokenizer_that_has_such_a_token_already_is_left_alone(tmp_path: Path) -> None:
    files = slow(tmp_path, added_tokens={"<image>": 300})
    prepared = with_image_token(files, 301, 14, "default")
    assert set(prepared.texts) == {"processor_config.json"}
    assert "<image> among them" in prepared.notice


def test_tokens_that_were_added_before_stay(tmp_path: Path) -> None:
    older = slow(tmp_path, added_tokens={"<im_start>": 300, "<im_end>": 301})
    assert decoder(with_image_token(older, 302, 14, "default").texts) == {
        "300": "<im_start>",
        "301": "<im_end>",
        "302": "<image>",
    }
    held = {"added_tokens_decoder": {"0": {"content": "p0"}, "300": {"content": "<im_start>"}}}
    newer = slow(tmp_path, tokenizer_config=held)
    assert decoder(with_image_token(newer, 301, 14, "full").texts) == {"0": "p0", "300": "<im_start>", "301": "<image>"}


@pytest.mark.parametrize("spoilt", [b"\xff" * 30, sentencepiece(20)[:-7], b"\x0b\x01", b"\x0a"])
def test_a_damaged_sentencepiece_model_is_refused(tmp_path: Path, spoilt: bytes) -> None:
    files = slow(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(spoilt)
    with pytest.raises(CorruptCheckpoint) as caught:
        with_image_token(files, 300, 14, "default")
    assert caught.value.slug == "tokenizer"


@pytest.mark.parametrize("tokens", [[], {"x": {}}, 3])
def test_a_damaged_list_of_tokens_is_refused(tmp_path: Path, tokens: Any) -> None:
    files = slow(tmp_path, tokenizer_config={"added_tokens_decoder": tokens})
    with pytest.raises(CorruptCheckpoint):
        with_image_token(files, 300, 14, "default")
