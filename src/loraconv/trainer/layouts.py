"""What was trained, in the layouts of its consumers: SAT, diffusers and peft, each with a record of how it was made.

After writing, each adapter is read again by the verifier's own definition of its format and compared with what is in
memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from loraconv.adapter import Adapter, Factor, layer_of
from loraconv.data.tensors import InMemory
from loraconv.errors import FormatError, ProofFailed, UsageError
from loraconv.io.input_file import InputFile
from loraconv.io.safetensors_read import read_safetensors
from loraconv.io.safetensors_write import write_safetensors
from loraconv.io.torch_write import write_torch
from loraconv.lazy import Lazy
from loraconv.plan import Plan, plan_adapter
from loraconv.plan_base import parse_size, plan_base
from loraconv.registry import dialect, families
from loraconv.source import open_source
from loraconv.trainer.adapters import AdaptedModule, Trainees
from loraconv.trainer.files import Files, write_text
from loraconv.trainer.loss import rotary
from loraconv.trainer.model import Base
from loraconv.trainer.sat import sat_module
from loraconv.trainer.sat_settings import MAX_SEQUENCE, payload, training_config
from loraconv.trainer.settings import LAYOUTS, Settings
from loraconv.verification.adapters import adapter_pairs
from loraconv.verifier.delta import compare_adapters
from loraconv.verifier.numbers import Held, Pair, same_bytes

RECORD = "loraconv.training"
_SHARDS = "10GB"


@dataclass(frozen=True, slots=True)
class Subject:
    """What is to be written: the trained model at ``step``, and the record that goes into every layout. ``weights`` are
    :func:`base_weights`, whole, where :func:`needs_base`."""

    base: Base
    trainees: Trainees
    weights: Mapping[str, torch.Tensor]
    settings: Settings
    step: int
    processes: int
    record: Mapping[str, Any]


def chosen_layouts(settings: Settings, trainees: Trainees) -> tuple[tuple[str, ...], list[str]]:
    """The layouts to write, and what has to be said about one that is not; raises :class:`UsageError` for a layout that
    was asked for and cannot carry what is trained."""
    why_not = {name: _obstacle(name, settings, trainees) for name in LAYOUTS}
    asked = settings.checkpoints.layouts
    for name in asked:
        if why_not[name]:
            raise UsageError(f"the {name} layout cannot carry what is trained", why=why_not[name], slug="cannot-carry")
    wanted = asked or tuple(n for n in LAYOUTS if n != "sat" or settings.model.tiny)
    said = [f"no {name} layout is written: {why_not[name]}" for name in wanted if why_not[name]]
    return tuple(name for name in wanted if not why_not[name]), said


def _obstacle(layout: str, settings: Settings, trainees: Trainees) -> str:
    """Why a layout cannot carry what is trained; empty if it can."""
    if settings.kind == "full":
        return "it holds adapters only" if layout == "peft" else ""
    if layout != "peft" and settings.lora.dora:
        return "it has no place for DoRA's magnitudes"
    return _sat_obstacle(trainees.modules) if layout == "sat" else ""


def _sat_obstacle(modules: tuple[AdaptedModule, ...]) -> str:
    if len({(m.scale.alpha, m.scale.rank) for m in modules}) > 1:
        return "SAT has one rank and one alpha"
    if modules[0].scale.rslora:
        return "SAT has no rsLoRA"
    by_layer: dict[int | None, set[str]] = {}
    for m in modules:
        by_layer.setdefault(layer_of(m.module), set()).add(m.module.split(".", 2)[2])
    attention = {"attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0"}
    return (
        "" if all(names == attention for names in by_layer.values()) else "SAT adapts q, k, v and the output together"
    )


def write_layouts(folder: Files, layouts: tuple[str, ...], subject: Subject) -> None:
    """Write and check them, each in a sub-folder of its name. Raises :class:`ProofFailed`, :class:`WriteFailed`."""
    for name in layouts:
        if name == "sat":
            _write_sat(folder, subject)
        elif subject.settings.kind == "full":
            _write_plan(folder, f"{name}/", _base_plan(subject), subject)
        else:
            _write_plan(folder, f"{name}/", _adapter_plan(name, subject), subject)
        if subject.trainees.modules and not subject.settings.lora.dora:
            _prove(folder, name, subject.trainees.modules)
        if subject.settings.kind == "full" and name == "diffusers":
            _prove_weights(folder, dict(subject.weights))


def _adapter_plan(name: str, subject: Subject) -> Plan:
    factors = tuple(Factor(m.module, _held(m.down), _held(m.up), m.scale) for m in subject.trainees.modules)
    family = next(f for f in families() if f.name == "cogvideox")
    return plan_adapter(Adapter(factors), dialect(name), family)


def _base_plan(subject: Subject) -> Plan:
    tensors: dict[str, Lazy] = {n: _held(t) for n, t in subject.weights.items()}
    # FSDP gives the model a class of another name.
    config = json.loads(subject.base.transformer.to_json_string()) | {"_class_name": "CogVideoXTransformer3DModel"}
    return plan_base(tensors, config, dialect("diffusers"), dtype=None, limit=parse_size(_SHARDS))


def _held(tensor: torch.Tensor) -> Lazy:
    return InMemory(tensor.detach())


def _write_plan(folder: Files, place: str, plan: Plan, subject: Subject) -> None:
    magnitudes = {m.module: m.magnitude for m in subject.trainees.modules if m.magnitude is not None}
    for planned in plan.files:
        tensors = {o.name: o.tensor for o in planned.outputs}
        for module, magnitude in magnitudes.items():
            tensors[f"{plan.dialect.prefixes[0]}{module}.lora_magnitude_vector"] = _held(magnitude)
        # The plan's own claim of a proof is the converter's; what was checked here stands in the record.
        metadata = {key: value for key, value in planned.metadata.items() if key != "loraconv.proof"}
        metadata[RECORD] = json.dumps(subject.record, sort_keys=True)
        with folder.file(place + planned.name) as file:
            write_safetensors(file, tensors.items(), metadata)
    for name, text in plan.texts.items():
        if magnitudes and name == plan.dialect.sidecar:
            text = json.dumps({**json.loads(text), "use_dora": True}, indent=2, sort_keys=True) + "\n"
        write_text(folder, place + name, text)


def _write_sat(folder: Files, subject: Subject) -> None:
    import yaml

    settings, step, trainees = subject.settings, subject.step, subject.trainees
    extra = _sat_buffers(subject.base)
    trained = [] if trainees.modules else [t.name for t in trainees.parameters]
    world = settings.checkpoints.model_parallel
    buffers = [f"{dialect('sat').prefixes[0]}{name}" for name in extra if ".freqs_" in name]
    for rank in range(world):
        module = sat_module(subject.weights, trainees.modules, trained, extra, rank=rank, world=world)
        with folder.file(f"sat/{step}/mp_rank_{rank:02d}_model_states.pt") as file:
            write_torch(file, module.tensors, payload(module, buffers, settings, step, subject.processes))
    layers = sorted({n for m in trainees.modules if (n := layer_of(m.module)) is not None})
    config = training_config(subject.base.config, settings, layers, subject.record)
    write_text(folder, "sat/training_config.yaml", yaml.safe_dump(config, sort_keys=False))
    model = {"model_class": "SATVideoDiffusionEngine", "model_parallel_size": world}
    write_text(folder, "sat/model_config.json", json.dumps(model, indent=4))
    write_text(folder, "sat/latest", str(step))


def needs_base(settings: Settings, layouts: tuple[str, ...]) -> bool:
    """True if a layout holds the weights of the transformer itself."""
    return "sat" in layouts or settings.kind == "full"


def base_weights(base: Base) -> Iterator[tuple[str, torch.Tensor]]:
    """The transformer's own weights under diffusers' names, without the adapter; shares, where it is sharded."""
    for name, tensor in base.transformer.state_dict().items():
        if ".lora_" not in name:
            yield name.replace(".base_layer.", "."), tensor


def _sat_buffers(base: Base) -> dict[str, torch.Tensor]:
    """What SAT keeps in the checkpoint and diffusers computes: position tables, in the model's dtype, and a table that
    CogVideoX never uses (zeros here; SAT leaves it at its random start)."""
    config = base.config
    weight = base.transformer.patch_embed.proj.weight
    width = config.num_attention_heads * config.attention_head_dim
    if not config.use_rotary_positional_embeddings:
        return {"mixins.pos_embed.pos_embedding": base.transformer.patch_embed.pos_embedding.to(weight.dtype)}
    made = {"transformer.position_embeddings.weight": torch.zeros(MAX_SEQUENCE, width, dtype=weight.dtype)}
    if config.patch_size_t is None:  # the tables of 1.5 are computed by SAT, too
        frames = (config.sample_frames - 1) // config.temporal_compression_ratio + 1
        tables = rotary(base, frames, config.sample_height, config.sample_width, torch.device("cpu"))
        assert tables is not None
        cosine, sine = (t.to(weight.dtype) for t in tables)
        made |= {"mixins.pos_embed.freqs_sin": sine, "mixins.pos_embed.freqs_cos": cosine}
    return made


def _prove(folder: Files, layout: str, modules: tuple[AdaptedModule, ...]) -> None:
    """What is on disk is what is in memory: the same delta, module by module, by the format's own definition."""
    memory = {m.module: Pair(_values(m.down), _values(m.up), _scale(m)) for m in modules}
    try:
        with open_source(folder.path / layout) as source:
            written = adapter_pairs(source, None)
            wrong = [r.module for r in compare_adapters(memory, written) if not r.same]
    except FormatError as error:
        raise _unproven(layout, str(error)) from None
    wrong += sorted(memory.keys() ^ written.keys())
    if wrong:
        raise _unproven(layout, f"{len(wrong)} modules differ, first {wrong[0]}")


def _prove_weights(folder: Files, weights: dict[str, torch.Tensor]) -> None:
    """Every weight of the transformer folder is on disk, byte for byte."""
    wrong = []
    for path in sorted((folder.path / "diffusers").glob("*.safetensors")):
        with InputFile(path) as file:
            for name, ref in read_safetensors(file).tensors.items():
                if name not in weights or not same_bytes(ref, _held(weights.pop(name))):
                    wrong.append(name)
    if wrong or weights:
        raise _unproven("diffusers", f"missing or different: {[*wrong, *weights][0]}")


def _scale(module: AdaptedModule) -> Any:
    return module.scale.value if module.scale.exact is None else module.scale.exact


def _values(parameter: torch.Tensor) -> Held:
    return Held(parameter.detach().cpu().double().numpy(), "F32")


def _unproven(layout: str, why: str) -> ProofFailed:
    return ProofFailed(
        f"the {layout} layout of the checkpoint does not hold what was trained; it was not kept",
        why=why,
        hint="please report this",
    )
