"""``verify --base``: right fuses are proved, whoever made them; wrong ones are told apart and explained.

Bases, adapters and fuses are made here with numpy in float64 and rounded by the definition of each dtype; diffusers and
peft fuse too. Nothing of the library makes an expected value.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file

import loraconv
from loraconv.cli import run as cli
from loraconv.errors import FormatError, LoraconvError, UsageError
from tests.sat_run import build
from tests.support import expected, merged, refuse_to_skip_compiled_parts, scale_of, small

Arrays = dict[str, Any]
Fuse = Callable[["Made"], Arrays]

LAYERS, RANK, WIDTH = 4, 4, 64
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
DTYPES = ("bf16", "fp16", "fp32")
TORCH = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
MODEL_FILE = "diffusion_pytorch_model.safetensors"
#: dtype -> (significant bits, exponent of the smallest number).
GRID = {"bf16": (8, -133), "fp16": (11, -24), "fp32": (24, -149), "fp64": (53, -1074)}
GREATEST = {"bf16": (2 - 2.0**-7) * 2.0**127, "fp16": 65504.0, "fp32": (2 - 2.0**-23) * 2.0**127}


def nearest(exact: Any, dtype: str) -> Any:
    """Float64 rounded to the grid of a dtype, ties to even."""
    bits, least = GRID[dtype]
    unit = np.maximum(np.frexp(exact)[1] - bits, least)
    return np.ldexp(np.rint(np.ldexp(exact, -unit)), unit)


def cut(exact: Any, dtype: str) -> Any:
    """Float64 rounded towards zero."""
    bits, least = GRID[dtype]
    unit = np.maximum(np.frexp(exact)[1] - bits, least)
    return np.ldexp(np.trunc(np.ldexp(exact, -unit)), unit)


def module(layer: int, name: str) -> str:
    return f"transformer_blocks.{layer}.attn1.{name}"


def a_base(dtype: str, seed: int = 0, spread: float = 0.02) -> Arrays:
    """A transformer's weights in diffusers' names: attention, a wide layer, biases and a norm."""
    rng = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {"norm_out.weight": (WIDTH,), "proj_out.weight": (8, WIDTH)}
    for layer in range(LAYERS):
        for name in PROJECTIONS:
            shapes[f"{module(layer, name)}.weight"] = (WIDTH, WIDTH)
            shapes[f"{module(layer, name)}.bias"] = (WIDTH,)
        shapes[f"transformer_blocks.{layer}.ff.net.0.proj.weight"] = (2 * WIDTH, WIDTH)
    return {name: nearest(rng.normal(size=shape) * spread, dtype) for name, shape in shapes.items()}


def an_adapter(seed: int = 1, size: float = 0.1, layers: int = LAYERS) -> Arrays:
    """Module -> (down, up) in float32, as after a training."""
    rng = np.random.default_rng(seed)
    return {
        module(layer, name): (
            rng.uniform(-1, 1, size=(RANK, WIDTH)).astype(np.float32) / 8,
            (rng.normal(size=(WIDTH, RANK)) * size).astype(np.float32),
        )
        for layer in range(layers)
        for name in PROJECTIONS
    }


class Made:
    """A base, adapters and the deltas that they mean, in float64."""

    def __init__(
        self, dtype: str = "bf16", alphas: Sequence[float] = (2.0,), strengths: Sequence[float] = (), **options: Any
    ) -> None:
        self.dtype, self.alphas, self.strengths = dtype, alphas, strengths or [1.0] * len(alphas)
        self.base = a_base(dtype)
        self.adapters = [an_adapter(seed=n + 1, **options) for n in range(len(alphas))]

    def products(self, number: int = 0) -> Arrays:
        """``up @ down`` of one adapter, neither scale nor strength applied."""
        pairs = self.adapters[number].items()
        return {name: up.astype(np.float64) @ down.astype(np.float64) for name, (down, up) in pairs}

    def factor(self, number: int = 0) -> float:
        return self.strengths[number] * self.alphas[number] / RANK

    def delta(self, name: str) -> Any:
        return sum(self.factor(n) * self.products(n)[name] for n in range(len(self.alphas)) if name in self.products(n))

    def fused(self, how: Callable[[str, Any, Any], Any] | None = None) -> Arrays:
        """The base with every module's weight replaced by ``how(module, base, delta)``, rounded to the dtype."""
        made = dict(self.base)
        for name in {name: None for adapter in self.adapters for name in adapter}:
            base, delta = self.base[f"{name}.weight"], self.delta(name)
            made[f"{name}.weight"] = nearest(base + delta if how is None else how(name, base, delta), self.dtype)
        return made

    def write(self, folder: Path) -> tuple[Path, list[str]]:
        """The base's folder, and the adapters as ``PATH@STRENGTH``."""
        words = []
        for number, (adapter, alpha, strength) in enumerate(
            zip(self.adapters, self.alphas, self.strengths, strict=True)
        ):
            path = write_adapter(folder / f"adapter{number}.safetensors", adapter, alpha)
            words.append(str(path) if strength == 1 else f"{path}@{strength}")
        return write_model(folder / "base", self.base, self.dtype), words


def write_adapter(path: Path, adapter: Arrays, alpha: float, prefix: str = "transformer.") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    config = {"transformer.r": RANK, "transformer.lora_alpha": alpha}
    arrays = {}
    for name, (down, up) in adapter.items():
        arrays[f"{prefix}{name}.lora_A.weight"] = np.ascontiguousarray(down)
        arrays[f"{prefix}{name}.lora_B.weight"] = np.ascontiguousarray(up)
    save_arrays(arrays, path, {"lora_adapter_metadata": json.dumps(config)})
    return path


def write_model(folder: Path, arrays: Mapping[str, Any], dtype: str, shards: int = 2) -> Path:
    """A transformer folder as diffusers writes it, in shards with an index."""
    folder.mkdir(parents=True)
    tensors = {n: torch.from_numpy(np.array(a, dtype=np.float64)).to(TORCH[dtype]) for n, a in arrays.items()}
    names = sorted(tensors)
    step = -(-len(names) // shards)
    index = {}
    for number in range(shards):
        file = f"diffusion_pytorch_model-{number + 1:05}-of-{shards:05}.safetensors"
        part = names[number * step : (number + 1) * step]
        save_file({n: tensors[n].contiguous() for n in part}, folder / file, {"format": "pt"})
        index |= dict.fromkeys(part, file)
    text = json.dumps({"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": index})
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(text)
    (folder / "config.json").write_text(
        json.dumps({"_class_name": "CogVideoXTransformer3DModel", "num_layers": LAYERS})
    )
    return folder


def verified(folder: Path, made: Made, fused: Arrays, **options: Any) -> Any:
    base, words = made.write(folder)
    out = write_model(folder / "fused", fused, made.dtype)
    return loraconv.verify(*words, out, base=base, **options)


# --- right fuses --------------------------------------------------------------------------------------------------


def is_right(result: Any) -> None:
    assert result.same
    assert result.findings == ()
    caught = [control.caught for control in result.report.proof.controls]
    assert False not in caught
    assert caught.count(True) >= 8


@pytest.mark.parametrize("size", [1.0, 0.1, 1e-3, 1e-5], ids=["strong", "usual", "weak", "swallowed"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_exact_sum_rounded_once_is_proved(tmp_path: Path, dtype: str, size: float) -> None:
    made = Made(dtype, size=size)
    result = verified(tmp_path, made, made.fused())
    is_right(result)
    assert len(result.report.tensors) == LAYERS * len(PROJECTIONS)
    assert result.report.total.misrounded == 0
    assert result.report.total.ulps == 0.5


def test_a_model_in_float64_is_proved_and_its_mistakes_are_found(tmp_path: Path) -> None:
    made = Made("fp64")
    is_right(verified(tmp_path / "right", made, made.fused()))
    (finding,) = verified(tmp_path / "wrong", made, made.fused(lambda n, b, d: b + d / RANK)).findings
    assert finding.slug == "scale"
    (finding,) = verified(tmp_path / "cast", made, made.fused(lambda n, b, d: nearest(b + d, "bf16"))).findings
    assert finding.slug == "precision"


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_adapter_on_a_weight_that_is_no_square_is_proved(tmp_path: Path, dtype: str) -> None:
    made = Made(dtype)
    rng = np.random.default_rng(2)
    shapes = (RANK, WIDTH), (2 * WIDTH, RANK)
    down, up = (rng.normal(size=shape).astype(np.float32) / 8 for shape in shapes)
    made.adapters = [{f"transformer_blocks.{layer}.ff.net.0.proj": (down, up) for layer in range(LAYERS)}]
    result = verified(tmp_path, made, made.fused())
    assert result.same
    controls = {control.name: control for control in result.report.proof.controls}
    assert (controls["a weight transposed"].caught, controls["a weight transposed"].by) == (True, "L0")
    assert controls["delta transposed"].caught is None


def test_of_an_adapter_that_adds_nothing_the_controls_say_that_they_change_nothing(tmp_path: Path) -> None:
    made = Made(size=0.0)
    controls = {c.name: c for c in verified(tmp_path, made, made.fused()).report.proof.controls}
    for name in ("strength doubled", "scale divided by rank", "up zeroed", "q and k swapped"):
        assert (controls[name].caught, controls[name].by) == (None, "it changes no number here")
    assert controls["a flipped bit"].caught is True


@pytest.mark.parametrize("strengths", [(1.0, 1.0), (0.8, -0.5)])
def test_several_adapters_with_their_strengths_are_proved(tmp_path: Path, strengths: tuple[float, float]) -> None:
    made = Made("fp16", alphas=(3.0, 1.0), strengths=strengths)
    is_right(verified(tmp_path, made, made.fused()))


def test_adapters_of_different_layers_are_proved_together(tmp_path: Path) -> None:
    made = Made(alphas=(3.0, 1.0))
    del made.adapters[0][module(0, "to_q")], made.adapters[1][module(3, "to_k")]
    is_right(verified(tmp_path, made, made.fused()))


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_products_and_sums_in_float32_are_proved(tmp_path: Path, dtype: str) -> None:
    made = Made(dtype, alphas=(3.0,))

    def single(name: str, base: Any, delta: Any) -> Any:
        down, up = made.adapters[0][name]
        return base.astype(np.float32) + np.float32(made.factor()) * (up @ down)

    is_right(verified(tmp_path, made, made.fused(single)))


def test_a_cast_that_was_asked_for_is_proved_with_its_dtype(tmp_path: Path) -> None:
    made = Made("fp32")
    base, words = made.write(tmp_path)
    cast = {name: nearest(array, "bf16") for name, array in made.base.items()}
    for name in made.adapters[0]:
        cast[f"{name}.weight"] = nearest(made.base[f"{name}.weight"] + made.delta(name), "bf16")
    out = write_model(tmp_path / "fused", cast, "bf16")
    result = loraconv.verify(*words, out, base=base)
    assert [finding.slug for finding in result.findings] == ["retyped"]
    assert "--dtype bf16" in result.findings[0].mend
    is_right(loraconv.verify(*words, out, base=base, dtype="bf16"))
    cast["proj_out.weight"] = cut(made.base["proj_out.weight"], "bf16")
    worse = write_model(tmp_path / "worse", cast, "bf16")
    assert not loraconv.verify(*words, worse, base=base, dtype="bf16").same


def test_one_file_and_another_sharding_are_the_same_model(tmp_path: Path) -> None:
    made = Made()
    base, words = made.write(tmp_path)
    out = write_model(tmp_path / "fused", made.fused(), made.dtype, shards=3)
    is_right(loraconv.verify(*words, out, base=base))
    whole = {n: t for file in sorted(out.glob("*.safetensors")) for n, t in load_file(file).items()}
    save_file(whole, tmp_path / "single.safetensors")
    is_right(loraconv.verify(*words, tmp_path / "single.safetensors", base=base))


@pytest.mark.parametrize("to", ["sat", "diffusers", "peft"])
def test_an_adapter_in_any_format_is_proved_in_the_base_of_its_run(tmp_path: Path, to: str) -> None:
    spec = small(lora_alpha=4.0)
    run = build(spec, tmp_path / "run")
    loraconv.sat2diffusers(run, out=tmp_path / "base", what="base")
    adapter = run if to == "sat" else tmp_path / "adapter"
    if to != "sat":
        loraconv.convert(run, out=adapter, to=to)
    (tmp_path / "fused").mkdir()
    state = {name: tensor.float().contiguous() for name, tensor in merged(expected(spec), scale_of(spec)).items()}
    save_file(state, tmp_path / "fused" / MODEL_FILE)
    is_right(loraconv.verify(adapter, tmp_path / "fused", base=tmp_path / "base"))


# --- diffusers and peft -------------------------------------------------------------------------------------------

ALPHA = 3.0
MODEL = {
    "num_attention_heads": 2,
    "attention_head_dim": WIDTH // 2,
    "num_layers": LAYERS,
    "text_embed_dim": 16,
    "time_embed_dim": 16,
    "sample_width": 8,
    "sample_height": 8,
    "sample_frames": 5,
    "in_channels": 4,
    "out_channels": 4,
    "max_text_seq_length": 8,
}


@pytest.fixture(scope="module")
def transformer() -> Any:
    from diffusers import CogVideoXTransformer3DModel

    torch.manual_seed(0)
    return CogVideoXTransformer3DModel(**MODEL).state_dict()


def by_diffusers(state: Any, adapter: Path, folder: Path, dtype: torch.dtype) -> tuple[Path, Path]:
    """The base as diffusers saves it, and what its ``fuse_lora`` makes of it."""
    from diffusers import CogVideoXTransformer3DModel

    model = CogVideoXTransformer3DModel(**MODEL)
    model.load_state_dict(state)
    model.to(dtype).save_pretrained(folder / "base")
    model.load_lora_adapter(load_file(adapter), prefix="transformer")  # at scale 1
    model.fuse_lora(lora_scale=ALPHA / RANK)
    model.unload_lora()
    model.save_pretrained(folder / "fused")
    return folder / "base", folder / "fused"


def by_peft(state: Any, adapter: Path, folder: Path, dtype: torch.dtype) -> tuple[Path, Path]:
    """The same by peft's ``merge_and_unload``."""
    from diffusers import CogVideoXTransformer3DModel
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    model = CogVideoXTransformer3DModel(**MODEL)
    model.load_state_dict(state)
    model.to(dtype).save_pretrained(folder / "base")
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(PROJECTIONS))
    wrapped = get_peft_model(model, config, autocast_adapter_dtype=False)
    factors = {name.replace("transformer.", "base_model.model.", 1): t for name, t in load_file(adapter).items()}
    set_peft_model_state_dict(wrapped, factors)
    wrapped.merge_and_unload().save_pretrained(folder / "fused")
    return folder / "base", folder / "fused"


@pytest.mark.parametrize("fuse", [by_diffusers, by_peft])
@pytest.mark.parametrize("dtype", DTYPES)
def test_fuses_of_diffusers_and_peft_are_proved_or_explained(
    tmp_path: Path, transformer: Any, fuse: Callable[..., tuple[Path, Path]], dtype: str
) -> None:
    adapter = {
        name: tuple(nearest(a.astype(np.float64), dtype).astype(np.float32) for a in pair)
        for name, pair in an_adapter().items()
    }
    file = write_adapter(tmp_path / "adapter.safetensors", adapter, ALPHA)
    base, fused = fuse(transformer, file, tmp_path, TORCH[dtype])
    result = loraconv.verify(file, fused, base=base)
    if dtype == "fp32":
        is_right(result)
    else:
        (finding,) = result.findings
        assert finding.slug == "rounding"
        assert f"the products were rounded to {dtype.upper().replace('FP', 'F')} before" in finding.sentence
        assert "% of the numbers are not the nearest" in finding.sentence


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_fuse_all_in_16_bits_as_on_a_gpu_is_explained(tmp_path: Path, dtype: str) -> None:
    made = Made(dtype, alphas=(3.0,))
    made.adapters = [{n: tuple(nearest(a * 1.0, dtype).astype("f4") for a in p) for n, p in made.adapters[0].items()}]

    def in_torch(name: str, base: Any, delta: Any) -> Any:
        down, up = (torch.from_numpy(factor).to(TORCH[dtype]) for factor in made.adapters[0][name])
        weight = torch.from_numpy(base).to(TORCH[dtype])
        weight += (up @ down) * made.factor()
        return weight.double().numpy()

    (finding,) = verified(tmp_path, made, made.fused(in_torch)).findings
    assert finding.slug == "rounding"
    assert "before they were added, and before they were scaled" in finding.sentence


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_fuse_in_float32_that_is_cast_afterwards_is_proved(tmp_path: Path, transformer: Any, dtype: str) -> None:
    rounded = {name: tensor.to(TORCH[dtype]) for name, tensor in transformer.items()}
    file = write_adapter(tmp_path / "adapter.safetensors", an_adapter(), ALPHA)
    base, fused = by_diffusers(rounded, file, tmp_path / "single", torch.float32)
    for folder, name in ((base, "base"), (fused, "fused")):
        state = {n: t.to(TORCH[dtype]) for n, t in load_file(folder / MODEL_FILE).items()}
        (tmp_path / name).mkdir()
        save_file(state, tmp_path / name / MODEL_FILE)
    is_right(loraconv.verify(file, tmp_path / "fused", base=tmp_path / "base"))


def test_modules_that_were_chosen_are_proved_and_the_others_must_be_untouched(tmp_path: Path) -> None:
    made = Made()
    base, words = made.write(tmp_path)
    out = write_model(tmp_path / "fused", made.fused(lambda n, b, d: b + d if n.endswith("to_q") else b), made.dtype)
    result = loraconv.verify(*words, out, base=base, modules=["*.to_q"])
    is_right(result)
    assert len(result.report.tensors) == LAYERS
    (finding,) = loraconv.verify(*words, out, base=base, modules=["*.to_q", "*.to_k"]).findings
    assert finding.slug == "unfused"
    (finding,) = loraconv.verify(*words, out, base=base, modules=["*.{0-2}.attn1.to_q"]).findings
    assert (finding.slug, finding.modules) == ("touched", (f"{module(LAYERS - 1, 'to_q')}.weight",))


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_loraconv_fuses_is_proved_and_rounded_to_the_nearest_everywhere(tmp_path: Path, dtype: str) -> None:
    made = Made(dtype, alphas=(3.0, 1.0), strengths=(0.8, 1.0))
    base, words = made.write(tmp_path)
    loraconv.fuse(*words, base=base, out=tmp_path / "fused")
    result = loraconv.verify(*words, tmp_path / "fused", base=base)
    is_right(result)
    assert result.report.total.misrounded == 0


# --- wrong fuses --------------------------------------------------------------------------------------------------


def other_projection(name: str) -> str:
    ends = {"to_q": "to_k", "to_k": "to_q"}
    head, _, end = name.rpartition(".")
    return f"{head}.{ends.get(end, end)}"


def next_layer(name: str) -> str:
    steps = name.split(".")
    return ".".join([steps[0], str((int(steps[1]) + 1) % LAYERS), *steps[2:]])


#: What was fused instead (made, module, base, delta), the slug of the finding and words in its sentence. Alpha is 3.
WRONG: dict[str, tuple[Callable[[Made, str, Any, Any], Any], str, str]] = {
    "times the rank": (lambda m, n, b, d: b + d * RANK, "scale", "multiplied by the rank"),
    "over the rank": (lambda m, n, b, d: b + d / RANK, "scale", "divided by the rank"),
    "alpha ignored": (lambda m, n, b, d: b + d / 0.75, "scale", "alpha was ignored"),
    "scale twice": (lambda m, n, b, d: b + d * 0.75, "scale", "scale was applied twice"),
    "doubled": (lambda m, n, b, d: b + 2 * d, "scale", "fused twice"),
    "fused twice": (lambda m, n, b, d: nearest(b + d, m.dtype) + d, "scale", "fused twice"),
    "subtracted": (lambda m, n, b, d: b - d, "scale", "subtracted"),
    "some constant": (lambda m, n, b, d: b + 0.3 * d, "scale", "counts 0.3 times"),
    "nothing": (lambda m, n, b, d: b, "unfused", "nothing was fused"),
    "some modules": (lambda m, n, b, d: b if "to_v" in n else b + d, "unfused", "ignored"),
    "q and k": (lambda m, n, b, d: b + m.delta(other_projection(n)), "swapped", "to_k and to_q"),
    "weights of q and k": (
        lambda m, n, b, d: m.base[f"{other_projection(n)}.weight"] + m.delta(other_projection(n)),
        "swapped",
        "to_k and to_q",
    ),
    "layers": (lambda m, n, b, d: b + m.delta(next_layer(n)), "shifted", "layers are shifted"),
    "transposed": (lambda m, n, b, d: b + d.T, "transposed", "transposed"),
    "cut off": (lambda m, n, b, d: cut(b + d, m.dtype), "truncated", "cut off"),
    "products in bfloat16": (lambda m, n, b, d: b + nearest(d, "bf16"), "rounding", "rounded to BF16"),
    "products in bfloat16, scaled wrongly": (
        lambda m, n, b, d: b + nearest(d * RANK, "bf16"),
        "scale",
        "multiplied by the rank); and the products were rounded to BF16",
    ),
    "another training": (
        lambda m, n, b, d: b + d + np.random.default_rng(9).normal(size=d.shape) / 64,
        "other",
        "neither the base nor",
    ),
}


#: What is cut off to float32 is as near as products in float32 may be.
EVERY = [(mistake, dtype) for mistake in WRONG for dtype in DTYPES if (mistake, dtype) != ("cut off", "fp32")]


@pytest.mark.parametrize(("mistake", "dtype"), EVERY)
def test_a_wrong_fuse_is_told_apart_and_explained(tmp_path: Path, mistake: str, dtype: str) -> None:
    how, slug, words = WRONG[mistake]
    made = Made(dtype, alphas=(3.0,))
    result = verified(tmp_path, made, made.fused(lambda name, base, delta: how(made, name, base, delta)))
    assert not result.same
    assert slug in {finding.slug for finding in result.findings}
    assert any(words in finding.sentence for finding in result.findings)
    assert all(finding.mend for finding in result.findings)
    if mistake != "layers":  # the last layer has no next one
        assert len(result.findings) == 1


@pytest.mark.parametrize("mistake", ["times the rank", "doubled", "nothing", "q and k", "cut off"])
def test_a_wrong_fuse_is_told_apart_although_rounding_swallows_most_of_it(tmp_path: Path, mistake: str) -> None:
    how, slug, _ = WRONG[mistake]
    made = Made("bf16", alphas=(3.0,), size=6e-5)
    right = verified(tmp_path / "right", made, made.fused())
    assert right.report.total.changed < 0.1 * right.report.total.elements
    result = verified(tmp_path, made, made.fused(lambda name, base, delta: how(made, name, base, delta)))
    assert not result.same
    assert slug in {finding.slug for finding in result.findings}


def test_float32_cut_off_is_found_where_the_delta_is_too_small_to_excuse_it(tmp_path: Path) -> None:
    made = Made("fp32", size=1e-4)
    (finding,) = verified(tmp_path, made, made.fused(lambda n, b, d: cut(b + d, "fp32"))).findings
    assert finding.slug == "truncated"


def test_an_adapter_that_moves_three_numbers_by_one_unit_is_missed_where_it_is_missing(tmp_path: Path) -> None:
    made = Made("bf16", alphas=(4.0,))
    name = module(0, "to_q")
    made.base[f"{name}.weight"][:] = 1.5  # of which one unit is 2**-7
    down, up = (np.zeros_like(factor) for factor in made.adapters[0][name])
    up[5, 0], down[0, 3:6] = 1, 0.6 * 2.0**-7
    made.adapters[0][name] = (down, up)
    right = verified(tmp_path / "right", made, made.fused())
    is_right(right)
    assert next(t.figures.changed for t in right.report.tensors if t.module == name) == 3
    (finding,) = verified(tmp_path / "wrong", made, made.fused(lambda n, b, d: b if n == name else b + d)).findings
    assert (finding.slug, finding.modules) == ("unfused", (f"{name}.weight",))


def test_the_finding_names_the_modules_that_are_wrong_and_no_others(tmp_path: Path) -> None:
    made = Made()
    result = verified(tmp_path, made, made.fused(lambda n, b, d: b if n.endswith("to_v") else b + d))
    (finding,) = result.findings
    assert set(finding.modules) == {f"{module(layer, 'to_v')}.weight" for layer in range(LAYERS)}
    assert [t.name for t in result.report.tensors if not t.same] == list(finding.modules)


@pytest.mark.parametrize(
    ("factors", "slug", "words"),
    [
        ((1.0, 0.0), "left-out", "adapter 2 was left out"),
        ((0.0, 1.0), "left-out", "adapter 1 was left out"),
        ((1 / 0.8, 1 / -0.5), "scale", "strength was ignored"),
        ((RANK, RANK), "scale", "multiplied by the rank"),
    ],
)
def test_a_wrong_sum_of_adapters_is_explained(
    tmp_path: Path, factors: tuple[float, float], slug: str, words: str
) -> None:
    made = Made(alphas=(3.0, 5.0), strengths=(0.8, -0.5))

    def wrong(name: str, base: Any, delta: Any) -> Any:
        return base + sum(f * made.factor(n) * made.products(n)[name] for n, f in enumerate(factors))

    (finding,) = verified(tmp_path, made, made.fused(wrong)).findings
    assert finding.slug == slug
    assert words in finding.sentence


def test_the_only_one_of_three_adapters_that_was_fused_is_named(tmp_path: Path) -> None:
    made = Made(alphas=(3.0, 5.0, 2.0))
    wrong = made.fused(lambda name, base, delta: base + made.factor(1) * made.products(1)[name])
    (finding,) = verified(tmp_path, made, wrong).findings
    assert finding.slug == "left-out"
    assert "adapter 2 alone was fused" in finding.sentence


def test_adapters_added_one_by_one_are_explained(tmp_path: Path) -> None:
    made = Made(alphas=(3.0, 5.0))

    def one_by_one(name: str, base: Any, delta: Any) -> Any:
        return nearest(base + made.factor(0) * made.products(0)[name], "bf16") + made.factor(1) * made.products(1)[name]

    (finding,) = verified(tmp_path, made, made.fused(one_by_one)).findings
    assert finding.slug == "rounding"
    assert "after each adapter" in finding.sentence


def test_another_base_is_named(tmp_path: Path) -> None:
    made = Made()
    fused = made.fused()
    made.base = a_base("bf16", seed=7)
    (finding,) = verified(tmp_path, made, fused).findings
    assert finding.slug == "other-base"
    assert "different base model" in finding.sentence


def test_a_base_that_was_cast_first_is_named(tmp_path: Path) -> None:
    made = Made("fp32")
    fused = {n: nearest(a, "bf16") for n, a in made.base.items()}
    for name in made.adapters[0]:
        fused[f"{name}.weight"] = fused[f"{name}.weight"] + made.delta(name)
    findings = verified(tmp_path, made, {n: nearest(a, "fp32") for n, a in fused.items()}).findings
    assert {finding.slug for finding in findings} == {"precision"}
    assert any("whole base was cast through BF16" in finding.sentence for finding in findings)


def test_numbers_cast_on_their_way_are_named(tmp_path: Path) -> None:
    made = Made("fp32")
    result = verified(tmp_path, made, made.fused(lambda n, b, d: nearest(b + d, "bf16")))
    (finding,) = result.findings
    assert finding.slug == "precision"
    assert "cast through BF16" in finding.sentence


@pytest.mark.parametrize("holds", ["the base", "another version"])
def test_a_stale_shard_is_named_with_its_file(tmp_path: Path, holds: str) -> None:
    made = Made()
    base, words = made.write(tmp_path)
    right = write_model(tmp_path / "fused", made.fused(), made.dtype)
    other = Made(layers=LAYERS)
    other.adapters = [an_adapter(seed=8)]
    other.base = {n: nearest(a * 1.5, "bf16") for n, a in made.base.items()}
    old = base if holds == "the base" else write_model(tmp_path / "old", other.fused(), made.dtype)
    name = "diffusion_pytorch_model-00002-of-00002.safetensors"
    (right / name).write_bytes((old / name).read_bytes())
    (finding,) = loraconv.verify(*words, right, base=base).findings
    assert finding.slug == "stale-shard"
    assert name in finding.sentence
    assert holds in finding.sentence


@pytest.mark.parametrize("missing", [("to_v",), ("to_out.0", "to_q")])
@pytest.mark.parametrize("shards", [10, 13, 19])
def test_modules_that_are_missing_in_many_shards_make_none_of_them_stale(
    tmp_path: Path, shards: int, missing: tuple[str, ...]
) -> None:
    made = Made()
    base, words = made.write(tmp_path)
    fused = made.fused(lambda n, b, d: b if n.endswith(missing) else b + d)
    out = write_model(tmp_path / "fused", fused, "bf16", shards=shards)
    (finding,) = loraconv.verify(*words, out, base=base).findings
    assert finding.slug == "unfused"
    assert len(finding.modules) == LAYERS * len(missing)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_none_is_named(tmp_path: Path, value: float) -> None:
    made = Made()
    fused = made.fused()
    fused[f"{module(1, 'to_k')}.weight"][3, 5] = value
    result = verified(tmp_path, made, fused)
    (finding,) = result.findings
    assert finding.slug == "nonfinite"
    assert "1 times" in finding.sentence
    json.dumps(result.to_dict(), allow_nan=False)


def test_nan_is_named_even_if_the_adapter_brought_it(tmp_path: Path) -> None:
    made = Made(alphas=(3.0, 1.0))
    made.adapters[1][module(1, "to_k")][1][0, 0] = np.nan
    (finding,) = verified(tmp_path, made, made.fused()).findings
    assert (finding.slug, finding.modules) == ("nonfinite", (f"{module(1, 'to_k')}.weight",))
    assert f"{WIDTH} times" in finding.sentence


def test_a_sum_too_large_for_the_dtype_is_named(tmp_path: Path) -> None:
    made = Made("fp16", size=1e4)
    name = module(0, "to_q")
    made.base[f"{name}.weight"][3, 5] = np.copysign(65504.0, made.delta(name)[3, 5])
    fused = made.fused()
    fused[f"{name}.weight"][3, 5] = np.copysign(np.inf, made.delta(name)[3, 5])
    (finding,) = verified(tmp_path, made, fused).findings
    assert (finding.slug, finding.modules) == ("nonfinite", (f"{name}.weight",))


def test_a_damaged_number_is_named_and_counted(tmp_path: Path) -> None:
    made = Made()
    fused = made.fused()
    fused[f"{module(1, 'to_k')}.weight"][3, 5] *= 4
    (finding,) = verified(tmp_path, made, fused).findings
    assert finding.slug == "damaged"
    assert "1 times" in finding.sentence
    assert module(1, "to_k") in finding.sentence


def test_a_changed_tensor_that_no_adapter_touches_is_named(tmp_path: Path) -> None:
    made = Made()
    fused = made.fused()
    fused[f"{module(2, 'to_q')}.bias"] = nearest(fused[f"{module(2, 'to_q')}.bias"] * 1.01, "bf16")
    (finding,) = verified(tmp_path, made, fused).findings
    assert (finding.slug, finding.modules) == ("touched", (f"{module(2, 'to_q')}.bias",))


@pytest.mark.parametrize("change", ["missing", "extra", "retyped", "resized"])
def test_another_list_of_tensors_is_named(tmp_path: Path, change: str) -> None:
    made = Made()
    base, words = made.write(tmp_path)
    fused = made.fused()
    if change == "missing":
        del fused["norm_out.weight"]
    elif change == "extra":
        fused["norm_out.bias"] = np.zeros(WIDTH)
    elif change == "resized":
        fused["norm_out.weight"] = np.zeros(WIDTH + 1)
    out = write_model(tmp_path / "fused", fused, "fp32" if change == "retyped" else "bf16")
    findings = loraconv.verify(*words, out, base=base).findings
    assert [f.slug for f in findings] == [{"resized": "other-base"}.get(change, change)]


def test_modules_without_a_home_are_named_with_the_nearest(tmp_path: Path) -> None:
    made = Made()
    fused = made.fused()
    made.adapters = [an_adapter(layers=LAYERS + 1)]
    (finding,) = verified(tmp_path, made, fused).findings
    assert finding.slug == "homeless"
    assert set(finding.modules) == {module(LAYERS, name) for name in PROJECTIONS}
    assert "the nearest name in the base is transformer_blocks." in finding.sentence


def test_another_config_is_named(tmp_path: Path) -> None:
    made = Made()
    base, words = made.write(tmp_path)
    out = write_model(tmp_path / "fused", made.fused(), made.dtype)
    text = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**text, "_diffusers_version": "0.42.1", "_name_or_path": "here"}))
    is_right(loraconv.verify(*words, out, base=base))
    (out / "config.json").write_text(json.dumps({**text, "num_layers": 3}))
    (finding,) = loraconv.verify(*words, out, base=base).findings
    assert finding.slug == "config"
    assert "num_layers" in finding.sentence


# --- what is measured ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_figures_are_those_of_float64(tmp_path: Path, dtype: str) -> None:
    made = Made(dtype, alphas=(3.0,))
    fused = made.fused(lambda n, b, d: b + d * 1.01)
    result = verified(tmp_path, made, fused)
    for tensor in result.report.tensors:
        base, delta, stored = made.base[tensor.name], made.delta(tensor.module), fused[tensor.name]
        change = stored - base
        assert tensor.figures.elements == stored.size
        assert tensor.figures.misrounded == np.count_nonzero(stored != nearest(base + delta, dtype))
        assert tensor.figures.changed == np.count_nonzero(stored != base)
        assert tensor.figures.error == pytest.approx(np.linalg.norm(change - delta) / np.linalg.norm(delta), rel=1e-4)
        assert tensor.figures.kept == pytest.approx(np.sum(change * delta) / np.sum(delta * delta), rel=1e-4)
        bits, least = GRID[dtype]
        unit = np.ldexp(1.0, np.maximum(np.frexp(base + delta)[1] - bits, least))
        assert tensor.figures.ulps == pytest.approx(np.max(np.abs(stored - base - delta) / unit), rel=1e-4)


def test_an_adapter_that_rounding_swallows_is_said_to_be_too_weak(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = Made(size=1e-4)
    base, words = made.write(tmp_path)
    out = write_model(tmp_path / "fused", made.fused(), made.dtype)
    assert cli(["verify", "--base", str(base), *words, str(out)]) == 0
    assert "so weak" in capsys.readouterr().out
    result = loraconv.verify(*words, out, base=base)
    assert result.report.kept < 0.5
    strong = Made()
    assert verified(tmp_path / "strong", strong, strong.fused()).report.kept > 0.99


def test_a_bound_replaces_the_rule_of_rounding(tmp_path: Path) -> None:
    made = Made("fp32")
    base, words = made.write(tmp_path)
    out = write_model(tmp_path / "fused", made.fused(lambda n, b, d: b + d * 1.001), made.dtype)
    assert not loraconv.verify(*words, out, base=base).same
    assert loraconv.verify(*words, out, base=base, bound=2e-3).same
    assert not loraconv.verify(*words, out, base=base, bound=5e-4).same


def test_a_bound_that_no_rounding_can_meet_is_said_to_be_that(tmp_path: Path) -> None:
    made = Made("bf16")
    fused = made.fused()
    result = verified(tmp_path / "right", made, fused, bound=1e-6)
    assert not result.same
    assert [finding.slug for finding in result.findings] == ["strict-bound"]
    names = result.findings[0].modules
    assert sorted(names) == sorted(f"{name}.weight" for name in made.products())
    errors = []
    for name in made.products():
        off = fused[f"{name}.weight"] - made.base[f"{name}.weight"] - made.delta(name)
        errors.append(np.linalg.norm(off) / np.linalg.norm(made.delta(name)))
    assert f"an error of {max(errors):.1e}, more than the bound 1e-06" in result.findings[0].sentence
    assert "--bound" in result.findings[0].mend
    assert verified(tmp_path / "wide", made, fused, bound=max(errors) * 1.01).same
    wrong = made.fused(lambda name, base, delta: base + 2 * delta)
    assert [f.slug for f in verified(tmp_path / "wrong", made, wrong, bound=1e-6).findings] == ["scale"]


def test_one_unit_in_few_numbers_is_allowed_and_more_is_not(tmp_path: Path) -> None:
    made = Made("bf16", size=0.01)
    fused = made.fused()
    name = f"{module(0, 'to_v')}.weight"
    flat = fused[name].reshape(-1)
    unit = np.ldexp(1.0, np.frexp(flat)[1] - 8)
    away = np.sign(flat - made.base[name].reshape(-1) - made.delta(module(0, "to_v")).reshape(-1))
    few = np.flatnonzero(np.abs(np.frexp(flat)[0]) > 0.6)  # not beside a power of two
    limit = flat.size // 1000
    flat[few[:limit]] -= (away * unit)[few[:limit]]
    result = verified(tmp_path / "few", made, fused)
    is_right(result)
    assert result.report.total.misrounded == limit
    assert 0.5 < result.report.total.ulps <= 1
    flat[few[limit]] -= (away * unit)[few[limit]]
    assert not verified(tmp_path / "more", made, fused).same
    flat[few[:limit]] -= (away * unit)[few[:limit]]
    flat[few[limit]] += (away * unit)[few[limit]]
    assert not verified(tmp_path / "further", made, fused).same


# --- the edges of the dtypes, against exact fractions -------------------------------------------------------------


def exact_nearest(value: Fraction, dtype: str) -> set[float]:
    """The stored numbers nearest to an exact one: two where it lies in the middle, an infinity past the greatest."""
    bits, least = GRID[dtype]
    size = abs(value)
    exponent = least
    while size >= Fraction(2) ** (exponent + bits):
        exponent += 1
    below = int(size / Fraction(2) ** exponent)
    grid = [Fraction(below + step) * Fraction(2) ** exponent for step in (0, 1)]
    gap = min(abs(g - size) for g in grid)
    sign = -1 if value < 0 else 1
    return {sign * (float(g) if g <= GREATEST[dtype] else np.inf) for g in grid if abs(g - size) == gap}


def hard_numbers(dtype: str, rng: Any, count: int) -> Any:
    """Zeros, numbers below the smallest normal, powers of two and their neighbours, the greatest, and usual ones."""
    bits, least = GRID[dtype]
    tiny = 2.0**least
    powers = np.ldexp(1.0, rng.integers(-8, 8, size=count))
    kinds = [
        np.zeros(count),
        rng.integers(-5, 6, size=count) * tiny,
        powers,
        powers * (1 - 2.0**-bits),
        -powers * (1 + 2.0 ** (1 - bits)),
        np.full(count, GREATEST[dtype]),
        nearest(rng.normal(size=count), dtype),
    ]
    return np.concatenate(kinds)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_is_judged_exactly_at_the_edges_of_the_dtype(tmp_path: Path, dtype: str) -> None:
    rng = np.random.default_rng(3)
    bits, least = GRID[dtype]
    rows = hard_numbers(dtype, rng, 40)
    # One column for each delta: a few bits, so that float32 products are exact and ties are met.
    down = np.array(
        [[0.0, 2.0**-12, 3 * 2.0**-11, -(2.0**-10), 2.0 ** (least - 1), 2.0**-bits, 1.5 * 2.0**-bits, 2.0**15]]
    )
    up = np.ldexp(1.0, rng.integers(-2, 3, size=len(rows)))[:, None]
    base = np.tile(rows[:, None], (1, down.shape[1]))
    exact = [
        [Fraction(b) + Fraction(u) * Fraction(d) for b, d in zip(row, down[0], strict=True)]
        for row, u in zip(base, up[:, 0], strict=True)
    ]
    choices = [[exact_nearest(x, dtype) for x in row] for row in exact]
    right = np.array([[sorted(c)[0] for c in row] for row in choices])
    other = np.array([[sorted(c)[-1] for c in row] for row in choices])
    step = np.ldexp(1.0, np.maximum(np.frexp(np.where(np.isinf(right), 0, right))[1] - bits, least))
    for stored, wrong in ((right, 0), (other, 0), (right + step, None)):
        counted = judged(tmp_path, base, up, down, stored, dtype)
        if wrong is None:
            wrong = sum(
                s not in c for line, row in zip(stored, choices, strict=True) for s, c in zip(line, row, strict=True)
            )
        assert counted == wrong


def judged(folder: Path, base: Any, up: Any, down: Any, stored: Any, dtype: str) -> int:
    """How many elements the proof counts as not the nearest."""
    return int(figures(folder, base, up, down, stored, dtype).misrounded)


def figures(folder: Path, base: Any, up: Any, down: Any, stored: Any, dtype: str) -> Any:
    """What the proof counts in one weight."""
    from loraconv.io.input_file import InputFile
    from loraconv.io.safetensors_read import read_safetensors
    from loraconv.verifier.fused.rounding import Delta, measure

    tensors = {n: torch.from_numpy(a).to(TORCH[dtype]) for n, a in (("base", base), ("stored", stored))}
    save_file(tensors, folder / "edges.safetensors")
    with InputFile(folder / "edges.safetensors") as file:
        found = read_safetensors(file).tensors
        return measure(found["base"], found["stored"], Delta.of(up, down))


@pytest.mark.parametrize("rank", [16, 160])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_what_float32_rounds_wrongly_is_counted_in_every_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, rank: int
) -> None:
    monkeypatch.setattr("loraconv.verifier.fused.rounding.BLOCK_BYTES", 1 << 15)
    rng = np.random.default_rng(rank)
    base = nearest(rng.normal(size=(512, 256)) * 0.02, dtype)
    up, down = (rng.normal(size=shape).astype(np.float32) / 8 for shape in ((512, rank), (rank, 256)))
    right = nearest(base + up.astype(np.float64) @ down.astype(np.float64), dtype)
    stored = nearest((base.astype(np.float32) + up @ down).astype(np.float64), dtype)
    expected = np.count_nonzero(stored != right)
    assert expected > 3
    assert judged(tmp_path, base, up.astype(np.float64), down.astype(np.float64), stored, dtype) == expected
    assert judged(tmp_path, base, up.astype(np.float64), down.astype(np.float64), right, dtype) == 0


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("size", [1.0, 1e-2, 1e-5])
def test_compiled_and_numpy_count_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, size: float
) -> None:
    """Numbers that are right, off by a little, infinite, and below the smallest normal number."""
    from loraconv.verifier.fused import rounding

    if rounding._cells is None:
        refuse_to_skip_compiled_parts()
    rng = np.random.default_rng(3)
    base = nearest(rng.normal(size=(90, 1030)) * size, dtype)
    up, down = rng.normal(size=(90, 20)) * size / 8, rng.normal(size=(20, 1030)) / 8
    right = nearest(base + up @ down, dtype)
    slightly = right.copy()
    slightly[::7, ::11] = nearest(right[::7, ::11] * (1 + 2.0**-7), dtype)
    broken = slightly.copy()
    broken[5, 6], broken[7, 1029] = np.inf, np.nan
    for stored in (right, slightly, broken):
        folder = tmp_path / f"{id(stored)}"
        folder.mkdir()
        found = figures(folder, base, up, down, stored, dtype)
        with monkeypatch.context() as patched:
            patched.setattr(rounding, "_cells", None)
            want = figures(folder, base, up, down, stored, dtype)
        counts = ("elements", "misrounded", "wrong", "far", "nonfinite", "changed", "ulps", "worst")
        assert [getattr(found, n) for n in counts] == [getattr(want, n) for n in counts]
        if stored is not broken:
            assert found.misrounded == np.count_nonzero(stored != right)
        sums = [(f.along, f.size, f.rest) for f in (found, want)]
        assert np.allclose(*sums, rtol=1030 * 2.0**-24, atol=0, equal_nan=True)  # both add up in float32


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("least", [0, -16], ids=["normal", "subnormal"])
def test_what_is_nearer_to_the_edge_of_a_cell_than_the_error_stays_open(sign: int, least: int) -> None:
    """The compiled part alone, in float32 and float64: of float16, sums ever closer to the middle of two numbers."""
    from loraconv.verifier.fused import rounding

    if rounding._cells is None:
        refuse_to_skip_compiled_parts()
    unit = 2.0 ** (max(least, -14) - 10)  # the distance of float16's numbers there
    error, number = unit / 64, 2.0**least + 4 * unit
    inside = np.array([0.0, 0.3, 0.5 - 1.5 / 64, 0.5 - 0.5 / 64, 0.5 + 0.5 / 64, 0.7])
    exact = sign * (number + np.concatenate([inside, -inside]) * unit)
    stored = np.full(len(exact), sign * number, np.float32)
    wrong = np.flatnonzero(np.tile(inside > 0.5 - 1 / 64, 2))
    nothing, places, ones = np.zeros(len(exact), np.float32), np.zeros(len(exact), np.int64), np.ones(len(exact))
    edges = (2.0**-14, 2.0**-25)
    sums = nothing, stored, exact.astype(np.float32), np.array([error], np.float32), ones.astype(np.float32)
    count, *_ = rounding._cells.compare(*sums, *edges, (1 << 12) - 2, places)
    assert places[:count].tolist() == wrong.tolist()
    places = np.arange(len(exact))
    factors = np.ones(1), exact, np.ones(1), ones
    count = rounding._cells.confirm(nothing, stored, *factors, error, *edges, (1 << 41) - 2, places)
    assert places[:count].tolist() == wrong.tolist()


def test_the_controls_start_from_numbers_that_the_proof_accepts(tmp_path: Path) -> None:
    from loraconv.model_folder import open_model
    from loraconv.verifier.fused.case import Case, Term
    from loraconv.verifier.fused.controls import Block
    from loraconv.verifier.numbers import Held, Pair

    made = Made("fp16", alphas=(3.0,))
    base, _ = made.write(tmp_path)
    name = module(0, "to_q")
    down, up = (Held(factor.astype(np.float64), "F32") for factor in made.adapters[0][name])
    with open_model(base) as model, open_model(write_model(tmp_path / "fused", made.fused(), "fp16")) as fused:
        terms = [Term({name: Pair(down, up, Fraction(3, 4))}, Fraction(1))]
        block = Block(Case(model.tensors, terms, fused.tensors, [name], None, None), f"{name}.weight", name)
        assert np.array_equal(block.right, made.fused()[f"{name}.weight"])
        assert block.accepts(block.right)


# --- the command --------------------------------------------------------------------------------------------------


def test_the_command_exits_with_0_5_and_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = Made(strengths=(0.5,))
    base, words = made.write(tmp_path)
    assert words[0].endswith("@0.5")
    right = write_model(tmp_path / "fused", made.fused(), made.dtype)
    wrong = write_model(tmp_path / "wrong", made.base, made.dtype)
    assert cli(["verify", "--base", str(base), *words, str(right)]) == 0
    assert "every weight rounded once" in capsys.readouterr().out
    assert cli(["verify", "--base", str(base), *words, str(wrong)]) == 5
    assert "nothing was fused" in capsys.readouterr().out
    assert cli(["verify", "--base", str(base), str(right), str(wrong)]) == 3


def test_an_adapter_of_another_size_cannot_be_compared(tmp_path: Path) -> None:
    made = Made()
    base, _ = made.write(tmp_path)
    small = {n: (down[:, :32], up[:32]) for n, (down, up) in made.adapters[0].items()}
    adapter = write_adapter(tmp_path / "small.safetensors", small, 2.0)
    with pytest.raises(FormatError) as error:
        loraconv.verify(adapter, base, base=base)
    assert error.value.slug == "not-comparable"
    assert "[64, 64] in the base, [32, 32] by the adapter" in error.value.why


def test_an_adapter_of_other_layers_cannot_be_compared(tmp_path: Path) -> None:
    made = Made()
    base, _ = made.write(tmp_path)
    strange = {n.replace("transformer_blocks.", "transformer_blocks.1"): pair for n, pair in made.adapters[0].items()}
    with pytest.raises(FormatError) as error:
        loraconv.verify(write_adapter(tmp_path / "other.safetensors", strange, 2.0), base, base=base)
    assert error.value.slug == "not-comparable"
    assert "the base has no transformer_blocks.10.attn1." in error.value.why


def test_a_model_with_other_names_cannot_be_compared(tmp_path: Path) -> None:
    made = Made()
    base, words = made.write(tmp_path)
    out = write_model(tmp_path / "fused", {f"model.{n}": a for n, a in made.base.items()}, made.dtype)
    with pytest.raises(FormatError) as error:
        loraconv.verify(*words, out, base=base)
    assert error.value.slug == "not-comparable"


@pytest.mark.parametrize("strength", ["x", "nan", "inf", "1e999", "0x1", ""])
def test_a_strength_that_is_none_is_refused(tmp_path: Path, strength: str) -> None:
    made = Made()
    base, words = made.write(tmp_path)
    with pytest.raises(UsageError, match="strength"):
        loraconv.verify(f"{words[0]}@{strength}", base, base=base)


def test_a_path_with_an_at_sign_is_a_path(tmp_path: Path) -> None:
    made = Made()
    base, words = made.write(tmp_path)
    odd = Path(words[0]).rename(tmp_path / "a@0.5")
    out = write_model(tmp_path / "fused", made.fused(), made.dtype)
    is_right(loraconv.verify(odd, out, base=base))


@pytest.mark.parametrize(
    "words", [[], ["A"], ["A", "B", "C", "--alpha", "2"], ["A", "B", "--before", "x", "--after", "y"]]
)
def test_a_call_that_makes_no_sense_is_refused(tmp_path: Path, words: list[str]) -> None:
    assert cli(["verify", "--base", str(tmp_path), *words]) == 2


@pytest.mark.parametrize("words", [["--dtype", "bf16"], ["--modules", "*"]])
def test_what_belongs_to_a_base_is_refused_without(words: list[str]) -> None:
    assert cli(["verify", "A", "B", *words]) == 2


def test_the_json_has_schema_1_and_the_documented_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = Made()
    base, words = made.write(tmp_path)
    out = write_model(tmp_path / "fused", made.fused(), made.dtype)
    assert cli(["verify", "--base", str(base), *words, str(out), "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert set(value) == {
        *("schema", "mode", "same", "findings", "base", "adapters", "fused", "dtype", "bound", "kept"),
        *("checks", "controls", "tensors"),
    }
    assert (value["schema"], value["mode"]) == (1, "fused")
    assert value["adapters"] == [{"path": words[0], "strength": "1"}]
    assert set(value["tensors"][0]) == {
        *("tensor", "same", "elements", "changed", "misrounded", "wrong", "nonfinite", "ulps", "error", "kept")
    }


def test_damage_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    made = Made()
    base, words = made.write(tmp_path)
    out = write_model(tmp_path / "fused", made.fused(), made.dtype)
    shard = sorted(out.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(LoraconvError) as error:
        loraconv.verify(*words, out, base=base)
    assert error.value.exit_code == 4
