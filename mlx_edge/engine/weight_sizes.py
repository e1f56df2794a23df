"""What the weights of a model folder will take, from the headers of its files alone.

Two figures: bytes that stay pages of a file, which the system may drop and read again and several processes share, and
bytes of the process's own. Mirrors what `models/assembly.py` and `models/packing.py` do with each tensor, without
reading one. Knows no caches and no machine.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from mlx_edge.engine.kv_sizes import round_up
from mlx_edge.models.config import ModelConfig
from mlx_edge.models.quantization import Quantization
from mlx_edge.quant import Packing
from mlx_edge.weights import Checkpoint
from mlx_edge.weights.dtypes import ELEMENT_TYPES
from mlx_edge.weights.header import TensorEntry
from mlx_edge.weights.mapping import why_copy

Backend = Literal["cpu", "metal", "plain"]  # the CPU kernels, Metal, MLX's own ops on a CPU
FLOATS = ("F32", "F16", "BF16")
ROWS = 16  # in a block of a packed matrix: cpu_kernels/matrix.h
PART = 64  # bytes to which a part of a pack file is rounded up


@dataclass(frozen=True)
class WeightSizes:
    """Bytes of all weights once they are loaded."""

    mapped: int  # pages of files: the checkpoint's, or those of the weights repacked for a CPU
    private: int  # the process's own

    def __add__(self, other: "WeightSizes") -> "WeightSizes":
        return WeightSizes(self.mapped + other.mapped, self.private + other.private)


def measure_weights(
    checkpoint: Checkpoint,
    config: ModelConfig,
    backend: Backend,
    *,
    use_mmap: bool = True,
    can_adopt: bool = True,
    can_keep_pack: bool = True,
) -> WeightSizes:
    """What loading this checkpoint takes on a backend.

    `can_adopt`: whether MLX can use mapped pages here; `can_keep_pack`: whether the repacked weights may lie in a file.
    """
    sizes = WeightSizes(0, 0)
    packed: set[str] = set()
    if backend == "cpu":
        packed = set(find_packed(checkpoint, config.quantization))
        total = sum(_packed_bytes(checkpoint, config.quantization, name) for name in packed)
        is_file = use_mmap and can_keep_pack
        sizes += WeightSizes(total * is_file, total * (not is_file))
    for entry in _used(checkpoint, config, packed):
        is_matrix = backend == "cpu" and _is_float_matrix(entry)
        if is_matrix:  # used as it lies in the file
            is_view = use_mmap and entry.begin % ELEMENT_TYPES[entry.dtype].size == 0
        else:
            is_view = use_mmap and can_adopt and why_copy(entry) is None
        becomes_float32 = not is_matrix and backend != "metal" and entry.dtype in ("F16", "BF16")
        if becomes_float32:
            sizes += WeightSizes(0, entry.num_bytes * 2)
        else:
            sizes += WeightSizes(entry.num_bytes * is_view, entry.num_bytes * (not is_view))
    return sizes


def find_packed(checkpoint: Checkpoint, quantization: Quantization) -> list[str]:
    """The layers whose weights are repacked for the CPU kernels."""
    names = checkpoint.names()
    bases = (name.removesuffix(".scales") for name in names if name.endswith(".scales"))
    return [
        base
        for base in bases
        if f"{base}.weight" in names
        and base not in quantization.input_scales
        and is_packable(quantization.packing(base), checkpoint.entry(f"{base}.weight"))
    ]


def is_packable(packing: Packing | None, weight: TensorEntry) -> bool:
    """Whether the CPU kernels have a layout for this weight: `refuse` in cpu_kernels/matrix.cpp."""
    if packing is None or weight.dtype != "U32" or len(weight.shape) != 2:
        return False
    if packing.mode == "mxfp4":
        return True
    return (
        packing.mode == "affine"
        and packing.bits in (2, 3, 4, 5, 6, 8)
        and packing.group_size in (32, 64, 128)
        and weight.shape[1] * 32 // packing.bits % packing.group_size == 0
    )


def packed_matrix_bytes(rows: int, columns: int, packing: Packing, scale_bytes: int) -> int:
    """A packed matrix: blocks of 16 rows, each a run of groups: codes, then scales, then offsets."""
    codes = ROWS * packing.group_size * packing.bits // 8
    scales = ROWS if packing.mode == "mxfp4" else 2 * ROWS * scale_bytes
    return -(-rows // ROWS) * (columns // packing.group_size) * (codes + scales)


def _packed_bytes(checkpoint: Checkpoint, quantization: Quantization, name: str) -> int:
    packing = quantization.packing(name)
    assert packing is not None
    weight, scales = (checkpoint.entry(f"{name}.{part}") for part in ("weight", "scales"))
    rows, words = weight.shape
    scale_bytes = ELEMENT_TYPES[scales.dtype].size
    return round_up(
        packed_matrix_bytes(rows, words * 32 // packing.bits, packing, scale_bytes), PART
    )


def _is_float_matrix(entry: TensorEntry) -> bool:
    """A weight that was never packed; scales and offsets have other names."""
    return entry.name.endswith(".weight") and len(entry.shape) == 2 and entry.dtype in FLOATS


def _used(checkpoint: Checkpoint, config: ModelConfig, packed: set[str]) -> Iterable[TensorEntry]:
    """The tensors that the model holds itself: not those that were repacked, nor what it leaves alone."""
    ignored = config.family.ignored_suffixes
    tied_head = f"{config.family.head}." if config.is_tied else None
    for name in checkpoint.names():
        base, _, part = name.rpartition(".")
        if base in packed and part in ("weight", "scales", "biases"):
            continue
        if name.endswith(ignored) or (tied_head is not None and name.startswith(tied_head)):
            continue
        yield checkpoint.entry(name)
