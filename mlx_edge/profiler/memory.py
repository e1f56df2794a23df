"""How much memory is held: by MLX, and by the whole process. All in bytes.

Reads MLX's counters only once something has loaded MLX, and loads nothing itself. Knows no limits and frees
nothing. MLX's counters see what its allocator handed out: a weight that is a view of a mapped file is in the
resident size, not in them.
"""

import ctypes
import os
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

# struct rusage_info_v0 of macOS's <sys/resource.h>: a 16-byte uuid, then ten counters of 64 bits.
_RUSAGE_INFO_V0_BYTES = 96
_RESIDENT_AT = 16 + 6 * 8


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes at one moment; the peaks are since the process began (MLX's since it was last reset)."""

    active: int  # MLX: in arrays
    peak: int  # MLX
    cache: int  # MLX: freed and kept for the next array
    resident: int | None  # the process; None where the system does not tell
    peak_resident: int


def sample_memory() -> Memory:
    """The memory held now; costs some microseconds."""
    mlx = sys.modules.get("mlx.core")
    peak_resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if sys.platform != "darwin":
        peak_resident *= 1024
    resident = resident_bytes()
    return Memory(
        active=mlx.get_active_memory() if mlx else 0,
        peak=mlx.get_peak_memory() if mlx else 0,
        cache=mlx.get_cache_memory() if mlx else 0,
        resident=resident,
        # Linux keeps the peak lazily: a page fault later than the size itself.
        peak_resident=max(peak_resident, resident or 0),
    )


def resident_bytes() -> int | None:
    """Bytes of this process that lie in physical memory, or None where the system does not tell."""
    if sys.platform == "darwin":
        return _resident_on_macos(os.getpid())
    try:
        pages = Path("/proc/self/statm").read_text().split()[1]
    except (OSError, IndexError):
        return None
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def peak_resident_bytes() -> int:
    """The most bytes of this process that lay in physical memory at once; on Linux of this program alone.

    There `ru_maxrss`, which is a hundred times as fast to read, begins with what the parent process had.
    """
    status = read_status()
    if not status:
        return sample_memory().peak_resident
    return max(status.get("VmHWM", 0), resident_bytes() or 0)


def read_status(process: int | str = "self") -> dict[str, int]:
    """The sizes that Linux tells of a process by their names, in bytes; empty elsewhere, and for one that is gone."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return {}
    rows = (line.split() for line in lines if line.endswith(" kB"))
    return {row[0].rstrip(":"): 1024 * int(row[1]) for row in rows}


def _resident_on_macos(process: int) -> int | None:
    """From libproc's proc_pid_rusage, flavour 0. Written from its header; it has not run on an Apple machine."""
    try:
        library = ctypes.CDLL("/usr/lib/libproc.dylib")
    except OSError:
        return None
    return _read_rusage(library, process)


def _read_rusage(library: ctypes.CDLL, process: int) -> int | None:
    buffer = ctypes.create_string_buffer(_RUSAGE_INFO_V0_BYTES)
    if library.proc_pid_rusage(process, 0, buffer) != 0:
        return None
    return int.from_bytes(buffer.raw[_RESIDENT_AT : _RESIDENT_AT + 8], sys.byteorder)
