"""Spans of time that nest: what ran inside what, how often, how long, and how much memory was held around it.

    from mlx_edge import profiler
    with profiler.start("layer_1"):
        ...
    profiler.dump_report("profile.json")

`start`, `reset` and `dump_report` of the package work on DEFAULT, which is on; whatever wants to be switched off
has a `Profiler` of its own. A span belongs to the thread that opened it and ends before the one around it, so it is
not held across an `await` or a generator's `yield`. Knows names and a clock, not what the names mean.
"""

import threading
import time
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from types import TracebackType
from typing import ParamSpec, TypeVar

from mlx_edge.errors import InvalidRequestError
from mlx_edge.profiler.memory import Memory, sample_memory
from mlx_edge.profiler.records import Event, Kind, Sample, SpanPath, Total

SAMPLE_INTERVAL_NS = 1_000_000  # a border this soon after another takes its memory sample
MAX_EVENTS = 200_000  # kept one by one for a trace; the totals go on beyond it

P = ParamSpec("P")
R = TypeVar("R")


class Span:
    """What `with` is given; this one, of a profiler that is off, does nothing."""

    __slots__ = ()

    @property
    def duration_ns(self) -> int:
        """How long it was open; 0 before its end."""
        return 0

    @property
    def self_ns(self) -> int:
        """The same without the spans inside."""
        return 0

    def __enter__(self) -> "Span":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        return None


_OFF = Span()


class _Timed(Span):
    """A span that is measured."""

    __slots__ = (
        "details", "end_ns", "epoch", "inner_ns", "inner_phases_ns", "kind", "path", "phase", "profiler", "start_ns",
    )  # fmt: skip

    def __init__(
        self, profiler: "Profiler", name: str, kind: Kind, details: Mapping[str, object] | None
    ) -> None:
        self.profiler = profiler
        self.path: SpanPath = (name,)
        self.kind: Kind = kind
        self.details = details
        self.epoch = profiler.epoch
        self.phase: _Timed | None = None  # the innermost phase that holds it, itself included
        self.start_ns = self.end_ns = self.inner_ns = self.inner_phases_ns = 0

    @property
    def duration_ns(self) -> int:
        return max(0, self.end_ns - self.start_ns)

    @property
    def self_ns(self) -> int:
        return max(0, self.duration_ns - self.inner_ns)

    def __enter__(self) -> Span:
        self.profiler._open(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end_ns = self.profiler.clock()
        if kind is not None:
            self.details = {**(self.details or {}), "error": kind.__name__}
        self.profiler._close(self)


class _Thread(threading.local):
    """The spans open in this thread, outermost first."""

    def __init__(self) -> None:
        self.number = 0  # 0 until the profiler has numbered this thread
        self.open: list[_Timed] = []


class Profiler:
    """Collects spans from any number of threads.

    Off, `start` returns one shared object that does nothing and `wrap` the function itself.
    """

    def __init__(
        self,
        *,
        is_on: bool = True,
        clock: Callable[[], int] = time.perf_counter_ns,
        sample: Callable[[], Memory] | None = sample_memory,
        max_events: int = MAX_EVENTS,
    ) -> None:
        """`clock` is monotonic, in nanoseconds; `sample` reads the memory at phase borders, None leaves it out."""
        self.is_on = is_on
        self.clock = clock
        self._sample = sample
        self._max_events = max_events
        self.epoch = 0  # how often it was reset
        self._lock = threading.Lock()
        self.reset()

    def reset(self) -> None:
        """Forget everything; a span that is open now will not be recorded."""
        with self._lock:
            self.epoch += 1
            self._thread = _Thread()
            self._events: list[Event] = []
            self._samples: list[Sample] = []
            self._last_sample: Sample | None = None
            self._totals: dict[SpanPath, Total] = {}
            self._threads: dict[int, str] = {}
            self._phases_ns: tuple[int, int] | None = None
            self.num_dropped = 0  # spans that only the totals know

    def start(
        self, name: str, *, kind: Kind = "span", details: Mapping[str, object] | None = None
    ) -> Span:
        """A span to be used once, by `with`; `details` go into the trace as they are when it is written."""
        return _Timed(self, name, kind, details) if self.is_on else _OFF

    def phase(self, name: str) -> Span:
        """A span that the report lists as a phase; the memory is sampled at its borders."""
        return self.start(name, kind="phase")

    def wrap(self, name: str, function: Callable[P, R], *, kind: Kind = "span") -> Callable[P, R]:
        """The function, with a span around each call."""
        if not self.is_on:
            return function

        @wraps(function)
        def timed(*args: P.args, **kwargs: P.kwargs) -> R:
            with self.start(name, kind=kind):
                return function(*args, **kwargs)

        return timed

    def current_phase(self) -> str | None:
        """The innermost phase that is open in this thread."""
        phase = self._thread.open[-1].phase if self._thread.open else None
        return None if phase is None else phase.path[-1]

    def events(self) -> list[Event]:
        """The spans that have ended, in that order; at most `max_events`."""
        with self._lock:
            return list(self._events)

    def samples(self) -> list[Sample]:
        """The memory at phase borders; at most `max_events`."""
        with self._lock:
            return list(self._samples)

    def totals(self) -> dict[SpanPath, Total]:
        """Per path, all spans that have ended. Do not change the records."""
        with self._lock:
            return dict(self._totals)

    def threads(self) -> dict[int, str]:
        """Number and name of every thread that opened a span; numbers count from 1."""
        with self._lock:
            return dict(self._threads)

    def phases_wall_ns(self) -> int:
        """Nanoseconds from the first phase's start to the last one's end."""
        with self._lock:
            first, last = self._phases_ns or (0, 0)
            return last - first

    def dump_report(self, path: str | Path) -> None:
        """Write the report as JSON; raises InvalidRequestError where the disk refuses."""
        from mlx_edge.profiler.report import make_report, write_report

        write_report(path, make_report(self))

    def dump_trace(self, path: str | Path) -> None:
        """Write a Chrome trace, which Perfetto opens; raises InvalidRequestError where the disk refuses."""
        from mlx_edge.profiler.trace import write_trace

        write_trace(path, self)

    def _open(self, span: _Timed) -> None:
        thread = self._thread
        if thread.number == 0:
            with self._lock:
                thread.number = len(self._threads) + 1
                self._threads[thread.number] = threading.current_thread().name
        outer = thread.open[-1] if thread.open else None
        if outer is not None:
            span.path = (*outer.path, *span.path)
        if span.kind == "phase":
            span.phase = span
            self._take_sample()
        elif outer is not None:
            span.phase = outer.phase
        thread.open.append(span)
        span.start_ns = self.clock()

    def _close(self, span: _Timed) -> None:
        if span.epoch != self.epoch:
            return
        opened = self._thread.open
        if span not in opened:
            raise InvalidRequestError(
                f"the span {span.path[-1]!r} is not open in this thread; a span ends where it began"
            )
        if opened[-1] is not span:
            inner = opened[-1].path[-1]
            del opened[opened.index(span) :]
            raise InvalidRequestError(
                f"the span {span.path[-1]!r} ended before {inner!r} inside it; end the inner one first"
            )
        opened.pop()
        if opened:
            opened[-1].inner_ns += span.duration_ns
            holder = opened[-1].phase
            if span.kind == "phase" and holder is not None:
                holder.inner_phases_ns += span.duration_ns
        memory = self._take_sample() if span.kind == "phase" else None
        self._record(span, memory)

    def _take_sample(self) -> Memory | None:
        if self._sample is None:
            return None
        last = self._last_sample
        if last is not None and self.clock() - last.at_ns < SAMPLE_INTERVAL_NS:
            return last.memory
        sample = Sample(self.clock(), self._sample())
        with self._lock:
            self._last_sample = sample
            if len(self._samples) < self._max_events:
                self._samples.append(sample)
        return sample.memory

    def _record(self, span: _Timed, memory: Memory | None) -> None:
        with self._lock:
            total = self._totals.setdefault(span.path, Total(span.kind))
            total.calls += 1
            total.total_ns += span.duration_ns
            total.self_ns += span.self_ns
            total.longest_ns = max(total.longest_ns, span.duration_ns)
            if span.kind == "phase":
                total.phase_ns += max(0, span.duration_ns - span.inner_phases_ns)
                total.memory = memory
                first, last = self._phases_ns or (span.start_ns, span.end_ns)
                self._phases_ns = min(first, span.start_ns), max(last, span.end_ns)
            if len(self._events) == self._max_events:
                self.num_dropped += 1
                return
            event = Event(
                span.path, span.kind, self._thread.number, span.start_ns, span.end_ns, span.details or {}
            )  # fmt: skip
            self._events.append(event)


DEFAULT = Profiler()


def start(name: str) -> Span:
    """A span of the DEFAULT profiler."""
    return DEFAULT.start(name)


def reset() -> None:
    """Make the DEFAULT profiler forget everything."""
    DEFAULT.reset()


def dump_report(path: str | Path) -> None:
    """Write what the DEFAULT profiler has seen as JSON; raises InvalidRequestError where the disk refuses."""
    DEFAULT.dump_report(path)
