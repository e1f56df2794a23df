"""A roofline of Apple's GPUs: how long a dispatch takes at best, from what it moves and computes.

The rates are published ones, by others; none was measured here. A prediction stands only beside the published points
that it was held against (`metal_calibration.py`), and only as a ratio of two kernels. Not modelled: the compiler's
schedule and registers, caches kept from one dispatch to the next, clocks under load.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from bench.metal_work import LINE, Work

LEVEL_S = 2.5e-6  # published costs of a dispatch that waits for another: 2 to 5 microseconds
L2_BYTES, L1_BYTES, SHUFFLE_BYTES = 32, 64, 256  # per core and cycle
# Of a line that an instruction touches. The counts do not tell how much of it is used: 32 bytes is the least, and what
# meets the published points of qmv_wide; whole lines miss them by a factor of two and more.
SECTOR_BYTES = 32
MATRIX_CYCLES = 512 / 102  # an 8x8x8 multiply-accumulate at 102 per core and cycle
SIMD_STEPS = 5  # exchanges in a reduction over 32 lanes
FULL_SIMDGROUPS = 24  # of a core, that hide latency without parallelism within a lane
PARALLELISM = 4  # independent operations of a lane

# Operations of lanes per core and cycle, by LLVM's names. Conversions between floats are part of an operand; indices,
# comparisons and shifts are left out: clang's for this machine are not those of Apple's compiler.
FULL_RATE = 128
RATES = {
    **dict.fromkeys("fma fmuladd fneg fabs maxnum minnum and or".split(), 128),
    **dict.fromkeys("uitofp sitofp fptoui fptosi".split(), 32),
    **dict.fromkeys("exp expf exp2 exp2f log logf log2 log2f".split(), 32),
    **dict.fromkeys("sqrt sqrtf rsqrt".split(), 16),
    "fdiv": 21,
}


@dataclass(frozen=True)
class Chip:
    """A GPU: its cores and clock, its memory, and the letters by which MLX tells it from others."""

    name: str
    generation: int  # 13 is M1, 17 is M5
    size: str  # "g" base, "s" Pro from M4 and Max, "d" Ultra
    cores: int
    ghz: float
    gbs: float  # of memory, nominal
    achievable: float = 0.85  # of it; published: 0.79 to 0.87

    @property
    def cycles(self) -> float:
        """Of all cores, per second."""
        return self.cores * self.ghz * 1e9


PREDICTED = (
    Chip("M1", 13, "g", 8, 1.278, 68),
    Chip("M2", 14, "g", 10, 1.398, 100),
    Chip("M3", 15, "g", 10, 1.398, 100),
    Chip("M4", 16, "g", 10, 1.58, 120),
    Chip("M5", 17, "g", 10, 1.58, 153, 0.79),
)
M3_MAX = Chip("M3 Max", 15, "s", 40, 1.398, 400)
M3_ULTRA = Chip("M3 Ultra", 15, "d", 80, 1.398, 819)
M4_PRO = Chip("M4 Pro", 16, "s", 20, 1.58, 273)
M5_PRO = Chip("M5 Pro", 17, "s", 20, 1.58, 307)
CHIPS = (*PREDICTED, M3_MAX, M3_ULTRA, M4_PRO, M5_PRO)


@dataclass(frozen=True)
class Times:
    """Seconds that a dispatch keeps each part of a chip busy; the longest is how long it takes."""

    memory: float
    l2: float
    loads: float
    arithmetic: float
    threadgroup_memory: float

    @property
    def total(self) -> float:
        """The bound."""
        return float(max(vars(self).values()))

    @property
    def limit(self) -> str:
        """What it is bound by."""
        return max(vars(self), key=lambda name: getattr(self, name))


def alu_cycles(work: Work) -> float:
    """Core cycles of arithmetic. A product and a sum are one operation where there are as many of both."""
    mix = dict(work.operations)
    fused = max(mix.pop("fmul", 0), mix.pop("fadd", 0) + mix.pop("fsub", 0))
    cycles = fused / FULL_RATE + sum(n / RATES[name] for name, n in mix.items() if name in RATES)
    step = 32 * 4 / SHUFFLE_BYTES + 32 / FULL_RATE
    return (
        float(cycles)
        + work.matrix_multiplies * MATRIX_CYCLES
        + work.simd_operations * SIMD_STEPS * step
    )


def predict(work: Work, chip: Chip) -> Times:
    """The bounds of one dispatch."""
    traffic = work.traffic
    busy = min(1.0, work.threadgroups / chip.cores) if work.threadgroups else 1.0
    resident = work.simdgroups / (chip.cores * busy) if work.threadgroups else FULL_SIMDGROUPS
    hidden = min(1.0, resident * PARALLELISM / FULL_SIMDGROUPS)
    cycles = chip.cycles * busy
    return Times(
        memory=traffic.unique * LINE / (chip.achievable * chip.gbs * 1e9),
        l2=traffic.group * LINE / L2_BYTES / cycles,
        loads=traffic.issued * SECTOR_BYTES / L1_BYTES / (cycles * hidden),
        arithmetic=alu_cycles(work) / (cycles * hidden),
        threadgroup_memory=work.bank_cycles / (cycles * hidden),
    )


def step_seconds(works: Iterable[Work], levels: float, chip: Chip) -> float:
    """A step: its dispatches, and what each level of waiting costs."""
    return sum(predict(work, chip).total for work in works) + levels * LEVEL_S
