"""What `mac_check.sh` runs on a Mac: compiles the Metal kernels, runs them, times them; one JSON file to send back.

    PYTHONPATH=. python scripts/mac_check.py --json mac_check.json

THIS HAS NEVER RUN ON A MAC: on Linux its test gives it a stub of xcrun, and the emulated backend for a GPU. Parts run
one after the other; each writes what it found and, where it failed, why. The file is replaced whole after each. The
kernels run in a process of their own, `mac_cases.py`: when one ends it, that costs one case.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
CASES = Path(__file__).with_name("mac_cases.py")
PACKAGES = ("mlx-edge", "mlx", "mlx-metal", "mlx-lm", "numpy", "transformers")
FACTS = {
    "chip": "sysctl -n machdep.cpu.brand_string",
    "model": "sysctl -n hw.model",
    "memory_bytes": "sysctl -n hw.memsize",
    "performance_cores": "sysctl -n hw.perflevel0.physicalcpu",
    "efficiency_cores": "sysctl -n hw.perflevel1.physicalcpu",
    "macos": "sw_vers -productVersion",
    "macos_build": "sw_vers -buildVersion",
    "xcode": "xcodebuild -version",
    "metal": "xcrun -sdk macosx metal --version",
    "power": "pmset -g batt",
    "thermal": "pmset -g therm",
    "commit": "git rev-parse HEAD",
    "changed_files": "git status --porcelain --untracked-files=no",
}
XCRUN = ("xcrun", "-sdk", "macosx", "metal")
# MLX compiles what it prints behind its own utils.h, in safe mode.
FLAGS = ("-x", "metal", "-Wall", "-Wextra", "-fno-fast-math", "-Wno-unused-parameter")
PRELUDE = '#include "mlx/backend/metal/kernels/utils.h"\n'
LIMIT_S = 1800  # of one process
CASES_LIMIT_S = 600  # of one that runs the kernels: seconds, and a compilation for each
MAX_PROCESSES = 5
KEPT = 2000  # characters of a message

Result = dict[str, Any]


class PartError(Exception):
    """Why a part has no figures."""


def run(command: list[str], *, limit_s: float = LIMIT_S, **environment: str | None) -> str:
    """What a command prints; a variable that is None is taken away.

    Raises: PartError with the end of what it said.
    """
    given = {**os.environ, **environment}
    env = {name: value for name, value in given.items() if value is not None}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=limit_s, env=env, check=False, cwd=ROOT
        )
    except FileNotFoundError as error:
        raise PartError(f"{command[0]} is not here: {error.strerror}") from error
    except subprocess.TimeoutExpired as error:
        raise PartError(f"{' '.join(command[:4])}: not done after {limit_s} s") from error
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip())[-KEPT:]
        raise PartError(f"{' '.join(command[:4])}: exit code {done.returncode}: {said}")
    return done.stdout


def describe_machine(_args: argparse.Namespace) -> Result:
    """Chip, system and versions; null for what this machine cannot say."""
    import mlx.core as mx

    facts: Result = {}
    for name, command in FACTS.items():
        try:
            facts[name] = run(command.split(), limit_s=60).strip()
        except PartError:
            facts[name] = None
    versions: Result = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return {
        "says": f"{facts['chip'] or platform.machine()}, {platform.system()} {platform.release()}, "
        f"mlx {versions['mlx']}",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        **facts,
        "versions": versions,
        "device": dict(mx.device_info()),
        "has_gpu": mx.metal.is_available(),
    }


def compile_sources(args: argparse.Namespace) -> Result:
    """Every text that MLX would compile for the items, through the compiler of Xcode."""
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, str(CASES), "sources", folder, *only(args)]
        found = json.loads(run(words))
        sources, failures = found["sources"], found["failures"]
        if not sources:
            raise PartError(f"no source was generated: {failures}")
        run([*XCRUN, "--version"], limit_s=120)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            outcomes = pool.map(lambda source: compile_one(Path(folder), source), sources)
            for source, outcome in zip(sources, outcomes, strict=True):
                source.update(outcome)
    bad = [source["name"] for source in sources if "failure" in source]
    warned = sum(bool(source.get("warnings")) for source in sources)
    says = f"{len(sources) - len(bad)} of {len(sources)} sources compiled, {warned} with warnings"
    says += f"; not {', '.join(bad)}" if bad else ""
    says += f"; {len(failures)} items gave none" if failures else ""
    return {
        "says": says,
        "is_failed": bool(bad or failures),
        "sources": sources,
        "failures": failures,
    }


def compile_one(folder: Path, source: Result) -> Result:
    """Warnings, or why it does not compile."""
    file = folder / source["file"]
    file.write_text(PRELUDE + file.read_text(encoding="utf-8"), encoding="utf-8")
    include = str(files("mlx") / "include")
    command = [
        *XCRUN,
        *FLAGS,
        "-isystem",
        include,
        "-c",
        str(file),
        "-o",
        str(file.with_suffix(".air")),
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"failure": str(error)}
    said = done.stderr.replace(str(folder), "").strip()[:KEPT]
    return (
        {"failure": said or f"exit code {done.returncode}"}
        if done.returncode
        else {"warnings": said}
    )


def run_cases(args: argparse.Namespace) -> Result:
    """Every item on the GPU against its golden; a process that one of them ends is started again behind it."""
    items: list[Result] = []
    with tempfile.TemporaryDirectory() as folder:
        log, skip = Path(folder) / "log", Path(folder) / "skip"
        words = ["run", str(log), "--backend", args.backend, "--skip", str(skip), *only(args)]
        for _ in range(MAX_PROCESSES):
            skip.write_text(json.dumps([item["name"] for item in items]), encoding="utf-8")
            log.write_text("", encoding="utf-8")
            reason = None
            try:
                run([sys.executable, str(CASES), *words], limit_s=CASES_LIMIT_S)
            except PartError as error:
                reason = str(error)
            found, begun = read_log(log)
            items += found
            if reason is None:
                return summarise_cases(items)
            if begun is None:
                raise PartError(reason)
            items.append({"name": begun, "failure": reason})
    result = summarise_cases(items)
    return {**result, "says": f"{result['says']}; given up: {MAX_PROCESSES} processes were ended"}


def read_log(log: Path) -> tuple[list[Result], str | None]:
    """Items that were finished, and the one that was begun and not finished."""
    found: list[Result] = []
    begun: str | None = None
    for line in log.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if "begun" in record:
            begun = record["begun"]
        else:
            found.append(record)
            begun = None
    return found, begun


def summarise_cases(items: list[Result]) -> Result:
    """How many were right, the worst of them, and which were not."""
    errors = {item["name"]: item["error"] for item in items if item.get("error") is not None}
    bad = [item["name"] for item in items if "failure" in item]
    if not errors and not bad:
        raise PartError("no kernel served any item: " + str(items[0]["left"] if items else "none"))
    moved = sum(item.get("other_bits", 0) > 0 for item in items)
    worst = max(errors, key=lambda name: errors[name], default=None)
    says = f"{len(errors) + len(bad)} items on the kernels, {len(bad)} wrong"
    says += f" ({', '.join(bad[:5])}{' ...' if len(bad) > 5 else ''})" if bad else ""
    says += f"; worst {errors[worst]:.2f} of the bound in {worst}" if worst else ""
    says += f"; {moved} differ from the emulator's bits"
    left = sum("left" in item for item in items)
    return {"says": f"{says}; {left} left to MLX", "is_failed": bool(bad), "items": items}


def read_trial(text: str) -> Result:
    """Speeds of the one trial that `mlx_lm.benchmark` prints."""
    for line in text.splitlines():
        if line.startswith("Trial 1:"):
            pairs = (pair.split("=") for pair in line.removeprefix("Trial 1:").split(","))
            found = {name.strip(): float(value) for name, value in pairs}
            return {name: found[name] for name in ("prompt_tps", "generation_tps", "peak_memory")}
    raise PartError(f"mlx_lm.benchmark printed no trial: {text[-KEPT:]}")


def read_ours(text: str) -> Result:
    """Speeds of one trial of `mlx_edge.benchmark`, and what served."""
    result = json.loads(text)
    names = ("prompt_tps", "generation_tps", "ttft_ms", "tpot_ms", "peak_memory")
    speeds: Result = {name: result["mean"][name] for name in names}
    return {**speeds, "backends": result["backends"], "bandwidth": result["bandwidth"]}


def benchmark(args: argparse.Namespace) -> Result:
    """Kernels on, kernels off, and mlx-lm, on the same folder, in turn; `--rounds` times."""
    pocket = str(files("mlx_edge") / "assets" / "pocket")
    models = {"pocket": pocket} | ({Path(args.model).name: args.model} if args.model else {})
    results: Result = {}
    failures: list[str] = []
    for name, model in models.items():
        rounds: dict[str, list[Result]] = {"on": [], "off": [], "mlx_lm": []}
        for _ in range(args.rounds):
            for contender, found in rounds.items():
                try:
                    found.append(time_once(contender, model, args))
                except (PartError, ValueError, KeyError) as error:
                    failures.append(f"{name}, {contender}: {error!s:.{KEPT}}")
        results[name] = {"rounds": rounds, "generation_tps": medians(rounds)}
    says = "; ".join(
        f"{name}: "
        + ", ".join(f"{c} {tps:.1f}" for c, tps in found["generation_tps"].items() if tps)
        for name, found in results.items()
    )
    says = f"tokens/s, median of {args.rounds}: {says}"
    says += f"; {len(failures)} runs failed: {failures[0].splitlines()[0]}" if failures else ""
    return {"says": says, "is_failed": bool(failures), "models": results, "failures": failures}


def time_once(contender: str, model: str, args: argparse.Namespace) -> Result:
    """One process with one trial."""
    sizes = ["-p", str(args.prompt_tokens), "-g", str(args.generation_tokens), "-n", "1"]
    module = "mlx_lm.benchmark" if contender == "mlx_lm" else "mlx_edge.benchmark"
    command = [sys.executable, "-m", module, "--model", model, *sizes]
    if contender == "mlx_lm":
        return read_trial(run(command))
    ops = "reference" if contender == "off" else None
    return read_ours(run([*command, "-o", "json"], MLX_EDGE_OPS=ops))


def medians(rounds: dict[str, list[Result]]) -> dict[str, float | None]:
    """Of the speed of decoding; None where no round went well."""
    return {
        name: statistics.median(r["generation_tps"] for r in found) if found else None
        for name, found in rounds.items()
    }


def only(args: argparse.Namespace) -> list[str]:
    return ["--only", args.only] if args.only else []


PARTS: dict[str, Callable[[argparse.Namespace], Result]] = {
    "machine": describe_machine,
    "compile": compile_sources,
    "cases": run_cases,
    "benchmark": benchmark,
}


def write(results: Result, file: Path) -> None:
    """Replace the file whole, or not at all; the owner's home is not named."""
    text = json.dumps(results, indent=1).replace(str(Path.home()), "~")
    part = file.with_name(file.name + ".part")
    part.write_text(text + "\n", encoding="utf-8")
    part.replace(file)


def make_parser() -> argparse.ArgumentParser:
    """All flags."""
    parser = argparse.ArgumentParser(prog="mac_check", description="Check the kernels on a Mac.")
    add = parser.add_argument
    add("--json", type=Path, default=Path("mac_check.json"), help="the file to write and send back")
    add("--model", help="a folder or hub id, timed beside the bundled model")
    add("--rounds", type=int, default=5, help="how often each contender is timed")
    add("--prompt-tokens", type=int, default=256, help="read by each")
    add("--generation-tokens", type=int, default=128, help="written by each")
    add("--only", help="items whose name has this in it")
    add("--backend", default="metal", choices=("metal", "emulated"), help="what runs the kernels")
    return parser


def main() -> int:
    """Run every part; 0 when all went well."""
    args = make_parser().parse_args()
    results: Result = {"failed": []}
    for name, part in PARTS.items():
        try:
            results[name] = part(args)
        except Exception as error:  # a part may fail in any way, and costs its own figures alone
            results[name] = {"failure": f"{type(error).__name__}: {error}"[: 2 * KEPT]}
        found = results[name]
        if found.pop("is_failed", False) or "failure" in found:
            results["failed"].append(name)
        write(results, args.json)
        print(f"{name}: {found.get('says') or 'failed: ' + found['failure']}", flush=True)
    print(f"Please send back {args.json}.")
    return 1 if results["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
