"""Draws phone screens and asks about them: the data that `pocket-vision` is trained and scored on.

A screen is a picture of 168 x 336 pixels and a list of marks: what can be named on it, where it stands,
where a finger must land. Layouts, words, icons, colours and states are drawn from a seeded generator, so
that a number stands for a screen; training and held-out screens come from different seeds. Everything
stands on a grid of 7 pixels, half a patch. It knows no tokens and no model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT = 168, 336
GRID = 7
GLYPH_WIDTH, GLYPH_HEIGHT = 6, 11
HELD_OUT = 1
"""The stream of the screens that no training sees; 0 is training's."""

WORDS = tuple(
    """Settings Camera Photos Music Mail Maps Clock Phone Files Notes Store News Weather Calendar
    Wallet Contacts Games Books Health Videos Wi-Fi Bluetooth Display Sound Battery Storage Privacy
    Security Language Keyboard Location Account Backup Updates About Help Search Share Save Send
    Cancel Delete Accept Skip""".split()
)
SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "diamond", "ring")
COLOURS = {
    "red": (214, 40, 40),
    "orange": (245, 130, 20),
    "yellow": (240, 205, 20),
    "green": (40, 160, 60),
    "blue": (35, 95, 220),
    "purple": (135, 50, 175),
    "pink": (245, 120, 180),
    "brown": (120, 75, 40),
}
PAPERS = ((255, 255, 255), (242, 243, 247), (250, 245, 235), (235, 245, 240), (236, 240, 252))
NIGHTS = ((24, 26, 32), (36, 32, 44), (20, 34, 40))
ACCENT = (60, 140, 255)

Colour = tuple[int, int, int]
Box = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels; right and bottom are outside."""


@dataclass(frozen=True)
class Mark:
    """One thing on a screen that an instruction can name."""

    target: Box
    """Where a tap counts."""
    word: str | None = None
    word_box: Box | None = None
    shape: str | None = None
    colour: str | None = None
    icon_box: Box | None = None
    switch_box: Box | None = None
    state: str = "plain"
    """plain, title, chosen, on, off, back or close."""

    @property
    def centre(self) -> tuple[int, int]:
        """The middle of the target, in thousandths of the screen."""
        return thousandths(self.target)


@dataclass
class Screen:
    """A picture and what is on it; `ink` is the colour of text."""

    image: Image.Image
    ink: Colour
    paper: Colour
    marks: list[Mark] = field(default_factory=list)
    has_dialog: bool = False

    @property
    def pixels(self) -> np.ndarray:
        """The picture as (H, W, 3) uint8."""
        return np.asarray(self.image)


def thousandths(box: Box) -> tuple[int, int]:
    """Return the middle of a box as the x and y of an action, 0 to 999."""
    left, top, right, bottom = box
    return (500 * (left + right)) // WIDTH, (500 * (top + bottom)) // HEIGHT


def ink_on(colour: Colour) -> Colour:
    """Return black or white, whichever can be read on a colour."""
    return (255, 255, 255) if sum(colour) < 400 else (0, 0, 0)


def shape_points(shape: str, box: Box) -> list[tuple[float, float]]:
    """Return the corners of a shape that is a polygon."""
    left, top, right, bottom = box
    middle_x, middle_y = (left + right - 1) / 2, (top + bottom - 1) / 2
    radius = (right - left - 1) / 2
    if shape == "triangle":
        return [(middle_x, top), (right - 1, bottom - 2), (left, bottom - 2)]
    if shape == "diamond":
        return [(middle_x, top), (right - 1, middle_y), (middle_x, bottom - 1), (left, middle_y)]
    points = []
    for index in range(10):
        reach = radius if index % 2 == 0 else radius * 0.42
        angle = math.pi * index / 5
        points.append((middle_x + reach * math.sin(angle), middle_y - reach * math.cos(angle)))
    return points


def draw_shape(draw: ImageDraw.ImageDraw, shape: str, colour: Colour, box: Box) -> None:
    """Draw one of SHAPES into a square box."""
    left, top, right, bottom = box[0], box[1], box[2] - 1, box[3] - 1
    size = right - left
    if shape == "circle":
        draw.ellipse((left, top, right, bottom), fill=colour)
    elif shape == "ring":
        draw.ellipse((left, top, right, bottom), outline=colour, width=max(3, size // 5))
    elif shape == "square":
        draw.rectangle((left + 1, top + 1, right - 1, bottom - 1), fill=colour)
    elif shape == "cross":
        third = size // 3
        draw.rectangle((left + third, top, right - third, bottom), fill=colour)
        draw.rectangle((left, top + third, right, bottom - third), fill=colour)
    elif shape == "heart":
        half = size / 2
        draw.ellipse((left, top + 1, left + half, top + 1 + half), fill=colour)
        draw.ellipse((right - half, top + 1, right, top + 1 + half), fill=colour)
        low = top + 1 + half * 0.7
        draw.polygon([(left + 1, low), (right - 1, low), (left + half, bottom)], fill=colour)
    else:
        draw.polygon(shape_points(shape, box), fill=colour)


class Painter:
    """Puts things on a screen and notes them as marks."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        night = rng.random() < 0.3
        self.paper = self.pick(NIGHTS if night else PAPERS)
        self.ink = (240, 240, 240) if night else (20, 20, 24)
        self.card = (52, 56, 66) if night else (255, 255, 255)
        self.line = (90, 92, 100) if night else (200, 202, 208)
        self.image = Image.new("RGB", (WIDTH, HEIGHT), self.paper)
        self.draw = ImageDraw.Draw(self.image)
        self.font = ImageFont.load_default_imagefont()
        self.marks: list[Mark] = []
        self.words = [str(word) for word in rng.permutation(WORDS)]
        pairs = [(shape, colour) for shape in SHAPES for colour in COLOURS]
        self.icons = [pairs[index] for index in rng.permutation(len(pairs))]
        self.draw.rectangle((0, 0, WIDTH, GRID - 1), fill=self.line)

    def pick(self, choices: Sequence[Colour]) -> Colour:
        """Return one of the colours."""
        return choices[int(self.rng.integers(len(choices)))]

    def between(self, low: int, high: int) -> int:
        """Return low to high, both possible."""
        return int(self.rng.integers(low, high + 1))

    def write(self, word: str, left: int, top: int, ink: Colour | None = None) -> Box:
        """Write a word and return its box."""
        self.draw.text((left, top), word, fill=ink or self.ink, font=self.font)
        return (left, top, left + GLYPH_WIDTH * len(word), top + GLYPH_HEIGHT)

    def paint_icon(self, left: int, top: int, size: int) -> tuple[str, str, Box]:
        """Draw the next icon of this screen; no two of a screen are alike."""
        shape, colour = self.icons.pop()
        box = (left, top, left + size, top + size)
        draw_shape(self.draw, shape, COLOURS[colour], box)
        return shape, colour, box

    def frame(self, box: Box, radius: int = 5) -> None:
        """Draw the frame that says: chosen."""
        left, top, right, bottom = box
        self.draw.rounded_rectangle(
            (left + 1, top + 1, right - 2, bottom - 2), radius, outline=ACCENT, width=3
        )

    def title(self) -> int:
        """Draw the bar at the top and return where the content begins."""
        bottom = 5 * GRID
        colour = self.pick(tuple(COLOURS.values()))
        self.draw.rectangle((0, GRID, WIDTH, bottom - 1), fill=colour)
        ink = ink_on(colour)
        left = 2 * GRID
        if self.rng.random() < 0.7:
            tip = 3 * GRID
            self.draw.line((2 * GRID, tip, 4 * GRID - 1, tip), fill=ink, width=3)
            self.draw.line((2 * GRID + 6, tip - 7, 2 * GRID, tip), fill=ink, width=3)
            self.draw.line((2 * GRID + 6, tip + 7, 2 * GRID, tip), fill=ink, width=3)
            target = (0, GRID, 6 * GRID, bottom)
            icon = (2 * GRID, 2 * GRID, 4 * GRID, 4 * GRID)
            self.marks.append(Mark(target, icon_box=icon, state="back"))
            left = 6 * GRID
        word = self.words.pop()
        box = self.write(word, left, 2 * GRID + 1, ink)
        self.marks.append(Mark((left, GRID, WIDTH, bottom), word, box, state="title"))
        return bottom

    def tile(self, left: int, top: int) -> None:
        """Draw an app: an icon on a card, a word under it; 8 x 8 grid steps."""
        card = (left + 2 * GRID, top, left + 6 * GRID, top + 4 * GRID)
        chosen = self.rng.random() < 0.08
        self.draw.rounded_rectangle(
            (card[0] - 3, card[1] - 3, card[2] + 2, card[3] + 2), 6, fill=self.card
        )
        shape, colour, icon = self.paint_icon(card[0], card[1], 4 * GRID)
        word = self.words.pop()
        shift = (8 * GRID - GLYPH_WIDTH * len(word)) // 2
        box = self.write(word, left + shift, top + 5 * GRID - 1)
        target = (left, top - 3, left + 8 * GRID, top + 7 * GRID)
        if chosen:
            self.frame(target)
        state = "chosen" if chosen else "plain"
        self.marks.append(Mark(target, word, box, shape, colour, icon, state=state))

    def row(self, top: int, height: int, icons: bool, switches: bool) -> None:
        """Draw a line of a list: a word, perhaps an icon before it and a switch behind it."""
        target = (0, top, WIDTH, top + height)
        chosen = not switches and self.rng.random() < 0.08
        if chosen:
            self.frame(target)
        self.draw.line((GRID, top + height - 1, WIDTH - GRID, top + height - 1), fill=self.line)
        mark = Mark(target, state="chosen" if chosen else "plain")
        left = 2 * GRID
        if icons:
            shape, colour, icon = self.paint_icon(left, top + (height - 21) // 2, 21)
            mark = replace(mark, shape=shape, colour=colour, icon_box=icon)
            left += 4 * GRID
        word = self.words.pop()
        mark = replace(mark, word=word, word_box=self.write(word, left, top + (height - 11) // 2))
        if switches and self.rng.random() < 0.8:
            on = self.rng.random() < 0.5
            box = (19 * GRID, top + (height - 14) // 2, 23 * GRID, top + (height - 14) // 2 + 14)
            edge = (box[0], box[1], box[2] - 1, box[3] - 1)
            self.draw.rounded_rectangle(edge, 7, fill=(50, 180, 90) if on else (150, 150, 156))
            knob = box[2] - 14 if on else box[0]
            self.draw.ellipse((knob + 1, box[1] + 1, knob + 12, box[1] + 12), fill=(255, 255, 255))
            mark = replace(mark, switch_box=box, state="on" if on else "off")
        self.marks.append(mark)

    def button(self, left: int, top: int, width: int, height: int) -> None:
        """Draw a filled button with a word on it."""
        target = (left, top, left + width, top + height)
        colour = self.pick(tuple(COLOURS.values()))
        self.draw.rounded_rectangle((left, top, left + width - 1, top + height - 1), 7, fill=colour)
        word = self.words.pop()
        shift = (width - GLYPH_WIDTH * len(word)) // 2
        box = self.write(word, left + shift, top + (height - 11) // 2, ink_on(colour))
        self.marks.append(Mark(target, word, box))

    def loose_icon(self, left: int, top: int, size: int) -> None:
        """Draw an icon that stands alone."""
        target = (left - 3, top - 3, left + size + 3, top + size + 3)
        shape, colour, icon = self.paint_icon(left, top, size)
        chosen = self.rng.random() < 0.08
        if chosen:
            self.frame((left - 6, top - 6, left + size + 6, top + size + 6))
        state = "chosen" if chosen else "plain"
        self.marks.append(Mark(target, shape=shape, colour=colour, icon_box=icon, state=state))

    def home(self) -> None:
        """Draw apps in three columns, some places free."""
        top = self.between(2, 4) * GRID
        while top + 7 * GRID <= HEIGHT:
            for column in range(3):
                if self.rng.random() < 0.75:
                    self.tile(column * 8 * GRID, top)
            top += self.between(8, 10) * GRID

    def listing(self) -> None:
        """Draw a title and a list."""
        top = self.title() + self.between(0, 3) * GRID
        icons, switches = self.rng.random() < 0.5, self.rng.random() < 0.6
        height = self.between(5, 7) * GRID
        for _ in range(self.between(4, 8)):
            if top + height > HEIGHT:
                break
            self.row(top, height, icons, switches)
            top += height

    def panel(self) -> None:
        """Draw buttons and loose icons in lines of random heights."""
        top = self.title() if self.rng.random() < 0.6 else GRID
        top += self.between(1, 4) * GRID
        while top + 5 * GRID <= HEIGHT:
            if self.rng.random() < 0.5:
                self.button_line(top)
            else:
                self.icon_line(top)
            top += self.between(6, 8) * GRID

    def button_line(self, top: int) -> None:
        """Draw one or two buttons beside each other."""
        height = self.between(4, 5) * GRID
        if self.rng.random() < 0.5:
            width = self.between(10, 20) * GRID
            self.button(self.between(1, (WIDTH - width) // GRID - 1) * GRID, top, width, height)
            return
        for left in (1, 13):
            width = self.between(8, 10) * GRID
            self.button((left + self.between(0, 1)) * GRID, top, width, height)

    def icon_line(self, top: int) -> None:
        """Draw two to four icons."""
        count = self.between(2, 4)
        pitch = 24 // count
        for index in range(count):
            size = self.between(3, 4) * GRID
            free = pitch - size // GRID - 1
            self.loose_icon((index * pitch + self.between(1, max(1, free))) * GRID, top, size)

    def dialog(self) -> None:
        """Cover the screen with a dialog; nothing behind it can be reached."""
        shade = Image.new("RGB", self.image.size, (0, 0, 0))
        self.image.paste(Image.blend(self.image, shade, 0.55))
        self.marks.clear()
        left, width = self.between(1, 3) * GRID, 20 * GRID
        top, height = self.between(8, 24) * GRID, self.between(15, 18) * GRID
        edge = (left, top, left + width - 1, top + height - 1)
        self.draw.rounded_rectangle(edge, 7, fill=self.card, outline=self.line)
        self.write(self.words.pop(), left + 2 * GRID, top + 2 * GRID)
        corner = (left + 16 * GRID, top + GRID, left + 19 * GRID, top + 4 * GRID)
        a, b, c, d = corner[0] + 4, corner[1] + 4, corner[2] - 5, corner[3] - 5
        self.draw.line((a, b, c, d), fill=self.ink, width=3)
        self.draw.line((a, d, c, b), fill=self.ink, width=3)
        self.marks.append(Mark(corner, icon_box=corner, state="close"))
        below = top + height - 6 * GRID
        for place in (1, 11):
            self.button(left + place * GRID, below, 8 * GRID, 4 * GRID)


def draw_screen(index: int, stream: int = 0) -> Screen:
    """Return screen number `index` of a stream."""
    rng = np.random.default_rng([stream, index])
    painter = Painter(rng)
    (painter.home, painter.listing, painter.panel)[int(rng.integers(3))]()
    has_dialog = bool(rng.random() < 0.12)
    if has_dialog:
        painter.dialog()
    return Screen(painter.image, painter.ink, painter.paper, painter.marks, has_dialog)
