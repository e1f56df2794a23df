"""Tiny random models of every family, made by mlx-lm's own definitions: the other implementation to agree with."""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "rms_norm_eps": 1e-5,
    "vocab_size": 131,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
GEMMA = {
    **SIZES,
    "num_hidden_layers": 4,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 24,
    "tie_word_embeddings": True,
}
EXPERTS = {**SIZES, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True}
LONGROPE = {"short_factor": [1.0] * 8, "long_factor": [1.0 + 0.5 * i for i in range(8)]}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama2": {"model_type": "llama", **SIZES},
    "llama3": {"model_type": "llama", **SIZES, "rope_scaling": LLAMA3_ROPE, "rope_theta": 500000.0},
    "llama-tied": {"model_type": "llama", **SIZES, "tie_word_embeddings": True},
    "llama-bias": {"model_type": "llama", **SIZES, "attention_bias": True, "mlp_bias": True},
    "mistral": {"model_type": "mistral", **SIZES, "sliding_window": None},
    "windows": {  # mlx-lm's llama with windows in some layers
        "model_type": "llama",
        **SIZES,
        "sliding_window": 20,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "linear": {
        "model_type": "llama",
        **SIZES,
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
    },
    "dynamic": {
        "model_type": "llama",
        **SIZES,
        "rope_scaling": {"rope_type": "dynamic", "factor": 4.0},
    },
    "yarn": {
        "model_type": "qwen3",
        **SIZES,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "qwen2": {"model_type": "qwen2", **{k: v for k, v in SIZES.items() if k != "head_dim"}},
    "smollm3": {"model_type": "smollm3", **SIZES, "no_rope_layers": [1, 0, 1]},
    "smollm3-interval": {"model_type": "smollm3", **SIZES, "no_rope_layer_interval": 2},
    "qwen3": {"model_type": "qwen3", **SIZES},
    "qwen3-tied": {"model_type": "qwen3", **SIZES, "tie_word_embeddings": True, "head_dim": 16},
    "glm4": {
        "model_type": "glm4",
        **SIZES,
        "attention_bias": True,
        "partial_rotary_factor": 0.5,
    },
    # mlx-lm's gemma2 has no windows.
    "gemma2": {"model_type": "gemma2", **GEMMA, "sliding_window": 4096},
    "gemma3": {
        "model_type": "gemma3_text",
        **GEMMA,
        "sliding_window": 20,
        "sliding_window_pattern": 2,
        "rope_local_base_freq": 10000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "tie_word_embeddings": False,  # mlx-lm has a head until it reads files without one
    },
    "phi3": {"model_type": "phi3", **SIZES, "head_dim": None},
    "phi3-long": {
        "model_type": "phi3",
        **SIZES,
        "head_dim": None,
        "original_max_position_embeddings": 32,
        "rope_scaling": {"type": "longrope", **LONGROPE},
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        **EXPERTS,
        "num_experts": 6,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [1],
    },
    "mixtral": {
        "model_type": "mixtral",
        **SIZES,
        "intermediate_size": 64,
        "head_dim": None,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "granite": {
        "model_type": "granite",
        **SIZES,
        "head_dim": None,
        "attention_bias": True,
        "mlp_bias": False,
        "attention_multiplier": 0.2,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.7,
        "logits_scaling": 2.5,
    },
    "olmo2": {"model_type": "olmo2", **SIZES, "head_dim": None},
    "gpt_oss": {
        "model_type": "gpt_oss",
        **SIZES,
        "num_hidden_layers": 4,
        "intermediate_size": 64,
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "sliding_window": 20,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "beta_fast": 8.0,
            "beta_slow": 1.0,  # without gpt-oss's own "truncate": mlx-lm does not read it
            "original_max_position_embeddings": 32,
        },
    },
}


def make_model(config: dict[str, Any], seed: int = 0) -> nn.Module:
    """mlx-lm's model of this configuration with random weights; norms are not all ones."""
    name = {"mistral": "llama"}.get(config["model_type"], config["model_type"])
    module = import_module(f"mlx_lm.models.{name}")
    mx.random.seed(seed)
    model = module.Model(module.ModelArgs.from_dict(config))
    shaken = [
        (name, value + 0.1 * mx.random.normal(value.shape))
        for name, value in tree_flatten(model.parameters())
    ]
    model.load_weights(shaken)
    return model


def save_model(model: nn.Module, config: dict[str, Any], folder: Path) -> Path:
    """Write the folder that a hub would hold, without a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder
