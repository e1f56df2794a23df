"""A model's linears under the names of its files, where one tensor may hold several and names may begin otherwise.

Calibrating methods know the linears one by one, by the names of their family. Knows no method.
"""

from collections.abc import Mapping

import mlx.core as mx

from mlx_edge.calibration.layerwise import LayerwiseModel
from mlx_edge.conversion.plan import Packings
from mlx_edge.models.assembly import find_splits
from mlx_edge.models.linears import stored_parts
from mlx_edge.models.tensors import find_prefix, stored_name


class StoredNames:
    """Which linears each layer of a model's files holds, one below another."""

    def __init__(self, model: LayerwiseModel) -> None:
        """Reads names alone; embedding and head are among the layers."""
        config, self._checkpoint = model.config, model.checkpoint
        family = config.family
        self._prefix = find_prefix(self._checkpoint.names(), family.embedding)
        self._rows = find_splits(self._checkpoint, config)  # of the linears of a layer
        ends = [family.embedding] if model.is_tied else [family.embedding, family.head]
        parts: dict[str, tuple[str, ...]] = {name: (name,) for name in ends}
        for index in range(config.num_layers):
            parts |= stored_parts(config, index)
        self.parts: Mapping[str, tuple[str, ...]] = {
            stored_name(name, self._prefix): linears for name, linears in parts.items()
        }
        self._layer_of = {part: layer for layer, of in self.parts.items() for part in of}

    def of(self, name: str) -> str:
        """The layer that holds a linear; of a norm or a tied head its own name, as the files spell it."""
        return self._layer_of.get(name) or stored_name(name, self._prefix)

    def spread(self, packings: Packings) -> Packings:
        """The packing of each linear, from those of the layers."""
        return {part: packings[layer] for layer, parts in self.parts.items() for part in parts}

    def join(self, tensors: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """Tensors of linears and norms as those of the files' layers; parts that are missing are the source's."""
        joined: dict[str, mx.array] = {}
        for name, tensor in tensors.items():
            linear, _, kind = name.rpartition(".")
            layer = self.of(linear)
            parts = self.parts.get(layer, ())
            if len(parts) < 2:
                joined[f"{layer}.{kind}"] = tensor
            elif f"{layer}.{kind}" not in joined:
                own = self._own_parts(f"{layer}.{kind}", parts, kind, tensors, tensor.dtype)
                joined[f"{layer}.{kind}"] = mx.concatenate(own)
        return joined

    def _own_parts(
        self,
        stored: str,
        parts: tuple[str, ...],
        kind: str,
        tensors: Mapping[str, mx.array],
        dtype: mx.Dtype,
    ) -> list[mx.array]:
        """The rows of each linear in a tensor of the files."""
        found = [tensors.get(f"{part}.{kind}") for part in parts]
        if any(part is None for part in found):  # only floats are made part by part
            rows = self._rows[stored.removesuffix(f".{kind}")]
            ends = [sum(rows[:count]) for count in range(1, len(rows))]
            own = mx.split(self._checkpoint.read(stored).astype(dtype), ends)
            found = [own[i] if part is None else part for i, part in enumerate(found)]
        return [part for part in found if part is not None]
