"""Who is answered at all: host, origin, key, and the limits of address, headers and body. Knows no routes' meaning.

A page on the web can make a browser send requests to this machine. It cannot read our `Host` check away: DNS rebinding
gives a foreign name in `Host`, a foreign page gives itself away in `Origin`, and both are refused.
"""

import asyncio
import ctypes
import hmac
import ipaddress
from collections.abc import Mapping

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlx_edge.serving.errors import (
    ApiError,
    forbidden,
    invalid,
    of_exception,
    timed_out,
    too_large,
    too_long,
    unauthorized,
)
from mlx_edge.serving.settings import ServerSettings, is_loopback

MAX_URL_BYTES = 2048
MAX_HEADERS = 100
MAX_HEAD_BYTES = 1 << 16
LARGE_BODY = 1 << 20  # bytes, after which memory is given back
_LIBC = ctypes.CDLL(None)
OPEN_PATHS = {"/", "/health"}  # a page that asks for the key, and whether the process lives
OPEN_PREFIX = "/page/"
CONTENT_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = [
    (b"content-security-policy", CONTENT_POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
]
CORS_METHODS = b"GET, POST, OPTIONS"
CORS_HEADERS = b"authorization, content-type"
EXPOSED_HEADERS = b"x-mlx-edge-ignored-fields, retry-after"


class Guard:
    """ASGI: lets through what may pass, with a body of a bounded size that comes in a bounded time."""

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app = app
        self._settings = settings
        self._keys = [key.encode() for key in settings.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a refusal here, anything else in the application."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = _read_headers(scope)
        extra = list(HEADERS)

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], *extra]}
            await send(message)

        try:
            self._check_size(scope, headers)
            self._check_host(headers)
            extra += self._check_origin(headers)
            if scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
                await _answer_preflight(send_guarded)
                return
            self._check_key(scope["path"], headers)
        except ApiError as refusal:
            await refusal.response()(scope, receive, send_guarded)
            return
        body = _Body(receive, self._settings)
        try:
            await self._app(scope, body.receive, send_guarded)
        finally:
            if body.num_bytes > LARGE_BODY:
                give_back_memory()

    def _check_size(self, scope: Scope, headers: Mapping[str, str]) -> None:
        length = len(scope["raw_path"]) + len(scope["query_string"])
        if length > MAX_URL_BYTES:
            raise too_long(
                f"the address has {length} bytes, at most {MAX_URL_BYTES} are read; use the body"
            )
        num_bytes = sum(len(name) + len(value) for name, value in scope["headers"])
        if len(scope["headers"]) > MAX_HEADERS or num_bytes > MAX_HEAD_BYTES:
            raise too_long(
                f"more than {MAX_HEADERS} headers or {MAX_HEAD_BYTES >> 10} KiB are not read; send fewer",
                431,
            )
        given = headers.get("content-length", "0")
        limit = self._settings.max_body_bytes
        if given.isdecimal() and int(given[:20]) > limit:
            raise too_large(_body_words(limit))

    def _check_host(self, headers: Mapping[str, str]) -> None:
        host = headers.get("host")
        if host is None:
            raise invalid("the Host header is missing")
        name, settings = _host_name(host), self._settings
        if is_loopback(name) or name in settings.allowed_hosts or name == settings.host:
            return
        if not is_loopback(settings.host) and _is_address(name):
            return  # only a name can be rebound
        raise forbidden(
            f"this server does not answer to the host {name[:80]!r}; start it with --allowed-hosts {name[:80]}",
            "host_not_allowed",
        )

    def _check_origin(self, headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
        """The CORS headers that an allowed origin gets; none for our own page."""
        origin = headers.get("origin")
        if origin is None:
            return []
        scheme, found, netloc = origin.partition("://")
        if found and scheme in {"http", "https"} and netloc.lower() == headers["host"].lower():
            return []
        allowed = self._settings.allowed_origins
        if origin not in allowed and "*" not in allowed:
            raise forbidden(
                f"pages of {origin[:80]!r} may not use this server; start it with --allowed-origins {origin[:80]}",
                "origin_not_allowed",
            )
        return [
            (b"access-control-allow-origin", origin.encode("latin-1")),
            (b"access-control-expose-headers", EXPOSED_HEADERS),
            (b"vary", b"origin"),
        ]

    def _check_key(self, path: str, headers: Mapping[str, str]) -> None:
        if not self._keys or path in OPEN_PATHS or path.startswith(OPEN_PREFIX):
            return
        if path == "/metrics" and is_loopback(self._settings.host):
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            raise unauthorized("an API key is needed; send the header Authorization: Bearer KEY")
        # Every key is compared, so that the time tells nothing.
        matches = [hmac.compare_digest(given.strip().encode("latin-1"), key) for key in self._keys]
        if not any(matches):
            raise unauthorized("the API key is not one of this server's")


class _Body:
    """A receive that counts, and that waits no longer than it must."""

    def __init__(self, receive: Receive, settings: ServerSettings) -> None:
        self._receive = receive
        self._limit, self._timeout_s = settings.max_body_bytes, settings.body_timeout_s
        self._deadline: float | None = None
        self.num_bytes, self._is_complete = 0, False

    async def receive(self) -> Message:
        """The next part of the body. Raises: ApiError when it is too large or too late."""
        if self._is_complete:  # what comes now is that the client left: that may take long
            return await self._receive()
        if self._deadline is None:
            self._deadline = asyncio.get_running_loop().time() + self._timeout_s
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError:
            raise timed_out(
                f"the body was not complete after {self._timeout_s:g} s; send it faster"
            ) from None
        if message["type"] == "http.request":
            self.num_bytes += len(message.get("body", b""))
            self._is_complete = not message.get("more_body", False)
            if self.num_bytes > self._limit:
                raise too_large(_body_words(self._limit))
        return message


def give_back_memory() -> None:
    """Hand freed memory to the system where glibc would keep it: a body of 10 MB leaves 10 MB in every arena."""
    trim = getattr(_LIBC, "malloc_trim", None)
    if trim is not None:
        trim(0)


class Refusals:
    """ASGI: what the application raises before it answers becomes an answer; a vanished client is no error."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application."""
        is_started = False

        async def send_watched(message: Message) -> None:
            nonlocal is_started
            is_started = True
            await send(message)

        try:
            await self._app(scope, receive, send_watched)
        except Exception as error:
            if scope["type"] != "http":
                raise
            if is_started:  # it was told or logged already; uvicorn closes what is incomplete
                return
            await of_exception(error).response()(scope, receive, send)


async def _answer_preflight(send: Send) -> None:
    headers = [
        (b"access-control-allow-methods", CORS_METHODS),
        (b"access-control-allow-headers", CORS_HEADERS),
        (b"access-control-max-age", b"600"),
    ]
    await send({"type": "http.response.start", "status": 204, "headers": headers})
    await send({"type": "http.response.body", "body": b""})


def _read_headers(scope: Scope) -> dict[str, str]:
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}


def _host_name(host: str) -> str:
    """The host without its port, in small letters: `[::1]:8080` is `::1`."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower().rstrip(".")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _body_words(limit: int) -> str:
    return f"the body exceeds {limit} bytes; send less, or start the server with --max-body-bytes"
