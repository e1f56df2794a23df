"""The CPU backend: one MLX primitive per block, over the kernels of `cpu_kernels/`, where there is no Apple GPU.

Serves float32 activations and weights that were packed for it (`ops.Packed`); everything else is refused in words,
and the reference takes it. What the kernels are and how they compute is in `cpu_kernels/README.md`; who packs
weights and where they lie is `models/packing.py`'s.
"""

import sys
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import mlx.core as mx

from mlx_edge.errors import MemoryBudgetError
from mlx_edge.ops.cpu_records import (
    Records,
    handle_of,
    make_attention_layer,
    make_head_layer,
    make_mlp_layer,
    make_moe_layer,
    make_norm,
    make_step_record,
)
from mlx_edge.ops.types import (
    Activation,
    AttentionWeights,
    Embedding,
    HeadWeights,
    KVHandle,
    Linear,
    MLPWeights,
    MoEWeights,
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
MAX_HEAD_DIM = 256
BLOCK_ROWS = 16  # of a packed matrix: an expert begins with one
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


_records = Records()


def _precision(weights: Linear) -> Any:
    assert isinstance(weights, Packed)
    precision = extension().Precision
    return precision.int8 if weights.precision == "int8" else precision.floating


def make_step(meta: StepMeta) -> Any:
    """The kernels' record of a step: the same one for all layers of a pass."""
    return _records.get(meta, make_step_record, extension())


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
    y: mx.array = extension().rms_norm(x, _records.get(norm, make_norm, extension()))
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
    layer = _records.get(weights, make_attention_layer, extension(), rope)
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
        x, _records.get(weights, make_mlp_layer, extension()), _precision(weights.gate)
    )
    return y


def moe_block(x: mx.array, weights: MoEWeights) -> mx.array:
    """As `ops.moe_block`; the router meets floats, whatever the precision of the experts."""
    y: mx.array = extension().moe_block(
        x, _records.get(weights, make_moe_layer, extension()), _precision(weights.gate)
    )
    return y


def attention_within(
    q: mx.array, k: mx.array, v: mx.array, lengths: Sequence[int], *, scale: float
) -> mx.array:
    """As `ops.attention_within`; no score matrix exists."""
    y: mx.array = extension().attention_within(q, k, v, list(lengths), scale)
    return y


def embed(tokens: mx.array, weights: Embedding) -> mx.array:
    """As `ops.embed`; a token outside the table has a row of NaN."""
    y: mx.array = extension().embed(tokens, handle_of(weights.table), weights.scale)
    return y


def head(x: mx.array, weights: HeadWeights) -> mx.array:
    """As `ops.head`."""
    y: mx.array = extension().head(
        x, _records.get(weights, make_head_layer, extension()), _precision(weights.projection)
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


def _refuse_moe_block(x: mx.array, weights: MoEWeights) -> str | None:
    experts = (weights.gate, weights.up, weights.down)
    for packed in experts:
        rows = packed.shape[0] // weights.num_experts
        if isinstance(packed, Packed) and packed.is_quantized and rows % BLOCK_ROWS:
            return f"packed experts of {rows} rows; multiples of {BLOCK_ROWS} are served"
    return _refuse(x, weights.router, *experts)


def _refuse_attention_within(
    q: mx.array, k: mx.array, v: mx.array, _lengths: Sequence[int], *, scale: float
) -> str | None:
    if not q.dtype == k.dtype == v.dtype == mx.float32:
        return NO_FLOAT32
    if q.shape[-1] > MAX_HEAD_DIM:
        return f"heads of {q.shape[-1]}; at most {MAX_HEAD_DIM} are served"
    return None


def _refuse_embed(_tokens: mx.array, weights: Embedding) -> str | None:
    return None if isinstance(weights.table, Packed) else NOT_PACKED


OPS: dict[str, tuple[Callable[..., Any], Callable[..., str | None]]] = {
    "linear": (linear, _refuse),
    "rms_norm": (rms_norm, lambda x, _norm: _refuse(x)),
    "glu": (glu, lambda gate, _up, _activation: _refuse(gate)),
    "attention_block": (attention_block, refuse_attention_block),
    "attention_within": (attention_within, _refuse_attention_within),
    "mlp_block": (mlp_block, lambda x, w: _refuse(x, w.gate, w.up, w.down)),
    "moe_block": (moe_block, _refuse_moe_block),
    "embed": (embed, _refuse_embed),
    "head": (head, lambda x, w: _refuse(x, w.projection)),
    "log_softmax": (log_softmax, _refuse),
    "argmax": (argmax, _refuse),
}
