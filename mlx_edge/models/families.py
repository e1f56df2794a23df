"""Families of models: the names of their tensors and the switches that set them apart. No mathematics."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Family:
    """One `model_type`: how its tensors are called, and what it does that `config.json` does not say."""

    model_type: str
    has_qk_norm: bool = False  # an RMSNorm over each query and key head, before RoPE
    has_qkv_bias: bool = False  # whatever `attention_bias` says
    has_output_bias: bool = True  # `attention_bias` also means a bias on the output projection
    default_theta: float = 10000.0
    # Which layers see only `sliding_window` positions, when `layer_types` does not say.
    window_layers: Literal["none", "all", "last", "without rope"] = "none"
    default_window: int | None = None
    has_rope_gaps: bool = False  # every `no_rope_layer_interval`-th layer goes without RoPE
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
        Family("mistral", window_layers="all", default_window=4096),
        Family("qwen2", has_qkv_bias=True, has_output_bias=False, window_layers="last"),  # and 2.5
        Family("qwen3", has_qk_norm=True, window_layers="last"),
        Family(
            "smollm3", window_layers="without rope", has_rope_gaps=True, default_theta=2000000.0
        ),
    )
}
