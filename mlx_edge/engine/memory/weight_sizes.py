"""What the weights of a model folder will take, from the headers of its files alone.

Two figures: bytes that stay pages of a file, which the system may drop and read again and several processes share, and
bytes of the process's own. Mirrors what `models/assembly.py` and `models/packing.py` do with each tensor, without
reading one. Knows no caches and no machine.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Literal

from mlx_edge.engine.memory.kv_sizes import round_up
from mlx_edge.models.assembly import find_splits
from mlx_edge.models.config import ModelConfig
from mlx_edge.models.tensors import find_prefix, stored_name
from mlx_edge.quant import Packing
from mlx_edge.weights import Checkpoint
from mlx_edge.weights.dtypes import ELEMENT_TYPES
from mlx_edge.weights.header import TensorEntry
from mlx_edge.weights.mapping import why_copy

Backend = Literal["cpu", "metal", "plain"]  # the CPU kernels, Metal, MLX's own ops on a CPU
FLOATS = ("F32", "F16", "BF16")
ROWS = 16  # in a block of a packed matrix: cpu_kernels/matrix.h
POSITIONS = "position_embedding.weight"
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
    prefix: str = "",
) -> WeightSizes:
    """What loading this checkpoint takes on a backend, or the part of it whose names begin with `prefix`.

    `can_adopt`: whether MLX can use mapped pages here; `can_keep_pack`: whether the repacked weights may lie in a file.
    """
    sizes = WeightSizes(0, 0)
    packed: set[str] = set()
    if backend == "cpu":
        packed = {name for name in find_packed(checkpoint, config) if name.startswith(prefix)}
        splits = find_splits(checkpoint, config)
        total = sum(_packed_bytes(checkpoint, config, name, splits) for name in packed)
        is_file = use_mmap and can_keep_pack
        sizes += WeightSizes(total * is_file, total * (not is_file))
    for entry in _used(checkpoint, config, packed):
        if not entry.name.startswith(prefix):
            continue
        is_matrix = backend == "cpu" and _is_float_matrix(entry)
        if _is_put_together(entry, config):
            is_matrix |= backend == "cpu"  # keeps its type
            is_view = False
        elif is_matrix:  # used as it lies in the file
            is_view = use_mmap and entry.begin % ELEMENT_TYPES[entry.dtype].size == 0
        else:
            is_view = use_mmap and can_adopt and why_copy(entry) is None
        becomes_float32 = not is_matrix and backend != "metal" and entry.dtype in ("F16", "BF16")
        if becomes_float32:
            sizes += WeightSizes(0, entry.num_bytes * 2)
        else:
            sizes += WeightSizes(entry.num_bytes * is_view, entry.num_bytes * (not is_view))
    return sizes


def find_packed(checkpoint: Checkpoint, config: ModelConfig) -> list[str]:
    """The layers whose weights are repacked for the CPU kernels."""
    names, quantization = checkpoint.names(), config.quantization
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
    if packing is None or weight.dtype != "U32" or len(weight.shape) < 2:
        return False
    if packing.mode == "mxfp4":
        return True
    return (
        packing.mode == "affine"
        and packing.bits in (2, 3, 4, 5, 6, 8)
        and packing.group_size in (32, 64, 128)
        and weight.shape[-1] * 32 // packing.bits % packing.group_size == 0
    )


def packed_matrix_bytes(rows: int, columns: int, packing: Packing, scale_bytes: int) -> int:
    """A packed matrix: blocks of 16 rows, each a run of groups: codes, then scales, then offsets."""
    codes = ROWS * packing.group_size * packing.bits // 8
    scales = ROWS if packing.mode == "mxfp4" else 2 * ROWS * scale_bytes
    return -(-rows // ROWS) * (columns // packing.group_size) * (codes + scales)


def _packed_bytes(
    checkpoint: Checkpoint,
    config: ModelConfig,
    name: str,
    splits: Mapping[str, tuple[int, ...]],
) -> int:
    packing = config.quantization.packing(name)
    assert packing is not None
    weight, scales = (checkpoint.entry(f"{name}.{part}") for part in ("weight", "scales"))
    *rows, words = weight.shape
    columns, scale_bytes = words * 32 // packing.bits, ELEMENT_TYPES[scales.dtype].size
    return sum(
        round_up(packed_matrix_bytes(part, columns, packing, scale_bytes), PART)
        for part in splits.get(name, (prod(rows),))
    )


def _is_float_matrix(entry: TensorEntry) -> bool:
    """A weight that was never packed; scales and offsets have other names, tables of positions are no factors."""
    is_matrix = entry.name.endswith(".weight") and len(entry.shape) in (2, 3)
    return is_matrix and entry.dtype in FLOATS and not entry.name.endswith(POSITIONS)


def _is_put_together(entry: TensorEntry, config: ModelConfig) -> bool:
    """Experts that are saved one by one, or with gate and up in turns: copied into one matrix when they are loaded."""
    names = config.family.experts
    if config.experts is None or names is None:
        return False
    parts = (names.one.split("{")[0], names.fused)
    return entry.dtype in FLOATS and any(f".{part}" in entry.name for part in parts)


def _used(checkpoint: Checkpoint, config: ModelConfig, packed: set[str]) -> Iterable[TensorEntry]:
    """The tensors that the model holds itself: not those that were repacked, nor what it leaves alone."""
    ignored, absent = config.family.ignored_suffixes, config.family.ignored_prefixes
    prefix = find_prefix(checkpoint.names(), config.family.embedding)
    tied_head = f"{stored_name(config.family.head, prefix)}." if config.is_tied else None
    for name in checkpoint.names():
        base, _, part = name.rpartition(".")
        if base in packed and part in ("weight", "scales", "biases"):
            continue
        if name.endswith(ignored) or name.startswith(absent):
            continue
        if tied_head is not None and name.startswith(tied_head):
            continue
        yield checkpoint.entry(name)
