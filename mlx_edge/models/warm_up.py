"""Compiling at load what decoding launches: a Mac takes 0.2 to 0.8 s for each kernel at its first use.

One token through the model on an empty cache, and one on a long one, where attention goes in parts. What a packed
cache launches is compiled when one is used. Knows no kernel: it runs the model as a user would.
"""

import time

import mlx.core as mx

from mlx_edge import ops
from mlx_edge.models.decoder import Decoder

LONG = 2 * 256 + 32  # positions stored, so that attention has several parts and a body


def warm_up(model: Decoder) -> float:
    """Run what decoding launches once, so that the first token does not wait for a compiler. Returns seconds."""
    began = time.perf_counter()
    for num_stored in (0, LONG):
        cache = model.make_cache()
        if num_stored:
            meta = ops.StepMeta.uniform(0, batch_size=1, width=num_stored)
            for layer, kv in zip(model.layers, cache, strict=True):
                weights = layer.attention
                shape = (1, weights.num_kv_heads, num_stored, weights.head_dim)
                zeros = mx.zeros(shape, model.head.norm.weight.dtype)
                kv.extend(zeros, zeros, meta)
        mx.eval(model(mx.zeros((1, 1), mx.int32), cache))
    return time.perf_counter() - began
