"""What this process runs on: the device, the dtype to compute in, the BLAS behind MLX, and the memory it took."""

import os
import sys
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import mlx.core as mx

OPENBLAS = "lib/libscipy_openblas.so"  # in the package scipy-openblas32


def own_version() -> str:
    """The version of this package."""
    # By name: the package must not be imported from inside while it is being set up.
    version: str = import_module("mlx_edge").__version__
    return version


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
    if find_spec("mlx_edge._native") is None:
        return (
            "mlx_edge was installed without its native CPU part (no C++ compiler, or its build failed); "
            "it runs on plain MLX ops. Install g++ and cmake, then install mlx_edge again"
        )
    return None


@cache
def connect_blas() -> str | None:
    """Let MLX's float32 and float64 products and its `mx.linalg` run in OpenBLAS; return why they do not, or None.

    MLX's Linux wheel brings the reference BLAS, which is tens of times slower and uses one core. It makes no difference
    whether MLX was imported or used before; bfloat16 and float16 products are MLX's own loops and stay slow.
    `MLX_EDGE_BLAS=mlx` leaves MLX as it is; so does an MLX that was built with another BLAS. macOS has Accelerate.
    """
    if sys.platform != "linux":
        return None
    if os.environ.get("MLX_EDGE_BLAS") == "mlx":
        return "MLX_EDGE_BLAS=mlx leaves MLX's own BLAS in place"
    lacking = missing_native_part()
    if lacking:
        return lacking
    # Found, not imported: importing would lay its symbols open to all libraries of the process.
    package = find_spec("scipy_openblas32")
    if package is None or package.origin is None:
        return "MLX uses the BLAS of its wheel, which is slow: pip install scipy-openblas32"
    try:
        native = import_module("mlx_edge._native._cpu")
    except ImportError as error:
        return f"MLX uses the BLAS of its wheel, which is slow: {error}"
    libmlx = Path(mx.__file__).parent / "lib" / "libmlx.so"
    reason: str = native.connect_blas(str(libmlx), str(Path(package.origin).parent / OPENBLAS))
    return reason or None


def peak_memory_gb() -> float:
    """The most memory that was held at once, in 10^9 bytes: MLX's on a GPU, else the whole process's.

    The CPU kernels' weights and caches are not MLX's; mapped pages that were read count as held.
    """
    if has_gpu():
        return mx.get_peak_memory() / 1e9
    from resource import RUSAGE_SELF, getrusage

    return getrusage(RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
