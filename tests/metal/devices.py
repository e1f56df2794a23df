"""Where the kernel tests run: emulated devices with all checks on, under two schedules, and one that counts."""

from collections.abc import Callable, Iterable
from typing import Any

import mlx.core as mx
import numpy as np

from metal_emulator import Device
from mlx_edge.ops import metal_launch as launch

CHECKED = tuple(Device(mode="check", order=order) for order in (0, 1))


def bits(array: mx.array) -> np.ndarray:
    """The array's bytes as unsigned integers of its shape, so that equal means equal bits."""
    unsigned = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32}[array.dtype.size]
    return np.array(array.view(unsigned))


def count_reads(call: Callable[[], Any], buffers: tuple[str, ...]) -> float:
    """Lines of the buffers so named that threadgroups read, over one reading of them; `call` launches once."""
    device = Device(mode="count")
    with launch.on(device):
        call()
    (run,) = device.launches
    found = [b for name, b in run.counts.buffers.items() if name.startswith(buffers)]
    return sum(b.reads.group_bytes for b in found) / sum(b.size_bytes for b in found)


def run_checked(call: Callable[[], Any], devices: Iterable[Any] = CHECKED) -> Any:
    """What `call` returns (an array or several) in check mode; a schedule may not change a bit of it."""
    results = []
    for device in devices:
        with launch.on(device):
            results.append(call())
    first, *others = [[r] if isinstance(r, mx.array) else list(r) for r in results]
    for other in others:
        for expected, found in zip(first, other, strict=True):
            np.testing.assert_array_equal(
                bits(found), bits(expected), err_msg="the schedule decides a result"
            )
    return results[0]
