"""A device that makes kernels as `mx.fast.metal_kernel` does and runs them on this machine's processor.

The text that it compiles is the one that MLX generates; buffers are bound as MLX's Metal back end binds them (shapes,
strides, contiguous copies, `init_value`). The one module of the emulator that speaks MLX's arrays.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from metal_emulator.arrays import Array, numpy_dtype, to_mlx, to_numpy
from metal_emulator.compiler import MODES
from metal_emulator.counts import Counts
from metal_emulator.errors import MetalError
from metal_emulator.generated import generated_source
from metal_emulator.kernel import Kernel, Size, Undefined, compile_kernel

Template = Sequence[tuple[str, int | bool | mx.Dtype]]
MLX_INCLUDE = Path(mx.__file__).parent / "include"
SKIPPED = ("bf16_math.h",)  # mathematics of bfloat: the shim has it
_SMALL = 8  # inputs of fewer elements are `constant`
_MAX_THREADS = 1024
_PRELUDE = '#include "mlx/backend/metal/kernels/utils.h"\n'  # MLX puts it before every kernel


@dataclass(frozen=True)
class Launch:
    """One launch of a device; counts in count mode only."""

    name: str
    grid: Size
    threadgroup: Size
    counts: Counts | None = None


class Device:
    """An emulated GPU. `launches` lists what ran, in order."""

    def __init__(
        self, mode: str = "check", order: int = 0, unwritten_ok: Sequence[str] = ()
    ) -> None:
        """`mode` is "fast", "check" or "count"; `order` 1 runs lanes and groups in reverse.

        `unwritten_ok` names outputs of which a kernel may leave bytes unwritten.
        """
        if mode not in MODES:
            raise ValueError(f"mode {mode!r} is none of {', '.join(MODES)}")
        if order not in {0, 1}:
            raise ValueError(f"order {order!r} is neither 0 nor 1")
        self.mode, self.order, self.unwritten_ok = mode, order, tuple(unwritten_ok)
        self.launches: list[Launch] = []

    def metal_kernel(
        self,
        name: str,
        input_names: Sequence[str],
        output_names: Sequence[str],
        source: str,
        header: str = "",
        ensure_row_contiguous: bool = True,
        atomic_outputs: bool = False,
        compile_options: object = None,
    ) -> "EmulatedKernel":
        """As `mx.fast.metal_kernel`. `compile_options` change nothing here."""
        made: Any = mx.fast.metal_kernel(
            name=name,
            input_names=list(input_names),
            output_names=list(output_names),
            source=source,
            header=header,
            ensure_row_contiguous=ensure_row_contiguous,
            atomic_outputs=atomic_outputs,
        )
        names = _Names(name, tuple(input_names), tuple(output_names), source)
        return EmulatedKernel(self, made, names, ensure_row_contiguous=ensure_row_contiguous)


@dataclass(frozen=True)
class _Names:
    kernel: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    source: str

    def wants(self, name: str, what: str) -> bool:
        """Whether MLX passes `name_shape`, `name_strides` or `name_ndim`: where the source has these letters."""
        return f"{name}_{what}" in self.source


class EmulatedKernel:
    """What `Device.metal_kernel` gives: called as MLX's kernels are."""

    def __init__(
        self,
        device: Device,
        made: Callable[..., Any],
        names: _Names,
        *,
        ensure_row_contiguous: bool,
    ) -> None:
        self._device, self._made, self._names = device, made, names
        self._ensure_row_contiguous = ensure_row_contiguous
        self._compiled: dict[object, Kernel] = {}

    def __call__(
        self,
        *,
        inputs: Sequence[Any],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
        grid: Size,
        threadgroup: Size,
        template: Template = (),
        init_value: float | None = None,
        verbose: bool = False,
        stream: object = None,
    ) -> list[mx.array]:
        """Run it now and return its outputs. Raises MetalError for what the device's mode finds."""
        arrays = [given if isinstance(given, mx.array) else mx.array(given) for given in inputs]
        mx.eval(arrays)
        _check_launch(self._names.kernel, grid, threadgroup)
        kernel = self._kernel(
            arrays, output_shapes, output_dtypes, tuple(template or ()), verbose=verbose
        )
        outputs = {
            name: _empty(shape, dtype, init_value)
            for name, shape, dtype in zip(
                self._names.outputs, output_shapes, output_dtypes, strict=True
            )
        }
        device = self._device
        run = kernel.run(
            self._bind(arrays),
            outputs,
            grid,
            threadgroup,
            order=device.order,
            unwritten_ok=device.unwritten_ok,
        )
        device.launches.append(Launch(self._names.kernel, grid, threadgroup, run.counts))
        return [
            to_mlx(run.outputs[name], dtype)
            for name, dtype in zip(self._names.outputs, output_dtypes, strict=True)
        ]

    def _kernel(
        self,
        arrays: Sequence[mx.array],
        shapes: Sequence[Sequence[int]],
        dtypes: Sequence[mx.Dtype],
        template: Template,
        *,
        verbose: bool,
    ) -> Kernel:
        """The kernel for all that the generated text depends on: dtypes, small or scalar inputs, templates."""
        kinds = tuple((a.dtype, a.ndim == 0, a.size < _SMALL) for a in arrays)
        # 1 == True, but the one is an int template and the other a bool.
        key = (kinds, tuple(dtypes), len(shapes), tuple((n, type(v), v) for n, v in template))
        if verbose or key not in self._compiled:
            text = generated_source(
                self._made, arrays, output_shapes=shapes, output_dtypes=dtypes, template=template
            )
            if verbose:
                print(text)
            self._compiled[key] = compile_generated(self._names.kernel, text, self._device.mode)
        return self._compiled[key]

    def _bind(self, arrays: Sequence[mx.array]) -> dict[str, Array]:
        """Buffers by the names that the generated signature gives them."""
        bound: dict[str, Array] = {}
        for name, array in zip(self._names.inputs, arrays, strict=True):
            view = to_numpy(array)
            if self._ensure_row_contiguous:
                view = (
                    np.ascontiguousarray(view).reshape(view.shape)
                    if not view.flags.c_contiguous
                    else view
                )
            bound[name] = _span(name, view)
            if view.ndim:
                described: dict[str, Array] = {
                    "shape": np.array(view.shape, np.int32),
                    "strides": np.array([s // view.itemsize for s in view.strides], np.int64),
                    "ndim": np.array([view.ndim], np.int32),
                }
                bound |= {
                    f"{name}_{w}": v for w, v in described.items() if self._names.wants(name, w)
                }
        return bound


@lru_cache(maxsize=1024)
def compile_generated(name: str, text: str, mode: str) -> Kernel:
    """Compile a text that MLX has generated, after the header that MLX puts before every kernel."""
    host_names = [
        line.split('"')[1] for line in text.splitlines() if line.startswith("template [[host_name(")
    ]
    entry = host_names[-1] if host_names else text.rsplit("[[kernel]] void ", 1)[1].split("(", 1)[0]
    return compile_kernel(
        text,
        entry,
        mode=mode,
        file=f"{name}.metal",
        prelude=_PRELUDE,
        folders=[MLX_INCLUDE],
        skip=SKIPPED,
    )


def _check_launch(name: str, grid: Size, threadgroup: Size) -> None:
    threads = threadgroup[0] * threadgroup[1] * threadgroup[2]
    if not 0 < threads <= _MAX_THREADS or min(grid) < 0:
        message = (
            f"kernel {name}: threadgroup {tuple(threadgroup)} of grid {tuple(grid)}: "
            f"expected 1 to {_MAX_THREADS} threads in a threadgroup"
        )
        raise MetalError(message, kind="launch")


def _span(name: str, view: Array) -> Array:
    """The memory that a strided view reaches, as one row of elements."""
    if view.flags.c_contiguous:
        return view.reshape(-1)
    if min(view.strides) < 0:
        message = f"input {name!r} has negative strides; the emulator runs it with ensure_row_contiguous=True only"
        raise MetalError(message, kind="launch")
    elements = 1 + sum(
        (n - 1) * (s // view.itemsize) for n, s in zip(view.shape, view.strides, strict=True)
    )
    return np.lib.stride_tricks.as_strided(view, (elements if view.size else 0,), (view.itemsize,))


def _empty(shape: Sequence[int], dtype: mx.Dtype, init_value: float | None) -> Array | Undefined:
    if init_value is None:
        return Undefined(tuple(shape), numpy_dtype(dtype))
    filled = mx.full(tuple(shape), init_value).astype(dtype)
    mx.eval(filled)
    return np.array(to_numpy(filled))
