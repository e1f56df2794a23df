"""What a row of a step costs on this machine, measured while it runs. Pure Python, no clock of its own."""

from collections import deque
from statistics import median

MEMORY = 32  # steps of each kind


class StepCost:
    """The seconds that a prompt's row adds to a step, from the newest steps with prompts and those without."""

    def __init__(self) -> None:
        self._with_prompt: deque[tuple[int, float]] = deque(maxlen=MEMORY)
        self._without: deque[tuple[int, float]] = deque(maxlen=MEMORY)
        self._row_s: float | None = None

    def add(self, rows: int, seconds: float, *, has_prompt: bool) -> None:
        """A step of `rows` rows took `seconds`."""
        (self._with_prompt if has_prompt else self._without).append((rows, seconds))
        if has_prompt:
            self._row_s = None

    @property
    def row_s(self) -> float | None:
        """Seconds per row, None before there was a prompt.

        The median slope from plain steps to those with a prompt, where long ones count for more.
        """
        if self._row_s is None and self._with_prompt:
            rows = median(rows for rows, _ in self._without) if self._without else 0
            base = median(s for _, s in self._without) if self._without else 0.0
            slopes = [((s - base) / (r - rows), r - rows) for r, s in self._with_prompt if r > rows]
            # A slope below zero is noise; what all of the step took per row is then the careful guess.
            rising = [(slope, weight) for slope, weight in slopes if slope > 0]
            self._row_s = _middle(rising or [(s / r, float(r)) for r, s in self._with_prompt])
        return self._row_s


def _middle(weighted: list[tuple[float, float]]) -> float:
    """The median of values with weights."""
    left = sum(weight for _, weight in weighted) / 2
    middle = 0.0
    for value, weight in sorted(weighted):
        middle = value
        left -= weight
        if left <= 0:
            break
    return middle
