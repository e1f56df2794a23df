"""Rotary embedding: its settings in `config.json`, and the periods that the ops take. Knows formulas, not ops."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlx_edge.errors import ModelFormatError, UnsupportedModelError
from mlx_edge.models.fields import Fields
from mlx_edge.ops import Rope

Periods = Sequence[float]
MAX_CONTEXT = 1 << 30


@dataclass(frozen=True)
class RopeConfig:
    """Base and stretching of the periods; each kind reads the settings that it has."""

    theta: float
    kind: str = "default"
    factor: float = 1.0
    original_context: int = 8192  # positions that the periods were first trained for
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0
    is_truncated: bool = True  # yarn's correction range is rounded outward to whole pairs
    magnitude: float = 1.0  # yarn's scale of queries and keys


def read_rope(fields: Fields, default_theta: float, context_size: int) -> RopeConfig:
    """RoPE from `rope_theta` and `rope_scaling`, or from transformers 5's `rope_parameters`.

    Raises: ModelFormatError for broken values, UnsupportedModelError for a kind or a key that is not known.
    """
    new, old = fields.nested("rope_parameters"), fields.nested("rope_scaling")
    nested = new or old
    if new is not None and old is not None and dict(new.raw) != dict(old.raw):
        raise ModelFormatError(
            f"{fields.name}: rope_parameters and rope_scaling contradict each other"
        )
    theta = fields.number("rope_theta", default_theta, low=0.0)
    if nested is None:
        return RopeConfig(theta)
    theta = nested.number("rope_theta", theta, low=0.0)
    kind = nested.string("rope_type", nested.string("type", "default"))
    nested.string("type", "default")
    read = _READERS.get(kind)
    if read is None:
        raise UnsupportedModelError(
            f"{nested.name}: rope type {kind!r} is not supported; known are {', '.join(_READERS)}"
        )
    config = read(nested, theta, context_size)
    nested.refuse_unread()
    return config


def _read_default(_fields: Fields, theta: float, _context_size: int) -> RopeConfig:
    return RopeConfig(theta)


def _read_linear(fields: Fields, theta: float, _context_size: int) -> RopeConfig:
    return RopeConfig(theta, "linear", factor=fields.number("factor", low=0.0))


def _read_dynamic(fields: Fields, theta: float, _context_size: int) -> RopeConfig:
    # It stretches only beyond max_position_embeddings, where this runtime ends a sequence.
    fields.number("factor", low=0.0)
    return RopeConfig(theta)


def _read_llama3(fields: Fields, theta: float, _context_size: int) -> RopeConfig:
    config = RopeConfig(
        theta,
        "llama3",
        factor=fields.number("factor", low=0.0),
        low_freq_factor=fields.number("low_freq_factor", 1.0, low=0.0),
        high_freq_factor=fields.number("high_freq_factor", 4.0, low=0.0),
        original_context=fields.integer("original_max_position_embeddings", 8192, high=MAX_CONTEXT),
    )
    if config.high_freq_factor <= config.low_freq_factor:
        raise ModelFormatError(
            f"{fields.name}: high_freq_factor {config.high_freq_factor} must be above "
            f"low_freq_factor {config.low_freq_factor}"
        )
    return config


def _read_yarn(fields: Fields, theta: float, context_size: int) -> RopeConfig:
    original = fields.integer("original_max_position_embeddings", context_size, high=MAX_CONTEXT)
    factor = fields.number("factor", max(1.0, context_size / original), low=0.0)
    mscale = fields.number("mscale", 0.0, low=-1.0)
    mscale_all_dim = fields.number("mscale_all_dim", 0.0, low=-1.0)
    if mscale > 0 and mscale_all_dim > 0:
        default = _yarn_magnitude(factor, mscale) / _yarn_magnitude(factor, mscale_all_dim)
    else:
        default = _yarn_magnitude(factor, 1.0)
    config = RopeConfig(
        theta,
        "yarn",
        factor=factor,
        original_context=original,
        beta_fast=fields.number("beta_fast", 32.0, low=0.0),
        beta_slow=fields.number("beta_slow", 1.0, low=0.0),
        is_truncated=fields.boolean("truncate", True),
        magnitude=fields.number("attention_factor", default, low=0.0),
    )
    if theta <= 1:
        raise ModelFormatError(f"{fields.name}: rope_theta is {theta:g}, yarn needs more than 1")
    return config


def _yarn_magnitude(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


_READERS: Mapping[str, Callable[[Fields, float, int], RopeConfig]] = {
    "default": _read_default,
    "linear": _read_linear,
    "dynamic": _read_dynamic,
    "llama3": _read_llama3,
    "yarn": _read_yarn,
}


def make_rope(config: RopeConfig, head_dim: int) -> Rope:
    """The record that the ops take, periods (head_dim / 2,) float32."""
    periods = [config.theta ** (index / head_dim) for index in range(0, head_dim, 2)]
    if config.kind == "linear":
        periods = [period * config.factor for period in periods]
    elif config.kind == "llama3":
        periods = _stretch_llama3(periods, config)
    elif config.kind == "yarn":
        periods = _stretch_yarn(periods, config)
    return Rope(mx.array(periods, mx.float32), head_dim, magnitude=config.magnitude)


def _stretch_llama3(periods: Periods, config: RopeConfig) -> list[float]:
    """Llama 3.1's rule: short waves stay, long ones are `factor` times longer, those between are blended."""
    turns = [config.original_context / (2 * math.pi * period) for period in periods]
    low, high = config.low_freq_factor, config.high_freq_factor
    keep = [_clip((turn - low) / (high - low)) for turn in turns]  # turns in the original context
    return _blend(periods, config.factor, keep)


def _stretch_yarn(periods: Periods, config: RopeConfig) -> list[float]:
    """YaRN (Peng et al. 2023): pairs that turn more than beta_fast times stay, below beta_slow they are stretched."""
    dims = 2 * len(periods)

    def pair_with(turns: float) -> float:
        ratio = config.original_context / (turns * 2 * math.pi)
        return dims * math.log(ratio) / (2 * math.log(config.theta))

    low, high = pair_with(config.beta_fast), pair_with(config.beta_slow)
    if config.is_truncated:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    width = high - low if high != low else 0.001
    keep = [1.0 - _clip((pair - low) / width) for pair in range(len(periods))]
    return _blend(periods, config.factor, keep)


def _blend(periods: Periods, factor: float, keep: Sequence[float]) -> list[float]:
    """Frequencies between the original (keep 1) and those `factor` times lower (keep 0)."""
    return [
        1.0 / ((1.0 - kept) / (factor * period) + kept / period)
        for kept, period in zip(keep, periods, strict=True)
    ]


def _clip(share: float) -> float:
    return min(max(share, 0.0), 1.0)
