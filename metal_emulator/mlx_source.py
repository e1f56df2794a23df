"""MLX's own Metal kernels, from the headers in the installed package: compiled once, launched on MLX arrays.

Anything that these use compiles on Metal by definition, so they are the emulator's corpus; and other kernels are
compared with them. The host code that chooses kernels and grids is not in the package: it is followed from MLX's
repository (version 0.32), in `mlx_products.py` and `mlx_attention.py`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import mlx.core as mx
import numpy as np

from metal_emulator.arrays import Array, numpy_dtype, to_mlx, to_numpy
from metal_emulator.device import MLX_INCLUDE, SKIPPED, Launch
from metal_emulator.kernel import Kernel, Size, Undefined, compile_kernel

TYPES = {mx.float16: "half", mx.bfloat16: "bfloat", mx.float32: "float"}
_HEADERS = "mlx/backend/metal/kernels"


@dataclass(frozen=True)
class How:
    """How MLX's kernels are run: the emulator's mode and order."""

    mode: str = "check"
    order: int = 0


@dataclass(frozen=True)
class Chip:
    """An Apple GPU as MLX tells them apart.

    Generation 13 is M1, 14 M2, 15 M3, 16 M4, 17 M5; size "g" is plain or Pro, "s" Max, "d" Ultra.
    """

    generation: int = 13
    size: str = "g"


@dataclass(frozen=True)
class Result:
    """What a call of MLX gives, and the launches that it takes."""

    y: mx.array
    launches: tuple[Launch, ...]


@dataclass(frozen=True)
class MLXKernel:
    """A kernel of MLX: the headers that its library is made of, its name and template arguments."""

    headers: tuple[str, ...]
    name: str
    template: str
    constants: tuple[tuple[int, bool | int], ...] = ()


@lru_cache(maxsize=256)
def _compiled(kernel: MLXKernel, mode: str) -> Kernel:
    text = "".join(f'#include "{_HEADERS}/{header}"\n' for header in kernel.headers)
    return compile_kernel(
        text,
        kernel.name,
        kernel.template,
        dict(kernel.constants),
        mode,
        file=f"{kernel.name}.metal",
        folders=[MLX_INCLUDE],
        skip=SKIPPED,
    )


def launch(
    how: How,
    kernel: MLXKernel,
    inputs: Mapping[str, mx.array | Array],
    outputs: Mapping[str, tuple[Sequence[int], mx.Dtype]],
    groups: Size,
    threadgroup: Size,
    *,
    same_value_ok: bool = False,
) -> tuple[dict[str, mx.array], Launch]:
    """Run it over `groups` threadgroups. Raises MetalError for what the mode finds."""
    arrays = {n: a for n, a in inputs.items() if isinstance(a, mx.array)}
    mx.eval(list(arrays.values()))
    buffers = {n: to_numpy(a) if isinstance(a, mx.array) else a for n, a in inputs.items()}
    undefined = {
        n: Undefined(tuple(shape), numpy_dtype(dtype)) for n, (shape, dtype) in outputs.items()
    }
    grid = (groups[0] * threadgroup[0], groups[1] * threadgroup[1], groups[2] * threadgroup[2])
    run = _compiled(kernel, how.mode).run(
        buffers, undefined, grid, threadgroup, order=how.order, same_value_ok=same_value_ok
    )
    made = {n: to_mlx(run.outputs[n], dtype) for n, (_, dtype) in outputs.items()}
    return made, Launch(kernel.name, grid, threadgroup, run.counts)


def int32(value: int) -> Array:
    """A `constant int&`."""
    return np.array([value], np.int32)


def uint64(value: int) -> Array:
    """A `constant size_t&`."""
    return np.array([value], np.uint64)


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)
