"""What a profiler remembers: single spans, memory at phase borders, and sums per path. Nanoseconds of its clock."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from mlx_edge.profiler.memory import Memory

Kind = Literal["span", "phase", "op"]
SpanPath = tuple[str, ...]  # the names of the spans around one, and its own


@dataclass(frozen=True, slots=True)
class Event:
    """A span that has ended."""

    path: SpanPath
    kind: Kind
    thread: int
    start_ns: int
    end_ns: int
    details: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Sample:
    """The memory at a phase's border."""

    at_ns: int
    memory: Memory


@dataclass(slots=True)
class Total:
    """All spans of one path together."""

    kind: Kind
    calls: int = 0
    total_ns: int = 0
    self_ns: int = 0  # without the spans directly inside
    phase_ns: int = (
        0  # without the phases inside, however deep: these of all phases add up to their wall time
    )
    longest_ns: int = 0
    memory: Memory | None = None  # at the last end; phases only
