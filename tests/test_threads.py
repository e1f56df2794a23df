"""Threads of an app: load, generate, hand over, cancel, in any thread, with nothing printed and nothing left running.

MLX computes a lazy array in its maker's thread alone, so each of these fails where something lazy changes hands.
"""

import ast
import gc
import logging
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
import pytest

import mlx_edge
from mlx_edge import ops
from mlx_edge.decoding.batch import batch_generate
from mlx_edge.decoding.loop import generate_step
from mlx_edge.decoding.processors import make_logits_processors
from mlx_edge.decoding.sampling import make_sampler
from mlx_edge.decoding.stream import GenerationResponse, generate, stream_generate
from mlx_edge.models.decoder import Decoder
from mlx_edge.models.load import load_model
from mlx_edge.text import Tokenizer
from mlx_edge.weights import Checkpoint
from mlx_edge.weights.hub import find_model

Pocket = tuple[Decoder, Tokenizer]
Result = TypeVar("Result")
PROMPT = "Once upon a time, there was a little"
SILENT = ("cache", "decoding", "models", "ops", "quant", "text", "weights")


def in_thread(work: Callable[[], Result]) -> Result:
    """What `work` returns or raises in a thread of its own, which has ended by then, and its streams with it."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


def together(*works: Callable[[], Result]) -> list[Result]:
    """What the works return, each run in a thread of its own, started at the same moment."""
    barrier = threading.Barrier(len(works))

    def run(work: Callable[[], Result]) -> Result:
        barrier.wait()
        return work()

    with ThreadPoolExecutor(len(works)) as pool:
        return list(pool.map(run, works))


@pytest.fixture(scope="module")
def pocket() -> Pocket:
    return mlx_edge.load()


@pytest.fixture(scope="module")
def story(pocket: Pocket) -> str:
    return generate(*pocket, PROMPT, max_tokens=16)


@pytest.fixture(scope="module")
def tokens(pocket: Pocket) -> list[int]:
    return pocket[1].encode(PROMPT) * 15


def array(tokens: list[int]) -> mx.array:
    return mx.array(tokens, dtype=mx.int32)


def step_all(model: Decoder, tokens: list[int], **options: Any) -> list[int]:
    return [token for token, _ in generate_step(array(tokens), model, **options)]


def test_two_threads_have_the_tokens_of_one(pocket: Pocket, story: str) -> None:
    def tell() -> str:
        return generate(*pocket, PROMPT, max_tokens=16)

    for _ in range(3):
        assert together(tell, tell) == [story, story]


def test_a_model_outlives_the_thread_that_loaded_it(story: str) -> None:
    pocket = in_thread(mlx_edge.load)
    assert in_thread(lambda: generate(*pocket, PROMPT, max_tokens=16)) == story
    assert generate(*pocket, PROMPT, max_tokens=16) == story


def test_load_leaves_nothing_lazy_however_the_weights_come(
    pocket: Pocket, story: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Checkpoint.read
    # On Metal a tensor is a lazy view of the mapped file; here a sum stands for it.
    monkeypatch.setattr(Checkpoint, "read", lambda self, name: read(self, name) + 0)
    model = in_thread(lambda: load_model(find_model("pocket")))
    assert generate(model, pocket[1], PROMPT, max_tokens=16) == story


def test_a_lazy_model_goes_anywhere_after_its_first_step(story: str) -> None:
    def load() -> Pocket:
        pocket = mlx_edge.load(lazy=True)
        generate(*pocket, PROMPT, max_tokens=1)
        return pocket

    pocket = in_thread(load)
    assert generate(*pocket, PROMPT, max_tokens=16) == story


def test_reload_while_the_old_model_is_used(pocket: Pocket, story: str) -> None:
    def tell() -> str:
        return generate(*pocket, PROMPT, max_tokens=16)

    def reload() -> str:
        for _ in range(3):
            mlx_edge.load()
            gc.collect()
        return generate(*mlx_edge.load(), PROMPT, max_tokens=16)

    assert together(tell, reload, tell) == [story] * 3


@pytest.mark.parametrize("used", [0, 3])
def test_a_seeded_sampler_draws_the_same_in_any_thread(pocket: Pocket, used: int) -> None:
    def draw(sampler: Any, count: int) -> str:
        return generate(*pocket, PROMPT, max_tokens=count, sampler=sampler)

    here, there = (make_sampler(1.0, seed=4, xtc_probability=0.5) for _ in range(2))
    if used:
        assert draw(here, used) == draw(there, used)
    assert in_thread(lambda: draw(there, 8)) == draw(here, 8)


def test_samplers_without_a_seed_differ_in_new_threads(pocket: Pocket) -> None:
    def draw() -> str:
        return generate(*pocket, PROMPT, max_tokens=48, sampler=make_sampler(1.5))

    assert len({in_thread(draw) for _ in range(3)}) == 3


@pytest.mark.parametrize("max_kv_size", [None, 40])
@pytest.mark.parametrize("cut", [3, 40, 100])
def test_a_cache_filled_in_one_thread_goes_on_in_another(
    pocket: Pocket, tokens: list[int], cut: int, max_kv_size: int | None
) -> None:
    model, prompt = pocket[0], tokens[: cut + 20]
    wanted = step_all(
        model, prompt, max_tokens=12, prompt_cache=model.make_cache(max_kv_size=max_kv_size)
    )
    cache = model.make_cache(max_kv_size=max_kv_size)
    in_thread(lambda: step_all(model, prompt[:cut], max_tokens=1, prompt_cache=cache))
    assert step_all(model, prompt[cut:], max_tokens=12, prompt_cache=cache) == wanted


def test_each_token_in_another_thread(pocket: Pocket, tokens: list[int]) -> None:
    options: dict[str, Any] = {
        "max_tokens": 20,
        "logits_processors": make_logits_processors({5: 1.0}, 1.1, frequency_penalty=0.2),
    }
    wanted = step_all(pocket[0], tokens[:50], **options)
    steps = generate_step(array(tokens[:50]), pocket[0], **options)
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as two:
        found = [(one, two)[i % 2].submit(next, steps).result()[0] for i in range(20)]
    assert found == wanted


def test_logprobs_are_read_in_another_thread(pocket: Pocket) -> None:
    def total(responses: list[GenerationResponse]) -> list[Any]:
        return [mx.exp(response.logprobs).sum().item() for response in responses]

    def respond() -> list[GenerationResponse]:
        return list(stream_generate(*pocket, PROMPT, max_tokens=5))

    here = respond()
    assert in_thread(lambda: total(here)) == pytest.approx([1] * 5, abs=1e-4)
    assert total(in_thread(respond)) == pytest.approx([1] * 5, abs=1e-4)


def test_closed_in_the_middle_the_model_and_the_cache_go_on(
    pocket: Pocket, story: str, tokens: list[int]
) -> None:
    model, prompt = pocket[0], tokens[:50]
    for closing_thread in (lambda work: work(), in_thread):
        cache = model.make_cache()
        steps = generate_step(array(prompt), model, max_tokens=40, prompt_cache=cache)
        given = [next(steps)[0] for _ in range(8)]
        closing_thread(steps.close)
        # One step was in flight: it has been stored, so that the cache holds what was given.
        assert cache[0].offset == len(prompt) + len(given)
        again = step_all(model, prompt + given, max_tokens=10)
        following = in_thread(
            lambda cache=cache, last=again[:1]: step_all(
                model, last, max_tokens=9, prompt_cache=cache
            )
        )
        assert following == again[1:]
        assert generate(*pocket, PROMPT, max_tokens=16) == story


def test_a_callback_that_raises_cancels_the_prefill(pocket: Pocket, tokens: list[int]) -> None:
    wish = threading.Event()

    def look(done: int, _total: int) -> None:
        if done >= 20:
            wish.set()  # as a button would
        if wish.is_set():
            raise InterruptedError

    model = pocket[0]
    cache = model.make_cache()
    options: dict[str, Any] = {"max_tokens": 5, "prompt_cache": cache, "prefill_step_size": 10}
    with pytest.raises(InterruptedError):
        step_all(model, tokens[:60], prompt_progress_callback=look, **options)
    assert cache[0].offset == 20
    whole = step_all(model, tokens[:60], max_tokens=5)
    assert in_thread(lambda: step_all(model, tokens[20:60], **options)) == whole


def test_a_generator_left_in_a_dead_thread(pocket: Pocket, story: str) -> None:
    left: list[Iterator[GenerationResponse]] = []

    def die() -> None:
        left.append(stream_generate(*pocket, PROMPT, max_tokens=16))
        next(left[0])
        raise KeyError("the consumer")

    with pytest.raises(KeyError):
        in_thread(die)
    assert generate(*pocket, PROMPT, max_tokens=16) == story
    left.clear()  # collected in this thread, which made nothing of it
    gc.collect()
    assert generate(*pocket, PROMPT, max_tokens=16) == story


def test_an_error_in_one_thread_does_not_disturb_another(pocket: Pocket, story: str) -> None:
    def fail() -> str:
        calls = iter(range(100))

        def sampler(logprobs: mx.array) -> mx.array:
            if next(calls) == 3:
                raise ArithmeticError
            return mx.argmax(logprobs, axis=-1)

        for _ in range(3):
            with pytest.raises(ArithmeticError):
                generate(*pocket, PROMPT, max_tokens=16, sampler=sampler)
            calls = iter(range(100))
        return generate(*pocket, PROMPT, max_tokens=16)

    assert together(fail, lambda: generate(*pocket, PROMPT, max_tokens=16)) == [story] * 2


def test_batches_in_threads(pocket: Pocket) -> None:
    prompts = [PROMPT, "The dog", "One day a girl named Lily went"]

    def run() -> list[list[int]]:
        return batch_generate(*pocket, prompts, 10).token_ids

    wanted = run()
    assert together(run, run) == [wanted] * 2


def test_observers_and_forced_backends_stay_in_their_thread(pocket: Pocket, story: str) -> None:
    seen: set[int] = set()

    def watch(_op: str, _backend: str, compute: Callable[[], Any], _args: Any, _kwargs: Any) -> Any:
        seen.add(threading.get_ident())
        return compute()

    with ops.observe(watch), ops.use("reference"):
        assert in_thread(lambda: generate(*pocket, PROMPT, max_tokens=16)) == story
        assert not seen
        steps = stream_generate(*pocket, PROMPT, max_tokens=16)
        next(steps)
    assert seen == {threading.get_ident()}
    seen.clear()
    next(steps)
    assert not seen


def test_nothing_is_printed(
    pocket: Pocket, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.CRITICAL + 1):  # what is logged is the app's to show
        in_thread(lambda: generate(*mlx_edge.load(), PROMPT, max_tokens=5))
    assert capfd.readouterr() == ("", "")
    package = Path(mlx_edge.__file__).parent
    printing = {
        f"{folder}/{path.name}"
        for folder in SILENT
        for path in (package / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
    }
    assert printing == {"decoding/stream.py"}  # generate(verbose=True)


def test_the_interpreter_ends_with_generators_open() -> None:
    code = """if True:
        import threading, mlx_edge
        pocket = mlx_edge.load()
        def begin():
            steps = mlx_edge.stream_generate(*pocket, "Once", max_tokens=16)
            next(steps)
            return steps
        mine, theirs = begin(), []
        thread = threading.Thread(target=lambda: theirs.append(begin()))
        thread.start()
        thread.join()
    """
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0
    assert "Exception" not in done.stderr
