"""What this process runs on: the device, the dtype to compute in, and the memory it took."""

import sys
from importlib.resources import files

import mlx.core as mx


def has_gpu() -> bool:
    """Whether MLX's default device is a GPU."""
    return mx.default_device().type == mx.DeviceType.gpu


def compute_dtype(stored: mx.Dtype) -> mx.Dtype:
    """The dtype to hold a float weight in.

    A GPU takes it as stored. MLX's CPU backend is several times slower in half and bfloat than in float32,
    and sums in the storage type (1 to 14 % off), so there every float weight becomes float32.
    """
    return stored if has_gpu() else mx.float32


def convert_float(array: mx.array) -> mx.array:
    """The array in the dtype that this machine computes in."""
    return array.astype(compute_dtype(array.dtype))


def missing_native_part() -> str | None:
    """What this installation lacks because it was built without a compiler, or None. macOS needs no native part."""
    if sys.platform == "darwin":
        return None
    try:
        files("mlx_edge._native")
    except ModuleNotFoundError:
        return (
            "mlx_edge was installed without its native CPU part (no C++ compiler, or its build failed); "
            "it runs on plain MLX ops. Install g++ and cmake, then install mlx_edge again"
        )
    return None


def peak_memory_gb() -> float:
    """The most memory that MLX held at once in this process, in 10^9 bytes."""
    return mx.get_peak_memory() / 1e9
