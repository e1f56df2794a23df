"""Rotary embedding: its settings in `config.json`, and the periods that the ops take. Knows formulas, not ops."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from mlx_edge.errors import ModelFormatError, UnsupportedModelError
from mlx_edge.models.families import Family
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
    magnitude: float = 1.0  # of queries and keys: yarn, longrope
    stretches: tuple[float, ...] = ()  # longrope: of each period
    share: float = 1.0  # of a head that is turned, from its beginning
    is_interleaved: bool = False
    sections: tuple[int, ...] = ()  # pairs that turn by time, by height and by width


def read_ropes(
    fields: Fields, family: Family, head_dim: int, context_size: int
) -> tuple[RopeConfig, RopeConfig | None]:
    """RoPE from `rope_theta` and `rope_scaling`, or from transformers 5's `rope_parameters`; and that of the layers
    with a window, where they have their own.

    Raises: ModelFormatError for broken values, UnsupportedModelError for a kind or a key that is not known.
    """
    new, old = fields.nested("rope_parameters"), fields.nested("rope_scaling")
    nested = new or old
    if new is not None and old is not None and dict(new.raw) != dict(old.raw):
        raise ModelFormatError(
            f"{fields.name}: rope_parameters and rope_scaling contradict each other"
        )
    theta = fields.number("rope_theta", 10000.0, low=0.0)
    beside = _read_beside(fields, family)

    def read(part: Fields | None, theta: float) -> RopeConfig:
        raw = {} if part is None else part.raw
        name = fields.name if part is None else part.name
        config = _read_one(Fields({**beside, **raw}, name), family, theta, context_size, head_dim)
        return replace(config, is_interleaved=family.has_interleaved_rope)

    if not family.has_window_rope:
        return read(nested, theta), None
    window_theta = fields.number("rope_local_base_freq", 10000.0, low=0.0)
    if nested is None or not {"full_attention", "sliding_attention"} & set(nested.raw):
        return read(nested, theta), read(None, window_theta)
    ropes = (
        read(nested.nested("full_attention"), theta),
        read(nested.nested("sliding_attention"), window_theta),
    )
    nested.refuse_unread()
    return ropes


_BESIDE = ("partial_rotary_factor", "original_max_position_embeddings", "mrope_section")


def _read_beside(fields: Fields, family: Family) -> dict[str, Any]:
    """What may stand beside the nested object as well as in it."""
    keys = [key for key in _BESIDE if key in family.numbers]
    fields.unread -= set(keys)
    return {key: fields.raw[key] for key in keys if fields.raw.get(key) is not None}


def _read_one(
    fields: Fields, family: Family, theta: float, context_size: int, head_dim: int
) -> RopeConfig:
    theta = fields.number("rope_theta", theta, low=0.0)
    kind = fields.string("rope_type", fields.string("type", "default"))
    fields.string("type", "default")
    if "long_factor" in fields.raw and kind in ("su", "yarn"):  # as old Phi-3 files call it
        kind = "longrope"
    read = _READERS.get(kind)
    if read is None or (kind == "mrope" and "mrope_section" not in family.numbers):
        known = ", ".join(kind for kind in _READERS if kind != "mrope")
        raise UnsupportedModelError(
            f"{fields.name}: rope type {kind!r} is not supported; known are {known}"
        )
    config = read(fields, theta, context_size)
    if "partial_rotary_factor" in family.numbers:
        config = replace(config, share=fields.number("partial_rotary_factor", 1.0, low=0.0))
    if "mrope_section" in family.numbers:
        sections = fields.integers("mrope_section", low=1, high=head_dim)
        config = replace(config, sections=tuple(sections))
    _check_pairs(fields, config, head_dim)
    fields.unread -= set(_BESIDE) & set(family.numbers)
    fields.refuse_unread()
    return config


def _check_pairs(fields: Fields, config: RopeConfig, head_dim: int) -> None:
    dims = int(head_dim * config.share)
    if config.share > 1 or dims < 2 or dims % 2:
        raise ModelFormatError(
            f"{fields.name}: RoPE turns {config.share:g} of head_dim {head_dim}; {dims} is odd, or not in a head, "
            "expected whole pairs"
        )
    if config.sections and (len(config.sections) != 3 or 2 * sum(config.sections) != dims):
        raise ModelFormatError(
            f"{fields.name}: mrope_section is {list(config.sections)}, "
            f"expected three runs of {dims // 2} pairs together"
        )
    if config.stretches and len(config.stretches) != dims // 2:
        raise ModelFormatError(
            f"{fields.name}: longrope has {len(config.stretches)} factors for {dims // 2} pairs"
        )


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


def _read_longrope(fields: Fields, theta: float, context_size: int) -> RopeConfig:
    """Phi's LongRoPE (Ding et al. 2024): a factor for each period.

    transformers chooses between two lists by the length of each sequence. Here the context decides, once: keys that are
    stored were turned already, and a prompt's may come in parts. So a model that was made for more than its original
    context has the long factors, also for short texts, as in mlx-lm.
    """
    original = fields.integer("original_max_position_embeddings", context_size, high=MAX_CONTEXT)
    factor = fields.number("factor", context_size / original, low=0.0)
    default = math.sqrt(1 + math.log(factor) / math.log(max(2, original))) if factor > 1 else 1.0
    lists = {key: fields.numbers(f"{key}_factor", low=0.0) for key in ("short", "long")}
    if not all(lists.values()):
        raise ModelFormatError(f"{fields.name}: longrope needs short_factor and long_factor")
    return RopeConfig(
        theta,
        "longrope",
        factor=factor,
        original_context=original,
        stretches=tuple(lists["long" if context_size > original else "short"]),
        magnitude=fields.number("attention_factor", default, low=0.0),
    )


def _yarn_magnitude(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


_READERS: Mapping[str, Callable[[Fields, float, int], RopeConfig]] = {
    "default": _read_default,
    "mrope": _read_default,  # as Qwen's files call it; the sections say the rest
    "linear": _read_linear,
    "dynamic": _read_dynamic,
    "llama3": _read_llama3,
    "yarn": _read_yarn,
    "longrope": _read_longrope,
}


def make_rope(config: RopeConfig, head_dim: int) -> Rope:
    """The record that the ops take, periods (dims / 2,) float32."""
    dims = int(head_dim * config.share)
    periods = [config.theta ** (index / dims) for index in range(0, dims, 2)]
    if config.kind == "linear":
        periods = [period * config.factor for period in periods]
    elif config.kind == "llama3":
        periods = _stretch_llama3(periods, config)
    elif config.kind == "yarn":
        periods = _stretch_yarn(periods, config)
    elif config.kind == "longrope":
        periods = [a * b for a, b in zip(periods, config.stretches, strict=True)]
    return Rope(
        mx.array(periods, mx.float32),
        dims,
        is_interleaved=config.is_interleaved,
        magnitude=config.magnitude,
        sections=config.sections,
    )


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
