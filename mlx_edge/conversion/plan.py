"""What a conversion will write, known before a tensor is read: each layer's packing, every tensor, the configuration.

Knows shapes and formats; computes nothing.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import mlx.core as mx

from mlx_edge.conversion.source import (
    PACKED_PARTS,
    QUANTIZATION_KEYS,
    Source,
    count_bytes,
    find_family,
)
from mlx_edge.errors import ModelFormatError, UnsupportedModelError
from mlx_edge.models.families import FAMILIES
from mlx_edge.models.vision.assembly import PREFIXES as VISION_PREFIXES
from mlx_edge.quant import Packing
from mlx_edge.weights.writer import TensorPlan, describe_tensor

DTYPES: Mapping[str, mx.Dtype] = {
    "float16": mx.float16,
    "bfloat16": mx.bfloat16,
    "float32": mx.float32,
}
Packings = Mapping[str, Packing | None]  # layer name -> how it is stored; None: as floats

# Of families that are not defined here; what else has two dimensions may be transposed or stacked by its definition.
_LINEAR_WORDS = ("_proj", "embed_tokens", "lm_head")


@dataclass(frozen=True)
class Plan:
    """Every tensor of the new folder, and what its `config.json` says."""

    packings: Packings
    default: (
        Packing | None
    )  # of the layers that config.json does not name; None: nothing is quantized
    dtype: mx.Dtype | None  # of floats and affine scales; None: as the source has them
    kept: Mapping[str, str]  # layers that stay float against what was asked -> why
    tensors: tuple[TensorPlan, ...]
    config: dict[str, Any]
    num_parameters: int
    source_bytes: int  # see `count_bytes`
    is_copy: bool = False  # packed weights are taken as they are

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.num_bytes for tensor in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        """Real ones: all bytes, those of scales and norms included, over all parameters."""
        return 8 * self.num_bytes / max(1, self.num_parameters)


def find_layers(source: Source) -> dict[str, tuple[int, int]]:
    """Linears, embedding and head of a source, in its order: name -> rows and columns of the matrix that is meant.

    The experts of a layer are one matrix below another, and must have been stacked (`experts.stack_experts`).

    Raises: UnsupportedModelError for mixtures of experts of other families, which are stacked in ways of their own.
    """
    words, experts = _linear_words(source), _stacked_experts(source)
    layers: dict[str, tuple[int, int]] = {}
    for name in written_names(source):
        layer = name.removesuffix(".weight")
        shape = meant_shape(source, name)
        if layer == name or len(shape) < 2 or layer.startswith(VISION_PREFIXES):
            continue  # what sees is small beside the text, and suffers more
        if any(part in name for part in _EXPERTS) and not layer.endswith(experts):
            raise UnsupportedModelError(
                f"{source.name}: {name} belongs to a mixture of experts of a family that is not defined here, which "
                "cannot be quantized; leave -q out, or use mlx_lm.convert"
            )
        if (len(shape) == 2 and layer.endswith(words)) or layer.endswith(experts):
            layers[layer] = (prod(shape[:-1]), shape[-1])
    return layers


_EXPERTS = (".experts.", ".switch_mlp.")


def _linear_words(source: Source) -> tuple[str, ...]:
    family = find_family(source)
    if family is None:
        return _LINEAR_WORDS
    f = family
    embedding = f.embedding.removeprefix("model.")  # models that see put another name before it
    words = (embedding, f.head, f.query, f.key, f.value, f.output, f.gate, f.up, f.down)
    fused = (f.fused_qkv, f.fused_gate_up)
    return (*words, *(word for word in fused if word is not None))


def _stacked_experts(source: Source) -> tuple[str, ...]:
    family = find_family(source)
    return () if family is None or family.experts is None else family.experts.stacked_matrices


def written_names(source: Source) -> list[str]:
    """The source's tensors that a loader wants: no tied head, no tables that are computed; no parts of packed weights.

    mlx-lm drops the weight of a tied head, but not its scales.
    """
    names = source.names()
    family = find_family(source)
    if family is not None:
        names = [name for name in names if not name.endswith(family.ignored_suffixes)]
    if source.config.get("tie_word_embeddings") is True:
        names = [name for name in names if not name.startswith("lm_head.")]
    return [name for name in names if not _is_part(source, name)]


def _is_part(source: Source, name: str) -> bool:
    layer, _, part = name.rpartition(".")
    return part in PACKED_PARTS and source.quantized(layer) is not None


def meant_shape(source: Source, name: str) -> tuple[int, ...]:
    """The shape of a tensor's values, also of one that the source has packed."""
    shape = source.shape(name)
    packing = source.quantized(name.removesuffix(".weight")) if name.endswith(".weight") else None
    if packing is None:
        return shape
    return (*shape[:-1], shape[-1] * 32 // packing.bits)


def keep_odd(
    layers: Mapping[str, tuple[int, int]], wanted: Packings
) -> tuple[Packings, dict[str, str]]:
    """The packings that the shapes allow, and why the other layers stay float."""
    reasons = {
        name: refusal
        for name, packing in wanted.items()
        if packing is not None and (refusal := packing.refusal(layers[name]))
    }
    return {n: None if n in reasons else packing for n, packing in wanted.items()}, reasons


def make_plan(
    source: Source, wanted: Packings, dtype: mx.Dtype | None, default: Packing | None = None
) -> Plan:
    """The plan of a folder with the `wanted` packing for each of the source's layers; none wanted: all floats.

    `dtype` is that of floats and affine scales, None keeps the source's. A quantized source becomes float.

    Raises: ModelFormatError when nothing that was asked for could be quantized.
    """
    layers = find_layers(source) if wanted else {}
    packings, kept = keep_odd(layers, wanted)
    counts = Counter(packing for packing in packings.values() if packing is not None)
    if any(wanted.values()) and not counts:
        name, reason = next(iter(kept.items()))
        raise ModelFormatError(
            f"{source.name}: no layer can be quantized as asked; {name}: {reason}; choose smaller groups"
        )
    if default is None or default not in counts:
        default = counts.most_common(1)[0][0] if counts else None
    names = written_names(source)
    config = dict(source.config)
    if config.get("model_type") in FAMILIES:  # mlx-lm's default is another one than ours
        config.setdefault("tie_word_embeddings", "lm_head.weight" not in names)
    return Plan(
        packings,
        default,
        dtype,
        kept,
        tuple(_plan_tensors(source, names, packings, dtype)),
        _make_config(config, packings, default, dtype),
        sum(prod(meant_shape(source, name)) for name in names),
        count_bytes(source),
    )


def make_copy_plan(source: Source, dtype: mx.Dtype | None = None) -> Plan:
    """The plan of a folder with the source's own tensors, quantized or not, floats cast to `dtype`."""
    names = source.names()
    wanted = [name for name in names if name.endswith(".weight")]
    stored = {n[:-7]: packing for n in wanted if (packing := source.quantized(n[:-7]))}
    config = dict(source.config)
    if dtype is not None:
        config |= _dtype_keys(config, dtype)
    tensors = [describe_tensor(n, cast_of(source.dtype(n), dtype), source.shape(n)) for n in names]
    counts = Counter(stored.values())
    return Plan(
        stored,
        counts.most_common(1)[0][0] if counts else None,
        dtype,
        {},
        tuple(tensors),
        config,
        sum(prod(meant_shape(source, n)) for n in names if not _is_part(source, n)),
        count_bytes(source),
        is_copy=True,
    )


def cast_of(stored: mx.Dtype, dtype: mx.Dtype | None) -> mx.Dtype:
    """The type that a tensor is written in: `dtype` for floats, its own for all else."""
    is_float = mx.issubdtype(stored, mx.floating)
    return dtype if dtype is not None and is_float else stored


def scale_dtype(source: Source, layer: str, dtype: mx.Dtype | None) -> mx.Dtype:
    """The float type of what a layer becomes, where the source may have it packed."""
    if dtype is not None:
        return dtype
    if source.quantized(layer) is None:
        return source.dtype(f"{layer}.weight")
    scales = source.dtype(f"{layer}.scales")
    return scales if mx.issubdtype(scales, mx.floating) else mx.bfloat16


def _plan_tensors(
    source: Source, names: Iterable[str], packings: Packings, dtype: mx.Dtype | None
) -> Iterable[TensorPlan]:
    for name in names:
        layer = name.removesuffix(".weight")
        shape, packing = meant_shape(source, name), packings.get(layer)
        is_weight = layer != name
        if is_weight and packing is not None:
            *rows, columns = shape
            floats = scale_dtype(source, layer, dtype)
            is_affine = packing.mode == "affine"
            grid = (*rows, columns // packing.group_size)
            words = (*rows, columns * packing.bits // 32)
            yield describe_tensor(name, mx.uint32, words)
            yield describe_tensor(f"{layer}.scales", floats if is_affine else mx.uint8, grid)
            if is_affine:
                yield describe_tensor(f"{layer}.biases", floats, grid)
        elif is_weight and source.quantized(layer) is not None:
            yield describe_tensor(name, scale_dtype(source, layer, dtype), shape)
        else:
            yield describe_tensor(name, cast_of(source.dtype(name), dtype), shape)


def _make_config(
    config: Mapping[str, Any], packings: Packings, default: Packing | None, dtype: mx.Dtype | None
) -> dict[str, Any]:
    """As mlx-lm writes it: a default, the layers that differ from it, and all that once more under its other name."""
    made = {key: value for key, value in config.items() if key not in QUANTIZATION_KEYS}
    if dtype is not None:
        made |= _dtype_keys(config, dtype)
    if default is None:
        return made
    table: dict[str, Any] = _describe(default)
    for name, packing in packings.items():
        if packing != default:
            table[name] = False if packing is None else _describe(packing)
    return made | dict.fromkeys(QUANTIZATION_KEYS, table)


def _describe(packing: Packing) -> dict[str, Any]:
    return {"group_size": packing.group_size, "bits": packing.bits, "mode": packing.mode}


def _dtype_keys(config: Mapping[str, Any], dtype: mx.Dtype) -> dict[str, str]:
    """What the configuration says of the floats' type, in the spelling that it has."""
    name = next(name for name, known in DTYPES.items() if known == dtype)
    present = [key for key in ("torch_dtype", "dtype") if key in config]
    return dict.fromkeys(present, name)
