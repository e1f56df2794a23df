"""Folders of tiny random models that see, and what transformers computed of them (scripts/vision_goldens_models.py)."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_edge.models.vision.config import VisionConfig
from mlx_edge.models.vision.processor import Patches
from mlx_edge.weights.writer import write_checkpoint
from tests.goldens.weights import draw_weight

FAMILIES = ("glm4v", "qwen2_5_vl")
CASES = ("one", "first", "three", "tall")
PROCESSORS = {"glm4v": "Glm4vImageProcessor", "qwen2_5_vl": "Qwen2VLImageProcessor"}
FILE = Path(__file__).parents[2] / "goldens" / "vision_models.json"


@cache
def read_golden(family: str) -> dict[str, Any]:
    golden: dict[str, Any] = json.loads(FILE.read_text())[family]
    return golden


def write_model(family: str, folder: Path, rename: dict[str, str] | None = None) -> Path:
    """The folder that a hub would hold, without a tokenizer; `rename` maps beginnings of tensors' names."""
    golden = read_golden(family)
    tensors = {}
    for name, shape in golden["shapes"].items():
        old = next((old for old in rename or {} if name.startswith(old)), "")
        stored = (rename or {}).get(old, "") + name.removeprefix(old)
        tensors[stored] = mx.array(draw_weight(name, shape))
    write_checkpoint(folder, tensors)
    (folder / "config.json").write_text(json.dumps(golden["saved"]))
    processor = {
        "image_processor_type": PROCESSORS[family],
        "patch_size": 4,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "size": {"shortest_edge": 64, "longest_edge": 8192},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def draw_patches(case: str, index: int, config: VisionConfig, grid: list[int]) -> Patches:
    """The patches that the golden was made with."""
    frames, rows, columns = grid
    values = draw_weight(f"{case}.{index}", [frames * rows * columns, config.patch_values])
    return Patches(values, (frames, rows, columns), config.merge_size, f"{case}.{index}".encode())


def draw_images(family: str, case: str, config: VisionConfig) -> list[Patches]:
    grids = read_golden(family)["cases"][case]["grids"]
    return [draw_patches(case, index, config, grid) for index, grid in enumerate(grids)]


def placed_once(family: str, case: str, token: int) -> list[int]:
    """The tokens of a case as a chat template writes them: one for each image."""
    golden = read_golden(family)["cases"][case]
    runs = iter([t * h * w // 4 for t, h, w in golden["grids"]])
    tokens, left = [], 0
    for value in golden["tokens"]:
        if value == token and left:
            left -= 1
        else:
            left = next(runs) - 1 if value == token else 0
            tokens.append(value)
    return tokens


def relative_difference(found: Any, wanted: Any) -> float:
    """The largest difference, of the largest value."""
    found, wanted = np.asarray(found), np.asarray(wanted)
    assert found.shape == wanted.shape
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


TEMPLATE = (
    "{% for m in messages %}<user>{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{% if p.type == 'image' %}<image><|image|></image>{% else %}{{ p.text }}{% endif %}"
    "{% endfor %}{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
SPECIAL = ("<pad>", "<bos>", "<eos>")
MARKS = ("<|image|>", "<|video|>", "<image>", "</image>", "<user>", "<assistant>")


def write_tokenizer(folder: Path, template: str | None = TEMPLATE) -> Path:
    """Add a tokenizer of single letters, with the tokens of images, and a chat template."""
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,!?"
    pieces = [*SPECIAL, *letters, "Ġ", *MARKS]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    assert vocab["<|image|>"] == 60
    added = [
        {"id": vocab[piece], "content": piece, "special": True, "single_word": False}
        | {"lstrip": False, "rstrip": False, "normalized": False}
        for piece in (*SPECIAL, *MARKS)
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    byte_level |= {"trim_offsets": True}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": sorted(added, key=lambda token: int(str(token["id"]))),
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = {"bos_token": "<bos>", "eos_token": "<eos>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def draw_picture(seed: int, height: int, width: int) -> np.ndarray:
    """An image (height, width, 3) of noise."""
    return np.random.RandomState(seed).randint(0, 256, (height, width, 3)).astype(np.uint8)
