"""Stores what transformers computes for tiny random models: tests/goldens/NAME.json, read by tests/models.

A tool of developers: needs torch and transformers, which the tests do without. Run it from the repository's root with
an environment that has both: PYTHONPATH=. python scripts/make_goldens.py

A golden holds the configuration twice, as a hub's folder spells it (`given`) and as transformers writes it (`saved`),
the shapes of the tensors, and the logits of some positions in float32, rounded to seven digits. Weights and tokens are
drawn from names and lengths by tests/goldens/weights.py.
"""

import argparse
import json
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from tests.goldens.weights import draw_tokens, draw_weight

# Not a plain import: the type check finds some of it untyped where it is installed, nothing where it is not.
transformers: Any = import_module("transformers")
FOLDER = Path(__file__).parents[1] / "tests" / "goldens"
NUM_TOKENS = 90  # nearly three tails of the cache
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
}


def make_golden(given: dict[str, Any]) -> dict[str, Any]:
    """Run transformers' model of this configuration; the content of the golden's file."""
    # A copy: transformers adds to the objects that it is given.
    config = transformers.AutoConfig.for_model(**json.loads(json.dumps(given)))
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", dtype=torch.float32
    ).eval()
    shapes = {}
    with torch.no_grad():
        for name, weight in model.named_parameters():  # a tied head is not named twice
            shapes[name] = list(weight.shape)
            weight.copy_(torch.from_numpy(draw_weight(name, shapes[name])))
        tokens = draw_tokens(NUM_TOKENS, given["vocab_size"])
        logits = model(torch.tensor([tokens]), use_cache=False).logits[0, POSITIONS]
    return {
        "transformers": transformers.__version__,
        "given": given,
        "saved": read_saved_config(model),
        "shapes": shapes,
        "num_tokens": NUM_TOKENS,
        "positions": POSITIONS,
        "logits": [[float(f"{value:.7g}") for value in row] for row in logits.tolist()],
    }


def read_saved_config(model: Any) -> dict[str, Any]:
    """The configuration that `save_pretrained` writes beside this model's weights."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        saved: dict[str, Any] = json.loads((Path(folder) / "config.json").read_text())
    return saved


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
