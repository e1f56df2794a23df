"""Distilled weight quantization: scales and offsets trained towards the float model, the codes stay.

The codes are those of round-to-nearest, or of another method. What a group means by them, `offset + scale * code`, is
moved so that the quantized model's next tokens come closer to the float model's in KL divergence (distillation:
Hinton, Vinyals and Dean 2015; of scales and offsets: as mlx-lm's dwq made it known). Nothing is added to the model.
Knows no files; holds the whole model.
"""

import math
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import mlx.core as mx
from mlx.optimizers import Adam

from mlx_edge import ops
from mlx_edge.calibration.layerwise import LayerwiseModel, as_dense, embed_with, forward_layer
from mlx_edge.calibration.sensitivity import kl_divergence
from mlx_edge.errors import InvalidRequestError
from mlx_edge.models.decoder import Layer
from mlx_edge.models.linears import replace_linears
from mlx_edge.quant import Grid, Packing, pack, quantize, snap_scales, stored_tensors, unpack

VALIDATION = 8  # of every so many rows one chooses among the steps, and is not trained on
PARTS = ("weight", "scales", "biases")  # of a packed layer in a file
Shift = tuple[mx.array, mx.array]  # of a weight's grid: see `Codes.moved`
Progress = Callable[[int, int], None]  # steps done, of how many


@dataclass(frozen=True)
class Codes:
    """A weight whose codes are fixed, and the grid that its groups start from."""

    codes: mx.array  # (N, E / group_size, group_size) uint8
    start: Grid
    packing: Packing
    dtype: mx.Dtype  # of stored scales and offsets
    bias: mx.array | None

    @staticmethod
    def of(weight: ops.Quantized, dtype: mx.Dtype) -> "Codes":
        """Those of an affine weight; its scales and offsets are where training starts."""
        codes, start = unpack(weight)
        codes = codes.reshape(*start.scales.shape, weight.group_size)
        mx.eval(codes, start.scales, start.offsets)
        return Codes(codes, start, Packing(weight.group_size, weight.bits), dtype, weight.bias)

    def no_shift(self) -> Shift:
        """The one that leaves the grid where it started."""
        return mx.zeros_like(self.start.scales), mx.zeros_like(self.start.scales)

    def moved(self, shift: Shift) -> Grid:
        """The grid as stored, after its middle has moved by shift[0] steps and its ends by shift[1] away from there.

        In these units one learning rate serves all layers and bits. The gradient passes the rounding unchanged.
        """
        middle = (self.packing.num_codes - 1) / 2
        scales = self.start.scales * (1 + shift[1] / middle)
        offsets = self.start.offsets + self.start.scales * (shift[0] - shift[1])
        return Grid(
            *(x + mx.stop_gradient(snap_scales(x, self.dtype) - x) for x in (scales, offsets))
        )

    def dense(self, shift: Shift) -> ops.Dense:
        """The float32 values (N, E) on the moved grid."""
        values = self.moved(shift).values(self.codes.astype(mx.float32))
        return ops.Dense(values.reshape(self.codes.shape[0], -1), self.bias)

    def stored(self, name: str, shift: Shift) -> dict[str, mx.array]:
        """The tensors of the moved weight, as a file holds them."""
        codes = self.codes.reshape(self.codes.shape[0], -1)
        return stored_tensors(name, pack(codes, self.moved(shift), self.packing, self.dtype))


Shifts = dict[str, Shift]  # by layer name


def quantize_dwq(
    model: LayerwiseModel,
    rows: mx.array,
    packings: Mapping[str, Packing | None],
    dtype: mx.Dtype,
    *,
    start: Mapping[str, mx.array] | None = None,
    epochs: int = 2,
    batch_tokens: int = 512,
    learning_rate: float = 0.003,
    on_progress: Progress | None = None,
) -> Iterator[dict[str, mx.array]]:
    """The packed layers of a model as stored, layer by layer, with trained scales and offsets in `dtype`.

    `rows` (R, L) int32 are calibration tokens, R at least 2; one of eight only chooses among the epochs, so that on
    those the result is never worse than the start: tensors of layers as another method has stored them (`gptq`), and
    round-to-nearest for the rest. Fresh text helps more than epochs. `learning_rate` is in steps of a group's grid, a
    step of training takes about `batch_tokens`. Holds the codes and scales, and the float model's last hidden states.

    Raises: InvalidRequestError for a packing that has no scales to train (all but affine), for fewer than 2 rows, and
    for a start that changes more than packed layers.
    """
    for name, packing in packings.items():
        if packing is not None and packing.mode != "affine":
            raise InvalidRequestError(
                f"{name}: dwq trains affine scales, {packing} has none; use rtn for it, or affine bits"
            )
    if rows.shape[0] < 2:
        raise InvalidRequestError(
            f"dwq got {rows.shape[0]} row of calibration tokens, expected 2 or more: one to choose by; "
            "give a longer text or a smaller --sequence-length"
        )
    start = start or {}
    parts = {f"{name}.{part}" for name, p in packings.items() if p for part in PARTS}
    if foreign := sorted(start.keys() - parts):
        raise InvalidRequestError(
            f"dwq cannot start from a method that changes {foreign[0]}, only from one of packed layers: gptq or rtn"
        )
    student = Student(model, packings, dtype, start)
    batch_rows = max(1, batch_tokens // rows.shape[1])
    training = Training(student, model.run(rows), rows, batch_rows, learning_rate)
    shifts = training.run(epochs, on_progress or (lambda _done, _all: None))
    for names in student.names:
        tensors: dict[str, mx.array] = {}
        for name in names:
            tensors |= student.codes[name].stored(name, shifts[name])
        if tensors:
            yield tensors


class Student:
    """The quantized model as a function of the shifts of its grids."""

    def __init__(
        self,
        model: LayerwiseModel,
        packings: Mapping[str, Packing | None],
        dtype: mx.Dtype,
        start: Mapping[str, mx.array],
    ) -> None:
        self.codes: dict[str, Codes] = {}
        self.names: list[
            list[str]
        ] = []  # of what is packed, layer by layer; last the embedding and the head
        self._model, self._packings, self._dtype, self._start = model, packings, dtype, start
        self._layers = [self._take_layer(index) for index in range(model.num_layers)]
        family = model.config.family
        self.teacher_head = model.read_head()
        ends = {family.embedding: model.read_table()}
        if not model.is_tied:
            ends[family.head] = as_dense(self.teacher_head.projection)
        self._ends = self._take(ends)

    def _take(self, linears: Mapping[str, ops.Linear]) -> dict[str, ops.Dense]:
        """Those that stay in floats; of the others the codes are kept."""
        dense = {name: as_dense(linear) for name, linear in linears.items()}
        packed = {name: self._packings[name] for name in dense}
        codes = {
            name: Codes.of(self._quantized(name, dense[name], packing), self._dtype)
            for name, packing in packed.items()
            if packing is not None
        }
        self.codes |= codes
        self.names.append(list(codes))
        return {name: linear for name, linear in dense.items() if name not in codes}

    def _quantized(self, name: str, linear: ops.Dense, packing: Packing) -> ops.Quantized:
        if f"{name}.weight" not in self._start:
            return quantize(linear.weight, packing, self._dtype, bias=linear.bias)
        weight, scales, offsets = (self._start[f"{name}.{part}"] for part in PARTS)
        return ops.Quantized(
            weight, scales, offsets, packing.group_size, packing.bits, bias=linear.bias
        )

    def _take_layer(self, index: int) -> Layer:
        layer = self._model.read_layer(index)
        linears = self._model.find_linears(layer, index)
        self._take(linears)
        empty = {name: ops.Dense(mx.zeros((0, 0))) for name in self.names[-1]}
        return replace_linears(layer, self._model.config, index, empty)

    def no_shifts(self) -> Shifts:
        """Those of round-to-nearest."""
        return {name: codes.no_shift() for name, codes in self.codes.items()}

    def logits(self, shifts: Shifts, rows: mx.array) -> mx.array:
        """Logits (R, L, V) of token rows (R, L)."""
        config = self._model.config
        dense = {name: self.codes[name].dense(shift) for name, shift in shifts.items()}
        ends = self._ends | dense
        table = ends[config.family.embedding]
        hidden = embed_with(table, rows, config)
        for index, layer in enumerate(self._layers):
            hidden = forward_layer(replace_linears(layer, config, index, dense), hidden)
        projection = ends.get(config.family.head, table)
        return ops.head(hidden, replace(self.teacher_head, projection=projection))


class Training:
    """Adam (Kingma and Ba 2015) on the KL divergence from the float model; keeps the best shifts that it met."""

    def __init__(
        self,
        student: Student,
        targets: mx.array,  # (R, L, E): the float model's last hidden states
        rows: mx.array,
        batch_rows: int,
        learning_rate: float,
    ) -> None:
        self._student, self._targets, self._rows = student, targets, rows
        self._batch_rows, self._learning_rate = batch_rows, learning_rate
        self._chosen_by = _spread_rows(rows.shape[0])
        self._trained_on = sorted(set(range(rows.shape[0])) - set(self._chosen_by))

    def _loss(self, shifts: Shifts, places: mx.array) -> mx.array:
        """Mean KL in nats per token over some of the rows."""
        with ops.reference():
            expected = ops.head(self._targets[places], self._student.teacher_head)
            found = self._student.logits(shifts, self._rows[places])
            return kl_divergence(expected, found).mean()

    def _validate(self, shifts: Shifts) -> float:
        """Mean KL over the rows that choose."""
        total = 0.0
        for places in _batches(self._chosen_by, self._batch_rows):
            total += float(self._loss(shifts, mx.array(places))) * len(places)
        return total / len(self._chosen_by)

    def run(self, epochs: int, on_progress: Progress) -> Shifts:
        """The best shifts after any epoch, those at the start included."""
        shifts = self._student.no_shifts()
        best, least = shifts, self._validate(shifts)
        num_steps = epochs * -(-len(self._trained_on) // self._batch_rows)
        optimizer = Adam(self._learning_rate, bias_correction=True)
        step_of = mx.value_and_grad(self._loss)
        step = 0
        for epoch in range(epochs):
            order = random.Random(epoch).sample(self._trained_on, len(self._trained_on))
            for batch in _batches(order, self._batch_rows):
                optimizer.learning_rate = self._learning_rate * schedule(step, num_steps)
                _, gradient = step_of(shifts, mx.array(batch))
                shifts = optimizer.apply_gradients(gradient, shifts)
                mx.eval(shifts, optimizer.state)
                step += 1
                on_progress(step, num_steps)
            found = self._validate(shifts)
            if found < least:
                best, least = shifts, found
        return best


def schedule(step: int, num_steps: int) -> float:
    """The share of the learning rate at a step: a tenth of the steps to warm up, then half a cosine down to 0."""
    warm_up = max(1, num_steps // 10)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 + 0.5 * math.cos(math.pi * (step - warm_up + 1) / (num_steps - warm_up + 1))


def _spread_rows(num_rows: int) -> list[int]:
    """The rows that choose: one of every VALIDATION, at least one."""
    return list(range(min(VALIDATION, num_rows) - 1, num_rows, VALIDATION))


def _batches(places: list[int], size: int) -> list[list[int]]:
    return [places[i : i + size] for i in range(0, len(places), size)]
