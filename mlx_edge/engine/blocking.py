"""The engine without asyncio, for scripts and threads."""

from collections.abc import Generator
from concurrent.futures import Future
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Self

from mlx_edge.engine.config import EngineConfig
from mlx_edge.engine.engine import Engine
from mlx_edge.engine.request import Completion, Piece, Request
from mlx_edge.engine.stats import EngineStats, Listener
from mlx_edge.models.interface import LanguageModel
from mlx_edge.text import Tokenizer


class _QueueSink:
    """Pieces for one thread that waits."""

    def __init__(self) -> None:
        self.letters: SimpleQueue[Piece | Exception] = SimpleQueue()

    def put(self, piece: Piece) -> None:
        """A piece."""
        self.letters.put(piece)

    def fail(self, error: Exception) -> None:
        """The end."""
        self.letters.put(error)


class BlockingEngine:
    """As `Engine`; its calls wait for what they return. To be used from any thread, and from several."""

    def __init__(
        self,
        model: str | tuple[LanguageModel[Any], Tokenizer] = "pocket",
        config: EngineConfig | None = None,
        **load_options: Any,
    ) -> None:
        self.engine = Engine(model, config, **load_options)

    def generate(self, request: Request | str, **options: Any) -> Completion:
        """The whole answer. Ctrl-C cancels the request."""
        future = self.enqueue(request, **options)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def stream(self, request: Request | str, **options: Any) -> Generator[Piece, None, None]:
        """The answer in pieces; closing the generator cancels the request."""
        return self._stream(Request.of(request, **options))

    def _stream(self, request: Request) -> Generator[Piece, None, None]:
        sink = _QueueSink()
        ticket = self.engine.submit(request, sink)
        has_ended = False
        try:
            while not has_ended:
                letter = sink.letters.get()
                if isinstance(letter, Exception):
                    has_ended = True
                    raise letter
                has_ended = letter.finish_reason is not None
                yield letter
        finally:
            if not has_ended:
                ticket.cancel()

    def enqueue(self, request: Request | str, **options: Any) -> Future[Completion]:
        """A future of the whole answer."""
        return self.engine.enqueue(request, **options)

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self.engine.tokenizer

    @property
    def context_size(self) -> int:
        """The most positions of a request, prompt and answer."""
        return self.engine.context_size

    def stats(self) -> EngineStats:
        """A snapshot."""
        return self.engine.stats()

    def watch(self, listener: Listener) -> None:
        """Tell a listener of steps and answers."""
        self.engine.watch(listener)

    def close(self, *, drain: bool = False, timeout_s: float | None = None) -> None:
        """As `Engine.close`."""
        self.engine.close(drain=drain, timeout_s=timeout_s)

    def __enter__(self) -> Self:
        self.engine.wait_ready()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
