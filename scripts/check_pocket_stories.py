"""Count the stories that stay consistent: `python scripts/check_pocket_stories.py MODEL --json OUT`.

Greedy stories begin from many openings (one opening has one greedy story); sampled stories all from
"Once upon a time". `pocket_stories.inconsistencies` judges; it finds no fault in stories of the grammar.
A story counts as told again when its text stands in the training stream word for word.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pocket_corpus
from pocket_stories import draw_story, inconsistencies, story_request
from pocket_words import Draw
from tqdm import tqdm

from mlx_edge import generate, load, make_sampler

OPENING = "Once upon a time"
MAX_TOKENS = 220


def openings(count: int, seed: int = 31) -> list[str]:
    """Return different requests for a story, the default one first."""
    draw, found = Draw(seed), [OPENING]
    while len(found) < count:
        request = story_request(draw, draw_story(draw))
        if request not in found:
            found.append(request)
    return found


def tell(model: Any, tokenizer: Any, request: str, temperature: float, seed: int) -> str:
    """Return the story the model tells."""
    sampler = make_sampler(temp=temperature, seed=seed)
    prompt = f"<user>{request}<assistant>"
    return str(generate(model, tokenizer, prompt, max_tokens=MAX_TOKENS, sampler=sampler))


def judge(stories: list[str], known: set[str]) -> dict[str, Any]:
    """Return how many stories are consistent, what is wrong with the others, how many are copies."""
    faults = [inconsistencies(story) for story in stories]
    counted = Counter(fault.split()[0] for found in faults for fault in found)
    examples = [[story, found] for story, found in zip(stories, faults, strict=True) if found]
    return {
        "stories": len(stories),
        "consistent": sum(not found for found in faults),
        "distinct": len(set(stories)),
        "in_training_text": sum(story in known for story in stories),
        "faults": dict(counted.most_common()),
        "examples": examples[:5],
    }


def main() -> None:
    """Tell and judge stories, greedily and at temperature 0.7."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="model folder")
    parser.add_argument("--stories", type=int, default=40, help="how many of each sort")
    parser.add_argument(
        "--documents", type=int, default=220_000, help="how many to look for copies in"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    model, tokenizer = load(options.model)
    stream = islice(pocket_corpus.documents(), options.documents)
    known = {document.answer for document in stream if document.kind == "story"}
    requests = openings(options.stories)
    greedy = [tell(model, tokenizer, r, 0.0, 0) for r in tqdm(requests, desc="greedy")]
    seeds = tqdm(range(options.stories), desc="sampled")
    sampled = [tell(model, tokenizer, OPENING, 0.7, seed) for seed in seeds]
    report = {
        "greedy": judge(greedy, known),
        "sampled_0.7": judge(sampled, known),
        "default_story": greedy[0],
    }
    text = json.dumps(report, indent=2)
    if options.json:
        options.json.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
