"""Pages that may not be swapped out or dropped: `mlock`, with its refusals in words.

Knows addresses, not what lies there.
"""

import ctypes
import errno
import mmap
import os
import resource
from functools import cache
from typing import Any

import mlx.core as mx

from mlx_edge.errors import MemoryBudgetError
from mlx_edge.weights.report import format_bytes

_MLOCK_ONFAULT = 1
_MADV_POPULATE_READ = 22


def lock_pages(address: int, num_bytes: int, what: str) -> int:
    """Reads the pages of a mapping in and keeps them in memory until they are unmapped; returns `num_bytes`.

    `address` must be the first of a page. `what` names them in the error. Raises MemoryBudgetError if the system does
    not allow it, chiefly because of RLIMIT_MEMLOCK.
    """
    # `mlock` would write to private pages, and so copy them: they are locked as they come in, and then read.
    libc = _libc()
    start, size = ctypes.c_void_p(address), ctypes.c_size_t(num_bytes)
    has_mlock2 = hasattr(libc, "mlock2")
    if libc.mlock2(start, size, _MLOCK_ONFAULT) if has_mlock2 else libc.mlock(start, size):
        _fail(ctypes.get_errno(), num_bytes, what)
    if libc.madvise(start, size, _MADV_POPULATE_READ):  # before Linux 5.14
        pages = (ctypes.c_ubyte * num_bytes).from_address(address)
        max(pages[:: mmap.PAGESIZE], default=0)
    return num_bytes


def find_address(array: mx.array) -> int:
    """Returns where the bytes of an array of a type that numpy knows lie in this process."""
    import numpy as np  # slow to import, and seldom needed: only memory that is locked is asked for

    with mx.stream(mx.cpu):
        return int(np.asarray(array).ctypes.data)


def _fail(code: int, num_bytes: int, what: str) -> None:
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    is_limited = limit != resource.RLIM_INFINITY
    found = f"the limit is {format_bytes(limit)}" if is_limited else os.strerror(code)
    if code not in (errno.ENOMEM, errno.EPERM, errno.EAGAIN):
        found = os.strerror(code)
    raise MemoryBudgetError(
        f"{what}: cannot lock {format_bytes(num_bytes)} in memory, {found}; "
        "raise it with `ulimit -l unlimited` (LimitMEMLOCK in systemd), or do not lock"
    )


@cache
def _libc() -> Any:
    return ctypes.CDLL(None, use_errno=True)
