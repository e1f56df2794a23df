"""The CPU backend: one MLX primitive per block, over the kernels of `cpu_kernels/`, where there is no Apple GPU.

Serves float32 activations and weights that were packed for it (`ops.Packed`); everything else is refused in words,
and the reference takes it. What the kernels are and how they compute is in `cpu_kernels/README.md`; who packs
weights and where they lie is `models/packing.py`'s.
"""

import sys
import weakref
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import mlx.core as mx

from mlx_edge.errors import MemoryBudgetError
from mlx_edge.ops.types import (
    Activation,
    AttentionWeights,
    Embedding,
    HeadWeights,
    KVHandle,
    Linear,
    MLPWeights,
    Norm,
    Packed,
    PagedHandle,
    RaggedKV,
    Rope,
    StepMeta,
)

INSTALL_AGAIN = "install mlx_edge again, with g++ and cmake at hand"
NO_FLOAT32 = "activations are not float32"
NOT_PACKED = "weights are not packed for it"
FIXED_STEPS = "inputs are rounded in fixed steps; it serves those that it rounds itself, and floats"


@cache
def find_extension() -> Any:
    """The kernels' extension module, or in words why there is none.

    One that was built for another MLX fails to load, or takes its arrays for strangers: both are found out here.
    """
    if sys.platform == "darwin":
        return "macOS has its GPU instead"
    try:
        from mlx_edge._native import _cpu
    except ModuleNotFoundError:
        return (
            f"mlx_edge was installed without it (no compiler, or its build failed); {INSTALL_AGAIN}"
        )
    except ImportError as error:
        return f"it does not fit the installed mlx {_mlx_version()} ({error}); {INSTALL_AGAIN}"
    try:
        _cpu.instruction_set()  # raises for a name that cannot run here
        mx.eval(_cpu.argmax(mx.array([0.0, 1.0])))
    except TypeError:
        return f"it does not know the arrays of the installed mlx {_mlx_version()}; {INSTALL_AGAIN}"
    except RuntimeError as error:
        return str(error)
    return _cpu


def _mlx_version() -> str:
    from importlib.metadata import version  # slow to import, and only needed for a message

    return version("mlx")


def extension() -> Any:
    """The kernels' extension module, which is there."""
    return find_extension()


def has_cpu_only() -> bool:
    """Whether this is a machine that the kernels are made for: no macOS, and no GPU that MLX would use."""
    return sys.platform != "darwin" and mx.default_device().type != mx.DeviceType.gpu


def missing() -> str | None:
    """What this machine lacks for the CPU kernels, or None."""
    if mx.default_device().type == mx.DeviceType.gpu:
        return "the default device is a GPU"
    found = find_extension()
    return found if isinstance(found, str) else None


def describe() -> str:
    """Instruction set and threads, for a report."""
    ext = extension()
    return f"{ext.instruction_set()}, {ext.num_threads()} threads"


# A pass of a 1B model over some rows, in passes over one row: medians on two cores (bench/LOG.md), in between on lines.
# Without VNNI eight rows are no longer a matter of memory alone.
PASS_COSTS = {
    "avx512": ((1, 1.0), (8, 1.9), (16, 3.0)),
    "avx2": ((1, 1.0), (3, 1.17), (4, 1.44), (5, 1.93), (8, 2.72), (16, 4.95)),
}
SLOW_PASS_COSTS = ((1, 1.0), (16, 16.0))  # products that take as long for each row


def pass_cost(num_rows: int) -> float:
    """What a pass over so many rows of one sequence costs, in passes over one row; rows from 1 to 16."""
    points = PASS_COSTS.get(extension().instruction_set(), SLOW_PASS_COSTS)
    for (rows, cost), (more_rows, more_cost) in pairwise(points):
        if num_rows <= more_rows:
            return cost + (more_cost - cost) * (num_rows - rows) / (more_rows - rows)
    return points[-1][1]


def explain(error: Exception) -> Exception:
    """What stands for an error of the kernels: MemoryBudgetError where they found no memory, any other as it is.

    MLX throws what they threw as a RuntimeError, to whoever waits for a result of the step.
    """
    found = find_extension()
    if isinstance(found, str) or not str(error).startswith(found.OUT_OF_MEMORY):
        return error
    return MemoryBudgetError(
        f"{error}; run fewer requests at once, shorter ones, or a smaller model"
    )


def is_failure(error: Exception) -> bool:
    """Whether a step failed in the kernels, and with it every sequence of the step."""
    found = find_extension()
    marks = () if isinstance(found, str) else (found.FAILURE, found.OUT_OF_MEMORY)
    return str(error).startswith(marks)


def trim_memory() -> None:
    """Give back to the system what was freed, where the kernels are here to do so."""
    found = find_extension()
    if not isinstance(found, str):
        found.trim_memory()


class _Records:
    """The kernels' records of ours, made at their first use and dropped with them."""

    def __init__(self) -> None:
        self._made: dict[int, tuple[Any, ...]] = {}

    def get(self, ours: Any, make: Callable[..., Any], *others: Any) -> Any:
        """`make(ours, *others)`, the same one again for the same records."""
        known = self._made.get(id(ours))
        if known is not None and all(a is b for a, b in zip(known[1:], others, strict=True)):
            return known[0]
        record = make(ours, *others)
        if known is None:
            weakref.finalize(ours, self._made.pop, id(ours), None)
        self._made[id(ours)] = (record, *others)
        return record


_records = _Records()


def _norm(norm: Norm) -> Any:
    return extension().Norm(norm.weight.astype(mx.float32).tolist(), norm.eps)


def _rope(rope: Rope) -> Any:
    return extension().Rope(rope.periods.tolist(), rope.dims, rope.is_interleaved, rope.magnitude)


def _attention_layer(weights: AttentionWeights, rope: Rope | None) -> Any:
    return extension().AttentionLayer(
        norm=_norm(weights.norm),
        q=_handle(weights.q),
        k=_handle(weights.k),
        v=_handle(weights.v),
        o=_handle(weights.o),
        num_heads=weights.num_heads,
        num_kv_heads=weights.num_kv_heads,
        head_dim=weights.head_dim,
        scale=weights.scale,
        q_norm=None if weights.q_norm is None else _norm(weights.q_norm),
        k_norm=None if weights.k_norm is None else _norm(weights.k_norm),
        rope=None if rope is None else _rope(rope),
        window=weights.window or 0,
    )


def _mlp_layer(weights: MLPWeights) -> Any:
    ext = extension()
    return ext.MLPLayer(
        _norm(weights.norm),
        _handle(weights.gate),
        _handle(weights.up),
        _handle(weights.down),
        getattr(ext.Activation, weights.activation),
    )


def _head_layer(weights: HeadWeights) -> Any:
    return extension().HeadLayer(_norm(weights.norm), _handle(weights.projection))


def _handle(weights: Linear) -> Any:
    assert isinstance(weights, Packed)
    return weights.handle


def _precision(weights: Linear) -> Any:
    assert isinstance(weights, Packed)
    precision = extension().Precision
    return precision.int8 if weights.precision == "int8" else precision.floating


def _step(meta: StepMeta) -> Any:
    return extension().Step(list(meta.starts), list(meta.lengths), meta.width, meta.is_ragged)


def make_step(meta: StepMeta) -> Any:
    """The kernels' record of a step: the same one for all layers of a pass."""
    return _records.get(meta, _step)


def _refuse(x: mx.array, *weights: Linear) -> str | None:
    if x.dtype != mx.float32:
        return NO_FLOAT32
    unpacked = [weight for weight in weights if not isinstance(weight, Packed)]
    if any(weight.input_scale is not None for weight in unpacked):
        return FIXED_STEPS
    return NOT_PACKED if unpacked else None


def linear(x: mx.array, weights: Packed) -> mx.array:
    """As `ops.linear`."""
    y: mx.array = extension().linear(x, weights.handle, _precision(weights))
    return y


def rms_norm(x: mx.array, norm: Norm) -> mx.array:
    """As `ops.rms_norm`."""
    y: mx.array = extension().rms_norm(x, _records.get(norm, _norm))
    return y


def glu(gate: mx.array, up: mx.array, activation: Activation) -> mx.array:
    """As `ops.glu`."""
    y: mx.array = extension().glu(gate, up, getattr(extension().Activation, activation))
    return y


def attention_block(
    x: mx.array,
    weights: AttentionWeights,
    kv: PagedHandle | RaggedKV,
    rope: Rope | None,
    meta: StepMeta,
) -> mx.array:
    """As `ops.attention_block`, over stores that are appended to in place."""
    layer = _records.get(weights, _attention_layer, rope)
    handles: Sequence[Any] = kv.handles if isinstance(kv, RaggedKV) else (kv,)
    heads, dim = weights.num_kv_heads, weights.head_dim
    metas = meta.alone if meta.is_ragged else (meta,)
    stores = [handle.begin(heads, dim, own) for handle, own in zip(handles, metas, strict=True)]
    tickets: list[mx.array] = []
    for handle in handles:
        # Sequences that were in a step together have one ticket, and mostly stand together.
        if handle.ticket is not None and not (tickets and handle.ticket is tickets[-1]):
            tickets.append(handle.ticket)
    y: mx.array
    y, ticket = extension().attention_block(
        x, layer, stores, tickets, make_step(meta), _precision(weights.q)
    )
    for handle in handles:
        handle.ticket = ticket
    return y


def mlp_block(x: mx.array, weights: MLPWeights) -> mx.array:
    """As `ops.mlp_block`."""
    y: mx.array = extension().mlp_block(
        x, _records.get(weights, _mlp_layer), _precision(weights.gate)
    )
    return y


def embed(tokens: mx.array, weights: Embedding) -> mx.array:
    """As `ops.embed`; a token outside the table has a row of NaN."""
    y: mx.array = extension().embed(tokens, _handle(weights.table))
    return y


def head(x: mx.array, weights: HeadWeights) -> mx.array:
    """As `ops.head`."""
    y: mx.array = extension().head(
        x, _records.get(weights, _head_layer), _precision(weights.projection)
    )
    return y


def log_softmax(x: mx.array) -> mx.array:
    """As `ops.log_softmax`."""
    y: mx.array = extension().log_softmax(x)
    return y


def argmax(x: mx.array) -> mx.array:
    """As `ops.argmax`."""
    y: mx.array = extension().argmax(x)
    return y


@cache
def _is_paged(kind: type) -> bool:
    return hasattr(kind, "begin")


def refuse_attention_block(
    x: mx.array, weights: AttentionWeights, kv: KVHandle | RaggedKV, *_others: Any
) -> str | None:
    """Why the kernels cannot run this layer, or None."""
    handles = kv.handles if isinstance(kv, RaggedKV) else (kv,)
    if not all(_is_paged(kind) for kind in set(map(type, handles))):
        return "the cache is not one that it appends to in place"
    return _refuse(x, weights.q, weights.k, weights.v, weights.o)


def _refuse_embed(_tokens: mx.array, weights: Embedding) -> str | None:
    return None if isinstance(weights.table, Packed) else NOT_PACKED


OPS: dict[str, tuple[Callable[..., Any], Callable[..., str | None]]] = {
    "linear": (linear, _refuse),
    "rms_norm": (rms_norm, lambda x, _norm: _refuse(x)),
    "glu": (glu, lambda gate, _up, _activation: _refuse(gate)),
    "attention_block": (attention_block, refuse_attention_block),
    "mlp_block": (mlp_block, lambda x, w: _refuse(x, w.gate, w.up, w.down)),
    "embed": (embed, _refuse_embed),
    "head": (head, lambda x, w: _refuse(x, w.projection)),
    "log_softmax": (log_softmax, _refuse),
    "argmax": (argmax, _refuse),
}
