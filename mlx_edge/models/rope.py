"""Rotary periods from a model's configuration. Knows formulas, not ops."""

import math

import mlx.core as mx
import numpy as np

from mlx_edge.models.config import RopeConfig
from mlx_edge.ops import Rope


def make_rope(config: RopeConfig, head_dim: int) -> Rope:
    """The record that the ops take, periods (head_dim / 2,) float32."""
    periods = config.theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if config.kind == "llama3":
        periods = _stretch_llama3(periods, config)
    return Rope(mx.array(periods.astype(np.float32)), head_dim)


def _stretch_llama3(periods: np.ndarray, config: RopeConfig) -> np.ndarray:
    """Llama 3.1's rule: short waves stay, long ones are `factor` times longer, those between are blended."""
    turns = config.original_context / (2 * math.pi * periods)  # in the original context
    low, high = config.low_freq_factor, config.high_freq_factor
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    stretched: np.ndarray = 1.0 / ((1.0 - keep) / (config.factor * periods) + keep / periods)
    return stretched
