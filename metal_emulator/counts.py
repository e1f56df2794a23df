"""What a launch has cost, as far as a CPU can know it: lines, bytes, operations. No time.

A line is 128 bytes. An "instruction" is one access of a simdgroup as clang compiled it for this machine, not Apple's
compiler; unique lines and lines by threadgroup do not depend on that, so compare kernels by those.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

LINE_BYTES = 128


@dataclass(frozen=True)
class Traffic:
    """One buffer in one direction."""

    bytes_asked: int = 0  # by lanes, every access counted
    unique_lines: int = 0  # touched in the launch: compulsory traffic
    group_lines: int = (
        0  # unique lines of a threadgroup, summed over threadgroups: traffic with a perfect L1
    )
    instructions: int = 0
    lines: int = 0  # summed over instructions
    merged_instructions: int = 0  # adjacent accesses of a lane joined to at most 16 bytes
    merged_lines: int = 0

    @property
    def unique_bytes(self) -> int:
        """Bytes of the unique lines."""
        return self.unique_lines * LINE_BYTES

    @property
    def group_bytes(self) -> int:
        """Bytes of the lines summed over threadgroups."""
        return self.group_lines * LINE_BYTES


@dataclass(frozen=True)
class BufferCounts:
    """One buffer of a launch."""

    name: str
    size_bytes: int
    reads: Traffic
    writes: Traffic
    unwritten_bytes: int = 0


@dataclass(frozen=True)
class InstructionCounts:
    """One memory instruction: where it stands and what it moved."""

    kind: str  # "device read", "device write", "threadgroup read", "threadgroup write"
    place: str  # "qmv.metal:12"
    buffer: str
    executions: int  # by simdgroups
    bytes: int
    lines: int
    lanes: int


@dataclass(frozen=True)
class Counts:
    """All counts of a launch; operations are of simdgroups unless it says lanes."""

    threads: int
    threadgroups: int
    simdgroups: int
    simd_operations: int
    quad_operations: int
    matrix_multiplies: int
    matrix_accesses: int
    simdgroup_barriers: int
    threadgroup_barriers: int
    atomics: int  # of lanes
    switches: int  # between fibers: the emulator's own cost
    threadgroup_bytes: int  # allocated by one threadgroup
    threadgroup_loads: int
    threadgroup_stores: int
    threadgroup_load_bytes: int
    threadgroup_store_bytes: int
    bank_cycles: int  # modelled: 32 banks of 4 bytes
    active_lanes: int  # summed over memory instructions
    memory_instructions: int
    private_accesses: int  # of lanes
    constant_accesses: int  # of lanes
    buffers: dict[str, BufferCounts] = field(default_factory=dict)
    instructions: tuple[InstructionCounts, ...] = ()
    op_mix: dict[str, int] = field(default_factory=dict)  # of lanes

    @classmethod
    def of_traffic(cls, threads: int, buffers: dict[str, BufferCounts]) -> "Counts":
        """Counts of a launch of which only the traffic is known."""
        known: dict[str, Any] = {"threads": threads, "buffers": buffers}
        plain = [f.name for f in fields(cls) if f.type in {int, "int"} and f.name not in known]
        return cls(**(known | dict.fromkeys(plain, 0)))

    @property
    def mean_active_lanes(self) -> float:
        """Lanes that took part in a memory instruction, in the mean; 0 without such instructions."""
        return self.active_lanes / self.memory_instructions if self.memory_instructions else 0.0

    def reads(self, names: Sequence[str] | None = None) -> Traffic:
        """Reads of some buffers (of all without names), summed."""
        return _sum([b.reads for b in self._of(names)])

    def writes(self, names: Sequence[str] | None = None) -> Traffic:
        """Writes of some buffers (of all without names), summed."""
        return _sum([b.writes for b in self._of(names)])

    def _of(self, names: Sequence[str] | None) -> list[BufferCounts]:
        return list(self.buffers.values()) if names is None else [self.buffers[n] for n in names]

    def table(self) -> str:
        """A table for reading: a row for each buffer and direction, then the operations."""
        head = f"{'buffer':24}{'':7}{'asked B':>14}{'unique':>10}{'by group':>10}{'ratio':>8}{'instr':>12}{'lines':>12}"
        rows = [head]
        for buffer in self.buffers.values():
            for word, traffic in (("reads", buffer.reads), ("writes", buffer.writes)):
                if traffic.bytes_asked:
                    rows.append(f"{buffer.name:24}{word:7}{_row(traffic)}")
        plain = {k: v for k, v in vars(self).items() if isinstance(v, int) and v}
        rows.append(", ".join(f"{name} {value:,}" for name, value in plain.items()))
        if self.memory_instructions:
            rows.append(f"mean active lanes {self.mean_active_lanes:.1f}")
        if self.op_mix:
            rows.append(
                "of lanes: " + ", ".join(f"{name} {value:,}" for name, value in self.op_mix.items())
            )
        return "\n".join(rows)


def _row(traffic: Traffic) -> str:
    ratio = traffic.group_lines / traffic.unique_lines if traffic.unique_lines else 0.0
    return (
        f"{traffic.bytes_asked:14,}{traffic.unique_lines:10,}{traffic.group_lines:10,}{ratio:8.2f}"
        f"{traffic.instructions:12,}{traffic.lines:12,}"
    )


def _sum(traffics: Sequence[Traffic]) -> Traffic:
    names = Traffic.__dataclass_fields__
    return Traffic(**{name: sum(getattr(t, name) for t in traffics) for name in names})
