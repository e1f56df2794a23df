"""A queue for work in bulk: requests in, answers out as they come."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from mlx_edge.engine.request import Completion, Request

Generate = Callable[[Request], Awaitable[Completion]]


@dataclass(frozen=True)
class Answer:
    """A request of a queue, and what became of it."""

    request: Request
    result: Completion | Exception

    @property
    def completion(self) -> Completion:
        """The answer. Raises what the request failed with."""
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


class RequestQueue:
    """At most `max_size` requests that have not been fetched; to be used in one event loop."""

    def __init__(self, generate: Generate, max_size: int) -> None:
        self._generate = generate
        self._room = asyncio.Semaphore(max_size)
        self._tasks: set[asyncio.Task[None]] = set()
        self._answers: deque[Answer] = deque()
        self._num_open = 0  # put, not fetched
        self._has_answer = asyncio.Event()

    async def put(self, request: Request | str) -> None:
        """Begin a request; waits while the queue is full."""
        request = Request.of(request)
        self._num_open += 1
        try:
            await self._room.acquire()
        except asyncio.CancelledError:
            self._num_open -= 1
            raise
        task = asyncio.create_task(self._run(request))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def get(self) -> Answer:
        """The next answer that is there, in the order in which they came."""
        while not self._answers:
            self._has_answer.clear()
            await self._has_answer.wait()
        self._room.release()
        self._num_open -= 1
        return self._answers.popleft()

    def is_done(self) -> bool:
        """Whether all that was put has been fetched."""
        return self._num_open == 0

    async def _run(self, request: Request) -> None:
        result: Completion | Exception
        try:
            result = await self._generate(request)
        except Exception as error:
            result = error
        self._answers.append(Answer(request, result))
        self._has_answer.set()
