"""How an answer leaves: pieces from the engine's thread, as one JSON object or as server-sent events.

Knows neither what is generated nor for whom; what a stream holds open is closed when it ends, however it ends.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import AsyncExitStack, suppress
from typing import Any, Protocol, TypeVar

from fastapi import Request as HttpRequest
from pydantic_core import to_json
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mlx_edge.engine.request import Piece, Request
from mlx_edge.errors import EngineClosedError
from mlx_edge.serving.errors import of_exception

MAX_WAITING = 4096  # pieces that a client has not read; more cancel its request
HEARTBEAT_S = 10.0
HEARTBEAT = b": waiting\n\n"  # a comment, which no client shows
DONE = b"data: [DONE]\n\n"
Result = TypeVar("Result")


class Ticket(Protocol):
    """A submitted request."""

    def cancel(self) -> None:
        """End it."""


class Submitter(Protocol):
    """What takes requests: an Engine."""

    def submit(self, request: Request, sink: Any, *, whole: bool = False) -> Ticket:
        """Take one."""


class _Slot:
    """The sink of one choice. Its methods are called by the engine's thread."""

    def __init__(self, submission: "Submission", index: int) -> None:
        self._submission, self._index = submission, index

    def put(self, piece: Piece) -> None:
        self._submission.put(self._index, piece)

    def fail(self, error: Exception) -> None:
        self._submission.put(self._index, error)


class Submission:
    """The requests of one answer, submitted together; closing it cancels those that still run."""

    def __init__(self, engine: Submitter, requests: Sequence[Request], *, whole: bool) -> None:
        """Submit them. Raises: what the engine raises, after the others were cancelled."""
        self._loop = asyncio.get_running_loop()
        self._items: deque[tuple[int, Piece | Exception]] = deque()
        self._has_items = asyncio.Event()
        self._is_woken = False
        self._tickets: list[Ticket] = []
        self._num_open = len(requests)
        try:
            for index, request in enumerate(requests):
                self._tickets.append(engine.submit(request, _Slot(self, index), whole=whole))
        except BaseException:
            self.close()
            raise

    def put(self, index: int, item: Piece | Exception) -> None:
        """Keep what came and wake the reader, once for all that waits. From any thread."""
        self._items.append((index, item))
        if len(self._items) > MAX_WAITING:
            self.close()
        if not self._is_woken:
            self._is_woken = True
            with suppress(RuntimeError):  # the loop is closed: nobody reads any more
                self._loop.call_soon_threadsafe(self._has_items.set)

    async def wait(self, timeout_s: float) -> bool:
        """Whether something is there within so many seconds."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._has_items.wait()
        except TimeoutError:
            return False
        return True

    def raise_early(self) -> None:
        """Raise the error that came first, if one did: there is still a status code to give."""
        if self._items and isinstance(item := self._items[0][1], Exception):
            raise item

    @property
    def is_over(self) -> bool:
        """Whether every choice has ended."""
        return self._num_open == 0

    async def take(self) -> list[tuple[int, Piece]]:
        """All that is waiting, at least one piece. Raises: the first error of a choice."""
        found: list[tuple[int, Piece]] = []
        while not found:
            await self._has_items.wait()
            self._has_items.clear()
            self._is_woken = False  # before reading, so that what comes from here on wakes again
            while self._items:
                index, item = self._items.popleft()
                if isinstance(item, Exception):
                    raise item
                if item.finish_reason == "cancelled":
                    raise EngineClosedError("the request was cancelled; send it again")
                self._num_open -= item.finish_reason is not None
                found.append((index, item))
        return found

    def close(self) -> None:
        """Cancel what still runs. From any thread."""
        for ticket in self._tickets:
            ticket.cancel()


def event(value: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + to_json(value) + b"\n\n"


class EventStream(Response):
    """Events as they come. An error in the middle is the last event; a client that leaves ends it."""

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncIterator[bytes], held: AsyncExitStack, headers: dict[str, str]
    ) -> None:
        super().__init__(None, headers={**headers, "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._held = events, held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all; whatever happens, what was held open is closed."""
        async with self._held:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            writing = asyncio.ensure_future(self._write(send))
            await _first(writing, receive)

    async def _write(self, send: Send) -> None:
        try:
            async for data in self._events:
                await send({"type": "http.response.body", "body": data, "more_body": True})
        except Exception as error:
            data = event(of_exception(error).body())
            await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def unless_vanished(request: HttpRequest, work: Awaitable[Result]) -> Result:
    """What `work` returns; it is cancelled when the client leaves.

    Raises: ClientDisconnect, to which nobody listens any more.
    """
    task = asyncio.ensure_future(work)
    if not await _first(task, request.receive):
        raise ClientDisconnect
    return task.result()


async def _first(task: "asyncio.Future[Any]", receive: Receive) -> bool:
    """Whether the task ended before the client left; a task that did not is cancelled. Its error is raised."""
    leaving = asyncio.ensure_future(_leave(receive))
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        is_done = task.done()
    finally:
        for each in (leaving, task):
            if not each.done():
                each.cancel()
                with suppress(asyncio.CancelledError):
                    await each
    if is_done:
        task.result()
    return is_done


async def _leave(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
