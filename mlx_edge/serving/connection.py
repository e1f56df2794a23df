"""A connection of uvicorn that does not wait for ever: for a request's head, or for a client that does not read.

Broken HTTP is answered in the server's own words. Knows no routes; a body that stalls is `security.py`'s.
"""

import asyncio
import sys
from typing import ClassVar

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from mlx_edge.serving.errors import of_http
from mlx_edge.serving.security import MAX_HEAD_BYTES


class Connection(H11Protocol):
    """HTTP/1.1 with two more clocks. `make` a class with the timeouts wanted and hand it to uvicorn."""

    head_timeout_s: ClassVar[float] = 15.0
    write_timeout_s: ClassVar[float] = 30.0
    _head_clock: asyncio.TimerHandle | None = None
    _write_clock: asyncio.TimerHandle | None = None

    @classmethod
    def make(cls, head_timeout_s: float, write_timeout_s: float) -> "type[Connection]":
        """The class with these timeouts in seconds."""
        values = {"head_timeout_s": head_timeout_s, "write_timeout_s": write_timeout_s}
        return type("Connection", (cls,), values)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client may connect and then say nothing: the clock runs from here."""
        super().connection_made(transport)
        self._watch_head()

    def data_received(self, data: bytes) -> None:
        """The clock runs while a head is incomplete, and while an unwanted body is still coming in."""
        super().data_received(data)
        self._watch_head()

    def on_response_complete(self) -> None:
        """A pipelined request may have begun."""
        super().on_response_complete()
        self._stop_head_clock()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is left to wait for."""
        self._stop_head_clock()
        self.resume_writing()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """More is written than the client reads."""
        super().pause_writing()
        if self._write_clock is None:
            self._write_clock = self.loop.call_later(self.write_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        """The client reads again."""
        super().resume_writing()
        if self._write_clock is not None:
            self._write_clock.cancel()
            self._write_clock = None

    def timeout_keep_alive_handler(self) -> None:
        """Closing waits until all is written; a client that does not read would keep it open."""
        super().timeout_keep_alive_handler()
        if self._write_clock is None:
            self._write_clock = self.loop.call_later(self.write_timeout_s, self.transport.abort)

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP; called while h11's error is being handled."""
        if self.conn.our_state not in {h11.IDLE, h11.SEND_RESPONSE}:
            self.transport.abort()
            return
        error = sys.exception()
        is_head = getattr(error, "error_status_hint", 400) == 431
        message = f"the headers exceed {MAX_HEAD_BYTES >> 10} KiB" if is_head else str(error or msg)
        answer = of_http(431 if is_head else 400, f"not a valid HTTP request: {message}").response()
        for event in (
            h11.Response(status_code=answer.status_code, headers=answer.raw_headers, reason=b""),
            h11.Data(data=bytes(answer.body)),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        if self.cycle is not None:  # the request whose body broke off: its app must not answer too
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()

    def _watch_head(self) -> None:
        is_served = self.cycle is not None and not self.cycle.response_complete
        if is_served or self.transport.is_closing():
            self._stop_head_clock()
        elif self._head_clock is None:
            self._head_clock = self.loop.call_later(self.head_timeout_s, self._give_up)

    def _stop_head_clock(self) -> None:
        if self._head_clock is not None:
            self._head_clock.cancel()
            self._head_clock = None

    def _give_up(self) -> None:
        """Nobody waits for an answer to half a request: the connection ends."""
        self.transport.abort()
