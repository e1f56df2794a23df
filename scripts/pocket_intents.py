"""The draw of one command: an intent, a template, values, a polite dress; and taps on a stated screen."""

from __future__ import annotations

import re

import pocket_words as words
from pocket_commands import HELD_COMBINATION_PERCENT, REFUSAL, Intent, Item, Template
from pocket_home import HOME_INTENTS
from pocket_phone import PHONE_INTENTS
from pocket_words import Draw, capitalize_first, hash_share, split

INTENTS = PHONE_INTENTS | HOME_INTENTS
TEMPLATES: dict[str, list[list[Template]]] = {
    name: intent.templates(name) for name, intent in INTENTS.items()
}
PREFIXES = split(
    "||||||please |can you |could you |hey, |hey, please |could you please |would you |ok, |now "
    "|quick, |assistant, |hi, can you "
)
POLITE_STATEMENTS = split("||||||hey, |ok, |please, |quick, |assistant, |hi, |now ")
SUFFIXES = split("|||||||, please|, thanks| right away|, thank you| if you can")
STATEMENT = re.compile(
    r"(i|we|what|how|who|why|when|is|will|do|does|which|my|the|home|main|back|previous|hello|hi|good"
    r"|at|in|on|for|that|this|one|weather|forecast|volume|sound|brightness|screen|alarm|timer"
    r"|reminder|lights?|lamp|directions|route|new|note:|can|let us|off|see)\b"
)
QUESTION = re.compile(
    r"(?i)(hey, |ok, |hi, )?(can|could|would|what|how|is it|will|do i|who|which)\b"
)


def dress(draw: Draw, intent: Intent, sentence: str) -> str:
    """Return the sentence with a polite beginning and end, and a capital or stop now and then."""
    if intent.answer == REFUSAL:
        text = sentence
    else:
        noun = STATEMENT.match(sentence) or not re.match(r"[a-z]", sentence)
        text = draw.pick(POLITE_STATEMENTS if noun else PREFIXES) + sentence
        if not intent.free_text:
            text += draw.pick(SUFFIXES)
    if draw.chance(0.3):
        text = capitalize_first(text)
    if not intent.free_text and draw.chance(0.25):
        text += "?" if QUESTION.match(text) else "."
    return text


def draw_command(draw: Draw, kind: str | None = None, held_share: float = 0.0) -> Item:
    """Return one command; with `held_share` that share of the templates are held-out ones."""
    if kind is None:
        kind = draw.choices(list(INTENTS), [i.weight for i in INTENTS.values()])[0]
    intent = INTENTS[kind]
    wanted = draw.chance(held_share)
    groups = [[t for t in group if t.held == wanted] for group in TEMPLATES[kind]]
    template = draw.choice(draw.choice([group for group in groups if group]))
    values = {name: slot(draw) for name, slot in intent.slots.items()}
    sentence = template.text.format(**{name: said for name, (said, _) in values.items()})
    prompt = dress(draw, intent, " ".join(sentence.split()))
    written = [value for _, value in values.values()]
    if not values:
        key: list[object] = [prompt.lower().rstrip(".?")]
    else:
        key = [template.text, *written] if intent.closed else [*written]
    return Item(
        kind,
        prompt,
        intent.answer.format(**{name: value for name, (_, value) in values.items()})
        if values
        else intent.answer,
        template.held,
        hash_share(kind, *key) < HELD_COMBINATION_PERCENT,
    )


def contact_command(draw: Draw, name: str) -> Item:
    """Return a call or a message to this contact, from the templates of training."""
    kind = draw.pick(("call", "message"))
    while True:
        item = draw_command(draw, kind)
        match = re.search(r'contact="(.*?)"', item.answer)
        old = match.group(1) if match else ""
        if old and item.prompt.count(old) == 1 and item.answer.count(old) == 1:
            return Item("name", item.prompt.replace(old, name), item.answer.replace(old, name))


def draw_screen(draw: Draw) -> Item:
    """Return a request to tap one of the buttons of a stated screen."""
    count = draw.randint(2, 4)
    labels = draw.sample(words.BUTTONS, count)
    places = [f"[{draw.randrange(1000)},{draw.randrange(1000)}]" for _ in labels]
    index = draw.randrange(count)
    verb = draw.pick(("tap", "press", "click", "choose", "hit", "select"))
    form = draw.pick(("{v} {b}", "{v} the {b} button", "{v} on {b}", "{v} {b} on the screen"))
    screen = "Screen: " + ", ".join(f"{b} {p}" for b, p in zip(labels, places, strict=True))
    return Item(
        "screen",
        f"{screen}. {capitalize_first(form.format(v=verb, b=labels[index]))}.",
        f'do(action="Tap", element={places[index]})',
        held_combination=hash_share("screen", labels[index], places[index]) < 10,
    )
