"""A GGUF file of random float16 weights, for llama-quantize. Runs in the peers' environment, which has gguf.

python peer_gguf.py SHAPE-AS-JSON tokenizer.json OUT.gguf
"""

import json
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

LINEARS = {
    "attn_q": "q",
    "attn_k": "k",
    "attn_v": "v",
    "attn_output": "o",
    "ffn_gate": "in",
    "ffn_up": "in",
    "ffn_down": "out",
}


def random_matrix(rng: np.random.Generator, rows: int, columns: int) -> NDArray[np.float16]:
    """Normal values; a block of 512 rows again and again, as only the time to quantize would notice."""
    block = rng.standard_normal((512, columns), dtype=np.float32) / np.sqrt(columns)
    return np.ascontiguousarray(np.tile(block.astype(np.float16), (-(-rows // 512), 1))[:rows])


def add_facts(writer: Any, shape: dict[str, Any]) -> None:
    """The model's dimensions."""
    writer.add_name(shape["name"])
    writer.add_context_length(shape["context"])
    writer.add_embedding_length(shape["hidden_size"])
    writer.add_block_count(shape["num_layers"])
    writer.add_feed_forward_length(shape["intermediate_size"])
    writer.add_head_count(shape["num_heads"])
    writer.add_head_count_kv(shape["num_kv_heads"])
    writer.add_key_length(shape["head_dim"])
    writer.add_value_length(shape["head_dim"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(shape["rope_theta"])
    writer.add_rope_dimension_count(shape["head_dim"])
    writer.add_vocab_size(shape["vocab_size"])
    writer.add_file_type(1)


def add_tokenizer(writer: Any, shape: dict[str, Any], path: Path) -> None:
    """The same vocabulary and merges that the MLX folder has."""
    stored = json.loads(path.read_text())
    ids = {**stored["model"]["vocab"]}
    special = {token["id"]: token["content"] for token in stored["added_tokens"]}
    tokens = sorted(ids, key=ids.__getitem__) + [special[index] for index in sorted(special)]
    kinds = [gguf.TokenType.NORMAL] * len(ids) + [gguf.TokenType.CONTROL] * len(special)
    merges = stored["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2" if shape["model_type"] == "qwen3" else "llama-bpe")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    writer.add_bos_token_id(shape["vocab_size"] - 2)
    writer.add_eos_token_id(shape["vocab_size"] - 1)


def add_layer(writer: Any, shape: dict[str, Any], index: int, rng: np.random.Generator) -> None:
    """The matrices and norms of one layer."""
    hidden, head_dim = shape["hidden_size"], shape["head_dim"]
    q, kv = shape["num_heads"] * head_dim, shape["num_kv_heads"] * head_dim
    sizes = {
        "q": (q, hidden),
        "k": (kv, hidden),
        "v": (kv, hidden),
        "o": (hidden, q),
        "in": (shape["intermediate_size"], hidden),
        "out": (hidden, shape["intermediate_size"]),
    }
    for name, size in LINEARS.items():
        writer.add_tensor(f"blk.{index}.{name}.weight", random_matrix(rng, *sizes[size]))
    norms = {"attn_norm": hidden, "ffn_norm": hidden}
    if shape["model_type"] == "qwen3":
        norms |= {"attn_q_norm": head_dim, "attn_k_norm": head_dim}
    for name, length in norms.items():
        writer.add_tensor(f"blk.{index}.{name}.weight", np.ones(length, np.float32))


def main() -> None:
    """Write the file."""
    shape, path = json.loads(sys.argv[1]), sys.argv[3]
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, shape["model_type"])
    add_facts(writer, shape)
    add_tokenizer(writer, shape, Path(sys.argv[2]))
    embedding = random_matrix(rng, shape["vocab_size"], shape["hidden_size"])
    writer.add_tensor("token_embd.weight", embedding)
    writer.add_tensor("output_norm.weight", np.ones(shape["hidden_size"], np.float32))
    for index in range(shape["num_layers"]):
        add_layer(writer, shape, index, rng)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
