"""Safetensors files made by hand, sound and broken, for the tests of this folder."""

import json
import struct
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

SHAPES = [(), (1,), (0,), (3, 0, 2), (5,), (7, 3), (2, 3, 5), (16, 64)]


def pack(header: Any, data: bytes = b"") -> bytes:
    """The bytes of a file: `header` is a table, or raw bytes that stand in its place."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def item(dtype: Any, shape: Any, offsets: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def save(path: Path, header: Any, data: bytes = b"") -> Path:
    path.write_bytes(pack(header, data))
    return path


def random_array(dtype: mx.Dtype, shape: tuple[int, ...], *, seed: int = 0) -> mx.array:
    """Random bits of a type, so that NaNs, denormals and extremes are among them."""
    rng = np.random.default_rng(seed)
    if dtype == mx.bool_:
        return mx.array(rng.integers(0, 2, shape).astype(np.bool_))
    unsigned = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}[dtype.size]
    bits = rng.integers(0, np.iinfo(unsigned).max, shape, dtype=unsigned, endpoint=True)
    return mx.array(np.asarray(bits)).view(dtype)


def bits_of(array: mx.array) -> tuple[Any, ...]:
    """Type, shape and bytes of an array: equal if and only if the arrays are, NaNs included."""
    unsigned = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}[array.dtype.size]
    seen = array if array.dtype == mx.bool_ else array.view(unsigned)
    return str(array.dtype), array.shape, np.asarray(seen).tobytes()


def same(left: mx.array, right: mx.array) -> bool:
    return bits_of(left) == bits_of(right)
