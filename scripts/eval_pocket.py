"""Score a pocket model on what it was never shown: `python scripts/eval_pocket.py MODEL --json OUT`.

With `--vision` a model that reads screens, the bundled one unless another is named: `pocket_vision_score.py`.

Exact match is teacher-forced: an item counts when the arg-max at every position of the answer, its end
included, is the answer's token. That is the same event as greedy decoding being exactly right, in one
forward pass. Runs on the runtime of this project; `evaluate` takes any forward function.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pocket_corpus
from numpy.typing import NDArray
from tqdm import tqdm

Forward = Callable[[NDArray[np.int32]], NDArray[np.float32]]
"""Tokens (B, L) to logits (B, L, V)."""
Encode = Callable[[str], list[int]]
"""Text, with <user> and <assistant> in it, to ids without BOS."""

SUITES = {
    "command": 300,
    "paraphrase": 300,
    "names": 120,
    "qa": 200,
    "facts": 100,
    "screen": 100,
}
NUM_STORIES = 40
BATCH = 16
BOS, EOS, PAD = 1, 2, 3


@dataclass(frozen=True)
class Case:
    """One item as ids: a prompt and the answer that must follow it."""

    suite: str
    kind: str
    prompt: list[int]
    answer: list[int]

    def __len__(self) -> int:
        """Return how many tokens the model reads."""
        return len(self.prompt) + len(self.answer)


def build_cases(encode: Encode, sizes: dict[str, int]) -> list[Case]:
    """Return the test items and the held-out stories."""
    cases = [
        Case(
            suite,
            item.kind,
            [BOS, *encode(f"<user>{item.prompt}<assistant>")],
            [*encode(item.answer), EOS],
        )
        for suite, items in pocket_corpus.draw_tests(sizes).items()
        for item in items
    ]
    for story in pocket_corpus.held_stories(NUM_STORIES):
        cases.append(Case("story", "story", [BOS], [*encode(story.answer), EOS]))
    return cases


def batches(cases: Sequence[Case]) -> Iterable[list[Case]]:
    """Yield cases of about the same length together."""
    ordered = sorted(cases, key=len)
    for start in range(0, len(ordered), BATCH):
        yield ordered[start : start + BATCH]


def score_batch(forward: Forward, batch: list[Case]) -> list[tuple[Case, bool, float]]:
    """Return for each case whether it is exactly right, and the nats of its answer."""
    length = max(map(len, batch))
    tokens = np.full((len(batch), length), PAD, np.int32)
    for row, case in enumerate(batch):
        tokens[row, : len(case)] = case.prompt + case.answer
    logits = forward(tokens[:, :-1])
    results = []
    for row, case in enumerate(batch):
        start = len(case.prompt) - 1
        rows = logits[row, start : start + len(case.answer)].astype(np.float64)
        top = rows.max(axis=-1, keepdims=True)
        total = np.log(np.exp(rows - top).sum(axis=-1)) + top[:, 0]
        nats = float((total - rows[np.arange(len(case.answer)), case.answer]).sum())
        results.append((case, rows.argmax(axis=-1).tolist() == case.answer, nats))
    return results


def evaluate(
    forward: Forward, encode: Encode, sizes: dict[str, int] | None = None
) -> dict[str, Any]:
    """Return the report: shares of exact answers, the perplexity of held-out stories, counts."""
    cases = build_cases(encode, SUITES if sizes is None else sizes)
    right: dict[str, list[bool]] = defaultdict(list)
    by_kind: dict[str, list[bool]] = defaultdict(list)
    nats, tokens = 0.0, 0
    groups = list(batches(cases))
    for group in tqdm(groups, desc="scoring", unit="batch"):
        for case, exact, loss in score_batch(forward, group):
            if case.suite == "story":
                nats, tokens = nats + loss, tokens + len(case.answer)
            else:
                right[case.suite].append(exact)
                by_kind[f"{case.suite}/{case.kind}"].append(exact)
    return report_of(right, by_kind, math.exp(nats / tokens))


def report_of(
    right: dict[str, list[bool]], by_kind: dict[str, list[bool]], perplexity: float
) -> dict[str, Any]:
    """Return the report as it is written; the first six keys are what other tools read."""
    share = {suite: sum(marks) / len(marks) for suite, marks in right.items()}
    report: dict[str, Any] = {
        f"{suite}_exact_match": share[suite] for suite in ("command", "paraphrase", "names", "qa")
    }
    report["perplexity"] = perplexity
    report["items"] = sum(map(len, right.values()))
    report["facts_exact_match"] = share["facts"]
    report["screen_exact_match"] = share["screen"]
    report["counts"] = {suite: [sum(marks), len(marks)] for suite, marks in right.items()}
    report["standard_error"] = {
        suite: math.sqrt(share[suite] * (1 - share[suite]) / len(marks))
        for suite, marks in right.items()
    }
    report["per_kind"] = {kind: [sum(m), len(m)] for kind, m in sorted(by_kind.items())}
    return report


def runtime_forward(path: str) -> tuple[Forward, Encode]:
    """Return the forward pass and the tokenizer of a model folder, on this project's runtime."""
    import mlx.core as mx

    from mlx_edge import load

    model, tokenizer = load(path)

    def forward(tokens: NDArray[np.int32]) -> NDArray[np.float32]:
        return np.array(model(mx.array(tokens)).astype(mx.float32))

    def encode(text: str) -> list[int]:
        ids = list(tokenizer.encode(text))
        return ids[1:] if ids[:1] == [BOS] else ids

    return forward, encode


def main() -> None:
    """Score a model and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", help="model folder; the bundled model without it")
    parser.add_argument("--json", type=Path, help="where to write the report")
    parser.add_argument("--vision", action="store_true", help="score taps on screens")
    parser.add_argument("--screens", type=int, default=1000, help="of --vision")
    options = parser.parse_args()
    if options.vision:
        from pocket_vision_score import evaluate_vision

        report = evaluate_vision(options.model or "pocket-vision", options.screens)
    else:
        report = evaluate(*runtime_forward(options.model or "pocket"))
    text = json.dumps(report, indent=2)
    if options.json:
        options.json.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
