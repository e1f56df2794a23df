"""Stores what transformers computes for tiny random models: tests/goldens/NAME.json, read by tests/models.

A tool of developers: needs torch and transformers, which the tests do without. Run it from the repository's root with
an environment that has both: PYTHONPATH=. python scripts/make_goldens.py

A golden holds the configuration twice, as a hub's folder spells it (`given`) and as transformers writes it (`saved`),
the shapes of the tensors, and the logits of some positions in float32, rounded to seven digits. Weights and tokens are
drawn from names and lengths by tests/goldens/weights.py.
"""

import argparse
import json
import re
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.goldens.weights import draw_tokens, draw_weight

# Not a plain import: the type check finds some of it untyped where it is installed, nothing where it is not.
transformers: Any = import_module("transformers")
FOLDER = Path(__file__).parents[1] / "tests" / "goldens"
NUM_TOKENS = 90  # nearly three tails of the cache
SEEING = re.compile("vis(ion|ual)|multi_modal")  # tensors of eyes, which goldens of text leave out
POSITIONS = [0, 15, 31, 32, 50, 64, 89]  # the ends of tails among them

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 0.01,  # large, so that a wrong one shows
    "vocab_size": 61,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
LLAMA = {"model_type": "llama", **SIZES}
MISTRAL = {"model_type": "mistral", **SIZES}
QWEN2 = {"model_type": "qwen2", **SIZES, "rope_theta": 1000000.0}
QWEN3 = {"model_type": "qwen3", **SIZES, "rope_theta": 1000000.0, "head_dim": 32}
SMOLLM3 = {
    "model_type": "smollm3",
    **SIZES,
    "pad_token_id": 2,
}  # its default is past our vocabulary
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}  # of 32
GEMMA = {
    **SIZES,
    "num_hidden_layers": 4,
    "head_dim": 32,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 24,
    "sliding_window": 20,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
}
GEMMA2 = {"model_type": "gemma2", **GEMMA, "cache_implementation": "hybrid"}
GEMMA3 = {"model_type": "gemma3_text", **GEMMA, "sliding_window_pattern": 2}
GLM4 = {"model_type": "glm4", **SIZES, "head_dim": 32, "attention_bias": True, "pad_token_id": 0}
GLM4V_TEXT = {
    **SIZES,
    **HEADS,
    "model_type": "glm4v_text",
    "pad_token_id": 0,
    "partial_rotary_factor": 0.5,
    "rope_scaling": {"type": "default", "mrope_section": [2, 3, 3]},
}
EYES = {"hidden_size": 32, "intermediate_size": 32, "image_size": 28}  # unused, tiny
GLM4V_EYES = {**EYES, "depth": 1, "num_heads": 2, "out_hidden_size": 64}
GEMMA3_EYES = {**EYES, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 14}
PHI3 = {"model_type": "phi3", **SIZES, **HEADS, "pad_token_id": 0}
LONGROPE = {
    "type": "longrope",
    "short_factor": [1.0 + 0.02 * i for i in range(12)],
    "long_factor": [1.0 + 0.5 * i for i in range(12)],
}
QWEN3_MOE = {
    "model_type": "qwen3_moe",
    **SIZES,
    "head_dim": 32,
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "pad_token_id": 0,
}
MIXTRAL = {
    "model_type": "mixtral",
    **SIZES,
    "intermediate_size": 48,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
}
OLMO2 = {"model_type": "olmo2", **SIZES, "pad_token_id": 0}
GRANITE = {
    "model_type": "granite",
    **SIZES,
    "attention_multiplier": 0.2,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.7,
    "logits_scaling": 2.5,
    "pad_token_id": 0,
}
GPT_OSS = {
    "model_type": "gpt_oss",
    **SIZES,
    "num_hidden_layers": 4,
    "intermediate_size": 32,
    "head_dim": 32,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "sliding_window": 20,
    "rope_theta": 150000.0,
    "swiglu_limit": 7.0,
    "attention_bias": True,
    "pad_token_id": 0,
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32}

# As the hub spells them, which is mostly what transformers 4 wrote.
CONFIGS: dict[str, dict[str, Any]] = {
    "llama2": {**LLAMA, "num_key_value_heads": 4, "rope_scaling": None},
    "llama3": {
        **LLAMA,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "llama-linear": {**LLAMA, "rope_scaling": {"type": "linear", "factor": 2.5}},
    # Within max_position_embeddings, the only place where this runtime follows it.
    "llama-dynamic": {**LLAMA, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    "llama-yarn": {
        **LLAMA,
        "rope_scaling": {
            "rope_type": "yarn",
            **YARN,
            "truncate": False,
            "beta_fast": 4.0,
            "beta_slow": 0.5,
            "attention_factor": 1.2,
        },
    },
    "llama-yarn-mscale": {
        **LLAMA,
        "rope_scaling": {"rope_type": "yarn", **YARN, "mscale": 1.5, "mscale_all_dim": 0.8},
    },
    "llama-bias": {**LLAMA, "attention_bias": True, "mlp_bias": True},
    "llama-tied": {**LLAMA, "tie_word_embeddings": True, "head_dim": 24},
    "mistral": {**MISTRAL, "sliding_window": None, "rope_theta": 1000000.0},
    "mistral-window": {**MISTRAL, "sliding_window": 20},
    "mistral-wide-window": {**MISTRAL, "sliding_window": 40, "head_dim": 32},
    "mistral-default-window": MISTRAL,
    "qwen2": {**QWEN2, "use_sliding_window": False, "sliding_window": 20, "max_window_layers": 1},
    "qwen2-windows": {
        **QWEN2,
        "use_sliding_window": True,
        "sliding_window": 20,
        "max_window_layers": 1,
        "tie_word_embeddings": True,
    },
    "qwen2-yarn": {**QWEN2, "rope_scaling": {"type": "yarn", **YARN}},
    "qwen3": {**QWEN3, "use_sliding_window": False, "max_window_layers": 3},
    "qwen3-tied-bias": {**QWEN3, "tie_word_embeddings": True, "attention_bias": True},
    "qwen3-windows": {
        **QWEN3,
        "use_sliding_window": True,
        "sliding_window": 33,
        "max_window_layers": 2,
    },
    "qwen3-layer-types": {
        **QWEN3,
        "use_sliding_window": True,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "qwen3-yarn": {**QWEN3, "rope_scaling": {"rope_type": "yarn", **YARN}},
    "smollm3-tied": {
        **SMOLLM3,
        "tie_word_embeddings": True,
        "no_rope_layers": [1, 0, 1],
        "rope_theta": 5000000.0,
    },
    "smollm3-windows": {
        **SMOLLM3,
        "no_rope_layer_interval": 2,
        "use_sliding_window": True,
        "sliding_window": 20,
    },
    "smollm3-bias": {
        **SMOLLM3,
        "no_rope_layer_interval": 3,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "glm4": GLM4,
    "glm4-tied": {
        **GLM4,
        "attention_bias": False,
        "tie_word_embeddings": True,
        "partial_rotary_factor": 0.25,
    },
    "glm4v_text": GLM4V_TEXT,
    "gemma2": GEMMA2,
    "gemma2-untied": {
        **GEMMA2,
        "tie_word_embeddings": False,
        "attention_bias": True,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 5.0,
    },
    "gemma3": {**GEMMA3, "rope_theta": 1000000.0, "rope_local_base_freq": 10000.0},
    "gemma3-linear": {
        **GEMMA3,
        "sliding_window_pattern": 3,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "final_logit_softcapping": 5.0,
    },
    "gemma3-sees": {
        "model_type": "gemma3",
        "text_config": {**GEMMA3, "tie_word_embeddings": True},
        "vision_config": {**GEMMA3_EYES, "model_type": "siglip_vision_model"},
        "mm_tokens_per_image": 4,
        "boi_token_index": 97,
        "eoi_token_index": 98,
        "image_token_index": 99,
    },
    "phi3-window": {**PHI3, "sliding_window": 20, "rope_scaling": None},
    "phi3-long": {
        **PHI3,
        "partial_rotary_factor": 0.75,
        "rope_scaling": LONGROPE,
        "original_max_position_embeddings": 32,
        "tie_word_embeddings": True,
    },
    "phi3-short": {
        **PHI3,
        "partial_rotary_factor": 0.75,
        "rope_scaling": LONGROPE,
        "original_max_position_embeddings": 128,
    },
    "qwen3_moe": {**QWEN3_MOE, "norm_topk_prob": True, "mlp_only_layers": [1]},
    "qwen3_moe-window": {
        **QWEN3_MOE,
        "norm_topk_prob": False,
        "use_sliding_window": True,
        "sliding_window": 20,
        "tie_word_embeddings": True,
        "decoder_sparse_step": 2,
    },
    "mixtral": MIXTRAL,
    "mixtral-window": {**MIXTRAL, "sliding_window": 20, "rope_theta": 10000.0},
    "granite": GRANITE,
    "granite-tied": {
        **GRANITE,
        "tie_word_embeddings": True,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "olmo2": OLMO2,
    "olmo2-tied": {**OLMO2, "tie_word_embeddings": True, "attention_bias": True},
    "gpt_oss": {
        **GPT_OSS,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "beta_fast": 8.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 32,
        },
    },
}


def draw_model(kind: Any, config: Any, folder: Path) -> tuple[Any, Any, dict[str, list[int]]]:
    """Transformers' model of a configuration, with the weights that belong to its names; `config.json`; the shapes."""
    kind.from_config(config, dtype=torch.float32).save_pretrained(folder)
    file = folder / "model.safetensors"
    shapes = {key: list(value.shape) for key, value in load_file(file).items()}
    weights = {key: torch.from_numpy(draw_weight(key, shape)) for key, shape in shapes.items()}
    save_file(weights, file, {"format": "pt"})
    saved = json.loads((folder / "config.json").read_text())
    model = kind.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    return model.eval(), saved, shapes


def make_golden(given: dict[str, Any]) -> dict[str, Any]:
    """Run transformers' model of this configuration; the content of the golden's file."""
    # A copy: transformers adds to the objects that it is given.
    whole = json.loads(json.dumps(given))
    if given["model_type"] == "glm4v_text":  # it has a head within the whole only
        whole = {"model_type": "glm4v", "text_config": whole, "vision_config": GLM4V_EYES}
    config = transformers.AutoConfig.for_model(**whole)
    sees = "vision_config" in whole
    kind = transformers.AutoModelForImageTextToText if sees else transformers.AutoModelForCausalLM
    tokens = draw_tokens(NUM_TOKENS, given.get("text_config", given)["vocab_size"])
    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        model, saved, shapes = draw_model(kind, config, Path(name))
        logits = model(torch.tensor([tokens]), use_cache=False).logits[0, POSITIONS]
    if whole["model_type"] == "glm4v":
        saved = saved["text_config"]
    return {
        "transformers": transformers.__version__,
        "given": given,
        "saved": saved,
        "shapes": {key: shape for key, shape in shapes.items() if not SEEING.search(key)},
        "num_tokens": NUM_TOKENS,
        "positions": POSITIONS,
        "logits": [[float(f"{value:.7g}") for value in row] for row in logits.tolist()],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="store what transformers computes for tiny models")
    parser.add_argument("names", nargs="*", help=f"which; all when none are named: {list(CONFIGS)}")
    names = parser.parse_args().names or CONFIGS
    transformers.utils.logging.disable_progress_bar()
    for name in names:
        golden = make_golden(CONFIGS[name])
        # A line for each entry: a change of one shows as one line.
        lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in golden.items()]
        (FOLDER / f"{name}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
        print(name)


if __name__ == "__main__":
    main()
