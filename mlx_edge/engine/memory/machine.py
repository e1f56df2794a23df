"""How much memory a machine has for a model: this one, or an Apple machine that is not at hand.

Reads what the system tells and changes nothing: macOS's limit of wired memory is never raised. Imports MLX only to ask
a GPU. Sizes are in bytes.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from mlx_edge.errors import HardwareNotSupportedError
from mlx_edge.profiler.memory import peak_resident_bytes, read_status, resident_bytes

SHARE = 0.75  # of what there is; the rest is for the system and everybody else
GIB = 1 << 30
_CGROUP = Path("/sys/fs/cgroup")

# Memory that Apple sells with each chip, in GB of 2^30 bytes (its technical specifications).
CHIPS = {
    "M1": (8, 16),
    "M1 Pro": (16, 32),
    "M1 Max": (32, 64),
    "M1 Ultra": (64, 128),
    "M2": (8, 16, 24),
    "M2 Pro": (16, 32),
    "M2 Max": (32, 64, 96),
    "M2 Ultra": (64, 128, 192),
    "M3": (8, 16, 24),
    "M3 Pro": (18, 36),
    "M3 Max": (36, 48, 64, 96, 128),
    "M3 Ultra": (96, 256, 512),
    "M4": (16, 24, 32),
    "M4 Pro": (24, 48, 64),
    "M4 Max": (36, 48, 64, 128),
    "M5": (16, 24, 32),
    "M5 Pro": (24, 48, 64),
    "M5 Max": (36, 48, 64, 128),
}


@dataclass(frozen=True)
class Machine:
    """A machine, and how much of its memory a model may take."""

    name: str
    memory_bytes: int
    usable_bytes: int
    is_estimate: bool  # not measured here
    has_gpu: bool


def this_machine() -> Machine:
    """The machine that this runs on."""
    memory = memory_limit()
    usable = default_budget_bytes()
    return Machine("this machine", memory, usable, is_estimate=False, has_gpu=_has_gpu())


def find_machine(text: str) -> Machine:
    """An Apple machine by chip and memory: "M4 Max 64 GB", "m2 16gb"; without memory the chip's smallest.

    What it may take is an estimate of Metal's recommendedMaxWorkingSetSize, as people report it: 10.67 of 16 GiB
    (llama-cpp-python issue 687, exo pull request 1672), 48 of 64 GiB (llama.cpp issue 1870). Newer systems allow more
    (107.5 of 128 GiB: ds4 pull request 893), which is not counted on.

    Raises: HardwareNotSupportedError for a chip or a size that is not known.
    """
    match = re.fullmatch(
        r"\s*(?:apple\s+)?(m\d+(?:\s+[a-z]+)?)(?:[\s,/-]+(\d+)\s*(?:gi?b)?)?\s*",
        text,
        re.IGNORECASE,
    )
    chip = " ".join(match[1].title().split()) if match else ""
    if match is None or chip not in CHIPS:
        raise HardwareNotSupportedError(
            f"machine {text!r} is not known; expected a chip and its memory, as in 'M4 Max 64 GB'; "
            f"chips are {', '.join(CHIPS)}"
        )
    sizes = CHIPS[chip]
    size = int(match[2] or sizes[0])
    if size not in sizes:
        raise HardwareNotSupportedError(
            f"machine {text!r}: {chip} comes with {', '.join(map(str, sizes))} GB, not {size}"
        )
    usable = size * GIB * 2 // 3 if size <= 36 else size * GIB * 3 // 4
    return Machine(f"Apple {chip}, {size} GB", size * GIB, usable, is_estimate=True, has_gpu=True)


def default_budget_bytes() -> int:
    """What an engine may take on this machine unless it is told.

    With a GPU what MLX recommends; else three quarters of the memory that this process may use, and never more than is
    free now beside what the process holds already.
    """
    if _has_gpu():
        recommended = _recommended_working_set()
        if recommended:
            return recommended
    budget = int(SHARE * memory_limit())
    free = _free_bytes()
    return budget if free is None else min(budget, free + (resident_bytes() or 0))


def memory_limit(cgroup: Path = _CGROUP) -> int:
    """Physical memory, or less where a container (cgroup version 1 or 2) allows less."""
    return min([_physical_bytes(), *_cgroup_limits(cgroup)])


def private_bytes() -> int:
    """Memory of this process that is not pages of files; on macOS all that is resident."""
    return read_status().get("RssAnon") or resident_bytes() or 0


def peak_private_bytes() -> int:
    """The most that `private_bytes` has been, if no page of a file was dropped since."""
    found = read_status()
    if "VmHWM" not in found or "RssAnon" not in found:
        return peak_resident_bytes()
    files = found.get("RssFile", 0) + found.get("RssShmem", 0)
    return max(found["VmHWM"] - files, found["RssAnon"])


def _physical_bytes() -> int:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):  # not every system counts its pages
        import mlx.core as mx

        info = mx.device_info()
        return int(info.get("memory_size") or info.get("total_memory") or 0)


def _cgroup_limits(cgroup: Path) -> list[int]:
    """Limits that hold for this process: version 2 has one on each folder from its own up to the root."""
    try:
        own = [line.split(":", 2)[2] for line in Path("/proc/self/cgroup").read_text().splitlines()]
    except (OSError, IndexError):
        own = []
    folders = {cgroup, cgroup / "memory"}
    for path in own:
        for root in (cgroup, cgroup / "memory"):
            folder = root / path.strip("/")
            folders |= {folder, *(up for up in folder.parents if up.is_relative_to(root))}
    limits = []
    for folder in folders:
        for name in ("memory.max", "memory.limit_in_bytes"):
            try:
                text = (folder / name).read_text().strip()
            except OSError:
                continue
            if text.isdigit():  # "max" is no limit; version 1 says so with a huge number
                limits.append(int(text))
    return limits


def _free_bytes() -> int | None:
    """Memory that could be had now without swapping; None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = (line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    return next((1024 * int(value) for value in found), None)


def _has_gpu() -> bool:
    from mlx_edge.runtime import has_gpu

    return has_gpu()


def _recommended_working_set() -> int:
    import mlx.core as mx

    return int(mx.device_info().get("max_recommended_working_set_size", 0))
