"""A server that speaks the protocol and no model: N tokens, a gap before each, faults on request."""

import asyncio
import json
from typing import Any


def events(count: int, **usage: int) -> list[bytes]:
    """The events of a stream of `count` tokens: their texts, the end, the usage, [DONE]."""

    def event(text: str, finish: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "text": text, "finish_reason": finish, "logprobs": None}
        return {"object": "text_completion", "choices": [choice], "usage": None}

    said = [event(f" w{i}") for i in range(count)] + [event("", "length")]
    totals = {"prompt_tokens": 4, "completion_tokens": count, **usage}
    said.append({"object": "text_completion", "choices": [], "usage": totals})
    lines = [f"data: {json.dumps(one)}\n\n".encode() for one in said]
    return [*lines, b"data: [DONE]\n\n"]


class FakeServer:
    """Counts requests; `fault` is what each of them meets."""

    def __init__(self, gap_s: float = 0.0, fault: str = ""):
        self.gap_s, self.fault = gap_s, fault
        self.prompts: list[str] = []
        self.port = 0

    async def __aenter__(self) -> "FakeServer":
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
            body = json.loads(await reader.readexactly(length))
            self.prompts.append(body["prompt"])
            await self._answer(writer, body["max_tokens"])
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def _answer(self, writer: asyncio.StreamWriter, count: int) -> None:
        if self.fault == "busy":
            writer.write(b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 4\r\n\r\nfull")
            return
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        said = events(count - 1 if self.fault == "short" else count)
        for event in said[:2] if self.fault == "broken" else said:
            if self.gap_s:
                await asyncio.sleep(self.gap_s)
            writer.write(b"%x\r\n%s\r\n" % (len(event), event))
            await writer.drain()
        if self.fault != "broken":
            writer.write(b"0\r\n\r\n")
