"""The element types that a safetensors file may hold, said once for header, reader and writer.

Knows spellings and sizes. Deliberately knows no file, no tensor, and nothing about quantized
formats: a quantized weight is a U32 tensor here, like any other.
"""

from dataclasses import dataclass
from types import MappingProxyType

import mlx.core as mx
import numpy as np
from numpy.typing import DTypeLike


@dataclass(frozen=True)
class ElementType:
    """One element type in the three spellings that meet when a file becomes arrays.

    `numpy` is the type that the bytes are looked at through: it has the same size, and differs from
    `mlx` where numpy has no such type (bfloat16 travels as uint16).
    """

    name: str
    mlx: mx.Dtype
    numpy: DTypeLike

    @property
    def size(self) -> int:
        """Bytes of one element."""
        return np.dtype(self.numpy).itemsize


ELEMENT_TYPES = MappingProxyType(
    {
        element.name: element
        for element in (
            ElementType("F64", mx.float64, np.float64),
            ElementType("F32", mx.float32, np.float32),
            ElementType("F16", mx.float16, np.float16),
            ElementType("BF16", mx.bfloat16, np.uint16),
            ElementType("I64", mx.int64, np.int64),
            ElementType("I32", mx.int32, np.int32),
            ElementType("I16", mx.int16, np.int16),
            ElementType("I8", mx.int8, np.int8),
            ElementType("U64", mx.uint64, np.uint64),
            ElementType("U32", mx.uint32, np.uint32),
            ElementType("U16", mx.uint16, np.uint16),
            ElementType("U8", mx.uint8, np.uint8),
            ElementType("BOOL", mx.bool_, np.bool_),
        )
    }
)
"""Safetensors spelling -> element type; everything that this package reads."""

UNSUPPORTED_TYPES = frozenset(
    {
        "F8_E4M3",
        "F8_E5M2",
        "F8_E8M0",
        "F8_E4M3FNUZ",
        "F8_E5M2FNUZ",
        "F6_E2M3",
        "F6_E3M2",
        "F4",
        "C64",
    }
)
"""Types of the format that this runtime has no arrays for: refused as such, not as unknown."""
