"""mlx_edge beside llama.cpp, OpenVINO GenAI and mlx-lm on a CPU, in turn, with random-weight models of real shapes.

    python -m bench.peers --json bench/results/peers.json      # 10 rounds, at most 90 minutes
    python -m bench.peers --quick --json /tmp/quick.json       # within 5 minutes, once all is set up

The first run sets up the peers' environment and makes the models (half an hour on two cores). Every measurement that is
done stands in a file of the work folder: a run that was ended goes on there. A peer that fails costs its own figures,
with the reason. How each figure is made, and what would make it wrong, is in bench/README.md.
"""

import argparse
import fcntl
import hashlib
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bench.peer_jobs import ALL, FULL, QUICK, TINY, Job, Jobs, Mode
from bench.peer_models import SHAPES, make_models
from bench.peer_report import make_result, write_plot
from bench.peer_runs import ROOT, run_ours
from bench.peer_setup import Workplace, machine_facts, peer_versions, set_up
from bench.table import make_markdown

MODES = {"quick": QUICK, "full": FULL, "all": ALL, "tiny": TINY}
UNMEASURED = {
    "table",
    "plot",
    "peer_report",
    "peer_summary",
    "processes",
    "kv_memory",
    "blas",
    "donation",
}
OTHERS = ("metal_", "memory_", "quantization", "serving", "load", "soak")  # benches of their own
WORKDIR = Path.home() / ".cache" / "mlx_edge" / "bench"


def say(text: str) -> None:
    """A line above the progress bar."""
    tqdm.write(text, file=sys.stderr)


def fingerprint() -> str:
    """What our code is: a run never goes on with measurements of another version."""
    package = ROOT / "mlx_edge"
    paths = [p for p in package.rglob("*") if p.suffix in {".py", ".so", ".safetensors"}]
    paths += [
        p
        for p in Path(__file__).parent.glob("*.py")
        if p.stem not in UNMEASURED and not p.stem.startswith(OTHERS)
    ]
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(path.name.encode() + path.read_bytes())
    for path in _native_files():
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _native_files() -> Iterator[Path]:
    """The compiled part, which an editable installation keeps outside of the package's folder."""
    from importlib.util import find_spec

    spec = find_spec("mlx_edge._native")
    for place in (spec.submodule_search_locations or []) if spec else []:
        yield from sorted(Path(place).glob("*.so"))


class Journal:
    """The measurements done so far, a line of JSON each; the first line says what they are of."""

    def __init__(self, path: Path, identity: dict[str, Any], is_fresh: bool):
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        stored = [record for line in lines if (record := _parse(line)) is not None]
        known = bool(stored) and stored[0].get("identity") == identity
        self.records: list[dict[str, Any]] = stored[1:] if known and not is_fresh else []
        if self.records:
            kept = [json.dumps(record) for record in stored]  # without a line that a kill has cut
            path.write_text("\n".join(kept) + "\n")
            return
        if stored:
            path.replace(path.with_suffix(".old.jsonl"))
        self._append({"identity": identity})

    def has(self, index: int, job: Job) -> bool:
        """Whether this job of this round is done."""
        return any(r["round"] == index and r["job"] == job.name for r in self.records)

    def add(self, record: dict[str, Any]) -> None:
        """Keep a measurement; a kill after this loses nothing."""
        self.records.append(record)
        self._append(record)

    def _append(self, record: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()


def _parse(line: str) -> dict[str, Any] | None:
    """A line, or None for one that a kill has cut."""
    try:
        found: dict[str, Any] = json.loads(line)
    except ValueError:
        return None
    return found


def run_job(index: int, job: Job, place: Workplace, deadline: float) -> dict[str, Any]:
    """One record: the values, or why there are none."""
    record: dict[str, Any] = {"round": index, "job": job.name, "peer": job.peer}
    record |= {"shape": job.shape, "threads": job.threads, "values": {}, "error": None}
    if time.monotonic() > deadline:
        return record | {"error": "the time for the whole run was over"}
    for need in job.needs:
        if reason := place.failures.get(need):
            return record | {"error": f"{need}: {reason}"}
    try:
        measured = job.run()
    except Exception as failure:  # a peer that surprises us costs its own figures only
        return record | {"error": f"{type(failure).__name__}: {failure}"}
    return record | asdict(measured)


def start_once(jobs: Jobs) -> dict[str, float]:
    """The first start of each model, not counted: it may repack the weights into a file. Its seconds, by shape."""
    took = {}
    for shape in jobs.shapes():
        measured = run_ours(jobs.models(shape), [{"do": "prefill", "tokens": 16}], jobs.plan)
        took[shape] = round(measured.wall_s, 2)
        if measured.error:
            say(f"first start of {shape}: {measured.error}")
    return took


def run_rounds(mode: Mode, jobs: Jobs, place: Workplace, journal: Journal) -> None:
    """All jobs of all rounds that are not done yet."""
    spent = sum(record.get("wall_s", 0.0) for record in journal.records)
    deadline = time.monotonic() + mode.minutes * 60 - spent
    todo = [(index, job) for index in range(mode.rounds) for job in jobs.round(index)]
    with tqdm(total=len(todo), unit="run", file=sys.stderr) as bar:
        for index, job in todo:
            bar.set_description(f"round {index + 1}: {job.peer} {job.shape}")
            if not journal.has(index, job):
                record = run_job(index, job, place, deadline)
                journal.add(record)
                if record["error"]:
                    say(f"round {index + 1}: {job.name}: {record['error']}")
            bar.update()


@contextmanager
def alone(root: Path) -> Iterator[None]:
    """One run at a time: two would measure each other."""
    root.mkdir(parents=True, exist_ok=True)
    with (root / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            sys.exit(f"bench.peers: another run is using {root}; wait for it, or give --workdir")
        yield


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser("bench.peers", description=(__doc__ or "").split("\n", 1)[0])
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--quick", dest="mode", action="store_const", const="quick")
    more = "also one thread, a 3B shape, a batch of 8, long prompts"
    kind.add_argument("--all", dest="mode", action="store_const", const="all", help=more)
    kind.add_argument("--tiny", dest="mode", action="store_const", const="tiny", help="a rehearsal")
    parser.add_argument("--rounds", type=int, help="10; 2 with --quick")
    parser.add_argument("--minutes", type=float, help="no run begins later than this")
    parser.add_argument("--json", type=Path, help="where to write the result")
    parser.add_argument("--plot", type=Path, help="a picture; beside the JSON if not said")
    parser.add_argument("--workdir", type=Path, default=WORKDIR)
    parser.add_argument("--fresh", action="store_true", help="do not go on with an ended run")
    parser.add_argument("--setup-only", action="store_true", help="measure nothing")
    return parser


def main() -> None:
    """Set up, measure, report."""
    args = make_parser().parse_args()
    mode = MODES[args.mode or "full"]
    mode = replace(mode, rounds=args.rounds or mode.rounds, minutes=args.minutes or mode.minutes)
    root = args.workdir.expanduser().resolve()
    with alone(root):
        place = set_up(root, say)
        jobs = Jobs(mode, place)
        for shape in jobs.shapes():
            make_models(jobs.models(shape), place, say)
        if args.setup_only:
            return
        identity = {"mode": mode.name, "code": fingerprint(), **machine_facts()}
        journal = Journal(root / f"run-{mode.name}.jsonl", identity, args.fresh)
        first_start_s = start_once(jobs)
        run_rounds(mode, jobs, place, journal)
        cache_bytes = {name: shape.cache_bytes(1) for name, shape in SHAPES.items()}
        facts = {"mode": mode.name, "machine": machine_facts(), "versions": peer_versions(place)}
        facts |= {"first_start_s": first_start_s}
        result = make_result(
            journal.records, {"1b": mode.big, "06b": mode.small}, cache_bytes, facts
        )
        print(make_markdown(result))
        if args.json:
            args.json.write_text(json.dumps(result, indent=1) + "\n")
            write_plot(place.python, args.json, args.plot or args.json.with_suffix(".png"), say)
        journal.path.replace(journal.path.with_name(f"done-{mode.name}.jsonl"))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("bench.peers: interrupted; the same command goes on from here")
