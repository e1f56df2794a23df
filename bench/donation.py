"""Which bytes of a KV cache MLX would copy on a Mac: its donation rule, replayed on the host.

MLX's Metal backend keeps every input of a dispatch until the command buffer that reads it has ended (0.32.4,
`backend/metal/eval.cpp`). An update of a held buffer is not in place: all of it is copied. Here kernels launch on a
device that computes nothing and notes what they read; the cache's own updates are noted on the way. Not modelled: an
array that Python still names would not be donated either (`tests/cache` watches addresses for that).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import mlx.core as mx

from mlx_edge.cache import layer, rows
from mlx_edge.ops import metal_launch

OPS_PER_COMMAND_BUFFER = 40  # base and Pro chips of most generations; 20 to 50 elsewhere


@dataclass(eq=False)
class Buffer:
    """Memory behind one or more arrays."""

    nbytes: int


@dataclass
class CommandBuffer:
    """Dispatches that run together; their inputs are held until all have run."""

    num_dispatches: int = 0
    held: set[Buffer] = field(default_factory=set)


@dataclass
class Counts:
    """What some steps did."""

    launches: list[str] = field(default_factory=list)  # kernels by name
    updates: int = 0  # slice updates of a cache
    copies: int = 0  # of them, those that copied a held buffer
    copied_bytes: int = 0
    moved_bytes: int = 0  # rows that went from tail to body, by updates in place


class Replay:
    """Stands for a Mac while steps run: a launch device, and the donation of the cache's arrays."""

    def __init__(self, in_flight: int = 1) -> None:
        """`in_flight`: steps that are encoded before the oldest of them has ended."""
        self.counts = Counts()
        self._steps_in_flight = in_flight
        self._steps: list[list[CommandBuffer]] = []
        self._buffers: dict[
            int, tuple[mx.array, Buffer]
        ] = {}  # the array keeps its id from being taken

    def begin_step(self) -> None:
        """A step begins to be encoded; older ones than may be in flight have ended."""
        self._steps.append([CommandBuffer()])
        while len(self._steps) > self._steps_in_flight:
            self._steps.pop(0)

    def synchronize(self) -> None:
        """All steps have ended."""
        self._steps = [[CommandBuffer()]]

    def metal_kernel(self, **arguments: Any) -> Callable[..., list[mx.array]]:
        """A kernel that gives zeros; its inputs are held."""

        def launch(
            *, inputs: list[mx.array], output_shapes: Any, output_dtypes: Any, **_: Any
        ) -> list[mx.array]:
            self.counts.launches.append(arguments["name"])
            self._dispatch(*inputs)
            return [mx.zeros(s, d) for s, d in zip(output_shapes, output_dtypes, strict=True)]

        return launch

    def update(self, target: mx.array, new: mx.array, made: mx.array) -> None:
        """`made` is `target` with `new` written into it: in place, or a copy when `target` is held."""
        buffer = self._buffer(target)
        self.counts.updates += 1
        if any(buffer in cb.held for step in self._steps for cb in step):
            self.counts.copies += 1
            self.counts.copied_bytes += target.nbytes
            self._dispatch(target)
            buffer = Buffer(target.nbytes)
        else:
            self.counts.moved_bytes += new.nbytes
        self._buffers[id(made)] = (made, buffer)
        self._dispatch(new)

    def view(self, source: mx.array, made: mx.array) -> None:
        """`made` shows a part of `source`."""
        self._buffers[id(made)] = (made, self._buffer(source))

    def _buffer(self, array: mx.array) -> Buffer:
        return self._buffers.setdefault(id(array), (array, Buffer(array.nbytes)))[1]

    def _dispatch(self, *inputs: mx.array) -> None:
        if not self._steps:
            self.begin_step()
        step = self._steps[-1]
        step[-1].held.update(map(self._buffer, inputs))
        step[-1].num_dispatches += 1
        if step[-1].num_dispatches > OPS_PER_COMMAND_BUFFER:
            step.append(CommandBuffer())


@contextmanager
def replay(in_flight: int = 1) -> Iterator[Replay]:
    """Inside, kernels and caches run on a model of MLX's memory; nothing is computed."""
    machine = Replay(in_flight)

    def write(target: rows.Planes, new: rows.Planes, *place: Any) -> rows.Planes:
        made = real_write(target, new, *place)
        for t, n, m in zip(target, new, made, strict=True):
            machine.update(t, n, m)
        return made

    def take(planes: rows.Planes, *place: Any) -> rows.Planes:
        made = real_take(planes, *place)
        for source, part in zip(planes, made, strict=True):
            machine.view(source, part)
        return made

    real_write, real_take = rows.write, rows.take
    with (
        patch.multiple(layer, write=write, take=take),
        patch.object(mx, "synchronize", machine.synchronize),
        metal_launch.on(machine),
    ):
        yield machine
