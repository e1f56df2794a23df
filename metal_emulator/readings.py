"""The runtime's raw counters made into `Counts`, with names of buffers and places in the source."""

import ctypes
from collections.abc import Callable, Mapping, Sequence

from metal_emulator.counts import BufferCounts, Counts, InstructionCounts, Traffic
from metal_emulator.op_mix import dynamic_mix
from metal_emulator.runtime import (
    NO_BUFFER,
    EmuBufferCounters,
    EmuCounters,
    EmuInstruction,
    EmuResult,
    load_runtime,
)

_KINDS = ("device read", "device write", "threadgroup read", "threadgroup write")
_TRAFFIC = tuple(Traffic.__dataclass_fields__)
_TOTALS = tuple(entry[0] for entry in EmuCounters._fields_ if entry[0] != "reserved")


def read_counts(
    result: EmuResult,
    names: Mapping[int, str],
    sizes: Mapping[int, int],
    blocks: Sequence[dict[str, int]],
    entry: ctypes.c_void_p,
    place: Callable[[int], str],
) -> Counts:
    """The counts of the last launch; `names` and `sizes` (bytes) are of buffers by index, `place` names a pc."""
    totals = {name: int(getattr(result.counters, name)) for name in _TOTALS}
    buffers = {name: _buffer(result.buffers[i], name, sizes[i]) for i, name in names.items()}
    return Counts(
        **totals,
        buffers=buffers,
        instructions=_instructions(names, place),
        op_mix=dynamic_mix(blocks, _block_counts(entry, len(blocks))),
    )


def _buffer(raw: EmuBufferCounters, name: str, size: int) -> BufferCounts:
    reads, writes = (
        Traffic(**{field: int(getattr(raw, field)[i]) for field in _TRAFFIC}) for i in (0, 1)
    )
    return BufferCounts(name, size, reads, writes, int(raw.unwritten_bytes))


def _instructions(
    names: Mapping[int, str], place: Callable[[int], str]
) -> tuple[InstructionCounts, ...]:
    runtime = load_runtime()
    raw = (EmuInstruction * int(runtime.emu_instructions(None, 0)))()
    runtime.emu_instructions(raw, len(raw))
    return tuple(
        InstructionCounts(
            kind=_KINDS[i.kind],
            place=place(i.pc),
            buffer="" if i.buffer == NO_BUFFER else names.get(i.buffer, ""),
            executions=i.executions,
            bytes=i.bytes,
            lines=i.lines,
            lanes=i.lanes,
        )
        for i in raw
    )


def _block_counts(entry: ctypes.c_void_p, blocks: int) -> list[int]:
    raw = (ctypes.c_uint64 * blocks)()
    load_runtime().emu_block_counts(entry, raw, blocks)
    return list(raw)
