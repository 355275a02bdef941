"""Opening a base model: a folder is believed only where index, headers and disk agree, nothing outside of it is ever
opened, and a quantised base is refused with its reason."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from loraconv.errors import CorruptCheckpoint, FormatError, LoraconvError, UnsafeCheckpoint, UsageError
from loraconv.model_folder import open_model

SINGLE = "diffusion_pytorch_model.safetensors"
INDEX = f"{SINGLE}.index.json"
SHARDS = tuple(f"diffusion_pytorch_model-0000{n}-of-00002.safetensors" for n in (1, 2))

_opened: list[str] | None = None


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if _opened is not None and event == "open" and isinstance(arguments[0], str | bytes):
        _opened.append(os.path.realpath(os.fsdecode(arguments[0])))


sys.addaudithook(_watch)


@contextmanager
def opened_files() -> Iterator[list[str]]:
    """The real paths of everything that this process opens inside the block."""
    global _opened
    _opened = []
    try:
        yield _opened
    finally:
        _opened = None


def weights(*names: str, dtype: Any = np.float16, shape: tuple[int, ...] = (4, 4)) -> dict[str, Any]:
    return {name: np.full(shape, 1, dtype=dtype) for name in names}


def model(folder: Path, tensors: dict[str, Any] | None = None, **header: str) -> Path:
    """A transformer folder of one file."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"_class_name": "CogVideoXTransformer3DModel"}')
    save_file(tensors or weights("a.weight", "b.weight"), folder / SINGLE, {"format": "pt", **header})
    return folder


def sharded(folder: Path, listed: dict[str, str] | None = None) -> Path:
    """A transformer folder of two shards."""
    model(folder)
    (folder / SINGLE).unlink()
    for name, shard in zip("ab", SHARDS, strict=True):
        save_file(weights(f"{name}.weight"), folder / shard, {"format": "pt"})
    listed = listed or {"a.weight": SHARDS[0], "b.weight": SHARDS[1]}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 64}, "weight_map": listed}))
    return folder


def refused(path: Path | str, kind: type[LoraconvError], slug: str) -> LoraconvError:
    with pytest.raises(kind) as caught, open_model(path):
        pass
    assert caught.value.slug == slug
    assert caught.value.hint
    return caught.value


# --- what is read -------------------------------------------------------------------------------------------------


def test_one_file_is_read_with_header_and_settings(tmp_path: Path) -> None:
    with open_model(model(tmp_path / "m", trained="here")) as found:
        assert list(found.files) == [SINGLE]
        assert set(found.tensors) == {"a.weight", "b.weight"}
        assert found.metadata[SINGLE] == {"format": "pt", "trained": "here"}
        assert found.config == {"_class_name": "CogVideoXTransformer3DModel"}
        assert (found.index, found.pipeline, found.folder) == (None, None, tmp_path / "m")
        assert found.bytes == (tmp_path / "m" / SINGLE).stat().st_size


def test_shards_are_read_in_the_order_of_the_index(tmp_path: Path) -> None:
    listed = {"b.weight": SHARDS[1], "a.weight": SHARDS[0]}
    with open_model(sharded(tmp_path / "m", listed)) as found:
        assert list(found.files) == [SHARDS[1], SHARDS[0]]
        assert found.index == INDEX
        assert {n: r.file.path.name for n, r in found.tensors.items()} == listed
        assert all(ref.file in found.files.values() for ref in found.tensors.values())


def test_a_pipeline_means_its_transformer(tmp_path: Path) -> None:
    sharded(tmp_path / "p" / "transformer")
    model(tmp_path / "p" / "vae")
    (tmp_path / "p" / "model_index.json").write_text("{}")
    with open_model(tmp_path / "p") as found:
        assert (found.pipeline, found.folder) == (tmp_path / "p", tmp_path / "p" / "transformer")
        assert len(found.files) == 2


@pytest.mark.parametrize("settings", [True, False])
def test_a_single_file_is_taken_as_it_is(tmp_path: Path, settings: bool) -> None:
    file = model(tmp_path / "m") / SINGLE
    file = file.rename(file.with_name("any.safetensors"))
    if not settings:
        (tmp_path / "m" / "config.json").unlink()
    with open_model(file) as found:
        assert list(found.files) == ["any.safetensors"]
        assert (found.config is not None) == settings


def hub_cache(root: Path, pipeline: bool = True) -> Path:
    """A Hub cache with one model: snapshots that are links to blobs. Its snapshot."""
    repository = root / "models--acme--video"
    snapshot = repository / "snapshots" / ("0" * 40)
    made = sharded(root / "made")
    (repository / "blobs").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    (snapshot / "transformer").mkdir(parents=True)
    for number, file in enumerate(sorted(made.iterdir())):
        file.rename(repository / "blobs" / f"{number:064x}")
        os.symlink(f"../../../blobs/{number:064x}", snapshot / "transformer" / file.name)
    if pipeline:
        (repository / "blobs" / "index").write_text("{}")
        os.symlink("../../blobs/index", snapshot / "model_index.json")
    return snapshot


@pytest.mark.parametrize("pipeline", [True, False], ids=["pipeline", "transformer alone"])
def test_a_hub_id_is_found_in_the_local_cache_and_the_network_is_not_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pipeline: bool
) -> None:
    from huggingface_hub import constants

    def no_network(*_arguments: Any) -> None:
        raise AssertionError("the network was asked")

    snapshot = hub_cache(tmp_path / "hub", pipeline)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(socket.socket, "connect", no_network)
    with open_model("acme/video") as found:
        assert found.folder == snapshot / "transformer"
        assert found.pipeline == (snapshot if pipeline else None)
        assert set(found.tensors) == {"a.weight", "b.weight"}
    with open_model(snapshot / "transformer") as found:
        assert set(found.tensors) == {"a.weight", "b.weight"}
    error = refused("acme/other", UsageError, "not-found")
    assert error.hint == "hf download acme/other"


def test_a_link_in_a_snapshot_leads_to_blobs_only(tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path / "hub")
    outside = model(tmp_path / "outside") / SINGLE
    shard = snapshot / "transformer" / SHARDS[0]
    shard.unlink()
    shard.symlink_to(outside)
    refused(snapshot, UnsafeCheckpoint, "link-outside")


# --- what an index may say ----------------------------------------------------------------------------------------

HOSTILE_NAMES = {
    "parent":               "../outside.safetensors",
    "parent twice":         "../../outside.safetensors",
    "hidden parent":        "a/../../outside.safetensors",
    "absolute":             "/etc/passwd",
    "absolute weights":     "{outside}/x.safetensors",
    "sub-folder":           "sub/x.safetensors",
    "this folder":          "./x.safetensors",
    "Windows parent":       "..\\outside.safetensors",
    "Windows drive":        "C:x.safetensors",
    "Windows root":         "\\x.safetensors",
    "Windows share":        "\\\\server\\share\\x.safetensors",
    "dot":                  ".",
    "two dots":             "..",
    "empty":                "",
    "NUL":                  "x\0.safetensors",
    "newline":              "x\n.safetensors",
    "escape":               "x\x1b[2J.safetensors",
    "right to left":        "x\u202e.safetensors",
    "surrogate":            "x\ud800.safetensors",
    "300 characters":       "x" * 288 + ".safetensors",
    "300 bytes":            "\u00e9" * 150 + ".safetensors",
    "device":               "NUL.safetensors",
    "device in small":      "com1.safetensors",
    "device with endings":  "aux.x.safetensors",
    "pickle":               "x.bin",
    "no ending":            "x",
    "ending of another":    "x.safetensors.pt",
    "home":                 "~/x.safetensors",
    "URL":                  "https://example.org/x.safetensors",
    "capital ending":       "x.SAFETENSORS",
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE_NAMES)
def test_no_name_in_an_index_leads_anywhere(tmp_path: Path, case: str) -> None:
    outside = model(tmp_path / "outside")
    (tmp_path / "outside.safetensors").write_bytes((outside / SINGLE).read_bytes())
    name = HOSTILE_NAMES[case].replace("{outside}", str(outside))
    folder = sharded(tmp_path / "in" / "m", {"a.weight": SHARDS[0], "b.weight": name})
    with opened_files() as opened:
        error = refused(folder, UnsafeCheckpoint, "index-unsafe")
    assert opened
    assert [path for path in opened if not path.startswith(f"{folder}/")] == []
    assert error.to_dict()["why"]
    assert all(line.isprintable() for line in str(error).splitlines())


LINKS: dict[str, Callable[[Path], str]] = {
    "outside": lambda top: str(top / "outside" / SINGLE),
    "device": lambda top: "/dev/zero",
    "password file": lambda top: "/etc/passwd",
    "relative": lambda top: f"../outside/{SINGLE}",
    "loop": lambda top: SHARDS[1],
}


@pytest.mark.parametrize("case", LINKS)
@pytest.mark.parametrize("what", [SHARDS[1], "config.json", INDEX])
def test_no_link_leads_out_of_the_folder(tmp_path: Path, case: str, what: str) -> None:
    model(tmp_path / "outside")
    folder = sharded(tmp_path / "m")
    (folder / what).unlink()
    (folder / what).symlink_to(what if case == "loop" else LINKS[case](tmp_path))
    with opened_files() as opened, pytest.raises((UnsafeCheckpoint, CorruptCheckpoint)) as caught, open_model(folder):
        pass
    assert caught.value.slug == ("shard-missing" if case == "loop" else "link-outside")
    assert [path for path in opened if not path.startswith(f"{folder}/")] == []


def test_a_link_inside_the_folder_is_fine(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m")
    (folder / SHARDS[0]).rename(folder / "moved")
    (folder / SHARDS[0]).symlink_to("moved")
    with open_model(folder) as found:
        assert len(found.tensors) == 2


def test_a_transformer_folder_that_is_a_link_is_refused(tmp_path: Path) -> None:
    model(tmp_path / "outside")
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "model_index.json").write_text("{}")
    (tmp_path / "p" / "transformer").symlink_to(tmp_path / "outside")
    refused(tmp_path / "p", UnsafeCheckpoint, "link-outside")


@pytest.mark.parametrize("as_file", [True, False])
def test_a_fifo_is_refused_and_does_not_block(tmp_path: Path, as_file: bool) -> None:
    folder = sharded(tmp_path / "m")
    (folder / SHARDS[1]).unlink()
    os.mkfifo(folder / SHARDS[1])
    with opened_files() as opened:
        refused(folder / SHARDS[1] if as_file else folder, UsageError, "not-regular")
    assert as_file or str(folder / SHARDS[1]) not in opened


def test_twins_of_one_name_are_refused(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m", {"a.weight": SHARDS[0], "b.weight": SHARDS[0].upper()[:-11] + "safetensors"})
    refused(folder, UnsafeCheckpoint, "index-unsafe")


def _two_keys(folder: Path) -> None:
    save_file(weights("a.weight", "b.weight"), folder / SHARDS[1], {"format": "pt"})


def _two_keys_and_the_last_is_listed(folder: Path) -> None:
    save_file(weights("a.weight", "b.weight"), folder / SHARDS[1], {"format": "pt"})
    save_file(weights("a.weight", "c.weight"), folder / SHARDS[0], {"format": "pt"})
    listed = {"c.weight": SHARDS[0], "a.weight": SHARDS[1], "b.weight": SHARDS[1]}
    (folder / INDEX).write_text(json.dumps({"weight_map": listed}))


def _unlisted(folder: Path) -> None:
    save_file(weights("a.weight", "c.weight"), folder / SHARDS[0], {"format": "pt"})


def _swapped(folder: Path) -> None:
    listed = {"a.weight": SHARDS[1], "b.weight": SHARDS[0]}
    (folder / INDEX).write_text(json.dumps({"weight_map": listed}))


def _promised(folder: Path) -> None:
    listed = {"a.weight": SHARDS[0], "b.weight": SHARDS[1], "c.weight": SHARDS[1]}
    (folder / INDEX).write_text(json.dumps({"weight_map": listed}))


@pytest.mark.parametrize("spoil", [_two_keys, _two_keys_and_the_last_is_listed, _unlisted, _swapped, _promised])
def test_index_and_headers_must_agree(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    folder = sharded(tmp_path / "m")
    spoil(folder)
    error = refused(folder, CorruptCheckpoint, "index-contradiction")
    assert ".weight" in error.where


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m")
    (folder / SHARDS[1]).unlink()
    assert SHARDS[1] in refused(folder, CorruptCheckpoint, "shard-missing").what


def test_shards_without_an_index_are_refused(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m")
    (folder / INDEX).unlink()
    refused(folder, CorruptCheckpoint, "index-missing")


@pytest.mark.parametrize("text", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}'])
def test_what_is_no_index_is_refused(tmp_path: Path, text: str) -> None:
    folder = sharded(tmp_path / "m")
    (folder / INDEX).write_text(text)
    with pytest.raises(CorruptCheckpoint), open_model(folder):
        pass


def test_two_models_in_one_folder_are_not_chosen_from(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m")
    save_file(weights("a.weight"), folder / SINGLE)
    error = refused(folder, UsageError, "base-ambiguous")
    assert SINGLE in error.hint


def test_a_folder_without_weights_says_what_it_holds(tmp_path: Path) -> None:
    folder = model(tmp_path / "m")
    (folder / SINGLE).rename(folder / "diffusion_pytorch_model.bin")
    assert "pickled" in refused(folder, FormatError, "no-weights").why
    (folder / "diffusion_pytorch_model.bin").rename(folder / "weights.safetensors")
    assert "weights.safetensors" in refused(folder, FormatError, "no-weights").hint
    (tmp_path / "empty").mkdir()
    assert "empty" in refused(tmp_path / "empty", FormatError, "no-weights").why


@pytest.mark.parametrize("path", ["", "no/such/folder", "nothing", "a\0b"])
def test_a_path_that_leads_nowhere_is_a_usage_error(path: str) -> None:
    refused(path, UsageError, "not-found")


# --- quantised bases ----------------------------------------------------------------------------------------------


def _beside(*names: str, dtype: Any = np.float32) -> dict[str, Any]:
    return weights("a.weight") | weights(*names, dtype=dtype, shape=(4,))


QUANTISED: dict[str, tuple[dict[str, Any], str]] = {
    "bitsandbytes nf4": (_beside("a.weight.absmax", "a.weight.quant_state.bitsandbytes__nf4"), "bitsandbytes"),
    "bitsandbytes map": (_beside("a.weight.quant_map"), "bitsandbytes"),
    "bitsandbytes int8": (_beside("a.SCB"), "bitsandbytes"),
    "fp8 scaled": (_beside("a.scale_weight"), "fp8"),
    "fp8 scaled, whole": (_beside("scaled_fp8"), "fp8"),
    "fp8, other words": (_beside("a.weight_scale"), "fp8"),
    "torchao": (_beside("b._weight_qdata", dtype=np.int8), "torchao"),
    "quanto": (_beside("a.weight._data", "a.weight._scale"), "quanto"),
    "GPTQ": (_beside("a.qweight", dtype=np.int32), "GPTQ"),
    "bytes": (weights("a.weight", dtype=np.uint8), "U8"),
    "signed bytes": (weights("a.weight", dtype=np.int8), "I8"),
}


@pytest.mark.parametrize("case", QUANTISED)
def test_a_quantised_base_is_refused_with_its_kind(tmp_path: Path, case: str) -> None:
    tensors, kind = QUANTISED[case]
    error = refused(model(tmp_path / "m", tensors), FormatError, "base-quantised")
    assert kind in error.what
    assert error.where


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_an_fp8_base_is_refused(tmp_path: Path, dtype: str) -> None:
    import torch
    from safetensors.torch import save_file as save_torch

    folder = model(tmp_path / "m")
    save_torch({"a.weight": torch.zeros(4, 4).to(getattr(torch, dtype))}, folder / SINGLE)
    assert "F8" in refused(folder, FormatError, "base-quantised").what


@pytest.mark.parametrize("method", ["bitsandbytes", "torchao", "gguf", None])
def test_the_settings_may_say_it_too(tmp_path: Path, method: str | None) -> None:
    folder = model(tmp_path / "m")
    (folder / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": method, "bits": 4}}))
    assert (method or "unknown") in refused(folder, FormatError, "base-quantised").what


def test_the_header_of_torchao_says_it(tmp_path: Path) -> None:
    part = json.dumps({"_type": "Float8Tensor", "_tensor_data_names": ["qdata", "scale"]})
    folder = model(tmp_path / "m", None, tensor_names='["a.weight"]', **{"a.weight": part})
    assert "torchao" in refused(folder, FormatError, "base-quantised").what


@pytest.mark.parametrize("name", ["model.gguf", SINGLE])
def test_a_gguf_file_is_known_by_its_first_bytes(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"GGUF" + bytes(60))
    assert "GGUF" in refused(tmp_path / name, FormatError, "base-quantised").what


def test_a_folder_that_holds_nothing_but_gguf_is_refused_as_quantised(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model-Q4_K.gguf").write_bytes(b"GGUF" + bytes(60))
    assert "GGUF" in refused(tmp_path, FormatError, "base-quantised").what


def test_what_torchao_saved_as_pickles_is_refused_as_quantised(tmp_path: Path) -> None:
    import torch

    torch.save({"a": torch.zeros(2)}, tmp_path / "diffusion_pytorch_model.bin")
    assert "pickled" in refused(tmp_path, FormatError, "no-weights").why
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "torchao"}}))
    assert "torchao" in refused(tmp_path, FormatError, "base-quantised").what


def test_a_pickled_file_is_named_so(tmp_path: Path) -> None:
    import torch

    torch.save({"a": torch.zeros(2)}, tmp_path / "model.bin")
    assert "pickled" in refused(tmp_path / "model.bin", FormatError, "no-weights").what


def test_whole_numbers_that_are_no_weights_are_no_quantisation(tmp_path: Path) -> None:
    tensors = weights("a.weight", "scale_shift_table") | weights("steps", dtype=np.int64) | weights("m", dtype=np.uint8)
    with open_model(model(tmp_path / "m", tensors)) as found:
        assert len(found.tensors) == 4


def test_a_shard_that_changes_while_the_model_is_open_is_noticed(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m")
    with open_model(folder) as found:
        found.check_unchanged()
        os.utime(folder / SHARDS[1], ns=(1, 1))
        with pytest.raises(CorruptCheckpoint):
            found.check_unchanged()


@pytest.mark.parametrize("start", [b"\x80\x02", b"PK"])
def test_a_header_length_that_looks_like_another_container_is_only_a_length(tmp_path: Path, start: bytes) -> None:
    entry = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    length = int.from_bytes(start.ljust(8, b"\0"), "little")
    (tmp_path / SINGLE).write_bytes(length.to_bytes(8, "little") + entry.ljust(length - 1) + b"}" + bytes(4))
    with open_model(tmp_path / SINGLE) as opened:
        assert list(opened.tensors) == ["a"]


# --- the layout of transformers -----------------------------------------------------------------------------------


def torch_shards(folder: Path, listed: dict[str, str] | None = None) -> Path:
    """A language model's folder of two torch files."""
    import torch

    folder.mkdir(parents=True)
    names = [f"pytorch_model-0000{n}-of-00002.bin" for n in (1, 2)]
    for tensor, name in zip("ab", names, strict=True):
        torch.save({f"{tensor}.weight": torch.ones(4, 4)}, folder / name)
    listed = listed or {"a.weight": names[0], "b.weight": names[1]}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": listed}))
    return folder


def test_torch_files_are_read_by_their_index(tmp_path: Path) -> None:
    with open_model(torch_shards(tmp_path / "m")) as opened:
        assert {name: (ref.name, ref.dtype, ref.shape) for name, ref in opened.tensors.items()} == {
            "a.weight": ("a.weight", "F32", (4, 4)),
            "b.weight": ("b.weight", "F32", (4, 4)),
        }
        assert opened.layout.pickled


def test_of_safetensors_and_torch_files_the_safetensors_are_taken(tmp_path: Path) -> None:
    folder = torch_shards(tmp_path / "m")
    save_file(weights("c.weight"), folder / "model.safetensors")
    with open_model(folder) as opened:
        assert list(opened.tensors) == ["c.weight"]
    save_file(weights("d.weight"), folder / "model.fp16.safetensors")
    refused(folder, UsageError, "base-ambiguous")


def test_other_names_that_begin_with_model_are_no_weights(tmp_path: Path) -> None:
    (tmp_path / "m" / "model").mkdir(parents=True)
    save_file(weights("c.weight"), tmp_path / "m" / "model_ema.safetensors")
    refused(tmp_path / "m", FormatError, "no-weights")


@pytest.mark.parametrize("shard", ["../pytorch_model-00001-of-00002.bin", "/etc/passwd", "model.safetensors"])
def test_an_index_of_torch_files_names_nothing_else(tmp_path: Path, shard: str) -> None:
    folder = torch_shards(tmp_path / "m", {"a.weight": shard, "b.weight": "pytorch_model-00002-of-00002.bin"})
    refused(folder, UnsafeCheckpoint, "index-unsafe")


def test_torch_files_that_contradict_their_index_are_refused(tmp_path: Path) -> None:
    names = [f"pytorch_model-0000{n}-of-00002.bin" for n in (1, 2)]
    folder = torch_shards(tmp_path / "m", {"b.weight": names[0], "a.weight": names[1]})
    refused(folder, CorruptCheckpoint, "index-contradiction")
    (folder / names[1]).unlink()
    refused(folder, CorruptCheckpoint, "shard-missing")
    (folder / "pytorch_model.bin.index.json").unlink()
    refused(folder, CorruptCheckpoint, "index-missing")


def test_a_torch_file_that_calls_something_is_never_run(tmp_path: Path) -> None:
    import torch

    class Call:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "was run"),)

    (tmp_path / "m").mkdir()
    torch.save({"a.weight": torch.ones(2), "b": Call()}, tmp_path / "m" / "pytorch_model.bin")
    with pytest.raises(UnsafeCheckpoint), open_model(tmp_path / "m"):
        pass
    assert not (tmp_path / "was run").exists()
