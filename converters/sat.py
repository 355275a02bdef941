"""SwissArmyTransformer's ``lora2`` adapters, as CogVideoX's SAT training writes them with DeepSpeed.

Facts: SwissArmyTransformer 0.4.12 ``sat/model/finetune/lora2.py``; zai-org/CogVideo ``sat/``; checkpoints written by
both with DeepSpeed 0.15 and 0.19 (``fixtures/sat``). The scale is ``lora_alpha / r``; alpha is in no tensor, only in
the run's ``training_config.yaml``, and 1 where that file does not name it.
"""

from loraconv.rules import Dialect, Foreign, RunLayout

SAT = Dialect(
    name="sat",
    title="SAT (SwissArmyTransformer) training run",
    container="run-folder",
    file="mp_rank_00_model_states.pt",
    down="{module}.matrix_A.{part}",
    up="{module}.matrix_B.{part}",
    frozen="{module}.original.{param}",
    prefixes=("model.diffusion_model.",),
    spellings=("sat",),
    foreign=(
        Foreign("first_stage_model.", "VAE"),
        Foreign("conditioner.", "text encoder"),
    ),
    layout=RunLayout(
        pointer="latest",
        shard="mp_rank_{rank}_model_states.pt",
        partial="z3_rank_{rank}_model_states.pt",
        partial_prefix="module.",
        sidecar="training_config.yaml",
        root=("module", "model", "state_dict"),
        world_size="mp_world_size",
        trained="param_shapes",
    ),
    sidecar="training_config.yaml",
    rank_at="model.network_config.params.modules.lora_config.params.r",
    alpha_at="model.network_config.params.modules.lora_config.params.lora_alpha",
    default_alpha=1,
    default_why="SAT's LoraMixin uses lora_alpha = 1 unless the training YAML sets it",
    carries=("one rank and one alpha for the whole adapter", "any alpha as a number", "q, k, v and output projections"),
    cannot_carry=("ranks that differ between modules", "rsLoRA", "LoRA on feed-forward or norm layers"),
    facts="SwissArmyTransformer 0.4.12 sat/model/finetune/lora2.py; zai-org/CogVideo sat/",
)
