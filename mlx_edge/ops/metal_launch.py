"""How a kernel of `metal_kernels/` reaches a device: its source, its launch, and where the launch goes.

A device is whatever makes kernels as `mx.fast.metal_kernel` does: MLX on a Mac, the emulator elsewhere. MLX hashes a
kernel's text at every call, so the text is stripped of comments and kept under SOURCE_BYTES. Knows no op and no shape.
"""

import re
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx

SOURCE_BYTES = 8192  # of a kernel's header: MLX hashes it at each of some hundred calls per token
Template = Sequence[tuple[str, int | bool | mx.Dtype]]
Size = tuple[int, int, int]

_INCLUDE = re.compile(r'^\s*#include "(\w+\.metal)"\s*$', re.MULTILINE)
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
# Spaces that no token needs: beside punctuation, and around a sum whose two sides are words or brackets.
_SPACE = re.compile(r"\s*([*/%<>=!|?:;,(){}\[\]^~])\s*")
_SUM_SPACE = re.compile(r"(?<=[\w)\]])\s+([-+]|&&?)\s+(?=[\w(])")


class Device(Protocol):
    """What makes kernels; `mx.fast` is one."""

    def metal_kernel(self, **arguments: Any) -> Callable[..., list[mx.array]]:
        """As `mx.fast.metal_kernel`."""
        ...


_device: ContextVar[Device | None] = ContextVar("mlx_edge_metal_device", default=None)


@contextmanager
def on(device: Device) -> Iterator[None]:
    """Launch all kernels inside on this device."""
    token = _device.set(device)
    try:
        yield
    finally:
        _device.reset(token)


@dataclass(frozen=True)
class Kernel:
    """A kernel of one family's file: its buffers by name, and the call that is its body."""

    name: str
    file: str  # in metal_kernels/
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    body: str  # MSL; attributes such as thread_index_in_simdgroup are known by name

    def __call__(
        self,
        inputs: Sequence[mx.array],
        *,
        template: Template,
        grid: Size,
        threadgroup: Size,
        shapes: Sequence[tuple[int, ...]],
        dtypes: Sequence[mx.Dtype],
    ) -> list[mx.array]:
        """Launch it: `grid` counts threads, as in MLX; outputs have these shapes and dtypes."""
        device: Any = _device.get()
        outputs: list[mx.array] = _made(self, device)(
            inputs=list(inputs),
            template=list(template),
            grid=grid,
            threadgroup=threadgroup,
            output_shapes=list(shapes),
            output_dtypes=list(dtypes),
        )
        return outputs


@cache
def _made(kernel: Kernel, device: Hashable) -> Callable[..., Any]:
    maker: Any = device or mx.fast
    made: Callable[..., Any] = maker.metal_kernel(
        name=kernel.name,
        input_names=list(kernel.inputs),
        output_names=list(kernel.outputs),
        source=kernel.body,
        header=read_source(kernel.file),
    )
    return made


@cache
def read_source(file: str) -> str:
    """A family's text with what it includes, once each, without comments, blank lines and most spaces."""
    seen: set[str] = set()

    def flatten(name: str) -> str:
        if name in seen:
            return ""
        seen.add(name)
        text = _folder().joinpath(name).read_text(encoding="utf-8")
        return _INCLUDE.sub(lambda match: flatten(match[1]), text)

    lines = (_tighten(line.strip()) for line in _COMMENT.sub("", flatten(file)).splitlines())
    return "\n".join(line for line in lines if line) + "\n"


def _tighten(line: str) -> str:
    return line if line.startswith("#") else _SUM_SPACE.sub(r"\1", _SPACE.sub(r"\1", line))


def _folder() -> Any:
    """Where the sources are: beside the package in a checkout, inside it when installed."""
    checkout = Path(__file__).parents[2] / "metal_kernels"
    return checkout if checkout.is_dir() else files("mlx_edge").joinpath("_metal")
