"""`config.json` in Hugging Face's spelling, from the metadata of a GGUF file.

Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, and what llama.cpp's converter writes. A key of the
architecture that is not understood is an error that names it. Knows no weights but the short table of RoPE factors.
"""

import struct
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import mlx.core as mx

from mlx_edge.conversion.gguf.names import ROPE_FACTORS
from mlx_edge.errors import ModelFormatError, UnsupportedModelError
from mlx_edge.models.config import MAX_EXTENT, MAX_LAYERS
from mlx_edge.models.fields import Fields
from mlx_edge.models.rope import MAX_CONTEXT, RopeConfig, make_rope
from mlx_edge.weights.gguf_header import GGUFTensor, Value

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",  # Mistral's models too
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
TURNED = ("llama",)  # rows of queries and keys stand as interleaved RoPE wants them

_MAX_HEAD_DIM = 4096
_FLOAT_NAMES = {"F32": "float32", "BF16": "bfloat16"}
_NEUTRAL = ("tensor_data_layout", "rope.scaling.finetuned")


def make_config(
    source: str,
    metadata: Mapping[str, Value],
    tensors: Mapping[str, GGUFTensor],
    rope_factors: mx.array | None,
) -> dict[str, Any]:
    """The content of `config.json`; `rope_factors` is the file's `rope_freqs.weight`, by which periods are longer.

    Raises: ModelFormatError for what is missing or contradicts, UnsupportedModelError for another architecture or a
    key that asks for other mathematics.
    """
    general = Fields(metadata, source)
    _refuse_parts(general)
    architecture = general.string("general.architecture")
    if architecture not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"{source}: general.architecture is {architecture[:40]!r}, expected one of "
            f"{', '.join(ARCHITECTURES)}; convert the model's own float weights instead"
        )
    prefix = f"{architecture}."
    own = {key.removeprefix(prefix): v for key, v in metadata.items() if key.startswith(prefix)}
    fields = Fields(own, f"{source}: {architecture}")
    config = _read_sizes(fields) | {
        "architectures": [ARCHITECTURES[architecture]],
        "model_type": architecture,
        "hidden_act": "silu",
        "vocab_size": _read_vocab_size(fields, tensors),
        "tie_word_embeddings": "output.weight" not in tensors,
        "torch_dtype": _find_dtype(tensors),
    }
    config |= _find_biases(architecture, tensors)
    config |= _read_rope(fields, config, rope_factors)
    _refuse_other_mathematics(fields, config)
    return config | _read_token_ids(general)


def _read_sizes(fields: Fields) -> dict[str, Any]:
    heads = fields.integer("attention.head_count", high=MAX_EXTENT)
    hidden = fields.integer("embedding_length", high=MAX_EXTENT)
    default_dim = max(1, hidden // heads)
    return {
        "hidden_size": hidden,
        "intermediate_size": fields.integer("feed_forward_length", high=MAX_EXTENT),
        "num_hidden_layers": fields.integer("block_count", high=MAX_LAYERS),
        "num_attention_heads": heads,
        "num_key_value_heads": fields.integer("attention.head_count_kv", heads, high=MAX_EXTENT),
        "head_dim": fields.integer("attention.key_length", default_dim, high=_MAX_HEAD_DIM),
        "max_position_embeddings": fields.integer("context_length", high=MAX_CONTEXT),
        "rms_norm_eps": _short(fields.number("attention.layer_norm_rms_epsilon", low=0.0)),
    }


def _read_vocab_size(fields: Fields, tensors: Mapping[str, GGUFTensor]) -> int:
    table = tensors.get("token_embd.weight")
    if table is None:
        raise ModelFormatError(
            f"{fields.name}: tensor token_embd.weight is missing; take a whole model's file, no vocabulary or adapter"
        )
    rows = table.shape[0]
    said = fields.integer("vocab_size", rows, high=MAX_EXTENT)
    if said != rows:
        raise ModelFormatError(
            f"{fields.name}: vocab_size is {said}, but token_embd.weight has {rows} rows; convert the model again"
        )
    return rows


def _find_dtype(tensors: Mapping[str, GGUFTensor]) -> str:
    """The type to store floats in: that of the token table, float16 where it is quantized."""
    return _FLOAT_NAMES.get(tensors["token_embd.weight"].type.name, "float16")


def _find_biases(architecture: str, tensors: Mapping[str, GGUFTensor]) -> dict[str, bool]:
    if architecture == "qwen2":  # always has them, and no switch
        return {}
    return {
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in tensors,
    }


def _read_rope(
    fields: Fields, config: Mapping[str, Any], factors: mx.array | None
) -> dict[str, Any]:
    theta = _short(fields.number("rope.freq_base", 10000.0, low=0.0))
    # Files without a type scale linearly; the first ones called the factor scale_linear.
    factor = fields.number(
        "rope.scaling.factor", fields.number("rope.scale_linear", 1.0, low=0.0), low=0.0
    )
    kind = fields.string("rope.scaling.type", "linear")
    original = fields.integer("rope.scaling.original_context_length", 0, low=0, high=MAX_CONTEXT)
    scaling: dict[str, Any] | None = None
    if kind == "yarn":
        context = original or config["max_position_embeddings"]
        scaling = {"rope_type": kind, "factor": _short(factor)}
        scaling |= {"original_max_position_embeddings": context} | _read_yarn(fields)
    elif kind == "linear" and factor != 1.0:
        scaling = {"rope_type": kind, "factor": _short(factor)}
    elif kind not in ("none", "linear"):
        raise UnsupportedModelError(
            f"{fields.name}: rope.scaling.type {kind[:40]!r} is not supported; known are none, linear, yarn"
        )
    if factors is not None:
        if scaling is not None:
            raise UnsupportedModelError(
                f"{fields.name}: rope.scaling and {ROPE_FACTORS} together are not supported; "
                "convert the model's own float weights instead"
            )
        scaling = _find_llama3(fields.name, theta, config["head_dim"], factors, original)
    return {"rope_theta": theta} | ({} if scaling is None else {"rope_scaling": scaling})


def _read_yarn(fields: Fields) -> dict[str, float]:
    names = {"beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow"}
    names["attention_factor"] = "yarn_attn_factor"
    return {
        ours: _short(fields.number(f"rope.scaling.{theirs}", low=0.0))
        for ours, theirs in names.items()
        if f"rope.scaling.{theirs}" in fields.raw
    }


def _find_llama3(
    source: str, theta: float, head_dim: int, factors: mx.array, original: int
) -> dict[str, Any]:
    """Llama 3's settings that make these factors; files hold the factors alone.

    All released models have low_freq_factor 1 and high_freq_factor 4; the original context is a power of two.
    """
    factors = factors.astype(mx.float32)
    is_sound = (
        2 * factors.size == head_dim and factors.ndim == 1 and mx.isfinite(factors).all().item()
    )
    largest = factors.max().item() if is_sound else 0.0
    assert isinstance(largest, float)
    if largest <= 0:
        raise ModelFormatError(
            f"{source}: {ROPE_FACTORS} {list(factors.shape)} is not a list of {head_dim // 2} factors; "
            "convert the model again"
        )
    contexts = [original] if original else [8192, *(1 << power for power in range(5, 21))]
    for context in contexts:
        rope = RopeConfig(theta, "llama3", factor=largest, original_context=context)
        plain = make_rope(RopeConfig(theta), head_dim).periods
        ratios = make_rope(rope, head_dim).periods / plain
        if mx.allclose(ratios, factors, rtol=2e-6, atol=0.0).item():
            return {
                "rope_type": "llama3",
                "factor": _short(largest),
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": context,
            }
    raise UnsupportedModelError(
        f"{source}: {ROPE_FACTORS} is not made by Llama 3's rule with low_freq_factor 1 and high_freq_factor 4; "
        "convert the model's own float weights instead"
    )


def _refuse_other_mathematics(fields: Fields, config: Mapping[str, Any]) -> None:
    """What must be as the model has it anyway; every key that is left changes what a model computes."""
    head_dim, context = config["head_dim"], config["max_position_embeddings"]
    window = fields.integer("attention.sliding_window", 0, low=0, high=MAX_CONTEXT)
    expected = {
        "rope.dimension_count": (head_dim, head_dim),
        "attention.value_length": (head_dim, head_dim),
        "expert_count": (0, 0),
        "expert_used_count": (0, 0),
        "rope.scaling.yarn_ext_factor": (1.0, 1.0),
        "rope.scaling.attn_factor": (1.0, 1.0),
        "rope.scaling.yarn_log_multiplier": (0.0, 0.0),
        "attention.causal": (True, True),
    }
    for key, (default, wanted) in expected.items():
        fields.unread.discard(key)
        found = fields.raw.get(key, default)
        if found != wanted:
            raise UnsupportedModelError(
                f"{fields.name}: {key} = {str(found)[:40]} is not supported, expected {wanted}; "
                "convert the model's own float weights instead"
            )
    if 0 < window < context:
        raise UnsupportedModelError(
            f"{fields.name}: attention.sliding_window = {window} is not supported below the context of {context}; "
            "convert the model's own float weights instead"
        )
    fields.unread -= set(_NEUTRAL)
    fields.refuse_unread()


def _refuse_parts(general: Fields) -> None:
    count = general.integer("split.count", 1, low=0, high=1 << 16)
    if count > 1:
        raise UnsupportedModelError(
            f"{general.name}: it is one of {count} parts, expected one file; join them with llama-gguf-split --merge"
        )


def _read_token_ids(general: Fields) -> dict[str, int]:
    keys = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    return {
        ours: general.integer(f"tokenizer.ggml.{theirs}_token_id", low=0, high=MAX_EXTENT)
        for ours, theirs in keys.items()
        if f"tokenizer.ggml.{theirs}_token_id" in general.raw
    }


def _short(value: float) -> float:
    """The decimal number that was meant: the shortest with this value in float32."""
    with suppress(OverflowError):  # no float32: it was stored as float64
        for digits in range(6, 10):
            short = float(f"{value:.{digits}g}")
            if struct.pack("<f", short) == struct.pack("<f", value):
                return short
    return value
