"""What one dispatch moves and computes, as counted by the emulator: the numbers that a roofline takes.

Knows names of buffers, which tell weights from keys and values. Knows no chip and no time.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

LINE = 128  # bytes
CONSTANT_BYTES = 128  # smaller buffers are sizes and scalars, which a GPU keeps in registers
WEIGHTS = re.compile(r"w|scales\d?|biases|packs\d|offsets\d")
KEYS_VALUES = re.compile(r"keys|values|K|V|(body|tail|prefix)_\w+")
JOINS = ("attn_combine",)  # has `values` that are parts of heads


@dataclass(frozen=True)
class Lines:
    """Traffic of some buffers in one direction, in lines of 128 bytes."""

    unique: float = 0  # touched in the launch: compulsory
    group: float = (
        0  # unique ones of a threadgroup, summed over threadgroups: what caches must serve
    )
    issued: float = 0  # summed over memory instructions, adjacent accesses of a lane joined
    asked_bytes: float = 0  # by lanes, every access

    def __add__(self, other: "Lines") -> "Lines":
        return Lines(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def scaled(self, times: float) -> "Lines":
        """The traffic of so many such launches."""
        return Lines(*(getattr(self, f.name) * times for f in fields(self)))


@dataclass(frozen=True)
class Work:
    """One dispatch. Roles of what is read are "weights", "kv" and "other"."""

    kernel: str
    threadgroups: float = 0
    simdgroups: float = 0
    reads: Mapping[str, Lines] = field(default_factory=dict)
    writes: Lines = field(default_factory=Lines)
    operations: Mapping[str, float] = field(default_factory=dict)  # of lanes, by LLVM's names
    matrix_multiplies: float = 0  # 8x8x8, of simdgroups
    simd_operations: float = 0
    barriers: float = 0
    bank_cycles: float = 0  # of threadgroup memory, modelled

    def lines(self, role: str) -> Lines:
        """What is read in a role."""
        return self.reads.get(role, Lines())

    @property
    def traffic(self) -> Lines:
        """All that is read and written."""
        return sum(self.reads.values(), self.writes)

    def scaled(self, times: float) -> "Work":
        """A dispatch of so many times this one's threadgroups; what they all share is touched once."""
        if times == 1:
            return self
        reads = {role: lines.scaled(times) for role, lines in self.reads.items()}
        shared = self.lines("other")
        reads["other"] = replace(shared.scaled(times), unique=shared.unique)
        plain = ("threadgroups", "simdgroups", "matrix_multiplies", "simd_operations", "barriers")
        return replace(
            self,
            reads=reads,
            writes=self.writes.scaled(times),
            operations={name: count * times for name, count in self.operations.items()},
            bank_cycles=self.bank_cycles * times,
            **{name: getattr(self, name) * times for name in plain},
        )


def role_of(kernel: str, buffer: str) -> str:
    """What a buffer of a kernel holds."""
    if kernel in JOINS:
        return "other"
    if KEYS_VALUES.fullmatch(buffer):
        return "kv"
    return "weights" if WEIGHTS.fullmatch(buffer) else "other"


def work_of(
    kernel: str,
    counts: Any,
    *,
    packed_kv: bool = False,
    matrix_mix: Mapping[str, float] | None = None,
) -> Work:
    """The work in a launch's `metal_emulator.Counts`.

    `packed_kv`: what it takes for weights are packed keys or values. `matrix_mix` is what the emulator itself does for
    one matrix multiply, which is taken off the operations.
    """
    reads: dict[str, Lines] = {}
    writes = Lines()
    for buffer in counts.buffers.values():
        is_constant = buffer.size_bytes < CONSTANT_BYTES
        role = role_of(kernel, buffer.name)
        role = "kv" if packed_kv and role == "weights" else role
        if not is_constant:
            reads[role] = reads.get(role, Lines()) + _lines(buffer.reads)
        writes += _lines(buffer.writes)
    emulated = {n: c * counts.matrix_multiplies for n, c in (matrix_mix or {}).items()}
    operations = {n: max(0.0, c - emulated.get(n, 0)) for n, c in counts.op_mix.items()}
    return Work(
        kernel,
        counts.threadgroups,
        counts.simdgroups,
        reads,
        writes,
        operations,
        counts.matrix_multiplies,
        counts.simd_operations,
        counts.threadgroup_barriers,
        counts.bank_cycles,
    )


def _lines(traffic: Any) -> Lines:
    issued = traffic.merged_lines or traffic.lines or traffic.group_lines
    return Lines(traffic.unique_lines, traffic.group_lines, issued, traffic.bytes_asked)


def total(works: Iterable[Work], role: str) -> Lines:
    """What dispatches read in a role."""
    return sum((work.lines(role) for work in works), Lines())
