"""The machine's memory bandwidth, measured: the roof under which every op that reads its weights once must stay.

As in McCalpin's STREAM, a buffer far larger than any cache is read and is copied, several rounds, the median counts;
a copy's bytes are those read and those written. On a CPU all cores work, through numpy; on a GPU MLX does. Knows no
op: what a call moves is counted in `traffic.py`. Bandwidth is in GB/s of 10^9 bytes.

The cost is stated in the result: about a second and two buffers of at least 256 MiB (a GPU: 1 GiB). They raise MLX's
and the process's peak memory, so measure after what you profile.
"""

import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from statistics import median

import mlx.core as mx
import numpy as np

from mlx_edge.errors import InvalidRequestError

ROUNDS = 7
REPEATS = 4  # reads or copies in one round on a GPU, so that the launch does not count
CPU_BUFFER_BYTES = 256 << 20
GPU_BUFFER_BYTES = 1 << 30
CACHE_MULTIPLE = 4  # STREAM's rule: each buffer is at least four times the last-level cache


@dataclass(frozen=True)
class Bandwidth:
    """What was measured, how, and what it cost."""

    device: str
    read_gbs: float
    copy_gbs: float
    num_threads: int  # 0 on a GPU
    buffer_bytes: int
    rounds: int
    cost_s: float

    @property
    def gbs(self) -> float:
        """The roof: the better of the two."""
        return max(self.read_gbs, self.copy_gbs)


@cache
def machine_bandwidth() -> Bandwidth:
    """The bandwidth of MLX's default device, measured once per process."""
    return measure_bandwidth()


def measure_bandwidth(*, buffer_bytes: int | None = None, rounds: int = ROUNDS) -> Bandwidth:
    """Measure now, on MLX's default device.

    Raises: InvalidRequestError for a buffer below 4 KiB or no rounds.
    """
    if rounds < 1 or (buffer_bytes is not None and buffer_bytes < 4096):
        raise InvalidRequestError(
            f"asked to measure {rounds} rounds over {buffer_bytes} bytes; expected at least 1 over 4096"
        )
    start = time.perf_counter()
    if mx.default_device().type == mx.DeviceType.gpu:
        size = buffer_bytes or GPU_BUFFER_BYTES
        read, copy = measure_with_mlx(size, rounds)
        device, num_threads = "GPU through MLX", 0
    else:
        size = buffer_bytes or max(CPU_BUFFER_BYTES, CACHE_MULTIPLE * last_level_cache_bytes())
        num_threads = usable_cores()
        read, copy = measure_with_numpy(size, rounds, num_threads)
        device = "CPU through numpy"
    cost = time.perf_counter() - start
    return Bandwidth(device, read / 1e9, copy / 1e9, num_threads, size, rounds, cost)


def measure_with_numpy(size: int, rounds: int, num_threads: int) -> tuple[float, float]:
    """Bytes per second of reading and of copying `size` bytes with so many threads; numpy lets them run at once."""
    source = np.ones(size // 4, np.float32)
    target = np.empty_like(source)
    target.fill(0)  # touched, so that no page is new in the first round
    edges = np.linspace(0, source.size, num_threads + 1).astype(int)
    parts = [slice(a, b) for a, b in pairwise(edges) if b > a]
    with ThreadPoolExecutor(num_threads) as pool:
        read = _median_s(lambda: list(pool.map(lambda p: source[p].max(), parts)), rounds)
        copy = _median_s(lambda: list(pool.map(lambda p: np.copyto(target[p], source[p]), parts)), rounds)  # fmt: skip
    return source.nbytes / read, 2 * source.nbytes / copy


def measure_with_mlx(size: int, rounds: int) -> tuple[float, float]:
    """Bytes per second of reading and of copying `size` bytes through MLX's default device."""
    source = mx.ones((size // 4,), mx.float32)
    one = mx.array(1, mx.float32)
    mx.eval(source, one)

    def copy_often() -> None:
        copied = source
        for _ in range(REPEATS):  # each depends on the last, so that none is left out
            copied = copied + one
        mx.eval(copied)

    read = _median_s(lambda: mx.eval([source.max() for _ in range(REPEATS)]), rounds)
    copy = _median_s(copy_often, rounds)
    return REPEATS * source.nbytes / read, 2 * REPEATS * source.nbytes / copy


def _median_s(work: Callable[[], object], rounds: int) -> float:
    """Seconds; a first round, not counted, warms up."""
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return max(median(times[1:]), 1e-9)


def usable_cores() -> int:
    """Cores that this process may run on."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def last_level_cache_bytes(folder: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    """The largest cache that Linux lists, in bytes; 0 where it lists none (macOS does not tell its last level)."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    sizes = [path.read_text().strip() for path in folder.glob("index*/size")]
    return max((int(s[:-1]) * units[s[-1]] for s in sizes if s[-1:] in units), default=0)
