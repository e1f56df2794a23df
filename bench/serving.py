"""Our server beside llama.cpp's and mlx-lm's, in turn, under closed and open load.

    python -m bench.serving --json bench/results/serving.json      # 5 rounds, about an hour
    python -m bench.serving --quick --json /tmp/quick.json         # within 5 minutes, once all is set up

Shares the work folder, the models and the journal's rules with bench.peers: the first run sets up what is missing, a
run that was ended goes on, a server that fails costs its own figures. How each figure is made, and what would make it
wrong, is in bench/README.md.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bench.peer_models import SHAPES, Models, make_models
from bench.peer_setup import Workplace, machine_facts, peer_versions, set_up
from bench.peers import WORKDIR, Journal, alone
from bench.serving_jobs import CHAT, MODES, Job, Mode, make_round
from bench.serving_report import make_markdown, make_result, write_plot
from bench.serving_runs import Measured, Record, run_job
from bench.serving_servers import (
    LLAMA,
    MLXLM,
    OURS,
    ROOT,
    Servers,
    end_on_sigterm,
    llama_spec,
    mlxlm_spec,
    our_spec,
)
from bench.serving_setup import ServedModel, served_models, set_up_servers, widen
from bench.serving_summary import RATE

THREADS = 2
MEASURING = ("load", "load_client", "serving_jobs", "serving_prompts", "serving_runs")


def say(text: str) -> None:
    """A line above the progress bar."""
    tqdm.write(text, file=sys.stderr)


def fingerprint() -> str:
    """What is measured and how: a run never goes on with measurements of another version."""
    package = ROOT / "mlx_edge"
    paths = [p for p in package.rglob("*") if p.suffix in {".py", ".so", ".safetensors"}]
    native = find_spec("mlx_edge._native")
    for place in (native.submodule_search_locations or []) if native else []:
        paths += Path(place).glob("*.so")
    paths += [ROOT / "bench" / f"{name}.py" for name in (*MEASURING, "serving_servers")]
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


class Session:
    """One run: its servers, its journal, and the time that it has."""

    def __init__(
        self, mode: Mode, place: Workplace, models: dict[str, ServedModel], journal: Journal
    ):
        self.mode, self.place, self.models, self.journal = mode, place, models, journal
        specs = {(key, OURS): our_spec(model) for key, model in models.items()}
        specs |= {(key, MLXLM): mlxlm_spec(place, model) for key, model in models.items()}
        self.servers = Servers(specs, place, THREADS)
        spent = sum(record["wall_s"] for record in journal.records)
        self.deadline = time.monotonic() + mode.minutes * 60 - spent
        self.llama_setting = "none"

    def measure(self, index: int, job: Job) -> Record:
        """The record of one job of one round, from the journal when it is there."""
        for known in self.journal.records:
            if (known["round"], known["job"]) == (index, job.name):
                return known
        record: Record = {"round": index, "job": job.name, **asdict(job), "was_skipped": False}
        record["workload"] = job.workload.name
        measured = Measured()
        if time.monotonic() > self.deadline:
            measured.error = "the time for the whole run was over"
            record["was_skipped"] = True
        else:
            measured = self._run(index, job)
        record |= asdict(measured)
        self.journal.add(record)
        if reason := measured.error or measured.discarded:
            say(f"round {index + 1}: {job.name}: {reason}")
        return record

    def _run(self, index: int, job: Job) -> Measured:
        start = time.perf_counter()
        try:
            model = self.models[job.model]
            return run_job(job, index, self.servers, model, self.journal.records)
        except Exception as failure:  # a server that surprises us costs its own figures only
            reason = f"{type(failure).__name__}: {failure}"
            return Measured(error=reason, wall_s=time.perf_counter() - start)

    def choose_llama(self) -> None:
        """Run llama.cpp with 8 clients at each of its settings; the best one takes part in all rounds."""
        rates: dict[str, list[float]] = {}
        for turn in range(self.mode.probe_passes):
            settings = self.mode.llama_settings[:: 1 if turn % 2 == 0 else -1]
            for setting in settings:
                name = f"{LLAMA} {setting}"
                key = ("1b", name)
                self.servers.specs[key] = llama_spec(
                    self.place, self.models["1b"], setting, THREADS
                )
                job = Job("1b", name, CHAT, 8, 3.0, self.mode.probe_s, turn=turn)
                values = self.measure(-1, job)["values"]
                rates.setdefault(setting, []).append(values.get(RATE, 0.0))
                self.servers.drop(key)
        if not rates:
            return
        self.llama_setting = max(rates, key=lambda setting: sum(rates[setting]))
        best = llama_spec(self.place, self.models["1b"], self.llama_setting, THREADS)
        self.servers.specs["1b", LLAMA] = best

    def run(self) -> list[Record]:
        """All jobs of all rounds."""
        rounds = [make_round(self.mode, index) for index in range(self.mode.rounds)]
        try:
            with tqdm(total=sum(map(len, rounds)), unit="run", file=sys.stderr) as bar:
                self.choose_llama()
                for index, jobs in enumerate(rounds):
                    for job in jobs:
                        bar.set_description(f"round {index + 1}: {job.name}")
                        self.measure(index, job)
                        bar.update()
        finally:
            self.servers.stop()
        return self.journal.records


def measure_plan(place: Workplace, is_quick: bool) -> dict[str, Any]:
    """The summary of bench/memory_plan.py, or the reason for none as "error"."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "plan.json"
        words = [sys.executable, "-m", "bench.memory_plan", "--json", str(out)]
        words += ["--models", str(place.models), "--workdir", str(place.root / "plan")]
        words += ["--quick"] if is_quick else []
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
        if not out.exists():
            lines = done.stderr.strip().splitlines() or ["without a word"]
            return {"error": f"bench.memory_plan ended with {done.returncode}: {lines[-1][:200]}"}
        found: dict[str, Any] = json.loads(out.read_text())["summary"]
        return found


def prepare(
    root: Path, mode: Mode, say: Callable[[str], None]
) -> tuple[Workplace, dict[str, ServedModel]]:
    """All that is run, made where it is missing."""
    place = set_up(root, say)
    set_up_servers(place, say)
    shape = Models(place.models, SHAPES[mode.shape])
    make_models(shape, place, say)
    models = served_models(place, shape)
    if "pip mlx-lm" not in place.failures:
        for model in models.values():
            widen(model.folder, model.widened)
    return place, models


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser("bench.serving", description=(__doc__ or "").split("\n", 1)[0])
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--quick", dest="mode", action="store_const", const="quick")
    kind.add_argument("--tiny", dest="mode", action="store_const", const="tiny", help="a rehearsal")
    parser.add_argument("--rounds", type=int, help="5; 1 with --quick")
    parser.add_argument("--minutes", type=float, help="no run begins later than this")
    parser.add_argument("--json", type=Path, help="where to write the result; a .md goes beside it")
    parser.add_argument("--plot", type=Path, help="a picture; beside the JSON if not said")
    parser.add_argument("--workdir", type=Path, default=WORKDIR)
    parser.add_argument("--fresh", action="store_true", help="do not go on with an ended run")
    parser.add_argument("--no-plan", action="store_true", help="leave bench.memory_plan out")
    parser.add_argument("--setup-only", action="store_true", help="measure nothing")
    return parser


def main() -> None:
    """Set up, measure, report."""
    args = make_parser().parse_args()
    end_on_sigterm()
    mode = MODES[args.mode or "full"]
    mode = replace(mode, rounds=args.rounds or mode.rounds, minutes=args.minutes or mode.minutes)
    root = args.workdir.expanduser().resolve()
    with alone(root):
        place, models = prepare(root, mode, say)
        if args.setup_only:
            return
        identity = {"mode": mode.name, "code": fingerprint(), **machine_facts()}
        journal = Journal(root / f"serving-{mode.name}.jsonl", identity, args.fresh)
        session = Session(mode, place, models, journal)
        records = session.run()
        plan = {"error": "--no-plan"} if args.no_plan else measure_plan(place, mode.is_quick)
        versions = peer_versions(place) | {"mlx-edge": version("mlx-edge")}
        facts: dict[str, Any] = {
            "mode": mode.name,
            "machine": machine_facts(),
            "versions": versions,
        }
        facts |= {"num_rounds": mode.rounds, "llama_setting": session.llama_setting}
        result = make_result(records, facts, plan)
        print(make_markdown(result))
        if args.json:
            args.json.write_text(json.dumps(result, indent=1) + "\n")
            args.json.with_suffix(".md").write_text(make_markdown(result))
            write_plot(place.python, args.json, args.plot or args.json.with_suffix(".png"), say)
        journal.path.replace(journal.path.with_name(f"done-serving-{mode.name}.jsonl"))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("bench.serving: interrupted; the same command goes on from here")
