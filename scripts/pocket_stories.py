"""Tiny stories for the pocket corpus: twelve plots, one hero, one friend, and a check that both stay the same.

A hero may be of any kind; a friend's name belongs to one kind for ever, and no hero has a friend's name.
So a story can be told consistently by a very small model, and `inconsistencies` can count when it is not.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from pocket_cast import Cast
from pocket_plots import PLOTS
from pocket_words import COLORS, Draw, split, with_article

HEROES = dict.fromkeys(split("Lily|Mia|Ella|Ruby|Lucy|Tess|Maya|Clara"), "she") | dict.fromkeys(
    split("Tom|Max|Ben|Finn|Jack|Theo|Otto|Milo"), "he"
)
HERO_KINDS = split("fox|rabbit|bear|mouse|duck|cat|squirrel|frog|puppy|owl|dragon|robot")
FRIENDS = {
    "Nora": ("she", "hedgehog"),
    "Poppy": ("she", "lamb"),
    "Zoe": ("she", "turtle"),
    "Anna": ("she", "swan"),
    "Rosa": ("she", "pony"),
    "Sam": ("he", "badger"),
    "Leo": ("he", "raccoon"),
    "Hugo": ("he", "otter"),
    "Ned": ("he", "penguin"),
    "Gus": ("he", "donkey"),
}
ANIMALS = split("bird|bee|deer|goat|crow|snail|beaver|goose|butterfly|mole|fish")
MOODS = split("little|small|brave|shy|curious|kind|clever|cheerful|quiet|sleepy|funny|gentle")
HOMES = split(
    "forest|village|meadow|town by the sea|valley|garden|big city|house on the hill|castle|old mill"
    "|hollow tree|green wood"
)
THINGS = split(
    "ball|kite|hat|drum|boat|scarf|lantern|book|bell|teddy|flute|basket|button|key|balloon|cup|map"
    "|shell|blanket|crown"
)
SPOTS = split(
    "the river|the old oak tree|the hill|the pond|the market|the cave|the bridge|the beach|the field"
    "|the well|the windmill|the big rock"
)
FOODS = split("a cake|some bread|a berry pie|hot soup|apple jam|cookies|pancakes|a big salad")
ENDED = re.compile(r'[.!?]"?$')


@dataclass(frozen=True)
class Story:
    """A whole story and whom it is about."""

    text: str
    cast: Cast


def draw_cast(draw: Draw) -> Cast:
    """Return who and what a story is about."""
    name, friend = draw.choice(list(HEROES)), draw.choice(list(FRIENDS))
    spot, other_spot = draw.sample(SPOTS, 2)
    animal, other_animal = draw.sample(ANIMALS, 2)
    friend_pronoun, friend_kind = FRIENDS[friend]
    return Cast(
        name=name,
        kind=draw.pick(HERO_KINDS),
        pronoun=HEROES[name],
        mood=draw.pick(MOODS),
        home=with_article(draw.pick(HOMES)),
        friend=friend,
        friend_kind=friend_kind,
        friend_pronoun=friend_pronoun,
        color=draw.pick(COLORS),
        thing=draw.pick(THINGS),
        spot=spot,
        other_spot=other_spot,
        food=draw.pick(FOODS),
        animal=animal,
        other_animal=other_animal,
    )


def opening(draw: Draw, cast: Cast) -> str:
    """Return the first one or two sentences: who the hero is and where the hero lives."""
    c = cast
    who, named = with_article(f"{c.mood} {c.kind}"), f"named {c.name}"
    if draw.chance(0.4):
        return draw.pick(
            (
                f"Once upon a time, there was {who} {named}. {c.He} lived in {c.home}.",
                f"Once upon a time, in {c.home}, there lived {who} {named}.",
                f"Once upon a time, {who} {named} lived near {c.spot}.",
            )
        )
    return draw.pick(
        (
            f"There once was {who} called {c.name} who lived in {c.home}.",
            f"{c.name} was {who}. {c.He} lived in {c.home}.",
            f"Long ago, {who} {named} lived in {c.home}.",
            f"In {c.home} there was {who}. {c.His} name was {c.name}.",
            f"Once there was {who}. Everyone called {c.him} {c.name}.",
            f"The {c.mood} {c.kind} was called {c.name}. {c.He} lived in {c.home}.",
            f"The {c.mood} {c.kind} was never alone for long. {c.His} name was {c.name}.",
            f"{c.name} the {c.kind} lived in {c.home}. {c.He} was {c.mood}.",
            f"A {c.kind} {named} lived near {c.spot}. {c.He} was {c.mood}."
            if c.kind[0] not in "aeiou"
            else f"An {c.kind} {named} lived near {c.spot}. {c.He} was {c.mood}.",
            f"This is the story of {c.name}, {who} who lived in {c.home}.",
            f"My old friend {c.name} was {who}. {c.He} lived in {c.home}.",
            f"Far away, in {c.home}, lived {c.name}, {who}.",
        )
    )


def draw_story(draw: Draw) -> Story:
    """Return one story of eight to fourteen sentences."""
    cast = draw_cast(draw)
    sentences = PLOTS[draw.randrange(len(PLOTS))](draw, cast)
    if draw.chance(0.3):
        weather = (
            "The sun was warm and the sky was blue.",
            f"The {cast.other_animal} sang in the trees."
            if cast.other_animal in ("bird", "crow")
            else "The birds sang in the trees.",
            "The grass was wet and green.",
            "The air smelled of flowers.",
        )
        sentences.insert(1, draw.pick(weather))
    return Story(" ".join([opening(draw, cast), *sentences]), cast)


def story_request(draw: Draw, story: Story) -> str:
    """Return what the user says to get this story: its first words, or a wish."""
    c = story.cast
    if draw.chance(0.7):
        parts = story.text.split()
        count = 4 if parts[0] == "Once" and draw.chance(0.5) else draw.randint(2, 8)
        start = " ".join(parts[:count])
        return start.rstrip(",.") if draw.chance(0.7) else start
    who = with_article(c.kind)
    wish = draw.pick(
        (
            f"tell me a story about {who} named {c.name}",
            f"tell me a story about {who}",
            f"tell me about {c.name} the {c.kind}",
            f"i want a story about {who} called {c.name}",
            f"can you tell a story about {c.name}",
            f"write a short story about {who} named {c.name}",
            f"please tell me a story about {c.name} and {c.friend}",
            f"a story about a {c.color} {c.thing} and {who}",
            "tell me a story",
            "a bedtime story, please",
        )
    )
    if f"{c.color} {c.thing}" in wish and f"{c.color} {c.thing}" not in story.text:
        wish = f"tell me a story about {who}"
    if wish.endswith(c.friend) and c.friend not in story.text:
        wish = f"tell me a story about {c.name}"
    wish = wish[0].upper() + wish[1:] if draw.chance(0.6) else wish
    return wish + draw.pick((".", "", "!")) if draw.chance(0.6) else wish


def one_of(options: Iterable[str]) -> str:
    """Return a pattern that matches one of the words."""
    return "(" + "|".join(sorted(options, key=len, reverse=True)) + ")"


def inconsistencies(text: str) -> list[str]:
    """Return what changes half-way in a story: names, kinds, pronouns, colours, animals, no end.

    A word that names nobody's kind, a third name, a hero who is his own friend, a friend of another kind
    than the grammar gives, an animal that speaks without having come, are all reported.
    """
    faults = []
    names = [n for n in (*HEROES, *FRIENDS) if re.search(rf"\b{n}\b", text)]
    heroes = [n for n in names if n in HEROES]
    friends = [n for n in names if n in FRIENDS]
    if len(heroes) != 1 or len(friends) > 1:
        faults.append(f"names {names}")
    capitals = set(re.findall(r'(?<=[a-z,] )[A-Z][a-z]+|(?<=")[A-Z][a-z]+(?=[,!?])', text))
    if strange := sorted(capitals - set(names) - ALLOWED_CAPITALS):
        faults.append(f"unknown names {strange}")
    kinds = set(re.findall(rf"\b{one_of(HERO_KINDS)}\b", text))
    if len(kinds) != 1:
        faults.append(f"hero's kinds {sorted(kinds)}")
    friend_kinds = set(re.findall(rf"\b{one_of({k for _, k in FRIENDS.values()})}\b", text))
    if friend_kinds - {FRIENDS[n][1] for n in friends}:
        faults.append(f"friend {friends} is a {sorted(friend_kinds)}")
    for name in heroes:
        if re.search(rf"\b{name} and {name}\b|{name}[!,]? ?\"? said {name}\b", text):
            faults.append(f"{name} meets {name}")
    pronouns = {HEROES[n] for n in heroes} | {FRIENDS[n][0] for n in friends}
    for pronoun, pattern in (("he", "he|him|his"), ("she", "she|her")):
        if re.search(rf"(?i)\b({pattern})\b", text) and pronoun not in pronouns:
            faults.append(f"pronoun {pronoun}")
    return faults + thing_faults(text) + animal_faults(text)


def thing_faults(text: str) -> list[str]:
    """Return things whose colour changes, and too many different ones."""
    pairs = sorted(set(re.findall(rf"\b{one_of(COLORS)} {one_of(THINGS)}\b", text)))
    faults = [f"things {pairs}"] if len(pairs) > 2 else []
    for thing in sorted({t for _, t in pairs}):
        if len([c for c, t in pairs if t == thing]) > 1:
            faults.append(f"colour of the {thing} changes")
    if not ENDED.search(text.strip()):
        faults.append("does not end")
    return faults


def animal_faults(text: str) -> list[str]:
    """Return animals that act as `the ...` before they came as `a ...`."""
    named = re.findall(rf"\b(a|an|the|The) {one_of(ANIMALS)}\b", text)
    order = list(dict.fromkeys(animal for _, animal in named))
    faults = [f"animals {order}"] if len(order) > 2 else []
    speakers = set(re.findall(rf"said the {one_of(ANIMALS)}\b", text))
    for animal in sorted(speakers):
        if not re.search(rf"\b(a|an) {animal}\b", text):
            faults.append(f"the {animal} speaks before it came")
    return faults


ALLOWED_CAPITALS = set(
    split(
        "I|Early|One|Once|The|Thank|You|Do|It|Let|Can|What|Why|Look|Follow|Happy|Good|Two|Here|My|Who"
    )
    + split("Whose|Have|How|Try|That|Please|A|This|Tell|We|Then|Yes|No|Well|Done|Hello")
)
