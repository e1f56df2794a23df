"""A server on a free port in a thread, and raw requests to it."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

from mlx_edge.serving.models import MakeEngine, Models, make_engine
from mlx_edge.serving.run import make_server
from mlx_edge.serving.settings import check_server, read_keys, read_settings


class Running(NamedTuple):
    port: int
    models: Models

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=60)

    def send(self, data: bytes) -> bytes:
        """Everything that comes back until the server closes or is silent."""
        with self.connect() as connection:
            connection.sendall(data)
            return read_all(connection)

    def ask(
        self, method: str, path: str, body: Any = None, **headers: str
    ) -> tuple[int, dict[str, str], Any]:
        """Status, headers and JSON (or text) of one request."""
        data = (
            b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        )
        lines = {"Host": f"127.0.0.1:{self.port}", "Connection": "close"}
        if data:
            lines |= {"Content-Length": str(len(data)), "Content-Type": "application/json"}
        lines |= {name.replace("_", "-"): value for name, value in headers.items()}
        head = "".join(f"{name}: {value}\r\n" for name, value in lines.items() if value)
        return parse(self.send(f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode("latin-1") + data))

    def chat(self, **fields: Any) -> tuple[int, dict[str, str], Any]:
        body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, **fields}
        return self.ask("POST", "/v1/chat/completions", body)


def read_all(connection: socket.socket) -> bytes:
    parts = []
    try:
        while part := connection.recv(65536):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


def parse(data: bytes) -> tuple[int, dict[str, str], Any]:
    head, _, body = data.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (x.partition(":") for x in lines)}
    if headers.get("transfer-encoding") == "chunked":
        body = _join_chunks(body)
    if "content-length" in headers:
        body = body[: int(headers["content-length"])]
    is_json = headers.get("content-type", "").startswith("application/json")
    return int(first.split()[1]), headers, json.loads(body) if is_json else body.decode()


def _join_chunks(data: bytes) -> bytes:
    parts = []
    while data:
        size, _, data = data.partition(b"\r\n")
        parts.append(data[: int(size, 16)])
        data = data[int(size, 16) + 2 :]
    return b"".join(parts)


@contextmanager
def running(make: MakeEngine = make_engine, **server: Any) -> Iterator[Running]:
    """A server with these settings of [server], and pocket; other tables under their own names."""
    tables = {name: server.pop(name) for name in ("engine", "defaults", "model") if name in server}
    settings = read_settings(None, tables)
    own = check_server(read_keys(replace(settings.server, port=0, drain_timeout_s=5, **server)))
    with serving(replace(settings, server=own), make) as found:
        yield found


@contextmanager
def serving(settings: Any, make: MakeEngine = make_engine) -> Iterator[Running]:
    server, models = make_server(settings, make)
    if not settings.server.lazy:
        models.preload()
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.005)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield Running(port, models)
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


def wait_for(condition: Any, seconds: float = 60.0) -> None:
    """Wait until it holds, or fail."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)
