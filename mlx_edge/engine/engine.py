"""The engine: many requests at once on one model, from asyncio or from threads.

    async with Engine("pocket") as engine:
        completion = await engine.generate("Once upon a time", max_tokens=64)
        async for piece in engine.stream("The dog"):
            print(piece.text, end="")

One thread of the engine's own loads the model and runs it (`worker.py`); this class is the handle on it, to be used
from any thread and from several event loops at once.
"""

import asyncio
import contextlib
import threading
import weakref
from collections.abc import AsyncGenerator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Self

from mlx_edge.engine.config import EngineConfig
from mlx_edge.engine.delivery import FutureSink, LoopSink, Sink, completion_of
from mlx_edge.engine.queue import RequestQueue
from mlx_edge.engine.request import Completion, Piece, Request
from mlx_edge.engine.served import Served, evaluate, open_model, serve
from mlx_edge.engine.stats import EngineStats, Listener
from mlx_edge.engine.worker import CLOSED, Worker
from mlx_edge.errors import EngineClosedError
from mlx_edge.models.interface import LanguageModel
from mlx_edge.text import Tokenizer

EXIT_S = 10.0  # how long the end of the process waits for a step to end


@dataclass(frozen=True)
class Ticket:
    """A request that was submitted."""

    key: int
    _worker: Worker

    def cancel(self) -> None:
        """End it within a step, with the finish reason "cancelled"; nothing where it has ended. From any thread."""
        self._worker.cancel(self.key)


class Engine:
    """Serves requests until it is closed; a context manager, async or not."""

    def __init__(
        self,
        model: str | tuple[LanguageModel[Any], Tokenizer] = "pocket",
        config: EngineConfig | None = None,
        **load_options: Any,
    ) -> None:
        """A model by name is loaded in the engine's thread, with `load`'s options; one that is handed over is shared.

        Returns at once: what loading fails with is raised to whoever waits, and to whoever comes later.
        """
        self._config = config or EngineConfig()
        self._name = model if isinstance(model, str) else model[0].config.model_type
        if isinstance(model, str):
            load = partial(open_model, model, self._config, load_options)
        else:
            if load_options:
                raise TypeError(f"a model that is loaded takes no {', '.join(load_options)}")
            evaluate(model[0])
            load = partial(serve, *model, self._config)
        self._worker = Worker(load, self._config)
        self._worker.thread.start()
        # Also at the end of the process: a thread that still computes then would end it badly.
        self._finalizer = weakref.finalize(self, _end, self._worker)

    async def ready(self) -> None:
        """Wait until the model is there. Raises what loading failed with."""
        await asyncio.to_thread(self.wait_ready)

    def wait_ready(self, timeout_s: float | None = None) -> None:
        """Wait until the model is there. Raises what loading failed with, TimeoutError."""
        if not self._worker.loaded.wait(timeout_s):
            raise TimeoutError(f"{self._name} is still being loaded after {timeout_s} s")
        self._worker.check()

    @property
    def config(self) -> EngineConfig:
        """As it was set up; memory may allow a smaller chunk."""
        return self._config

    @property
    def model_name(self) -> str:
        """The name that was loaded, or the type of a model that was handed over."""
        return self._name

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer. Waits for the model, as the next three."""
        return self._served.tokenizer

    @property
    def context_size(self) -> int:
        """The most positions of a request, prompt and answer."""
        return self._served.context_size

    @property
    def vocab_size(self) -> int:
        """Token ids are below it."""
        return self._served.model.config.vocab_size

    @property
    def image_token_id(self) -> int | None:
        """The token that is the place of an image in a prompt; None where the model reads text only."""
        tower = self._served.tower
        return None if tower is None else tower.config.image_token_id

    @property
    def _served(self) -> Served:
        self.wait_ready()
        served = self._worker.served
        if served is None:
            raise EngineClosedError(CLOSED)
        return served

    async def generate(self, request: Request | str, **options: Any) -> Completion:
        """The whole answer; `options` are fields of Request. A cancelled task cancels the request.

        Raises: what `submit` raises, and what the request failed with.
        """
        sink = LoopSink(self._worker.post)
        ticket = self.submit(Request.of(request, **options), sink, whole=True)
        try:
            return completion_of(await sink.get())
        except asyncio.CancelledError:
            ticket.cancel()
            raise

    def stream(self, request: Request | str, **options: Any) -> AsyncGenerator[Piece]:
        """The answer in pieces, one per step. Closing the generator, or leaving it, cancels the request.

        Raises: InvalidRequestError at once; with the first piece what `submit` raises.
        """
        return self._stream(Request.of(request, **options))

    async def _stream(self, request: Request) -> AsyncGenerator[Piece]:
        sink = LoopSink(self._worker.post)
        ticket = self.submit(request, sink)
        sink.cancel = ticket.cancel
        has_ended = False
        try:
            while not has_ended:
                piece = await sink.get()
                has_ended = piece.finish_reason is not None
                yield piece
        finally:
            if not has_ended:
                ticket.cancel()

    def enqueue(self, request: Request | str, **options: Any) -> Future[Completion]:
        """A future of the whole answer; cancelling it cancels the request. Raises: what `submit` raises."""
        sink = FutureSink()
        ticket = self.submit(Request.of(request, **options), sink, whole=True)

        def cancel(future: Future[Completion]) -> None:
            if future.cancelled():
                ticket.cancel()

        sink.future.add_done_callback(cancel)
        return sink.future

    def submit(self, request: Request, sink: Sink, *, whole: bool = False) -> Ticket:
        """Give the pieces of an answer to a sink, with `whole` all in one. From any thread; never waits.

        Raises: QueueFullError, EngineClosedError, or what loading failed with.
        """
        return Ticket(self._worker.submit(request, sink, whole=whole), self._worker)

    def create_async_queue(self, max_size: int) -> RequestQueue:
        """A queue of at most `max_size` requests that gives back answers as they come."""
        return RequestQueue(self.generate, max_size)

    def stats(self) -> EngineStats:
        """A snapshot."""
        return self._worker.recorder.stats()

    def watch(self, listener: Listener) -> None:
        """Tell a listener of steps and answers, in the engine's thread."""
        self._worker.recorder.watch(listener)

    def close(self, *, drain: bool = False, timeout_s: float | None = None) -> None:
        """Take no more requests, end those that there are (with `drain` let them end), and wait for the thread.

        A drain that takes longer than `timeout_s` is broken off: what is left fails with EngineClosedError. From any
        thread, also more than once.
        """
        worker = self._worker
        worker.close(drain=drain)
        if worker.thread is threading.current_thread():
            return  # a listener closes: the thread ends after this step
        worker.thread.join(timeout_s)
        if worker.thread.is_alive() and drain:
            worker.close(drain=False)
            worker.thread.join(EXIT_S)
        if not worker.thread.is_alive():
            self._finalizer.detach()

    async def aclose(self, *, drain: bool = False, timeout_s: float | None = None) -> None:
        """As `close`, without holding up the event loop."""
        await asyncio.to_thread(self.close, drain=drain, timeout_s=timeout_s)

    def __enter__(self) -> Self:
        self.wait_ready()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        await self.ready()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()


def _end(worker: Worker) -> None:
    """Nobody holds the engine any more, or the process ends."""
    with contextlib.suppress(RuntimeError):
        worker.close(drain=False)
        if worker.thread is not threading.current_thread():
            worker.thread.join(EXIT_S)
