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
    Scope,
    Works,
    mlx_levels,
    mlx_step,
    our_levels,
    our_step,
    seconds,
    steps,
)
from bench.metal_roofline import PREDICTED
from bench.metal_summary import summarize
from bench.metal_work import LINE, Lines, Work

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
    found = []
    for model, rows, context in steps(scope):
        ours = our_step(model, rows, context, scope)
        layer = layers["mlx_qk_norm" if model.heads.has_qk_norm else "mlx"]
        for chip in PREDICTED:
            mlx = mlx_step(model, rows, context, chip, scope)
            levels = our_levels(model, layers["ours"], context)
            ours_s = seconds(ours, works, levels, chip)
            mlx_s = (
                None if mlx is None else seconds(mlx, works, mlx_levels(model, layer, mlx), chip)
            )
            found.append(
                {
                    "model": model.name,
                    "context": context,
                    "rows": rows,
                    "chip": chip.name,
                    "ours_predicted_ms": _short(ours_s, 1e3),
                    "mlx_predicted_ms": _short(mlx_s, 1e3),
                    "ours_over_mlx": _short(ours_s / mlx_s if ours_s and mlx_s else None),
                }
            )
    return found


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
    """The tables: keys, calibration, predicted steps."""
    parts = [_summary_table(result), _calibration_table(result), _steps_table(result)]
    return "\n".join(parts)


def _summary_table(result: Result) -> str:
    lines = ["| counted | ours | MLX | what |", "|---|---|---|---|"]
    for key, note in result["notes"].items():
        ours, mlx = (result["summary"][name] for name in (key, f"mlx_{key}"))
        lines.append(f"| `{key}` | {_cell(ours)} | {_cell(mlx)} | {note} |")
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    lines += ["", f"{versions}; {result['mode']} run. No figure was measured on a GPU."]
    nulls = ", ".join(f"{name} {value:.2f}" for name, value in result["null"].items())
    return "\n".join([*lines, f"Counted twice, the second over the first: {nulls}.", ""])


def _cell(value: float | None) -> str:
    return "not counted" if value is None else f"{value:.3f}"


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
    both = f"{row['ours_predicted_ms']:.3g} / {row['mlx_predicted_ms']:.3g}"
    return f"{row['ours_over_mlx']:.2f} ({both})"


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
