"""How many dispatches, and how many that wait for each other, a decode step has: counted in the graph, not quoted.

mlx-lm's models are built tiny and quantized, with 2 and with 3 layers; the difference of their graphs is a layer. On a
CPU MLX spells its fast ops out, so each is replaced by a marker: one node with the op's inputs. Views are no dispatch.
Knows nothing of our kernels, and no kernel's work.
"""

import io
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx import nn

# With one new token these give no work to a GPU: another shape or stride over the same memory.
VIEWS = frozenset(
    "AsStrided Broadcast BroadcastAxes ExpandDims Flatten Reshape Slice Split Squeeze StopGradient "
    "Transpose Unflatten View".split()
)
MARKER = "Concatenate"  # of a marked op; a layer of these models has none of its own
TWO_PASSES = 1  # dispatches more, and levels, where attention takes two passes
SPLIT_VALUES = 1  # the same of packed values from 1024 positions on: qvm_split_k sums its parts

_LINE = re.compile(r'\[label ="([^"]+)", shape=rectangle|"(\w+)" -> \d+|\d+ -> "(\w+)"')


@dataclass(frozen=True)
class Graph:
    """Dispatches by primitive, and the longest chain of them."""

    dispatches: Counter[str]
    levels: int

    @property
    def total(self) -> int:
        """All dispatches."""
        return self.dispatches.total()


def read_graph(outputs: Sequence[mx.array], only: str | None = None) -> Graph:
    """The graph of arrays that are not yet evaluated; `only` counts no other primitive."""
    text = io.StringIO()
    mx.export_to_dot(text, *outputs)
    dispatches: Counter[str] = Counter()
    depths: dict[str, int] = {}  # of arrays
    cost = depth = 0
    # An operation is followed by what it reads and then by what it makes; it stands after those that it needs.
    for name, read, made in _LINE.findall(text.getvalue()):
        if name:
            cost = int(name == only if only else name.split()[0] not in VIEWS)
            dispatches[name] += cost
            depth = 0
        elif read:
            depth = max(depth, depths.get(read, 0))
        else:
            depths[made] = depth + cost
    return Graph(+dispatches, max(depths.values(), default=0))


def mark(inputs: Sequence[mx.array], shape: Sequence[int], dtype: mx.Dtype) -> mx.array:
    """An array of this shape that depends on all inputs through one node."""
    node = mx.concatenate([a.reshape(-1)[:1] for a in inputs])
    return mx.broadcast_to(node[0:1].astype(dtype), shape)


@contextmanager
def marked_ops() -> Iterator[Counter[str]]:
    """Inside, MLX's fast ops are markers; the calls by name."""
    calls: Counter[str] = Counter()

    def rms_norm(x: mx.array, weight: mx.array, eps: float) -> mx.array:
        calls["rms_norm"] += 1
        return mark([x, weight], x.shape, x.dtype)

    def rope(x: mx.array, *_: Any, **__: Any) -> mx.array:
        calls["rope"] += 1
        return mark([x, x], x.shape, x.dtype)

    def attention(q: mx.array, k: mx.array, v: mx.array, **_: Any) -> mx.array:
        calls["attention"] += 1
        return mark([q, k, v], (*q.shape[:-1], v.shape[-1]), q.dtype)

    def quantize(x: mx.array, group_size: int, bits: int) -> tuple[mx.array, ...]:
        calls["quantize"] += 1
        node = mx.concatenate([x.reshape(-1)[:1], x.reshape(-1)[:1]])
        groups = (*x.shape[:-1], x.shape[-1] // group_size)
        packs = mx.broadcast_to(node.view(mx.uint32), (*x.shape[:-1], x.shape[-1] * bits // 32))
        return packs, mx.broadcast_to(node[:1], groups), mx.broadcast_to(node[:1], groups)

    def dequantize(
        packs: mx.array, scales: mx.array, biases: mx.array, *sizes: Any, **more: Any
    ) -> mx.array:
        calls["dequantize"] += 1
        group_size = sizes[0] if sizes else more["group_size"]
        shape = (*scales.shape[:-1], scales.shape[-1] * group_size)
        return mark([packs.view(scales.dtype), scales, biases], shape, scales.dtype)

    replaced: list[tuple[Any, str, Any]] = [
        (mx.fast, "rms_norm", rms_norm),
        (mx.fast, "rope", rope),
        (mx.fast, "scaled_dot_product_attention", attention),
        (mx, "quantize", quantize),
        (mx, "dequantize", dequantize),
    ]
    real = [getattr(owner, name) for owner, name, _ in replaced]
    try:
        for owner, name, marker in replaced:
            setattr(owner, name, marker)
        yield calls
    finally:
        for (owner, name, _), op in zip(replaced, real, strict=True):
            setattr(owner, name, op)


def _mlx_lm_step(family: str, num_layers: int, kv_bits: int | None) -> Graph:
    """One step of one token through a tiny model of mlx-lm."""
    from importlib import import_module

    from mlx_lm.models.cache import QuantizedKVCache, make_prompt_cache

    module = import_module(f"mlx_lm.models.{family}")
    sizes = {
        "model_type": family,
        "hidden_size": 128,
        "num_hidden_layers": num_layers,
        "intermediate_size": 256,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "rms_norm_eps": 1e-5,
        "vocab_size": 128,
        "rope_theta": 1e4,
        "tie_word_embeddings": False,
        "max_position_embeddings": 4096,
    }
    model = module.Model(module.ModelArgs.from_dict(sizes))
    model.set_dtype(mx.bfloat16)
    nn.quantize(model, group_size=64, bits=4)  # type: ignore[attr-defined]
    caches = make_prompt_cache(model)
    if kv_bits is not None:
        caches = [QuantizedKVCache(64, kv_bits) for _ in range(num_layers)]
    mx.eval(model.parameters(), model(mx.array([[1, 2, 3]]), cache=caches))
    mx.eval([cache.state[:2] for cache in caches])
    with marked_ops():
        logits = model(mx.array([[4]]), cache=caches)
    return read_graph([logits])


@dataclass(frozen=True)
class Layer:
    """A decode layer's dispatches and levels, and what a step has beside its layers."""

    dispatches: float
    levels: float
    others: float = 0.0
    other_levels: float = 0.0
    primitives: Counter[str] | None = None


def count_mlx(family: str, kv_bits: int | None = None) -> Layer:
    """A layer of `mlx_lm.models.FAMILY` at one token, attention in one pass; greedy sampling is among the others."""
    two, three = (_mlx_lm_step(family, n, kv_bits) for n in (2, 3))
    layer = three.dispatches - two.dispatches
    levels = three.levels - two.levels
    logits = mx.zeros((1, 128))
    mx.eval(logits)
    sampling = read_graph([_sample(logits)])
    others = two.total - 2 * layer.total() + sampling.total
    return Layer(layer.total(), levels, others, two.levels - 2 * levels + sampling.levels, layer)


def _sample(logits: mx.array) -> mx.array:
    """As mlx_lm.generate does with temperature 0."""
    return mx.argmax(logits - mx.logsumexp(logits, keepdims=True), axis=-1)
