"""One streamed completion over raw HTTP, each event stamped as it arrives: the exact client of bench/serving.py.

A connection and an asyncio protocol per request, no HTTP library: what the client costs is time that a server on the
same cores does not have. A line of the stream is searched, not parsed; the usage and the text are read when the request
is over. Knows nothing of loops, rates and servers.
"""

import asyncio
import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# A choice that brings text; the last event of a stream, and a reasoning model's first, bring none.
_TEXT = re.compile(rb'"(?:text|content)"\s*:\s*"(?!")')
_USAGE = re.compile(rb'"usage"\s*:\s*\{')
_FINISH = re.compile(rb'"finish_reason"\s*:\s*"')
_ERROR = re.compile(rb'^\s*\{\s*"error"\s*:')
_LENGTH = re.compile(rb"\r\ncontent-length:\s*(\d+)", re.IGNORECASE)
_CHUNKED = re.compile(rb"\r\ntransfer-encoding:\s*chunked", re.IGNORECASE)


@dataclass
class Outcome:
    """What became of one request. Times are of `time.perf_counter_ns`."""

    begin_ns: int  # when it was sent, or in an open loop when it was due
    end_ns: int = 0
    times_ns: list[int] = field(default_factory=list)  # of each event that brought text
    status: int = 0
    is_done: bool = False  # the stream said [DONE] and its framing was whole
    is_cut: bool = False  # ended by us, as the run was over
    error: str | None = None
    finish_reason: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    text: str | None = None  # only when asked for

    def check(self, max_tokens: int | None = None) -> None:
        """Set `error` when this is not one whole stream of `max_tokens` tokens (any number when None)."""
        if self.error is not None or self.is_cut:
            return
        if self.status != 200:
            self.error = f"status {self.status}, expected 200"
        elif not self.is_done:
            self.error = "the stream ended before [DONE]"
        elif self.finish_reason is None:
            self.error = "no finish_reason"
        elif not self.completion_tokens:
            self.error = "no usage"
        elif max_tokens is not None and self.completion_tokens != max_tokens:
            self.error = f"{self.completion_tokens} tokens, expected {max_tokens}"


class Exchange(asyncio.Protocol):
    """One request on one connection. `over` is set once the answer is whole, broken or cut."""

    def __init__(self, request: bytes, outcome: Outcome, keeps_text: bool = False):
        self.request, self.outcome, self.keeps_text = request, outcome, keeps_text
        self.over = asyncio.Event()
        self.first = asyncio.Event()  # the first text is here
        self.transport: asyncio.Transport | None = None
        self._raw = b""  # not yet decoded
        self._lines = b""  # decoded, without the end of its line
        self._body: list[bytes] = []  # of an answer that is no stream
        self._is_chunked = False
        self._left: int | None = None  # bytes of this chunk, or of the body; None: until the end
        self._in_head = True
        self._kept: list[bytes] = []
        self._usage = self._finish = b""
        self._said_done = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the request."""
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        """Stamp what came, before anything is done with it."""
        now = time.perf_counter_ns()
        self._raw += data
        if self._in_head and not self._read_head():
            return
        try:
            is_whole = self._read_chunks(now) if self._is_chunked else self._read_plain(now)
        except ValueError as failure:
            self._end(f"bad framing: {failure}")
            return
        if is_whole:
            self.outcome.is_done = self._said_done
            self._end(None)

    def connection_lost(self, exc: Exception | None) -> None:
        """The server has closed, which ends a body without a length."""
        if not self._in_head and not self._is_chunked and self._left is None and exc is None:
            self.outcome.is_done = (
                self._said_done
            )  # the end of the connection is the end of the body
            self._end(None)
        else:
            self._end(f"connection lost: {exc or 'closed in the middle'}")

    def cut(self) -> None:
        """End it now, as a client does that goes away."""
        if not self.over.is_set():
            self.outcome.is_cut = True
            self._end(None)

    def _end(self, error: str | None) -> None:
        if self.over.is_set():
            return
        self.outcome.end_ns = time.perf_counter_ns()
        self.outcome.error = self.outcome.error or error
        if self.transport is not None:
            self.transport.abort()
        self._read_facts()
        self.over.set()
        self.first.set()

    def _read_head(self) -> bool:
        head, mark, rest = self._raw.partition(b"\r\n\r\n")
        if not mark:
            return False
        self._in_head = False
        self._raw = rest
        words = head.split(b" ", 2)
        self.outcome.status = int(words[1]) if len(words) > 1 and words[1].isdigit() else 0
        self._is_chunked = _CHUNKED.search(head) is not None
        length = _LENGTH.search(head)
        self._left = None if length is None else int(length[1])
        return True

    def _read_plain(self, now: int) -> bool:
        piece, self._raw = self._raw, b""
        self._take(piece, now)
        if self._left is None:
            return False
        self._left -= len(piece)
        return self._left <= 0

    def _read_chunks(self, now: int) -> bool:
        """Decode what is there; whether the last chunk has come. ValueError on a size that is no number."""
        while True:
            if self._left is None:
                size, mark, rest = self._raw.partition(b"\r\n")
                if not mark:
                    return False
                self._left, self._raw = int(size.split(b";")[0], 16), rest
            if len(self._raw) < self._left + 2:
                return False
            if self._left == 0:
                return True
            self._take(self._raw[: self._left], now)
            self._raw = self._raw[self._left + 2 :]
            self._left = None

    def _take(self, piece: bytes, now: int) -> None:
        if self.outcome.status != 200:
            self._body.append(piece)
            return
        *lines, self._lines = (self._lines + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                self._take_event(line[5:].strip(), now)

    def _take_event(self, event: bytes, now: int) -> None:
        if event == b"[DONE]":
            self._said_done = True
            return
        if _TEXT.search(event):
            self.outcome.times_ns.append(now)
            self.first.set()
            if self.keeps_text:
                self._kept.append(event)
        elif _ERROR.search(event):
            self.outcome.error = event.decode(errors="replace")[:200]
        if _FINISH.search(event):
            self._finish = event
        if _USAGE.search(event):
            self._usage = event

    def _read_facts(self) -> None:
        outcome = self.outcome
        try:
            if self._usage:
                usage = json.loads(self._usage)["usage"]
                outcome.prompt_tokens = usage["prompt_tokens"]
                outcome.completion_tokens = usage["completion_tokens"]
                details = usage.get("prompt_tokens_details") or {}
                outcome.cached_tokens = details.get("cached_tokens") or 0
            if self._finish:
                outcome.finish_reason = json.loads(self._finish)["choices"][0]["finish_reason"]
            if self.keeps_text:
                outcome.text = "".join(_text(json.loads(event)) for event in self._kept)
        except (ValueError, KeyError, IndexError, TypeError) as failure:
            outcome.error = f"an event that cannot be read: {type(failure).__name__} {failure}"
        if outcome.status not in (0, 200):
            said = b"".join(self._body).decode(errors="replace")
            outcome.error = f"status {outcome.status}: {' '.join(said.split())[:160]}"


def _text(event: dict[str, Any]) -> str:
    choice = event["choices"][0]
    found: str = choice["text"] if "text" in choice else choice["delta"].get("content") or ""
    return found


def make_post(host: str, port: int, path: str, fields: Mapping[str, Any]) -> bytes:
    """The bytes of one POST with a JSON body."""
    body = json.dumps(fields).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
    head += f"Accept: text/event-stream\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


async def start(
    host: str, port: int, request: bytes, *, due_ns: int | None = None, keeps_text: bool = False
) -> Exchange:
    """Connect and send. Times count from now, or from `due_ns`; a refused connection is an outcome, too."""
    outcome = Outcome(begin_ns=time.perf_counter_ns() if due_ns is None else due_ns)
    exchange = Exchange(request, outcome, keeps_text)
    try:
        await asyncio.get_running_loop().create_connection(lambda: exchange, host, port)
    except OSError as failure:
        exchange._end(f"no connection: {failure.strerror or failure}")
    return exchange
