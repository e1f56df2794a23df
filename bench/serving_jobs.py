"""What a run of bench/serving.py consists of: for each round its jobs in their order, each one load on one server.

Servers take turns at every number of clients; every other round goes backwards. Knows how to run nothing.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from bench.serving_prompts import Workload
from bench.serving_servers import LLAMA, MLXLM, OURS

CHAT = Workload(prompt_tokens=32, new_tokens=64)  # of the headline
LONG = Workload(prompt_tokens=256, new_tokens=64)
SHARED = Workload(prompt_tokens=288, new_tokens=64, shared_tokens=256)
SHORT = Workload(
    prompt_tokens=4, new_tokens=2, is_even=True
)  # all that mlx-lm has time for on a 1B model
CLIENTS = (1, 4, 8, 16, 32)
LOADED = 16  # clients at which the capacity is measured


@dataclass(frozen=True)
class Job:
    """One load on one server. `clients` 0: an open loop at half of what the server did with 16."""

    model: str  # "1b" or "pocket"
    server: str
    workload: Workload
    clients: int
    warm_s: float
    window_s: float
    requests: int | None = None  # of each client, in place of the window
    tool: str = "exact"  # or "locust"
    turn: int = 0  # 1: the same once more, for the null run

    @property
    def what(self) -> str:
        """The job without its server: what is compared."""
        load = f"{self.clients} clients" if self.clients else "half load"
        tool = "" if self.tool == "exact" else f", by {self.tool}"
        return f"{self.model} / {self.workload.name} / {load}{tool}"

    @property
    def name(self) -> str:
        """What a record is found by."""
        return f"{self.what} / {self.server}{' again' if self.turn else ''}"


@dataclass(frozen=True)
class Times:
    """Seconds before and of the window, by number of clients; 0 is the open loop."""

    warm_s: dict[int, float]
    window_s: dict[int, float]


@dataclass(frozen=True)
class Mode:
    """How much is measured."""

    name: str
    rounds: int
    minutes: float  # no run begins later than this
    big: Times
    small: Times
    llama_settings: tuple[str, ...]
    shape: str = "llama-3.2-1b"
    probe_passes: int = 2
    probe_s: float = 8.0
    extra_rounds: int = 2  # with long and shared prompts, and Locust
    mlxlm_big: tuple[int, ...] = (1, 4, 16, 32)  # in the first round
    ratio_to_peers: tuple[int, ...] = CLIENTS
    small_clients: tuple[int, ...] = (1, 4, 16, 32)
    has_open_peers: bool = True
    is_quick: bool = False


FULL = Mode(
    "full",
    rounds=5,
    minutes=56,
    big=Times(
        {0: 5, 1: 2, 4: 3, 8: 4, 16: 6, 32: 10}, {0: 40, 1: 10, 4: 12, 8: 15, 16: 20, 32: 25}
    ),
    small=Times({0: 2, 1: 1, 4: 1, 16: 2, 32: 3}, {0: 15, 1: 5, 4: 5, 16: 6, 32: 6}),
    llama_settings=(
        "Q4_0, repack",
        "Q4_0, repack, asleep",
        "Q4_0, no repack, asleep",
        "Q4_K_M, repack, asleep",
        "Q4_K_M, no repack, asleep",
    ),
)
QUICK = Mode(
    "quick",
    rounds=1,
    minutes=4,
    big=Times({0: 3, 1: 1.5, 8: 3, 16: 5}, {0: 15, 1: 6, 8: 8, 16: 10}),
    small=Times({0: 1, 1: 1, 16: 1}, {0: 8, 1: 3, 16: 4}),
    llama_settings=("Q4_0, repack", "Q4_0, repack, asleep"),
    probe_passes=1,
    probe_s=4.0,
    extra_rounds=0,
    mlxlm_big=(1,),
    ratio_to_peers=(8, 16),
    small_clients=(1, 16),
    has_open_peers=False,
    is_quick=True,
)
# For tests of the command itself: models too small, and times too short, to say anything.
TINY = replace(
    FULL,
    name="tiny",
    rounds=1,
    minutes=3,
    big=Times(
        {0: 0.5, 1: 0.5, 4: 0.5, 8: 0.5, 16: 0.5, 32: 0.5}, {0: 2, 1: 1, 4: 1, 8: 1, 16: 1, 32: 1}
    ),
    small=Times({0: 0.5, 1: 0.5, 16: 0.5}, {0: 2, 1: 1, 16: 3}),
    llama_settings=("Q4_0, repack", "Q4_0, no repack"),
    shape="tiny",
    probe_passes=1,
    probe_s=1.0,
    extra_rounds=1,
    mlxlm_big=(1, 16),
    small_clients=(1, 16),
    is_quick=True,
)
MODES = {mode.name: mode for mode in (FULL, QUICK, TINY)}


def make_round(mode: Mode, index: int) -> list[Job]:
    """The jobs of one round in their order. Open loops come last: they need what the closed ones found."""
    jobs: list[Job] = []
    for found in (list(_big(mode, index)), list(_small(mode))):
        closed = [job for job in found if job.clients]
        closed = closed if index % 2 == 0 else closed[::-1]
        jobs += closed + [job for job in found if not job.clients]
    return jobs


def _big(mode: Mode, index: int) -> Iterator[Job]:
    times = mode.big

    def job(server: str, clients: int, workload: Workload = CHAT, **more: object) -> Job:
        warm, window = times.warm_s[clients], times.window_s[clients]
        return Job("1b", server, workload, clients, warm, window, **more)  # type: ignore[arg-type]

    for clients in sorted(set(times.warm_s) - {0}):
        yield job(OURS, clients)
        if clients in mode.ratio_to_peers:
            yield job(LLAMA, clients)
    if index < mode.extra_rounds:
        for workload, clients in ((SHARED, LOADED), (LONG, 1), (LONG, LOADED)):
            yield from (job(server, clients, workload) for server in (OURS, LLAMA))
        yield from (job(server, 8, tool="locust") for server in (OURS, LLAMA))
    if index == 0:
        for clients in mode.mlxlm_big:
            for server in (OURS, MLXLM):
                yield Job("1b", server, SHORT, clients, 0.0, 0.0, requests=1)
    yield job(OURS, LOADED, turn=1)
    yield from (job(server, 0) for server in ((OURS, LLAMA) if mode.has_open_peers else (OURS,)))


def _small(mode: Mode) -> Iterator[Job]:
    times = mode.small
    for clients in mode.small_clients:
        for server in (OURS, MLXLM):
            warm, window = times.warm_s[clients], times.window_s[clients]
            yield Job("pocket", server, CHAT, clients, warm, window)
    for clients, turn in ((LOADED, 1), (0, 0)):
        warm, window = times.warm_s[clients], times.window_s[clients]
        yield Job("pocket", OURS, CHAT, clients, warm, window, turn=turn)
