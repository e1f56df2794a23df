"""Mixtures of experts: their settings in `config.json`, and their tensors in the forms in which they are saved.

transformers saves each expert by itself, or gate and up of all of them fused; mlx-lm stacks them. All become one matrix
for each of gate, up and down, with the rows of one expert after those of another. Knows nothing of routing.
"""

from dataclasses import dataclass

import mlx.core as mx

from mlx_edge import ops
from mlx_edge.errors import ModelFormatError, UnsupportedModelError
from mlx_edge.models.families import Experts, Family
from mlx_edge.models.fields import Fields
from mlx_edge.models.tensors import Tensors

MAX_EXPERTS = 1 << 12


@dataclass(frozen=True)
class ExpertsConfig:
    """How many experts there are, and which layers have them."""

    num_experts: int
    top_k: int
    inner_size: int  # of one expert
    is_normalized: bool  # the weights of those chosen add up to 1
    layers: tuple[bool, ...]  # the others have one plain feed-forward


def read_experts(fields: Fields, family: Family, num_layers: int) -> ExpertsConfig | None:
    """The settings of a family that has experts.

    Raises: ModelFormatError where numbers do not fit, UnsupportedModelError for constants that are not those known.
    """
    names = family.experts
    if names is None:
        return None
    # One family's files have two spellings of it.
    key = "num_experts" if "num_experts" in fields.raw else names.num_key
    num_experts = fields.integer(key, high=MAX_EXPERTS)
    top_k = fields.integer("num_experts_per_tok", high=MAX_EXPERTS)
    if top_k > num_experts:
        raise ModelFormatError(
            f"{fields.name}: num_experts_per_tok is {top_k}, but {key} is {num_experts}"
        )
    if family.activation == "swiglu_oai":
        _check_clamp(fields)
    has_choice = names.size_key == "moe_intermediate_size"
    return ExpertsConfig(
        num_experts=num_experts,
        top_k=top_k,
        inner_size=fields.integer(names.size_key, high=1 << 24),
        is_normalized=fields.boolean("norm_topk_prob", False) if has_choice else True,
        layers=_read_layers(fields, num_layers) if has_choice else (True,) * num_layers,
    )


def _check_clamp(fields: Fields) -> None:
    for key, known in (("swiglu_limit", 7.0), ("swiglu_alpha", 1.702)):
        if fields.number(key, low=0.0) != known:
            raise UnsupportedModelError(
                f"{fields.name}: {key} is {fields.raw[key]}, only {known} is supported"
            )


def _read_layers(fields: Fields, num_layers: int) -> tuple[bool, ...]:
    every = fields.integer("decoder_sparse_step", 1, high=1 << 20)
    plain = set(fields.integers("mlp_only_layers", high=1 << 20))
    return tuple(i not in plain and (i + 1) % every == 0 for i in range(num_layers))


def read_matrices(
    tensors: Tensors, prefix: str, names: Experts, config: ExpertsConfig, hidden_size: int
) -> dict[str, ops.Linear]:
    """The matrices of all experts of one layer by field: gate and up (X * F, E), down (X * E, F).

    Raises: ModelFormatError for a tensor that is missing or of another shape.
    """
    inner, count = config.inner_size, config.num_experts
    shapes = {
        "gate": (inner, hidden_size),
        "up": (inner, hidden_size),
        "down": (hidden_size, inner),
    }
    if tensors.has(f"{prefix}{names.fused}gate_up_proj"):
        return _read_fused(tensors, prefix + names.fused, names, config, hidden_size)
    if tensors.has(f"{prefix}{names.stacked}gate_proj.weight"):
        return {
            part: tensors.stacked(
                f"{prefix}{names.stacked}{part}_proj", count, *shape, has_bias=names.has_bias
            )
            for part, shape in shapes.items()
        }
    words = {"gate": names.gate, "up": names.up, "down": names.down}
    return {
        part: tensors.joined(
            [prefix + names.one.format(index=i) + words[part] for i in range(count)], *shape
        )
        for part, shape in shapes.items()
    }


def _read_fused(
    tensors: Tensors, prefix: str, names: Experts, config: ExpertsConfig, hidden_size: int
) -> dict[str, ops.Linear]:
    """From gate_up_proj (X, 2 F, E) and down_proj (X, E, F), or both of them transposed."""
    inner, count = config.inner_size, config.num_experts
    gate_up = tensors.fused(
        f"{prefix}gate_up_proj", count, 2 * inner, hidden_size, names.is_transposed
    )
    down = tensors.fused(f"{prefix}down_proj", count, hidden_size, inner, names.is_transposed)
    parts = {
        "gate": gate_or_up(gate_up, 0, names),
        "up": gate_or_up(gate_up, 1, names),
        "down": down,
    }
    biases = dict.fromkeys(parts)
    if names.has_bias:
        both = tensors.array(f"{prefix}gate_up_proj_bias", (count, 2 * inner))
        biases["gate"], biases["up"] = gate_or_up(both, 0, names), gate_or_up(both, 1, names)
        biases["down"] = tensors.array(f"{prefix}down_proj_bias", (count, hidden_size))
    return {part: tensors.place(stack, biases[part]) for part, stack in parts.items()}


def gate_or_up(gate_up: mx.array, index: int, names: Experts) -> mx.array:
    """Gate (0) or up (1) of both of them fused (X, 2 F, ...)."""
    return gate_up[:, index::2] if names.is_transposed else mx.split(gate_up, 2, axis=1)[index]
