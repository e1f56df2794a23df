"""A step for which the CPU kernels find no memory: who waits for it is told, the process and everybody else go on."""

import gc
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import pytest

import mlx_edge
from mlx_edge import ops
from mlx_edge.decoding.loop import generate_step
from mlx_edge.engine.blocking import BlockingEngine
from mlx_edge.engine.config import EngineConfig
from mlx_edge.engine.request import Completion, Request
from mlx_edge.errors import MemoryBudgetError
from mlx_edge.models.decoder import Decoder
from mlx_edge.ops.cpu import extension
from mlx_edge.text import Tokenizer

pytestmark = pytest.mark.skipif(
    not ops.uses_cpu_kernels(), reason="the CPU kernels are not here or not asked for"
)
Pocket = tuple[Decoder, Tokenizer]
SHORT = (5, 6, 7, 8)


@pytest.fixture(scope="module")
def pocket() -> Pocket:
    model, tokenizer = mlx_edge.load()
    assert isinstance(model, Decoder)
    return model, tokenizer


@pytest.fixture
def limit_pages() -> Iterator[Callable[[int], None]]:
    """Sets how many bytes of pages may be there beside those of now."""
    gc.collect()

    def limit(num_bytes: int) -> None:
        extension().set_page_limit(extension().page_bytes() + num_bytes)

    yield limit
    extension().set_page_limit(None)


def page_bytes(model: Decoder, num_pages: int) -> int:
    """Of all layers, for so many times 64 positions of one sequence."""
    cache = model.make_cache()
    before = extension().page_bytes()
    mx.eval(model(mx.array([SHORT]), cache), [a for layer in cache for a in layer.arrays])
    return num_pages * int(extension().page_bytes() - before)


def generate(model: Decoder, prompt: tuple[int, ...], num_tokens: int, **options: Any) -> list[int]:
    steps = generate_step(mx.array(prompt), model, max_tokens=num_tokens, **options)
    return [token for token, _ in steps]


@pytest.mark.parametrize("num_prompt", [4, 300], ids=["decoding", "prompt"])
@pytest.mark.parametrize("step_size", [64, 2048])
def test_a_generation_without_memory_raises_and_leaves_nothing(
    pocket: Pocket, limit_pages: Callable[[int], None], num_prompt: int, step_size: int
) -> None:
    model, _ = pocket
    wanted = generate(model, SHORT, 20)
    prompt = tuple(range(5, 5 + num_prompt))
    cache = model.make_cache()
    limit_pages(page_bytes(model, 1) * 3 // 2)
    with pytest.raises(MemoryBudgetError, match="found no memory for attention_block"):
        generate(model, prompt, 400, prompt_cache=cache, prefill_step_size=step_size)
    with pytest.raises(RuntimeError, match="failed"):  # it is known to be broken
        cache[-1].fork()
    del cache
    assert generate(model, SHORT, 20) == wanted
    extension().set_page_limit(None)
    mx.synchronize()
    assert generate(model, SHORT, 20) == wanted


def test_a_cache_of_a_failed_step_never_goes_on(
    pocket: Pocket, limit_pages: Callable[[int], None]
) -> None:
    model, _ = pocket
    cache = model.make_cache()
    generate(model, SHORT, 20, prompt_cache=cache)
    limit_pages(0)
    with pytest.raises(MemoryBudgetError):
        generate(model, SHORT, 100, prompt_cache=cache)
    extension().set_page_limit(None)
    with pytest.raises(RuntimeError, match="the op before it had failed"):
        generate(model, SHORT, 2, prompt_cache=cache)
    mx.synchronize()


def test_of_several_requests_only_the_one_that_does_not_fit_fails(
    pocket: Pocket, limit_pages: Callable[[int], None]
) -> None:
    model, _ = pocket
    prompts = [SHORT, (9, 10, 11), (12, 13, 14, 15, 16)]
    wanted = [generate(model, prompt, 12) for prompt in prompts]
    config = EngineConfig(max_batch_size=4, batch_timeout_ms=50.0, prefix_cache_bytes=0)
    with BlockingEngine(pocket, config) as engine:
        limit_pages(page_bytes(model, 1) * 7 // 2)
        options: dict[str, Any] = {"ignore_eos": True, "use_prefix_cache": False}
        long = engine.enqueue(Request(tuple(range(5, 405)), max_tokens=4, **options))
        short = [engine.enqueue(Request(p, max_tokens=12, **options)) for p in prompts]
        with pytest.raises(MemoryBudgetError, match="found no memory"):
            long.result(60)
        found: list[Completion] = [future.result(60) for future in short]
        assert [list(completion.tokens) for completion in found] == wanted
        assert engine.generate(Request(SHORT, max_tokens=12, **options)).tokens == found[0].tokens


def test_an_op_that_reads_what_was_never_computed_says_so() -> None:
    never = mx.array([0x7FCED6E0, 0], dtype=mx.int32).view(mx.float32)
    with pytest.raises(RuntimeError, match="failed in log_softmax: the op before it had failed"):
        mx.eval(extension().log_softmax(never))
    assert mx.isnan(extension().log_softmax(mx.array([mx.nan, 0.0]))).all().item()
