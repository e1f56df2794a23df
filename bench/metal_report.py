"""The result of a bench/metal_counts.py run: its JSON, its tables in markdown, its picture.

Nothing in it was measured on a GPU: lines and operations are counted, times are a roofline's, and are shown as ratios
of two predictions beside the published points that the roofline was held against.
"""

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.metal_calibration import TOLERANCE, calibrate, make_points
from bench.metal_cases import Case
from bench.metal_graph import Layer
from bench.metal_plan import (
    Part,
    Scope,
    Works,
    is_counted,
    mlx_dispatches,
    mlx_levels,
    mlx_step,
    moved,
    our_dispatches,
    our_levels,
    our_step,
    seconds,
    steps,
)
from bench.metal_roofline import PREDICTED, Chip
from bench.metal_shapes import Model
from bench.metal_summary import summarize
from bench.metal_work import LINE, Lines, Work
from bench.table import make_counts_table

TRAFFIC_CHIP = "M4"
SHOWN_OPERATIONS = 8  # of a dispatch, the most frequent
Result = dict[str, Any]


def make_result(
    scope: Scope, works: Works, layers: Mapping[str, Layer], facts: Mapping[str, Any]
) -> Result:
    """`summary` is flat: ours by key, MLX's by `mlx_` and the key; notes stand beside it by key."""
    summary, notes = summarize(scope, works, layers)
    return {
        "what": "counted in an emulator; times are predicted by a roofline, none was measured",
        **facts,
        "mode": scope.name,
        "summary": summary,
        "notes": notes,
        "calibration": calibrate(make_points(), works),
        "layers": {name: describe_layer(layer) for name, layer in layers.items()},
        "steps": predict_steps(scope, works, layers),
        "dispatches": [
            row for case, counted in works.items() for row in dispatch_rows(case, counted)
        ],
    }


def predict_steps(scope: Scope, works: Works, layers: Mapping[str, Layer]) -> list[dict[str, Any]]:
    """A row for each model, context, number of rows and chip: both predictions in ms, and ours over MLX's."""
    return [
        _predict(model, rows, context, chip, scope, works, layers)
        for model, rows, context in steps(scope)
        for chip in PREDICTED
    ]


def _predict(
    model: Model,
    rows: int,
    context: int,
    chip: Chip,
    scope: Scope,
    works: Works,
    layers: Mapping[str, Layer],
) -> dict[str, Any]:
    ours, mlx = our_step(model, rows, context, scope), mlx_step(model, rows, context, chip, scope)
    layer = layers["mlx_qk_norm" if model.heads.has_qk_norm else "mlx"]
    row: dict[str, Any] = {
        "model": model.name, "context": context, "rows": rows, "chip": chip.name
    }  # fmt: skip
    levels = our_levels(model, layers["ours"], context)
    ours_s = seconds(ours, works, levels, chip)
    if ours_s is not None:
        dispatches = our_dispatches(model, layers["ours"], context)
        row["ours"] = _side(ours_s, dispatches, levels, ours, works)
    if mlx is not None and is_counted(mlx, works):
        levels = mlx_levels(model, layer, mlx)
        mlx_s = seconds(mlx, works, levels, chip)
        dispatches = mlx_dispatches(model, layer, mlx, works)
        row["mlx"] = _side(mlx_s, dispatches, levels, mlx, works)
        row["ours_over_mlx"] = _short(ours_s / mlx_s if ours_s and mlx_s else None)
    return {"ours": None, "mlx": None, "ours_over_mlx": None} | row


def _side(
    predicted_s: float | None, dispatches: float, levels: float, parts: Sequence[Part], works: Works
) -> dict[str, float | None]:
    moves = {name: _short(value) for name, value in moved(parts, works).items()}
    facts = {"dispatches": _short(dispatches), "levels": _short(levels)}
    return {"predicted_ms": _short(predicted_s, 1e3), **facts, **moves}


def dispatch_rows(case: Case, works: Sequence[Work]) -> list[dict[str, Any]]:
    """What was counted of a case, a row for each dispatch."""
    return [
        {
            "case": describe(case),
            "kernel": work.kernel,
            "threadgroups": round(work.threadgroups),
            **{f"read_{role}": _bytes(lines) for role, lines in work.reads.items()},
            "written": _bytes(work.writes),
            "barriers": round(work.barriers),
            "simd_operations": round(work.simd_operations),
            "matrix_multiplies": round(work.matrix_multiplies),
            "lane_operations": _most_frequent(work.operations),
        }
        for work in works
    ]


def describe_layer(layer: Layer) -> dict[str, Any]:
    """A layer's dispatches and levels, and which they are."""
    return {**vars(layer), "primitives": dict(layer.primitives or {})}


def describe(case: Case) -> str:
    """A case in words."""
    sizes = ", ".join(f"{name} {value}" for name, value in vars(case).items() if value is not None)
    return f"{type(case).__name__}: {sizes}"


def _bytes(lines: Lines) -> dict[str, int]:
    return {
        "unique": round(lines.unique * LINE),
        "by_threadgroup": round(lines.group * LINE),
        "by_instruction": round(lines.issued * LINE),
        "asked": round(lines.asked_bytes),
    }


def _most_frequent(operations: Mapping[str, float]) -> dict[str, int]:
    ordered = sorted(operations.items(), key=lambda item: -item[1])[:SHOWN_OPERATIONS]
    return {name: round(count) for name, count in ordered}


def _short(value: float | None, times: float = 1.0) -> float | None:
    return None if value is None else float(f"{value * times:.4g}")


def make_markdown(result: Result) -> str:
    """The tables: keys, calibration, predicted steps, what these move."""
    tables = (make_counts_table, _calibration_table, _steps_table, _traffic_table)
    parts = [table(result) for table in tables]
    return "\n".join(parts)


def _calibration_table(result: Result) -> str:
    lines = [
        "| published point (others' measurements) | chip | source | published | the model | off |",
        "|" + "---|" * 6,
    ]
    for row in result["calibration"]:
        off = f"{row['off']:+.0%}"
        off = f"**{off}: missed by over {TOLERANCE:.0%}**" if row["is_missed"] else off
        cells = [row["point"], row["chip"], row["source"], row["published"], row["predicted"], off]
        lines.append(f"| {' | '.join(str(cell) for cell in cells)} |")
    return "\n".join([*lines, ""])


def _steps_table(result: Result) -> str:
    missed = sum(row["is_missed"] for row in result["calibration"])
    chips = [chip.name for chip in PREDICTED]
    lines = [
        "Predicted step, ours over MLX's in the same model (predicted ms of both). The model misses "
        f"{missed} of {len(result['calibration'])} published points by over {TOLERANCE:.0%}. M5's tensor units are not "
        "modelled: where MLX takes them, its simdgroup kernel is counted.",
        "",
        f"| model | context | rows | {' | '.join(chips)} |",
        "|" + "---|" * (3 + len(chips)),
    ]
    groups: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in result["steps"]:
        group = groups.setdefault((row["model"], row["context"], row["rows"]), {})
        group[row["chip"]] = row
    for key, by_chip in groups.items():
        cells = [*map(str, key), *(_prediction(by_chip[chip]) for chip in chips)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _prediction(row: Mapping[str, Any]) -> str:
    if row["ours_over_mlx"] is None:
        return "not counted"
    both = " / ".join(f"{row[side]['predicted_ms']:.3g}" for side in ("ours", "mlx"))
    return f"{row['ours_over_mlx']:.2f} ({both})"


TRAFFIC = {
    "dispatches": "dispatches",
    "levels": "levels",
    "unique_mb": "unique MB",
    "weights_mb": "weights by threadgroup, MB",
    "kv_mb": "keys and values by threadgroup, MB",
    "asked_mb": "asked for, MB",
}


def _traffic_table(result: Result) -> str:
    lines = [
        f"Counted per step, ours / MLX's on {TRAFFIC_CHIP}.",
        "",
        f"| model | context | rows | {' | '.join(TRAFFIC.values())} |",
        "|" + "---|" * (3 + len(TRAFFIC)),
    ]
    for row in result["steps"]:
        if row["chip"] != TRAFFIC_CHIP:
            continue
        cells = [
            " / ".join(f"{row[side][name]:.4g}" if row[side] else "-" for side in ("ours", "mlx"))
            for name in TRAFFIC
        ]
        lines.append(f"| {row['model']} | {row['context']} | {row['rows']} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def write_plot(python: Path, result: Path, picture: Path) -> str | None:
    """Draw the result with a Python that has matplotlib; why there is no picture, or None."""
    script = Path(__file__).with_name("metal_plot.py")
    done = subprocess.run(
        [str(python), str(script), str(result), str(picture)],
        capture_output=True,
        text=True,
        check=False,
    )
    said = done.stderr.strip().splitlines() or ["no reason given"]
    return said[-1] if done.returncode else None
