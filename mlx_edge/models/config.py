"""A model's sizes and switches, read from `config.json` into one frozen record.

The only place that knows Hugging Face's spellings. A key that changes the mathematics and is not understood is
an error that names it; keys known to change nothing are listed in `NEUTRAL`. Knows nothing of tensors.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_edge.errors import ModelFormatError, UnsupportedModelError
from mlx_edge.models.families import FAMILIES, Family
from mlx_edge.models.fields import Fields
from mlx_edge.models.layers import LayerKind, read_layers
from mlx_edge.models.quantization import Quantization
from mlx_edge.models.rope import MAX_CONTEXT, RopeConfig, read_rope

MAX_LAYERS = 512
MAX_EXTENT = 1 << 24  # no model dimension, head count or vocabulary is near it


@dataclass(frozen=True)
class ModelConfig:
    """What a decoder needs to know beyond its weights."""

    model_type: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    context_size: int  # positions that the model was made for
    norm_eps: float
    rope: RopeConfig
    is_tied: bool | None  # the head is the token table; None: tied when the files hold no head
    layers: tuple[LayerKind, ...]
    has_qk_norm: bool
    has_qkv_bias: bool
    has_output_bias: bool  # on the attention's output projection
    has_mlp_bias: bool
    quantization: Quantization = field(default_factory=Quantization)

    @property
    def family(self) -> Family:
        """The names of this model's tensors."""
        return FAMILIES[self.model_type]

    @staticmethod
    def from_folder(folder: Path) -> "ModelConfig":
        """Read `folder/config.json`.

        Raises: ModelFormatError when it is missing or broken, UnsupportedModelError when it asks for
        mathematics that this runtime does not have.
        """
        path = folder / "config.json"
        return ModelConfig.from_hf(read_json_object(path), str(path))

    @staticmethod
    def from_hf(raw: Mapping[str, Any], name: str = "config.json") -> "ModelConfig":
        """Translate the content of a `config.json`; `name` says in messages where it stands."""
        fields = Fields(raw, name)
        model_type = fields.string("model_type")
        family = FAMILIES.get(model_type)
        if family is None:
            raise UnsupportedModelError(
                f"{fields.name}: model_type {model_type!r} is not one of those defined here "
                f"({', '.join(sorted(FAMILIES))}); other architectures run by mlx-lm's definitions: "
                "pip install 'mlx-edge[bridge]', then --bridge mlx-lm, in Python load(..., bridge='mlx-lm')"
            )
        num_heads = fields.integer("num_attention_heads", high=MAX_EXTENT)
        num_kv_heads = fields.integer("num_key_value_heads", num_heads, high=MAX_EXTENT)
        hidden_size = fields.integer("hidden_size", high=MAX_EXTENT)
        if num_heads % num_kv_heads:
            raise ModelFormatError(
                f"{fields.name}: num_attention_heads {num_heads} is not a multiple of "
                f"num_key_value_heads {num_kv_heads}"
            )
        has_bias = fields.boolean("attention_bias", False)
        num_layers = fields.integer("num_hidden_layers", high=MAX_LAYERS)
        context_size = fields.integer("max_position_embeddings", 2048, high=MAX_CONTEXT)
        config = ModelConfig(
            model_type=model_type,
            num_layers=num_layers,
            hidden_size=hidden_size,
            intermediate_size=fields.integer("intermediate_size", high=MAX_EXTENT),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=fields.integer("head_dim", max(1, hidden_size // num_heads), high=4096),
            vocab_size=fields.integer("vocab_size", high=MAX_EXTENT),
            context_size=context_size,
            norm_eps=fields.number("rms_norm_eps", low=0.0),
            rope=read_rope(fields, family.default_theta, context_size),
            is_tied=fields.boolean("tie_word_embeddings") if "tie_word_embeddings" in raw else None,
            layers=read_layers(fields, family, num_layers),
            has_qk_norm=family.has_qk_norm,
            has_qkv_bias=has_bias or family.has_qkv_bias,
            has_output_bias=has_bias and family.has_output_bias,
            has_mlp_bias=fields.boolean("mlp_bias", False),
            quantization=Quantization.read(fields),
        )
        if config.head_dim % 2:
            raise ModelFormatError(
                f"{fields.name}: head_dim {config.head_dim} is odd; RoPE turns pairs"
            )
        _refuse_unsupported(fields, family)
        return config


# Keys that describe training, files or generation defaults; none changes what a forward pass computes.
NEUTRAL = frozenset(
    """_attn_implementation _attn_implementation_autoset _name_or_path add_cross_attention architectures
    attention_dropout attn_implementation auto_map bad_words_ids begin_suppress_tokens bos_token_id
    chunk_size_feed_forward classifier_dropout cross_attention_hidden_size decoder_start_token_id
    diversity_penalty do_sample dtype early_stopping embd_pdrop encoder_no_repeat_ngram_size eos_token_id
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id hidden_dropout
    id2label initializer_range is_decoder is_encoder_decoder label2id length_penalty max_length
    min_length model_type name no_repeat_ngram_size num_beam_groups num_beams
    num_return_sequences output_attentions output_hidden_states output_scores pad_token_id prefix
    pretraining_tp problem_type pruned_heads remove_invalid_values repetition_penalty resid_pdrop
    return_dict return_dict_in_generate sep_token_id suppress_tokens task_specific_params temperature
    tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p torch_dtype torchscript
    transformers_version typical_p unsloth_fixed unsloth_version use_bfloat16 use_cache
    quantization_config transformers.js_config""".split()
)


def _refuse_unsupported(fields: Fields, family: Family) -> None:
    """Every key that is left must be neutral, or say what this family does anyway."""
    activation = fields.string("hidden_act", fields.string("hidden_activation", "silu"))
    fields.string("hidden_activation", "silu")
    if activation not in ("silu", "swish"):
        raise UnsupportedModelError(
            f"{fields.name}: hidden_act {activation!r} is not supported for {family.model_type}; known is silu"
        )
    fields.unread -= NEUTRAL
    fields.refuse_unread()


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a small text file.

    Raises: ModelFormatError when the file is missing, huge, not UTF-8, or not a JSON object.
    """
    try:
        size = path.stat().st_size
        if size > 1 << 25:
            raise ModelFormatError(f"{path}: {size} bytes; a configuration is at most 32 MiB")
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ModelFormatError(
            f"{path} is missing; a model folder holds config.json, *.safetensors and a tokenizer"
        ) from None
    except OSError as error:
        raise ModelFormatError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ModelFormatError(f"{path} is not valid JSON: {error}; download it again") from None
    if not isinstance(value, dict):
        raise ModelFormatError(f"{path}: found a JSON {type(value).__name__}, expected an object")
    return value
