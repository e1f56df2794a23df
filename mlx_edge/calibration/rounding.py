"""A model as round-to-nearest would store it: its damage is measured before anything is written."""

from collections.abc import Mapping
from dataclasses import replace

import mlx.core as mx

from mlx_edge import ops
from mlx_edge.calibration.layerwise import LayerwiseModel, as_dense
from mlx_edge.models.decoder import Layer
from mlx_edge.models.linears import replace_linears
from mlx_edge.quant import Packing, dequantize, quantize


class RoundedModel(LayerwiseModel):
    """A float model whose weights are taken for what their packings leave of them."""

    def __init__(
        self, model: LayerwiseModel, packings: Mapping[str, Packing | None], dtype: mx.Dtype
    ) -> None:
        """`packings` has the embedding, every linear and a head of its own; scales are stored in `dtype`."""
        super().__init__(model.checkpoint, model.config)
        self._packings = packings
        self._dtype = dtype

    def read_layer(self, index: int) -> Layer:
        """One layer in float32, its linears rounded."""
        layer = super().read_layer(index)
        linears = self.find_linears(layer, index)
        rounded = {name: self._round(name, linear) for name, linear in linears.items()}
        return replace_linears(layer, self.config, index, rounded)

    def read_table(self) -> ops.Dense:
        """The token table in float32, rounded."""
        return self._round(self.config.family.embedding, super().read_table())

    def read_head(self) -> ops.HeadWeights:
        """The final norm, and the head rounded."""
        head, family = super().read_head(), self.config.family
        name = family.embedding if self.is_tied else family.head
        return replace(head, projection=self._round(name, head.projection))

    def _round(self, name: str, linear: ops.Linear) -> ops.Dense:
        dense, packing = as_dense(linear), self._packings[name]
        if packing is None:
            return dense
        return ops.Dense(dequantize(quantize(dense.weight, packing, self._dtype)), dense.bias)
