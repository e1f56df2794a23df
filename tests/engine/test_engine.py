"""The engine as its users meet it: threads and loops, cancelling, deadlines, failures, closing; each ends once."""

import asyncio
import gc
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from dataclasses import replace
from typing import Any

import mlx.core as mx
import pytest

import mlx_edge
from mlx_edge.engine import service as service_module
from mlx_edge.engine.blocking import BlockingEngine
from mlx_edge.engine.config import EngineConfig
from mlx_edge.engine.engine import Engine
from mlx_edge.engine.ledger import Ledger
from mlx_edge.engine.request import Completion, Grammar, Piece, Request, Sampling
from mlx_edge.engine.scheduler import Scheduler
from mlx_edge.engine.stats import StepRecord
from mlx_edge.engine.step import run_step
from mlx_edge.errors import (
    EngineClosedError,
    InvalidRequestError,
    MemoryBudgetError,
    ModelFormatError,
    QueueFullError,
)
from mlx_edge.models.decoder import Decoder
from mlx_edge.text import Tokenizer

Pocket = tuple[Decoder, Tokenizer]

PROMPT = "Once upon a time, there was a little"
LONG = Request(PROMPT, max_tokens=400, ignore_eos=True)


class Sink:
    """Takes what comes, and sees to it that nothing comes after the end."""

    def __init__(self, on_piece: Callable[[], None] = lambda: None) -> None:
        self.pieces: list[Piece] = []
        self.error: Exception | None = None
        self.num_ends = 0
        self.ended = threading.Event()
        self.begun = threading.Event()
        self._on_piece = on_piece

    def put(self, piece: Piece) -> None:
        assert not self.ended.is_set()
        self.pieces.append(piece)
        self.begun.set()
        self._on_piece()
        if piece.finish_reason:
            self._end()

    def fail(self, error: Exception) -> None:
        self.error = error
        self._end()

    def _end(self) -> None:
        self.num_ends += 1
        self.ended.set()

    @property
    def last(self) -> Piece:
        assert self.ended.wait(30)
        assert self.num_ends == 1
        assert self.error is None
        return self.pieces[-1]


@pytest.fixture(scope="module")
def pocket() -> Pocket:
    return mlx_edge.load()


@pytest.fixture(scope="module")
def story(pocket: Pocket) -> str:
    return mlx_edge.generate(*pocket, PROMPT, max_tokens=12)


@pytest.fixture(scope="module")
def engine(pocket: Pocket) -> Iterator[BlockingEngine]:
    with BlockingEngine(pocket, EngineConfig(max_batch_size=4)) as made:
        yield made


def wait_idle(engine: Engine | BlockingEngine) -> None:
    """Until nothing runs; what was reserved is free again."""
    for _ in range(1000):
        stats = engine.stats()
        if not stats.running and not stats.waiting and not stats.kv_bytes:
            return
        time.sleep(0.01)
    raise AssertionError(f"still busy: {stats}")


def test_generate_and_stream_have_the_same_text(engine: BlockingEngine, story: str) -> None:
    whole = engine.generate(PROMPT, max_tokens=12)
    pieces = list(engine.stream(PROMPT, max_tokens=12))
    assert whole.text == story == "".join(piece.text for piece in pieces)
    assert whole.tokens == tuple(token for piece in pieces for token in piece.tokens)
    assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + ["length"]
    assert whole.usage.prompt_tokens == len(engine.tokenizer.encode(PROMPT))
    assert whole.usage.completion_tokens == 12
    assert 0 <= whole.usage.queued_s <= whole.usage.first_token_s <= whole.usage.total_s


def test_stop_strings_tokens_and_ends(engine: BlockingEngine, story: str) -> None:
    word = story.split()[3]
    found = engine.generate(PROMPT, max_tokens=12, stop=("nowhere", word))
    assert (found.finish_reason, found.stop_text) == ("stop", word)
    assert found.text == story[: story.index(word)]
    plain = engine.generate(PROMPT, max_tokens=12)
    token = plain.tokens[5]
    found = engine.generate(PROMPT, max_tokens=12, stop_tokens=(token,))
    assert found.tokens == plain.tokens[: plain.tokens.index(token) + 1]
    assert found.finish_reason == "stop"
    assert plain.text.startswith(found.text)
    assert found.stop_text is None


def test_logprobs_are_those_of_the_tokens(engine: BlockingEngine) -> None:
    found = engine.generate(PROMPT, max_tokens=6, logprobs=3)
    assert [entry.token for entry in found.logprobs] == list(found.tokens)
    for entry in found.logprobs:
        assert entry.top[0].token == entry.token  # greedy
        assert entry.top[0].logprob == entry.logprob <= 0
        assert len({other.token for other in entry.top}) == 3
    assert b"".join(entry.bytes for entry in found.logprobs).decode() == found.text


def test_a_repeated_prompt_is_cached_and_a_miss_says_why(engine: BlockingEngine) -> None:
    prompt = "The cat sat on the mat and looked at the moon. " * 5
    first = engine.generate(prompt, max_tokens=4)
    again = engine.generate(prompt, max_tokens=4)
    longer = engine.generate(prompt + first.text + " And then", max_tokens=4)
    off = engine.generate(prompt, max_tokens=4, use_prefix_cache=False)
    assert first.tokens == again.tokens == off.tokens
    assert first.usage.cached_tokens == 0
    assert first.usage.cache_miss
    assert again.usage.cached_tokens == again.usage.prompt_tokens - 1
    assert again.usage.cache_miss is None
    assert longer.usage.cached_tokens >= first.usage.prompt_tokens
    assert (off.usage.cached_tokens, "not use" in str(off.usage.cache_miss)) == (0, True)


def test_a_seed_replays_at_any_load(engine: BlockingEngine) -> None:
    request = Request(PROMPT, max_tokens=20, sampling=Sampling(temp=1.2, seed=3))
    alone = engine.generate(request)
    crowd = [engine.enqueue(PROMPT, max_tokens=9, sampling=Sampling(temp=1.0)) for _ in range(6)]
    assert engine.enqueue(request).result(30).tokens == alone.tokens
    assert engine.generate(request).tokens == alone.tokens
    assert len({future.result(30).text for future in crowd}) > 1


def test_a_grammar_begins_after_a_text(engine: BlockingEngine) -> None:
    pytest.importorskip("llguidance", reason="grammars need the package llguidance")
    grammar = Grammar("regex", "[0-9]{4}")
    held = engine.generate(PROMPT, max_tokens=30, grammar=grammar)
    assert (len(held.text), held.text.isdigit(), held.finish_reason) == (4, True, "stop")
    free = engine.generate(PROMPT, max_tokens=30)
    mark = free.text[8:11]
    later = engine.generate(PROMPT, max_tokens=60, grammar=grammar, grammar_after=mark)
    assert later.finish_reason == "stop"
    before, found, after = later.text.partition(mark)
    assert found
    assert free.text.startswith(before)
    assert after[-4:].isdigit()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": (1, 99999)}, "99999"),
        ({"prompt": (1,) * 5000}, "context"),
        ({"prompt": "a", "sampling": Sampling(logit_bias={99999: 1.0})}, "99999"),
        ({"prompt": "a", "stop_tokens": (99999,)}, "99999"),
        ({"prompt": "a", "grammar": Grammar("regex", "(")}, "regex"),
    ],
)
def test_what_the_model_cannot_serve(
    engine: BlockingEngine, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        engine.generate(Request(**options))


@pytest.mark.parametrize(
    "options",
    [
        {"prompt": ""},
        {"prompt": (-1,)},
        {"prompt": "a", "max_tokens": 0},
        {"prompt": "a", "logprobs": 21},
        {"prompt": "a", "stop": "text"},
        {"prompt": "a", "deadline_s": -1.0},
        {"prompt": "a", "grammar_after": "x"},
    ],
)
def test_a_request_is_checked_when_it_is_built(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError):
        Request(**options)


def test_an_unknown_option_is_named(engine: BlockingEngine) -> None:
    with pytest.raises(InvalidRequestError, match="temperature"):
        engine.generate("a", temperature=1)


def test_cancelled_while_queued_reading_and_generating(pocket: Pocket) -> None:
    config = EngineConfig(max_batch_size=1, prefill_chunk=1)
    with Engine(pocket, config) as engine:
        runs, reads, waits = Sink(), Sink(), Sink()
        first = engine.submit(LONG, runs)
        assert runs.begun.wait(30)
        second = engine.submit(Request(PROMPT * 20), reads)
        third = engine.submit(LONG, waits)
        third.cancel()
        assert waits.last.finish_reason == "cancelled"
        assert waits.last.tokens == ()
        first.cancel()
        assert runs.last.finish_reason == "cancelled"
        usage = runs.last.usage
        assert usage
        assert usage.completion_tokens == sum(len(piece.tokens) for piece in runs.pieces) < 400
        while not engine.stats().running:
            time.sleep(0.001)
        second.cancel()
        assert reads.last.tokens == ()
        for ticket in (first, second, third):
            ticket.cancel()  # they have ended
        wait_idle(engine)
        assert engine.enqueue(PROMPT, max_tokens=3).result(30).finish_reason == "length"


def test_deadlines_cut_what_waits_and_what_runs(pocket: Pocket) -> None:
    with Engine(pocket, EngineConfig(max_batch_size=1)) as engine:
        runs, waits = Sink(), Sink()
        engine.submit(Request(PROMPT, max_tokens=450, ignore_eos=True, deadline_s=0.3), runs)
        engine.submit(Request(PROMPT, deadline_s=0.0), waits)
        assert waits.last.finish_reason == "deadline"
        assert runs.last.finish_reason in ("deadline", "length")
        wait_idle(engine)


def test_more_than_may_wait_are_refused(pocket: Pocket) -> None:
    config = EngineConfig(max_batch_size=1, max_queue_size=2)
    with Engine(pocket, config) as engine:
        sinks = [Sink() for _ in range(3)]
        tickets = [engine.submit(LONG, sink) for sink in sinks]
        with pytest.raises(QueueFullError, match="3 requests"):
            engine.enqueue(PROMPT)
        for ticket in tickets:
            ticket.cancel()
        for sink in sinks:
            assert sink.last.finish_reason == "cancelled"
        assert engine.enqueue(PROMPT, max_tokens=2).result(30).tokens


def test_a_future_that_is_cancelled(pocket: Pocket) -> None:
    with Engine(pocket) as engine:
        future = engine.enqueue(LONG)
        assert future.cancel()
        with pytest.raises(CancelledError):
            future.result()
        wait_idle(engine)


def fail_for(prompts: set[int], times: int = 1 << 30) -> Callable[..., None]:
    """A step that fails whenever a sequence with a prompt of such a length takes part in it."""
    left = [times]

    def run(model: Any, turns: Any) -> None:
        is_hit = any(
            turn.sequence.num_prompt in prompts and turn.sequence.num_generated >= 3
            for turn in turns
        )
        if is_hit and left[0]:
            left[0] -= 1
            mx.eval(mx.zeros(1))
            raise RuntimeError("[malloc] Unable to allocate")
        run_step(model, turns)

    return run


def test_a_failing_step_fails_the_culprit_alone(
    pocket: Pocket, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [tuple(range(10, 10 + size)) for size in (40, 41, 42, 43)]
    requests = [
        Request(p, max_tokens=12, sampling=Sampling(temp=t, seed=5, xtc_probability=0.3))
        for p, t in zip(prompts, (0, 1, 0.7, 1), strict=True)
    ]
    with Engine(pocket) as engine:
        wanted = [engine.enqueue(request).result(30) for request in requests]
        monkeypatch.setattr(service_module, "run_step", fail_for({42}))
        futures = [engine.enqueue(request) for request in requests]
        with pytest.raises(RuntimeError, match="Unable to allocate"):
            futures[2].result(30)
        for index in (0, 1, 3):
            assert futures[index].result(30).tokens == wanted[index].tokens
        monkeypatch.setattr(service_module, "run_step", fail_for({40, 41, 42, 43}, times=1))
        futures = [engine.enqueue(request) for request in requests]
        assert [future.result(30).tokens for future in futures] == [one.tokens for one in wanted]
        wait_idle(engine)
        assert engine.stats().failed == 1


def test_where_a_prompt_is_cut_is_nothing_to_rows_that_get_packed(
    pocket: Pocket, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = EngineConfig(kv_bits=4, kv_group_size=32, quantized_kv_start=50)
    request = Request(
        tuple(range(10, 110)), max_tokens=4, logprobs=0, sampling=Sampling(temp=1, seed=3)
    )
    found = []
    for chunk, failures in ((512, 0), (512, 1), (16, 0), (45, 0)):
        monkeypatch.setattr(service_module, "run_step", fail_for({100}, times=failures))
        with Engine(pocket, replace(packed, prefill_chunk=chunk)) as engine:
            futures = [engine.enqueue(request), engine.enqueue(PROMPT, max_tokens=30)]
            answers = [future.result(30).logprobs for future in futures]
            again = engine.enqueue(request).result(30)  # behind a stored prefix
        found += [[one.logprob for one in answers[0]], [one.logprob for one in again.logprobs]]
    assert again.usage.cached_tokens
    for values in found:
        assert values == pytest.approx(found[0], rel=0, abs=1e-5)


@pytest.mark.parametrize("broken", [("plan",), ("add", "remove"), ("plan", "remove", "release")])
def test_a_mistake_of_the_engine_fails_all_and_the_thread_lives(
    pocket: Pocket, monkeypatch: pytest.MonkeyPatch, broken: tuple[str, ...]
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise KeyError("our own mistake")

    with Engine(pocket) as engine:
        for name in broken:
            monkeypatch.setattr(Ledger if name == "release" else Scheduler, name, fail)
        futures = [engine.enqueue(PROMPT) for _ in range(3)]
        for future in futures:
            with pytest.raises(KeyError, match="our own mistake"):
                future.result(30)
        monkeypatch.undo()
        assert engine.enqueue(PROMPT, max_tokens=3).result(30).finish_reason == "length"
        wait_idle(engine)


def test_a_loader_that_dies(tmp_path: Any) -> None:
    engine = Engine(str(tmp_path / "nothing"))
    with pytest.raises(ModelFormatError, match="nothing"):
        engine.wait_ready(30)
    with pytest.raises(ModelFormatError, match="nothing"):
        engine.enqueue(PROMPT)
    with pytest.raises(ModelFormatError, match="nothing"):
        _ = engine.tokenizer
    engine.close()


def test_who_waits_for_a_loader_that_dies(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()

    def load(*_: Any) -> Any:
        gate.wait(30)
        raise OSError("the disk is gone")

    monkeypatch.setattr("mlx_edge.engine.engine.open_model", load)
    engine = Engine("pocket")
    futures = [engine.enqueue(PROMPT) for _ in range(3)]
    gate.set()
    for future in futures:
        with pytest.raises(OSError, match="gone"):
            future.result(30)
    engine.close()


def test_close_ends_what_runs_and_a_drain_lets_it_end(pocket: Pocket) -> None:
    engine = Engine(pocket, EngineConfig(max_batch_size=2))
    futures = [engine.enqueue(LONG) for _ in range(4)]
    engine.close()
    for future in futures:
        with pytest.raises(EngineClosedError):
            future.result(0)
    with pytest.raises(EngineClosedError):
        engine.enqueue(PROMPT)
    engine.close()
    again = Engine(pocket, EngineConfig(max_batch_size=2))
    futures = [again.enqueue(PROMPT, max_tokens=8) for _ in range(5)]
    threading.Thread(target=again.close, kwargs={"drain": True}).start()
    assert [len(future.result(30).tokens) for future in futures] == [8] * 5
    again.close()


def test_a_drain_has_an_end(pocket: Pocket) -> None:
    engine = Engine(pocket)
    future = engine.enqueue(LONG)
    engine.close(drain=True, timeout_s=0.05)
    with pytest.raises(EngineClosedError):
        future.result(10)


def test_an_engine_that_nobody_holds_ends(pocket: Pocket) -> None:
    engine = Engine(pocket)
    thread = engine._worker.thread
    engine.enqueue(PROMPT, max_tokens=2).result(30)
    del engine
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()


def test_a_lazy_model_serves_in_the_engines_thread(story: str) -> None:
    lazy = mlx_edge.load(lazy=True)
    with BlockingEngine(lazy) as engine:
        assert engine.generate(PROMPT, max_tokens=12).text == story
    assert mlx_edge.generate(*lazy, PROMPT, max_tokens=12) == story


def test_two_engines_and_the_single_loop_at_once(pocket: Pocket, story: str) -> None:
    with BlockingEngine(pocket) as one, BlockingEngine("pocket") as two:
        futures = [engine.enqueue(PROMPT, max_tokens=12) for engine in (one, two) for _ in range(3)]
        assert mlx_edge.generate(*pocket, PROMPT, max_tokens=12) == story
        assert {future.result(30).text for future in futures} == {story}


def test_the_process_ends_with_an_engine_at_work() -> None:
    code = """if True:
        from mlx_edge import Engine
        engine = Engine()
        futures = [engine.enqueue("Once", max_tokens=400, ignore_eos=True) for _ in range(3)]
        engine.wait_ready()
    """
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_memory_refuses_and_lets_wait(pocket: Pocket, monkeypatch: pytest.MonkeyPatch) -> None:
    # What the process holds beside the model differs from one engine to the next.
    monkeypatch.setattr("mlx_edge.engine.memory.model.private_bytes", lambda: 1 << 27)
    config = EngineConfig(prefill_chunk=16, prefix_cache_bytes=0)  # smaller it will not become
    with Engine(pocket, config) as engine:
        served = engine._served
        assert served.memory
        need = served.needed_bytes(20, 100).begin
        total = sum(served.memory.standing().values()) + need + 1000
    with Engine(pocket, replace(config, memory_budget_bytes=total)) as tight:
        with pytest.raises(MemoryBudgetError, match="lower max_tokens to"):
            tight.enqueue(PROMPT, max_tokens=500).result(30)
        peaks: list[int] = []

        class Watch:
            def step(self, record: StepRecord) -> None:
                peaks.append(record.running)

            def finished(self, request: Request, result: Completion | Exception) -> None:
                raise RuntimeError("a listener that fails harms nobody")

        tight.watch(Watch())
        futures = [tight.enqueue(PROMPT, max_tokens=30) for _ in range(6)]
        assert [len(future.result(30).tokens) for future in futures] == [30] * 6
        assert 0 < max(peaks) < 6


def test_loops_in_several_threads(engine: BlockingEngine, story: str) -> None:
    async def read() -> str:
        texts = [piece.text async for piece in engine.engine.stream(PROMPT, max_tokens=12)]
        whole = await engine.engine.generate(PROMPT, max_tokens=12)
        assert whole.text == "".join(texts)
        return whole.text

    async def several() -> list[str]:
        return await asyncio.gather(*(read() for _ in range(3)))

    found: list[Future[list[str]]] = []

    def run(future: Future[list[str]]) -> None:
        future.set_result(asyncio.run(several()))

    for _ in range(2):
        found.append(Future())
        threading.Thread(target=run, args=(found[-1],)).start()
    assert [future.result(60) for future in found] == [[story] * 3] * 2


def test_leaving_a_stream_cancels_it(pocket: Pocket) -> None:
    async def leave(engine: Engine) -> None:
        async for _ in engine.stream(LONG):
            break
        stream = engine.stream(LONG)
        await anext(stream)
        await stream.aclose()
        task = asyncio.create_task(engine.generate(LONG))
        await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.to_thread(wait_idle, engine)

    async def main() -> None:
        async with Engine(pocket) as engine:
            await leave(engine)
            assert engine.stats().completion_tokens < 1000

    asyncio.run(main())


def test_a_loop_that_is_gone(pocket: Pocket) -> None:
    with Engine(pocket) as engine:
        loop = asyncio.new_event_loop()

        async def begin() -> Any:
            stream = engine.stream(LONG)
            await anext(stream)
            return stream

        stream = loop.run_until_complete(begin())
        loop.close()
        wait_idle(engine)
        del stream


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_queue_gives_answers_as_they_come(pocket: Pocket) -> None:
    async def main() -> None:
        async with Engine(pocket) as engine:
            queue = engine.create_async_queue(3)
            assert queue.is_done()
            await queue.put(Request(PROMPT, max_tokens=60, ignore_eos=True))
            await queue.put(Request(PROMPT, max_tokens=2))
            await queue.put(Request((1, 99999)))
            waits = asyncio.create_task(queue.put(Request(PROMPT, max_tokens=1)))
            await asyncio.sleep(0.01)
            assert not waits.done()
            answers = [await queue.get() for _ in range(2)]
            await waits
            answers += [await queue.get() for _ in range(2)]
            assert queue.is_done()
            kinds = {answer.request.max_tokens: answer for answer in answers}
            assert set(kinds) == {60, 2, 512, 1}
            with pytest.raises(InvalidRequestError):
                _ = kinds[512].completion
            assert answers[-1].request.max_tokens in (60, 1)
            assert len(kinds[60].completion.tokens) == 60

    asyncio.run(main())


def test_speculation_is_counted_and_changes_nothing(pocket: Pocket) -> None:
    prompt = "The dog ran to the red ball. The cat ran to the red ball. " * 4
    same = Request(prompt, max_tokens=40, sampling=Sampling(logit_bias={5: 100.0}))
    with (
        BlockingEngine(pocket) as plain,
        BlockingEngine(
            pocket, EngineConfig(draft_model="pocket-draft", num_draft_tokens=4)
        ) as drafting,
    ):
        wanted = plain.generate(prompt, max_tokens=40)
        lookup = plain.generate(prompt, max_tokens=40, prompt_lookup=True)
        draft = drafting.generate(prompt, max_tokens=40)
        off = drafting.generate(prompt, max_tokens=40, prompt_lookup=False)
        assert wanted.tokens == lookup.tokens == draft.tokens == off.tokens
        assert drafting.generate(same).tokens == plain.generate(same).tokens == (5,) * 40
        assert plain.generate(same, prompt_lookup=True).usage.accepted > 20
        assert draft.usage.accepted <= draft.usage.drafted
        assert draft.usage.accepted
        assert off.usage.drafted == wanted.usage.drafted == 0
        assert drafting.stats().accepted >= draft.usage.accepted


@pytest.mark.parametrize(
    "options",
    [
        {"max_batch_size": 0},
        {"kv_bits": 5},
        {"ageing_s": 0},
        {"added_latency_ms": -1},
        {"draft_model": "pocket-draft", "prompt_lookup": True},
        {"num_draft_tokens": 16},
    ],
)
def test_a_config_is_checked(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match=next(iter(options)).split("_")[0]):
        EngineConfig(**options)


def test_a_model_of_another_definition_is_served_too(story: str) -> None:
    pytest.importorskip("mlx_lm", reason="the bridge needs mlx-lm")
    with BlockingEngine(mlx_edge.load(bridge="mlx-lm")) as engine:
        futures = [engine.enqueue(PROMPT, max_tokens=12) for _ in range(3)]
        assert {future.result(60).text for future in futures} == {story}
        assert "mlx-lm" in str(engine.stats().row_exactness)
        assert engine.stats().budget_bytes == 0
