"""The twelve plots of the pocket stories: each returns the sentences that follow the opening."""

from __future__ import annotations

from collections.abc import Callable

from pocket_cast import (
    DAYS,
    Cast,
    asking,
    ending,
    joy,
    liking,
    meeting,
    owning,
    sorrow,
    thanks,
)
from pocket_words import Draw, split, with_article

Plot = Callable[[Draw, Cast], list[str]]


def lost_thing(d: Draw, c: Cast) -> list[str]:
    """The hero loses the thing; the friend finds it."""
    day = d.pick(DAYS)
    return [
        owning(d, c),
        d.pick((f"{day}, {c.name} lost {c.his} {c.item}.", f"{day}, the {c.item} was gone!")),
        sorrow(d, c),
        meeting(d, c),
        asking(d, c),
        d.pick((f'"I lost my {c.item}," said {c.name}.', f'"My {c.item} is gone," said {c.name}.')),
        d.pick(
            (f"They looked near {c.other_spot}, but it was not there.", "They looked high and low.")
        ),
        d.pick(
            (
                f"Then {c.friend} looked behind {c.spot}. There was the {c.item}!",
                f"At last, {c.friend} found the {c.item} near {c.spot}.",
                f'"Look!" said {c.friend}. The {c.item} was under a leaf.',
            )
        ),
        joy(d, c),
        thanks(d, c),
        ending(d, c),
    ]


def shared_food(d: Draw, c: Cast) -> list[str]:
    """The hero has food; the friend is hungry."""
    day = d.pick(DAYS)
    return [
        liking(d, c),
        d.pick((f"{day}, {c.name} made {c.food}.", f"{day}, {c.name} took {c.food} to {c.spot}.")),
        meeting(d, c),
        d.pick((f"{c.friend} had nothing to eat.", f'"I am so hungry," said {c.friend}.')),
        d.pick(
            (f"{c.name} did not want to share at first.", f"The {c.kind} thought for a moment.")
        ),
        d.pick(
            (
                f'"Let us share," said {c.name}.',
                f"So {c.name} gave half of the food to {c.friend}.",
            )
        ),
        d.pick(
            (f"They sat near {c.other_spot} and ate together.", "They ate it all under a tree.")
        ),
        f'"Thank you, {c.name}!" said {c.friend}.',
        joy(d, c),
        d.pick((f"{c.name} learned that sharing is fun.", ending(d, c))),
    ]


def fear(d: Draw, c: Cast) -> list[str]:
    """The hero is afraid at night; the friend comes with a light."""
    return [
        d.pick((f"{c.name} was afraid of the dark.", f"{c.name} was afraid of loud storms.")),
        d.pick(
            ("One night, there was a big storm.", f"One night, {c.name} heard a strange noise.")
        ),
        d.pick((f"{c.name} hid under the blanket.", f"The {c.kind} could not sleep.")),
        d.pick((f'"Who is there?" asked {c.name}.', f'"I am scared," said {c.name}.')),
        d.pick(
            (
                f"It was only {c.friend}, {c.a_friend}.",
                f"{c.friend} the {c.friend_kind} came with a small light.",
            )
        ),
        d.pick(
            (
                f'"Do not be afraid," said {c.friend}. "I am here."',
                f'"It is only the wind," said {c.friend}.',
                f'"Let us be brave together," said the {c.friend_kind}.',
            )
        ),
        d.pick(
            (
                "They sang a song until the night was quiet.",
                f"They told stories about {c.spot}.",
                "They counted the stars.",
            )
        ),
        d.pick(
            (f"Soon {c.name} was not afraid anymore.", f"{c.name} the {c.kind} felt brave now.")
        ),
        ending(d, c),
    ]


def building(d: Draw, c: Cast) -> list[str]:
    """The hero cannot build something alone."""
    work = d.pick(split("a tree house|a raft|a snowman|a sand castle|a swing|a tiny bridge"))
    return [
        liking(d, c),
        f"{d.pick(DAYS)}, {c.name} wanted to build {work}.",
        d.pick(("But it was too hard to do alone.", f"{c.He} tried and tried, but it fell down.")),
        sorrow(d, c),
        meeting(d, c),
        d.pick(
            (
                f'"Can I help?" asked {c.friend}.',
                f'"Two are better than one," said {c.friend}.',
                f'"Let us do it together," said the {c.friend_kind}.',
            )
        ),
        d.pick(
            (
                f"{c.name} found wood near {c.spot} and {c.friend} found rope near {c.other_spot}.",
                f"{c.friend} held it and {c.name} tied it.",
                f"{c.name} and {c.friend} worked and worked.",
            )
        ),
        d.pick(("At last, it was done.", f"Soon they had built {work}.")),
        f"Even {with_article(c.animal)} came to see it.",
        joy(d, c),
        ending(d, c),
    ]


def stuck_animal(d: Draw, c: Cast) -> list[str]:
    """The hero helps an animal, which helps back."""
    a, an_animal = c.animal, with_article(c.animal)
    return [
        owning(d, c),
        f"{d.pick(DAYS)}, {c.name} walked to {c.spot}.",
        d.pick(
            (
                f"There {c.pronoun} saw {an_animal} that could not move.",
                f"{c.He} heard a small voice. It was {an_animal}.",
                f"{c.He} found {an_animal} under a stone.",
            )
        ),
        d.pick((f'"Please help me," said the {a}.', f'"I am stuck," said the {a}.')),
        d.pick((f'"I will help you," said {c.name}.', f"The {c.kind} wanted to help the {a}.")),
        d.pick(
            (
                f"{c.name} used {c.his} {c.item} to help the {a}.",
                f"{c.name} pulled and pulled until the {a} was free.",
            )
        ),
        f'"Thank you, {c.name}," said the {a}.',
        d.pick(
            (
                f"The next day, {c.name} fell into the water. The {a} came and saved {c.him}.",
                f"The next day, the {a} brought {c.him} a gift.",
                f"Later, when {c.name} got lost, the {a} showed {c.him} the way home.",
            )
        ),
        d.pick(
            (
                f"From then on, {c.name} the {c.kind} and the {a} were friends.",
                f"{c.name} was very happy. The end.",
            )
        ),
    ]


def race(d: Draw, c: Cast) -> list[str]:
    """The hero stops in a race to help the friend."""
    return [
        f"{d.pick(DAYS)}, {c.name} and {c.a_friend} named {c.friend} had a race to {c.spot}.",
        d.pick(
            (f'"I will win," said {c.friend}.', f'"I am the fastest," said the {c.friend_kind}.')
        ),
        d.pick((f"{c.name} was slow, but {c.pronoun} did not stop.", f"{c.name} ran and ran.")),
        f"Then {c.friend} fell over a stone near {c.other_spot}.",
        f"{c.name} saw it and went back to help {c.friend}.",
        d.pick(
            (f'"You could have won," said {c.friend}.', f'"Why did you stop?" asked {c.friend}.')
        ),
        f'"I would rather have a friend than a prize," said {c.name}.',
        d.pick(
            (
                f"{c.name} and {c.friend} walked to {c.spot} side by side.",
                f"{c.name} and {c.friend} reached {c.spot} at the same time.",
            )
        ),
        joy(d, c),
        ending(d, c),
    ]


def found_thing(d: Draw, c: Cast) -> list[str]:
    """The hero finds what the friend has lost and gives it back."""
    return [
        liking(d, c),
        f"{d.pick(DAYS)}, {c.name} found {c.an_item} near {c.spot}.",
        d.pick(("It was shiny and new.", "It was old and dusty.")),
        d.pick((f'"Whose {c.thing} is this?" asked {c.name}.', f"The {c.kind} wanted to keep it.")),
        meeting(d, c),
        d.pick((f"{c.friend} was looking for something.", f"{c.friend} looked very sad.")),
        d.pick(
            (
                f'"I lost my {c.item}," said {c.friend}.',
                f'"Have you seen my {c.item}?" asked {c.friend}.',
            )
        ),
        d.pick((f"{c.name} knew what was right.", f"{c.name} thought about it for a while.")),
        d.pick(
            (
                f'"Here it is," said {c.name}, and gave back the {c.item}.',
                f"{c.name} gave the {c.item} to {c.friend}.",
            )
        ),
        d.pick(
            (
                f"{c.friend} was so happy that {c.friend_pronoun} jumped up and down.",
                f'"Thank you for telling the truth," said {c.friend}.',
            )
        ),
        ending(d, c),
    ]


def gardening(d: Draw, c: Cast) -> list[str]:
    """The hero plants something and learns to wait."""
    plant = d.pick(split("seed|bean|tiny tree|flower|pumpkin seed"))
    return [
        liking(d, c),
        f"{d.pick(DAYS)}, {c.name} planted a {plant} near {c.spot}.",
        d.pick((f"{c.He} gave it water every day.", f"{c.He} sang to it every morning.")),
        d.pick(("But nothing came up.", "Days went by, and nothing happened.")),
        sorrow(d, c),
        meeting(d, c),
        d.pick(
            (f'"You must wait," said {c.friend}.', f'"Good things take time," said {c.friend}.')
        ),
        d.pick((f"So {c.name} waited.", f"{c.name} tried to be patient.")),
        d.pick(
            (
                "One morning, there was a small green leaf!",
                "After the rain, a tall flower came out.",
            )
        ),
        joy(d, c),
        d.pick((f"{c.name} and {c.friend} danced around it.", ending(d, c))),
    ]


def lost_way(d: Draw, c: Cast) -> list[str]:
    """The hero is lost; the friend knows the way."""
    return [
        liking(d, c),
        f"{d.pick(DAYS)}, {c.name} went too far from home and got lost near {c.other_spot}.",
        d.pick(("It was getting dark.", "The wind was cold.")),
        sorrow(d, c),
        meeting(d, c),
        asking(d, c),
        f'"I am lost," said {c.name}.',
        d.pick(
            (
                f'"Follow me," said {c.friend}. "I know the way."',
                f'"I can take you home," said the {c.friend_kind}.',
            )
        ),
        f"{c.name} and {c.friend} followed the stars.",
        d.pick(
            (f"At last, {c.name} saw {c.his} home.", f"Soon {c.name} saw a light in the window.")
        ),
        thanks(d, c),
        ending(d, c),
    ]


def birthday(d: Draw, c: Cast) -> list[str]:
    """The hero makes a gift for the friend."""
    return [
        f"It was the birthday of {c.friend}, {c.a_friend}. {c.name} wanted to give a gift.",
        d.pick((f"But {c.name} had no money.", f"But {c.name} did not know what to give.")),
        d.pick(
            (
                f"{c.He} went to {c.spot} and thought.",
                f"The {c.kind} sat near {c.spot} and thought.",
            )
        ),
        d.pick((f"So {c.name} made {c.food}.", f"So {c.name} made {c.an_item} by hand.")),
        f'"Happy birthday, {c.friend}!" said {c.name}.',
        d.pick((f"{c.friend} smiled.", f"The {c.friend_kind} was so surprised.")),
        d.pick((f'"This is the best gift," said {c.friend}.', f'"I love it," said {c.friend}.')),
        joy(d, c),
        ending(d, c),
    ]


def broken_thing(d: Draw, c: Cast) -> list[str]:
    """The hero breaks the friend's thing and tells the truth."""
    return [
        f"{c.friend} the {c.friend_kind} had {c.an_item}. It was very special.",
        f"{d.pick(DAYS)}, {c.name} played with the {c.item} and broke it.",
        d.pick((f"{c.name} was afraid to tell {c.friend}.", f"{c.name} wanted to hide it.")),
        d.pick((f"The {c.kind} hid it near {c.spot}.", f"The {c.kind} ran to {c.spot}.")),
        d.pick((f"But {c.name} could not sleep that night.", f"But {c.name} felt bad all day.")),
        d.pick(
            (f'"I must tell the truth," said {c.name}.', f"Then {c.name} went back to {c.friend}.")
        ),
        f'"I broke your {c.item}," said {c.name}. "I am sorry."',
        d.pick(
            (
                f'"Thank you for telling me," said {c.friend}.',
                f"{c.friend} was sad, but then {c.friend_pronoun} smiled.",
            )
        ),
        f"{c.name} and {c.friend} fixed the {c.thing} together.",
        d.pick((f"{c.name} learned to tell the truth.", ending(d, c))),
    ]


def shyness(d: Draw, c: Cast) -> list[str]:
    """The hero is too shy to show a skill."""
    skill = d.pick(split("sing|dance|paint|swim|play music|tell stories"))
    return [
        f"{c.name} wanted to {skill}, but {c.pronoun} was too shy.",
        d.pick(
            (
                f"{d.pick(DAYS)}, there was a big party near {c.spot}.",
                f"{d.pick(DAYS)}, everyone came to {c.spot} for a show.",
            )
        ),
        d.pick((f"{c.name} hid behind a tree.", f"{c.name} looked at the ground.")),
        f"{c.friend} the {c.friend_kind} saw {c.him}.",
        d.pick(
            (f'"You can do it, {c.name}," said {c.friend}.', f'"Try it with me," said {c.friend}.')
        ),
        d.pick((f"So {c.name} took a deep breath.", f"{c.name} began to {skill}.")),
        d.pick(("Everyone stopped to look.", f"Even {with_article(c.animal)} came closer.")),
        d.pick(('"That was wonderful!" they said.', "They all clapped.")),
        joy(d, c),
        ending(d, c),
    ]


PLOTS: tuple[Plot, ...] = (
    lost_thing,
    shared_food,
    fear,
    building,
    stuck_animal,
    race,
    found_thing,
    gardening,
    lost_way,
    birthday,
    broken_thing,
    shyness,
)
