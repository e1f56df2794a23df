"""Counts what the engine does, and tells its listeners. Written in the engine's thread, read from any."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mlx_edge.engine.config import EngineConfig
from mlx_edge.engine.request import Completion, Request
from mlx_edge.engine.scheduler import Scheduler
from mlx_edge.engine.stats import EngineStats, Listener, StepRecord

if TYPE_CHECKING:  # what is read of it needs no MLX
    from mlx_edge.engine.served import Served

logger = logging.getLogger(__name__)

RECENT_STEPS = 1000
MEASURED_EVERY_S = 0.1  # sizes of caches, which take time to sum up


class Recorder:
    """The figures of one engine."""

    def __init__(self, config: EngineConfig) -> None:
        self._max_batch_size = config.max_batch_size
        self._served: Served | None = None
        self._listeners: list[Listener] = []
        self._lock = threading.Lock()
        self._recent: deque[StepRecord] = deque(maxlen=RECENT_STEPS)
        self._counts: dict[str, Any] = {
            "steps": 0,
            "prompt_tokens": 0,
            "completion_tokens": 0,
            "finished": 0,
            "failed": 0,
            "drafted": 0,
            "accepted": 0,
            "prefix_hits": 0,
            "prefix_misses": 0,
            "prefix_hit_tokens": 0,
            "images": 0,
            "image_s": 0.0,
        }
        self._images = 0, 0.0  # encoded since the newest step, and the time that it took
        self._now: dict[str, Any] = {"running": 0, "waiting": 0}
        self._memory: dict[str, Any] = {"kv_bytes": 0, "prefix_bytes": 0, "reserved_bytes": 0}
        self._memory["image_bytes"] = 0
        self._fixed: dict[str, Any] = {"budget_bytes": 0, "row_exactness": None}
        self._measured_at = 0.0

    def watch(self, listener: Listener) -> None:
        """Tell one more listener from now on."""
        self._listeners = [*self._listeners, listener]

    def begin(self, served: "Served") -> None:
        """The model is there."""
        self._served = served
        budget = served.ledger.budget
        self._fixed = {
            "budget_bytes": 0 if budget is None else budget.total,
            "row_exactness": served.row_exactness,
        }
        self._max_batch_size = served.config.max_batch_size

    def end(self) -> None:
        """Nothing runs any more."""
        self._served = None
        self._now = dict.fromkeys(self._now, 0)
        self._memory = dict.fromkeys(self._memory, 0)

    def begun(self, num_prompt: int, num_cached: int) -> None:
        """A request has begun, with so much of its prompt cached."""
        counts = self._counts
        counts["prompt_tokens"] += num_prompt
        counts["prefix_hits"] += num_cached > 0
        counts["prefix_misses"] += num_cached == 0
        counts["prefix_hit_tokens"] += num_cached

    def encoded(self, seconds: float) -> None:
        """An image went through the tower; listeners hear of it with the next step."""
        with self._lock:
            self._counts["images"] += 1
            self._counts["image_s"] += seconds
        self._images = self._images[0] + 1, self._images[1] + seconds

    def step(self, record: StepRecord, num_accepted: int) -> None:
        """A step has ended."""
        record = replace(record, images=self._images[0], image_s=self._images[1])
        self._images = 0, 0.0
        with self._lock:
            self._recent.append(record)
            counts = self._counts
            counts["steps"] += 1
            counts["completion_tokens"] += record.new_tokens
            counts["drafted"] += record.draft_rows
            counts["accepted"] += num_accepted
        for listener in self._listeners:
            _tell(lambda: listener.step(record))  # noqa: B023, called at once

    def finished(self, request: Request, result: Completion | Exception) -> None:
        """A request has ended."""
        self._counts["failed" if isinstance(result, Exception) else "finished"] += 1
        for listener in self._listeners:
            _tell(lambda: listener.finished(request, result))  # noqa: B023, called at once

    def publish(
        self, scheduler: Scheduler, num_open: int, caches: Callable[[], Iterable[Any]]
    ) -> None:
        """Let readers see how things stand; sizes only now and then, and when nothing runs."""
        running = scheduler.num_running
        self._now = {"running": running, "waiting": num_open - running}
        now = time.monotonic()
        if running and now - self._measured_at < MEASURED_EVERY_S:
            return
        self._measured_at = now
        assert self._served is not None
        budget, prefixes = self._served.ledger.budget, self._served.prefixes
        features = self._served.features
        self._memory = {
            "kv_bytes": sum(getattr(cache, "nbytes", 0) for cache in caches()),
            "prefix_bytes": 0 if prefixes is None else prefixes.nbytes,
            "reserved_bytes": 0 if budget is None else budget.reserved,
            "image_bytes": 0 if features is None else features.nbytes,
        }

    def stats(self) -> EngineStats:
        """A snapshot. From any thread."""
        with self._lock:
            recent, counts = list(self._recent), dict(self._counts)
        times = sorted(record.seconds for record in recent)
        used = sum(min(record.decode_rows, self._max_batch_size) for record in recent)
        return EngineStats(
            **counts,
            **self._now,
            **self._memory,
            **self._fixed,
            batch_utilisation=used / max(1, len(recent) * self._max_batch_size),
            step_ms_p50=_quantile_ms(times, 0.5),
            step_ms_p99=_quantile_ms(times, 0.99),
        )


def _quantile_ms(times: list[float], share: float) -> float:
    return 1000 * times[min(len(times) - 1, int(share * len(times)))] if times else 0.0


def _tell(call: Callable[[], None]) -> None:
    try:
        call()
    except Exception:
        logger.exception("a listener failed; the engine goes on")
