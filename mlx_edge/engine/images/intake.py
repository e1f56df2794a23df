"""Images of requests on their way in: from files to patches and places in the prompt, beside the engine's thread.

Patches are large and wait with their requests, so there is room for few at a time: who finds none waits. Touches no
arrays of MLX, and knows nothing of towers and steps.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakValueDictionary

from mlx_edge.engine.request import Request
from mlx_edge.models.interface import LanguageModel, check_reads_images, find_tower
from mlx_edge.models.vision.processor import Patches
from mlx_edge.models.vision.prompt import ImagePrompt
from mlx_edge.models.vision.reading import read_images


def place_request_images(
    request: Request,
    tokens: Sequence[int],
    model: LanguageModel[Any],
    context_size: int,
    max_pixels: int | None = None,
    room: "PatchRoom | None" = None,
) -> ImagePrompt | None:
    """The prompt with the request's images in their places; None for one of text alone.

    `max_pixels` is the engine's limit beside the request's own. What is in the `room` already is not made again.

    Raises: InvalidRequestError for an image that cannot be read, for more or fewer images than places, for a prompt
    that is then longer than the context, and for a model without a tower.
    """
    check_reads_images(model, bool(request.images))
    tower = find_tower(model)
    if tower is None:
        return None
    limits = [limit for limit in (request.max_pixels, max_pixels) if limit is not None]
    return read_images(
        tokens,
        request.images,
        tower,
        max_pixels=min(limits, default=None),
        context_size=context_size,
        known=None if room is None else room.patches,
    )


class PatchRoom:
    """Room for the patches of requests that are not encoded yet, `limit_bytes` and the last request's beyond them."""

    def __init__(self, limit_bytes: int) -> None:
        # By file and max_pixels: choices of one request, and an image shown twice, have the same.
        self.patches: WeakValueDictionary[tuple[bytes, int | None], Patches] = WeakValueDictionary()
        self._limit_bytes = limit_bytes
        self._held = 0
        self._is_closed = False
        self._changed = threading.Condition()

    @property
    def held(self) -> int:
        """Bytes that are there."""
        return self._held

    def wait(self) -> None:
        """Until there is room. In a thread that has nothing else to do."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or self._held < self._limit_bytes)

    def hold(self, nbytes: int) -> "PatchHold":
        """So many are there until they are given back."""
        with self._changed:
            self._held += nbytes
        return PatchHold(self, nbytes)

    def give_back(self, nbytes: int) -> None:
        """So many are not there any more."""
        with self._changed:
            self._held -= nbytes
            self._changed.notify_all()

    def close(self) -> None:
        """Nobody waits any more."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()


@dataclass
class PatchHold:
    """What one request holds of the room."""

    _room: PatchRoom = field(repr=False)
    nbytes: int

    def release(self) -> None:
        """Give it back, once."""
        nbytes, self.nbytes = self.nbytes, 0
        if nbytes:
            self._room.give_back(nbytes)
