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
from mlx_edge.models.moe import ExpertsConfig, read_experts
from mlx_edge.models.quantization import Quantization
from mlx_edge.models.rope import MAX_CONTEXT, RopeConfig, read_ropes
from mlx_edge.models.scales import Scales, read_scales
from mlx_edge.models.vision.config import VisionConfig, read_vision
from mlx_edge.ops import Activation

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
    activation: Activation
    scales: Scales
    window_rope: RopeConfig | None = None  # of layers with a window, where they have their own
    experts: ExpertsConfig | None = None
    vision: VisionConfig | None = None  # of a model that reads images
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
        vision = read_vision(fields, NEUTRAL)
        fields = _find_text(fields, family)
        is_tied = fields.raw.get("tie_word_embeddings")
        hidden_size = fields.integer("hidden_size", high=MAX_EXTENT)
        num_heads, num_kv_heads, head_dim = _read_heads(fields, hidden_size)
        has_bias = fields.boolean("attention_bias", False)
        num_layers = fields.integer("num_hidden_layers", high=MAX_LAYERS)
        context_size = fields.integer("max_position_embeddings", 2048, high=MAX_CONTEXT)
        rope, window_rope = read_ropes(fields, family, head_dim, context_size)
        experts = read_experts(fields, family, num_layers)
        all_have_experts = experts is not None and all(experts.layers)
        inner_default = experts.inner_size if experts is not None and all_have_experts else None
        config = ModelConfig(
            model_type=model_type,
            num_layers=num_layers,
            hidden_size=hidden_size,
            intermediate_size=fields.integer("intermediate_size", inner_default, high=MAX_EXTENT),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            vocab_size=fields.integer("vocab_size", high=MAX_EXTENT),
            context_size=context_size,
            norm_eps=fields.number("rms_norm_eps", low=0.0),
            rope=rope,
            is_tied=None if is_tied is None else fields.boolean("tie_word_embeddings"),
            layers=read_layers(fields, family, num_layers),
            has_qk_norm=family.has_qk_norm,
            has_qkv_bias=has_bias or family.has_qkv_bias,
            has_output_bias=has_bias and family.has_output_bias,
            has_mlp_bias=fields.boolean("mlp_bias", False),
            activation=_read_activation(fields, family),
            scales=read_scales(fields, family, head_dim, hidden_size),
            window_rope=window_rope,
            experts=experts,
            vision=vision,
            quantization=Quantization.read(fields),
        )
        fields.unread -= NEUTRAL | set(family.ignored_keys)
        fields.refuse_unread()
        return config


def _find_text(fields: Fields, family: Family) -> Fields:
    """What says how text is processed: all of the file, and the nested `text_config` of a model that also sees."""
    outer = {**family.defaults, **fields.raw}
    if not family.has_text_config:
        return Fields(outer, fields.name)
    inner = fields.nested("text_config")
    given = {} if inner is None else {k: v for k, v in inner.raw.items() if k != "model_type"}
    # Old files say inside that the head is tied, new ones outside; either may repeat its own default.
    ties = [raw.get("tie_word_embeddings") for raw in (given, outer)]
    text = Fields({**outer, **given, "tie_word_embeddings": _find_tie(ties)}, fields.name)
    text.unread -= {"text_config", *VISION_KEYS}
    return text


def _find_tie(ties: list[Any]) -> Any:
    """What both say, or the one that speaks; None where they contradict each other: then the files tell."""
    said = [tie for tie in ties if tie is not None]
    contradict = any(tie is True for tie in said) and any(tie is False for tie in said)
    return None if contradict or not said else said[0]


def _read_heads(fields: Fields, hidden_size: int) -> tuple[int, int, int]:
    """Query heads, key heads and the size of one."""
    num_heads = fields.integer("num_attention_heads", high=MAX_EXTENT)
    num_kv_heads = fields.integer("num_key_value_heads", num_heads, high=MAX_EXTENT)
    if num_heads % num_kv_heads:
        raise ModelFormatError(
            f"{fields.name}: num_attention_heads {num_heads} is not a multiple of "
            f"num_key_value_heads {num_kv_heads}"
        )
    head_dim = fields.integer("head_dim", max(1, hidden_size // num_heads), high=4096)
    if head_dim % 2:
        raise ModelFormatError(f"{fields.name}: head_dim {head_dim} is odd; RoPE turns pairs")
    return num_heads, num_kv_heads, head_dim


_ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
}


def _read_activation(fields: Fields, family: Family) -> Activation:
    name = fields.string("hidden_activation", fields.string("hidden_act", "silu"))
    fields.string("hidden_act", "silu")
    if name not in _ACTIVATIONS:
        raise UnsupportedModelError(
            f"{fields.name}: hidden_act {name!r} is not supported for {family.model_type}; "
            f"known are {', '.join(_ACTIVATIONS)}"
        )
    return family.activation or _ACTIVATIONS[name]


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
    quantization_config transformers.js_config cache_implementation output_router_logits
    router_aux_loss_coef router_jitter_noise""".split()
)

# Of the files of models that also see; what a text needs of them is read by the vision part.
VISION_KEYS = frozenset(
    """vision_config image_token_id image_token_index video_token_id video_token_index image_start_token_id
    image_end_token_id video_start_token_id video_end_token_id vision_start_token_id vision_end_token_id
    vision_token_id boi_token_index eoi_token_index mm_tokens_per_image""".split()
)


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
