"""The command itself: it serves, and a signal ends it without breaking off what runs."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.serving.running import read_all

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextmanager
def started(*program: str, port: int) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A process that listens; it is killed if it has not ended."""
    with subprocess.Popen(
        [sys.executable, *program],
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "MLX_EDGE_API_KEY": "k"},
    ) as process:
        try:
            end = time.monotonic() + 120
            while not _answers(port):
                assert process.poll() is None, process.communicate()[1]
                assert time.monotonic() < end, "the server did not start"
                time.sleep(0.05)
            yield process, port
        finally:
            if process.poll() is None:
                process.kill()


def _answers(port: int) -> bool:
    with suppress(OSError):
        socket.create_connection(("127.0.0.1", port), 1).close()
        return True
    return False


def begin_stream(port: int, max_tokens: int) -> socket.socket:
    body = json.dumps(
        {"prompt": "Once", "max_tokens": max_tokens, "stream": True, "ignore_eos": True}
    ).encode()
    connection = socket.create_connection(("127.0.0.1", port), 60)
    connection.sendall(
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer k\r\n"
        b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    )
    assert connection.recv(12) == b"HTTP/1.1 200"
    return connection


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains(number: Any) -> None:
    port = free_port()
    command = ("-m", "mlx_edge", "serve", "--port", str(port))
    with started(*command, port=port) as (process, _), begin_stream(port, 60) as connection:
        process.send_signal(number)
        assert b"[DONE]" in read_all(connection)
        printed = process.communicate(timeout=60)[1]
    assert process.returncode == 0
    assert "Traceback" not in printed


ENDLESS = """
from dataclasses import replace
from tests.serving.fake_engine import FakeEngine
from mlx_edge.serving.run import make_server
from mlx_edge.serving.settings import read_settings
settings = read_settings(None, {"server": {"port": PORT, "drain_timeout_s": DRAIN}})
server, _ = make_server(settings, lambda _: FakeEngine(["word "] * 100_000, delay_s=0.05))
server.run()
"""


@pytest.mark.parametrize(("drain_s", "num_signals"), [(1, 1), (600, 2)])
def test_a_drain_is_bounded_and_a_second_signal_does_not_wait(
    drain_s: int, num_signals: int
) -> None:
    port = free_port()
    program = ENDLESS.replace("PORT", str(port)).replace("DRAIN", str(drain_s))
    with started("-c", program, port=port) as (process, _), begin_stream(port, 100_000):
        for _ in range(num_signals):
            process.send_signal(signal.SIGTERM)
            time.sleep(0.2)
        process.communicate(timeout=60)
    assert process.returncode == 0


def test_a_port_that_is_taken() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "mlx_edge.serve",
                "--lazy",
                "--port",
                str(taken.getsockname()[1]),
            ],
            check=False,
            capture_output=True,
            text=True,
            cwd=ROOT,
            timeout=120,
        )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("mlx_edge.serve: error: ")
    assert "address already in use" in done.stderr.lower()
