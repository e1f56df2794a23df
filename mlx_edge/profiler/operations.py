"""Time and bytes of every op call, per op and per layer, through the hook that `ops/select.py` offers.

    op_profile = OpProfile(profiler)
    with observe(op_profile):          # from mlx_edge.ops.select
        ...                            # generate

MLX computes later than Python asks. To time one call, its arguments are evaluated before it and its results after
it: nothing overlaps any more, and what a plain run skips (the logits of all but a prompt's last chunk) is computed.
The times are therefore true of each call and their sum is more than the run takes unobserved; `phases.compare`
measures by how much. Inside `mx.compile` nothing can be evaluated, so nothing can be observed there.

Knows of the decoder that "embed" begins a forward pass and each "attention_block" a layer: the layers of two models
that take turns (a draft model's and its target's) are added up under the same numbers.
"""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mlx_edge.profiler.timer import Profiler
from mlx_edge.profiler.traffic import Operands, bytes_moved


@dataclass(frozen=True)
class OpKey:
    """What is added up together."""

    phase: str | None
    op: str
    backend: str
    layer: int | None  # counted from 0 in each forward pass; None outside the layers


@dataclass
class OpTotal:
    """All calls of one key."""

    calls: int = 0
    total_ns: int = 0
    self_ns: int = 0  # without observed ops inside it
    num_bytes: int = 0


class _Thread(threading.local):
    """Where this thread's forward pass is."""

    def __init__(self) -> None:
        self.layer: int | None = None


class OpProfile:
    """An observer of op calls; every call is also a span of the profiler, inside the phase that runs."""

    def __init__(self, profiler: Profiler) -> None:
        self._profiler = profiler
        self._lock = threading.Lock()
        self._thread = _Thread()
        self._totals: dict[OpKey, OpTotal] = {}
        self.is_exact = True  # whether every cache said how many of its bytes are in use

    def __call__(
        self,
        op: str,
        backend: str,
        compute: Callable[[], Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        """Run the call and record it; returns what it returns, evaluated."""
        if not self._profiler.is_on:
            return compute()
        layer = self._enter_layer(op)
        operands = Operands.of(args, kwargs)
        operands.evaluate()
        stored_before = operands.stored_bytes
        details: dict[str, object] = {"backend": backend}
        if layer is not None:
            details["layer"] = layer
        with self._profiler.start(op, kind="op", details=details) as span:
            result = compute()
            results = Operands.of(result)
            results.evaluate()
            Operands((), operands.caches).evaluate()
        num_bytes = bytes_moved(op, operands, results, stored_before)
        details["bytes"] = num_bytes
        key = OpKey(self._profiler.current_phase(), op, backend, layer)
        with self._lock:
            total = self._totals.setdefault(key, OpTotal())
            total.calls += 1
            total.total_ns += span.duration_ns
            total.self_ns += span.self_ns
            total.num_bytes += num_bytes
            self.is_exact &= operands.is_exact
        return result

    def totals(self) -> dict[OpKey, OpTotal]:
        """What was recorded so far. Do not change the records."""
        with self._lock:
            return dict(self._totals)

    def _enter_layer(self, op: str) -> int | None:
        """The layer of this call: a forward pass begins with "embed", a layer with "attention_block"."""
        thread = self._thread
        if op == "embed":
            thread.layer = -1
        elif op == "head":
            thread.layer = None
        elif op == "attention_block":
            thread.layer = 0 if thread.layer is None else thread.layer + 1
        return thread.layer if thread.layer is not None and thread.layer >= 0 else None
