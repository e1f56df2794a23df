"""Who a pocket story is about, and the sentences that several plots share."""

from __future__ import annotations

from dataclasses import dataclass

from pocket_words import Draw, split, with_article

DAYS = split(
    "One day|One morning|One sunny day|One afternoon|One windy day|One cold day|Early one morning"
)


@dataclass(frozen=True)
class Cast:
    """Who and what one story is about."""

    name: str
    kind: str
    pronoun: str
    mood: str
    home: str
    friend: str
    friend_kind: str
    friend_pronoun: str
    color: str
    thing: str
    spot: str
    other_spot: str
    food: str
    animal: str
    other_animal: str

    @property
    def He(self) -> str:
        """The hero as the subject of a sentence's start."""
        return self.pronoun.capitalize()

    @property
    def him(self) -> str:
        """The hero as an object."""
        return "her" if self.pronoun == "she" else "him"

    @property
    def his(self) -> str:
        """The hero as an owner."""
        return "her" if self.pronoun == "she" else "his"

    @property
    def His(self) -> str:
        """The hero as an owner at a sentence's start."""
        return self.his.capitalize()

    @property
    def item(self) -> str:
        """The thing with its colour."""
        return f"{self.color} {self.thing}"

    @property
    def an_item(self) -> str:
        """The thing with its colour and article."""
        return with_article(self.item)

    @property
    def a_friend(self) -> str:
        """The friend's kind with its article."""
        return with_article(self.friend_kind)


def liking(d: Draw, c: Cast) -> str:
    """Return what the hero likes."""
    return d.pick(
        (
            f"{c.name} loved to play near {c.spot}.",
            f"{c.He} liked to walk to {c.spot} every day.",
            f"{c.name} liked to sing songs.",
            f"Every day, {c.name} went to {c.spot}.",
        )
    )


def owning(d: Draw, c: Cast) -> str:
    """Return that the hero has the thing."""
    return d.pick(
        (
            f"{c.name} had {c.an_item}. {c.He} loved it very much.",
            f"{c.His} favorite thing was {c.an_item}.",
            f"Every day, {c.name} played with {c.his} {c.item}.",
        )
    )


def joy(d: Draw, c: Cast) -> str:
    """Return that the hero is happy."""
    return d.pick(
        (
            f"{c.name} was very happy.",
            f"{c.name} smiled a big smile.",
            f"The {c.kind} laughed and danced.",
            f"{c.name} the {c.kind} clapped with joy.",
        )
    )


def sorrow(d: Draw, c: Cast) -> str:
    """Return that the hero is sad."""
    return d.pick(
        (
            f"{c.name} was very sad.",
            f"{c.name} began to cry.",
            f"The {c.kind} sat down and felt sad.",
            f"A tear ran down {c.his} face.",
        )
    )


def meeting(d: Draw, c: Cast) -> str:
    """Return how the friend comes in, with name and kind."""
    return d.pick(
        (
            f"Then {c.name} met {c.a_friend} named {c.friend}.",
            f"Just then, {c.a_friend} named {c.friend} came by.",
            f"On the way, {c.name} met {c.friend} the {c.friend_kind}.",
            f"{c.friend} the {c.friend_kind} saw {c.him}.",
        )
    )


def asking(d: Draw, c: Cast) -> str:
    """Return the friend's question."""
    return d.pick(
        (
            f'"What is wrong?" asked {c.friend}.',
            f'"Why are you sad, {c.name}?" asked {c.friend}.',
            f'"Can I help you?" asked the {c.friend_kind}.',
            f'"Do you need help?" asked {c.friend}.',
        )
    )


def thanks(d: Draw, c: Cast) -> str:
    """Return the hero's thanks."""
    return d.pick(
        (
            f'"Thank you, {c.friend}!" said {c.name}.',
            f'"You are a good friend," {c.name} said to {c.friend}.',
            f"{c.name} gave {c.friend} a big hug.",
            f'"Thank you so much!" said the {c.kind}.',
        )
    )


def ending(d: Draw, c: Cast) -> str:
    """Return the last sentence of a story with a friend."""
    return d.pick(
        (
            f"From that day on, {c.name} the {c.kind} and {c.friend} the {c.friend_kind} were best friends.",
            f"{c.name} and {c.friend} played together until the sun went down.",
            f"{c.name} and {c.friend} walked home together. The end.",
            f"That night, {c.name} slept well and dreamed of {c.spot}.",
            f"{c.name} learned that it is good to have a friend.",
            f"It was the best day ever for {c.name} and {c.friend}.",
            f"And {c.name} never forgot that day. The end.",
        )
    )
