"""Which packing each layer gets: the least sum of damages under a budget of bits, or the fewest bits under a damage.

A knapsack with one choice a layer, solved exactly by dynamic programming over sizes. The sizes of a model's layers
are multiples of a large number of bits, so that there are few sums; where there are too many, sizes are rounded up,
and the budget still holds. That damages add up is an estimate, to be checked by a measurement of the whole.
Knows a table of damages; no model and no file.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

from mlx_edge.calibration.sensitivity import Sensitivity
from mlx_edge.errors import InvalidRequestError
from mlx_edge.quant import Packing

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MAX_CELLS = 1 << 17  # different sizes that are told apart
FLOAT_BITS = {"float16": 16, "bfloat16": 16, "float32": 32}


@dataclass(frozen=True)
class Option:
    """One way to store a layer."""

    packing: Packing | None  # None: as floats
    num_bits: int  # of the whole layer, scales counted
    damage: float  # nats per token


def allocate(
    sensitivity: Sensitivity, *, target_bpw: float | None = None, max_kl: float | None = None
) -> dict[str, Packing | None]:
    """The packing of each layer, None where it stays in floats.

    `target_bpw` is a budget of bits per weight over all layers of the table, scales counted; the sum of damages is the
    smallest that it allows. `max_kl` is a sum of damages; the size is the smallest that allows it. Of equal ones the
    smaller is taken, then the one with the smaller damage. Raises: InvalidRequestError unless exactly one of the two
    is given and can be had.
    """
    if (target_bpw is None) == (max_kl is None):
        raise InvalidRequestError("give either target_bpw or max_kl")
    options = list_options(sensitivity)
    if target_bpw is not None:
        chosen = fit_budget(list(options.values()), _budget(sensitivity, options, target_bpw))
    else:
        assert max_kl is not None
        if not max_kl >= 0:  # also nan
            raise InvalidRequestError(f"max_kl is {max_kl}, expected nats per token from 0")
        chosen = fit_damage(list(options.values()), max_kl)
    return {name: option.packing for name, option in zip(options, chosen, strict=True)}


def list_options(sensitivity: Sensitivity) -> dict[str, list[Option]]:
    """What each layer may be stored as, by layer name: the candidates that fit it, and floats."""
    float_bits = FLOAT_BITS[sensitivity.dtype]
    options = {}
    for name, (rows, columns) in sensitivity.shapes.items():
        found = [Option(None, rows * columns * float_bits, 0.0)]
        for packing, damage in zip(sensitivity.candidates, sensitivity.damages[name], strict=True):
            if damage is not None:
                found.append(
                    Option(packing, packed_bits(rows * columns, packing, float_bits), damage)
                )
        options[name] = found
    return options


def packed_bits(num_weights: int, packing: Packing, scale_bits: int) -> int:
    """What a packed layer takes."""
    return int(num_weights * Fraction(packing.bits_per_weight(scale_bits)))


def bits_per_weight(
    packings: Mapping[str, Packing | None], shapes: Mapping[str, tuple[int, int]], float_bits: int
) -> float:
    """The real mean over layers of these shapes, scales counted."""
    weights = {name: rows * columns for name, (rows, columns) in shapes.items()}
    total = sum(
        number * float_bits if packing is None else packed_bits(number, packing, float_bits)
        for name, number in weights.items()
        for packing in [packings[name]]
    )
    return total / sum(weights.values())


def predicted_kl(sensitivity: Sensitivity, packings: Mapping[str, Packing | None]) -> float:
    """The sum of damages, an estimate of the mean KL of the whole model; a `measured / predicted` ratio corrects it."""
    total = 0.0
    for name, row in sensitivity.damages.items():
        packing = packings[name]
        damage = 0.0 if packing is None else row[sensitivity.candidates.index(packing)]
        assert damage is not None
        total += damage
    return total


def _budget(
    sensitivity: Sensitivity, options: Mapping[str, Sequence[Option]], target_bpw: float
) -> int:
    num_weights = sum(rows * columns for rows, columns in sensitivity.shapes.values())
    least = sum(min(option.num_bits for option in choice) for choice in options.values())
    if not target_bpw * num_weights >= least:  # also nan
        raise InvalidRequestError(
            f"target_bpw is {target_bpw:g}; the measured candidates reach down to "
            f"{math.ceil(least / num_weights * 1000) / 1000:g} bits per weight"
        )
    return int(min(target_bpw, 64.0) * num_weights)


def fit_budget(choices: Sequence[Sequence[Option]], budget: int) -> list[Option]:
    """One option of each choice with the least sum of damages of all that take at most `budget` bits.

    At least the smallest option of each must fit.
    """
    import numpy as np  # slow to import

    ordered = [_without_dominated(choice) for choice in choices]
    room = budget - sum(choice[0].num_bits for choice in ordered)
    assert room >= 0
    damage, taken, cell = _fill(ordered, room)
    return _trace(ordered, taken, cell, int(np.argmin(damage)))  # the first is the smallest


def fit_damage(choices: Sequence[Sequence[Option]], max_damage: float) -> list[Option]:
    """One option of each choice that take the fewest bits of all with a sum of damages of at most `max_damage`.

    At least the options of least damage must fit.
    """
    import numpy as np

    ordered = [_without_dominated(choice) for choice in choices]
    damage, taken, cell = _fill(ordered, sum(choice[-1].num_bits for choice in ordered))
    reached = np.flatnonzero(damage <= max_damage)
    assert len(reached)
    return _trace(ordered, taken, cell, int(reached[0]))


def _without_dominated(choice: Sequence[Option]) -> list[Option]:
    """The options by rising size, those left out that cost no less damage than a smaller one."""
    kept: list[Option] = []
    for option in sorted(choice, key=lambda option: (option.num_bits, option.damage)):
        if not kept or option.damage < kept[-1].damage:
            kept.append(option)
    return kept


def _fill(
    choices: Sequence[Sequence[Option]], room: int
) -> tuple["NDArray[np.float64]", list["NDArray[np.uint8]"], int]:
    """The dynamic program over what options take beyond the smallest of their choice, in cells of some bits.

    Returns the least damage for each number of cells that is exactly used, up to `room` bits; the option that each
    choice takes last to get there; and the bits of a cell.
    """
    import numpy as np

    step = math.gcd(*(o.num_bits - choice[0].num_bits for choice in choices for o in choice)) or 1
    most = sum(choice[-1].num_bits - choice[0].num_bits for choice in choices)
    cell = step * max(1, math.ceil(min(room, most) / step / MAX_CELLS))
    all_cells = sum(_cells(choice[-1], choice[0], cell) for choice in choices)
    damage = np.full((room // cell if room < most else all_cells) + 1, np.inf)
    damage[0] = 0.0
    taken = []
    for choice in choices:
        after = np.full_like(damage, np.inf)
        number = np.zeros(len(damage), np.uint8)
        for place, option in enumerate(choice):
            cells = _cells(option, choice[0], cell)
            if cells < len(damage):
                found = damage[: len(damage) - cells] + option.damage
                better = found < after[cells:]
                after[cells:][better] = found[better]
                number[cells:][better] = place
        damage = after
        taken.append(number)
    return damage, taken, cell


def _cells(option: Option, smallest: Option, cell: int) -> int:
    return -(-(option.num_bits - smallest.num_bits) // cell)


def _trace(
    choices: Sequence[Sequence[Option]], taken: Sequence["NDArray[np.uint8]"], cell: int, at: int
) -> list[Option]:
    """The options behind a number of cells, in the order of the choices."""
    chosen = []
    for choice, number in zip(reversed(choices), reversed(taken), strict=True):
        chosen.append(choice[int(number[at])])
        at -= _cells(chosen[-1], choice[0], cell)
    assert at == 0
    return chosen[::-1]
