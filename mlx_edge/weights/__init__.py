"""Bytes on disk <-> arrays: safetensors files by mapping, model folders, and a writer to match.

    header       bytes -> checked table of tensors
    mapping      pages -> arrays without a copy, where MLX can
    safetensors  one file: table and arrays
    checkpoint   a folder of files, one set of names
    writer       arrays -> files that can be mapped
    report       what was shared, what was copied, how long it took
    dtypes       the element types, said once

Knows no model, no configuration and no quantization. Every broken file is a ModelFormatError.
"""

from mlx_edge.weights.checkpoint import INDEX_NAME, SINGLE_NAME, Checkpoint
from mlx_edge.weights.header import TensorEntry
from mlx_edge.weights.report import LoadReport, format_bytes
from mlx_edge.weights.safetensors import SafetensorsFile
from mlx_edge.weights.writer import write_checkpoint, write_safetensors

__all__ = [
    "INDEX_NAME",
    "SINGLE_NAME",
    "Checkpoint",
    "LoadReport",
    "SafetensorsFile",
    "TensorEntry",
    "format_bytes",
    "write_checkpoint",
    "write_safetensors",
]
