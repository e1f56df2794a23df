"""The element types that a safetensors file may hold, said once for header, reader and writer.

Knows spellings and sizes. Deliberately knows no file, no tensor, and nothing about quantized
formats: a quantized weight is a U32 tensor here, like any other.
"""

from dataclasses import dataclass
from types import MappingProxyType

import mlx.core as mx


@dataclass(frozen=True)
class ElementType:
    """One element type in both spellings that meet when a file becomes arrays."""

    name: str
    mlx: mx.Dtype

    @property
    def size(self) -> int:
        """Bytes of one element."""
        return self.mlx.size


ELEMENT_TYPES = MappingProxyType(
    {
        element.name: element
        for element in (
            ElementType("F64", mx.float64),
            ElementType("F32", mx.float32),
            ElementType("F16", mx.float16),
            ElementType("BF16", mx.bfloat16),
            ElementType("I64", mx.int64),
            ElementType("I32", mx.int32),
            ElementType("I16", mx.int16),
            ElementType("I8", mx.int8),
            ElementType("U64", mx.uint64),
            ElementType("U32", mx.uint32),
            ElementType("U16", mx.uint16),
            ElementType("U8", mx.uint8),
            ElementType("BOOL", mx.bool_),
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
