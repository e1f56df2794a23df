"""Clients that no server wants, beside healthy ones that must not notice: the parts of bench/serving_soak.py.

Each hostile client is one short visit that ends by itself; what the server said to it is its only result. A healthy one
sends a prompt whose answer is known, and checks every byte of it. Knows nothing of processes and memory.
"""

import asyncio
import base64
import contextlib
import json
import random
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from bench.load import Prompt
from bench.load_client import Outcome, make_post, start

MEGABYTE = 1 << 20
PATIENCE_S = 20.0  # how long a visit lasts at most


@dataclass(frozen=True)
class Target:
    """The server that is visited."""

    port: int
    model: str
    prompts: tuple[Prompt, ...]
    host: str = "127.0.0.1"

    def post(self, prompt: str, max_tokens: int) -> bytes:
        """A good request, streamed and greedy."""
        fields: dict[str, Any] = {"model": self.model, "prompt": prompt}
        fields |= {"max_tokens": max_tokens}
        more: dict[str, Any] = {"temperature": 0.0, "stream": True, "ignore_eos": True}
        more |= {"stream_options": {"include_usage": True}}
        return make_post(self.host, self.port, "/v1/completions", fields | more)


async def ask(target: Target, prompt: Prompt) -> Outcome:
    """A healthy request to its end, with its text; it leaves nothing behind when it is cancelled."""
    request = target.post(prompt.text, prompt.new_tokens)
    exchange = await start(target.host, target.port, request, keeps_text=True)
    try:
        await exchange.over.wait()
    finally:
        exchange.cut()
    exchange.outcome.check(prompt.new_tokens)
    return exchange.outcome


@contextlib.asynccontextmanager
async def connected(
    target: Target, *, buffer: int | None = None
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A bare connection, gone without a word at the end; `buffer`: bytes that the system keeps unread."""
    taken = socket.socket()
    if buffer is not None:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    taken.setblocking(False)
    try:
        await asyncio.get_running_loop().sock_connect(taken, (target.host, target.port))
        reader, writer = await asyncio.open_connection(sock=taken, limit=buffer or 1 << 16)
    except OSError:
        taken.close()
        raise
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def status(reader: asyncio.StreamReader) -> int | None:
    """The status of the answer; None when the server closed without one or says nothing for long."""
    try:
        async with asyncio.timeout(PATIENCE_S):
            words = (await reader.readline()).split(b" ", 2)
    except TimeoutError:
        return None
    return int(words[1]) if len(words) > 1 and words[1].isdigit() else None


async def vanish(target: Target, chance: random.Random) -> int | None:
    """Goes away in the middle of the stream, or before it began."""
    prompt = chance.choice(target.prompts)
    exchange = await start(target.host, target.port, target.post(prompt.text, 300))
    await asyncio.sleep(chance.choice((0.0, 0.02, 0.2, 1.0)))
    exchange.cut()
    return exchange.outcome.status or None


async def stall(target: Target, chance: random.Random) -> int | None:
    """Asks for much and reads nothing."""
    async with connected(target, buffer=2048) as (reader, writer):
        writer.write(target.post(chance.choice(target.prompts).text, 400))
        await asyncio.sleep(chance.uniform(2.0, PATIENCE_S))
        return await status(reader)


async def send_half(target: Target, chance: random.Random) -> int | None:
    """Sends a part of a request, waits and goes; or says no more and waits for the server."""
    request = target.post(chance.choice(target.prompts).text, 8)
    async with connected(target) as (reader, writer):
        writer.write(request[: chance.randrange(1, len(request))])
        if chance.random() < 0.7:
            await asyncio.sleep(chance.uniform(0.0, 3.0))
            return None
        return await status(reader)


async def lie_about_length(target: Target, chance: random.Random) -> int | None:
    """Content-Length is too long, too short, no number, or there twice."""
    request = target.post(chance.choice(target.prompts).text, 8)
    head, _, body = request.partition(b"\r\n\r\n")
    names = head.rpartition(b"\r\n")[0]
    length = len(body)
    lies = (b"%d" % (length + 500), b"%d" % (length - 9), b"-5", b"many", b"9" * 30)
    lie = chance.choice(lies)
    more = b"\r\nContent-Length: %d" % length if chance.random() < 0.2 else b""
    async with connected(target) as (reader, writer):
        writer.write(names + b"\r\nContent-Length: " + lie + more + b"\r\n\r\n" + body)
        if int(lie) > length if lie.isdigit() else False:
            await asyncio.sleep(chance.uniform(0.0, 5.0))
            return None
        return await status(reader)


async def send_bad_text(target: Target, chance: random.Random) -> int | None:
    """Bytes that are no UTF-8, no JSON, or JSON of another kind."""
    bodies = (
        b'{"model": "x", "prompt": "\xff\xfe\x80"}',
        b'{"prompt": "\\ud800", "max_tokens": 1}',
        b'{"prompt": "cut',
        b"\x00" * 64,
        b"[" * 20_000,
        json.dumps({"prompt": "a", "max_tokens": 10**30}).encode(),
        json.dumps({"prompt": [], "max_tokens": 3, "temperature": "hot"}).encode(),
    )
    body = chance.choice(bodies)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: %s:%d\r\nContent-Type: application/json\r\n"
    head %= (target.host.encode(), target.port)
    async with connected(target) as (reader, writer):
        writer.write(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        return await status(reader)


async def send_bad_image(target: Target, chance: random.Random) -> int | None:
    """An image that is an address, no base64, cut short, a claim of 900 megapixels, or megabytes of nothing."""
    head = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
    files = (head, head + struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0), bytes(3 * MEGABYTE))
    urls = ["http://127.0.0.1:9/x.png", "data:image/png;base64,@@@@"]
    urls += [f"data:image/png;base64,{base64.b64encode(file).decode()}" for file in files]
    part = {"type": "image_url", "image_url": {"url": chance.choice(urls)}}
    fields = {"model": target.model, "messages": [{"role": "user", "content": [part]}]}
    async with connected(target) as (reader, writer):
        writer.write(make_post(target.host, target.port, "/v1/chat/completions", fields))
        return await status(reader)


async def send_much(target: Target, chance: random.Random) -> int | None:
    """A prompt of 10 MB."""
    async with connected(target) as (reader, writer):
        writer.write(_big_request(target))
        return await status(reader)


@lru_cache(maxsize=1)
def _big_request(target: Target) -> bytes:
    """Made once: this process must not hold up its healthy clients."""
    text = "rain over the harbour at seven "
    return target.post(text * (10 * MEGABYTE // len(text)), 8)


async def flood(target: Target, chance: random.Random) -> int | None:
    """A good request more than there is room for."""
    return (await ask(target, chance.choice(target.prompts))).status or None


async def linger(target: Target, chance: random.Random) -> int | None:
    """A good request for as much as hostile clients ask for: what stands in for them before they come."""
    long = replace(chance.choice(target.prompts), new_tokens=300)
    return (await ask(target, long)).status or None


Visit = Callable[[Target, random.Random], Awaitable[int | None]]
# Kind of visit, how many at a time, and the mean pause between them in seconds.
HOSTILE: Sequence[tuple[Visit, int, float]] = (
    (vanish, 6, 0.1),
    (stall, 4, 0.1),
    (send_half, 4, 0.1),
    (lie_about_length, 3, 0.1),
    (send_bad_text, 2, 0.2),
    (send_bad_image, 1, 1.0),
    (send_much, 1, 3.0),
)
