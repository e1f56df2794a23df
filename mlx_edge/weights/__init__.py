"""Bytes on disk <-> arrays: safetensors files by mapping, model folders, and a writer to match.

    header       bytes -> checked table of tensors
    mapping      runs of pages -> views of them, one for each tensor
    adoption     how MLX takes pages for its own on this machine, or why not
    locking      pages that stay in memory
    safetensors  one file: table and arrays
    checkpoint   a folder of files, one set of names
    writer       arrays -> files that can be mapped
    identity     which file was opened, and whether it still is that file
    packed       weights repacked for a processor: a cache of files, mapped on the next start
    pack_file    one such file on the disk: written whole or not at all
    pack_header  its head: layout and checksums
    report       what was shared, what was copied, how long it took
    dtypes       the element types, said once

Knows no model, no configuration and no quantization. Every broken file is a ModelFormatError.
"""

from mlx_edge.weights.checkpoint import INDEX_NAME, SINGLE_NAME, Checkpoint
from mlx_edge.weights.header import TensorEntry
from mlx_edge.weights.pack_header import Part
from mlx_edge.weights.packed import (
    PackedFile,
    PackEntry,
    list_packed,
    open_packed,
    remove_packed,
)
from mlx_edge.weights.report import LoadReport, PackReport, format_bytes
from mlx_edge.weights.safetensors import SafetensorsFile
from mlx_edge.weights.writer import write_checkpoint, write_safetensors

__all__ = [
    "INDEX_NAME",
    "SINGLE_NAME",
    "Checkpoint",
    "LoadReport",
    "PackEntry",
    "PackReport",
    "PackedFile",
    "Part",
    "SafetensorsFile",
    "TensorEntry",
    "format_bytes",
    "list_packed",
    "open_packed",
    "remove_packed",
    "write_checkpoint",
    "write_safetensors",
]
