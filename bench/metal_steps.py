"""Our dispatches of a decode step: launches of real steps over a cache, recorded as `bench.donation` records them.

Updates of the cache, and copies where one is held, are dispatches too; merges of a tail come every 32 positions and are
averaged. Growing a body is left out on both sides: ours is allocated at once here, MLX's grows every 256 positions.
Knows no kernel's work.
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from bench.donation import Replay, replay
from bench.metal_graph import Graph, Layer, marked_ops, read_graph
from mlx_edge import ops
from mlx_edge.cache import KVCache, QuantizedRows, prepare_step
from mlx_edge.ops import metal, metal_launch

STORED = 600  # positions before the steps: more than one part
STEPS = 32  # between two merges of a tail
MODEL_DIM, INNER_DIM, HEADS, KV_HEADS, HEAD_DIM, GROUP = 128, 256, 4, 2, 64, 64
LAUNCH = "Sin"  # what a launch is in the graph of our steps


def _linear(rows: int, columns: int) -> ops.Quantized:
    packs = mx.zeros((rows, columns // 8), mx.uint32)
    groups = mx.zeros((rows, columns // GROUP), mx.bfloat16)
    return ops.Quantized(packs, groups, groups, group_size=GROUP, bits=4)


def _norm(size: int) -> ops.Norm:
    return ops.Norm(mx.ones((size,), mx.bfloat16), 1e-5)


def _layer() -> tuple[ops.AttentionWeights, ops.MLPWeights, ops.Rope]:
    """A layer as Llama has it, small."""
    attention = ops.AttentionWeights(
        norm=_norm(MODEL_DIM),
        q=_linear(HEADS * HEAD_DIM, MODEL_DIM),
        k=_linear(KV_HEADS * HEAD_DIM, MODEL_DIM),
        v=_linear(KV_HEADS * HEAD_DIM, MODEL_DIM),
        o=_linear(MODEL_DIM, HEADS * HEAD_DIM),
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        scale=HEAD_DIM**-0.5,
    )
    gate, up = (_linear(INNER_DIM, MODEL_DIM) for _ in range(2))
    mlp = ops.MLPWeights(_norm(MODEL_DIM), gate, up, _linear(MODEL_DIM, INNER_DIM))
    return attention, mlp, ops.Rope(mx.ones((HEAD_DIM // 2,)), HEAD_DIM)


def _cache(kv_bits: int | None) -> KVCache:
    rows = {} if kv_bits is None else {"row_format": QuantizedRows(kv_bits, GROUP)}
    cache = KVCache(capacity=2 * STORED, **rows)  # type: ignore[arg-type]
    chunk = mx.zeros((1, KV_HEADS, STORED, HEAD_DIM), mx.bfloat16)
    prepare_step([cache])
    cache.extend(chunk, chunk, ops.StepMeta.uniform(0, batch_size=1, width=STORED))
    return cache


def _step(x: mx.array, cache: KVCache) -> mx.array:
    """One token through one layer."""
    attention, mlp, rope = _layer()
    meta = ops.StepMeta.uniform(cache.offset, batch_size=1, width=1)
    return metal.mlp_block(metal.attention_block(x, attention, cache, rope, meta), mlp)


def count_dispatches(kv_bits: int | None = None, *, in_flight: int = 2) -> tuple[float, Replay]:
    """Dispatches of a layer and a step, averaged over the steps from one merge to the next, and what was recorded."""

    def decode(machine: Replay) -> None:
        for _ in range(STEPS):
            prepare_step([cache])
            machine.begin_step()
            _step(mx.zeros((1, 1, MODEL_DIM), mx.bfloat16), cache)

    def dispatches(machine: Replay) -> int:
        counts = machine.counts
        return len(counts.launches) + counts.updates + counts.copies

    with replay(in_flight) as machine:
        cache = _cache(kv_bits)
        decode(machine)  # the prompt's rows go to the body, and a tail begins
        before = dispatches(machine)
        decode(machine)
    return (dispatches(machine) - before) / STEPS, machine


class Markers:
    """A device on which every launch is one node: the graph of our steps has the launches and nothing else."""

    def metal_kernel(self, **_: Any) -> Callable[..., list[mx.array]]:
        """A kernel that gives the node."""

        def launch(
            *, inputs: list[mx.array], output_shapes: Any, output_dtypes: Any, **_: Any
        ) -> list[mx.array]:
            node = mx.sin(mx.concatenate([a.reshape(-1)[:1].astype(mx.float32) for a in inputs]))
            return [
                mx.broadcast_to(node[:1].astype(dtype), shape)
                for shape, dtype in zip(output_shapes, output_dtypes, strict=True)
            ]

        return launch


def _launch_graph(num_layers: int, kv_bits: int | None) -> Graph:
    caches = [_cache(kv_bits) for _ in range(num_layers)]
    mx.eval([cache.arrays for cache in caches])
    prepare_step(caches)
    x = mx.zeros((1, 1, MODEL_DIM), mx.bfloat16)
    with metal_launch.on(Markers()):
        for cache in caches:
            x = _step(x, cache)
    return read_graph([x], only=LAUNCH)


def _embed_dispatches() -> Graph:
    """Of one token, which the reference serves."""
    table = _linear(128, MODEL_DIM)
    mx.eval(table.weight, table.scales, table.offsets)
    with marked_ops(), ops.reference():
        return read_graph([ops.embed(mx.array([[1]]), ops.Embedding(table))])


def count_ours(kv_bits: int | None = None) -> Layer:
    """A layer of ours at one token and more than 256 positions; beside the layers are embed, head and argmax."""
    two, three = (_launch_graph(n, kv_bits) for n in (2, 3))
    dispatches, _ = count_dispatches(kv_bits)
    embed = _embed_dispatches()
    head_and_argmax = 2
    return Layer(
        dispatches,
        three.levels - two.levels,
        embed.total + head_and_argmax,
        embed.levels + head_and_argmax,
        three.dispatches - two.dispatches,
    )
