"""Questions about stated facts for the pocket corpus: one to three facts, one question, a short answer."""

from __future__ import annotations

from dataclasses import dataclass

import pocket_words as words
from pocket_commands import HELD_COMBINATION_PERCENT, Item
from pocket_words import Draw, capitalize_first, hash_share, with_article

MADE_UP_SHARE = 0.45
VERBS = {
    "has": "does {p} have",
    "holds": "does {p} hold",
    "wants": "does {p} want",
    "found": "did {p} find",
    "lost": "did {p} lose",
}


@dataclass(frozen=True)
class Fact:
    """A sentence, the questions it answers, and its key for the hold-out."""

    kind: str
    sentence: str
    questions: tuple[tuple[str, str], ...]
    key: tuple[object, ...]
    marks: tuple[str, ...]
    """What no other fact beside it may share, so that every question has one answer."""


def place_fact(draw: Draw) -> Fact:
    """Return where a thing is."""
    color, thing, place = (
        draw.pick(words.COLORS),
        draw.pick(words.OBJECTS),
        draw.pick(words.LOCATIONS),
    )
    questions = (
        (f"where is the {color} {thing}?", place),
        (f"where can i find the {color} {thing}?", place),
        (f"where is the {thing}?", place),
        (f"what is {place}?", f"the {color} {thing}"),
        (f"which thing is {place}?", f"the {color} {thing}"),
        (f"what color is the {thing}?", color),
        (f"what color is the {thing} {place}?", color),
    )
    key = (color, thing, place)
    return Fact("place", f"The {color} {thing} is {place}.", questions, key, (thing, place))


def owner_fact(draw: Draw) -> Fact:
    """Return what somebody has, holds, wants, found or lost."""
    person, color, thing = (
        draw.person(MADE_UP_SHARE),
        draw.pick(words.COLORS),
        draw.pick(words.OBJECTS),
    )
    verb = draw.pick(tuple(VERBS))
    owned = with_article(f"{color} {thing}")
    questions = (
        (f"what {VERBS[verb].format(p=person)}?", owned),
        (f"who {verb} {owned}?", person),
        (f"who {verb} the {thing}?", person),
        (f"what color is the {thing}?", color),
    )
    key = (person, verb, color, thing)
    return Fact("owner", f"{person} {verb} {owned}.", questions, key, (person, thing))


def whereabouts_fact(draw: Draw) -> Fact:
    """Return where somebody is."""
    person, place = draw.person(MADE_UP_SHARE), draw.pick(words.LOCATIONS)
    questions = (
        (f"where is {person}?", place),
        (f"where can i find {person}?", place),
        (f"who is {place}?", person),
    )
    return Fact("person", f"{person} is {place}.", questions, (person, place), (person, place))


def age_fact(draw: Draw) -> Fact:
    """Return how old somebody is."""
    person, years = draw.person(MADE_UP_SHARE), draw.randint(3, 99)
    questions = (
        (f"how old is {person}?", f"{years} years old"),
        (f"what is the age of {person}?", f"{years} years old"),
        (f"who is {years} years old?", person),
    )
    sentence = f"{person} is {years} years old."
    return Fact("age", sentence, questions, (person, years), (person, str(years)))


def job_fact(draw: Draw) -> Fact:
    """Return what somebody does for a living."""
    person, job = draw.person(MADE_UP_SHARE), draw.pick(words.JOBS)
    questions = (
        (f"what is the job of {person}?", job),
        (f"what does {person} do?", job),
        (f"who is a {job}?", person),
        (f"who is the {job}?", person),
    )
    return Fact("job", f"{person} is a {job}.", questions, (person, job), (person, job))


MAKERS = (place_fact, place_fact, owner_fact, whereabouts_fact, age_fact, job_fact)


def draw_facts(draw: Draw, count: int) -> list[Fact]:
    """Return facts that do not share a person, thing or place."""
    facts: list[Fact] = []
    used: set[str] = set()
    while len(facts) < count:
        fact = MAKERS[draw.randrange(len(MAKERS))](draw)
        if used.isdisjoint(fact.marks):
            facts.append(fact)
            used.update(fact.marks)
    return facts


def draw_question(draw: Draw, count: int | None = None) -> Item:
    """Return a question about one of `count` stated facts (one to three when not given)."""
    if count is None:
        count = draw.choices([1, 2, 3], [6, 3, 1])[0]
    facts = draw_facts(draw, count)
    fact = facts[draw.randrange(count)]
    question, answer = fact.questions[draw.randrange(len(fact.questions))]
    if draw.chance(0.7):
        question = capitalize_first(question)
    stated = " ".join(f.sentence for f in facts)
    held = hash_share("fact", *fact.key) < HELD_COMBINATION_PERCENT
    return Item(f"qa{count}", f"{stated} {question}", answer, held_combination=held)
