"""What a run consists of: for each round the jobs in their order, each one peer with one model.

In every other round the order is reversed, so that neither a slow start of the machine nor its warmth falls on one peer
always. A job that was not run says why. Knows how to run nothing by itself: that is bench/peer_runs.py.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from bench import peer_runs as runs
from bench.peer_models import QUANTIZATIONS, SHAPES, Models
from bench.peer_runs import Measured, Plan
from bench.peer_setup import Workplace
from bench.peer_summary import AGAIN, LLAMA, MLXLM, OPENVINO, OURS

TEXTS = ("code_edit", "json_list", "prose")
IR = {"gguf": "Q4_0 by its GGUF reader", "int4": "INT4 as exported"}
REPACK = {True: "repack", False: "no repack"}
LONG_ROUNDS = 2  # of a run, that many have the long prompts and deep contexts: 16 minutes each on two slow cores


@dataclass(frozen=True)
class Mode:
    """How much is measured."""

    name: str
    rounds: int
    minutes: float
    big: str = "llama-3.2-1b"
    small: str = "qwen3-0.6b"
    plan: Plan = Plan()  # noqa: RUF009 - frozen
    replay_tokens: int = 256
    mlxlm_rounds: int = 2
    replay_rounds: int = LONG_ROUNDS
    mlxlm_tokens: tuple[int, int] = (16, 4)
    is_all: bool = False
    stream_s: float = 2.0


QUICK = Mode(
    "quick",
    rounds=2,
    minutes=4.2,  # when the last run may begin; it is ended after limit_s
    plan=Plan(prompts=(128,), depths=(0,), tokens=32, limit_s=45),
    replay_tokens=96,
    replay_rounds=1,
    mlxlm_rounds=1,
    mlxlm_tokens=(8, 2),
    stream_s=1.0,
)
FULL = Mode("full", rounds=10, minutes=88)
ALL = replace(FULL, name="all", minutes=360, is_all=True)
# For tests of the command itself: a model too small to say anything.
TINY = replace(QUICK, name="tiny", big="tiny", small="tiny", minutes=3)


@dataclass(frozen=True)
class Job:
    """One peer's turn."""

    peer: str
    shape: str
    threads: int
    run: Callable[[], Measured]
    needs: tuple[str, ...] = ()  # steps of the setup without which it cannot run

    @property
    def name(self) -> str:
        """What a record is found by."""
        return f"{self.shape} / {self.threads} threads / {self.peer}"


class Jobs:
    """All jobs of a mode."""

    def __init__(self, mode: Mode, place: Workplace, python_threads: int = 2):
        self.mode, self.place = mode, place
        self.plan = replace(mode.plan, threads=python_threads)

    def models(self, shape: str) -> Models:
        """Where the models of a shape are."""
        return Models(self.place.models, SHAPES[shape])

    def shapes(self) -> list[str]:
        """The shapes that this run needs, once each."""
        more = ["smollm3-3b"] if self.mode.is_all else []
        return list(dict.fromkeys([self.mode.big, self.mode.small, *more]))

    def round(self, index: int) -> list[Job]:
        """The jobs of one round in their order."""
        mode = self.mode
        long_every = -(-mode.rounds // LONG_ROUNDS)
        plan = self.plan if index % long_every == 0 else _short(self.plan)
        jobs = list(self._big(index, plan))
        if mode.small != mode.big:
            jobs += self._peers(mode.small, plan)
        if mode.is_all and index < LONG_ROUNDS:
            jobs += self._rest(index)
        return jobs if index % 2 == 0 else jobs[::-1]

    def _big(self, index: int, plan: Plan) -> Iterator[Job]:
        shape, place = self.mode.big, self.place
        stream = partial(runs.run_stream, place, plan, self.mode.stream_s)
        yield self._job("STREAM", shape, stream, "stream")
        yield from self._peers(shape, plan)
        yield self._job("STREAM again", shape, stream, "stream")
        if index < self.mode.mlxlm_rounds:
            yield from self._mlxlm(index, plan)
        yield from self._cold(shape, plan)
        yield from self._replay(index, shape, plan)
        if index == 0:
            shared = partial(runs.run_shared, self.models(shape), plan)
            yield self._job(OURS + " twice", shape, shared)

    def _job(self, peer: str, shape: str, run: Callable[[], Measured], *needs: str) -> Job:
        return Job(peer, shape, self.plan.threads, run, needs)

    def _peers(self, shape: str, plan: Plan) -> Iterator[Job]:
        models, threads = self.models(shape), plan.threads
        ours = partial(runs.run_ours, models, plan.steps(), plan)
        yield Job(OURS, shape, threads, ours)
        for name in QUANTIZATIONS:
            for repack, word in REPACK.items():
                run = partial(runs.run_llama, self.place, models.gguf(name), repack, plan)
                needs = ("llama.cpp", f"GGUF {shape}")
                yield Job(f"{LLAMA} {name}, {word}", shape, threads, run, needs)
        for kind, word in IR.items():
            if kind == "gguf" and self.mode.name == "quick":
                continue
            run = partial(
                runs.run_driver, "openvino", self.place, models.ir(kind), plan.steps(), plan
            )
            made = ("pip openvino", f"GGUF {shape}", f"IR {shape}")
            yield Job(f"{OPENVINO} {word}", shape, threads, run, made)
        yield Job(AGAIN, shape, threads, ours)

    def _mlxlm(self, index: int, plan: Plan) -> Iterator[Job]:
        prompt, tokens = self.mode.mlxlm_tokens
        folder = self.models(self.mode.big).mlx
        for kind, size in (("mlx-lm", (prompt, tokens)), ("mlx-lm-bf16", (2, 2))):
            if kind == "mlx-lm-bf16" and (index or self.mode.name == "quick"):
                continue
            steps = [{"do": "both", "prompt": size[0], "tokens": size[1]}]
            run = partial(runs.run_driver, kind, self.place, folder, steps, plan)
            word = "float32" if kind == "mlx-lm" else "as stored (bfloat16)"
            yield self._job(f"{MLXLM} {word}", self.mode.big, run, "pip mlx-lm")

    def _cold(self, shape: str, plan: Plan) -> Iterator[Job]:
        models = self.models(shape)
        ours = partial(runs.run_cold, runs.cold_ours(models.mlx), plan)
        yield self._job(OURS + " cold", shape, ours)
        for name in QUANTIZATIONS:
            options: dict[str, tuple[str, ...]] = {"default": ()}
            if self.mode.name != "quick":
                options["no-repack"] = ("--no-repack",)
                options["no-repack-no-warmup"] = ("--no-repack", "--no-warmup")
            for word, flags in options.items():
                command = runs.cold_llama(self.place, models.gguf(name), plan, *flags)
                run = partial(runs.run_cold, command, plan)
                needs = ("llama.cpp", f"GGUF {shape}")
                yield self._job(f"{LLAMA} cold {word} {name}", shape, run, *needs)
        yield self._job(AGAIN + " cold", shape, ours)
        pocket = partial(runs.run_cold, runs.cold_ours("pocket"), plan)
        yield self._job(OURS + " cold pocket", shape, pocket)

    def _replay(self, index: int, shape: str, plan: Plan) -> Iterator[Job]:
        if index >= self.mode.replay_rounds:
            return
        models, limit = self.models(shape), self.mode.replay_tokens
        every: list[dict[str, Any]] = [
            {"do": "replay", "text": text, "ngram": ngram, "limit": limit}
            for text in TEXTS[:: 1 if index % 2 else -1]
            for ngram in ((False, True) if index % 2 else (True, False))
        ]
        run = partial(runs.run_ours, models, every, plan)
        yield self._job(OURS + " replay", shape, run)
        plain = [step for step in every if step["text"] == "prose" and not step["ngram"]]
        yield self._job(AGAIN + " replay", shape, partial(runs.run_ours, models, plain, plan))

    def _rest(self, index: int) -> Iterator[Job]:
        """One thread, the 3B shape, a batch of 8, longer prompts."""
        single = replace(_short(self.plan), threads=1)
        longer = replace(self.plan, prompts=(2048, 4096), depths=(), limit_s=600)
        yield from self._peers(self.mode.big, single)
        yield from self._peers(self.mode.small, single)
        yield from self._peers("smollm3-3b", _short(self.plan) if index else self.plan)
        for job in self._peers(self.mode.big, longer):
            yield replace(job, peer=_renamed(job.peer, "long prompts"))
        models = self.models(self.mode.big)
        steps = [{"do": "batch", "rows": 8, "prompt": 128, "tokens": 32}]
        run = partial(runs.run_ours, models, steps, self.plan)
        yield self._job(f"{OURS} batch", self.mode.big, run)
        for name in QUANTIZATIONS:
            for repack, word in REPACK.items():
                file = models.gguf(name)
                run = partial(runs.run_llama_batch, self.place, file, repack, self.plan, 8)
                peer = f"{LLAMA} batch {name}, {word}"
                yield self._job(peer, self.mode.big, run, "llama.cpp")


def _short(plan: Plan) -> Plan:
    return replace(plan, prompts=plan.prompts[:1], depths=plan.depths[:1])


def _renamed(peer: str, what: str) -> str:
    """A peer's other run: its family's name, what is run, its setting."""
    family = next(f for f in (AGAIN, OURS, LLAMA, OPENVINO) if peer.startswith(f))
    return f"{family} {what}{peer.removeprefix(family)}"
