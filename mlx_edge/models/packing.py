"""Weights in the layout of the CPU kernels: which are packed, where they lie, and how the stored ones come back.

Quantized weights are repacked once for each checkpoint, into a file that every later start maps (`weights/packed.py`);
float weights are used where the checkpoint has them. Nothing else of a weight is read: what the reference ops or a
training needs is read again from the checkpoint (`restore`).
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, pairwise
from math import prod
from typing import Any

import mlx.core as mx

from mlx_edge import ops
from mlx_edge.models.quantization import Quantization
from mlx_edge.ops.cpu import FIXED_STEPS, extension
from mlx_edge.quant import Packing
from mlx_edge.weights import Checkpoint, PackedFile, PackReport, Part, open_packed
from mlx_edge.weights.dtypes import ELEMENT_TYPES

LAYOUT = 1  # of packed weights, as cpu_kernels/README.md draws it; another one packs anew
FLOAT_TYPES = {"F32": "f32", "F16": "f16", "BF16": "bf16"}

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class _Matrix:
    """A run of rows of a quantized weight, which is packed as one."""

    layer: str
    first: int
    end: int
    sizes: Any  # the kernels' own record


class Packer:
    """Makes the packed weights of one checkpoint, by layer name."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        quantization: Quantization,
        *,
        precision: ops.Precision = "int8",
        use_file: bool = True,
        on_progress: Progress | None = None,
        splits: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        """Maps the packed file, or packs now. `precision` is that of the activations that meet quantized weights.
        `splits` are the layers that are several matrices, one below another, and the rows of each.

        Raises as `open_packed` does.
        """
        self._checkpoint = checkpoint
        self._quantization = quantization
        self._precision: ops.Precision = precision
        splits = splits or {}
        matrices = (
            self._plan(name, first, end)
            for name in _layers(checkpoint)
            for first, end in pairwise(
                [0, *accumulate(splits.get(name, (_num_rows(checkpoint, name),)))]
            )
        )
        self._matrices = {
            self._part_name(found.layer, found.first, found.end): found
            for found in matrices
            if found is not None
        }
        self._file: PackedFile | None = None
        if self._matrices:
            parts = [
                Part(name, matrix.sizes.num_bytes)
                for name, matrix in sorted(self._matrices.items())
            ]
            self._file = open_packed(
                self._key(parts),
                parts,
                self._fill,
                use_file=use_file,
                populate=True,
                on_progress=on_progress,
            )

    @property
    def report(self) -> PackReport | None:
        """What was repacked and where it lies, or None when the checkpoint has nothing to repack."""
        return None if self._file is None else self._file.report

    def lock_memory(self) -> None:
        """Keeps the repacked weights in memory; MemoryBudgetError when the system does not allow it."""
        if self._file is not None:
            self._file.lock_memory()

    def _part_name(self, layer: str, first: int, end: int) -> str:
        is_whole = end - first == _num_rows(self._checkpoint, layer)
        return layer if is_whole else f"{layer}[{first}:{end}]"

    def pack(
        self, layer: str, bias: mx.array | None, rows: tuple[int, int] | None = None
    ) -> ops.Packed | None:
        """The weight of a layer with its bias, or None when the kernels do not serve it; of a layer that is several
        matrices one of these, by its first row and the one behind its last, with its own bias."""
        first, end = rows or (0, _num_rows(self._checkpoint, layer))
        numbers = [] if bias is None else bias.tolist()
        restore = cache(
            lambda: _restore(self._checkpoint, layer, self._quantization, bias, first, end)
        )
        name = self._part_name(layer, first, end)
        if self._file is not None and name in self._matrices:
            sizes = self._matrices[name].sizes
            memory: Any = self._file.parts[name]
        else:
            entry = self._checkpoint.entry(f"{layer}.weight")
            if entry.dtype not in FLOAT_TYPES or len(entry.shape) < 2:
                return None
            sizes = _matrix("dense", end - first, entry.shape[-1], 0, 0, entry.dtype)
            memory = _rows_of(self._checkpoint, f"{layer}.weight", first, end)
        return ops.Packed(
            extension().Weight(sizes, memory, numbers),
            (sizes.rows, sizes.columns),
            sizes.num_bytes,
            name in self._matrices,
            self._precision,
            restore,
            pack_weight,
        )

    def _plan(self, layer: str, first: int, end: int) -> _Matrix | None:
        """Rows of a quantized weight, or None when it is none or the kernels do not serve it."""
        packing = self._quantization.packing(layer)
        if packing is None or packing.mode not in ("affine", "mxfp4"):
            return None
        if layer in self._quantization.input_scales:
            return None
        weight, scales = (
            self._checkpoint.entry(f"{layer}.{part}") for part in ("weight", "scales")
        )
        is_affine = packing.mode == "affine"
        if weight.dtype != "U32" or len(weight.shape) < 2:
            return None
        columns = weight.shape[-1] * 32 // packing.bits
        wanted = (*weight.shape[:-1], columns // packing.group_size)
        offsets = self._checkpoint.entry(f"{layer}.biases") if is_affine else scales
        if scales.shape != wanted or (offsets.shape, offsets.dtype) != (wanted, scales.dtype):
            return None
        if is_affine != (scales.dtype in FLOAT_TYPES):
            return None
        if not 0 <= first < end <= _num_rows(self._checkpoint, layer):
            return None  # the tensor is of another shape, which its reader says
        sizes = _matrix(
            packing.mode, end - first, columns, packing.bits, packing.group_size, scales.dtype
        )
        return None if sizes.refusal else _Matrix(layer, first, end, sizes)

    def _key(self, parts: list[Part]) -> str:
        packings = [
            (part, self._quantization.packing(self._matrices[part.name].layer)) for part in parts
        ]
        digest = hashlib.sha256(repr(packings).encode()).hexdigest()[:16]
        return f"{self._checkpoint.fingerprint()}-cpu{LAYOUT}-{digest}"

    def _fill(self, part: Part, to: memoryview) -> None:
        matrix = self._matrices[part.name]
        packing = self._quantization.packing(matrix.layer)
        names = ["weight", "scales"] + ["biases"] * (
            packing is not None and packing.mode == "affine"
        )
        sources = [
            _rows_of(self._checkpoint, f"{matrix.layer}.{name}", matrix.first, matrix.end)
            for name in names
        ]
        packs, scales, *offsets = sources
        extension().pack(matrix.sizes, packs, scales, offsets[0] if offsets else None, to)


def pack_weight(
    weights: ops.Dense | ops.Quantized, precision: ops.Precision = "int8"
) -> ops.Packed:
    """A weight that is at hand as arrays, packed into memory of its own.

    Raises: ValueError for a format that the kernels do not serve, in their words.
    """
    if weights.input_scale is not None:
        raise ValueError(FIXED_STEPS)
    numbers = [] if weights.bias is None else weights.bias.astype(mx.float32).tolist()
    rows, columns = weights.shape
    dtype = weights.weight.dtype if isinstance(weights, ops.Dense) else weights.scales.dtype
    name = next((key for key in FLOAT_TYPES if ELEMENT_TYPES[key].mlx == dtype), "U8")
    if isinstance(weights, ops.Dense):
        sizes = _matrix("dense", rows, columns, 0, 0, name)
        memory: Any = _bytes_of(weights.weight)
    else:
        if weights.mode not in ("affine", "mxfp4"):
            raise ValueError(f"the CPU kernels have no {weights.mode}")
        sizes = _matrix(weights.mode, rows, columns, weights.bits, weights.group_size, name)
        if sizes.refusal:
            raise ValueError(sizes.refusal)
        memory = bytearray(sizes.num_bytes)
        offsets = None if weights.offsets is None else _bytes_of(weights.offsets)
        extension().pack(
            sizes, _bytes_of(weights.weight), _bytes_of(weights.scales), offsets, memory
        )
    return ops.Packed(
        extension().Weight(sizes, memory, numbers),
        (rows, columns),
        sizes.num_bytes,
        isinstance(weights, ops.Quantized),
        precision,
        lambda: weights,
        pack_weight,
    )


def _layers(checkpoint: Checkpoint) -> list[str]:
    """The names of all weights that have scales."""
    names = checkpoint.names()
    bases = (name.removesuffix(".scales") for name in names if name.endswith(".scales"))
    return sorted(base for base in bases if f"{base}.weight" in names)


def _matrix(mode: str, rows: int, columns: int, bits: int, group_size: int, dtype: str) -> Any:
    ext = extension()
    kind = getattr(ext.Float, FLOAT_TYPES.get(dtype, "f32"))
    return ext.Matrix(getattr(ext.Format, mode), rows, columns, bits, group_size, kind)


def _num_rows(checkpoint: Checkpoint, layer: str) -> int:
    """Rows of a weight; of one with more axes all of them together."""
    return prod(checkpoint.entry(f"{layer}.weight").shape[:-1])


def _rows_of(checkpoint: Checkpoint, name: str, first: int, end: int) -> bytes | memoryview:
    """The bytes of a tensor's rows where the kernels may read words."""
    entry = checkpoint.entry(name)
    data = checkpoint.read_bytes(name)
    row_bytes = len(data) // prod(entry.shape[:-1])
    begin = first * row_bytes
    part = data[begin : end * row_bytes]
    return bytes(part) if (entry.begin + begin) % 4 else part


def _bytes_of(array: mx.array) -> Any:
    """The array's own bytes; a copy where the kernels could not read words in them."""
    import numpy as np  # slow to import, and not needed for a checkpoint

    flat = mx.contiguous(array).reshape(-1)
    view = np.array(flat.view(mx.uint8), copy=False)  # keeps the array alive
    return view if view.ctypes.data % 4 == 0 else view.copy()


def _restore(
    checkpoint: Checkpoint,
    layer: str,
    quantization: Quantization,
    bias: mx.array | None,
    first: int,
    end: int,
) -> ops.Dense | ops.Quantized:
    """The weight as the checkpoint has it, read anew."""
    packing = quantization.packing(layer)
    with Checkpoint.open(checkpoint.folder) as again:

        def read(part: str) -> mx.array:
            array = again.read(f"{layer}.{part}")
            array = array.reshape(-1, array.shape[-1])
            return array if end - first == array.shape[0] else array[first:end]

        weight = read("weight")
        if packing is None or f"{layer}.scales" not in again.names():
            mx.eval(weight)
            return ops.Dense(weight, bias)
        scales = read("scales")
        has_offsets = packing.mode == "affine"
        offsets = read("biases") if has_offsets else None
        mx.eval([array for array in (weight, scales, offsets) if array is not None])
        return _quantized(weight, scales, offsets, packing, bias)


def _quantized(
    weight: mx.array,
    scales: mx.array,
    offsets: mx.array | None,
    packing: Packing,
    bias: mx.array | None,
) -> ops.Quantized:
    return ops.Quantized(
        weight, scales, offsets, packing.group_size, packing.bits, packing.mode, bias
    )
