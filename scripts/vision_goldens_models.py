"""Section `models` of make_vision_goldens.py: what transformers computes for tiny random models that see.

A model's golden holds its configuration and the shapes of its tensors as transformers writes them, and for each case
the grids of its images, where RoPE turns its tokens, the tower's features, the logits of some positions and the greedy
tokens that follow. Weights, patches and tokens are drawn from names and lengths by tests/goldens/weights.py.
"""

import json
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from make_goldens import draw_model

from tests.goldens.weights import draw_tokens, draw_weight

# Not a plain import: the type check finds some of it untyped where it is installed, nothing where it is not.
transformers: Any = import_module("transformers")
IMAGE_TOKEN = 60
NUM_GREEDY = 12

TEXT: dict[str, Any] = {
    "num_hidden_layers": 2,
    "intermediate_size": 80,
    "rms_norm_eps": 0.01,  # large, so that a wrong one shows
    "vocab_size": 71,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
TOKENS: dict[str, Any] = {
    "image_token_id": IMAGE_TOKEN,
    "video_token_id": 61,
    "tie_word_embeddings": False,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "glm4v": {
        "model_type": "glm4v",
        **TOKENS,
        "image_start_token_id": 62,
        "image_end_token_id": 63,
        "video_start_token_id": 64,
        "video_end_token_id": 65,
        "text_config": {
            **TEXT,
            "hidden_size": 96,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
                "mrope_section": [2, 3, 3],
            },
        },
        "vision_config": {
            "depth": 2,
            "hidden_size": 48,
            "num_heads": 3,
            "image_size": 20,
            "patch_size": 4,
            "rms_norm_eps": 0.01,
            "out_hidden_size": 96,
            "intermediate_size": 56,
        },
    },
    "qwen2_5_vl": {
        "model_type": "qwen2_5_vl",
        **TOKENS,
        "vision_start_token_id": 62,
        "vision_end_token_id": 63,
        "text_config": {
            **TEXT,
            "hidden_size": 64,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1000000.0,
                "mrope_section": [4, 6, 6],
            },
        },
        "vision_config": {
            "depth": 3,
            "hidden_size": 32,
            "num_heads": 2,
            "intermediate_size": 40,
            "patch_size": 4,
            "window_size": 16,
            "fullatt_block_indexes": [1],
            "out_hidden_size": 64,
        },
    },
}
# Tokens of text before each image, and after the last; and the images' patches, (frames, rows, columns).
CASES: dict[str, tuple[list[int], list[list[int]]]] = {
    "one": ([5, 9], [[1, 6, 4]]),
    "first": ([0, 3], [[1, 2, 2]]),  # nothing before it, a single token
    "three": ([3, 2, 1, 20], [[1, 4, 10], [1, 2, 14], [1, 10, 6]]),  # odd ratios
    "tall": ([1, 1], [[1, 30, 2]]),
}


def draw_case(name: str) -> tuple[list[int], list[list[int]]]:
    """The tokens of a case, an image's run in each place, and the grids."""
    texts, grids = CASES[name]
    tokens: list[int] = []
    for index, length in enumerate(texts):
        tokens += [1 + token for token in draw_tokens(length, IMAGE_TOKEN - 1)]
        if index < len(grids):
            _, rows, columns = grids[index]
            tokens += [IMAGE_TOKEN] * (rows * columns // 4)
    return tokens, grids


def run_case(model: Any, name: str) -> dict[str, Any]:
    """What the model computes of one case."""
    tokens, grids = draw_case(name)
    vision = model.config.vision_config
    size = 3 * vision.temporal_patch_size * vision.patch_size**2
    patches = [draw_weight(f"{name}.{i}", [h * w, size]) for i, (_, h, w) in enumerate(grids)]
    ids = torch.tensor([tokens])
    inputs = {
        "pixel_values": torch.cat([torch.from_numpy(patch) for patch in patches]),
        "image_grid_thw": torch.tensor(grids),
        "mm_token_type_ids": (ids == IMAGE_TOKEN).int(),
    }
    features = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
    turns, delta = model.model.get_rope_index(
        ids, inputs["mm_token_type_ids"], image_grid_thw=inputs["image_grid_thw"]
    )
    logits = model(ids, use_cache=False, **inputs).logits[0]
    positions = sorted({0, len(tokens) // 3, len(tokens) // 2, len(tokens) - 2, len(tokens) - 1})
    written = model.generate(
        ids, max_new_tokens=NUM_GREEDY, min_new_tokens=NUM_GREEDY, do_sample=False, **inputs
    )
    return {
        "tokens": tokens,
        "grids": grids,
        "turns": turns[:, 0].tolist(),
        "shift": int(delta[0, 0]),
        "features": [_rounded(image) for image in features.pooler_output],
        "positions": positions,
        "logits": _rounded(logits[positions]),
        "greedy": written[0, len(tokens) :].tolist(),
    }


def _rounded(values: torch.Tensor) -> list[list[float]]:
    return [[float(f"{value:.7g}") for value in row] for row in values.tolist()]


def make_golden(given: dict[str, Any]) -> dict[str, Any]:
    """What transformers' model of this configuration computes."""
    # A copy: transformers adds to the objects that it is given.
    config = transformers.AutoConfig.for_model(**json.loads(json.dumps(given)))
    kind = transformers.AutoModelForImageTextToText
    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        model, saved, shapes = draw_model(kind, config, Path(name))
        cases = {case: run_case(model, case) for case in CASES}
    return {"saved": saved, "shapes": shapes, "cases": cases}


def make() -> dict[str, Any]:
    """One golden for each kind of model."""
    transformers.utils.logging.disable_progress_bar()
    goldens = {name: make_golden(given) for name, given in CONFIGS.items()}
    return {"transformers": transformers.__version__, **goldens}
