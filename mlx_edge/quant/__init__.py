"""Group quantization of one matrix: formats, grids, packs. Knows no model and no file."""

from mlx_edge.quant.formats import MODES, Packing
from mlx_edge.quant.groups import (
    Granularity,
    Grid,
    dequantize,
    make_grid,
    pack,
    quantize,
    quantize_onto,
    snap_scales,
    stored_tensors,
    unpack,
)
from mlx_edge.quant.packs import pack_codes, unpack_codes

__all__ = [
    "MODES",
    "Granularity",
    "Grid",
    "Packing",
    "dequantize",
    "make_grid",
    "pack",
    "pack_codes",
    "quantize",
    "quantize_onto",
    "snap_scales",
    "stored_tensors",
    "unpack",
    "unpack_codes",
]
