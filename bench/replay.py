"""Speculation measured on a text that a person wrote: each choice of the model is the recorded token, all work is done.

A model of random weights writes noise, in which nothing repeats. So the sampler looks at the logits as a greedy one
does, and then answers with the next token of the record: proposals are accepted as often, and cost as much, as when a
model writes this text.
"""

import time
from collections.abc import Sequence
from typing import Any

import mlx.core as mx


class Recorded:
    """A sampler that reads the logits and says the recorded tokens, one after another."""

    def __init__(self, target: Sequence[int]):
        self.target = list(target)
        self.position = 0

    def __call__(self, logprobs: mx.array) -> mx.array:
        """The next token (1,) of the record; beyond its end the last one."""
        token = self.target[min(self.position, len(self.target) - 1)]
        self.position += 1
        greedy = mx.argmax(logprobs, axis=-1)
        # Always the recorded token, but only once the greedy one is known.
        return mx.maximum(mx.minimum(greedy, token), token).astype(greedy.dtype)


def replay(
    model: Any, tokenizer: Any, prompt: Sequence[int], target: Sequence[int], *, ngram: bool
) -> dict[str, float]:
    """Seconds from the first token to the last, the tokens between, and with `ngram` what was drafted and accepted."""
    from mlx_edge import stream_generate

    sampler = Recorded(target)
    steps = stream_generate(
        model, tokenizer, prompt, len(target), sampler=sampler, prompt_lookup=ngram
    )
    start, said = 0.0, []
    last: Any = None
    for last in steps:
        start = start or time.perf_counter()
        said.append(last.token)
    seconds = time.perf_counter() - start
    if said != list(target):
        raise RuntimeError(f"{len(said)} tokens came and are not the {len(target)} recorded ones")
    found = {"seconds": seconds, "tokens": len(target) - 1, "prompt": len(prompt)}
    if ngram:
        counts = last.speculation
        found |= {"drafted": counts.drafted, "accepted": counts.accepted}
        found["forward_passes"] = counts.forward_passes
    return found
