"""Our Metal kernels and MLX's own on the same shapes, counted in one run through the same emulator.

    python -m bench.metal_counts --json bench/results/metal_counts.json
    python -m bench.metal_counts --quick --json /tmp/quick.json      # within 5 minutes on two cores

Lines of 128 bytes, dispatches and operations are counted; a roofline turns them into predicted times, beside the
published points that it was held against. Nothing here is a measured speed. Formulas are in bench/README.md.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bench.metal_calibration import make_points
from bench.metal_cases import Case
from bench.metal_graph import Layer, count_mlx
from bench.metal_plan import FULL, QUICK, TINY, Scope, mlx_step, our_step, steps
from bench.metal_report import make_markdown, make_result, write_plot
from bench.metal_roofline import PREDICTED
from bench.metal_steps import count_ours
from bench.metal_summary import PACKED_BITS, summary_cases
from bench.metal_work import Work

SCOPES = {"full": FULL, "quick": QUICK, "tiny": TINY}
PROCESSES = 2
PLOT_PYTHON = Path.home() / ".cache" / "mlx_edge" / "bench" / "env" / "bin" / "python"
Counted = tuple[Case, list[Work], str]


def find_cases(scope: Scope) -> list[Case]:
    """All that a run counts, each once; the long ones first, so that two processes end together."""
    found: list[Case] = []
    for model, rows, context in steps(scope):
        found += [part.case for part in our_step(model, rows, context, scope)]
        for chip in PREDICTED:
            found += [part.case for part in mlx_step(model, rows, context, chip, scope) or []]
    found += summary_cases(scope)
    if scope.has_points:
        found += [case for point in make_points() for case in point.cases]
    return sorted(dict.fromkeys(found), key=_size, reverse=True)


def _size(case: Case) -> float:
    """Roughly how long it takes."""
    rows = getattr(case, "rows", 1)
    return float(getattr(case, "positions", 1000) * rows)


def count_case(case: Case) -> Counted:
    """Its work, or in words why it could not be counted."""
    import mlx.core as mx

    mx.set_default_device(mx.cpu)
    try:
        return case, case.count(), ""
    except Exception as error:  # a kernel that the emulator refuses costs its own figures
        lines = str(error).splitlines() or [""]
        return case, [], f"{type(error).__name__}: {lines[0]}"


def count_all(cases: Sequence[Case], processes: int = PROCESSES) -> Iterable[Counted]:
    """In so many processes, in any order, with a progress bar."""
    with (
        get_context("spawn").Pool(processes) as pool,
        tqdm(total=len(cases), unit="case", file=sys.stderr) as bar,
    ):
        for counted in pool.imap_unordered(count_case, cases):
            bar.update()
            yield counted


def count_layers() -> dict[str, Layer]:
    """Dispatches of a layer, ours and MLX's, over floats and over packed keys and values."""
    return {
        "ours": count_ours(),
        "ours_packed": count_ours(PACKED_BITS),
        "mlx": count_mlx("llama"),
        "mlx_qk_norm": count_mlx("qwen3"),
        "mlx_packed": count_mlx("llama", PACKED_BITS),
    }


def null_run(works: dict[Case, list[Work]]) -> dict[str, float]:
    """One case of ours and one of MLX's counted again: their lines over those of the first time."""
    ratios = {}
    for name, prefix in (("ours", "Our"), ("mlx", "MLX")):
        case = next((c for c in reversed(works) if type(c).__name__.startswith(prefix)), None)
        if case is not None:
            _, again, _ = count_case(case)
            first, second = (sum(w.traffic.group for w in w_) for w_ in (works[case], again))
            ratios[name] = second / first
    return ratios


def run(scope: Scope, processes: int = PROCESSES) -> dict[str, Any]:
    """Count everything and make the result."""
    works: dict[Case, list[Work]] = {}
    failures = []
    for case, counted, failure in count_all(find_cases(scope), processes):
        if failure:
            failures.append(f"{case}: {failure}")
        else:
            works[case] = counted
    facts = {
        "versions": {name: version(name) for name in ("mlx", "mlx-lm", "ziglang")},
        "null": null_run(works),
        "failures": sorted(failures),
    }
    return make_result(scope, works, count_layers(), facts)


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        "bench.metal_counts", description=(__doc__ or "").split("\n", 1)[0]
    )
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--quick", dest="scope", action="store_const", const="quick")
    kind.add_argument(
        "--tiny", dest="scope", action="store_const", const="tiny", help="a rehearsal"
    )
    parser.add_argument("--json", type=Path, help="where to write the result")
    parser.add_argument("--markdown", type=Path, help="the tables; beside the JSON if not said")
    parser.add_argument("--plot", type=Path, help="a picture; beside the JSON if not said")
    parser.add_argument(
        "--plot-python", type=Path, default=PLOT_PYTHON, help="one that has matplotlib"
    )
    parser.add_argument("--processes", type=int, default=min(PROCESSES, os.cpu_count() or 1))
    return parser


def main() -> None:
    """Count, report."""
    args = make_parser().parse_args()
    result = run(SCOPES[args.scope or "full"], args.processes)
    print(make_markdown(result))
    for failure in result["failures"]:
        print(f"bench.metal_counts: not counted: {failure}", file=sys.stderr)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
        (args.markdown or args.json.with_suffix(".md")).write_text(make_markdown(result))
        python = args.plot_python if args.plot_python.exists() else Path(sys.executable)
        reason = write_plot(python, args.json, args.plot or args.json.with_suffix(".png"))
        if reason:
            print(f"bench.metal_counts: no picture: {reason}", file=sys.stderr)


if __name__ == "__main__":
    main()
