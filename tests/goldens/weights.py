"""Weights drawn from a tensor's name, so that goldens store none. Used by the script that makes them and the test.

Knows neither MLX nor torch, which live in different environments here.
"""

import zlib

import numpy as np
from numpy.typing import NDArray


def draw_weight(name: str, shape: list[int]) -> NDArray[np.float32]:
    """The float32 tensor of this name, the same with every numpy.

    Matrices keep the variance of what they multiply; norms lie around one, biases around zero.
    """
    # The old generator: numpy has promised not to change its stream.
    noise = np.random.RandomState(zlib.crc32(name.encode())).random_sample(shape) * 2 - 1
    if len(shape) == 2:
        # A row of the token table is read as it is, not summed over.
        values = noise if "embed" in name else noise * np.sqrt(3 / shape[1])
    elif len(shape) == 3:  # of each expert, inputs first
        values = noise * np.sqrt(3 / shape[1])
    else:
        values = 0.3 * noise + (1.0 if "norm" in name else 0.0)
    return values.astype(np.float32)


def draw_tokens(count: int, vocab_size: int) -> list[int]:
    """A sequence of token ids."""
    noise = np.random.RandomState(count).random_sample(count)
    return [int(value * vocab_size) for value in noise]
