"""Which requests run, and what each brings to the next step. Pure Python: no MLX, no threads, no clock of its own.

Continuous batching: whoever ends makes room at once, and prompts are read in chunks beside those that generate. What
is not known here: tokens, caches, models; a job is a count of tokens to be read, and a figure of memory.

Order of admission. Within a client: priority plus seconds waited / `ageing_s`. Between clients: the same of each one's
first job, its wait counted from the client's last admission at most; on the same level whoever was served the fewest
tokens. So a client with a long queue does not keep another one waiting, and nobody waits for ever. A job whose memory
is not free may be passed by others until it has waited for `ageing_s`; then nobody passes it.
"""

import heapq
import math
from bisect import insort
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from mlx_edge.engine.config import EngineConfig
from mlx_edge.engine.step_cost import StepCost

SMALL_STEP = 16  # rows: small-batch kernels serve so many; drafts are not worth more


class Ledger(Protocol):
    """Who may use how much memory."""

    def reserve(self, owner: int, nbytes: int) -> bool:
        """Promise it, or say that it is not free."""

    def release(self, owner: int) -> object:
        """It is not needed any more."""


@dataclass(eq=False)
class Job:
    """A request as the scheduler sees it."""

    key: int
    pending: int  # tokens to be read before the next one is chosen; 1 while it generates
    nbytes: int = 0  # to be reserved, all that it can come to need
    submitted: float = 0.0
    priority: int = 0
    client: str = ""
    deadline: float = math.inf
    can_draft: bool = False
    until_cut: int = 0  # tokens after which a chunk has to end; 0 for no such place ahead
    is_ready: bool = (
        True  # else it runs without a part in steps: images of its prompt are still to be encoded
    )
    generates: bool = field(default=False, init=False)  # has chosen a token

    @property
    def is_decoding(self) -> bool:
        """Whether its next step is a single row."""
        return self.generates and self.pending == 1

    @property
    def longest_chunk(self) -> int:
        """The most tokens that its next step may read."""
        return min(self.pending, self.until_cut or self.pending)


@dataclass(frozen=True)
class Part:
    """What a job brings to a step."""

    job: Job
    num_tokens: int
    max_drafts: int = 0
    is_decode: bool = False  # the job goes on by a token; else a prompt is read

    @property
    def is_last(self) -> bool:
        """Whether nothing is pending afterwards: a token is chosen."""
        return self.num_tokens == self.job.pending


@dataclass(frozen=True)
class Plan:
    """One step: the jobs that take part in it."""

    parts: tuple[Part, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.parts)

    @property
    def prompt_rows(self) -> int:
        """Tokens of prompts."""
        return sum(part.num_tokens for part in self.parts if not part.is_decode)

    @property
    def decode_rows(self) -> int:
        """Sequences that go on by a token."""
        return sum(part.is_decode for part in self.parts)


class Scheduler:
    """The jobs that wait and those that run."""

    def __init__(self, config: EngineConfig, ledger: Ledger) -> None:
        self._config, self._ledger = config, ledger
        self._queues: dict[str, list[tuple[float, int, Job]]] = {}  # by client, first come first
        self._waiting: dict[int, Job] = {}
        self._running: dict[int, Job] = {}  # in the order of admission
        self._suspects: dict[int, Job] = {}  # run alone, one after another, until they have passed
        self._deadlines: list[tuple[float, int]] = []
        self._served: dict[str, float] = {}  # tokens, by client
        self._admitted_at: dict[str, float] = {}
        self._is_blocked = False  # nobody who waits fits, until something changes
        self._peak = 0  # jobs at once, since the engine was last idle
        self._awaited = 0  # so many would be company
        self._start_at = -math.inf
        self.cost = StepCost()

    @property
    def num_waiting(self) -> int:
        """Jobs that have not been admitted."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Jobs that have been admitted and have not ended."""
        return len(self._running)

    def add(self, job: Job, now: float) -> None:
        """A job arrives."""
        if not (self._waiting or self._running):
            self._awaited, self._peak = self._peak, 0
            has_company = self._awaited > 1
            self._start_at = now + self._config.batch_timeout_ms / 1000 * has_company
        rank = self._reading_rank(job)
        if job.client not in self._queues:
            self._join(job.client)
        insort(self._queues[job.client], (rank, job.key, job))
        self._waiting[job.key] = job
        if job.deadline < math.inf:
            heapq.heappush(self._deadlines, (job.deadline, job.key))
        self._peak = max(self._peak, len(self._waiting) + len(self._running))
        self._is_blocked = False

    def remove(self, key: int) -> Job | None:
        """A job ends, in whatever state; what it had reserved is free again. None for one that has ended."""
        job = self._waiting.pop(key, None)
        if job is not None:
            self._unqueue(job)
            self._is_blocked = False
            self._forget_idle()
            return job
        job = self._running.pop(key, None)
        self._suspects.pop(key, None)
        if job is not None:
            self._ledger.release(key)
            self._is_blocked = False
            self._forget_idle()
        return job

    def retry(self) -> None:
        """Memory may have come back by itself: look again at who fits."""
        self._is_blocked = False

    def expire(self, now: float) -> list[Job]:
        """The jobs whose deadline has come; they are still to be removed."""
        expired = []
        while self._deadlines and self._deadlines[0][0] <= now:
            _, key = heapq.heappop(self._deadlines)
            job = self._waiting.get(key) or self._running.get(key)
            if job is not None:
                expired.append(job)
        return expired

    def company_s(self, now: float) -> float:
        """How long the first step may still wait for company; 0 where it should not."""
        if self._running or not self._waiting:
            return 0.0
        if len(self._waiting) >= min(self._awaited, self._config.max_batch_size):
            return 0.0
        return max(0.0, self._start_at - now)

    def admit(self, now: float) -> list[Job]:
        """Let jobs run that may, as many as there is room for; the caller may lower `pending` for what is cached."""
        admitted: list[Job] = []
        while self._waiting and not (self._is_blocked or self._suspects):
            if len(self._running) >= self._config.max_batch_size:
                break
            job = self._choose(now)
            if job is None:
                self._is_blocked = True
                break
            del self._waiting[job.key]
            self._running[job.key] = job
            self._unqueue(job)
            self._admitted_at[job.client] = now
            self._served[job.client] = self._served.get(job.client, 0) + job.pending
            admitted.append(job)
        return admitted

    def next_unready(self) -> Job | None:
        """The job that is to be made ready next: of those that run alone the first, else the one that ranks first."""
        suspect = next(iter(self._suspects.values()), None)
        if suspect is not None:
            return None if suspect.is_ready else suspect
        unready = [job for job in self._running.values() if not job.is_ready]
        return min(unready, key=self._reading_rank, default=None)

    def plan(self) -> Plan:
        """The next step: a row of each job that generates, chunks of the prompts, drafts where rows are left."""
        if self._suspects:
            suspect = next(iter(self._suspects.values()))
            length = min(suspect.longest_chunk, self._config.prefill_chunk)
            return Plan((Part(suspect, length),) if suspect.is_ready else ())
        decoding = [job for job in self._running.values() if job.is_decoding]
        parts = []
        if len(decoding) < len(self._running):
            running = self._running.values()
            reading = [job for job in running if job.is_ready and not job.is_decoding]
            parts = self._share_chunk(reading, has_others=bool(decoding))
        rows = len(decoding) + sum(part.num_tokens for part in parts)
        drafts = _deal(max(0, SMALL_STEP - rows), sum(job.can_draft for job in decoding))
        parts += [
            Part(job, 1, next(drafts) if job.can_draft else 0, is_decode=True) for job in decoding
        ]
        return Plan(tuple(parts))

    def advance(self, part: Part, num_new: int) -> None:
        """A part was computed, and `num_new` tokens were chosen after it."""
        job = part.job
        job.pending -= part.num_tokens
        job.until_cut = max(0, job.until_cut - part.num_tokens)
        if num_new:
            job.generates = True
            job.pending += 1
            if job.client in self._served:
                self._served[job.client] += num_new
            self._suspects.pop(job.key, None)

    def distrust(self, jobs: Iterable[Job]) -> None:
        """A step of these failed: each is run alone, from its first token, until it has passed.

        What is pending of each is all that it has to read anew.
        """
        self._suspects |= {job.key: job for job in jobs}

    @property
    def is_isolating(self) -> bool:
        """Whether the next step is of a job that is run alone."""
        return bool(self._suspects)

    def _share_chunk(self, reading: list[Job], *, has_others: bool) -> list[Part]:
        """Chunks of the prompts that are being read, in the order of their ranks."""
        left = share = self._config.prefill_chunk
        row_s = self.cost.row_s
        if has_others and row_s is not None:
            share = max(1, int(self._config.added_latency_ms / 1000 / max(row_s, 1e-9)))
        reading.sort(key=self._reading_rank)
        parts = []
        for job in reading:
            count = min(job.longest_chunk, share, left)
            if count < 1:
                break
            left -= count
            parts.append(Part(job, count))
        return parts

    def _reading_rank(self, job: Job) -> float:
        return job.submitted / self._config.ageing_s - job.priority

    def _choose(self, now: float) -> Job | None:
        """The job to admit next, its memory reserved."""
        for client in sorted(self._queues, key=lambda client: self._rank(client, now)):
            for _, _, job in self._queues[client]:
                if self._ledger.reserve(job.key, job.nbytes):
                    return job
                if now - job.submitted >= self._config.ageing_s:
                    return None
        return None

    def _rank(self, client: str, now: float) -> tuple[int, float, float]:
        _, _, job = self._queues[client][0]
        since = max(job.submitted, self._admitted_at.get(client, -math.inf))
        level = math.floor(job.priority + max(0.0, now - since) / self._config.ageing_s)
        return -level, self._served[client], job.submitted

    def _join(self, client: str) -> None:
        """A client without waiting jobs has one: it has no claim from the time when it had none."""
        self._queues[client] = []
        active = {job.client for job in self._running.values()} | set(self._queues)
        least = min((self._served[c] for c in active if c in self._served), default=0)
        self._served[client] = max(self._served.get(client, 0), least)

    def _unqueue(self, job: Job) -> None:
        queue = self._queues[job.client]
        queue[:] = [entry for entry in queue if entry[2] is not job]
        if not queue:
            del self._queues[job.client]

    def _forget_idle(self) -> None:
        """Clients without jobs are forgotten, once those that have some were served as much."""
        if not (self._waiting or self._running):
            self._served.clear()
            self._admitted_at.clear()
            return
        if len(self._served) <= len(self._queues) + len(self._running):
            return
        active = {job.client for job in self._running.values()} | set(self._queues)
        least = min(self._served.get(client, 0) for client in active)
        for client in [c for c, n in self._served.items() if c not in active and n <= least]:
            del self._served[client]
            self._admitted_at.pop(client, None)


def _deal(rows: int, num_hands: int) -> Iterator[int]:
    """Rows dealt to so many, as evenly as can be."""
    for hand in range(num_hands):
        yield rows // num_hands + (hand < rows % num_hands)
