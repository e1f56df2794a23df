"""Pages that are locked are resident and stay shared; where the system says no, one line says why."""

import ctypes
import mmap
import os
import resource
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_edge.errors import MemoryBudgetError
from mlx_edge.weights import Checkpoint, Part, open_packed, write_checkpoint
from mlx_edge.weights.adoption import find_adoption
from mlx_edge.weights.locking import lock_pages
from tests.weights.files import random_array
from tests.weights.packs import in_child

NUM_BYTES = 2**20
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/smaps")
can_lock = pytest.mark.skipif(
    0 <= resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] < 4 * NUM_BYTES,
    reason="this user may not lock 4 MiB (RLIMIT_MEMLOCK)",
)
NOBODY = 65534

# Forking with MLX's threads around is what these tests are about; Python 3.12 warns of it.
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")


def kilobytes(path, field):
    """The sum of a field of /proc/self/smaps over the mappings of a file."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, _, rest = line.partition(":")
        if " " in name:  # the line of a mapping, not of a field
            inside = str(path) in line
        elif inside and name == field:
            total += int(rest.split()[0])
    return total


@needs_linux
@can_lock
def test_packed_pages_are_locked(tmp_path):
    for _ in range(2):
        file = open_packed("k", [Part("a", NUM_BYTES)], lambda part, view: None, folder=tmp_path)
        assert file.lock_memory() == file.report.num_bytes
        assert kilobytes(file.report.place, "Locked") >= NUM_BYTES // 1024
        del file


@can_lock
def test_packed_memory_is_locked():
    file = open_packed("k", [Part("a", NUM_BYTES)], lambda part, view: None, use_file=False)
    assert file.lock_memory() >= NUM_BYTES


@needs_linux
@can_lock
@pytest.mark.skipif(
    isinstance(find_adoption(), str), reason=f"MLX cannot share pages here: {find_adoption()}"
)
def test_shared_weights_are_locked_and_stay_shared(tmp_path):
    write_checkpoint(tmp_path, {"t": random_array(mx.uint32, (512, 512))})
    with Checkpoint.open(tmp_path) as checkpoint:
        assert checkpoint.lock_memory() == 0
        tensor = checkpoint.read("t")
        assert checkpoint.lock_memory() >= NUM_BYTES
    path = tmp_path / "model.safetensors"
    # Linux counts a locked page that is mapped twice by halves, and the header is.
    assert kilobytes(path, "Locked") >= 0.9 * NUM_BYTES // 1024
    assert kilobytes(path, "Private_Dirty") == kilobytes(path, "Anonymous") == 0
    del tensor


def test_copies_are_not_locked(tmp_path):
    write_checkpoint(tmp_path, {"t": random_array(mx.uint32, (512, 512))})
    with Checkpoint.open(tmp_path, use_mmap=False) as checkpoint:
        checkpoint.read("t")
        assert checkpoint.lock_memory() == 0


@pytest.mark.parametrize("limit", [0, 65536])
def test_a_limit_is_said_in_one_line(limit):
    pages = mmap.mmap(-1, NUM_BYTES)
    address = ctypes.addressof(ctypes.c_char.from_buffer(pages))

    def work():
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (limit, limit))
        if os.geteuid() == 0:
            os.setuid(NOBODY)  # root may lock without limit
        try:
            lock_pages(address, NUM_BYTES, "the weights")
        except MemoryBudgetError as error:
            words = f"the weights: cannot lock 1.0 MB in memory, the limit is {'0 B' if not limit else '65.5 kB'}; "
            return 0 if str(error).startswith(words) and "ulimit -l" in str(error) else 2
        return 1

    assert in_child(work) == 0
