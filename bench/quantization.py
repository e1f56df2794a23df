"""What quantization costs and gives: size, exact match, KL and speed of every format and method, in one run.

    python -m bench.quantization --json bench/results/quantization.json     # pocket; with --model also a larger one
    python -m bench.quantization --quick --json OUT                         # under 5 minutes
    python -m bench.quantization --speeds bench/results/quantization.json   # its speeds once more, in a quieter hour

Each folder is made by `mlx_edge.conversion` and run by `load`. Formulas, and what would make a figure pass wrongly, are
in bench/README.md.
"""

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
from tqdm import tqdm

from bench.peer_models import SHAPES
from bench.quantization_cases import (
    CASES,
    FLOAT32,
    Case,
    make_folder,
    make_random_model,
)
from bench.quantization_report import INT8, UNIFORM, make_table, summarize
from bench.quantization_score import decode_ratios, mark_items, relative_loss
from bench.quantization_text import PocketText, eval_pocket
from mlx_edge.calibration.comparison import compare
from mlx_edge.calibration.measurement import count_weights
from mlx_edge.calibration.text import Samples
from mlx_edge.conversion.calibrated import open_model
from mlx_edge.models.load import load, load_model
from mlx_edge.weights.hub import find_model

# Each format once: how its codes were chosen does not change its speed. MLX multiplies mxfp8 and nvfp4 on a CPU by
# itself, tens of times slower than the kernels: a run would wait for them alone.
SPEED_CASES = (
    *(FLOAT32.name, "float16", INT8, "rtn 6 bit g64", "rtn 5 bit g64", "rtn 4 bit g32", UNIFORM),
    *("rtn 4 bit g128", "mxfp4", "rtn 3 bit g64", "rtn 2 bit g64"),
)


@dataclass(frozen=True)
class Effort:
    """How much is measured."""

    num_samples: int  # calibration samples, each another piece of the training stream
    calibration_rows: int  # of 64 tokens
    mixed_rows: int  # of those that a table of sensitivities is measured on
    held_rows: int
    tokens: int  # of a round of decoding
    rounds: int
    is_quick: bool
    unanswered: tuple[str, ...] = ()  # modes in which no items are answered: it would take hours


FULL = Effort(3, 256, 16, 512, 48, 7, is_quick=False)
QUICK = Effort(1, 128, 8, 128, 24, 5, is_quick=True)
LARGER = replace(FULL, num_samples=1, held_rows=256, unanswered=("mxfp8", "nvfp4"))
"""Of another model than pocket."""


class ModelBench:
    """One model: its float folder, its text, and the rows of its table."""

    def __init__(self, source: Path, work: Path, effort: Effort) -> None:
        self.source, self.work, self.effort = source, work, effort
        self.text = PocketText(load(str(source))[1])
        self.items = self.text.items(eval_pocket.SUITES)
        self.held_out = self.text.held_out_rows(effort.held_rows)
        self.marks: dict[str, list[bool]] = {}

    def run(self, cases: list[Case]) -> list[dict[str, Any]]:
        """A row per case, the reference first."""
        rows = []
        for case in tqdm(cases, desc=self.source.name, unit="case"):
            number = self.effort.num_samples if case.is_sampled else 1
            found = [self._measure(case, seed) for seed in range(number)]
            rows.append(join_samples(case.name, found))
        return rows

    def folder(self, case: Case, seed: int = 0) -> Path:
        """Where a case's model lies."""
        return self.work / self.source.name / f"{case.name} {seed}".replace(" ", "_")

    def _samples(self, case: Case, seed: int) -> Samples | None:
        if not case.is_sampled:
            return None
        effort = self.effort
        number = effort.mixed_rows if case.request.is_measured else effort.calibration_rows
        return Samples(self.text.calibration_rows(number, seed), self.held_out)

    def _measure(self, case: Case, seed: int) -> dict[str, Any]:
        folder = self.folder(case, seed)
        folder.parent.mkdir(parents=True, exist_ok=True)
        start = time.perf_counter()
        samples = self._samples(case, seed)
        # The methods share a table of damages: it does not depend on them.
        table = folder.parent / f"sensitivity_{seed}.json" if case.request.is_measured else None
        make_folder(self.source, case, folder, samples, table)
        seconds = time.perf_counter() - start
        with (
            open_model(self.folder(FLOAT32)) as reference,
            open_model(folder) as other,
        ):
            comparison = compare(reference, other, self.held_out.rows)
            count = count_weights(other.checkpoint, other.config)
        return {
            "bytes": count.num_bytes,
            "bits_per_weight": count.bits_per_weight,
            "kl": comparison.kl_mean,
            "kl_p99": comparison.kl_p99,
            "top1": comparison.top1,
            "perplexity": comparison.other_perplexity,
            **self._answer(case, folder),
            "convert_s": seconds,
        }

    def _answer(self, case: Case, folder: Path) -> dict[str, Any]:
        """The exact answers of a folder, and what it loses of the reference's; all None where none were asked for."""
        if case.request.packing.mode in self.effort.unanswered:
            return dict.fromkeys(("exact_match", "loss", "low", "high", "items"))
        model, _ = load(str(folder))
        marks = mark_items(model, self.items)
        self.marks.setdefault(case.name, marks)
        loss = relative_loss(self.marks[FLOAT32.name], marks)
        return {"exact_match": sum(marks) / len(marks), **loss}


def join_samples(name: str, found: list[dict[str, Any]]) -> dict[str, Any]:
    """The first sample's figures, and the KL of all: the median stands in the row, the spread beside it."""
    kls = [row["kl"] for row in found]
    losses = [row["loss"] for row in found]
    return found[0] | {
        "name": name,
        "kl": statistics.median(kls),
        "kl_samples": kls,
        "loss_samples": losses,
    }


def measure_speed(folders: dict[str, Path], effort: Effort) -> dict[str, Any]:
    """Decoding over float32's in the same round."""
    models = {name: load_model(folder) for name, folder in folders.items()}
    return decode_ratios(models, FLOAT32.name, num_tokens=effort.tokens, rounds=effort.rounds)


def make_speed_folders(work: Path, effort: Effort) -> tuple[str, dict[str, Path]]:
    """A model that no cache of a processor holds, in the formats whose speed is compared."""
    shape = SHAPES["qwen3-0.6b"]
    if effort.is_quick:
        shape = replace(shape, name="qwen3-0.6b, 8 of 28 layers", num_layers=8, vocab_size=32000)
    source = work / "random"
    make_random_model(shape, source)
    folders = {FLOAT32.name: source}
    for case in CASES:
        if case.name in SPEED_CASES and case != FLOAT32 and (case.is_quick or not effort.is_quick):
            folders[case.name] = work / "speed" / case.name.replace(" ", "_")
            folders[case.name].parent.mkdir(exist_ok=True)
            make_folder(source, case, folders[case.name])
    return f"{shape.name}, random weights", folders


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer formats, rows and rounds")
    parser.add_argument("--model", action="append", default=[], help="a larger pocket's folder")
    parser.add_argument("--only", help="cases whose name has this word, beside float32")
    parser.add_argument("--speeds", type=Path, help="a full run's result; its speeds are replaced")
    parser.add_argument("--json", type=Path, help="where to write the result")
    parser.add_argument("--plot", type=Path, help="where to draw it; needs matplotlib")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = (
            replace_speeds(args.speeds, Path(folder)) if args.speeds else run(args, Path(folder))
        )
    summarize(result)
    print(make_table(result))
    if target := args.json or args.speeds:
        target.write_text(json.dumps(result, indent=1) + "\n")
        target.with_suffix(".md").write_text(make_table(result))
    if args.plot:
        from bench.quantization_plot import draw

        draw(result, args.plot)


def run(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """The whole measurement."""
    effort = QUICK if args.quick else FULL
    cases = [case for case in CASES if case.is_quick or not args.quick]
    if args.only:
        cases = [case for case in cases if case == FLOAT32 or args.only in case.name]
    result: dict[str, Any] = {
        "what": "size, damage and speed of quantized models",
        "versions": {name: version(name) for name in ("mlx", "mlx-edge")},
        "mode": "quick" if args.quick else "full",
        "models": {},
    }
    for name in ["pocket", *args.model]:
        is_main = name == "pocket" or args.quick
        bench = ModelBench(find_model(name), work, effort if is_main else LARGER)
        result["models"][bench.source.name] = {
            "items": len(bench.items),
            "held_out_tokens": bench.held_out.num_tokens,
            "rows": bench.run(cases),
            "speed": measure_speed(
                {c.name: bench.folder(c) for c in cases if c.name in SPEED_CASES}, effort
            ),
        }
        mx.clear_cache()
    return result | {"speed": measure_shape(work, effort)}


def measure_shape(work: Path, effort: Effort) -> dict[str, Any]:
    """The speeds that the summary has."""
    shape, folders = make_speed_folders(work, effort)
    return {"shape": shape, "rates": measure_speed(folders, effort)}


def replace_speeds(path: Path, work: Path) -> dict[str, Any]:
    """A result with the speeds of the shape measured once more."""
    result: dict[str, Any] = json.loads(path.read_text())
    if result["mode"] != "full":
        raise SystemExit(f"{path} is of a quick run; give the result of a full one")
    return result | {"speed": measure_shape(work, FULL)}


if __name__ == "__main__":
    main()
