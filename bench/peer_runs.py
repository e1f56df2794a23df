"""One function per peer and measurement: a child process, and the numbers read from what it said.

All return the same record: values by name (tokens per second, seconds, bytes), and the reason if there is none. Knows
nothing of rounds and ratios.
"""

import json
import os
import re
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.child import Finished, end_child, run_child, start_child
from bench.peer_models import Models
from bench.peer_setup import Word, Workplace

ROOT = Path(__file__).parents[1]
DRIVERS = Path(__file__).with_name("peer_drivers.py")
PROMPT = "Once upon a time"


@dataclass(frozen=True)
class Plan:
    """What is measured of a model."""

    prompts: tuple[int, ...] = (128, 512)
    depths: tuple[int, ...] = (0, 2048)
    tokens: int = 64
    threads: int = 2
    limit_s: float = 300.0  # of each child

    def steps(self) -> list[dict[str, Any]]:
        """In the words of bench/ours.py and of the peers' drivers."""
        return [
            *({"do": "prefill", "tokens": prompt} for prompt in self.prompts),
            *({"do": "decode", "tokens": self.tokens, "depth": depth} for depth in self.depths),
        ]


@dataclass
class Measured:
    """What one run of a peer gave."""

    values: dict[str, float] = field(default_factory=dict)
    error: str | None = None
    stolen_s: float = 0.0
    wall_s: float = 0.0

    def add(self, child: Finished) -> None:
        """Count a child in; the first reason for a failure stays."""
        self.error = self.error or child.error
        self.stolen_s += child.stolen_s
        self.wall_s += child.wall_s


def run_ours(models: Models, steps: list[dict[str, Any]], plan: Plan) -> Measured:
    """mlx_edge, in a process of its own."""
    command: list[Word] = [sys.executable, "-m", "bench.ours", models.mlx, json.dumps(steps)]
    child = run_child(command, limit_s=plan.limit_s, cores=plan.threads, folder=ROOT)
    measured = _from_lines(child)
    measured.values["weight_bytes"] = models.weight_bytes()
    return measured


def run_driver(kind: str, place: Workplace, model: Path, steps: list[Any], plan: Plan) -> Measured:
    """OpenVINO or mlx-lm, in a process of the peers' environment."""
    command: list[Word] = [place.python, DRIVERS, kind, model, str(plan.threads), json.dumps(steps)]
    child = run_child(command, limit_s=plan.limit_s, cores=plan.threads, folder=place.root)
    measured = _from_lines(child)
    measured.values["peak_bytes"] = child.peak_bytes
    return measured


def _from_lines(child: Finished) -> Measured:
    """The values in lines of JSON; a child that was ended early has given some of them."""
    measured = Measured()
    measured.add(child)
    for line in child.out.splitlines():
        try:
            said = json.loads(line)
        except ValueError:  # not ours: a library that prints, or a line cut by the limit
            continue
        if not isinstance(said, dict) or "name" not in said:
            continue
        name = said.pop("name")
        measured.values.update(_values(name, said))
    return measured


def _values(name: str, said: dict[str, Any]) -> dict[str, float]:
    """The numbers of one line: rates by the line's name, the others by theirs."""
    values: dict[str, float] = {}
    for key, value in said.items():
        if key == "samples":
            values[name] = statistics.fmean(value)
        elif key == "peak_bytes":
            values[key] = value  # the last line's is the largest
        else:
            values[f"{name}_{key}"] = value
    return values


def run_llama(place: Workplace, model: Path, repack: bool, plan: Plan) -> Measured:
    """llama-bench: prompts and generation, then generation after a filled context."""
    measured = Measured()
    common: list[Word] = [
        "-m",
        model,
        "-t",
        str(plan.threads),
        "-fa",
        "1",
        "-r",
        "1",
        "-o",
        "jsonl",
    ]
    common += ["--repack", str(int(repack))]
    prompts = ",".join(map(str, plan.prompts))
    runs = [["-p", prompts, "-n", str(plan.tokens if 0 in plan.depths else 0)]]
    runs += [["-p", "0", "-n", str(plan.tokens), "-d", str(d)] for d in plan.depths if d]
    for words in runs:
        command = [place.tool("llama-bench"), *common, *words]
        child = run_child(command, limit_s=plan.limit_s, cores=plan.threads, folder=place.root)
        measured.add(child)
        measured.values["peak_bytes"] = max(
            child.peak_bytes, int(measured.values.get("peak_bytes", 0))
        )
        for line in child.out.splitlines():
            measured.values.update(_llama_rate(line))
    return measured


def _llama_rate(line: str) -> dict[str, float]:
    """A line of llama-bench's jsonl."""
    try:
        said = json.loads(line)
        prompt, depth, rate = said["n_prompt"], said["n_depth"], float(said["avg_ts"])
        weights = said["model_size"]
    except (ValueError, KeyError, TypeError):
        return {}
    name = f"prefill_{prompt}" if prompt else f"decode_{depth}"
    return {name: rate, "weight_bytes": weights}


def run_llama_batch(place: Workplace, model: Path, repack: bool, plan: Plan, rows: int) -> Measured:
    """llama-batched-bench: many rows at once, all with 128 prompt tokens and 32 new ones."""
    command: list[Word] = [place.tool("llama-batched-bench"), "-m", model, "-t", str(plan.threads)]
    command += ["-fa", "on", "-c", "4096", "-npp", "128", "-ntg", "32", "-npl", str(rows)]
    command += ["--output-format", "jsonl", *([] if repack else ["--no-repack"])]
    child = run_child(command, limit_s=plan.limit_s, cores=plan.threads, folder=place.root)
    measured = Measured()
    measured.add(child)
    for line in child.out.splitlines():
        if line.startswith("{"):
            said = json.loads(line)
            measured.values[f"batch_{rows}_prefill"] = said["speed_pp"]
            measured.values[f"batch_{rows}_decode"] = said["speed_tg"]
    return measured


def run_cold(command: list[Word], plan: Plan, folder: Path = ROOT) -> Measured:
    """A process from its start to its first byte of text; twice, the second counts, as all files are then cached."""
    measured = Measured()
    for _ in range(2):
        child = run_child(command, limit_s=plan.limit_s, cores=plan.threads, folder=folder)
        measured.add(child)
    if child.error is None:
        # A token may be half a character, which is never written: then the end of the process has to do.
        first = child.wall_s if child.first_byte_s is None else child.first_byte_s
        measured.values = {"first_token_s": first, "process_s": child.wall_s}
        measured.values["peak_bytes"] = child.peak_bytes
        load = re.search(r"load time =\s*([\d.]+) ms", child.err)
        if load:
            measured.values["load_s"] = float(load[1]) / 1e3
    return measured


def cold_ours(model: Path | str) -> list[Word]:
    """Our command, one token."""
    words = ["--prompt", PROMPT, "--max-tokens", "1", "--verbose", "False"]
    return [sys.executable, "-m", "mlx_edge.generate", "--model", model, *words]


def cold_llama(place: Workplace, model: Path, plan: Plan, *options: str) -> list[Word]:
    """llama.cpp's command with its defaults, one token."""
    words = ["-p", PROMPT, "-n", "1", "-t", str(plan.threads), "-no-cnv", "--no-display-prompt"]
    return [place.tool("llama-completion"), "-m", model, *words, *options]


def run_stream(place: Workplace, plan: Plan, seconds: float) -> Measured:
    """The memory reader: median and best pass, GB/s."""
    command: list[Word] = [place.stream, str(plan.threads), str(seconds)]
    child = run_child(command, limit_s=60, cores=plan.threads, folder=place.root)
    measured = Measured()
    measured.add(child)
    passes = [float(line) for line in child.out.split()]
    if passes:
        measured.values = {"gbs": statistics.median(passes), "best_gbs": max(passes)}
    return measured


def run_shared(models: Models, plan: Plan) -> Measured:
    """Two processes with the same model: what each is charged for, shared pages divided."""
    command = [sys.executable, "-m", "bench.ours", str(models.mlx), "hold"]
    children = []
    measured = Measured()
    try:
        for _ in range(2):
            child = start_child(
                command, cores=plan.threads, folder=ROOT, errors=_NOWHERE, is_asked=True
            )
            children.append(child)
            if _wait_for(child, "ready", plan.limit_s) is None:
                measured.error = f"not ready within {plan.limit_s:.0f} s"
                return measured
        for index, child in enumerate(children):
            assert child.stdin is not None
            child.stdin.write(b"\n")
            child.stdin.flush()
            said = _wait_for(child, "share", 30)
            if said:
                measured.values[f"pss_{index}"] = said["bytes"]
                measured.values[f"rss_{index}"] = said["rss"]
    finally:
        for child in children:
            end_child(child, 0.0)
    return measured


_NOWHERE = os.open(os.devnull, os.O_WRONLY)


def _wait_for(child: Any, name: str, limit_s: float) -> dict[str, Any] | None:
    """The child's next line of that name; None when it is late or has ended."""
    import select

    while select.select([child.stdout], [], [], limit_s)[0]:
        line = child.stdout.readline()
        if not line:
            return None
        said: dict[str, Any] = json.loads(line)
        if said["name"] == name:
            return said
    return None
