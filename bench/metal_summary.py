"""The keys of a bench/metal_counts.py result, made from counts. Each stands beside MLX's own figure, `mlx_KEY`.

A key that stands for several models, contexts or shapes is the one that is worst for us; its note says which. Formulas,
and what would make a key pass wrongly, are in bench/README.md.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bench.metal_cases import (
    Case,
    MLXAttention,
    MLXUnfusedAttention,
    OurAttention,
    mlx_attention_case,
)
from bench.metal_graph import SPLIT_VALUES, Layer
from bench.metal_plan import (
    EXACT_ROWS,
    Scope,
    Works,
    mlx_products,
    mlx_products_by_row,
    our_products,
)
from bench.metal_roofline import PREDICTED
from bench.metal_shapes import GQA4, GQA8, LLAMA, Heads, Model
from bench.metal_work import Work, total

RATIO_ROWS = (1, 8, 16)
KV_CONTEXTS = (512, 8192)
PACKED_CONTEXT, PACKED_BITS = 8192, 4
GROUPS = {"gqa4": GQA4, "gqa8": GQA8}


@dataclass(frozen=True)
class Figure:
    """Ours, MLX's, and what they are."""

    ours: float | None
    mlx: float | None
    note: str


def summary_cases(scope: Scope) -> list[Case]:
    """What the keys need beside the steps of the models."""
    cases: list[Case] = []
    for model in scope.models:
        for rows in RATIO_ROWS:
            cases += [*our_products(model, rows, scope), *mlx_products_by_row(model, rows, scope)]
            if rows in EXACT_ROWS:
                cases += our_products(model, rows, scope, exact=True)
            cases += [c for chip in PREDICTED for c in mlx_products(model, rows, chip, scope)]
    for heads in GROUPS.values():
        for context in KV_CONTEXTS:
            cases += [OurAttention(heads, 1, context), *_mlx_attention(heads, context)]
    for heads in (LLAMA.heads, GQA4):
        cases.append(OurAttention(heads, 1, PACKED_CONTEXT, PACKED_BITS))
        cases.append(MLXUnfusedAttention(heads, PACKED_CONTEXT, PACKED_BITS))
    return list(dict.fromkeys(cases))


def _mlx_attention(heads: Heads, context: int) -> list[MLXAttention]:
    case = mlx_attention_case(heads, 1, context, "g")
    return [] if case is None else [case]


def weight_ratio(model: Model, cases: Sequence[Case], works: Works) -> float | None:
    """Lines of weights summed over threadgroups, over those of one reading of a layer's seven matrices."""
    if any(case not in works for case in cases):
        return None
    read = sum(total(works[case], "weights").group for case in cases)
    return read / sum(matrix.lines for matrix in model.projections.values())


def kv_ratio(heads: Heads, context: int, works: Sequence[Work]) -> float:
    """Lines of keys and values summed over threadgroups, over those of one reading by group."""
    return total(works, "kv").group / heads.kv_lines(context)


def moved_lines(works: Sequence[Work]) -> float:
    """Lines read and written, summed over threadgroups."""
    return sum(work.traffic.group for work in works)


def _weights(rows: int, scope: Scope, works: Works) -> Figure:
    found: list[tuple[float, float, str]] = []
    routed = []
    for model in scope.models:
        mlx = weight_ratio(model, mlx_products_by_row(model, rows, scope), works)
        for exact in (False, True) if rows in EXACT_ROWS else (False,):
            ours = weight_ratio(model, our_products(model, rows, scope, exact=exact), works)
            if ours is not None and mlx is not None:
                name = f"{model.name}{' with exact rows' if exact else ''}"
                found.append((ours, mlx, name))
        for chip in (PREDICTED[0], PREDICTED[3]):
            ratio = weight_ratio(model, mlx_products(model, rows, chip, scope), works)
            if ratio is not None and model is scope.models[0]:
                routed.append(f"{ratio:.2f} on {chip.name}")
    if not found:
        return Figure(None, None, "not counted")
    ours, mlx, name = max(found)
    note = f"worst: {name}; MLX with a row at a time (qmv), which M1 and M2 do for few rows"
    if routed:
        note += f"; through the kernels that it takes for {scope.models[0].name} it is {', '.join(routed)}"
    return Figure(ours, mlx, note)


def _keys_values(heads: Heads, works: Works) -> Figure:
    ours = {
        context: kv_ratio(heads, context, works[case])
        for context in KV_CONTEXTS
        if (case := OurAttention(heads, 1, context)) in works
    }
    mlx = {
        (context, case.kernel): kv_ratio(heads, context, works[case])
        for context in KV_CONTEXTS
        for case in _mlx_attention(heads, context)
        if case in works
    }
    if not ours or not mlx:
        return Figure(None, None, "not counted")
    worst = max(ours, key=lambda context: ours[context])
    what = ", ".join(f"{ratio:.2f} by {name} at {c}" for (c, name), ratio in mlx.items())
    note = (
        f"{heads.num_heads} heads over {heads.num_kv_heads}, head dim {heads.head_dim}; worst at {worst} positions; "
        f"MLX: {what}"
    )
    return Figure(ours[worst], max(mlx.values()), note)


def _packed(works: Works) -> Figure:
    found = []
    for heads in (LLAMA.heads, GQA4):
        ours = OurAttention(heads, 1, PACKED_CONTEXT, PACKED_BITS)
        mlx = MLXUnfusedAttention(heads, PACKED_CONTEXT, PACKED_BITS)
        if ours in works and mlx in works:
            unique = sum(w.traffic.unique for w in works[ours]) / sum(
                w.traffic.unique for w in works[mlx]
            )
            ratio = moved_lines(works[ours]) / moved_lines(works[mlx])
            found.append((ratio, f"head dim {heads.head_dim}; by unique lines {unique:.2f}"))
    if not found:
        return Figure(None, None, "not counted")
    ratio, note = max(found)
    return Figure(ratio, 1.0, f"worst: {note}; MLX's is its own path over itself")


def summarize(
    scope: Scope, works: Works, layers: Mapping[str, Layer]
) -> tuple[dict[str, float | None], dict[str, str]]:
    """The flat summary, and a note for each key. `layers` are "ours", "mlx" and the two with packed keys and values."""
    figures = {
        "dispatches_per_layer_llama": Figure(
            layers["ours"].dispatches,
            layers["mlx"].dispatches,
            "ours with two passes of attention and the mean of merges; MLX's with one pass (18 with two)",
        ),
        "dispatches_per_layer_quantized_kv": Figure(
            layers["ours_packed"].dispatches,
            layers["mlx_packed"].dispatches + SPLIT_VALUES,
            "Llama, 4 bits, at least 1024 positions",
        ),
        **{f"weight_bytes_ratio_m{rows}": _weights(rows, scope, works) for rows in RATIO_ROWS},
        **{f"kv_lines_ratio_{name}": _keys_values(heads, works) for name, heads in GROUPS.items()},
        "quantized_kv_bytes_ratio_8k": _packed(works),
    }
    summary: dict[str, float | None] = {}
    notes: dict[str, str] = {}
    for key, figure in figures.items():
        summary[key], summary[f"mlx_{key}"] = _short(figure.ours), _short(figure.mlx)
        notes[key] = figure.note
    return summary, notes


def _short(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
