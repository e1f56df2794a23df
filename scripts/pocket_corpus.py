"""The text the pocket model is trained and tested on: `python scripts/pocket_corpus.py` prints a sample.

A document is a prompt and an answer; a story without a prompt is a raw document. Everything comes from one
seeded generator, so a seed gives the same text on every machine. What a test asks is decided by hashes and
never appears in the training stream. It knows neither tokens nor models.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

from pocket_commands import Item
from pocket_facts import draw_question
from pocket_intents import contact_command, draw_command, draw_screen
from pocket_stories import draw_story, story_request
from pocket_words import HELD_NAMES, Draw, hash_share

TRAIN_SEED = 20251121
TEST_SEED = 977
MIX = {"story": 0.12, "command": 0.55, "question": 0.28, "screen": 0.05}
RAW_STORY_SHARE = 0.25
MAKERS: dict[str, Callable[[Draw], Item]] = {
    "command": draw_command,
    "question": draw_question,
    "screen": draw_screen,
}


@dataclass(frozen=True)
class Document:
    """One training document; without a prompt it is raw text."""

    kind: str
    prompt: str | None
    answer: str


def draw_document(draw: Draw) -> Document:
    """Return the next document of the stream; held-out items are drawn again."""
    kind = draw.choices(list(MIX), list(MIX.values()))[0]
    if kind == "story":
        while True:
            story = draw_story(draw)
            if hash_share("story", story.text) >= 2:
                break
        if draw.chance(RAW_STORY_SHARE):
            return Document("story", None, story.text)
        return Document("story", story_request(draw, story), story.text)
    while True:
        item = MAKERS[kind](draw)
        if item.in_training:
            return Document(item.kind, item.prompt, item.answer)


def documents(seed: int = TRAIN_SEED) -> Iterator[Document]:
    """Yield training documents without end."""
    draw = Draw(seed)
    while True:
        yield draw_document(draw)


def chosen(items: Iterator[Item], count: int) -> list[Item]:
    """Return the first `count` different items."""
    found: dict[tuple[str, str], Item] = {}
    for item in items:
        found.setdefault((item.prompt, item.answer), item)
        if len(found) == count:
            break
    return list(found.values())


def draw_tests(sizes: dict[str, int], seed: int = TEST_SEED) -> dict[str, list[Item]]:
    """Return the held-out items of each suite, in a fixed order.

    command: unseen combinations of slots in known sentences; paraphrase: unseen sentences; names: contacts
    that no training text holds; qa: one fact; facts: two or three facts; screen: a stated screen.
    """
    draw = Draw(seed)

    def stream(suite: str) -> Iterator[Item]:
        while True:
            if suite == "command":
                item = draw_command(draw)
                wanted = item.held_combination
            elif suite == "paraphrase":
                item = draw_command(draw, held_share=1.0)
                wanted = item.held_paraphrase
            elif suite == "names":
                item = contact_command(draw, draw.pick(HELD_NAMES))
                wanted = True
            elif suite == "screen":
                item = draw_screen(draw)
                wanted = item.held_combination
            else:
                item = draw_question(draw, 1 if suite == "qa" else draw.randint(2, 3))
                wanted = item.held_combination
            if wanted:
                yield item

    return {suite: chosen(stream(suite), size) for suite, size in sizes.items()}


def held_stories(count: int, seed: int = TEST_SEED + 1) -> list[Document]:
    """Return stories that are not in the training stream, for the perplexity."""
    draw = Draw(seed)
    found: list[Document] = []
    while len(found) < count:
        story = draw_story(draw)
        if hash_share("story", story.text) < 2:
            found.append(Document("story", None, story.text))
    return found


def main() -> None:
    """Print a sample of the stream as JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=20)
    parser.add_argument("--seed", type=int, default=TRAIN_SEED)
    options = parser.parse_args()
    stream = documents(options.seed)
    for _ in range(options.documents):
        print(json.dumps(asdict(next(stream))))


if __name__ == "__main__":
    main()
