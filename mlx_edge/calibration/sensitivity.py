"""How much a model suffers from each way to pack each of its layers: one layer is quantized, all others stay.

The damage is the mean KL divergence of the model's next token from that of the float model. The table is saved and
used again; it knows nothing of budgets, and the codes are those of round-to-nearest.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from mlx_edge import ops
from mlx_edge.calibration.layerwise import LayerwiseModel, as_dense, embed_with
from mlx_edge.calibration.text import spread
from mlx_edge.errors import InvalidRequestError
from mlx_edge.models.linears import replace_linears
from mlx_edge.quant import MODES, Packing, dequantize, quantize

CANDIDATES = tuple(Packing(group, bits) for bits in (2, 3, 4, 5, 6, 8) for group in (128, 64, 32))
DTYPES = ("float16", "bfloat16", "float32")
MAX_TOKENS = 2048  # 1024 already tell layers apart; the time is that of hundreds of runs over them
VARIANT_TOKENS = 1 << 14  # whose hidden states are held at once
Progress = Callable[[int, int], None]  # done, of how many


def kl_divergence(expected: mx.array, found: mx.array) -> mx.array:
    """KL(p || q) in nats of the softmax of logits (..., V), expected p and found q: (...) float32. Differentiable."""
    log_p = ops.log_softmax(expected)
    return (mx.exp(log_p) * (log_p - ops.log_softmax(found))).sum(-1)


@dataclass(frozen=True)
class Sensitivity:
    """The damage (mean KL, nats per token) of each packing of each layer, all other layers being floats."""

    shapes: Mapping[
        str, tuple[int, int]
    ]  # of each linear, the embedding and the head, by layer name
    candidates: tuple[Packing, ...]
    damages: Mapping[str, tuple[float | None, ...]]  # one a candidate; None where it cannot be
    dtype: str  # of scales, offsets and floats: "float16", "bfloat16", "float32"
    num_tokens: int  # that it was measured on
    sha256: str  # of the token rows

    def select(
        self, shapes: Mapping[str, tuple[int, int]], candidates: Sequence[Packing], dtype: mx.Dtype
    ) -> "Sensitivity":
        """The columns of these candidates, for a model of these shapes, stored in `dtype`.

        Raises: InvalidRequestError naming the first layer, candidate or dtype that the table was not made for.
        """
        advice = "measure the sensitivity of this model again"
        for name in [*shapes, *self.shapes]:
            if shapes.get(name) != self.shapes.get(name):
                found, expected = self.shapes.get(name), shapes.get(name)
                raise InvalidRequestError(
                    f"sensitivity table: {name} is {_show(found)}, the model's is {_show(expected)}; {advice}"
                )
        for packing in candidates:
            if packing not in self.candidates:
                raise InvalidRequestError(
                    f"sensitivity table: {packing} was not measured; {advice}"
                )
        if _dtype_name(dtype) != self.dtype:
            raise InvalidRequestError(
                f"sensitivity table: it is for scales in {self.dtype}, asked for {_dtype_name(dtype)}; {advice}"
            )
        places = [self.candidates.index(packing) for packing in candidates]
        damages = {name: tuple(row[i] for i in places) for name, row in self.damages.items()}
        return replace(self, candidates=tuple(candidates), damages=damages)

    def join(self, parts: Mapping[str, Sequence[str]]) -> "Sensitivity":
        """One row for all layers that are parts of one, their damages added up, as an allocation adds those of layers.

        `parts` has every layer of the new table, with the layers of this one below another in it.
        """
        rows = {
            name: zip(*(self.damages[part] for part in of), strict=True)
            for name, of in parts.items()
        }
        damages = {name: tuple(map(_add_up, columns)) for name, columns in rows.items()}
        return replace(self, shapes=join_shapes(self.shapes, parts), damages=damages)

    def to_json(self) -> str:
        """As `from_json` reads it."""
        layers = {
            name: {"shape": list(shape), "damage": list(self.damages[name])}
            for name, shape in self.shapes.items()
        }
        candidates = [
            {"bits": p.bits, "group_size": p.group_size, "mode": p.mode} for p in self.candidates
        ]
        head = {"num_tokens": self.num_tokens, "sha256": self.sha256, "dtype": self.dtype}
        return json.dumps({**head, "candidates": candidates, "layers": layers}, indent=1) + "\n"

    @staticmethod
    def from_json(text: str) -> "Sensitivity":
        """Raises: InvalidRequestError for a text that is no such table."""
        try:
            fields = json.loads(text)
            sensitivity = Sensitivity(
                shapes={name: _read_shape(row["shape"]) for name, row in fields["layers"].items()},
                candidates=tuple(_read_packing(row) for row in fields["candidates"]),
                damages={name: tuple(row["damage"]) for name, row in fields["layers"].items()},
                dtype=fields["dtype"],
                num_tokens=fields["num_tokens"],
                sha256=fields["sha256"],
            )
            sensitivity._check()
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            reason = ascii(f"{type(error).__name__}: {error}")[1:-1][:200]
            raise InvalidRequestError(
                f"sensitivity table: not one or broken ({reason}); measure the sensitivity again"
            ) from None
        return sensitivity

    def _check(self) -> None:
        """Raises: ValueError for what no measurement gives."""
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}, expected one of {', '.join(DTYPES)}")
        if not self.shapes or len(set(self.candidates)) != len(self.candidates):
            raise ValueError("no layers, or a candidate twice")
        if type(self.num_tokens) is not int or not isinstance(self.sha256, str):
            raise ValueError("num_tokens is no integer, or sha256 no string")
        for name, row in self.damages.items():
            for packing, damage in zip(self.candidates, row, strict=True):
                can_be = packing.refusal(self.shapes[name]) is None
                if can_be != (damage is not None):
                    raise ValueError(f"{name}, {packing}: a damage is missing or should be null")
                if damage is not None and not (type(damage) is float and 0 <= damage < math.inf):
                    raise ValueError(
                        f"{name}, {packing}: damage is {damage!r}, expected nats from 0"
                    )


def join_shapes(
    shapes: Mapping[str, tuple[int, int]], parts: Mapping[str, Sequence[str]]
) -> dict[str, tuple[int, int]]:
    """Rows and columns of the layers whose parts lie one below another, from those of the parts."""
    return {
        name: (sum(shapes[part][0] for part in of), shapes[of[0]][1]) for name, of in parts.items()
    }


def _add_up(damages: Sequence[float | None]) -> float | None:
    known = [damage for damage in damages if damage is not None]
    return sum(known) if len(known) == len(damages) else None


def layer_shapes(model: LayerwiseModel) -> dict[str, tuple[int, int]]:
    """Rows and columns of every linear, the embedding and (unless it is the embedding) the head, by layer name."""
    family, head = model.config.family, model.read_head().projection
    shapes = {family.embedding: model.read_table().shape}
    for index in range(model.num_layers):
        linears = model.find_linears(model.read_layer(index), index)
        shapes |= {name: linear.shape for name, linear in linears.items()}
    return shapes if model.is_tied else {**shapes, family.head: head.shape}


def measure_sensitivity(
    model: LayerwiseModel,
    rows: mx.array,
    candidates: Sequence[Packing],
    dtype: mx.Dtype,
    *,
    max_tokens: int = MAX_TOKENS,
    on_progress: Progress | None = None,
) -> Sensitivity:
    """The damage of every candidate to every layer, over token rows (R, L) int32; scales are stored in `dtype`.

    Of more than `max_tokens` so many are taken, whole rows, evenly over them all.
    Holds one layer in float32 and the hidden states of a few variants of the model. The time is that of about
    candidates * linears / 2 runs of the model over the rows. Raises: InvalidRequestError where logits are not finite.
    """
    taken = spread(list(range(rows.shape[0])), max(1, max_tokens // rows.shape[1]))
    rows = rows[mx.array(taken)]
    return _Measure(
        model, rows, tuple(candidates), dtype, on_progress or (lambda _i, _n: None)
    ).run()


class _Measure:
    """One measurement: the float model's logits, and the damages found so far."""

    def __init__(
        self,
        model: LayerwiseModel,
        rows: mx.array,
        candidates: tuple[Packing, ...],
        dtype: mx.Dtype,
        on_progress: Progress,
    ) -> None:
        self._model, self._rows, self._candidates, self._dtype = model, rows, candidates, dtype
        self._on_progress = on_progress
        self._last = model.run(rows)
        self._head = model.read_head()
        self._shapes = layer_shapes(model)
        self._damages: dict[str, list[float | None]] = {
            name: [None] * len(candidates) for name in self._shapes
        }
        self._num_done = 0
        self._num_variants = sum(
            p.refusal(shape) is None for shape in self._shapes.values() for p in candidates
        )

    def run(self) -> Sensitivity:
        """The whole table."""
        self._measure_embedding()
        hidden = self._model.embed(self._rows)
        for index in range(self._model.num_layers):
            hidden = self._measure_layer(index, hidden)
        if not self._model.is_tied:
            for place, head in self._variants(
                self._model.config.family.head, self._head.projection
            ):
                self._note(self._model.config.family.head, place, self._last, head)
        return Sensitivity(
            shapes=self._shapes,
            candidates=self._candidates,
            damages={name: tuple(row) for name, row in self._damages.items()},
            dtype=_dtype_name(self._dtype),
            num_tokens=int(self._rows.size),
            sha256=hash_rows(self._rows),
        )

    def _variants(self, name: str, linear: ops.Linear) -> Iterator[tuple[int, ops.Dense]]:
        """The values that each candidate gives a layer, and the candidate's number."""
        dense = as_dense(linear)
        for place, packing in enumerate(self._candidates):
            if packing.refusal(dense.shape) is None:
                weight = dequantize(quantize(dense.weight, packing, self._dtype))
                yield place, ops.Dense(weight, dense.bias)

    def _measure_embedding(self) -> None:
        name = self._model.config.family.embedding
        for place, table in self._variants(name, self._model.read_table()):
            [hidden] = self._finish(0, [embed_with(table, self._rows, self._model.config)])
            head = table if self._model.is_tied else self._head.projection
            self._note(name, place, hidden, head)

    def _measure_layer(self, index: int, hidden: mx.array) -> mx.array:
        """Measures the linears of a layer that the float model's states (R, L, E) enter; the states that leave it."""
        model = self._model
        layer = model.read_layer(index)
        pending: list[tuple[str, int, mx.array]] = []
        for name, linear in model.find_linears(layer, index).items():
            for place, variant in self._variants(name, linear):
                changed = replace_linears(layer, model.config, index, {name: variant})
                pending.append((name, place, model.run_layer(changed, index, hidden)))
                if len(pending) * hidden.shape[0] * hidden.shape[1] >= VARIANT_TOKENS:
                    self._settle(index, pending)
                    pending = []
        self._settle(index, pending)
        return model.run_layer(layer, index, hidden)

    def _settle(self, index: int, pending: list[tuple[str, int, mx.array]]) -> None:
        """Takes variants that have passed layer `index` through the rest of the model."""
        states = self._finish(index + 1, [hidden for _, _, hidden in pending])
        for (name, place, _), hidden in zip(pending, states, strict=True):
            self._note(name, place, hidden, self._head.projection)

    def _finish(self, start: int, states: list[mx.array]) -> list[mx.array]:
        """Hidden states of several variants through the float layers from `start` on; each layer is read once."""
        if not states:
            return []
        together = mx.concatenate(states)
        for index in range(start, self._model.num_layers):
            together = self._model.run_layer(self._model.read_layer(index), index, together)
        return list(mx.split(together, len(states)))

    def _note(self, name: str, place: int, hidden: mx.array, projection: ops.Linear) -> None:
        head = replace(self._head, projection=projection)
        block = max(1, (1 << 22) // (hidden.shape[1] * self._model.config.vocab_size))
        total = 0.0
        for start in range(0, hidden.shape[0], block):
            with ops.reference():
                expected = ops.head(self._last[start : start + block], self._head)
                found = ops.head(hidden[start : start + block], head)
                total += float(kl_divergence(expected, found).sum())
        if not math.isfinite(total):
            raise InvalidRequestError(
                f"{name}: the model's logits are not finite with it in {self._candidates[place]}; "
                "the weights hold nan or infinity"
            )
        self._damages[name][place] = max(0.0, total / int(self._rows.size))
        self._num_done += 1
        self._on_progress(self._num_done, self._num_variants)


def hash_rows(rows: mx.array) -> str:
    """SHA-256 of token rows: their shape and their numbers as int32."""
    import numpy as np  # slow to import

    return hashlib.sha256(
        f"{rows.shape}".encode() + np.array(rows).astype("<i4").tobytes()
    ).hexdigest()


def _read_shape(sizes: list[int]) -> tuple[int, int]:
    rows, columns = sizes
    if not all(type(size) is int and 0 < size < 1 << 31 for size in sizes):
        raise ValueError(f"shape is {sizes}, expected two sizes")
    return rows, columns


def _read_packing(fields: dict[str, Any]) -> Packing:
    packing = Packing(**fields)
    bits, group_sizes = MODES[packing.mode]
    if packing.bits not in bits or packing.group_size not in group_sizes:
        raise ValueError(f"{packing} is no packing of {packing.mode}")
    return packing


def _dtype_name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")


def _show(shape: tuple[int, int] | None) -> str:
    return "missing" if shape is None else f"{shape[0]} x {shape[1]}"
