"""A folder of a tiny random GLM-4.1V whose vocabulary has every byte, so that it can write any action."""

import json
from pathlib import Path

import mlx.core as mx

from mlx_edge.weights.writer import write_checkpoint
from tests.goldens.weights import draw_weight
from tests.models.vision.folders import TEMPLATE, read_golden, write_model

SPECIAL = ("<pad>", "<bos>", "<eos>")
MARKS = ("<|image|>", "<|video|>", "<image>", "</image>", "<user>", "<assistant>")


def write_seeing_model(folder: Path) -> Path:
    """As a hub would hold it; greedy replies are noise, but always the same."""
    write_model("glm4v", folder)
    pieces = [*SPECIAL, *_byte_letters(), *MARKS]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= {"vocab_size": len(vocab), "max_position_embeddings": 4096}
    for name, mark in (("image", MARKS[0]), ("video", MARKS[1])):
        config[f"{name}_token_id"] = vocab[mark]
        config[f"{name}_start_token_id"] = vocab[MARKS[2]]
        config[f"{name}_end_token_id"] = vocab[MARKS[3]]
    (folder / "config.json").write_text(json.dumps(config))
    shapes = read_golden("glm4v")["shapes"]
    for name in ("lm_head.weight", "model.language_model.embed_tokens.weight"):
        shapes = {**shapes, name: [len(vocab), shapes[name][1]]}
    tensors = {name: mx.array(draw_weight(name, shape)) for name, shape in shapes.items()}
    write_checkpoint(folder, tensors)
    _write_tokenizer(folder, vocab)
    return folder


def _byte_letters() -> list[str]:
    """The letter of each byte in a byte-level vocabulary, as GPT-2 has it."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    letters = dict(zip(shown, map(chr, shown), strict=True))
    letters |= {byte: chr(256 + rank) for rank, byte in enumerate(hidden)}
    return [letters[byte] for byte in range(256)]


def _write_tokenizer(folder: Path, vocab: dict[str, int]) -> None:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    byte_level |= {"trim_offsets": True}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [
            {"id": vocab[piece], "content": piece, "special": True, **flags}
            for piece in sorted((*SPECIAL, *MARKS), key=vocab.__getitem__)
        ],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = {"bos_token": "<bos>", "eos_token": "<eos>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
