"""Quantizes a loaded model in memory: int8 or fewer bits for weights, int8 for what they are multiplied with.

    quantizer = Quantizer(QuantMode.STATIC, bits=8).with_calibration(token_rows)
    smaller = quantizer.quantize(model)

Works on any model that is a tree of frozen records and tuples with the ops' records of weights in it, and that makes
logits of tokens when it is called. Knows neither its layers nor files: a weight's name is its path in the tree.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, TypeVar

import mlx.core as mx

from mlx_edge import ops
from mlx_edge.errors import InvalidRequestError
from mlx_edge.quant.formats import MODES, Packing
from mlx_edge.quant.groups import Granularity, make_grid, quantize_onto
from mlx_edge.quant.inputs import InputStatistics
from mlx_edge.quant.search import find_grid
from mlx_edge.quant.token_rows import TokenRows, read_blocks
from mlx_edge.quant.tree import FoundWeight, find_weights, replace_weights
from mlx_edge.runtime import connect_blas, convert_float

Model = TypeVar("Model")


class QuantMode(Enum):
    """How the numbers that meet quantized weights become int8."""

    DYNAMIC = "dynamic"  # in steps of their own, as they come: what the CPU kernels do; elsewhere they stay floats
    STATIC = "static"  # in one step per layer, fixed by calibration


@dataclass(frozen=True)
class Quantizer:
    """How a model is to be quantized; making one does no work.

    `bits` of a weight are 2, 3, 4, 5, 6 or 8 in groups of 32, 64 or 128 columns. `symmetric` grids have zero in the
    middle; a scale is chosen `per` group, channel (row) or tensor, and stored for each group. What `keep` names stays
    as it is: paths as in "head" or "layers.0.mlp.down", with all below them, or a function of a path. The routers of
    mixtures of experts stay, too; experts are rounded without a look at a text, and their inputs have no fixed steps.

    Raises: InvalidRequestError for what is not one of these.
    """

    mode: QuantMode
    bits: int = 8
    group_size: int = 64
    symmetric: bool = False
    per: Granularity = "group"
    keep: Collection[str] | Callable[[str], bool] = ()
    calibration: tuple[mx.array, ...] = field(default=(), repr=False)  # (R, L) int32 each

    def __post_init__(self) -> None:
        _check("mode", self.mode, tuple(QuantMode))
        _check("bits", self.bits, tuple(bits for bits in sorted(MODES["affine"][0]) if bits > 1))
        _check("group_size", self.group_size, tuple(sorted(MODES["affine"][1])))
        _check("per", self.per, ("group", "channel", "tensor"))
        if isinstance(self.keep, str):
            raise InvalidRequestError(f"keep is {self.keep!r}, expected a collection of names")

    def with_calibration(self, data: TokenRows | Iterable[TokenRows]) -> "Quantizer":
        """The same with a text to calibrate on: rows of tokens, or an iterable of rows or of batches of them.

        In both modes weights are then rounded so that the outputs on this text suffer least; STATIC takes from it the
        steps of the inputs as well.

        Raises: InvalidRequestError when it holds no tokens, or other things.
        """
        blocks = tuple(read_blocks(data))
        if not blocks:
            raise InvalidRequestError(
                "the calibration data hold no tokens; give rows of token ids, some thousands in all"
            )
        return replace(self, calibration=blocks)

    def quantize(self, model: Model) -> Model:
        """The model with its weights quantized; the given one stays as it is.

        Where the weights were packed for the CPU kernels, so are the new ones, as far as the kernels serve them.

        Raises: InvalidRequestError for STATIC without calibration, weights that are quantized already, hold NaN or do
        not divide into groups, and names in `keep` that the model does not have.
        """
        if self.mode is QuantMode.STATIC and not self.calibration:
            raise InvalidRequestError(
                "QuantMode.STATIC fixes the steps of inputs by a text; call with_calibration(tokens) first"
            )
        found = {id(one.weight): one for one in find_weights(model)}
        wanted = {
            key: one
            for key, one in found.items()
            if one.role != "router" and not self._is_kept(one.name)
        }
        self._refuse_unknown(tuple(one.name for one in found.values()))
        statistics = self._measure(model, found, wanted) if self.calibration else {}
        made: dict[int, ops.Linear] = {}
        for key, one in wanted.items():
            made[key] = self._quantize(one, statistics.get(one.name))
            mx.eval(_arrays(made[key]))
        quantized: Model = replace_weights(model, made)
        return quantized

    def _is_kept(self, name: str) -> bool:
        if callable(self.keep):
            return self.keep(name)
        return any(name == kept or name.startswith(f"{kept}.") for kept in self.keep)

    def _refuse_unknown(self, names: Sequence[str]) -> None:
        if not names:
            raise InvalidRequestError("the model has no weights of linears in it")
        if callable(self.keep):
            return
        for kept in self.keep:
            if not any(name == kept or name.startswith(f"{kept}.") for name in names):
                raise InvalidRequestError(
                    f"keep names {kept}, which the model does not have; its weights are {_some(names)}"
                )

    def _measure(
        self, model: Any, found: Mapping[int, FoundWeight], wanted: Mapping[int, FoundWeight]
    ) -> dict[str, InputStatistics]:
        """What goes into each linear when the float model reads the calibration text."""
        connect_blas()
        floats: dict[int, ops.Linear] = {}
        for key, one in found.items():
            weight = _restore(one.weight)
            if isinstance(weight, ops.Dense):  # converted once, not at each product
                weight = replace(weight, weight=convert_float(weight.weight))
            floats[key] = weight
        watched = {
            id(floats[key]): InputStatistics(one.name)
            for key, one in wanted.items()
            if one.role == "linear"
        }

        def watch(linear: ops.Linear, x: mx.array) -> None:
            if id(linear) in watched:
                watched[id(linear)].add(x)

        plain = replace_weights(model, floats)
        with ops.reference(), ops.watch_inputs(watch):
            for block in self.calibration:
                mx.eval(plain(block))
        unseen = [one.name for one in watched.values() if not one.has_rows]
        if unseen:
            raise InvalidRequestError(
                f"nothing went into {_some(unseen)} while calibrating; give a longer text, or name it in keep"
            )
        return {one.name: one for one in watched.values()}

    def _quantize(self, one: FoundWeight, statistics: InputStatistics | None) -> ops.Linear:
        dense, packing = _as_dense(one), Packing(self.group_size, self.bits)
        refusal = packing.refusal(dense.shape)
        if refusal is None and not mx.isfinite(dense.weight).all().item():
            refusal = "it holds NaN or infinity"
        if refusal:
            raise InvalidRequestError(
                f"{one.name} cannot be quantized: {refusal}; name it in keep, or choose another group_size"
            )
        options: dict[str, Any] = {"is_symmetric": self.symmetric, "per": self.per}
        weight, dtype = dense.weight, dense.weight.dtype
        if statistics is None:
            grid = make_grid(weight, packing, dtype, **options)
        else:
            grid = find_grid(weight, packing, dtype, statistics.column_weights, **options)
        quantized = quantize_onto(weight, grid, packing, dtype, bias=dense.bias)
        if self.mode is QuantMode.STATIC:
            scale = statistics.best_scale() if statistics else None
            return _in_compute_dtype(replace(quantized, input_scale=scale))
        return _pack_like(one.weight, quantized)


def _restore(weight: ops.Linear) -> ops.Dense | ops.Quantized:
    return weight.restore() if isinstance(weight, ops.Packed) else weight


def _as_dense(one: FoundWeight) -> ops.Dense:
    weight = _restore(one.weight)
    if isinstance(weight, ops.Dense):
        return weight
    raise InvalidRequestError(
        f"{one.name} has {weight.bits} bits already; quantize the float model, or name what is quantized in keep"
    )


def _pack_like(source: ops.Linear, quantized: ops.Quantized) -> ops.Linear:
    if not isinstance(source, ops.Packed) or source.repack is None:
        return _in_compute_dtype(quantized)
    try:
        return source.repack(quantized, "int8")
    except ValueError:  # not served: the reference takes it
        return _in_compute_dtype(quantized)


def _in_compute_dtype(weight: ops.Quantized) -> ops.Quantized:
    """As a loader would have it; the values are those of the narrower dtype."""
    assert weight.offsets is not None
    scales, offsets = convert_float(weight.scales), convert_float(weight.offsets)
    return replace(weight, scales=scales, offsets=offsets)


def _arrays(linear: ops.Linear) -> list[mx.array]:
    if not isinstance(linear, ops.Quantized):
        return []
    arrays = (linear.weight, linear.scales, linear.offsets)
    return [array for array in arrays if array is not None]


def _check(name: str, value: object, expected: Sequence[object]) -> None:
    if value not in expected:
        raise InvalidRequestError(
            f"{name} is {value!r}, expected one of {', '.join(map(str, expected))}"
        )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
