"""No step copies a cache: MLX's donation rule, replayed over the launches of decoding steps."""

import mlx.core as mx
import pytest

from bench.donation import Replay, replay
from mlx_edge import ops
from mlx_edge.cache import KVCache, QuantizedRows, prepare_step
from mlx_edge.ops import metal
from tests.metal.layers import make_layer

STEPS = 100  # three merges of the tail

CACHES = {
    "full": {},
    "window": {"window": 48},
    "kept prefix": {"window": 40, "keep": 4},
    "packed": {"row_format": QuantizedRows(8, 32)},
}


def decode(cache: KVCache, machine: Replay, lengths: list[int]) -> None:
    """Steps of so many rows each through one layer."""
    attention, mlp, rope = make_layer()
    for length in lengths:
        prepare_step([cache])
        machine.begin_step()
        meta = ops.StepMeta.uniform(cache.offset, batch_size=1, width=length)
        x = mx.zeros((1, length, attention.norm.weight.size))
        x = metal.attention_block(x, attention, cache, rope, meta)
        metal.mlp_block(x, mlp)


@pytest.mark.parametrize("in_flight", [1, 2, 3])
@pytest.mark.parametrize("kind", CACHES)
def test_decoding_copies_no_cache(kind: str, in_flight: int) -> None:
    with replay(in_flight) as machine:
        decode(KVCache(**CACHES[kind]), machine, [4] + [1] * STEPS)
    assert machine.counts.updates > 0, "the body was never written: nothing was tested"
    assert machine.counts.copied_bytes == 0


def test_verifying_drafts_copies_no_cache() -> None:
    cache = KVCache()
    with replay(2) as machine:
        for _ in range(30):
            decode(cache, machine, [8])
            machine.synchronize()  # who rejects has read the logits
            cache.trim(5)
    assert machine.counts.updates > 0
    assert machine.counts.copied_bytes == 0


def test_reading_before_updating_would_copy_all() -> None:
    """The rule itself: the plan that this protocol replaces copies the whole cache in every step."""
    body = mx.zeros((2, 1, 2, 512, 32))
    with replay(1) as machine:
        kernel = machine.metal_kernel(name="reader")
        for _ in range(3):
            machine.begin_step()
            kernel(inputs=[body], output_shapes=[(1,)], output_dtypes=[mx.float32])
            made = mx.slice_update(body, body[:, :, :, :1], mx.array([0]), axes=(3,))
            machine.update(body, body[:, :, :, :1], made)
            body = made
    assert machine.counts.copied_bytes == 3 * body.nbytes
