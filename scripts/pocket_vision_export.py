"""Writes a trained `pocket-vision` as a folder in Hugging Face's format for `Glm4vForConditionalGeneration`.

float16 safetensors under Hugging Face's names, the configurations of model, pictures and generation, the
tokenizer and the chat template. It knows the model's sizes, not how it was trained.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pocket_vision_batches import CELL, MEAN, STD
from pocket_vision_model import EPS, FRAMES, MERGE, PATCH, PocketVisionConfig, PocketVisionModel
from pocket_vision_screens import HEIGHT, WIDTH
from pocket_vision_tokens import END, IMAGE, IMAGE_END, IMAGE_START, USER, save_tokenizer, token_id
from tokenizers import Tokenizer

CONTEXT = 1024
BICUBIC = 3


def model_config(config: PocketVisionConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return what config.json says."""
    text, vision = config.text, config.vision
    ids = {
        "image_token_id": IMAGE,
        "image_start_token_id": IMAGE_START,
        "image_end_token_id": IMAGE_END,
        "video_token_id": "<|video|>",
        "video_start_token_id": "<|begin_of_video|>",
        "video_end_token_id": "<|end_of_video|>",
    }
    return {
        "architectures": ["Glm4vForConditionalGeneration"],
        "model_type": "glm4v",
        "torch_dtype": "float16",
        "tie_word_embeddings": False,
        **{name: token_id(tokenizer, token) for name, token in ids.items()},
        "text_config": {
            "model_type": "glm4v_text",
            "vocab_size": text.vocab_size,
            "hidden_size": text.hidden_size,
            "intermediate_size": text.intermediate_size,
            "num_hidden_layers": text.num_hidden_layers,
            "num_attention_heads": text.num_attention_heads,
            "num_key_value_heads": text.num_key_value_heads,
            "hidden_act": "silu",
            "attention_bias": True,
            "rms_norm_eps": EPS,
            "max_position_embeddings": CONTEXT,
            "rope_theta": text.rope_theta,
            "partial_rotary_factor": text.partial_rotary_factor,
            "rope_scaling": {"rope_type": "default", "mrope_section": list(text.mrope_section)},
            "eos_token_id": stop_ids(tokenizer),
            "pad_token_id": token_id(tokenizer, END),
            "torch_dtype": "float16",
        },
        "vision_config": {
            "model_type": "glm4v_vision",
            "depth": vision.depth,
            "hidden_size": vision.hidden_size,
            "num_heads": vision.num_heads,
            "intermediate_size": vision.intermediate_size,
            "out_hidden_size": text.hidden_size,
            "hidden_act": "silu",
            "attention_bias": False,
            "rms_norm_eps": EPS,
            "image_size": vision.image_size,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": FRAMES,
            "in_channels": 3,
        },
    }


def stop_ids(tokenizer: Tokenizer) -> list[int]:
    """Return the tokens that end an answer."""
    return [token_id(tokenizer, token) for token in (END, USER, "<|observation|>")]


def processor_config() -> dict[str, Any]:
    """Return what preprocessor_config.json says: a screenshot becomes about as large as in training."""
    area = FRAMES * WIDTH * HEIGHT
    return {
        "image_processor_type": "Glm4vImageProcessor",
        "processor_class": "Glm4vProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "resample": BICUBIC,
        "size": {"shortest_edge": FRAMES * 4 * CELL * CELL, "longest_edge": area},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(MEAN),
        "image_std": list(STD),
        "patch_size": PATCH,
        "temporal_patch_size": FRAMES,
        "merge_size": MERGE,
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write an indented JSON file."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def export(model: PocketVisionModel, config: PocketVisionConfig, out: Path) -> None:
    """Write the folder."""
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    tokenizer = save_tokenizer(out)
    weights = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    write_json(out / "config.json", model_config(config, tokenizer))
    write_json(out / "preprocessor_config.json", processor_config())
    end = token_id(tokenizer, END)
    write_json(
        out / "generation_config.json", {"eos_token_id": stop_ids(tokenizer), "pad_token_id": end}
    )
    size = sum(path.stat().st_size for path in out.iterdir())
    print(f"{out}: {size} bytes written", flush=True)
