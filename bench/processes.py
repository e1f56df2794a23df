"""Whole processes side by side: our command and mlx-lm's, in turn, on the same folder and the same prompt.

    python bench/processes.py --rounds 7

Each round runs every command once, so that a slow moment of the machine falls on both; the ratio is taken
round by round. The first round warms the file cache and is not counted. The null pair runs our command
against itself: its ratio is what noise alone makes. Writes bench/results/processes.json; `bench/table.py` makes
the README's table from it.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

from tqdm import tqdm

RESULT = Path(__file__).parent / "results" / "processes.json"
POCKET = str(files("mlx_edge") / "assets" / "pocket")
REQUEST = ["--model", POCKET, "--prompt", "Once upon a time", "--max-tokens", "20"]


@dataclass(frozen=True)
class Pair:
    """Two commands that do the same; the ratio is ours / theirs."""

    name: str
    ours: list[str]
    theirs: list[str]


PAIRS = (
    Pair(
        "process that generates 20 tokens",
        ["-m", "mlx_edge.generate", *REQUEST],
        ["-m", "mlx_lm", "generate", *REQUEST],
    ),
    Pair("import", ["-c", "import mlx_edge"], ["-c", "import mlx_lm"]),
    Pair(
        "null: ours against itself",
        ["-m", "mlx_edge.generate", *REQUEST],
        ["-m", "mlx_edge.generate", *REQUEST],
    ),
)


def seconds(arguments: list[str], floor_s: float = 0.0) -> float:
    """Wall time of one Python process, less `floor_s`."""
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, *arguments],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    return time.perf_counter() - start - floor_s


def measure(pair: Pair, rounds: int, bar: "tqdm[None]") -> dict[str, object]:
    """Interleaved rounds of one pair; an import is counted without the bare interpreter's own start."""
    is_import = pair.name == "import"
    ours, theirs = [], []
    for index in range(rounds + 1):
        floor_s = seconds(["-c", "pass"]) if is_import else 0.0
        timed = seconds(pair.ours, floor_s), seconds(pair.theirs, floor_s)
        bar.update()
        if index:
            ours.append(timed[0])
            theirs.append(timed[1])
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return {
        "name": pair.name,
        "ours_s": [round(value, 4) for value in ours],
        "theirs_s": [round(value, 4) for value in theirs],
        "ratio_median": round(statistics.median(ratios), 4),
        "ratio_min": round(min(ratios), 4),
        "ratio_max": round(max(ratios), 4),
    }


def main() -> None:
    """Measure all pairs and write the result."""
    parser = argparse.ArgumentParser(description="Our command beside mlx-lm's, as whole processes.")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    with tqdm(total=len(PAIRS) * (args.rounds + 1), unit="round") as bar:
        pairs = [measure(pair, args.rounds, bar) for pair in PAIRS]
    result = {
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in ("mlx-edge", "mlx", "mlx-lm")},
        "rounds": args.rounds,
        "largest_process_mb": round(
            resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
            / (1e6 if sys.platform == "darwin" else 1e3)
        ),
        "pairs": pairs,
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    for row in pairs:
        print(f"{row['name']}: {row['ratio_median']} ({row['ratio_min']} to {row['ratio_max']})")


if __name__ == "__main__":
    main()
