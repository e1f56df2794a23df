"""Scores `pocket-vision` on screens that its training never draws, through this project's own runtime.

A tap counts when the pixel that the agent would touch lies in the target. Asked by `eval_pocket.py`.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from typing import Any

from pocket_vision_screens import HEIGHT, WIDTH, Box
from pocket_vision_tasks import FINISH, Task, held_out_examples
from tqdm import tqdm

TAP = re.compile(r'do\(action="Tap", element=\[(\d{1,3}),(\d{1,3})\]\)')
MAX_TOKENS = 16


def tap_pixel(answer: str) -> tuple[int, int] | None:
    """Return the pixel of a screen that a tap touches; None for any other answer."""
    found = TAP.fullmatch(answer)
    if found is None:
        return None
    x, y = map(int, found.groups())
    return x * WIDTH // 1000, y * HEIGHT // 1000


def is_inside(pixel: tuple[int, int], box: Box) -> bool:
    """Return whether a box covers a pixel."""
    return box[0] <= pixel[0] < box[2] and box[1] <= pixel[1] < box[3]


def is_right(task: Task, answer: str) -> bool:
    """Return whether an answer does what the task asks for."""
    if task.target is None:
        return answer == FINISH
    pixel = tap_pixel(answer)
    return pixel is not None and is_inside(pixel, task.target)


def interval(right: int, count: int) -> list[float]:
    """Return the 95 % interval of a share (Wilson 1927)."""
    z = 1.96
    share, spread = right / count, z * z / count
    middle = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / count + spread / count / 4) / (1 + spread)
    return [round(middle - half, 4), round(middle + half, 4)]


class Tally:
    """Counts of right answers by kind of task."""

    def __init__(self) -> None:
        self.marks: dict[str, list[bool]] = defaultdict(list)

    def add(self, task: Task, right: bool) -> None:
        """Count one answer."""
        self.marks["finishes" if task.target is None else "targets"].append(right)
        self.marks[f"{task.kind}, {'done' if task.target is None else 'tap'}"].append(right)

    def report(self) -> dict[str, Any]:
        """Return the shares; `tap_accuracy` and `targets` are what other tools read."""
        taps, finishes = self.marks.pop("targets"), self.marks.pop("finishes")
        return {
            "tap_accuracy": sum(taps) / len(taps),
            "targets": len(taps),
            "tap_interval": interval(sum(taps), len(taps)),
            "finish_accuracy": sum(finishes) / len(finishes),
            "finishes": len(finishes),
            "per_kind": {kind: [sum(m), len(m)] for kind, m in sorted(self.marks.items())},
        }


def evaluate_vision(path: str, count: int) -> dict[str, Any]:
    """Return the report on `count` held-out screens, one task each, and on as many with new phrases."""
    from mlx_edge.decoding.multimodal import MultimodalGenerator

    generator = MultimodalGenerator(path)
    reports = []
    for held_out_phrases in (False, True):
        tally = Tally()
        examples = held_out_examples(count, held_out_phrases)
        for screen, task in tqdm(examples, desc="tapping", unit="screen"):
            answer = generator.generate(task.instruction, [screen.pixels], max_tokens=MAX_TOKENS)
            tally.add(task, is_right(task, answer))
        reports.append(tally.report())
    return {**reports[0], "held_out_phrases": reports[1]}
