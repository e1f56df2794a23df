"""Who is answered, over raw sockets: foreign hosts, origins and keys; bodies that are too large, too slow or a lie."""

import socket
import time
from typing import Any

import pytest

from mlx_edge.errors import InvalidRequestError
from mlx_edge.serving.settings import ServerSettings, check_server, read_keys
from tests.serving.fake_engine import FakeEngine
from tests.serving.running import Running, parse, read_all, running, wait_for

KEYS = ("first-key", "second-key")
POST = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def server() -> Any:
    with running(
        lambda _: FakeEngine(),
        max_body_bytes=1 << 20,
        body_timeout_s=0.4,
        head_timeout_s=0.4,
        allowed_hosts=("edge.lan",),
        allowed_origins=("http://app.lan:3000",),
    ) as found:
        yield found


@pytest.fixture(scope="module")
def locked() -> Any:
    with running(lambda _: FakeEngine(), api_key="first-key", allowed_origins=("*",)) as found:
        yield found


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1", 200),
        ("localhost:8080", 200),
        ("LOCALHOST", 200),
        ("[::1]:8080", 200),
        ("edge.lan:1", 200),
        ("evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("localhost.evil.example", 403),
        ("192.168.1.7", 403),
        ("0.0.0.0", 403),
    ],
)
def test_hosts(server: Running, host: str, status: int) -> None:
    got, _, body = server.ask("GET", "/health", Host=host)
    assert got == status
    if status == 403:
        assert body["error"]["code"] == "host_not_allowed"


def test_a_request_without_host(server: Running) -> None:
    assert parse(server.send(b"GET /health HTTP/1.0\r\n\r\n"))[0] == 400


@pytest.mark.parametrize(
    ("origin", "status", "allowed"),
    [
        ("http://app.lan:3000", 200, "http://app.lan:3000"),
        ("http://app.lan", 403, None),
        ("https://evil.example", 403, None),
        ("null", 403, None),
        ("file://", 403, None),
    ],
)
def test_origins(server: Running, origin: str, status: int, allowed: str | None) -> None:
    got, headers, _ = server.ask("GET", "/v1/models", Origin=origin)
    assert got == status
    assert headers.get("access-control-allow-origin") == allowed


def test_our_own_page_is_no_foreign_origin(server: Running) -> None:
    got, headers, _ = server.ask("GET", "/v1/models", Origin=server.url)
    assert got == 200
    assert "access-control-allow-origin" not in headers


def test_a_preflight_needs_no_key(locked: Running) -> None:
    asked = {"Origin": "http://a.b", "Access_Control_Request_Method": "POST"}
    status, headers, _ = locked.ask("OPTIONS", "/v1/chat/completions", **asked)
    assert status == 204
    assert headers["access-control-allow-origin"] == "http://a.b"
    assert "authorization" in headers["access-control-allow-headers"]


@pytest.mark.parametrize(
    ("path", "key", "status"),
    [
        ("/v1/models", None, 401),
        ("/v1/models", "Bearer first-key", 200),
        ("/v1/models", "bearer first-key", 200),
        ("/v1/models", "Bearer first-ke", 401),
        ("/v1/models", "Bearer first-keyy", 401),
        ("/v1/models", "Bearer ", 401),
        ("/v1/models", "Bearer \xff\xfe", 401),
        ("/v1/models", "Basic first-key", 401),
        ("/openapi.json", None, 401),
        ("/", None, 200),
        ("/page/chat.js", None, 200),
        ("/page/../v1/models", None, 404),
        ("/health", None, 200),
        ("/metrics", None, 200),  # this server listens on loopback
    ],
)
def test_keys(locked: Running, path: str, key: str | None, status: int) -> None:
    headers = {} if key is None else {"Authorization": key}
    got, answered, _ = locked.ask("GET", path, **headers)
    assert got == status
    assert ("www-authenticate" in answered) == (status == 401)


def test_metrics_need_a_key_where_others_can_ask() -> None:
    with running(lambda _: FakeEngine(), host="0.0.0.0", api_key="k") as server:
        assert server.ask("GET", "/metrics")[0] == 401
        assert server.ask("GET", "/metrics", Authorization="Bearer k")[0] == 200
        assert server.ask("GET", "/health", Host="192.168.1.7")[0] == 200  # no name to rebind


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"host": "0.0.0.0"}, "no API key"),
        ({"host": "::"}, "no API key"),
        ({"host": "192.168.1.7"}, "no API key"),
        ({"allowed_origins": ("*",)}, "every web page"),
        ({"allowed_origins": ("app.lan",)}, "no origin"),
        ({"api_key": "two words"}, "space"),
        ({"api_key_file": "/nowhere/keys"}, "cannot be read"),
        ({"keep_alive": "soon"}, "keep-alive"),
    ],
)
def test_open_doors_are_refused_at_the_start(
    settings: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLX_EDGE_API_KEY", raising=False)
    with pytest.raises(InvalidRequestError, match=words):
        check_server(read_keys(ServerSettings(**settings)))


def test_keys_come_from_a_file_and_the_environment(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "keys").write_text("first\n\nsecond\n")
    monkeypatch.setenv("MLX_EDGE_API_KEY", "third")
    server = read_keys(ServerSettings(api_key_file=str(tmp_path / "keys")))
    assert set(server.api_keys) == {"first", "second", "third"}
    assert "first" not in repr(server)


def test_a_body_over_the_limit(server: Running) -> None:
    status, _, body = server.ask("POST", "/v1/completions", b" " * (1 << 20) + b" ")
    assert (status, body["error"]["code"]) == (413, "too_large")
    head = POST + b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
    assert parse(server.send(head + b"100001\r\n" + b" " * 0x100001 + b"\r\n0\r\n\r\n"))[0] == 413


@pytest.mark.parametrize(
    "head",
    [
        b"Content-Length: 100\r\n\r\n{",
        b"Content-Length: 2\r\n\r\n{",
        b"Transfer-Encoding: chunked\r\n\r\n5\r\n{",
    ],
)
def test_a_body_that_stalls(server: Running, head: bytes) -> None:
    status, headers, body = parse(server.send(POST + head))
    assert (status, body["error"]["code"]) == (408, "timeout")
    assert headers["connection"] == "close"


@pytest.mark.parametrize("data", [b"", b"GET ", b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n"])
def test_half_a_request_is_given_up(server: Running, data: bytes) -> None:
    begun = time.monotonic()
    assert server.send(data) == b""
    assert time.monotonic() - begun < 30  # of a socket that waits 60


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 9 + b"\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
        (POST + b"Content-Length: -5\r\n\r\n", 400),
        (POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n{}", 400),
        (POST + b"Transfer-Encoding: gzip\r\n\r\n", 400),
        (POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
        (b"GET /" + b"a" * 3000 + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", 414),
        (b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nA: " + b"a" * 100_000 + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n" + b"A: a\r\n" * 200 + b"\r\n", 431),
        (b"GET /%ff%00 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", 404),
    ],
)
def test_broken_http(server: Running, data: bytes, status: int) -> None:
    got, headers, body = parse(
        server.send(data.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
    )
    assert got == status
    assert headers["content-type"] == "application/json"
    assert body["error"]["message"]


def test_a_body_longer_than_it_said(server: Running) -> None:
    rest = POST + b"Content-Length: 2\r\n\r\n{}GARBAGE\r\n\r\n"
    assert parse(server.send(rest))[0] == 400
    assert server.ask("GET", "/health")[0] == 200


def test_a_client_that_vanishes_is_forgotten() -> None:
    engine = FakeEngine(["word "] * 10_000, delay_s=0.005)
    with running(lambda _: engine) as server:
        for number, stream in enumerate((b"true", b"false")):
            body = b'{"prompt": "Hi", "max_tokens": 10000, "stream": %s}' % stream
            with server.connect() as connection:
                connection.sendall(POST + b"Content-Length: %d\r\n\r\n" % len(body) + body)
                wait_for(lambda count=number: len(engine.tickets) > count)
                if stream == b"true":
                    assert b"200 OK" in connection.recv(100)
            wait_for(lambda: engine.running == 0)
        assert len(engine.tickets) == 2


def test_a_client_that_does_not_read_is_cut_off() -> None:
    engine = FakeEngine(["word " * 2000] * 100_000, delay_s=0.0001)
    with running(lambda _: engine, write_timeout_s=0.3) as server, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        body = b'{"prompt": "Hi", "max_tokens": 100000, "stream": true}'
        connection.sendall(POST + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        wait_for(lambda: engine.running == 1)
        wait_for(lambda: engine.running == 0)
        read_all(connection)


def test_answers_carry_the_policy_of_the_page(server: Running) -> None:
    _, headers, _ = server.ask("GET", "/")
    assert headers["content-security-policy"].startswith("default-src 'none'")
    assert "unsafe" not in headers["content-security-policy"]
    assert "server" not in headers


def test_logs_hold_no_prompts(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    server.chat(messages=[{"role": "user", "content": "my secret"}])
    server.chat(messages=[{"role": "user", "content": "my secret", "foo": 1}])
    assert caplog.records
    assert "my secret" not in caplog.text
