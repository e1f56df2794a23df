"""The linear layers of a decoder by the names that they have in files: found, and replaced by others.

Knows which names a family gives them; nothing of what is in them. Parts of a matrix that is fused in files go by the
names that others have for them, experts by those of mlx-lm.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mlx_edge import ops
from mlx_edge.models.config import ModelConfig
from mlx_edge.models.decoder import Layer

ATTENTION = {"q": "query", "k": "key", "v": "value", "o": "output"}  # field -> the family's word
MLP = {"gate": "gate", "up": "up", "down": "down"}


def find_linears(layer: Layer, config: ModelConfig, index: int) -> dict[str, ops.Linear]:
    """The linears of layer `index`, by name (`model.layers.0.self_attn.q_proj`), in the order of their use."""
    names = _names(config, index)
    parts = {"attention": layer.attention, "mlp": layer.mlp}
    return {name: getattr(parts[part], field) for (part, field), name in names.items()}


def replace_linears(
    layer: Layer, config: ModelConfig, index: int, linears: Mapping[str, ops.Linear]
) -> Layer:
    """The layer with the named linears in place of its own; the others stay."""
    names = _names(config, index)

    def chosen(wanted: str) -> dict[str, Any]:
        return {
            field: linears[name]
            for (part, field), name in names.items()
            if part == wanted and name in linears
        }

    return replace(
        layer,
        attention=replace(layer.attention, **chosen("attention")),
        mlp=replace(layer.mlp, **chosen("mlp")),
    )


def stored_parts(config: ModelConfig, index: int) -> dict[str, tuple[str, ...]]:
    """The linears of layer `index`, by the family's name of what holds them: one, or several one below another."""
    family = config.family
    prefix = family.layer.format(index=index)
    fused = {
        family.fused_qkv: (family.query, family.key, family.value),
        family.fused_gate_up: (family.gate, family.up),
    }
    holder = {
        prefix + word: prefix + name for name, words in fused.items() if name for word in words
    }
    parts: dict[str, tuple[str, ...]] = {}
    for linear in _names(config, index).values():
        name = holder.get(linear, linear)
        parts[name] = (*parts.get(name, ()), linear)
    return parts


def _names(config: ModelConfig, index: int) -> dict[tuple[str, str], str]:
    family = config.family
    prefix = family.layer.format(index=index)
    names = {("attention", f): prefix + getattr(family, word) for f, word in ATTENTION.items()}
    experts = config.experts
    if family.experts is None or experts is None or not experts.layers[index]:
        return names | {("mlp", f): prefix + getattr(family, word) for f, word in MLP.items()}
    names["mlp", "router"] = prefix + family.experts.router
    stacked = prefix + family.experts.stacked
    return names | {("mlp", f): f"{stacked}{f}_proj" for f in MLP}
