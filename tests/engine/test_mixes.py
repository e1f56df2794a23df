"""Random mixes of requests have the tokens of the single loop, whatever runs beside them and however caches are stored.

`MLX_EDGE_FUZZ=1000` raises the number of mixes.
"""

import os
import random
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import pytest

import mlx_edge
from mlx_edge.cache import QuantizedRows
from mlx_edge.decoding.constraints import make_constraint
from mlx_edge.decoding.processors import make_logits_processors
from mlx_edge.decoding.sampling import make_sampler
from mlx_edge.decoding.stream import stream_generate
from mlx_edge.engine.blocking import BlockingEngine
from mlx_edge.engine.config import EngineConfig
from mlx_edge.engine.request import Completion, Grammar, Request, Sampling
from mlx_edge.models.decoder import Decoder
from mlx_edge.ops import cpu
from mlx_edge.text import Tokenizer

pytest.importorskip("llguidance", reason="grammars need the package llguidance")

Pocket = tuple[Decoder, Tokenizer]
Answer = tuple[tuple[int, ...], str, str | None]  # tokens, text, finish reason

NUM_MIXES = int(os.environ.get("MLX_EDGE_FUZZ", "200"))
SCHEMA = '{"type": "object", "properties": {"name": {"enum": ["Tom", "Lily"]}, "age": {"type": "integer"}}}'
STORIES = [
    "Once upon a time, there was a little girl named Lily. She loved to play outside. One day, ",
    "Tom had a red ball. Tom liked the red ball. One day, Tom lost the red ball. Tom said, ",
    "The dog ran and ran and ran and ran and ran and",
    "Mom said",
]
KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "lookup": {"prompt_lookup": True},
    "draft": {"draft_model": "pocket-draft"},
    "ring": {"max_kv_size": 40, "prompt_lookup": True},
    "8-bit": {"kv_bits": 8, "kv_group_size": 32},
    "4-bit": {"kv_bits": 4, "kv_group_size": 32, "prompt_lookup": True},
    "8-bit-later": {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 50},
    "8-bit-ring": {"kv_bits": 8, "kv_group_size": 32, "max_kv_size": 48},
}


@pytest.fixture(scope="module")
def pocket() -> Iterator[Pocket]:
    """Loaded once. On one thread: as many tokens for a third of the time where tests share the cores."""
    model = mlx_edge.load()
    native = cpu.find_extension()
    if isinstance(native, str):
        yield model
        return
    num_threads = native.num_threads()
    native.set_threads(1)
    yield model
    native.set_threads(num_threads)


def make_request(rng: random.Random) -> Request:
    story = rng.choice(STORIES)
    prompt = story * rng.randint(1, 3) + story[: rng.randrange(len(story))]
    options: dict[str, Any] = {"max_tokens": rng.randint(1, 16)}
    sampling: dict[str, Any] = {}
    if rng.random() < 0.4:
        sampling = {"temp": rng.choice([0.6, 1.0, 1.4]), "seed": rng.randrange(1000)}
        sampling |= rng.choice([{}, {"top_p": 0.9}, {"min_p": 0.05}, {"top_k": 40}])
    if rng.random() < 0.25:
        sampling |= rng.choice(
            [{"repetition_penalty": 1.2}, {"logit_bias": {5: 2.0}}, {"frequency_penalty": 0.3}]
        )
    if rng.random() < 0.25:
        options["stop"] = (rng.choice([".", " was", "ing", "One day"]),)
    if rng.random() < 0.25:
        options["grammar"] = rng.choice(
            [Grammar("json_schema", SCHEMA), Grammar("regex", r" ?[A-Z][a-z ]{3,30}\.")]
        )
    if rng.random() < 0.2:
        options["logprobs"] = rng.randint(0, 3)
    return Request(prompt, sampling=Sampling(**sampling), **options)


def answer_alone(pocket: Pocket, request: Request, kind: dict[str, Any]) -> Answer:
    """What the single loop gives."""
    model, tokenizer = pocket
    sampling = request.sampling
    packing: dict[str, Any] = {}
    if bits := kind.get("kv_bits"):
        packing["row_format"] = QuantizedRows(bits, kind["kv_group_size"])
        packing["float_until"] = kind.get("quantized_kv_start", 0)
    cache = model.make_cache(max_kv_size=kind.get("max_kv_size"), **packing)
    grammar = request.grammar
    constraint = make_constraint(tokenizer, **{grammar.kind: grammar.source}) if grammar else None
    responses = list(
        stream_generate(
            model,
            tokenizer,
            request.prompt,
            request.max_tokens,
            stop=request.stop,
            sampler=make_sampler(
                sampling.temp, sampling.top_p, sampling.min_p, 1, sampling.top_k, seed=sampling.seed
            ),
            logits_processors=make_logits_processors(
                dict(sampling.logit_bias),
                sampling.repetition_penalty,
                frequency_penalty=sampling.frequency_penalty,
            ),
            constraint=constraint,
            prompt_cache=cache,
        )
    )
    tokens = tuple(response.token for response in responses)
    return tokens, "".join(r.text for r in responses), responses[-1].finish_reason


@pytest.fixture(scope="module", params=KINDS)
def scene(request: Any, pocket: Pocket) -> Iterator[tuple[BlockingEngine, list[Any]]]:
    """An engine, and requests with the answers that they must have."""
    kind = KINDS[request.param]
    rng = random.Random(request.param)
    requests = [make_request(rng) for _ in range(12)]
    wanted = [(one, answer_alone(pocket, one, kind)) for one in requests]
    config = EngineConfig(
        max_batch_size=5, prefill_chunk=32, added_latency_ms=1.0, batch_timeout_ms=0.0, **kind
    )
    with BlockingEngine(pocket, config) as engine:
        yield engine, wanted


def wait(engine: BlockingEngine, future: "Future[Completion]") -> Completion:
    """The answer, or how things stood when none had come."""
    try:
        return future.result(timeout=100)
    except TimeoutError:
        raise AssertionError(f"no answer within 100 s: {engine.stats()}") from None


def test_mixes_have_the_tokens_of_the_single_loop(
    scene: tuple[BlockingEngine, list[tuple[Request, Answer]]],
) -> None:
    engine, wanted = scene
    assert engine.stats().row_exactness is None
    rng = random.Random(7)
    for _ in range(max(1, NUM_MIXES // len(KINDS))):
        mix = rng.choices(wanted, k=rng.randint(1, 6))
        futures = [engine.enqueue(one) for one, _ in mix]
        for future, (one, answer) in zip(futures, mix, strict=True):
            found = wait(engine, future)
            assert (found.tokens, found.text, found.finish_reason) == answer, one
            assert len(found.logprobs) == (0 if one.logprobs is None else len(found.tokens))
