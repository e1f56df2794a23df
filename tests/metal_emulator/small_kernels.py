"""Kernels of a few lines for the emulator's tests: a text, an expression in each lane, a body with one bug.

Knows nothing of what they show.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from metal_emulator import MetalError, Undefined, compile_kernel

Array = npt.NDArray[Any]

HEAD = "#include <metal_stdlib>\nusing namespace metal;\n"
LANES = np.arange(32)
MODES = ("fast", "check")
PARAMETERS = """(const device float* x, device float* o, uint t [[thread_index_in_threadgroup]],
    uint i [[thread_position_in_grid]], uint lane [[thread_index_in_simdgroup]],
    uint s [[simdgroup_index_in_threadgroup]], uint g [[threadgroup_position_in_grid]])"""
X = np.arange(128, dtype=np.float32)


def run_text(
    text: str,
    inputs: Mapping[str, Array],
    outputs: Mapping[str, Array | Undefined],
    *,
    threads: int = 32,
    template: str = "",
    mode: str = "check",
    order: int = 0,
) -> dict[str, Array]:
    """The outputs of one threadgroup of kernel `k`."""
    kernel = compile_kernel(HEAD + text, "k", template, mode=mode)
    return kernel.run(inputs, outputs, (threads, 1, 1), (threads, 1, 1), order=order).outputs


def evaluate(
    expressions: list[str],
    inputs: Mapping[str, Array],
    result: str,
    dtype: npt.DTypeLike,
    **how: Any,
) -> Array:
    """Each expression in each of 32 lanes, (expressions, 32); `x` is an input, `vx` its element of the lane."""
    types = {
        "float32": "float", "float16": "half", "int32": "int", "uint32": "uint", "uint16": "bfloat",
        "uint8": "uchar", "int16": "short",
    }  # fmt: skip
    parameters = "".join(f"const device {types[a.dtype.name]}* {n}, " for n, a in inputs.items())
    elements = "".join(f"auto v{n} = {n}[lane]; (void)v{n}; " for n in inputs)
    stores = "\n".join(f"  o[{32 * i} + lane] = {e};" for i, e in enumerate(expressions))
    text = (
        f"[[kernel]] void k({parameters}device {result}* o, uint lane [[thread_index_in_simdgroup]]) "
        f"{{\n{elements}\n{stores}\n}}"
    )
    made = run_text(text, inputs, {"o": Undefined((len(expressions), 32), dtype)}, **how)
    return made["o"]


def bfloats(values: Array) -> Array:
    """float32 rounded to bfloat16, ties to even, as uint16."""
    bits = np.asarray(values, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bfloats(bits: Array) -> Array:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def run_body(
    body: str,
    *,
    mode: str = "check",
    threads: int = 128,
    group: int = 64,
    x: Array = X,
    o: Array | Undefined | None = None,
    head: str = "",
    **how: Any,
) -> Array:
    """Output `o` of `body`, over two threadgroups of two simdgroups."""
    text = f"{HEAD}{head}[[kernel]] void k{PARAMETERS} {{\n{body}\n}}\n"
    kernel = compile_kernel(text, "k", mode=mode)
    output = Undefined((128,), np.float32) if o is None else o
    return kernel.run({"x": x}, {"o": output}, (threads, 1, 1), (group, 1, 1), **how).outputs["o"]


def find(body: str, kind: str, *words: str, **how: Any) -> MetalError:
    """The finding that `body` gives, of this kind, with these words, at the line that is marked."""
    with pytest.raises(MetalError) as caught:
        run_body(body, **how)
    found = caught.value
    assert found.kind == kind, str(found)
    for word in words:
        assert word in str(found)
    marked = [n for n, line in enumerate(body.split("\n")) if "// here" in line]
    if marked and found.line:  # a sanitizer's trap may have lost its line
        assert found.line == len((HEAD + PARAMETERS).split("\n")) + 1 + marked[0], str(found)
    return found
