"""The image token in the tokenizer's own files, and what transformers' processor of LLaVA needs to know.

Facts: huggingface/transformers ``tokenization_utils_base.py`` (which files say what, ``added_tokens_decoder`` first),
``models/llava/processing_llava.py``; huggingface/tokenizers ``added_vocabulary.rs`` (a new token gets the next number);
google/sentencepiece ``sentencepiece_model.proto`` (a model is a list of pieces); haotian-liu/LLaVA ``train.py``: where
no token pads, ``unk`` does.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraconv.errors import CorruptCheckpoint
from loraconv.io.input_file import InputFile
from loraconv.io.sidecar import parse_json, read_json, read_text
from loraconv.names import printable, quoted

IMAGE = "<image>"
FAST, SLOW, CONFIG = "tokenizer.json", "tokenizer.model", "tokenizer_config.json"
_SPECIAL, _ADDED, _PROCESSOR = "special_tokens_map.json", "added_tokens.json", "processor_config.json"
#: All files that a tokenizer of transformers may consist of.
FILES = (_ADDED, "chat_template.jinja", _SPECIAL, FAST, SLOW, CONFIG)
_MOST_BYTES = 64 << 20
_FLAGS = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}


@dataclass(frozen=True, slots=True)
class Prepared:
    """Files to write (name -> text) in place of the tokenizer's own, and what has to be said."""

    texts: Mapping[str, str]
    notice: str


def with_image_token(files: Mapping[str, Path], token: int, patch: int, strategy: str) -> Prepared:
    """The tokenizer in ``files`` (name -> path) with ``<image>`` as number ``token``, and the processor's settings:
    ``patch``, the edge of a patch in pixels, and ``strategy``, whether the class token of the tower counts.

    Where the tokenizer's next number is another one, its files are left as they are, and the notice has the command
    that completes it. Raises :class:`CorruptCheckpoint` for files that cannot be read.
    """
    told = f"images are marked by token {token}, one more than the vocabulary had, its rows zero"
    processor = {_PROCESSOR: _text(_processor(patch, strategy))}
    if not (FAST in files or SLOW in files):
        why = "base and run have no tokenizer: put one beside the model, and complete it"
        return Prepared(processor, f"{told}; {why}: {_command(token)}")
    fast = _json(files[FAST]) if FAST in files else None
    config, added = _settings(files, fast is not None)
    own = [one for one in (fast or {}).get("added_tokens") or () if isinstance(one, dict)]
    numbers = {int(number) for number in added}
    numbers |= set(range(_pieces(files[SLOW])) if fast is None else _numbers(fast, own))
    taken = any(isinstance(one, dict) and one.get("content") == IMAGE for one in (*own, *added.values()))
    if taken or numbers != set(range(token)):
        why = f"has {len(numbers)} tokens{f', {IMAGE} among them,' if taken else ''} and was left alone; complete it"
        return Prepared(processor, f"{told}; the tokenizer {why}: {_command(token)}")
    image = {"content": IMAGE, "special": True, **_FLAGS}
    if added or fast is None:
        config["added_tokens_decoder"] = {**added, str(token): image}
    if config.get("pad_token") is None and config.get("unk_token") is not None:
        config["pad_token"] = config["unk_token"]
    made = {CONFIG: {**config, "processor_class": "LlavaProcessor"}}
    if fast is not None:
        made[FAST] = {**fast, "added_tokens": [*own, {"id": token, **image}]}
    texts = {name: _text(value) for name, value in made.items()}
    return Prepared(processor | texts, f"{told}: {IMAGE} in the tokenizer")


def _text(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2) + "\n"


def _processor(patch: int, strategy: str) -> dict[str, Any]:
    return {
        "image_token": IMAGE,
        "num_additional_image_tokens": 1,  # CLIP's class token, which the strategy "default" leaves out again
        "patch_size": patch,
        "processor_class": "LlavaProcessor",
        "vision_feature_select_strategy": strategy,
    }


def _command(token: int) -> str:
    code = (
        "import sys; from transformers import AutoTokenizer; t = AutoTokenizer.from_pretrained(sys.argv[1]);"
        f" t.add_tokens([f'<unused_{{n}}>' for n in range(len(t), {token})]);"
        f" t.add_tokens('{IMAGE}', special_tokens=True); t.save_pretrained(sys.argv[1])"
    )
    return f"python -c {quoted(code)} OUT"


def _settings(files: Mapping[str, Path], fast: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """``tokenizer_config.json``, with what older tokenizers without ``added_tokens_decoder`` say in other files; and
    the tokens of that, by number. (A fast tokenizer without it says all in ``tokenizer.json``.)"""
    config = _json(files[CONFIG]) if CONFIG in files else {}
    if "added_tokens_decoder" in config:
        return config, _tokens(files[CONFIG], config["added_tokens_decoder"])
    special = _json(files[_SPECIAL]) if _SPECIAL in files else {}
    config |= special
    names = {str(one.get("content")) if isinstance(one, dict) else str(one) for one in special.values()}
    added = _json(files[_ADDED]) if _ADDED in files and not fast else {}
    flags = {name: {**_FLAGS, "special": name in names, "normalized": name not in names} for name in added}
    return config, _tokens(files.get(_ADDED), {str(n): {"content": name, **flags[name]} for name, n in added.items()})


def _tokens(path: Path | None, tokens: Any) -> dict[str, Any]:
    if not isinstance(tokens, dict) or not all(number.isdecimal() for number in tokens):
        raise _damaged(path, "its tokens have no numbers")
    return tokens


def _numbers(fast: Mapping[str, Any], added: Iterable[Mapping[str, Any]]) -> list[int]:
    """The numbers of all tokens in ``tokenizer.json``: those of the model, which may be a list, and those ``added``."""
    model = fast.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    numbers = list(vocabulary.values()) if isinstance(vocabulary, dict) else list(range(len(vocabulary or ())))
    numbers += [one.get("id") for one in added]
    return [number for number in numbers if type(number) is int]


def _pieces(path: Path) -> int:
    """The pieces of a SentencePiece model: how often field 1 stands at the root of a protobuf message."""
    with InputFile(path) as file:
        data = file.pread(0, min(file.size, _MOST_BYTES))
    at = count = 0
    while at < len(data):
        key, at = _varint(path, data, at)
        kind, size = key & 7, {1: 8, 5: 4}.get(key & 7, 0)
        if kind in (0, 2):
            size, at = _varint(path, data, at)
        at += size if kind else 0
        count += key == 1 << 3 | 2
        if kind not in (0, 1, 2, 5) or at > len(data):
            raise _damaged(path, "it is no SentencePiece model")
    return count


def _varint(path: Path, data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(data) and shift < 64:
        byte = data[at]
        value, at, shift = value | (byte & 0x7F) << shift, at + 1, shift + 7
        if byte < 0x80:
            return value, at
    raise _damaged(path, "it is no SentencePiece model")


def _json(path: Path) -> dict[str, Any]:
    if path.name != FAST:
        return read_json(path)
    value = parse_json(read_text(path, _MOST_BYTES), str(path))
    if not isinstance(value, dict):
        raise _damaged(path, "its root is no mapping")
    return value


def _damaged(path: Path | None, why: str) -> CorruptCheckpoint:
    return CorruptCheckpoint(
        f"cannot read {printable(str(path), 1000)}",
        why=why,
        hint="restore the tokenizer's files, or move them away and add the token yourself",
        slug="tokenizer",
    )
