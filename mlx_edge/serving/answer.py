"""The way of a request, the same for both routes: find the model, write the prompt, submit, answer.

What the objects on the wire look like is each route's `Answer`.
"""

import asyncio
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from typing import Any, ClassVar

from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse
from starlette.responses import Response

from mlx_edge.engine.request import Piece, Request, Usage
from mlx_edge.serving.generation import IGNORED_HEADER, describe_usage
from mlx_edge.serving.models import Models, Served
from mlx_edge.serving.sse import (
    DONE,
    HEARTBEAT,
    HEARTBEAT_S,
    EventStream,
    Submission,
    event,
    unless_vanished,
)
from mlx_edge.serving.wire import GenerationFields

# A decoded image can be 200 MB and take a second; other requests do not wait for it.
_DECODING = ThreadPoolExecutor(2, "images")
EARLY_S = 0.5  # an error within this time is a status code; a later one is an event


class Answer(ABC):
    """What one request is given, choice by choice."""

    prefix: ClassVar[str]  # of its id
    kinds: ClassVar[tuple[str, str]]  # `object` of a whole answer, and of an event

    def __init__(self, body: GenerationFields, served: Served) -> None:
        self.body, self.model = body, served.name
        self.id = f"{self.prefix}-{secrets.token_hex(12)}"
        self.created = int(time.time())
        self.num_choices = body.n or 1  # of a prompt
        self.requests: Sequence[Request] = ()
        self.ignored = body.ignored()

    @abstractmethod
    def whole(self, index: int, piece: Piece) -> dict[str, Any]:
        """The choice that a single piece holds."""

    @abstractmethod
    def advance(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        """The choices, as events have them, that a piece brings."""

    def open(self) -> list[dict[str, Any]]:
        """The choices with which the events begin."""
        return []

    def wrap(self, choices: list[dict[str, Any]], *, is_event: bool) -> dict[str, Any]:
        """The object around choices."""
        kind = self.kinds[is_event]
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return {**head, "choices": choices}

    def usage(self, usages: Sequence[Usage]) -> dict[str, Any]:
        """The figures of all choices."""
        return describe_usage(usages, self.num_choices)


MakeAnswer = Callable[[Served], Answer]


async def respond(
    http: HttpRequest, models: Models, body: GenerationFields, make: MakeAnswer
) -> Response:
    """The answer to a request; `make` writes the prompt and may take long.

    Raises: what is wrong with the request. ClientDisconnect when nobody listens any more.
    """
    held = AsyncExitStack()
    try:
        return await unless_vanished(http, _respond(models, body, make, held))
    except BaseException:
        await held.aclose()
        raise


async def _respond(
    models: Models, body: GenerationFields, make: MakeAnswer, held: AsyncExitStack
) -> Response:
    served = await held.enter_async_context(models.use(body.model))
    loop = asyncio.get_running_loop()
    answer = await loop.run_in_executor(_DECODING if body.has_images else None, make, served)
    submission = Submission(served.engine, answer.requests, whole=not body.stream)
    held.callback(submission.close)
    headers = {IGNORED_HEADER: ", ".join(sorted(answer.ignored))} if answer.ignored else {}
    if not body.stream:
        pieces = await _collect(submission)
        choices = [answer.whole(index, pieces[index]) for index in sorted(pieces)]
        usage = answer.usage([_usage(pieces[index]) for index in sorted(pieces)])
        await held.aclose()
        return JSONResponse(
            {**answer.wrap(choices, is_event=False), "usage": usage}, headers=headers
        )
    await submission.wait(EARLY_S)
    submission.raise_early()
    return EventStream(_events(answer, submission), held, headers)


async def _collect(submission: Submission) -> dict[int, Piece]:
    pieces: dict[int, Piece] = {}
    while not submission.is_over:
        pieces |= dict(await submission.take())
    return pieces


async def _events(answer: Answer, submission: Submission) -> AsyncIterator[bytes]:
    """All events; those of pieces that came together leave together."""
    usages: dict[int, Usage] = {}
    # Not before something is there: clients time the first token by the first event.
    events = [event(answer.wrap([choice], is_event=True)) for choice in answer.open()]
    while not submission.is_over:
        while not await submission.wait(HEARTBEAT_S):
            yield HEARTBEAT
        for index, piece in await submission.take():
            for choice in answer.advance(index, piece):
                events.append(event(answer.wrap([choice], is_event=True)))
            if piece.usage is not None:
                usages[index] = piece.usage
        if events:
            yield b"".join(events)
            events = []
    options = answer.body.stream_options
    if options is not None and options.include_usage:
        usage = answer.usage([usages[index] for index in sorted(usages)])
        yield event({**answer.wrap([], is_event=True), "usage": usage})
    yield DONE


def _usage(piece: Piece) -> Usage:
    assert piece.usage is not None
    return piece.usage
