"""Tensors from a source into the files of a plan, one at a time, large ones in blocks of rows.

What is in memory is one tensor as it is stored and one block of it in float32. Knows formats and files; which packing a
layer gets was decided by the plan, and what a calibrating method has chosen comes from it as it is stored.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import mlx.core as mx

from mlx_edge.conversion.finite import require_finite
from mlx_edge.conversion.plan import Plan, cast_of, scale_dtype
from mlx_edge.conversion.source import PACKED_PARTS, Source
from mlx_edge.ops.types import Quantized
from mlx_edge.quant import (
    Granularity,
    Grid,
    Packing,
    dequantize,
    make_grid,
    quantize,
    quantize_onto,
    stored_tensors,
)
from mlx_edge.weights.stream_writer import StreamWriter

BLOCK_ELEMENTS = 1 << 21  # that are float32 at once: some 20 bytes for each while they are packed

Progress = Callable[[int, int], None]
Stored = Iterator[Mapping[str, mx.array]]  # tensors by name, as they are written


@dataclass(frozen=True)
class Rounding:
    """How round-to-nearest lays the grid of an affine weight."""

    is_symmetric: bool = False
    per: Granularity = "group"

    @property
    def description(self) -> str:
        """What is not MLX's own way, in words that follow those of a packing."""
        scheme = ", symmetric" if self.is_symmetric else ""
        return scheme if self.per == "group" else f"{scheme}, one scale per {self.per}"


def write_tensors(
    source: Source,
    plan: Plan,
    writer: StreamWriter,
    *,
    rounding: Rounding | None = None,
    calibrated: Stored | None = None,
    on_progress: Progress | None = None,
) -> None:
    """Fills all shards: with what `calibrated` yields, then with the rest, rounded to nearest or as floats.

    Raises: ModelFormatError for a weight that is not finite, InvalidRequestError if the disk refuses.
    """
    total = plan.num_bytes

    def report() -> None:
        if on_progress is not None:
            on_progress(writer.written_bytes, total)

    report()
    for tensors in calibrated or ():
        for name, tensor in tensors.items():
            writer.put(name, tensor)
        report()
    for name, parts in _group(plan).items():
        if all(map(writer.is_written, parts)):  # they may lie in different shards
            continue
        blocks = _copy if plan.is_copy else _convert
        for tensors, first_row in blocks(source, plan, name, rounding or Rounding()):
            for stored, tensor in tensors.items():
                writer.put(stored, tensor, first_row)
            del tensors, tensor
            report()
        mx.clear_cache()
    writer.finish()


def _group(plan: Plan) -> dict[str, list[str]]:
    """The tensors to be read -> those that are made of each, in the plan's order."""
    groups: dict[str, list[str]] = {}
    for tensor in plan.tensors:
        layer, _, part = tensor.name.rpartition(".")
        is_made = part in PACKED_PARTS and plan.packings.get(layer) is not None and not plan.is_copy
        groups.setdefault(f"{layer}.weight" if is_made else tensor.name, []).append(tensor.name)
    return groups


def _copy(
    source: Source, plan: Plan, name: str, _rounding: Rounding
) -> Iterator[tuple[dict[str, mx.array], int]]:
    """A tensor as it is, but for the type of its floats, in blocks, each with its first row."""
    stored = cast_of(source.dtype(name), plan.dtype)
    for block, row in _blocks(source.read(name)):
        if block.dtype != stored:
            require_finite(source, name, block)
            require_finite(source, name, block.astype(stored))
        yield {name: block.astype(stored)}, row


def _convert(
    source: Source, plan: Plan, name: str, rounding: Rounding
) -> Iterator[tuple[dict[str, mx.array], int]]:
    """The tensors that one tensor of the source becomes, in blocks, each with its first row."""
    layer = name.removesuffix(".weight")
    packing = plan.packings.get(layer) if layer != name else None
    if packing is not None and rounding == Rounding():
        exact = source.stored(layer, packing, scale_dtype(source, layer, plan.dtype))
        if exact is not None:
            yield stored_tensors(layer, exact), 0
            return
    if layer != name and source.quantized(layer) is not None:
        blocks = _unpacked_blocks(source, layer)
        stored = scale_dtype(source, layer, plan.dtype)
    else:
        blocks = _blocks(source.read(name))
        stored = cast_of(source.dtype(name), plan.dtype)
    if packing is None:
        for block, row in blocks:
            require_finite(source, name, block)
            cast = block.astype(stored)
            require_finite(source, name, cast)
            yield {name: cast}, row
        return
    dtype = scale_dtype(source, layer, plan.dtype)
    grid = _whole_grid(source, name, packing, dtype, rounding)
    for block, row in blocks:
        require_finite(source, name, block)
        yield stored_tensors(layer, _pack(block, packing, dtype, rounding, grid)), row


def _pack(
    block: mx.array, packing: Packing, dtype: mx.Dtype, rounding: Rounding, whole: Grid | None
) -> Quantized:
    if packing.mode != "affine" or rounding == Rounding():
        return quantize(block, packing, dtype)
    if whole is None:
        grid = make_grid(
            block, packing, dtype, is_symmetric=rounding.is_symmetric, per=rounding.per
        )
    else:
        shape = block.shape[0], block.shape[1] // packing.group_size
        grid = Grid(mx.broadcast_to(whole.scales, shape), mx.broadcast_to(whole.offsets, shape))
    return quantize_onto(block, grid, packing, dtype)


def _whole_grid(
    source: Source, name: str, packing: Packing, dtype: mx.Dtype, rounding: Rounding
) -> Grid | None:
    """The grid (1, 1) over a whole tensor, which is that of a group with its smallest and its largest value."""
    if rounding.per != "tensor" or packing.mode != "affine":
        return None
    weight = source.read(name)
    ends = mx.stack([weight.min(), weight.max()]).astype(mx.float32)
    extremes = mx.tile(ends, packing.group_size // 2)[None]
    return make_grid(extremes, packing, dtype, is_symmetric=rounding.is_symmetric)


def _blocks(tensor: mx.array) -> Iterator[tuple[mx.array, int]]:
    """A tensor in blocks of rows, each with its first row; what is small or has no rows in one.

    Of more than two axes all but the last are one run of rows.
    """
    if tensor.ndim > 2:
        tensor = tensor.reshape(-1, tensor.shape[-1])
    if tensor.ndim < 2 or tensor.size <= BLOCK_ELEMENTS:
        yield tensor, 0
        return
    rows = max(1, BLOCK_ELEMENTS * tensor.shape[0] // tensor.size)
    for row in range(0, tensor.shape[0], rows):
        yield tensor[row : row + rows], row


def _unpacked_blocks(source: Source, layer: str) -> Iterator[tuple[mx.array, int]]:
    """The float32 values of a packed weight, in blocks of rows."""
    packing = source.quantized(layer)
    assert packing is not None

    def read(part: str) -> mx.array:
        array = source.read(f"{layer}.{part}")
        return array.reshape(-1, array.shape[-1])

    weight, scales = read("weight"), read("scales")
    offsets = read("biases") if packing.mode == "affine" else None
    columns = weight.shape[-1] * 32 // packing.bits
    rows = max(1, BLOCK_ELEMENTS // max(1, columns))
    for row in range(0, weight.shape[0], rows):
        part = slice(row, row + rows)
        block = Quantized(
            weight[part],
            scales[part],
            None if offsets is None else offsets[part],
            packing.group_size,
            packing.bits,
            packing.mode,
        )
        yield dequantize(block), row
