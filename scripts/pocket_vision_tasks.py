"""Instructions about a screen and the action that each one asks for.

An instruction is fulfilled by a tap inside one target, or it already is: the page is open, the thing is
chosen, there is no dialog to close. Then the answer is `finish`. It knows
no tokens; the form of the answers is that of Open-AutoGLM, coordinates in thousandths of the screen.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from pocket_vision_screens import HELD_OUT, Box, Mark, Screen, draw_screen, thousandths

FINISH = 'finish(message="Task completed.")'
# Whether a switch needs a tap is two things at once, what it is and what is wanted; the shipped model did not
# learn that in 2,800 steps (it gave all switches the same answer), so it is no longer asked.
ASK_SWITCHES = False
TAP_START, TAP_END = 'do(action="Tap", element=[', "])"

WORD_PHRASES = (
    "Tap {}",
    "Tap on {}",
    "Open {}",
    "Press {}",
    "Select {}",
    "Click {}",
    "Click on {}",
    "Go to {}",
    "Tap the {} button",
    "Press the {} button",
    "Open the {} row",
    "Tap the {} row",
    "Open the {} app",
    "Go to the {} page",
    "Please open {}",
    "Please tap {}",
)
ICON_PHRASES = (
    "Tap the {}",
    "Tap on the {}",
    "Tap the {} icon",
    "Press the {}",
    "Press the {} icon",
    "Select the {}",
    "Click the {}",
    "Click on the {} icon",
    "Please tap the {}",
    "Please select the {} icon",
)
SWITCH_PHRASES = ("Turn on {}", "Turn {} on", "Switch on {}", "Please turn {} on")
BACK_PHRASES = (
    "Go back",
    "Tap back",
    "Press the back button",
    "Tap the back icon",
    "Please go back",
)
CLOSE_PHRASES = (
    "Close the dialog",
    "Close the window",
    "Please close the dialog",
    "Tap the close button",
)
# The same words put together in ways that training never shows.
HELD_OUT_PHRASES = {
    "word": (
        "Please select {}",
        "Click the {} button",
        "Please go to {}",
        "Select the {} row",
        "Press on {}",
    ),
    "icon": (
        "Please select the {}",
        "Select the {} button",
        "Please tap the {} icon",
        "Press on the {} icon",
    ),
    "switch": ("Switch {} on", "Please turn on {}"),
    "back": ("Click the back button", "Please tap back", "Select the back icon"),
    "close": ("Please close the window", "Click the close button"),
}
PHRASES = {
    "word": WORD_PHRASES,
    "icon": ICON_PHRASES,
    "switch": SWITCH_PHRASES,
    "back": BACK_PHRASES,
    "close": CLOSE_PHRASES,
}


@dataclass(frozen=True)
class Task:
    """An instruction, and either the target of the tap or None for `finish`."""

    kind: str
    instruction: str
    target: Box | None
    focus: tuple[Box, ...]
    """What must be looked at to know the answer; empty where that is the whole screen."""

    @property
    def answer(self) -> str:
        """The action as the agent's parser reads it."""
        if self.target is None:
            return FINISH
        x, y = thousandths(self.target)
        return f"{TAP_START}{x},{y}{TAP_END}"


def mark_tasks(mark: Mark) -> list[tuple[str, str, Box | None, tuple[Box, ...]]]:
    """Return kind, name, target and focus of all that can be asked about a mark."""
    done = mark.state in ("title", "chosen")
    target = None if done else mark.target
    found: list[tuple[str, str, Box | None, tuple[Box, ...]]] = []
    if mark.word is not None and mark.word_box is not None:
        found.append(("word", mark.word, target, (mark.word_box,)))
    if mark.shape is not None and mark.icon_box is not None:
        found.append(("icon", f"{mark.colour} {mark.shape}", target, (mark.icon_box,)))
    if ASK_SWITCHES and mark.switch_box is not None and mark.word is not None:
        for state in ("on", "off"):
            box = None if mark.state == state else mark.switch_box
            found.append((f"switch {state}", mark.word, box, (mark.switch_box,)))
    if mark.state in ("back", "close"):
        found.append((mark.state, "", mark.target, (mark.target,)))
    return found


def phrase(kind: str, name: str, rng: np.random.Generator, held_out: bool) -> str:
    """Return an instruction in one of the phrases of its kind."""
    room, _, state = kind.partition(" ")
    choices = (HELD_OUT_PHRASES if held_out else PHRASES)[room]
    text = choices[int(rng.integers(len(choices)))]
    if state == "off":
        text = text.replace(" on", " off")
    return text.format(name)


def draw_tasks(
    screen: Screen, rng: np.random.Generator, count: int, held_out_phrases: bool = False
) -> list[Task]:
    """Return `count` tasks on a screen, in random order; few things are asked about twice."""
    found = [item for mark in screen.marks for item in mark_tasks(mark)]
    if not screen.has_dialog and rng.random() < 0.15:
        found.append(("close", "", None, ()))
    order: list[int] = []
    while len(order) < count:
        order += [int(index) for index in rng.permutation(len(found))]
    tasks = []
    for index in order[:count]:
        kind, name, target, focus = found[index]
        tasks.append(Task(kind, phrase(kind, name, rng, held_out_phrases), target, focus))
    return tasks


def draw_example(
    index: int, count: int, stream: int = 0, held_out_phrases: bool = False
) -> tuple[Screen, list[Task]]:
    """Return screen `index` of a stream with `count` tasks on it."""
    screen = draw_screen(index, stream)
    rng = np.random.default_rng([stream, index, 1])
    return screen, draw_tasks(screen, rng, count, held_out_phrases)


def held_out_examples(count: int, held_out_phrases: bool = False) -> list[tuple[Screen, Task]]:
    """Return `count` screens that training never draws, each with one task."""
    pairs = (draw_example(index, 1, HELD_OUT, held_out_phrases) for index in range(count))
    return [(screen, tasks[0]) for screen, tasks in pairs]
