"""The tensors of a model in a GGUF file: what they are called here and there, their shapes, the order of their rows.

Names: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, "Standardized tensor names". Knows no file.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from mlx_edge.models.config import ModelConfig

# The format's word -> the field of `Family` that has ours.
OUTER = {"token_embd": "embedding", "output_norm": "final_norm", "output": "head"}
LAYER = {
    "attn_norm": "attention_norm",
    "attn_q": "query",
    "attn_k": "key",
    "attn_v": "value",
    "attn_q_norm": "query_norm",
    "attn_k_norm": "key_norm",
    "attn_output": "output",
    "ffn_norm": "mlp_norm",
    "ffn_gate": "gate",
    "ffn_up": "up",
    "ffn_down": "down",
}
ROPE_FACTORS = "rope_freqs.weight"  # a table that `config.json` says in words


@dataclass(frozen=True)
class Place:
    """A tensor that a model has, and where it is in a GGUF file."""

    name: str  # in the file
    shape: tuple[int, ...]
    turned_heads: int = (
        0  # heads whose rows stand in pairs (0, D/2), (1, D/2 + 1), ...; 0: rows as here
    )


def find_places(config: ModelConfig, *, turns_rows: bool) -> dict[str, Place]:
    """The tensors of a model, by our names, in the order of their use.

    `turns_rows`: the architecture's files hold the rows of queries and keys in the order of interleaved RoPE.
    """
    family = config.family
    hidden = config.hidden_size
    table = (config.vocab_size, hidden)
    places = {f"{family.embedding}.weight": Place("token_embd.weight", table)}
    for index in range(config.num_layers):
        prefix = family.layer.format(index=index)
        for word, part, place in _layer_places(config, turns_rows):
            name = f"{prefix}{getattr(family, LAYER[word])}.{part}"
            places[name] = Place(f"blk.{index}.{place.name}", place.shape, place.turned_heads)
    places[f"{family.final_norm}.weight"] = Place("output_norm.weight", (hidden,))
    if not config.is_tied:
        places[f"{family.head}.weight"] = Place("output.weight", table)
    return places


def _layer_places(config: ModelConfig, turns_rows: bool) -> Iterator[tuple[str, str, Place]]:
    """The word, "weight" or "bias", and the place within its layer of each tensor."""
    heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads} if turns_rows else {}
    matrices, biases = _matrices(config), _biases(config)
    for word in LAYER:
        if word in matrices:
            shape = matrices[word]
            turned = heads.get(word, 0)
            yield word, "weight", Place(f"{word}.weight", shape, turned)
            if biases[word]:
                yield word, "bias", Place(f"{word}.bias", shape[:1], turned)
        elif word.startswith("attn_") and word != "attn_norm":
            if config.has_qk_norm:
                yield word, "weight", Place(f"{word}.weight", (config.head_dim,))
        else:
            yield word, "weight", Place(f"{word}.weight", (config.hidden_size,))


def _matrices(config: ModelConfig) -> Mapping[str, tuple[int, int]]:
    hidden, inner = config.hidden_size, config.intermediate_size
    query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return {
        "attn_q": (query, hidden),
        "attn_k": (key, hidden),
        "attn_v": (key, hidden),
        "attn_output": (hidden, query),
        "ffn_gate": (inner, hidden),
        "ffn_up": (inner, hidden),
        "ffn_down": (hidden, inner),
    }


def _biases(config: ModelConfig) -> Mapping[str, bool]:
    qkv = dict.fromkeys(("attn_q", "attn_k", "attn_v"), config.has_qkv_bias)
    mlp = dict.fromkeys(("ffn_gate", "ffn_up", "ffn_down"), config.has_mlp_bias)
    return {**qkv, "attn_output": config.has_output_bias, **mlp}
