"""Memory: MLX's counters, the process's size, and the borders at which they are read."""

import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest

from mlx_edge.profiler import Memory, Profiler, memory, sample_memory
from tests.profiler.ticking import Clock

MIB = 1 << 20


def test_an_array_is_seen() -> None:
    before = sample_memory()
    held = mx.ones((4 * MIB,), mx.float32)
    mx.eval(held)
    after = sample_memory()
    assert after.active - before.active >= held.nbytes
    assert after.peak >= after.active
    assert after.cache >= 0


def test_the_process_is_seen() -> None:
    before = sample_memory()
    assert before.resident is not None
    block = np.ones(64 * MIB, np.uint8)
    after = sample_memory()
    assert after.resident is not None
    assert after.resident - before.resident > 32 * MIB
    assert after.peak_resident >= after.resident
    assert block.size


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system counts otherwise")
def test_the_peak_of_a_program_is_its_own() -> None:
    block = np.ones(256 * MIB, np.uint8)  # what a child begins with in `ru_maxrss`
    program = "from mlx_edge.profiler.memory import peak_resident_bytes as p; print(p())"
    said = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    assert 4 * MIB < int(said.stdout) < 128 * MIB
    assert memory.peak_resident_bytes() > block.size


def test_without_mlx_it_is_not_loaded() -> None:
    program = (
        "import sys\n"
        "from mlx_edge.profiler import sample_memory\n"
        "sample = sample_memory()\n"
        "assert (sample.active, sample.peak, sample.cache) == (0, 0, 0)\n"
        "assert sample.peak_resident > 0\n"
        "assert 'mlx.core' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_sampled_at_the_borders_of_phases_alone_and_not_too_often() -> None:
    clock = Clock()
    taken = iter(range(1, 100))
    watch = Profiler(clock=clock, sample=lambda: Memory(next(taken), 0, 0, None, 0))
    with watch.phase("load"):
        clock.advance(5_000_000)
        with watch.start("file"):
            clock.advance(5_000_000)
    clock.advance(1_000)  # too soon: the border before counts for this one too
    with watch.phase("decode"):
        clock.advance(2_000_000)
    assert [(s.at_ns - 1000, s.memory.active) for s in watch.samples()] == [
        (0, 1),
        (10_000_000, 2),
        (12_001_000, 3),
    ]
    held = {path[-1]: total.memory for path, total in watch.totals().items()}
    assert held["file"] is None
    assert held["load"] == Memory(2, 0, 0, None, 0)
    assert held["decode"] == Memory(3, 0, 0, None, 0)


def test_macos_structure_is_read_at_its_place() -> None:
    class Library:
        status = 0

        def proc_pid_rusage(self, process: int, flavour: int, buffer: object) -> int:
            assert (process, flavour) == (42, 0)
            # uuid, then user, system, idle wakeups, interrupt wakeups, pageins, wired, resident, footprint, ...
            words = np.arange(10, 20, dtype=np.uint64)
            buffer.raw = bytes(16) + words.tobytes()  # type: ignore[attr-defined]
            return self.status

    library = Library()
    assert memory._read_rusage(library, 42) == 16  # type: ignore[arg-type]
    library.status = -1
    assert memory._read_rusage(library, 42) is None  # type: ignore[arg-type]
