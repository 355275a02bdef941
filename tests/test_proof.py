"""The proof fails on a wrong output. Each mistake is made in the converter itself, on its way to the disk."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import loraconv
from loraconv import base, conversion, jobs, ranks, registry
from loraconv.errors import CorruptCheckpoint, FormatError, ProofFailed
from loraconv.fold import cast
from loraconv.lazy import Lazy, TensorRef, decode, encode, read
from loraconv.plan import Plan
from loraconv.rules import Dialect
from loraconv.source import open_source
from loraconv.verifier import base as proof_of_base
from loraconv.verifier import check
from loraconv.verifier.config import expected_config
from loraconv.verifier.numbers import HALF_ULP, Expectation, Held, Pair, compare, relative_error, slack
from loraconv.verifier.proof import Check, Control, Proof
from tests.sat_run import DIT, RunSpec, build
from tests.support import RECORDED, Recorded, small

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


def test_a_mistake_in_a_base_that_changes_nothing_counts_for_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "transformer_blocks.0.attn1.to_q.weight"

    def mistakes(stored: dict[str, Lazy]) -> Iterator[tuple[str, Callable[[], dict[str, Held]]]]:
        array, dtype = read(stored[name]), stored[name].dtype
        yield "none", lambda: {name: Held(array, dtype)}
        yield "doubled", lambda: {name: Held(array * 2, dtype)}

    monkeypatch.setattr(proof_of_base, "_mistakes", mistakes)
    result = loraconv.sat2diffusers(run, out=tmp_path / "out", what="base")
    assert [control.caught for control in result.proofs[0].controls] == [None, True]


def write_wrongly(monkeypatch: pytest.MonkeyPatch, mistake: Callable[[Tensors], Tensors]) -> None:
    def wrongly(write: Callable[..., None]) -> Callable[..., None]:
        return lambda file, tensors, *rest: write(file, mistake(dict(tensors)).items(), *rest)

    for name in ("write_safetensors", "begin_safetensors", "write_tensors"):
        monkeypatch.setattr(conversion, name, wrongly(getattr(conversion, name)))


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
    real = jobs.plan_adapter

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

    monkeypatch.setattr(jobs, "plan_adapter", wrong)
    with pytest.raises(ProofFailed):
        loraconv.convert(run, out=tmp_path / "out", to=to)
    assert list(tmp_path.iterdir()) == []


def test_a_right_output_has_every_check_and_all_eight_controls(run: Path, tmp_path: Path) -> None:
    result = loraconv.sat2diffusers(run, out=tmp_path / "out", what="all")
    adapter, base = result.proofs
    assert adapter.caught == base.caught == "8/8"
    assert [c.level for c in adapter.checks] == ["L0", "L1", "L2", "L2", "L0"]
    assert [c.level for c in base.checks] == ["L0", "L1", "L0", "L0", "L1"]
    assert base.checks[1].name == "byte for byte equal"
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
    assert 0 < error <= bound < 32 * HALF_ULP[dtype][0]


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


# --- what is written beside the numbers ---------------------------------------------------------------------------

Change = Callable[[Plan], Plan]


def plan_wrongly(monkeypatch: pytest.MonkeyPatch, change: Change) -> None:
    for name in ("plan_adapter", "plan_base"):
        real = getattr(jobs, name)
        monkeypatch.setattr(jobs, name, lambda *a, real=real, **options: change(real(*a, **options)))


def fails(folder: Path, run: Path, to: str, **options: Any) -> ProofFailed:
    """Convert, expect a failed proof, and expect that nothing is left behind."""
    before = set(folder.iterdir())
    with pytest.raises(ProofFailed) as failure:
        convert(folder, run, to, **options)
    assert set(folder.iterdir()) == before
    return failure.value


def convert(folder: Path, run: Path, to: str, **options: Any) -> Path:
    if to == "base":
        loraconv.sat2diffusers(run, out=folder / "out", what="base", **options)
    else:
        loraconv.convert(run, out=folder / "out", to=to, **options)
    return folder / "out"


def text(name: str, how: Callable[[str], str | None]) -> Change:
    """Change a text file, or leave it out."""

    def change(plan: Plan) -> Plan:
        assert name in plan.texts
        made = {**plan.texts, name: how(plan.texts[name])}
        return replace(plan, texts={n: t for n, t in made.items() if t is not None})

    return change


def in_json(name: str, how: Callable[[dict[str, Any]], object]) -> Change:
    """Change the object in a JSON file, in place."""

    def edit(old: str) -> str:
        value = json.loads(old)
        how(value)
        return json.dumps(value)

    return text(name, edit)


def in_header(key: str, how: Callable[[dict[str, Any]], object]) -> Change:
    """Change the object that a header key holds as JSON, in place."""

    def change(plan: Plan) -> Plan:
        (file,) = plan.files
        value = json.loads(file.metadata[key])
        how(value)
        return replace(plan, files=(replace(file, metadata={**file.metadata, key: json.dumps(value)}),))

    return change


def file_named(name: str) -> Change:
    return lambda plan: replace(plan, files=(replace(plan.files[0], name=name), *plan.files[1:]))


WRONG_CONFIG = {
    "_class_name": "Transformer2DModel",
    "activation_fn": "gelu",
    "attention_bias": False,
    "attention_head_dim": 8,
    "dropout": 0.1,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "in_channels": 32,
    "max_text_seq_length": 11,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "num_attention_heads": 8,
    "num_layers": 1,
    "ofs_embed_dim": 32,
    "out_channels": 8,
    "patch_bias": False,
    "patch_size": 1,
    "patch_size_t": 2,
    "sample_frames": 13,
    "sample_height": 60,
    "sample_width": 90,
    "spatial_interpolation_scale": 1.0,
    "temporal_compression_ratio": 2,
    "temporal_interpolation_scale": 2.0,
    "text_embed_dim": 48,
    "time_embed_dim": 64,
    "timestep_activation_fn": "gelu",
    "use_learned_positional_embeddings": True,
    "use_rotary_positional_embeddings": True,
}


@pytest.mark.parametrize("key", WRONG_CONFIG)
@pytest.mark.parametrize("missing", [False, True], ids=["wrong", "missing"])
def test_a_wrong_value_of_the_configuration_is_named(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, missing: bool
) -> None:
    change = in_json("config.json", lambda c: c.pop(key) if missing else c.update({key: WRONG_CONFIG[key]}))
    plan_wrongly(monkeypatch, change)
    assert key in fails(tmp_path, run, "base").where


def test_every_value_of_the_configuration_was_tried(run: Path, tmp_path: Path) -> None:
    config = json.loads((convert(tmp_path, run, "base") / "config.json").read_text())
    assert set(config) == set(WRONG_CONFIG)


@pytest.mark.parametrize(("key", "value"), [("guidance", True), ("attention_bias", 1), ("sample_width", 12.0)])
def test_an_extra_value_or_one_of_another_type_is_named(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, value: object
) -> None:
    plan_wrongly(monkeypatch, in_json("config.json", lambda c: c.update({key: value})))
    assert key in fails(tmp_path, run, "base").where


def test_the_version_of_diffusers_may_stand_in_the_configuration(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan_wrongly(monkeypatch, in_json("config.json", lambda c: c.update(_diffusers_version="0.34.0")))
    assert convert(tmp_path, run, "base").is_dir()


@pytest.mark.parametrize("recorded", RECORDED, ids=lambda r: r.name)
def test_the_expected_configuration_is_that_of_the_recorded_diffusers_model(recorded: Recorded) -> None:
    settings = yaml.safe_load((recorded.run / "training_config.yaml").read_text())
    with open_source(recorded.run) as source:
        assert expected_config(source.tensors, settings) == recorded.config


@pytest.mark.parametrize(("variant", "size"), [("5b", (90, 60, 49, True)), ("1.5-5b", (300, 300, 81, False))])
def test_without_settings_the_sample_is_that_of_the_released_models(
    tmp_path: Path, variant: Any, size: tuple[object, ...]
) -> None:
    with open_source(build(small(variant=variant, generation="late", yaml=False), tmp_path)) as source:
        made = expected_config(source.tensors, None)
    assert tuple(made[k] for k in ("sample_width", "sample_height", "sample_frames", "patch_bias")) == size
    assert (made["max_text_seq_length"], made["temporal_compression_ratio"]) == (226, 4)


@pytest.mark.parametrize("scale", [1.0, 1.87])
def test_a_table_of_positions_that_diffusers_would_not_compute_fails(tmp_path: Path, scale: float) -> None:
    """The settings name another interpolation than the table in the checkpoint was made with."""
    run = build(small(), tmp_path / "run")
    file = run / "training_config.yaml"
    file.write_text(file.read_text().replace("height_interpolation: 1.875", f"height_interpolation: {scale}"))
    assert "table of positions" in fails(tmp_path, run, "base").where


def loaded(file: Path) -> Any:
    return torch.load(file, weights_only=False)


def test_a_tensor_that_the_converter_drops_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = build(small(), tmp_path / "run")
    file = run / "2" / "mp_rank_00_model_states.pt"
    content = loaded(file)
    content["module"][DIT + "mixins.extra.weight"] = torch.ones(3)
    torch.save(content, file)
    monkeypatch.setattr(base, "_refuse", lambda *_: None)
    assert "mixins.extra.weight" in fails(tmp_path, run, "base").where


@pytest.mark.parametrize("name", ["mixins.extra.weight", "time_embed.0.weight"])
def test_every_rank_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A tensor that only the second rank has, and a copy in it that is none."""
    run = build(small(kind="full", mp_size=2), tmp_path / "run")
    assert convert(tmp_path, run, "base").is_dir()
    file = run / "2" / "mp_rank_01_model_states.pt"
    content = loaded(file)
    content["module"][DIT + name] = torch.ones(32, 64)
    torch.save(content, file)
    for module in (base, ranks):
        monkeypatch.setattr(module, "same_in_all", lambda refs: refs[0])
    (tmp_path / "other").mkdir()
    assert name in fails(tmp_path / "other", run, "base").where


def stored_in(dtype: str, count: int | None = None) -> Change:
    """Every tensor of the output, or the first few, cast to another dtype."""

    def change(plan: Plan) -> Plan:
        made = plan.files[0].outputs
        spoilt = [replace(o, tensor=cast(o.tensor, dtype)) for o in made[:count]]
        return replace(plan, files=(replace(plan.files[0], outputs=(*spoilt, *made[len(spoilt) :])),))

    return change


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F64"])
@pytest.mark.parametrize("to", ["diffusers", "peft", "sat"])
def test_an_adapter_in_another_dtype_fails(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str, dtype: str
) -> None:
    plan_wrongly(monkeypatch, stored_in(dtype))
    assert "dtype" in fails(tmp_path, run, to).where


@pytest.mark.parametrize("to", ["diffusers", "peft", "sat"])
def test_the_dtype_that_was_asked_for_is_demanded(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    real = jobs.plan_adapter
    monkeypatch.setattr(jobs, "plan_adapter", lambda *a, **o: real(*a, **{**o, "dtype": None}))
    assert "dtype" in fails(tmp_path, run, to, dtype="bf16").where


@pytest.mark.parametrize("to", ["diffusers", "peft"])
def test_widening_needs_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str) -> None:
    """A scale of 1/4 folds into bfloat16 exactly, so that nothing may be float32."""
    run = build(small(dtype=torch.bfloat16), tmp_path / "run")
    plan_wrongly(monkeypatch, stored_in("F32"))
    assert "dtype" in fails(tmp_path, run, to).where


def test_widening_with_a_reason_is_demanded_of_every_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = build(small(dtype=torch.bfloat16, lora_alpha=3.0), tmp_path / "run")
    assert convert(tmp_path, run, "diffusers").is_dir()
    plan_wrongly(monkeypatch, stored_in("BF16", 1))
    (tmp_path / "other").mkdir()
    assert "dtype" in fails(tmp_path / "other", run, "diffusers").where


@pytest.mark.parametrize("dtype", ["F16", "F64"])
def test_a_base_in_another_dtype_fails(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    real = jobs.read_base
    monkeypatch.setattr(jobs, "read_base", lambda *a: {name: cast(tensor, dtype) for name, tensor in real(*a).items()})
    assert "other content" in fails(tmp_path, run, "base").where


MORE_THAN_LORA = {
    "alora_invocation_tokens": [1],
    "bias": "all",
    "fan_in_fan_out": True,
    "init_lora_weights": "pissa",
    "layer_replication": [[0, 1]],
    "layers_to_transform": [0],
    "lora_bias": True,
    "lora_dropout": 0.5,
    "modules_to_save": ["proj_out"],
    "peft_type": "LOHA",
    "use_dora": True,
    "use_qalora": True,
}


@pytest.mark.parametrize("key", MORE_THAN_LORA)
@pytest.mark.parametrize("to", ["diffusers", "peft"])
def test_a_configuration_that_asks_for_more_than_lora_fails(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str, key: str
) -> None:
    value = MORE_THAN_LORA[key]
    if to == "peft":
        change = in_json("adapter_config.json", lambda c: c.update({key: value}))
    else:
        change = in_header("lora_adapter_metadata", lambda c: c.update({f"transformer.{key}": value}))
    plan_wrongly(monkeypatch, change)
    assert key in fails(tmp_path, run, to).why


def test_harmless_values_in_the_header_pass(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    harmless = {"peft_type": "LORA", "use_dora": False, "modules_to_save": None, "loftq_config": {}, "bias": "none"}
    harmless |= {"init_lora_weights": True, "megatron_core": "megatron.core", "qalora_group_size": 16}
    plan_wrongly(
        monkeypatch,
        in_header("lora_adapter_metadata", lambda c: c.update({f"transformer.{k}": v for k, v in harmless.items()})),
    )
    assert convert(tmp_path, run, "diffusers").is_dir()


def test_a_header_key_without_the_prefix_fails(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan_wrongly(monkeypatch, in_header("lora_adapter_metadata", lambda c: c.update(r=c.pop("transformer.r"))))
    assert "prefix" in fails(tmp_path, run, "diffusers").why


def test_a_rank_pattern_that_fits_by_the_end_of_the_name_counts(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change = in_header("lora_adapter_metadata", lambda c: c.update({"transformer.rank_pattern": {"to_out.0": 8}}))
    plan_wrongly(monkeypatch, change)
    assert "rank" in fails(tmp_path, run, "diffusers").why


@pytest.mark.parametrize("to", ["diffusers", "peft"])
@pytest.mark.parametrize("entry", [{"alpha": "2"}, {"rank": 8}, {"rank": 4.0}, {"alpha": "1/2"}])
def test_the_recorded_alpha_and_rank_are_the_sources(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str, entry: dict[str, Any]
) -> None:
    plan_wrongly(monkeypatch, in_header("loraconv.origin", lambda c: c[""].update(entry)))
    assert "recorded" in fails(tmp_path, run, to).where


def test_a_record_of_one_module_is_looked_at_too(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = "transformer_blocks.1.attn1.to_v"
    plan_wrongly(monkeypatch, in_header("loraconv.origin", lambda c: c.update({module: {**c[""], "alpha": "2"}})))
    assert "to_v" in fails(tmp_path, run, "diffusers").where


def test_the_record_in_sats_settings_is_looked_at(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change = text("training_config.yaml", lambda t: t.replace("alpha: '1'", "alpha: '7'"))
    plan_wrongly(monkeypatch, change)
    assert "recorded" in fails(tmp_path, run, "sat").where


@pytest.mark.parametrize(
    ("to", "change"),
    [
        ("diffusers", file_named("adapter.safetensors")),
        ("peft", file_named("pytorch_lora_weights.safetensors")),
        ("sat", file_named("1/mp_rank_01_model_states.pt")),
        ("sat", file_named("2/mp_rank_00_model_states.pt")),
        ("base", file_named("model.safetensors")),
        ("sat", text("latest", lambda _: "77")),
        ("sat", text("latest", lambda _: ".")),
        ("diffusers", lambda plan: replace(plan, texts={"second.safetensors": "{}"})),
    ],
    ids=["diffusers", "peft", "sat rank", "sat iteration", "base", "latest", "latest dot", "second file"],
)
def test_a_file_that_consumers_do_not_look_for_fails(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str, change: Change
) -> None:
    plan_wrongly(monkeypatch, change)
    assert "look" in fails(tmp_path, run, to).why


@pytest.mark.parametrize("world", [0, 2])
def test_a_wrong_world_size_fails(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: int) -> None:
    real = conversion.write_torch
    monkeypatch.setattr(conversion, "write_torch", lambda f, t, n: real(f, t, {**n, "mp_world_size": world}))
    assert "mp_world_size" in fails(tmp_path, run, "sat").why


BESIDE = [
    ("base", "config.json"),
    ("base", "diffusion_pytorch_model.safetensors.index.json"),
    ("peft", "adapter_config.json"),
    ("sat", "latest"),
    ("sat", "training_config.yaml"),
]


@pytest.mark.parametrize("content", [None, "", "[1, 2", "[1, 2]", "3", "a: {b", '{"model": 1, "weight_map": 2}', "\0"])
@pytest.mark.parametrize(("to", "name"), BESIDE)
def test_a_file_beside_that_makes_no_sense_is_a_failed_proof(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str, name: str, content: str | None
) -> None:
    plan_wrongly(monkeypatch, text(name, lambda _: content))
    fails(tmp_path, run, to, **({"max_shard_size": "50KB"} if "index" in name else {}))


@pytest.mark.parametrize("key", ["lora_adapter_metadata", "loraconv.origin"])
@pytest.mark.parametrize("content", [None, "", "[1]", "3", "{}", '{"transformer.alpha_pattern": {"(": 1}}', '{"": 1}'])
def test_a_header_that_makes_no_sense_is_a_failed_proof(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, content: str | None
) -> None:
    def change(plan: Plan) -> Plan:
        header = {**plan.files[0].metadata, key: content}
        kept = {name: value for name, value in header.items() if value is not None}
        return replace(plan, files=(replace(plan.files[0], metadata=kept),))

    plan_wrongly(monkeypatch, change)
    fails(tmp_path, run, "diffusers")


@pytest.mark.parametrize("raw", [b"", b"garbage that is no file", b"\x08\0\0\0\0\0\0\0{}      "])
@pytest.mark.parametrize("to", ["diffusers", "peft", "sat", "base"])
def test_a_file_of_weights_that_is_none_is_a_failed_proof(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str, raw: bytes
) -> None:
    for name in ("write_safetensors", "begin_safetensors", "write_torch"):
        monkeypatch.setattr(conversion, name, lambda file, *_: file.write(raw))
    monkeypatch.setattr(conversion, "write_tensors", lambda *_: None)
    fails(tmp_path, run, to)


def test_an_error_about_the_source_stays_what_it_is(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(*_: Any, **__: Any) -> Any:
        raise CorruptCheckpoint(f"{run} ends before the data it declares", slug="truncated")

    monkeypatch.setattr(check, "prove_adapter", damaged)
    with pytest.raises(CorruptCheckpoint):
        convert(tmp_path, run, "diffusers")
    monkeypatch.setattr(check, "prove_adapter", lambda *_, **__: {}["missing"])
    fails(tmp_path, run, "diffusers")


def test_memory_that_runs_out_is_no_failed_proof(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(check, "prove_adapter", full)
    with pytest.raises(MemoryError):
        convert(tmp_path, run, "diffusers")


@pytest.mark.parametrize("to", ["diffusers", "base"])
@pytest.mark.parametrize("where", ["name", "shape", "header"])
def test_a_header_that_the_safetensors_library_reads_differently_fails(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str, where: str
) -> None:
    real = check.read_safetensors

    def otherwise(file: Any) -> Any:
        read = real(file)
        name, ref = next(iter(read.tensors.items()))
        rest = {n: t for n, t in read.tensors.items() if n != name}
        if where == "header":
            return replace(read, metadata={**read.metadata, "more": ""})
        changed = {name + "x": ref} if where == "name" else {name: replace(ref, shape=(*ref.shape, 1))}
        return replace(read, tensors={**changed, **rest})

    monkeypatch.setattr(check, "read_safetensors", otherwise)
    assert "safetensors library" in str(fails(tmp_path, run, to))


def test_a_torch_file_that_holds_no_mapping_is_a_failed_proof(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = io.BytesIO()
    torch.save([torch.zeros(1)], content)
    monkeypatch.setattr(conversion, "write_torch", lambda file, *_: file.write(content.getvalue()))
    assert "not a mapping" in fails(tmp_path, run, "sat").why


def test_sats_own_settings_are_enough_without_a_record_beside_them(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bare(old: str) -> str:
        value = yaml.safe_load(old)
        del value["loraconv"]
        return yaml.safe_dump(value)

    plan_wrongly(monkeypatch, text("training_config.yaml", bare))
    assert convert(tmp_path, run, "sat").is_dir()


ACME = Dialect(
    name="acme",
    title="acme LoRA",
    container="safetensors-file",
    file="acme.lora",
    down="{module}.lora_down.weight",
    up="{module}.lora_up.weight",
    prefixes=("net.",),
    default_alpha="rank",
    default_why="acme scales by 1",
    every_consumer_reads_alpha=False,
    facts="acme",
)


def acme_oracle(found: Any, metadata: Any, settings: Any, alpha: Fraction | None) -> dict[str, Pair]:
    names = {n.removeprefix("net.").rpartition(".lora_")[0] for n in found[0]}
    return {
        n: Pair(found[0][f"net.{n}.lora_down.weight"], found[0][f"net.{n}.lora_up.weight"], alpha or Fraction(1))
        for n in names
    }


def declare_oracle(monkeypatch: pytest.MonkeyPatch, value: object) -> None:
    class Point:
        name, value = "acme", "acme_formats:oracle"

        def load(self) -> object:
            if isinstance(value, Exception):
                raise value
            return value

    found = lambda group, name: [Point()] if (group, name) == ("loraconv.oracles", "acme") else []  # noqa: E731
    monkeypatch.setattr("importlib.metadata.entry_points", found)


@pytest.fixture
def acme(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = (*registry._tables(), ACME)
    monkeypatch.setattr(registry, "_tables", lambda: tables)


@pytest.mark.usefixtures("acme")
@pytest.mark.parametrize(
    ("oracle", "slug"), [(None, "no-oracle"), (3, "oracle-plugin"), (ImportError("acme"), "oracle-plugin")]
)
def test_a_format_without_an_oracle_is_refused(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, oracle: object, slug: str
) -> None:
    if oracle is not None:
        declare_oracle(monkeypatch, oracle)
    with pytest.raises(FormatError) as failure:
        convert(tmp_path, run, "acme")
    assert failure.value.slug == slug
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("acme")
def test_a_format_of_another_package_is_proved_by_its_own_oracle(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    declare_oracle(monkeypatch, acme_oracle)
    assert convert(tmp_path, run, "acme").is_dir()
    (tmp_path / "other").mkdir()
    write_wrongly(monkeypatch, lambda t: {n: changed(x, lambda v: v * 2) for n, x in t.items()})
    fails(tmp_path / "other", run, "acme")


@pytest.mark.parametrize("name", ["acme.json", "acme.yaml"])
def test_the_settings_file_of_another_packages_format_is_read_again(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    table = replace(
        ACME, sidecar=name, alpha_at="network.alpha", rank_at="network.rank", every_consumer_reads_alpha=True
    )
    tables = (*registry._tables(), table)
    monkeypatch.setattr(registry, "_tables", lambda: tables)

    def oracle(found: Any, metadata: Any, settings: Any, alpha: Fraction | None) -> dict[str, Pair]:
        told = Fraction(settings["network"]["alpha"]) / settings["network"]["rank"]
        return acme_oracle(found, metadata, settings, told)

    declare_oracle(monkeypatch, oracle)
    assert convert(tmp_path, run, "acme").is_dir()
    plan_wrongly(monkeypatch, text(name, lambda t: t.replace("alpha: 1", "alpha: 2").replace('alpha": 1', 'alpha": 2')))
    (tmp_path / "other").mkdir()
    fails(tmp_path / "other", run, "acme")


@pytest.mark.usefixtures("acme")
def test_an_oracle_that_breaks_is_a_failed_proof(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    declare_oracle(monkeypatch, lambda *_: {}["no such key"])
    assert "no such key" in fails(tmp_path, run, "acme").why


@pytest.mark.parametrize("to", ["diffusers", "peft", "sat"])
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_infinity_in_a_factor_is_compared_without_a_warning(tmp_path: Path, to: str, bad: float) -> None:
    run = build(small(lora_alpha=3.0), tmp_path / "run")
    file = run / "2" / "mp_rank_00_model_states.pt"
    content = loaded(file)
    for name, tensor in content["module"].items():
        if ".matrix_" in name:
            tensor.view(-1)[1] = bad
    torch.save(content, file)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        out = convert(tmp_path, run, to, allow_nonfinite=True)
    json.loads((out / "loraconv.json").read_text(), parse_constant=pytest.fail)
