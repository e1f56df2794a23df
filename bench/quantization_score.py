"""Scores of one model for bench/quantization.py: exact answers, the speed of decoding, how sure a loss is.

Runs models as a user does, through `load` and the kernels of this machine. Knows no formats.
"""

import random
import statistics
import time
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from bench.quantization_text import eval_pocket
from mlx_edge.decoding.loop import generate_step

DRAWS = 10_000  # of the bootstrap


def mark_items(model: Any, items: Sequence[eval_pocket.Case]) -> list[bool]:
    """Which answers are exactly right, as `eval_pocket.py` has it; the same items in the same order for every model."""

    def forward(tokens: Any) -> Any:
        return np.array(model(mx.array(tokens)).astype(mx.float32))

    return [
        is_right
        for batch in eval_pocket.batches(items)
        for _, is_right, _ in eval_pocket.score_batch(forward, batch)
    ]


def relative_loss(reference: Sequence[bool], other: Sequence[bool]) -> dict[str, float]:
    """Share of the reference's right answers that the other loses, net, with a paired bootstrap's 95 % interval.

    Items are drawn with replacement, both models' marks of an item together (Efron 1979).
    """
    ours, theirs = np.array(reference, float), np.array(other, float)
    draws = np.random.default_rng(0).integers(0, len(ours), (DRAWS, len(ours)))
    kept = theirs[draws].sum(1) / np.maximum(ours[draws].sum(1), 1)
    low, high = np.percentile(1 - kept, [2.5, 97.5])
    return {
        "loss": float(1 - theirs.sum() / ours.sum()),
        "low": float(low),
        "high": float(high),
        "items": len(ours),
    }


def decode_rate(model: Any, num_tokens: int) -> float:
    """Tokens per second of single steps behind a short prompt, the first step left out."""
    draw = random.Random(0)
    prompt = [draw.randrange(model.config.vocab_size) for _ in range(8)]
    steps = generate_step(mx.array(prompt, mx.int32), model, max_tokens=num_tokens + 1)
    next(steps)
    start = time.perf_counter()
    for _ in steps:
        pass
    return num_tokens / (time.perf_counter() - start)


def decode_ratios(
    models: dict[str, Any], reference: str, *, num_tokens: int, rounds: int
) -> dict[str, dict[str, Any]]:
    """Rates of every model over the reference's in the same round, interleaved: median and spread.

    The reference stands among the models once more as `null`: what the machine's noise alone makes.
    """
    order = {**models, "null": models[reference]}
    for model in order.values():
        decode_rate(model, 2)
    rates: dict[str, list[float]] = {name: [] for name in order}
    for _ in range(rounds):
        for name, model in order.items():
            rates[name].append(decode_rate(model, num_tokens))
    ratios = {
        name: [a / b for a, b in zip(found, rates[reference], strict=True)]
        for name, found in rates.items()
    }
    return {
        name: {
            "tokens_per_s": statistics.median(rates[name]),
            "ratio": statistics.median(ratios[name]),
            "spread": [min(ratios[name]), max(ratios[name])],
        }
        for name in order
    }
