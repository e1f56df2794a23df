"""Group quantization: formats, grids and packs of one matrix, and `Quantizer` for a model in memory. Knows no file."""

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
from mlx_edge.quant.inputs import InputStatistics
from mlx_edge.quant.packs import pack_codes, unpack_codes
from mlx_edge.quant.quantizer import Quantizer, QuantMode
from mlx_edge.quant.search import find_grid

__all__ = [
    "MODES",
    "Granularity",
    "Grid",
    "InputStatistics",
    "Packing",
    "QuantMode",
    "Quantizer",
    "dequantize",
    "find_grid",
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
