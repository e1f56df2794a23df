"""Families of models: the names of their tensors and the switches that set them apart. No mathematics."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """One `model_type`: how its tensors are called, and what it does that `config.json` does not say."""

    model_type: str
    has_qk_norm: bool = False  # an RMSNorm over each query and key head, before RoPE
    has_output_bias: bool = True  # `attention_bias` also means a bias on the output projection
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    layer: str = "model.layers.{index}."
    attention_norm: str = "input_layernorm"
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    output: str = "self_attn.o_proj"
    query_norm: str = "self_attn.q_norm"
    key_norm: str = "self_attn.k_norm"
    mlp_norm: str = "post_attention_layernorm"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    ignored_suffixes: tuple[str, ...] = (
        "rotary_emb.inv_freq",
    )  # saved by old exporters, derived here


FAMILIES: Mapping[str, Family] = {
    family.model_type: family
    for family in (
        Family("llama"),  # Llama 2 and 3
        Family("qwen3", has_qk_norm=True),
    )
}
