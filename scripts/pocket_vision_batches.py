"""Screens and tasks as tensors: patches, tokens with their weights, and what each image token covers.

A row is one screenshot and several instructions with their answers behind it. Each instruction sees the
screenshot and itself, and has the RoPE positions that it would have alone, so that a row is worth as many
single prompts. It knows the tokenizer and the screens, not the model.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from pocket_vision_model import MERGE, PATCH
from pocket_vision_screens import (
    COLOURS,
    HEIGHT,
    SHAPES,
    WIDTH,
    WORDS,
    Box,
    Mark,
    Screen,
    thousandths,
)
from pocket_vision_tasks import Task, draw_example
from pocket_vision_tokens import END, IMAGE, prompt_text, token_id
from tokenizers import Tokenizer
from torch import Tensor

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
CELL = PATCH * MERGE
COLUMNS, ROWS = WIDTH // CELL, HEIGHT // CELL
CELLS = COLUMNS * ROWS
TASKS = 8
TASK_TOKENS = 22
COVERED = 60
"""Square pixels of a thing that make a cell one of its cells: about a letter."""
STATES = ("plain", "title", "chosen", "on", "off", "back", "close")
UNIT_WEIGHT, SYNTAX_WEIGHT = 0.05, 0.2
"""Of the last digit of a number, and of what is the same in all taps."""


@dataclass
class Batch:
    """B screens with TASKS tasks each; L is the length of a row."""

    patches: Tensor
    """(B, N, 588) float32"""
    tokens: Tensor
    """(B, L)"""
    weights: Tensor
    """(B, L): how much predicting the token behind this one counts."""
    focus: Tensor
    """(B, L, CELLS) bool: where a token of an answer should look; nowhere for others."""
    words: Tensor
    """(B, CELLS): 0 for none, then the number in WORDS + 1; alike for the next two."""
    shapes: Tensor
    colours: Tensor
    states: Tensor
    """(B, CELLS): number in STATES, -1 for cells of nothing."""
    digits: Tensor
    """(B, CELLS, 4): hundreds and tens of x, then of y, of the tap; -1 for cells of nothing."""


def make_patches(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return (N, 588) in the processor's order, one frame of each patch, normalised."""
    mean, std = np.array(MEAN, np.float32), np.array(STD, np.float32)
    scaled = (pixels.astype(np.float32) / 255 - mean) / std
    height, width, _ = pixels.shape
    squares = scaled.reshape(height // CELL, MERGE, PATCH, width // CELL, MERGE, PATCH, 3)
    patches: NDArray[np.float32] = squares.transpose(0, 3, 1, 4, 6, 2, 5).astype(np.float32)
    return patches.reshape(-1, 3 * PATCH * PATCH)


def cell_overlaps(box: Box) -> NDArray[np.int64]:
    """Return how many square pixels of a box each cell covers, (CELLS,)."""
    left, top, right, bottom = box
    x, y = np.arange(COLUMNS) * CELL, np.arange(ROWS) * CELL
    across = np.clip(np.minimum(x + CELL, right) - np.maximum(x, left), 0, None)
    down = np.clip(np.minimum(y + CELL, bottom) - np.maximum(y, top), 0, None)
    return np.outer(down, across).ravel()


def covering_cells(box: Box) -> NDArray[np.bool_]:
    """Return which cells cover a fair part of a box; at least the one that covers most."""
    overlaps = cell_overlaps(box)
    return overlaps >= min(COVERED, int(overlaps.max()))


class CellTruth:
    """What each cell of one screen covers; of several things the one it covers most of."""

    def __init__(self, screen: Screen) -> None:
        self.words = np.zeros(CELLS, np.int64)
        self.shapes = np.zeros(CELLS, np.int64)
        self.colours = np.zeros(CELLS, np.int64)
        self.states = np.full(CELLS, -1, np.int64)
        self.digits = np.full((CELLS, 4), -1, np.int64)
        self.best_word = np.zeros(CELLS, np.int64)
        self.best = np.zeros(CELLS, np.int64)
        for mark in screen.marks:
            self.add(mark)

    def add(self, mark: Mark) -> None:
        """Enter one mark."""
        for box, target in (
            (mark.word_box, mark.target),
            (mark.icon_box, mark.target),
            (mark.switch_box, mark.switch_box),
        ):
            if box is None or target is None:
                continue
            overlaps = cell_overlaps(box)
            mine = covering_cells(box) & (overlaps > self.best)
            self.best[mine] = overlaps[mine]
            self.states[mine] = STATES.index(mark.state)
            x, y = thousandths(target)
            self.digits[mine] = (x // 100, x // 10 % 10, y // 100, y // 10 % 10)
            if box is mark.icon_box and mark.shape is not None and mark.colour is not None:
                self.shapes[mine] = SHAPES.index(mark.shape) + 1
                self.colours[mine] = tuple(COLOURS).index(mark.colour) + 1
            if mark.word is not None and box is not mark.icon_box:
                named = covering_cells(box) & (overlaps > self.best_word)
                self.best_word[named] = overlaps[named]
                self.words[named] = WORDS.index(mark.word) + 1


class Rows:
    """Makes batches of any step, always the same."""

    def __init__(self, tokenizer: Tokenizer, tasks: int = TASKS) -> None:
        self.tokenizer, self.tasks = tokenizer, tasks
        head, tail = prompt_text("\0").split("\0")
        before, after = head.split(IMAGE)
        image = token_id(tokenizer, IMAGE)
        start = tokenizer.encode(before).ids
        self.image_start = len(start)
        self.prefix = [*start, *[image] * CELLS, *tokenizer.encode(after).ids]
        self.tail = tail
        self.length = len(self.prefix) + tasks * TASK_TOKENS
        self.turns, self.mask = self.positions(), self.allowed()
        digits = [tokenizer.encode(str(digit)).ids[0] for digit in range(10)]
        self.is_digit = np.isin(np.arange(tokenizer.get_vocab_size()), digits)

    def positions(self) -> Tensor:
        """Return the RoPE positions (3, L)."""
        start, behind = self.image_start, self.image_start + max(ROWS, COLUMNS)
        cells = np.indices((1, ROWS, COLUMNS)).reshape(3, -1) + start
        rest = len(self.prefix) - start - CELLS
        block = np.arange(TASK_TOKENS) + behind + rest
        line = np.concatenate([np.arange(rest) + behind, np.tile(block, self.tasks)])
        turns = np.concatenate(
            [np.tile(np.arange(start), (3, 1)), cells, np.tile(line, (3, 1))], axis=1
        )
        return torch.from_numpy(turns)

    def allowed(self) -> Tensor:
        """Return the mask (L, L): 0 where a token may look, -inf elsewhere."""
        task = (np.arange(self.length) - len(self.prefix)) // TASK_TOKENS
        seen = (task[None] < 0) | (task[None] == task[:, None])
        seen &= np.tri(self.length, dtype=bool)
        return torch.zeros(seen.shape).masked_fill(~torch.from_numpy(seen), float("-inf"))

    def encode_task(self, task: Task) -> tuple[list[int], list[float], int]:
        """Return ids, weights (of predicting the token behind each) and where the answer begins."""
        prompt = self.tokenizer.encode(task.instruction + self.tail).ids
        answer = self.tokenizer.encode(task.answer + END).ids
        ids = prompt + answer
        if len(ids) > TASK_TOKENS:
            raise ValueError(
                f"{task.instruction!r} needs {len(ids)} tokens, more than {TASK_TOKENS}"
            )
        weights = [0.0] * len(ids)
        number = 0
        for index, token in enumerate(answer):
            number = number + 1 if self.is_digit[token] else 0
            weight = SYNTAX_WEIGHT if number == 0 else 1.0
            weights[len(prompt) - 1 + index] = 1.0 if index == 0 else weight
            if number and (index + 1 == len(answer) or not self.is_digit[answer[index + 1]]):
                weights[len(prompt) - 1 + index] = UNIT_WEIGHT
        return ids, weights, len(prompt)

    def batch(self, start: int, count: int, stream: int = 0) -> Batch:
        """Return screens `start` to `start + count` of a stream."""
        pad = token_id(self.tokenizer, END)
        tokens = np.full((count, self.length), pad, np.int64)
        weights = np.zeros((count, self.length), np.float32)
        focus = np.zeros((count, self.length, CELLS), bool)
        tokens[:, : len(self.prefix)] = self.prefix
        patches, truths = [], []
        for row in range(count):
            screen, tasks = draw_example(start + row, self.tasks, stream)
            patches.append(make_patches(screen.pixels))
            truths.append(CellTruth(screen))
            for number, task in enumerate(tasks):
                at = len(self.prefix) + number * TASK_TOKENS
                ids, own, answer = self.encode_task(task)
                tokens[row, at : at + len(ids)] = ids
                weights[row, at : at + len(ids)] = own
                for box in task.focus:
                    focus[row, at + answer - 1 : at + len(ids) - 1] |= covering_cells(box)
        names = ("words", "shapes", "colours", "states", "digits")
        truth = [torch.from_numpy(np.stack([getattr(t, name) for t in truths])) for name in names]
        arrays = (np.stack(patches), tokens, weights, focus)
        return Batch(*(torch.from_numpy(array) for array in arrays), *truth)
