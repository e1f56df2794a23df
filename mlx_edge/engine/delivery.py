"""How pieces reach whoever waits for them: futures, asyncio loops, plain threads.

Answers are made in the engine's thread; an asyncio loop is woken once per step, however many of its streams have
something new. Imports no MLX.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from typing import Protocol

from mlx_edge.engine.request import Completion, Piece


class Sink(Protocol):
    """Where the pieces of one answer go. Called in the engine's thread: it must be quick and must not raise."""

    def put(self, piece: Piece) -> None:
        """The next piece; the last one has a finish reason, and nothing follows."""

    def fail(self, error: Exception) -> None:
        """The request failed; nothing follows."""


def completion_of(piece: Piece) -> Completion:
    """The answer that a piece with everything is."""
    assert piece.finish_reason is not None
    assert piece.usage is not None
    return Completion(
        piece.text,
        piece.tokens,
        piece.logprobs,
        piece.finish_reason,
        piece.usage,
        piece.stop_text,
    )


class FutureSink:
    """Gives a whole answer to a future, unless that was cancelled."""

    def __init__(self) -> None:
        self.future: Future[Completion] = Future()

    def put(self, piece: Piece) -> None:
        """The answer."""
        with contextlib.suppress(InvalidStateError):
            self.future.set_result(completion_of(piece))

    def fail(self, error: Exception) -> None:
        """There is no answer."""
        with contextlib.suppress(InvalidStateError):
            self.future.set_exception(error)


class LoopPost:
    """Takes what a step brought to the asyncio loops that wait for it, one call for each loop.

    A sink that belongs to no step (a request is refused at once) is served by the same `flush`.
    """

    def __init__(self) -> None:
        self._letters: dict[
            asyncio.AbstractEventLoop, list[tuple[LoopSink, Piece | Exception]]
        ] = {}

    def send(self, sink: "LoopSink", letter: Piece | Exception) -> None:
        """To be delivered with the next `flush`. In the engine's thread."""
        self._letters.setdefault(sink.loop, []).append((sink, letter))

    def flush(self) -> None:
        """Deliver. In the engine's thread."""
        if not self._letters:
            return
        letters, self._letters = self._letters, {}
        for loop, batch in letters.items():
            try:
                loop.call_soon_threadsafe(_open_letters, batch)
            except RuntimeError:  # the loop is closed: nobody waits any more
                for sink, _ in batch:
                    sink.cancel()


def _open_letters(batch: "list[tuple[LoopSink, Piece | Exception]]") -> None:
    for sink, letter in batch:
        sink.take(letter)


class LoopSink:
    """The pieces of one answer, awaited in one asyncio loop."""

    def __init__(self, post: LoopPost) -> None:
        self.loop = asyncio.get_running_loop()
        self.cancel: Callable[[], None] = lambda: None  # what ends the request
        self._post = post
        self._letters: deque[Piece | Exception] = deque()
        self._waiter: asyncio.Future[None] | None = None

    def put(self, piece: Piece) -> None:
        """A piece, in the engine's thread."""
        self._post.send(self, piece)

    def fail(self, error: Exception) -> None:
        """The end, in the engine's thread."""
        self._post.send(self, error)

    def take(self, letter: Piece | Exception) -> None:
        """Here it is, in the loop's thread."""
        self._letters.append(letter)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def get(self) -> Piece:
        """The next piece. Raises what the request failed with."""
        while not self._letters:
            self._waiter = self.loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        letter = self._letters.popleft()
        if isinstance(letter, Exception):
            raise letter
        return letter
