"""From records to figures: ratios within a round, their median and spread. The formulas of bench/README.md.

A record is what one job of one round gave. Knows nothing of how it was made.
"""

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from bench.serving_jobs import CHAT, LOADED, LONG, SHARED, SHORT
from bench.serving_servers import LLAMA, MLXLM, OURS

Record = dict[str, Any]
RATE = "output_tokens_per_s"


@dataclass(frozen=True)
class Figure:
    """One number a round."""

    rounds: tuple[float, ...]
    note: str

    @property
    def median(self) -> float | None:
        """None when no round has it."""
        return statistics.median(self.rounds) if self.rounds else None


class Rounds:
    """The records that count, found by what they are of."""

    def __init__(self, records: Iterable[Record]):
        self.records = list(records)
        self.counted = [r for r in self.records if not r["error"] and not r["discarded"]]

    def series(
        self,
        model: str,
        server: str,
        clients: int,
        value: str,
        *,
        workload: str = CHAT.name,
        turn: int = 0,
        tool: str = "exact",
    ) -> dict[int, float]:
        """A value by round."""
        wanted = (model, server, clients, workload, turn, tool)
        keys = ("model", "server", "clients", "workload", "turn", "tool")
        return {
            r["round"]: r["values"][value]
            for r in self.counted
            if tuple(r[key] for key in keys) == wanted and r["values"].get(value) is not None
        }

    def errors(self, server: str) -> int:
        """Failed requests of a server and runs of it that gave nothing, over all jobs."""
        own = [r for r in self.records if r["server"] == server]
        requests = sum(len(r["values"].get("errors", ())) for r in own)
        return requests + sum(r["error"] is not None and not r["was_skipped"] for r in own)


def paired(
    left: dict[int, float], right: dict[int, float], join: Callable[[float, float], float]
) -> tuple[float, ...]:
    """One number for each round that has both."""
    return tuple(join(left[i], right[i]) for i in sorted(left) if i in right)


def _ratio(ours: float, theirs: float) -> float:
    return ours / theirs if theirs else float("inf")


def versus(
    rounds: Rounds, model: str, peer: str, clients: int, workload: str = CHAT.name
) -> Figure:
    """Output tokens per second, ours over a peer's."""
    ours, theirs = (
        rounds.series(model, server, clients, RATE, workload=workload) for server in (OURS, peer)
    )
    note = f"output tokens/s, ours / {peer}, {model}, {clients} clients, {workload} tokens"
    return Figure(paired(ours, theirs, _ratio), note)


def scaling(rounds: Rounds, model: str, server: str = OURS, workload: str = CHAT.name) -> Figure:
    """Output tokens per second with 16 clients over those with one."""
    many, one = (rounds.series(model, server, n, RATE, workload=workload) for n in (LOADED, 1))
    note = f"output tokens/s of {server}, {LOADED} clients / 1, {model}, {workload} tokens"
    return Figure(paired(many, one, _ratio), note)


def added(rounds: Rounds, model: str, server: str = OURS) -> Figure:
    """P99 between tokens at half load less P99 of a single client, milliseconds."""
    half, one = (rounds.series(model, server, n, "itl_ms_p99") for n in (0, 1))
    note = f"P99 between tokens of {server}, Poisson arrivals at half capacity - one client, ms"
    return Figure(paired(half, one, lambda a, b: a - b), f"{note}, {model}")


def slowest_against(rounds: Rounds, peer: str) -> Figure:
    """The least median ratio over all loads that both ran."""
    loads = {
        (r["model"], r["clients"], r["workload"])
        for r in rounds.counted
        if r["server"] == peer and r["clients"] and r["tool"] == "exact"
    }
    figures = [versus(rounds, model, peer, n, work) for model, n, work in sorted(loads)]
    known = [figure for figure in figures if figure.median is not None]
    if not known:
        return Figure((), f"no load that {peer} and ours both ran")
    return min(known, key=lambda figure: figure.median or 0.0)


def summarize(rounds: Rounds) -> dict[str, Figure]:
    """The keys of the summary that are made from rounds."""
    return {
        "throughput_16_over_1": scaling(rounds, "1b"),
        "p99_inter_token_added_ms": added(rounds, "1b"),
        "throughput_vs_llamacpp_1b_8": versus(rounds, "1b", LLAMA, 8),
        "throughput_vs_llamacpp_1b_16": versus(rounds, "1b", LLAMA, LOADED),
        "throughput_vs_mlxlm_min": slowest_against(rounds, MLXLM),
        "pocket_throughput_16_over_1": scaling(rounds, "pocket"),
        "pocket_p99_inter_token_added_ms": added(rounds, "pocket"),
    }


def further(rounds: Rounds) -> dict[str, Figure]:
    """Ratios beside the summary: other prompts, other numbers of clients, the peers' own scaling."""
    figures = {
        "throughput_16_over_1_long_prompts": scaling(rounds, "1b", workload=LONG.name),
        "throughput_vs_llamacpp_long_prompts": versus(rounds, "1b", LLAMA, LOADED, LONG.name),
        "throughput_vs_llamacpp_shared_prefix": versus(rounds, "1b", LLAMA, LOADED, SHARED.name),
        "llamacpp_throughput_16_over_1": scaling(rounds, "1b", LLAMA),
        "llamacpp_p99_inter_token_added_ms": added(rounds, "1b", LLAMA),
        "mlxlm_throughput_16_over_1_pocket": scaling(rounds, "pocket", MLXLM),
    }
    for clients in (1, 4, 32):
        figures[f"throughput_vs_llamacpp_1b_{clients}"] = versus(rounds, "1b", LLAMA, clients)
    for clients in (1, 4, 16, 32):
        name = f"throughput_vs_mlxlm_1b_{clients}"
        figures[name] = versus(rounds, "1b", MLXLM, clients, SHORT.name)
        figures[f"throughput_vs_mlxlm_pocket_{clients}"] = versus(rounds, "pocket", MLXLM, clients)
    for server in (OURS, LLAMA):
        ours, theirs = (rounds.series("1b", server, 8, RATE, tool=t) for t in ("locust", "exact"))
        note = f"output tokens/s of {server} by Locust / by our client, 8 clients"
        figures[f"locust_over_exact_{server}"] = Figure(paired(ours, theirs, _ratio), note)
    return {name: figure for name, figure in figures.items() if figure.rounds}


def null_runs(rounds: Rounds) -> dict[str, Figure]:
    """Our server against itself at another place of the round: 1."""
    found = {}
    for model in dict.fromkeys(r["model"] for r in rounds.records):
        first, again = (rounds.series(model, OURS, LOADED, RATE, turn=turn) for turn in (0, 1))
        figure = Figure(paired(again, first, _ratio), f"{model}, {LOADED} clients")
        if figure.rounds:
            found[f"{model} {LOADED} clients"] = figure
    return found


def rows(records: Sequence[Record]) -> list[dict[str, Any]]:
    """A row for each load and server: medians over the rounds, with the lowest and highest rate."""
    keys = ("model", "workload", "clients", "tool", "server", "turn")
    groups = dict.fromkeys(tuple(r[key] for key in keys) for r in records)
    found = []
    for group in sorted(groups, key=lambda g: (g[0], g[3], g[1], g[2] or 99, g[4], g[5])):
        own = [r for r in records if tuple(r[key] for key in keys) == group]
        good = [r["values"] for r in own if not r["error"] and not r["discarded"]]
        row: dict[str, Any] = dict(zip(keys, group, strict=True))
        row |= {"rounds": len(good), "discarded": sum(r["discarded"] is not None for r in own)}
        row["errors"] = sum(len(r["values"].get("errors", ())) for r in own)
        row["disagreements"] = sum("disagreement" in values for values in good)
        names = dict.fromkeys(name for values in good for name in values)
        for name in names:
            numbers = [v[name] for v in good if isinstance(v.get(name), int | float)]
            if numbers:
                row[name] = statistics.median(numbers)
        rates = [values[RATE] for values in good]
        row["spread"] = [min(rates), max(rates)] if rates else None
        found.append(row)
    return found
