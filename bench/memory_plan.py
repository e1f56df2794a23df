"""What `python -m mlx_edge.plan` predicts beside what processes come to hold: 30 cells of model, context and batch.

    python -m bench.memory_plan --json OUT [--quick]

Each cell is two fresh processes: the plan, which loads no weights, and an engine that answers `batch` requests of
`context` tokens each at once. Measured is the most private memory at any moment: pages of files are not counted. The
larger counts of two readings: RssAnon, read every 2 ms by the parent, and the kernel's own high-water mark of all
resident memory without the pages of files that are resident at the end. Knows nothing of how the figures come about.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bench.memory_cell import Cell
from bench.peer_models import SHAPES, Shape, make_mlx, make_tokenizer
from mlx_edge.profiler.memory import read_status

WORK = Path(tempfile.gettempdir()) / "mlx_edge_memory_plan"
LIMIT_S = 600.0
LONG_CONTEXT = 32768
OWN_SHAPES = {
    "narrow": Shape("narrow", "narrow", "llama", 256, 2, 4, 2, 64, 768, 4096, 1e5),
    "middle": Shape("middle", "middle", "qwen3", 512, 8, 8, 4, 64, 1536, 16384, 1e5),
}


CELLS = (
    Cell("pocket", 128, 1),
    Cell("pocket", 256, 4),
    Cell("pocket", 512, 1),
    Cell("pocket", 512, 8),
    Cell("pocket", 512, 16),
    Cell("pocket", 512, 16, kv_bits=8),
    Cell("pocket", 512, 16, kv_bits=4),
    Cell("pocket", 512, 4, chunk=128),
    Cell("narrow", 1024, 1),
    Cell("narrow", 2048, 16),
    Cell("narrow", 4096, 2),
    Cell("narrow", 4096, 8),
    Cell("narrow", 8192, 2, kv_bits=8),
    Cell("narrow", 8192, 2, kv_bits=4),
    Cell("narrow", 8192, 2, max_kv_size=1024),
    Cell("narrow", 16384, 1),
    Cell("middle", 256, 1),
    Cell("middle", 256, 16),
    Cell("middle", 1024, 1),
    Cell("middle", 1024, 8),
    Cell("middle", 2048, 4),
    Cell("middle", 2048, 4, kv_bits=8),
    Cell("middle", 2048, 4, kv_bits=4, chunk=256),
    Cell("middle", 4096, 2),
    Cell("middle", 8192, 1),
    Cell("middle", 4096, 2, max_kv_size=512),
    Cell("qwen3-0.6b", 256, 1),
    Cell("qwen3-0.6b", 512, 2, kv_bits=8),
    Cell("llama-3.2-1b", 256, 2),
    Cell("llama-3.2-1b", 512, 1, kv_bits=4),
)
QUICK = (0, 3, 6, 8, 9, 16, 17)


def find_folder(name: str, work: Path, models: Path | None) -> str:
    """Where a cell's model is; one with random weights is made when it is first wanted."""
    if name == "pocket":
        return name
    if models is not None and (models / name / "made").exists():
        return str(models / name)
    folder = work / name
    shape = OWN_SHAPES.get(name) or SHAPES[name]
    if not (folder / "made").exists():
        folder.mkdir(parents=True, exist_ok=True)
        make_tokenizer(shape, folder / "tokenizer.json")
        make_mlx(shape, folder)
        config = json.loads((folder / "config.json").read_text())
        config["max_position_embeddings"] = LONG_CONTEXT
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "made").touch()
    return str(folder)


def predict(folder: str, flags: Sequence[str]) -> dict[str, Any]:
    """What plan says."""
    command = [sys.executable, "-m", "mlx_edge.plan", folder, *flags, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def measure(module: str, *words: str, limit_s: float = LIMIT_S) -> dict[str, Any]:
    """The most private bytes of a process that serves a cell, by both readings, and what else it prints of itself."""
    child = subprocess.Popen(
        [sys.executable, "-m", module, *words],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    sampled, deadline = 0, time.monotonic() + limit_s
    while child.poll() is None:
        sampled = max(sampled, read_status(child.pid).get("RssAnon", 0))
        if time.monotonic() > deadline:
            child.kill()
        time.sleep(0.002)
    assert child.stdout is not None
    lines = child.stdout.read().splitlines()
    if child.returncode or not lines:
        raise RuntimeError(f"the process ended with {child.returncode}")
    found: dict[str, Any] = json.loads(lines[-1])
    return {"sampled": sampled, **found}


def run_cell(cell: Cell, work: Path, models: Path | None) -> dict[str, Any]:
    """One row of the result: sizes in bytes, the error relative to what was measured."""
    folder = find_folder(cell.model, work, models)
    planned = predict(folder, cell.flags())
    measured = measure("bench.memory_cell", json.dumps([folder, asdict(cell)]))
    peak = max(measured["sampled"], measured["high_water"])
    parts = {name: planned[f"{name}_bytes"] for name in ("program", "weights", "kv", "activations")}
    return {
        **asdict(cell),
        "predicted": planned["peak_bytes"],
        "measured": peak,
        "error": planned["peak_bytes"] / peak - 1,
        **measured,
        "parts": parts,
    }


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """`plan_error_p95`: the error that 95 % of the cells do not exceed; `worst_under`: how far below at most."""
    errors = sorted(abs(row["error"]) for row in rows)
    rank = max(0, -(-95 * len(errors) // 100) - 1)
    return {
        "cells": len(rows),
        "plan_error_p95": errors[rank] if errors else None,
        "plan_error_max": errors[-1] if errors else None,
        "worst_under": max([0.0, *(-row["error"] for row in rows)]),
    }


def format_table(rows: list[dict[str, Any]]) -> str:
    """Markdown, sizes in MB."""
    lines = [
        "| model | context | batch | KV | planned MB | measured MB | error |",
        "|" + "---|" * 7,
    ]
    for row in rows:
        kind = f"{row['kv_bits']} bit" if row["kv_bits"] else "float"
        kind += f", {row['max_kv_size']} kept" if row["max_kv_size"] else ""
        kind += f", chunk {row['chunk']}" if row["chunk"] != 512 else ""
        sizes = " | ".join(f"{row[name] / 1e6:.1f}" for name in ("predicted", "measured"))
        cells = [row["model"], str(row["context"]), str(row["batch"]), kind, sizes]
        lines.append(f"| {' | '.join(cells)} | {row['error']:+.1%} |")
    return "\n".join(lines)


def main() -> None:
    """Run the cells, print the table, write the result."""
    parser = argparse.ArgumentParser(description="Predicted and measured memory, cell by cell.")
    parser.add_argument("--json", type=Path, help="where to write the result")
    parser.add_argument("--quick", action="store_true", help="a few short cells")
    parser.add_argument("--model", action="append", help="only cells of this model")
    parser.add_argument("--workdir", type=Path, default=WORK, help="where models are made")
    parser.add_argument("--models", type=Path, help="a folder with models that bench.peers made")
    args = parser.parse_args()
    cells = [CELLS[index] for index in QUICK] if args.quick else list(CELLS)
    cells = [cell for cell in cells if not args.model or cell.model in args.model]
    rows, failures = [], []
    for cell in tqdm(cells, unit="cell"):
        try:
            rows.append(run_cell(cell, args.workdir, args.models))
        except (RuntimeError, OSError, subprocess.TimeoutExpired) as failure:
            failures.append(f"{cell}: {failure}")
    summary = summarise(rows)
    print(format_table(rows), *failures, json.dumps(summary), sep="\n")
    if args.json:
        result = {"summary": summary, "cells": rows, "failures": failures}
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
