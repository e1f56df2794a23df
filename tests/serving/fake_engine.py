"""An engine of the real one's shape that says what it is told to: for errors, slow answers and clients that leave."""

import threading
import time
from dataclasses import fields
from typing import Any

from mlx_edge.engine.config import EngineConfig
from mlx_edge.engine.request import FinishReason, Piece, Request, Usage
from mlx_edge.engine.stats import EngineStats
from mlx_edge.text import Tokenizer, load_tokenizer
from mlx_edge.weights.hub import find_model


class FakeTicket:
    def __init__(self) -> None:
        self.is_cancelled = threading.Event()

    def cancel(self) -> None:
        self.is_cancelled.set()


class FakeEngine:
    """Writes `words` one by one, `delay_s` apart; `error` is raised by submit, `late_error` after the first word."""

    def __init__(
        self,
        words: list[str] | None = None,
        *,
        delay_s: float = 0.0,
        error: Exception | None = None,
        late_error: Exception | None = None,
        context_size: int = 512,
    ) -> None:
        self.words = ["Once", " upon", " a", " time", "."] if words is None else words
        self.delay_s, self.error, self.late_error = delay_s, error, late_error
        self.tokenizer: Tokenizer = load_tokenizer(find_model("pocket", revision=None))
        self.context_size, self.vocab_size = context_size, self.tokenizer.vocab_size
        self.image_token_id: int | None = None
        self.config, self.model_name = EngineConfig(), "fake"
        self.requests: list[Request] = []
        self.tickets: list[FakeTicket] = []
        self.listeners: list[Any] = []
        self.running, self.is_closed = 0, False

    def wait_ready(self, timeout_s: float | None = None) -> None:
        """It is."""

    def submit(self, request: Request, sink: Any, *, whole: bool = False) -> FakeTicket:
        if self.error is not None:
            raise self.error
        ticket = FakeTicket()
        self.requests.append(request)
        self.tickets.append(ticket)
        self.running += 1
        threading.Thread(target=self._write, args=(request, sink, ticket, whole)).start()
        return ticket

    def _write(self, request: Request, sink: Any, ticket: FakeTicket, whole: bool) -> None:
        begun, text, count, first = time.monotonic(), "", 0, 0.0
        reason: FinishReason = "stop"
        for word in self.words:
            if (
                ticket.is_cancelled.wait(self.delay_s)
                if self.delay_s
                else ticket.is_cancelled.is_set()
            ):
                reason = "cancelled"
                break
            if count == request.max_tokens:
                reason = "length"
                break
            text, count = text + word, count + 1
            first = first or time.monotonic() - begun
            if not whole:
                sink.put(Piece(word, (count,)))
            if self.late_error is not None:
                self.running -= 1
                sink.fail(self.late_error)
                return
        passed = time.monotonic() - begun
        usage = Usage(len(request.prompt), count, 0, "nothing was stored yet", 0.0, first, passed)
        self.running -= 1
        sink.put(Piece(text if whole else "", (), (), reason, usage))

    def stats(self) -> EngineStats:
        values = {f.name: 0 for f in fields(EngineStats)}
        return EngineStats(**{**values, "running": self.running, "row_exactness": None})

    def watch(self, listener: Any) -> None:
        self.listeners.append(listener)

    def close(self, *, drain: bool = False, timeout_s: float | None = None) -> None:
        self.is_closed = True
        for ticket in self.tickets:
            ticket.cancel()

    async def aclose(self, *, drain: bool = False, timeout_s: float | None = None) -> None:
        self.close()
