"""The scheduler by its properties: nobody starves, memory is never overdrawn, every job ends exactly once."""

import math
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_edge.engine.config import EngineConfig
from mlx_edge.engine.scheduler import SMALL_STEP, Job, Plan, Scheduler
from mlx_edge.engine.step_cost import StepCost


@dataclass
class Purse:
    """A ledger that knows how much there is."""

    total: int
    held: dict[int, int] = field(default_factory=dict)

    def reserve(self, owner: int, nbytes: int) -> bool:
        assert owner not in self.held
        if sum(self.held.values()) + nbytes > self.total:
            return False
        self.held[owner] = nbytes
        return True

    def release(self, owner: int) -> None:
        del self.held[owner]  # each at most once


class House:
    """Runs a scheduler as the engine does, with a clock that is turned by hand."""

    def __init__(self, total: int = 1 << 30, step_s: float = 0.01, **config: object) -> None:
        self.purse = Purse(total)
        self.config = EngineConfig(**{"batch_timeout_ms": 0.0, **config})  # type: ignore[arg-type]
        self.scheduler = Scheduler(self.config, self.purse)
        self.now, self.step_s = 0.0, step_s
        self.left: dict[int, int] = {}  # tokens to be generated
        self.started: dict[int, float] = {}
        self.ended: dict[int, float] = {}
        self._key = 0

    def add(self, prompt: int = 1, tokens: int = 1, **options: object) -> int:
        self._key += 1
        job = Job(self._key, prompt, submitted=self.now, **options)  # type: ignore[arg-type]
        self.left[job.key] = tokens
        self.scheduler.add(job, self.now)
        return job.key

    def end(self, key: int) -> None:
        if self.scheduler.remove(key) is not None:
            assert key not in self.ended
            self.ended[key] = self.now

    def step(self) -> Plan:
        for job in self.scheduler.expire(self.now):
            self.end(job.key)
        for job in self.scheduler.admit(self.now):
            self.started[job.key] = self.now
        plan = self.scheduler.plan()
        self.check(plan)
        rows = plan.prompt_rows, plan.decode_rows
        self.now += self.step_s
        if sum(rows):
            self.scheduler.cost.add(sum(rows), self.step_s, has_prompt=rows[0] > 0)
        for part in plan.parts:
            is_last = part.is_last
            self.scheduler.advance(part, int(is_last))
            if is_last:
                self.left[part.job.key] -= 1
                if not self.left[part.job.key]:
                    self.end(part.job.key)
        return plan

    def check(self, plan: Plan) -> None:
        config, keys = self.config, [part.job.key for part in plan.parts]
        assert len(set(keys)) == len(keys) <= config.max_batch_size
        assert set(self.purse.held) == set(self.started) - set(self.ended)
        assert all(1 <= part.num_tokens <= part.job.pending for part in plan.parts)
        assert plan.prompt_rows <= config.prefill_chunk
        assert bool(plan) == bool(self.scheduler.num_running)
        drafts = sum(part.max_drafts for part in plan.parts)
        if drafts:
            assert plan.prompt_rows + plan.decode_rows + drafts <= SMALL_STEP

    def run(self, most: int = 5000) -> None:
        for _ in range(most):
            if not (self.scheduler.num_running or self.scheduler.num_waiting):
                return
            self.step()
        raise AssertionError("somebody starves")


ACTIONS = st.lists(
    st.one_of(
        st.tuples(
            st.just("add"),
            st.integers(1, 200),  # prompt
            st.integers(1, 12),  # tokens
            st.integers(0, 100),  # bytes
            st.integers(-3, 3),  # priority
            st.sampled_from("abc"),
            st.one_of(st.none(), st.floats(0, 0.3)),
            st.booleans(),
        ),
        st.tuples(st.just("cancel"), st.integers(1, 40)),
        st.tuples(st.just("step"), st.integers(1, 5)),
        st.tuples(st.just("fail"), st.just(0)),
    ),
    max_size=60,
)


def _read_anew(house: "House", jobs: list[Job], pending: int) -> None:
    for job in jobs:
        job.pending = pending
    house.scheduler.distrust(jobs)


@settings(deadline=None, max_examples=100)
@given(ACTIONS, st.integers(1, 6), st.integers(1, 64))
def test_every_job_ends_once_and_memory_is_never_overdrawn(
    actions: list[tuple[object, ...]], batch_size: int, chunk: int
) -> None:
    house = House(100, max_batch_size=batch_size, prefill_chunk=chunk, ageing_s=0.5)
    keys = []
    for kind, *values in actions:
        if kind == "add":
            prompt, tokens, nbytes, priority, client, deadline, can_draft = values
            keys.append(
                house.add(
                    prompt,  # type: ignore[arg-type]
                    tokens,  # type: ignore[arg-type]
                    nbytes=nbytes,
                    priority=priority,
                    client=client,
                    deadline=math.inf if deadline is None else house.now + deadline,  # type: ignore[operator]
                    can_draft=can_draft,
                )
            )
        elif kind == "cancel":
            house.end(values[0])  # type: ignore[arg-type]
        elif kind == "fail":
            plan = house.scheduler.plan()
            if len(plan.parts) > 1:
                _read_anew(house, [part.job for part in plan.parts], 10)
        else:
            for _ in range(values[0]):  # type: ignore[call-overload]
                house.step()
    house.run()
    assert sorted(house.ended) == keys
    assert not house.purse.held


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 5), st.floats(0.05, 0.5), st.integers(1, 3))
def test_ageing_ends_the_wait_of_a_low_priority(
    priority: int, ageing_s: float, batch_size: int
) -> None:
    house = House(max_batch_size=batch_size, ageing_s=ageing_s, step_s=0.05)
    low = house.add(priority=0)
    for _ in range(120):  # more than the bound below comes to
        for _ in range(batch_size + 1):  # more than can be served, for ever
            house.add(priority=priority)
        house.step()
        if low in house.ended:
            break
    # Those that came before it was as high as they are served first: (n + 1) / n of the time in which they came.
    assert house.ended[low] <= priority * ageing_s * (batch_size + 1) / batch_size + 0.2


def test_higher_priority_first_then_first_come() -> None:
    house = House(max_batch_size=1)
    keys = [house.add(priority=priority) for priority in (0, 2, 0, 1)]
    house.run()
    assert list(house.started) == [keys[1], keys[3], keys[0], keys[2]]


def test_a_client_with_a_long_queue_does_not_hold_up_another() -> None:
    house = House(max_batch_size=1, ageing_s=1.0)
    for _ in range(100):
        house.add(tokens=10, client="crowd")
    for _ in range(200):
        house.step()
    lone = house.add(tokens=10, client="lone")
    house.run()
    assert house.started[lone] - 2.0 < 0.2


def test_equal_clients_share_by_tokens() -> None:
    house = House(max_batch_size=2, ageing_s=100.0)
    long = {house.add(tokens=30, client="long") for _ in range(40)}
    short = {house.add(tokens=10, client="short") for _ in range(40)}
    for _ in range(300):
        house.step()
    served = [sum(key in house.started for key in keys) for keys in (long, short)]
    assert served[1] == pytest.approx(3 * served[0], abs=4)


def test_a_large_job_is_passed_only_for_a_while() -> None:
    house = House(100, max_batch_size=4, ageing_s=0.5)
    for tokens in (3, 6, 9, 9):
        house.add(tokens=tokens, nbytes=30)
    large = house.add(nbytes=100)
    for _ in range(300):
        house.add(tokens=9, nbytes=30)
        house.step()
    assert 0.5 <= house.started[large] < 0.7


def test_a_prompt_adds_as_much_as_it_may_to_those_that_generate() -> None:
    house = House(max_batch_size=4, prefill_chunk=512, added_latency_ms=15)
    house.add(tokens=1000)
    house.add(prompt=600, tokens=5)
    house.step()  # nobody generates: all of the chunk
    assert house.scheduler.plan().parts[0].num_tokens == 600 - 511
    cost = house.scheduler.cost = StepCost()
    for _ in range(10):
        cost.add(2, 0.002, has_prompt=False)
        cost.add(102, 0.102, has_prompt=True)
    first = house.add(prompt=600, tokens=5)
    plan = house.step()
    # A row takes a millisecond: 15 of each of the two prompts, beside one that generates.
    assert (plan.decode_rows, plan.prompt_rows) == (1, 30)
    assert {part.num_tokens for part in plan.parts if part.job.key == first} == {15}


def test_a_prompt_moves_however_slow_a_row_is() -> None:
    house = House(added_latency_ms=0)
    house.add(tokens=1000)
    house.step()
    house.add(prompt=5, tokens=2)
    assert [house.step().prompt_rows for _ in range(6)] == [1, 1, 1, 1, 1, 0]


def test_drafts_get_the_rows_that_are_left() -> None:
    house = House(max_batch_size=16)
    for _ in range(4):
        house.add(tokens=100, can_draft=True)
    house.add(tokens=100)
    house.step()
    plan = house.step()
    assert sorted(part.max_drafts for part in plan.parts) == [0, 2, 3, 3, 3]
    house.scheduler.cost = StepCost()
    house.add(prompt=300, tokens=2)
    plan = house.step()
    assert {part.max_drafts for part in plan.parts} == {0}


def test_an_idle_engine_waits_for_company_only_if_it_had_some() -> None:
    house = House(batch_timeout_ms=10)
    house.add()
    assert house.scheduler.company_s(house.now) == 0
    house.add()
    house.run()
    house.now += 1
    house.add()
    assert house.scheduler.company_s(house.now) == pytest.approx(0.01)
    assert house.scheduler.company_s(house.now + 0.02) == 0
    house.add()
    assert house.scheduler.company_s(house.now) == 0  # here it is
    house.run()
    house.add()
    house.run()
    house.add()
    assert house.scheduler.company_s(house.now) == 0  # the last time it was alone


def test_suspects_run_alone_until_they_have_passed() -> None:
    house = House(prefill_chunk=8)
    for _ in range(3):
        house.add(tokens=50)
    plan = house.step()
    _read_anew(house, [part.job for part in plan.parts[:2]], 12)
    steps = [house.step() for _ in range(4)]
    assert [len(step.parts) for step in steps] == [1] * 4
    assert [step.parts[0].num_tokens for step in steps] == [8, 4, 8, 4]
    assert len(house.step().parts) == 3


@pytest.mark.parametrize(
    ("until_cut", "chunks"),
    [
        (0, [8, 8, 4, 1]),
        (5, [5, 8, 7, 1]),
        (8, [8, 8, 4, 1]),
        (17, [8, 8, 1, 3, 1]),
        (20, [8, 8, 4, 1]),
    ],
)
def test_a_chunk_ends_where_it_has_to(until_cut: int, chunks: list[int]) -> None:
    house = House(prefill_chunk=8)
    house.add(prompt=20, tokens=2, until_cut=until_cut)
    assert [house.step().parts[0].num_tokens for _ in chunks] == chunks


def test_the_cost_of_a_row_is_the_slope() -> None:
    cost = StepCost()
    assert cost.row_s is None
    cost.add(200, 0.2, has_prompt=True)
    assert cost.row_s == pytest.approx(0.001)
    for rows in (1, 2, 3):
        cost.add(rows, 0.05, has_prompt=False)
    cost.add(102, 0.15, has_prompt=True)
    cost.add(102, 3.0, has_prompt=True)  # the machine was busy with something else
    cost.add(52, 0.1, has_prompt=True)
    assert cost.row_s == pytest.approx(0.001, rel=0.2)


def test_a_job_that_is_not_ready_waits_beside_the_others() -> None:
    house = House()
    decoding = house.add(prompt=1, tokens=100)
    house.step()
    late = house.add(prompt=8, priority=0)
    house.now += 1
    first = house.add(prompt=8, priority=3)
    jobs = {job.key: job for job in house.scheduler.admit(house.now)}
    for job in jobs.values():
        job.is_ready = False
    assert [part.job.key for part in house.scheduler.plan().parts] == [decoding]
    assert house.scheduler.next_unready() is jobs[first]
    jobs[first].is_ready = True
    assert house.scheduler.next_unready() is jobs[late]
    assert {part.job.key for part in house.scheduler.plan().parts} == {decoding, first}


def test_a_suspect_that_is_not_ready_holds_up_all() -> None:
    house = House()
    keys = [house.add(prompt=4) for _ in range(2)]
    jobs = [job for job in house.scheduler.admit(house.now) if job.key in keys]
    jobs[0].is_ready = False
    house.scheduler.distrust(jobs)
    assert not house.scheduler.plan()
    assert house.scheduler.next_unready() is jobs[0]
    jobs[0].is_ready, jobs[1].is_ready = True, False
    assert house.scheduler.plan().parts[0].job is jobs[0]
    assert house.scheduler.next_unready() is None  # its turn comes when it runs alone
