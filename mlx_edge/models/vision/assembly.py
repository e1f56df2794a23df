"""A vision tower put together from a checkpoint: its tensors under the names that different exporters write.

Every name of the vision side stands here and nowhere else; how tensors are checked and read is in `tensors.py`.
"""

from collections.abc import Set
from pathlib import Path

import mlx.core as mx

from mlx_edge import ops
from mlx_edge.errors import ModelFormatError
from mlx_edge.models.tensors import Tensors
from mlx_edge.models.vision.config import VisionConfig
from mlx_edge.models.vision.processor import ProcessorConfig
from mlx_edge.models.vision.tower import (
    ConvMerger,
    LayerNorm,
    PlainMerger,
    VisionBlock,
    VisionTower,
)

PREFIXES = ("model.visual.", "visual.", "vision_tower.", "model.vision_tower.")


def find_prefix(names: Set[str]) -> str:
    """How the names of the vision side begin in this checkpoint; the newest spelling where there is none."""
    known = (prefix for prefix in PREFIXES if f"{prefix}patch_embed.proj.weight" in names)
    return next(known, PREFIXES[0])


def read_processor(folder: Path, config: VisionConfig) -> ProcessorConfig:
    """How this model wants its images; errors are those of `ProcessorConfig.from_folder`.

    Raises: ModelFormatError, too, where other patches are cut than the tower takes.
    """
    processor = ProcessorConfig.from_folder(folder)
    cut = (processor.patch_size, processor.temporal_patch_size, processor.merge_size)
    taken = (config.patch_size, config.temporal_patch_size, config.merge_size)
    if cut != taken:
        raise ModelFormatError(
            f"{folder}: the image processor cuts patches of {cut} (pixels, frames, merged), the tower takes {taken}; "
            "download both files again"
        )
    return processor


def assemble_tower(
    tensors: Tensors, config: VisionConfig, processor: ProcessorConfig, hidden_size: int
) -> VisionTower:
    """The whole tower, for a decoder of this hidden size.

    Raises: ModelFormatError for a tensor that is missing or does not fit, or features of another size.
    """
    if config.out_size != hidden_size:
        raise ModelFormatError(
            f"{tensors.checkpoint.folder}/config.json: out_hidden_size of vision_config is {config.out_size}, "
            f"hidden_size of the text {hidden_size}; expected both alike"
        )
    tensors = tensors.as_stored()
    prefix = find_prefix(tensors.checkpoint.names())
    is_glm = config.model_type == "glm4v"
    size = config.hidden_size

    def norm(name: str) -> ops.Norm:
        return tensors.norm(prefix + name, size, config.norm_eps)

    positions = None
    if config.position_grid is not None:
        shape = (config.position_grid**2, size)
        positions = tensors.array(f"{prefix}embeddings.position_embedding.weight", shape)
    return VisionTower(
        config,
        processor,
        _read_patch_embedding(tensors, config, f"{prefix}patch_embed.proj", has_bias=is_glm),
        norm("post_conv_layernorm") if is_glm else None,
        positions,
        tuple(_read_block(tensors, config, f"{prefix}blocks.{i}.") for i in range(config.depth)),
        _read_conv_merger(tensors, config, prefix)
        if is_glm
        else _read_merger(tensors, config, prefix),
    )


def _read_patch_embedding(
    tensors: Tensors, config: VisionConfig, name: str, *, has_bias: bool
) -> ops.Dense:
    """A convolution whose kernel is as large as its step: a product over the values of a patch."""
    out, frames, side = config.hidden_size, config.temporal_patch_size, config.patch_size
    first = (out, config.in_channels, frames, side, side)  # as torch has it
    last = (out, frames, side, side, config.in_channels)  # as MLX has it
    weight = _read_kernel(tensors, f"{name}.weight", first, last)
    if tuple(weight.shape) == last:
        weight = weight.transpose(0, 4, 1, 2, 3)
    bias = tensors.array(f"{name}.bias", (out,)) if has_bias else None
    return ops.Dense(mx.contiguous(weight).reshape(out, -1), bias)


def _read_block(tensors: Tensors, config: VisionConfig, prefix: str) -> VisionBlock:
    size, inner, has_bias = config.hidden_size, config.intermediate_size, config.has_bias

    def linear(name: str, rows: int, columns: int) -> ops.Linear:
        return tensors.linear(prefix + name, rows, columns, has_bias=has_bias)

    qkv = tensors.linear(f"{prefix}attn.qkv", 3 * size, size, has_bias=config.has_qkv_bias)
    mlp = ops.MLPWeights(
        norm=tensors.norm(f"{prefix}norm2", size, config.norm_eps),
        gate=linear("mlp.gate_proj", inner, size),
        up=linear("mlp.up_proj", inner, size),
        down=linear("mlp.down_proj", size, inner),
    )
    norm = tensors.norm(f"{prefix}norm1", size, config.norm_eps)
    return VisionBlock(norm, qkv, linear("attn.proj", size, size), mlp)


def _read_conv_merger(tensors: Tensors, config: VisionConfig, prefix: str) -> ConvMerger:
    size, out, inner, side = (
        config.hidden_size,
        config.out_size,
        config.merger_size,
        config.merge_size,
    )
    first, last = (out, size, side, side), (out, side, side, size)
    kernel = _read_kernel(tensors, f"{prefix}downsample.weight", first, last)
    if tuple(kernel.shape) == first:
        kernel = kernel.transpose(0, 2, 3, 1)
    bias = tensors.array(f"{prefix}downsample.bias", (out,))
    merger = f"{prefix}merger."
    return ConvMerger(
        norm=tensors.norm(f"{prefix}post_layernorm", size, config.norm_eps),
        downsample=ops.Dense(mx.contiguous(kernel).reshape(out, -1), bias),
        projection=tensors.linear(f"{merger}proj", out, out),
        projection_norm=LayerNorm(
            tensors.array(f"{merger}post_projection_norm.weight", (out,)),
            tensors.array(f"{merger}post_projection_norm.bias", (out,)),
        ),
        gate=tensors.linear(f"{merger}gate_proj", inner, out),
        up=tensors.linear(f"{merger}up_proj", inner, out),
        down=tensors.linear(f"{merger}down_proj", out, inner),
    )


def _read_merger(tensors: Tensors, config: VisionConfig, prefix: str) -> PlainMerger:
    wide = config.merge_unit * config.hidden_size
    return PlainMerger(
        norm=tensors.norm(f"{prefix}merger.ln_q", config.hidden_size, config.norm_eps),
        up=tensors.linear(f"{prefix}merger.mlp.0", wide, wide, has_bias=True),
        down=tensors.linear(f"{prefix}merger.mlp.2", config.out_size, wide, has_bias=True),
    )


def _read_kernel(tensors: Tensors, name: str, *shapes: tuple[int, ...]) -> mx.array:
    """A convolution's weight, in whichever of these shapes it is stored; the first is told where it has neither."""
    found = tuple(tensors.checkpoint.entry(name).shape) if tensors.has(name) else shapes[0]
    return tensors.array(name, found if found in shapes else shapes[0])
