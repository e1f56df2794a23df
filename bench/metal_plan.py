"""What is counted for each model: the cases of a decode step, ours and MLX's, and the time that a roofline gives them.

A step is one sequence of M new rows. Norms, rotations, sums and updates that MLX launches one by one are priced by the
dispatches that wait for each other, not by bytes. Knows which kernels follow each other and not how they are counted.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bench.metal_cases import (
    Case,
    MLXProduct,
    OurAttention,
    OurProduct,
    Product,
    mlx_attention_case,
    mlx_route,
)
from bench.metal_graph import TWO_PASSES, Layer
from bench.metal_roofline import Chip, step_seconds
from bench.metal_shapes import CONTEXTS, LLAMA, MODELS, QWEN_SMALL, ROWS, Model
from bench.metal_work import LINE, Work

Works = Mapping[Case, Sequence[Work]]
EXACT_ROWS = (8, 16)  # where rows with the bits that they have alone go through another kernel
HEAD_ROWS = 16384  # of the vocabulary, that are counted
ONE_PART = 256  # positions of one part of our attention


@dataclass(frozen=True)
class Scope:
    """How much is counted."""

    name: str
    models: tuple[Model, ...]
    contexts: tuple[int, ...]
    rows: tuple[int, ...]
    most_rows: int | None = None  # of a matrix
    has_points: bool = True  # whether the published points are counted too


FULL = Scope("full", MODELS, CONTEXTS, ROWS)
QUICK = Scope("quick", (LLAMA, QWEN_SMALL), CONTEXTS[:2], (1, 8, 16), 1024)
TINY = Scope("tiny", (LLAMA,), CONTEXTS[:1], (1, 8), 64, has_points=False)  # a rehearsal


@dataclass(frozen=True)
class Part:
    """A case, and how many times a step has it."""

    case: Case
    times: int = 1


def our_products(model: Model, rows: int, scope: Scope, *, exact: bool = False) -> list[OurProduct]:
    """The four products of a layer."""
    p, most = model.projections, scope.most_rows
    launches: list[tuple[Product, tuple[str, ...]]] = [
        ("norm", ("q", "k", "v")),
        ("res", ("o",)),
        ("glu", ("gate", "up")),
        ("res", ("down",)),
    ]
    return [
        OurProduct(kind, tuple(p[n].rows for n in names), p[names[0]].columns, rows, exact, most)
        for kind, names in launches
    ]


def mlx_products(model: Model, rows: int, chip: Chip, scope: Scope) -> list[MLXProduct]:
    """The seven products of a layer, by the kernels that a chip gets."""
    return [
        MLXProduct(m, rows, mlx_route(m, rows, chip.generation, chip.size), 4, scope.most_rows)
        for m in model.projections.values()
    ]


def mlx_products_by_row(model: Model, rows: int, scope: Scope) -> list[MLXProduct]:
    """The seven products of a layer with each row on its own: M1's and M2's kernel for few rows."""
    return [MLXProduct(m, rows, "qmv", 4, scope.most_rows) for m in model.projections.values()]


def _least(*limits: int | None) -> int:
    return min(limit for limit in limits if limit is not None)


def our_step(model: Model, rows: int, context: int, scope: Scope) -> list[Part]:
    """Our dispatches of a step."""
    layer = [Part(case, model.num_layers) for case in our_products(model, rows, scope)]
    attention = []
    for positions, layers in model.attended(context).items():
        window = model.window if positions == model.window and positions < context else None
        stored = context if window else positions
        attention.append(Part(OurAttention(model.heads, rows, stored, 0, window or 0), layers))
    most = _least(HEAD_ROWS, scope.most_rows)
    head = OurProduct("norm", (model.vocabulary,), model.model_dim, rows, False, most)
    return [*layer, *attention, Part(head)]


def mlx_step(model: Model, rows: int, context: int, chip: Chip, scope: Scope) -> list[Part] | None:
    """MLX's products and attention of a step on a chip; None where its attention is spelled out."""
    layer = [Part(case, model.num_layers) for case in mlx_products(model, rows, chip, scope)]
    attention = []
    for positions, layers in model.attended(context).items():
        case = mlx_attention_case(model.heads, rows, positions, chip.size)
        if case is None:
            return None
        attention.append(Part(case, layers))
    route = mlx_route(model.head, rows, chip.generation, chip.size)
    most = _least(HEAD_ROWS, scope.most_rows)
    return [*layer, *attention, Part(MLXProduct(model.head, rows, route, 4, most))]


def steps(scope: Scope) -> list[tuple[Model, int, int]]:
    """Model, rows and context of every step."""
    return [
        (m, rows, context)
        for m in scope.models
        for context in scope.contexts
        for rows in scope.rows
    ]


def is_counted(parts: Sequence[Part], works: Works) -> bool:
    """Whether none of the cases was refused."""
    return all(part.case in works for part in parts)


def seconds(parts: Sequence[Part], works: Works, levels: float, chip: Chip) -> float | None:
    """The roofline's time; None where a case could not be counted."""
    if not is_counted(parts, works):
        return None
    spent = [step_seconds(works[part.case], 0, chip) * part.times for part in parts]
    return sum(spent) + step_seconds([], levels, chip)


def moved(parts: Sequence[Part], works: Works) -> dict[str, float]:
    """Megabytes of a step: touched; of weights, and of keys and values, by threadgroup; asked for by lanes."""
    counted = [(work, part.times * LINE / 1e6) for part in parts for work in works[part.case]]
    return {
        "unique_mb": sum(work.traffic.unique * times for work, times in counted),
        "weights_mb": sum(work.lines("weights").group * times for work, times in counted),
        "kv_mb": sum(work.lines("kv").group * times for work, times in counted),
        "asked_mb": sum(work.traffic.asked_bytes * times / LINE for work, times in counted),
    }


def our_dispatches(model: Model, layer: Layer, context: int) -> float:
    """Of a step; merges of tails in the mean."""
    saved = sum(n for p, n in model.attended(context).items() if p <= ONE_PART)
    return model.num_layers * layer.dispatches + layer.others - saved


def mlx_dispatches(model: Model, layer: Layer, parts: Sequence[Part], works: Works) -> float:
    """The same of MLX: one more wherever a call takes two."""
    more = sum(part.times * (len(works[part.case]) - 1) for part in parts)
    return model.num_layers * layer.dispatches + layer.others + more


def our_levels(model: Model, layer: Layer, context: int) -> float:
    """Dispatches that wait for each other, of a step."""
    saved = sum(n for p, n in model.attended(context).items() if p <= ONE_PART)
    return model.num_layers * layer.levels + layer.other_levels - saved


def mlx_levels(model: Model, layer: Layer, parts: Sequence[Part]) -> float:
    """The same of MLX: a level more where attention takes two passes."""
    twice = sum(
        part.times for part in parts if getattr(part.case, "kernel", "") == "sdpa_vector_2pass"
    )
    return model.num_layers * layer.levels + layer.other_levels + twice * TWO_PASSES
