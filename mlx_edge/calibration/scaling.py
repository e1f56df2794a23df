"""Scales of a linear's input channels, their inverse folded into what makes the input: the model computes the same.

A norm before the linears, or the linear whose outputs reach them channel by channel (v before o, up before down), takes
the inverse. Knows which linears of a decoder have such a source, and nothing of how scales are chosen.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import mlx.core as mx

from mlx_edge import ops
from mlx_edge.calibration.layerwise import LayerwiseModel, as_dense
from mlx_edge.models.config import ModelConfig
from mlx_edge.models.decoder import Layer
from mlx_edge.models.linears import replace_linears
from mlx_edge.quant import Packing, stored_tensors


@dataclass(frozen=True)
class Fold:
    """Linears that share their input, and what takes the inverse of its scales."""

    targets: tuple[str, ...]
    source: str | None  # a norm or a linear; None: nothing that could take it
    repeats: int = 1  # times that a head of the source stands in the input, one beside the other


def find_folds(config: ModelConfig, index: int) -> list[Fold]:
    """The folds of layer `index`; together their targets are all of its linears."""
    family = config.family
    prefix = family.layer.format(index=index)

    def norm(name: str | None) -> str | None:
        return None if name is None else prefix + name

    qkv = tuple(prefix + name for name in (family.query, family.key, family.value))
    return [
        Fold(qkv, norm(family.attention_norm)),
        Fold((prefix + family.output,), qkv[2], config.num_heads // config.num_kv_heads),
        Fold((prefix + family.gate, prefix + family.up), norm(family.mlp_norm)),
        Fold((prefix + family.down,), prefix + family.up),
    ]


def gather_channels(config: ModelConfig, fold: Fold, numbers: mx.array) -> mx.array:
    """The largest of the numbers (E,) of the input channels that each channel of the source reaches: (S,)."""
    heads = numbers.reshape(-1, fold.repeats, _width(config, fold))
    return heads.max(1).reshape(-1)


def spread_channels(config: ModelConfig, fold: Fold, numbers: mx.array) -> mx.array:
    """The numbers (S,) of the source's channels for every input channel (E,)."""
    heads = numbers.reshape(-1, 1, _width(config, fold))
    return mx.repeat(heads, fold.repeats, axis=1).reshape(-1)


def _width(config: ModelConfig, fold: Fold) -> int:
    """Channels that lie together: a head where heads are shared."""
    return config.head_dim if fold.repeats > 1 else 1


class ScaledLayer:
    """A layer whose linears have their input channels scaled, fold by fold."""

    def __init__(self, model: LayerwiseModel, layer: Layer, index: int, dtype: mx.Dtype) -> None:
        """`dtype` is that in which norms and biases are stored."""
        self.layer = layer
        self._model = model
        self._index = index
        self._dtype = dtype
        self._floats: dict[str, mx.array] = {}  # norms and biases as stored
        self._changed: set[str] = set()  # linears whose weight is no longer the source's

    def linears(self) -> dict[str, ops.Dense]:
        """The linears as they are now, by name."""
        found = self._model.find_linears(self.layer, self._index)
        return {name: as_dense(linear) for name, linear in found.items()}

    def fold(self, fold: Fold, scales: mx.array) -> mx.array:
        """Scales the inputs of the fold's targets by the inverse of `scales` (S,), its weights by them.

        Returns the scales (E,) that the weights got: a norm is rounded as it is stored, and they make up for that.
        """
        if fold.source in (linears := self.linears()):
            self._put({fold.source: _scale_rows(linears[fold.source], 1 / scales)})
            if (bias := self.linears()[fold.source].bias) is not None:
                self._floats[f"{fold.source}.bias"] = bias.astype(self._dtype)
        else:
            scales = self._fold_norm(fold, scales)
        spread = spread_channels(self._model.config, fold, scales)
        linears = self.linears()
        self._put({name: _scale_columns(linears[name], spread) for name in fold.targets})
        return spread

    def _fold_norm(self, fold: Fold, scales: mx.array) -> mx.array:
        family = self._model.config.family
        name, offset = family.attention_norm, 1.0 if family.has_norm_offset else 0.0
        assert fold.source is not None
        is_attention = name is not None and fold.source.endswith(name)
        block = self.layer.attention if is_attention else self.layer.mlp
        assert block.norm is not None  # it is the source
        norm = block.norm.weight  # with the offset
        stored = (norm / scales - offset).astype(self._dtype)
        rounded = stored.astype(mx.float32) + offset
        is_kept = (rounded == 0) | ~mx.isfinite(rounded)  # no inverse: the channel stays as it is
        stored = mx.where(is_kept, (norm - offset).astype(self._dtype), stored)
        rounded = stored.astype(mx.float32) + offset
        scales = mx.where(rounded == 0, 1.0, norm / mx.where(rounded == 0, 1.0, rounded))
        self._floats[f"{fold.source}.weight"] = stored
        changed = replace(block.norm, weight=rounded)
        if is_attention:
            self.layer = replace(self.layer, attention=replace(self.layer.attention, norm=changed))
        else:
            self.layer = replace(self.layer, mlp=replace(self.layer.mlp, norm=changed))
        return scales

    def _put(self, linears: Mapping[str, ops.Dense]) -> None:
        self.layer = replace_linears(self.layer, self._model.config, self._index, linears)
        self._changed |= set(linears)

    def store(
        self,
        packings: Mapping[str, Packing | None],
        quantize: Callable[[str, mx.array, Packing], ops.Quantized],
    ) -> dict[str, mx.array]:
        """All tensors of the layer that differ from the source's, as stored; the layer then computes with them."""
        stored = dict(self._floats)
        for name, linear in self.linears().items():
            packing = packings[name]
            if packing is not None:
                chosen = quantize(name, linear.weight, packing)
                stored |= stored_tensors(name, chosen)
                self._put({name: as_dense(replace(chosen, bias=linear.bias))})
            elif name in self._changed:
                stored[f"{name}.weight"] = linear.weight.astype(self._dtype)
        mx.eval(stored)
        return stored


def _scale_rows(linear: ops.Dense, scales: mx.array) -> ops.Dense:
    bias = None if linear.bias is None else linear.bias * scales
    return ops.Dense(linear.weight * scales[:, None], bias)


def _scale_columns(linear: ops.Dense, scales: mx.array) -> ops.Dense:
    return ops.Dense(linear.weight * scales, linear.bias)
