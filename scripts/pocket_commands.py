"""Phone and home commands of the pocket corpus: a request and the one action that answers it.

The actions have the form of Open-AutoGLM: `do(action="Launch", app="Maps")`, `finish(message="...")`.
An intent has patterns; `(a|b)` in a pattern is a choice, so that one pattern stands for several templates.
A pattern behind `~`, and about one in eight of the templates of a pattern with choices, is an unseen
paraphrase: it is used in tests alone. Combinations of slot values are held out by hash.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass

import pocket_words as words
from pocket_words import Draw, hash_share

REFUSAL = 'finish(message="I can not do that.")'
HELD_COMBINATION_PERCENT = 10
HELD_TEMPLATE_PERCENT = 12

Slot = Callable[[Draw], tuple[str, str]]
"""Draws a slot: how the user says it, how the action writes it."""


@dataclass(frozen=True)
class Item:
    """One request and its answer; `kind` is the intent, the two flags keep it out of training."""

    kind: str
    prompt: str
    answer: str
    held_paraphrase: bool = False
    held_combination: bool = False

    @property
    def in_training(self) -> bool:
        """Whether the training text may hold this item."""
        return not (self.held_paraphrase or self.held_combination)


@dataclass(frozen=True)
class Template:
    """One sentence with slots in braces; `composed` means that it came from a pattern with choices."""

    text: str
    held: bool
    composed: bool


@dataclass(frozen=True)
class Intent:
    """What one kind of request looks like and how it is answered."""

    answer: str
    slots: dict[str, Slot]
    patterns: tuple[str, ...]
    weight: float = 1.0
    free_text: bool = False
    closed: bool = False

    def templates(self, intent_name: str) -> list[list[Template]]:
        """Return the templates of each pattern."""
        return [expand(intent_name, pattern) for pattern in self.patterns]


def expand(intent_name: str, pattern: str) -> list[Template]:
    """Return every sentence a pattern stands for, each marked as held out or not."""
    held = pattern.startswith("~")
    parts = re.split(r"\(([^()]*)\)", pattern.lstrip("~"))
    choices = [part.split("|") if i % 2 else [part] for i, part in enumerate(parts)]
    texts = [" ".join("".join(c).split()) for c in itertools.product(*choices)]
    if held or len(texts) < 4:
        return [Template(text, held, False) for text in texts]
    marks = [hash_share("template", intent_name, t) < HELD_TEMPLATE_PERCENT for t in texts]
    return [Template(text, mark, True) for text, mark in zip(texts, marks, strict=True)]


def from_list(options: tuple[str, ...], lower: float = 0.0) -> Slot:
    """Return a slot that is one of the options, said in lower case with the given probability."""

    def draw(source: Draw) -> tuple[str, str]:
        value = source.pick(options)
        return (value.lower() if source.chance(lower) else value), value

    return draw


def number(low: int, high: int) -> Slot:
    """Return a slot that is a whole number, in digits or in words."""

    def draw(source: Draw) -> tuple[str, str]:
        value = source.randint(low, high)
        return (str(value) if source.chance(0.7) else words.number_words(value)), str(value)

    return draw


def clock_time(draw: Draw) -> tuple[str, str]:
    """Return a time of day as people say it and as HH:MM."""
    hour = draw.randrange(24)
    minute = draw.randrange(60) if draw.chance(0.3) else 5 * draw.randrange(12)
    if draw.chance(0.25):
        minute = draw.choice([0, 15, 30, 45])
    twelve, half = (hour % 12) or 12, "am" if hour < 12 else "pm"
    part = "in the " + ("morning" if hour < 12 else "afternoon" if hour < 18 else "evening")
    forms = [f"{hour}:{minute:02d}", f"{hour:02d}:{minute:02d}", f"{twelve}:{minute:02d} {half}"]
    forms += [f"{twelve}:{minute:02d}{half}", f"{twelve}:{minute:02d} {part}"]
    said = words.number_words(twelve)
    if minute == 0:
        forms += [f"{twelve} {half}", f"{twelve}{half}", f"{said} {half}", f"{twelve} {part}"]
        forms += [f"{said} o'clock {part}"]
    elif minute % 5 == 0:
        forms += [f"{said} {words.number_words(minute)} {half}"]
    if minute == 15:
        forms += [f"quarter past {said} {part}"]
    if minute == 30:
        forms += [f"half past {said} {part}"]
    if minute == 45 and hour not in (11, 17, 23):
        forms += [f"quarter to {words.number_words(twelve % 12 + 1)} {part}"]
    return draw.pick(forms), f"{hour:02d}:{minute:02d}"


def duration(units: tuple[str, ...], most: int) -> Slot:
    """Return a slot such as `5 minutes`."""

    def draw(source: Draw) -> tuple[str, str]:
        unit = source.pick(units)
        value = source.randint(1, 12 if unit == "hours" else most)
        name = unit[:-1] if value == 1 else unit
        said = str(value) if source.chance(0.7) else words.number_words(value)
        return f"{said} {name}", f"{value} {name}"

    return draw


def point(draw: Draw) -> tuple[str, str]:
    """Return a place on the screen, each axis 0..999."""
    x, y = draw.randrange(1000), draw.randrange(1000)
    said = draw.pick([f"{x}, {y}", f"{x} {y}", f"({x}, {y})", f"x {x} y {y}"])
    return said, f"[{x},{y}]"


def ordinal(draw: Draw) -> tuple[str, str]:
    """Return `third` and `3`."""
    index = draw.randrange(len(words.ORDINALS))
    return words.ORDINALS[index], str(index + 1)


def contact(draw: Draw) -> tuple[str, str]:
    """Return whom to call or write to; most names are made up."""
    name = draw.pick(words.ROLES) if draw.chance(0.1) else draw.person()
    return name, name


def message(draw: Draw) -> tuple[str, str]:
    """Return a short message, a sentence or a greeting."""
    if draw.chance(0.25):
        text = draw.pick(words.GREETINGS) + " " + draw.pick(words.TEXT_TIMES)
    else:
        subject = draw.pick(words.TEXT_SUBJECTS)
        many = subject in ("i", "we", "they")
        verb = draw.pick(words.TEXT_VERBS if many else words.TEXT_VERBS_SINGULAR)
        verb = verb.replace("are still", "am still") if subject == "i" else verb
        text = f"{subject} {verb} {draw.pick(words.TEXT_PLACES)} {draw.pick(words.TEXT_TIMES)}"
    return text, text


def loose_text(draw: Draw) -> tuple[str, str]:
    """Return text to type or note: a message, or one to three words, some made up."""
    if draw.chance(0.5):
        return message(draw)
    known = words.ITEMS + words.ROOMS + words.TASKS
    picked = [
        draw.made_up_word() if draw.chance(0.5) else draw.pick(known)
        for _ in range(draw.randint(1, 3))
    ]
    return " ".join(picked), " ".join(picked)


def query(draw: Draw) -> tuple[str, str]:
    """Return something to search for."""
    things = words.ITEMS + words.GENRES + words.APPS + words.CITIES
    text = f"{draw.pick(words.QUERY_ADJECTIVES)} {draw.pick(things)}".lower()
    return text, text
