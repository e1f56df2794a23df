"""Families of models: the names of their tensors and the switches that set them apart. No mathematics."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Family:
    """One `model_type`: how its tensors are called, and what it does that `config.json` does not say."""

    model_type: str
    # What transformers takes where config.json is silent.
    defaults: Mapping[str, Any] = field(default_factory=dict)
    # Keys that this family follows, and others have not; in another family's configuration they are errors.
    numbers: tuple[str, ...] = ()
    ignored_keys: tuple[str, ...] = ()  # known to change nothing here
    has_qk_norm: bool = False  # an RMSNorm over each query and key head, before RoPE
    has_wide_qk_norm: bool = False  # it is over all heads together
    has_qkv_bias: bool = False  # whatever `attention_bias` says
    has_output_bias: bool = True  # `attention_bias` also means a bias on the output projection
    has_norm_offset: bool = False  # norms multiply with 1 + weight
    has_scaled_embedding: bool = False  # rows of the token table times sqrt(hidden_size)
    has_sinks: bool = False
    has_interleaved_rope: bool = False  # RoPE turns pairs (0, 1), (2, 3), ...
    activation: Literal["silu", "gelu_tanh", "swiglu_oai"] | None = None  # else as config.json says
    # Which layers see only `sliding_window` positions, when `layer_types` does not say; in a pattern every
    # `sliding_window_pattern`-th layer sees all.
    window_layers: Literal["none", "all", "last", "without rope", "pattern"] = "none"
    has_window_rope: bool = False  # layers with a window have a RoPE of their own
    has_rope_gaps: bool = False  # every `no_rope_layer_interval`-th layer goes without RoPE
    has_text_config: bool = False  # of a model that also sees: the text's part may be nested
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    layer: str = "model.layers.{index}."
    attention_norm: str | None = "input_layernorm"
    attention_post_norm: str | None = None
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    output: str = "self_attn.o_proj"
    query_norm: str = "self_attn.q_norm"
    key_norm: str = "self_attn.k_norm"
    sinks: str = "self_attn.sinks"
    mlp_norm: str | None = "post_attention_layernorm"
    mlp_post_norm: str | None = None
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    fused_qkv: str | None = None  # one matrix with the rows of query, key and value
    fused_gate_up: str | None = None
    experts: "Experts | None" = None
    ignored_suffixes: tuple[str, ...] = (
        "rotary_emb.inv_freq",
    )  # saved by old exporters, derived here
    ignored_prefixes: tuple[str, ...] = ()  # tensors of parts that are not run here


@dataclass(frozen=True)
class Experts:
    """What the experts' tensors of a family are called, as transformers and as mlx-lm save them."""

    router: str = "mlp.gate"
    one: str = "mlp.experts.{index}."  # before the names of one expert's matrices
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    stacked: str = (
        "mlp.switch_mlp."  # before mlx-lm's gate_proj, up_proj and down_proj (X, rows, E)
    )
    fused: str = (
        "mlp.experts."  # before transformers' gate_up_proj (X, 2 F, E) and down_proj (X, E, F)
    )
    is_transposed: bool = (
        False  # the fused ones are (X, E, 2 F) and (X, F, E), gate and up in turns
    )
    has_bias: bool = False
    num_key: str = "num_local_experts"
    size_key: str = "intermediate_size"

    @property
    def stacked_matrices(self) -> tuple[str, str, str]:
        """What mlx-lm calls gate, up and down of all experts of a layer."""
        return f"{self.stacked}gate_proj", f"{self.stacked}up_proj", f"{self.stacked}down_proj"


_SANDWICH: Mapping[str, Any] = {  # norms before and after both blocks
    "attention_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}
_GEMMA: Mapping[str, Any] = {
    **_SANDWICH,
    "has_norm_offset": True,
    "has_scaled_embedding": True,
    "window_layers": "pattern",
}
_GEMMA3: Mapping[str, Any] = {
    **_GEMMA,
    "numbers": ("query_pre_attn_scalar", "final_logit_softcapping"),
    "ignored_keys": ("_sliding_window_pattern",),
    "has_qk_norm": True,
    "has_window_rope": True,
}
_GEMMA3_DEFAULTS = {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "vocab_size": 262208,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window_pattern": 6,
    "rope_theta": 1000000.0,
    "rope_local_base_freq": 10000.0,
    "tie_word_embeddings": True,
}
_GLM4: Mapping[str, Any] = {
    "attention_post_norm": "post_self_attn_layernorm",
    "mlp_post_norm": "post_mlp_layernorm",
    "has_output_bias": False,
    "has_interleaved_rope": True,
    "fused_gate_up": "mlp.gate_up_proj",
}
_GLM4V: Mapping[str, Any] = {
    **_GLM4,
    "numbers": ("partial_rotary_factor", "mrope_section"),
    "has_qkv_bias": True,
    "has_text_config": True,
    "defaults": {"mrope_section": [8, 12, 12]},
}

FAMILIES: Mapping[str, Family] = {
    family.model_type: family
    for family in (
        Family("llama"),  # Llama 2 and 3
        Family("mistral", window_layers="all", defaults={"sliding_window": 4096}),
        Family("qwen2", has_qkv_bias=True, has_output_bias=False, window_layers="last"),  # and 2.5
        Family("qwen3", has_qk_norm=True, window_layers="last"),
        Family(
            "smollm3",
            window_layers="without rope",
            has_rope_gaps=True,
            defaults={"rope_theta": 2000000.0},
        ),
        Family(
            "glm4",
            **_GLM4,
            numbers=("partial_rotary_factor",),
            defaults={"partial_rotary_factor": 0.5, "attention_bias": True},
        ),
        Family("glm4v", **_GLM4V),
        Family("glm4v_text", **_GLM4V),
        Family(
            "qwen2_5_vl",
            numbers=("mrope_section",),
            has_qkv_bias=True,
            has_output_bias=False,
            window_layers="last",
            has_text_config=True,
            defaults={"mrope_section": [16, 24, 24], "rope_theta": 1000000.0},
        ),
        Family(
            "gemma2",
            **_GEMMA,
            numbers=("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"),
            ignored_keys=("sliding_window_size",),
            defaults={
                "head_dim": 256,
                "hidden_activation": "gelu_pytorch_tanh",
                "query_pre_attn_scalar": 256,
                "attn_logit_softcapping": 50.0,
                "final_logit_softcapping": 30.0,
                "sliding_window_pattern": 2,
                "tie_word_embeddings": True,
            },
        ),
        Family("gemma3_text", **_GEMMA3, defaults=_GEMMA3_DEFAULTS),
        Family(  # the text's part of a model that sees; its eyes are not here
            "gemma3",
            **_GEMMA3,
            defaults=_GEMMA3_DEFAULTS,
            has_text_config=True,
            ignored_prefixes=(
                "model.vision_tower.",
                "model.multi_modal_projector.",
                "vision_tower.",
                "multi_modal_projector.",
            ),
        ),
        Family(  # Phi-3, Phi-3.5, Phi-4
            "phi3",
            fused_qkv="self_attn.qkv_proj",
            fused_gate_up="mlp.gate_up_proj",
            window_layers="all",
            numbers=("partial_rotary_factor", "original_max_position_embeddings"),
            ignored_keys=("full_attn_mod", "interpolate_factor"),
            defaults={"max_position_embeddings": 4096},
        ),
        Family(
            "qwen3_moe",
            has_qk_norm=True,
            window_layers="all",
            defaults={"use_sliding_window": False},
            experts=Experts(size_key="moe_intermediate_size"),
        ),
        Family(
            "mixtral",
            window_layers="all",
            defaults={"rope_theta": 1000000.0, "num_local_experts": 8, "num_experts_per_tok": 2},
            experts=Experts(
                router="block_sparse_moe.gate",
                one="block_sparse_moe.experts.{index}.",
                gate="w1",
                up="w3",
                down="w2",
                stacked="block_sparse_moe.switch_mlp.",
                fused="block_sparse_moe.experts.",
            ),
        ),
        Family(
            "granite",
            numbers=(
                "attention_multiplier",
                "embedding_multiplier",
                "residual_multiplier",
                "logits_scaling",
            ),
            defaults={"attention_multiplier": 1.0},
        ),
        Family(
            "olmo2",
            has_wide_qk_norm=True,
            attention_norm=None,
            attention_post_norm="post_attention_layernorm",
            mlp_norm=None,
            mlp_post_norm="post_feedforward_layernorm",
        ),
        Family(
            "gpt_oss",
            has_sinks=True,
            activation="swiglu_oai",
            window_layers="pattern",
            ignored_keys=("experts_per_token", "initial_context_length"),
            defaults={
                "attention_bias": True,
                "sliding_window_pattern": 2,
                "rope_theta": 150000.0,
                "num_local_experts": 128,
                "num_experts_per_tok": 4,
                "swiglu_alpha": 1.702,
                "swiglu_limit": 7.0,
            },
            experts=Experts(
                router="mlp.router",
                stacked="mlp.experts.",
                is_transposed=True,
                has_bias=True,
            ),
        ),
    )
}
