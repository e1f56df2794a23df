"""What happens to requests that run: they enter, begin, go on by steps, and end exactly once. In the engine's thread.

A step that fails is run again, each of its sequences alone and from its first token, and who fails alone is told so.
Knows no other threads: `worker.py` brings the requests, sinks take the answers.
"""

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx

from mlx_edge.decoding.loop import longest_chunk
from mlx_edge.engine.delivery import completion_of
from mlx_edge.engine.images.stage import ImageStage
from mlx_edge.engine.intake import Prepared
from mlx_edge.engine.prefix.index import MIN_TOKENS
from mlx_edge.engine.prefix.search import SWITCHED_OFF
from mlx_edge.engine.recorder import Recorder
from mlx_edge.engine.request import FinishReason, Piece, Usage
from mlx_edge.engine.scheduler import Job, Part, Plan, Scheduler
from mlx_edge.engine.sequence import Sequence
from mlx_edge.engine.served import Served
from mlx_edge.engine.stats import StepRecord
from mlx_edge.engine.step import Turn, run_step
from mlx_edge.engine.task import Task

logger = logging.getLogger(__name__)


class Service:
    """All requests on one model."""

    def __init__(self, served: Served, recorder: Recorder, on_end: Callable[[], None]) -> None:
        """`on_end` is called whenever a task has ended."""
        self.served, self.config = served, served.config
        self.scheduler = Scheduler(served.config, served.ledger)
        self._recorder, self._on_end = recorder, on_end
        self._images = ImageStage(served)
        self._tasks: dict[int, Task] = {}
        self._preparing: dict[int, Task] = {}  # those that the scheduler does not know yet

    def add(self, task: Task) -> None:
        """A task is there; it is still to be prepared."""
        self._tasks[task.key] = self._preparing[task.key] = task

    def is_wanted(self, task: Task) -> bool:
        """Whether it has not ended. From any thread."""
        return task.key in self._tasks

    def enter(self, task: Task, result: Prepared | Exception) -> None:
        """A prepared request waits from now on."""
        if isinstance(result, Exception):
            if task.key in self._tasks:
                self._fail(task, result)
            return
        if task.key not in self._tasks:
            result.release()
            return
        del self._preparing[task.key]
        task.prepared = result
        request = task.request
        job = Job(
            task.key,
            len(result.tokens),
            result.needs.begin,
            task.submitted,
            request.priority,
            request.client,
            task.deadline,
        )
        self.scheduler.add(job, time.monotonic())

    def advance(self) -> bool:
        """Admit who may run, and run a step; False when there was nothing to run."""
        scheduler, now = self.scheduler, time.monotonic()
        expired = [job.key for job in scheduler.expire(now)]
        expired += [key for key, task in self._preparing.items() if task.deadline <= now]
        for key in expired:
            self.cut(key, "deadline")
        if scheduler.company_s(now):
            return False
        for job in scheduler.admit(now):
            self._begin(job, now)
        has_encoded = self._encode_one()
        plan = scheduler.plan()
        if plan:
            self._step(plan)
        return bool(plan) or has_encoded

    @property
    def is_idle(self) -> bool:
        """Whether nothing runs and nothing waits; requests may still be in preparation."""
        return not (self.scheduler.num_running or self.scheduler.num_waiting)

    def deadline_s(self, now: float) -> float | None:
        """How long until a request in preparation has to end; None where none has to."""
        nearest = min((task.deadline for task in self._preparing.values()), default=math.inf)
        return max(0.0, nearest - now) if nearest < math.inf else None

    def caches(self) -> Iterator[Any]:
        """The caches of all layers of all sequences that run."""
        for task in self._tasks.values():
            if task.sequence is not None:
                yield from task.sequence.caches

    def _begin(self, job: Job, now: float) -> None:
        """A job was admitted: give it a cache, with what is stored of its prompt."""
        task, served = self._tasks[job.key], self.served
        assert task.prepared is not None
        prepared, request = task.prepared, task.request
        try:
            sequence = Sequence(
                request,
                prepared.tokens,
                prepared.limit,
                served.tokenizer,
                served.token_texts,
                prepared.constraint,
                prepared.images,
            )
            if not request.use_prefix_cache:
                sequence.cache_miss = SWITCHED_OFF
            elif served.prefixes is not None:
                keys = sequence.keys(0, sequence.num_prompt)
                found = served.prefixes.lookup(keys, served.kind, sequence.image_places)
                sequence.caches, sequence.num_stored = found.caches, found.num_tokens
                sequence.cached_tokens, sequence.cache_miss = found.num_tokens, found.miss
                served.ledger.count_prefixes()
            if sequence.caches is None:
                sequence.caches = served.make_caches()
            sequence.proposer = served.make_proposer(request)
        except Exception as error:
            self._fail(task, error)
            return
        sequence.queued_s = now - task.submitted
        task.sequence = sequence
        _count_pending(job, sequence)
        job.can_draft = sequence.proposer is not None
        self._images.begin(job, task)
        self._recorder.begun(sequence.num_prompt, sequence.cached_tokens)

    def _encode_one(self) -> bool:
        """Run the tower on the image that comes next; False when there is none."""
        job = self.scheduler.next_unready()
        if job is None:
            return False
        task = self._tasks[job.key]
        try:
            seconds = self._images.encode_one(job, task)
        except Exception as error:
            _settle()
            self._fail(task, error)
            return True
        if seconds is not None:
            self._recorder.encoded(seconds)
        self.scheduler.retry()
        return True

    def _step(self, plan: Plan) -> None:
        """Run one step and hand out what it brings."""
        began = time.monotonic()
        rows = plan.prompt_rows, plan.decode_rows
        turns: list[tuple[Part, Task, Turn]] = []
        try:
            turns = [self._make_turn(part) for part in plan.parts]
            run_step(self.served.model, [turn for _, _, turn in turns])
        except Exception as error:
            self._isolate(plan, error)
            return
        ended = time.monotonic()
        num_drafts = sum(len(turn.drafts) for _, _, turn in turns)
        self.scheduler.cost.add(sum(rows) + num_drafts, ended - began, has_prompt=rows[0] > 0)
        for part, task, turn in turns:
            self._deliver(part, task, turn, ended)
        record = StepRecord(
            ended - began,
            *rows,
            num_drafts,
            sum(turn.num_new for _, _, turn in turns),
            self.scheduler.num_running,
            self.scheduler.num_waiting,
        )
        self._recorder.step(record, sum(turn.num_true for _, _, turn in turns))

    def _make_turn(self, part: Part) -> tuple[Part, Task, Turn]:
        task = self._tasks[part.job.key]
        sequence = task.sequence
        assert sequence is not None
        sequence.tell_proposer(self.config.prefill_chunk)
        drafts: list[int] = []
        if part.max_drafts:
            drafts = sequence.propose(part.max_drafts, sequence.caches)
        return part, task, Turn(sequence, part.num_tokens, drafts)

    def _deliver(self, part: Part, task: Task, turn: Turn, now: float) -> None:
        """What a step brought to one task."""
        if turn.error is not None:
            self._fail(task, turn.error)
            return
        sequence = turn.sequence
        self.scheduler.advance(part, turn.num_new)
        if not turn.num_new:
            return
        if sequence.num_generated == turn.num_new:
            sequence.first_token_s = now - task.submitted
            self._images.end(task)
            self._remember(sequence)
        if turn.has_ended:
            self._complete(task, now)
        elif not task.whole:
            tell(task.sink.put, sequence.take_piece(now - task.submitted))

    def _remember(self, sequence: Sequence) -> None:
        """Keep what is stored of a sequence for later prompts that begin like it."""
        served = self.served
        if served.prefixes is None or not sequence.request.use_prefix_cache:
            return
        if sequence.num_stored < MIN_TOKENS:
            return
        try:
            stored = sequence.keys(0, sequence.num_stored)
            served.prefixes.store(stored, sequence.caches, served.kind)
            served.ledger.count_prefixes()
        except Exception:
            logger.exception("a prefix could not be stored; requests go on without")

    def _isolate(self, plan: Plan, error: Exception) -> None:
        """A step failed: who ran alone is to blame, of several each is tried alone."""
        _settle()
        if len(plan.parts) == 1:
            self._fail(self._tasks[plan.parts[0].job.key], error)
            return
        logger.warning(
            "a step of %d requests failed (%s); each is tried alone", len(plan.parts), error
        )
        vocab_size = self.served.model.config.vocab_size
        suspects = []
        for part in plan.parts:
            sequence = self._tasks[part.job.key].sequence
            assert sequence is not None
            sequence.forget(vocab_size)
            sequence.caches = self.served.make_caches()
            _count_pending(part.job, sequence)
            try:
                self._images.begin_anew(part.job, self._tasks[part.job.key])
            except Exception as images_error:
                self._fail(self._tasks[part.job.key], images_error)
                continue
            suspects.append(part.job)
        self.scheduler.distrust(suspects)

    # How a task ends: exactly once, by one of these.

    def _complete(self, task: Task, now: float) -> None:
        """Its text has ended."""
        assert task.sequence is not None
        self._finish(task, task.sequence.take_piece(now - task.submitted))

    def cut(self, key: int, reason: FinishReason) -> None:
        """It ends here, with what there is."""
        task = self._tasks.get(key)
        if task is None:
            return
        total_s = time.monotonic() - task.submitted
        if task.sequence is not None:
            task.sequence.cut(reason)
            self._finish(task, task.sequence.take_piece(total_s))
            return
        num_prompt = len(task.prepared.tokens) if task.prepared is not None else 0
        usage = Usage(num_prompt, 0, 0, "it was never begun", total_s, 0.0, total_s)
        self._finish(task, Piece("", (), (), reason, usage))

    def _finish(self, task: Task, last: Piece) -> None:
        if task.sequence is not None:
            self._remember(task.sequence)
        self._release(task)
        whole = last if task.sequence is None else task.sequence.whole_piece(last)
        self._recorder.finished(task.request, completion_of(whole))
        tell(task.sink.put, whole if task.whole else last)

    def _fail(self, task: Task, error: Exception) -> None:
        self._release(task)
        self._recorder.finished(task.request, error)
        tell(task.sink.fail, error)

    def fail_all(self, error: Exception) -> None:
        """End all tasks, in whatever state they are, and begin anew."""
        for task in list(self._tasks.values()):
            try:
                self._fail(task, error)
            except Exception:
                logger.exception("a request could not be ended in good order")
                tell(task.sink.fail, error)
                with contextlib.suppress(Exception):
                    self.served.ledger.release(task.key)
        self.scheduler = Scheduler(self.config, self.served.ledger)

    def _release(self, task: Task) -> None:
        del self._tasks[task.key]
        self._preparing.pop(task.key, None)
        if task.prepared is not None:
            task.prepared.release()
        self._on_end()
        self.scheduler.remove(task.key)
        if task.sequence is not None:
            task.sequence.finish()


def _count_pending(job: Job, sequence: Sequence) -> None:
    """What a sequence has to read, behind what its caches hold."""
    job.pending = sequence.pending
    job.until_cut = longest_chunk(sequence.caches, sequence.pending)


def tell(listener: Callable[[Any], None], news: object) -> None:
    """Give a sink its news; one that raises harms nobody else."""
    try:
        listener(news)
    except Exception:
        logger.exception("whoever waited for an answer failed to take it")


def _settle() -> None:
    """Wait for what still runs after a failed step; it may fail once more."""
    with contextlib.suppress(Exception):
        mx.synchronize()
