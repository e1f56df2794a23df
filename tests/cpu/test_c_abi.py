"""The products through the plain C interface, called with no MLX array in sight, against float64."""

import ctypes
from typing import Any

import numpy as np
import pytest

from mlx_edge.ops import cpu

lacking = cpu.missing()
pytestmark = pytest.mark.skipif(lacking is not None, reason=f"no CPU kernels: {lacking}")
AFFINE, MXFP4, DENSE = range(3)
INT8, FLOAT = range(2)


class Matrix(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int)
        for name in ("format", "rows", "columns", "bits", "group_size", "float_type")
    ]


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    found = ctypes.CDLL(cpu.extension().__file__)
    found.mlx_edge_instruction_set.restype = ctypes.c_char_p
    found.mlx_edge_refusal.restype = ctypes.c_char_p
    found.mlx_edge_packed_bytes.restype = ctypes.c_size_t
    return found


def pointer(array: Any) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


@pytest.mark.parametrize(("precision", "tolerance"), [(FLOAT, 1e-5), (INT8, 2e-2)])
@pytest.mark.parametrize("num_rows", [1, 5, 40])
def test_packed_products(
    library: ctypes.CDLL, num_rows: int, precision: int, tolerance: float
) -> None:
    rows, columns, group = 37, 256, 64
    random = np.random.default_rng(3)
    codes = random.integers(0, 16, (rows, columns), dtype=np.uint32)
    packs = (codes.reshape(rows, -1, 8) << np.arange(0, 32, 4, dtype=np.uint32)).sum(
        -1, dtype=np.uint32
    )
    scales, offsets = random.normal(size=(2, rows, columns // group)).astype(np.float32)
    bias, x = (random.normal(size=n).astype(np.float32) for n in ((rows,), (num_rows, columns)))
    sizes = ctypes.byref(Matrix(AFFINE, rows, columns, 4, group, 0))
    assert library.mlx_edge_refusal(sizes) is None
    packed = np.zeros(library.mlx_edge_packed_bytes(sizes), np.uint8)
    library.mlx_edge_pack(sizes, *map(pointer, (packs, scales, offsets, packed)))
    y = np.empty((num_rows, rows), np.float32)
    library.mlx_edge_linear(
        sizes, pointer(packed), pointer(bias), precision, pointer(x), pointer(y), num_rows
    )
    values = codes.reshape(rows, -1, group) * scales[..., None].astype(np.float64)
    weight = (values + offsets[..., None]).reshape(rows, columns)
    wanted = x.astype(np.float64) @ weight.T + bias
    assert np.abs(y - wanted).max() <= tolerance * np.abs(wanted).max()


def test_dense_products(library: ctypes.CDLL) -> None:
    random = np.random.default_rng(4)
    weight, x = (random.normal(size=n).astype(np.float16) for n in ((9, 33), (3, 33)))
    x = x.astype(np.float32)
    y = np.empty((3, 9), np.float32)
    sizes = ctypes.byref(Matrix(DENSE, 9, 33, 0, 0, 1))
    assert library.mlx_edge_packed_bytes(sizes) == weight.nbytes
    library.mlx_edge_linear(sizes, pointer(weight), None, FLOAT, pointer(x), pointer(y), 3)
    wanted = x.astype(np.float64) @ weight.astype(np.float64).T
    assert np.abs(y - wanted).max() <= 1e-6 * np.abs(wanted).max()


def test_what_does_not_fit_is_told(library: ctypes.CDLL) -> None:
    assert library.mlx_edge_instruction_set().decode() == cpu.extension().instruction_set()
    for sizes in (
        Matrix(AFFINE, 4, 100, 4, 64, 0),
        Matrix(AFFINE, 4, 128, 7, 64, 0),
        Matrix(AFFINE, 4, 128, 4, 48, 0),
        Matrix(MXFP4, 4, 128, 4, 64, 0),
    ):
        assert library.mlx_edge_refusal(ctypes.byref(sizes))
