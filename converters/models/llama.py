"""LLaMA, Mistral and what is built as they are: the names of transformers.

Facts: huggingface/transformers ``models/llama/modeling_llama.py``, ``models/mistral/modeling_mistral.py``.
"""

from loraconv.rules import Family

LLAMA = Family(
    name="llama",
    title="LLaMA and Mistral",
    model_class="LlamaForCausalLM",
    component="",
    modules=(
        "model.embed_tokens",
        "model.layers.{i}.self_attn.q_proj",
        "model.layers.{i}.self_attn.k_proj",
        "model.layers.{i}.self_attn.v_proj",
        "model.layers.{i}.self_attn.o_proj",
        "model.layers.{i}.mlp.gate_proj",
        "model.layers.{i}.mlp.up_proj",
        "model.layers.{i}.mlp.down_proj",
        "lm_head",
    ),
)
