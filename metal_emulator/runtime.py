"""The runtime's library as Python sees it: the structures of `native/interface.h`, loaded and checked.

One launch runs at a time in a process. Knows nothing of sources.
"""

import ctypes
import threading
from ctypes import c_char, c_char_p, c_double, c_uint32, c_uint64, c_void_p
from functools import cache

from metal_emulator.build import build_runtime
from metal_emulator.errors import MetalError

INTERFACE = 1
NO_BUFFER = 0xFFFFFFFF
MAX_BUFFERS = 32
WRITABLE, POISON, UNWRITTEN_OK = 1, 2, 4
MODE_NUMBERS = {"fast": 0, "check": 1, "count": 2}
FINDINGS = (
    "ok",
    "out_of_bounds",
    "wild_pointer",
    "write_to_input",
    "uninitialised",
    "threadgroup_race",
    "device_race",
    "divergence",
    "simd_misuse",
    "unwritten_output",
    "stack_overflow",
    "threadgroup_memory",
    "undefined",
    "launch",
    "deadlock",
)
LAUNCHING = threading.Lock()  # the runtime's memory and state are of one launch


class EmuBuffer(ctypes.Structure):
    """A buffer of a launch."""

    _fields_ = (
        ("address", c_uint64),
        ("bytes", c_uint64),
        ("name", c_char_p),
        ("flags", c_uint32),
        ("reserved", c_uint32),
    )


class EmuLaunch(ctypes.Structure):
    """A launch."""

    _fields_ = (
        ("entry", c_void_p),
        ("buffers", ctypes.POINTER(EmuBuffer)),
        ("num_buffers", c_uint32),
        ("grid", c_uint32 * 3),
        ("threadgroup", c_uint32 * 3),
        ("mode", c_uint32),
        ("order", c_uint32),
        ("strict_exit", c_uint32),
        ("same_value_ok", c_uint32),
        ("max_groups", c_uint32),
    )


class EmuFinding(ctypes.Structure):
    """What a launch was stopped by."""

    _fields_ = (
        ("kind", c_uint32),
        ("site", c_uint32),
        ("pc", c_uint64),
        ("threadgroup", c_uint32 * 3),
        ("thread", c_uint32 * 3),
        ("simdgroup", c_uint32),
        ("lane", c_uint32),
        ("has_thread", c_uint32),
        ("buffer", c_uint32),
        ("text", c_char * 448),
    )


class EmuCounters(ctypes.Structure):
    """Counts of a whole launch."""

    _fields_ = (
        *(
            (name, c_uint64)
            for name in (
                *("threads", "threadgroups", "simdgroups", "simd_operations", "quad_operations"),
                *(
                    "matrix_multiplies",
                    "matrix_accesses",
                    "simdgroup_barriers",
                    "threadgroup_barriers",
                ),
                *(
                    "atomics",
                    "switches",
                    "threadgroup_bytes",
                    "threadgroup_loads",
                    "threadgroup_stores",
                ),
                *(
                    "threadgroup_load_bytes",
                    "threadgroup_store_bytes",
                    "bank_cycles",
                    "active_lanes",
                ),
                *("memory_instructions", "private_accesses", "constant_accesses"),
            )
        ),
        ("reserved", c_uint64 * 11),
    )


class EmuBufferCounters(ctypes.Structure):
    """Counts of one buffer: [0] reads, [1] writes."""

    _fields_ = (
        *(
            (name, c_uint64 * 2)
            for name in (
                *("bytes_asked", "unique_lines", "group_lines", "instructions", "lines"),
                *("merged_instructions", "merged_lines"),
            )
        ),
        ("unwritten_bytes", c_uint64),
        ("reserved", c_uint64),
    )


class EmuInstruction(ctypes.Structure):
    """Counts of one memory instruction of the library."""

    _fields_ = (
        ("pc", c_uint64),
        ("kind", c_uint32),
        ("buffer", c_uint32),
        ("executions", c_uint64),
        ("bytes", c_uint64),
        ("lines", c_uint64),
        ("lanes", c_uint64),
    )


class EmuResult(ctypes.Structure):
    """What a launch gives."""

    _fields_ = (
        ("finding", EmuFinding),
        ("counters", EmuCounters),
        ("buffers", EmuBufferCounters * MAX_BUFFERS),
    )


_SIZES = {
    EmuBuffer: 32,
    EmuLaunch: 64,
    EmuFinding: 504,
    EmuCounters: 256,
    EmuBufferCounters: 128,
    EmuInstruction: 48,
    EmuResult: 4856,
}


@cache
def load_runtime() -> ctypes.CDLL:
    """The runtime, built on first use. Raises MetalError when it cannot be built or speaks another interface."""
    for structure, size in _SIZES.items():
        assert ctypes.sizeof(structure) == size, (
            f"{structure.__name__} differs from native/interface.h"
        )
    library = ctypes.CDLL(str(build_runtime().library), mode=ctypes.RTLD_GLOBAL)
    if library.emu_interface() != INTERFACE:
        message = f"the runtime speaks interface {library.emu_interface()}, expected {INTERFACE}: clear the cache"
        raise MetalError(message, kind="launch")
    library.emu_place.argtypes = [c_uint32, c_uint64]
    library.emu_place.restype = c_void_p
    library.emu_run.argtypes = [ctypes.POINTER(EmuLaunch), ctypes.POINTER(EmuResult)]
    library.emu_run.restype = c_uint32
    library.emu_instructions.argtypes = [c_void_p, c_uint64]
    library.emu_instructions.restype = c_uint64
    library.emu_block_counts.argtypes = [c_void_p, c_void_p, c_uint64]
    library.emu_block_counts.restype = c_uint64
    library.emu_switch_cost.argtypes = [c_uint64]
    library.emu_switch_cost.restype = c_double
    return library
