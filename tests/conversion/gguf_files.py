"""GGUF files of small models, written by the gguf package with its own table of names: what a converter would write."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np

TYPES = gguf.GGMLQuantizationType
Tokenizer = Callable[[gguf.GGUFWriter], None]


def to_numpy(array: mx.array) -> np.ndarray:
    """The same values; numpy has no bfloat16."""
    return np.array(array.astype(mx.float32) if array.dtype == mx.bfloat16 else array)


def permute(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """The rows of a head as llama.cpp's converter puts them: from halves to pairs."""
    halves = weight.reshape(num_heads, 2, -1, *weight.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weight.shape)


def llama3_factors(config: Mapping[str, Any]) -> np.ndarray:
    """How much longer Llama 3's rule makes each period, as llama.cpp's converter computes it."""
    rope, dims = config["rope_scaling"], config["head_dim"]
    waves = 2 * np.pi * config["rope_theta"] ** (np.arange(0, dims, 2, np.float32) / dims)
    turns = rope["original_max_position_embeddings"] / waves
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)


def add_facts(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    """A configuration in Hugging Face's spelling as metadata."""
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim", config["hidden_size"] // heads)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    rope = config.get("rope_scaling") or {}
    if rope.get("rope_type") in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
        if "original_max_position_embeddings" in rope:
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def write_model(
    path: Path,
    config: Mapping[str, Any],
    weights: Mapping[str, mx.array],
    *,
    kind: str = "F16",
    tokenizer: Tokenizer = lambda _writer: None,
    facts: Tokenizer = lambda _writer: None,
) -> Path:
    """The file; matrices in the type `kind`, all else in float32. `facts` adds metadata."""
    architecture = {"mistral": "llama"}.get(config["model_type"], config["model_type"])
    writer = gguf.GGUFWriter(path, architecture)
    add_facts(writer, config)
    facts(writer)
    tokenizer(writer)
    model = next(m for m, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(model, config["num_hidden_layers"])
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    if (config.get("rope_scaling") or {}).get("rope_type") == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_factors(config))
    for name, array in weights.items():
        values = to_numpy(array)
        word = name.split(".")[-2]
        if architecture == "llama" and word in heads:
            values = permute(values, heads[word])
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert target is not None, name
        stored = TYPES[kind] if values.ndim == 2 else TYPES.F32
        blocks = gguf.quants.quantize(values.astype(np.float32), stored)
        writer.add_tensor(target, blocks, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_sentencepiece(folder: Path) -> Tokenizer:
    """The vocabulary of a folder's tokenizer.model, its kinds as tokenizer.json has them."""
    import sentencepiece

    def add(writer: gguf.GGUFWriter) -> None:
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        added = {
            token["content"]: token["special"]
            for token in json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
        }
        count = pieces.vocab_size()
        config = json.loads((folder / "tokenizer_config.json").read_text())
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list([pieces.id_to_piece(index) for index in range(count)])
        writer.add_token_scores([pieces.get_score(index) for index in range(count)])
        writer.add_token_types([_type_of(pieces, index, added) for index in range(count)])
        for name, add_id in (
            ("bos", writer.add_bos_token_id),
            ("eos", writer.add_eos_token_id),
            ("unk", writer.add_unk_token_id),
            ("pad", writer.add_pad_token_id),
        ):
            add_id(pieces.piece_to_id(config[f"{name}_token"]))
        writer.add_add_bos_token(config["add_bos_token"])
        writer.add_add_eos_token(config["add_eos_token"])
        writer.add_add_space_prefix(config["add_prefix_space"])
        writer.add_chat_template(config["chat_template"])

    return add


def _type_of(pieces: Any, index: int, added: Mapping[str, bool]) -> int:
    piece = pieces.id_to_piece(index)
    if pieces.is_unknown(index):
        return gguf.TokenType.UNKNOWN
    if pieces.is_byte(index):
        return gguf.TokenType.BYTE
    if pieces.is_control(index) or added.get(piece):
        return gguf.TokenType.CONTROL
    return gguf.TokenType.USER_DEFINED if piece in added else gguf.TokenType.NORMAL


def add_byte_level(stored: Mapping[str, Any], pre: str, **ids: int) -> Tokenizer:
    """The vocabulary of a tokenizer.json with a byte-level BPE."""

    def add(writer: gguf.GGUFWriter) -> None:
        vocabulary = dict(stored["model"]["vocab"])
        kinds = dict.fromkeys(vocabulary, gguf.TokenType.NORMAL)
        for token in stored["added_tokens"]:
            vocabulary[token["content"]] = token["id"]
            is_special = token["special"]
            kinds[token["content"]] = (
                gguf.TokenType.CONTROL if is_special else gguf.TokenType.USER_DEFINED
            )
        tokens = sorted(vocabulary, key=vocabulary.__getitem__)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)
        writer.add_token_types([kinds[token] for token in tokens])
        writer.add_token_merges([" ".join(merge) for merge in stored["model"]["merges"]])
        for name, index in ids.items():
            getattr(writer, f"add_{name}_token_id")(index)

    return add
