"""A Hugging Face hub in small: what its client asks for to download a model, on loopback, with faults on demand.

Serves the model's page, the list of files, and the files themselves with ETag, commit, size and Range. Knows no
accounts, no large-file store of its own and no other client than the library of the hub.
"""

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

_MODEL = re.compile(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?")
_FILE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


@dataclass
class Repository:
    """A repository with one commit, and what is wrong with it.

    `answer` is the status (and `headers`) that every request gets instead. `dropped` counts for a file the answers
    that shall end in the middle of it, with a byte that still comes through each; `cut` names a file whose answers
    are complete, but too short. `page_alone` lets the model's page through and answers the rest with `answer`.
    """

    files: Mapping[str, bytes]
    commit: str = "a" * 40
    branch: str = "main"
    answer: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b"{}"
    dropped: dict[str, int] = field(default_factory=dict)
    cut: str = ""
    page_alone: bool = False


class HubServer(ThreadingHTTPServer):
    """The server; `requests` are the lines of all requests so far: "GET /owner/name/resolve/...[ from BYTE]"."""

    daemon_threads = True
    repositories: Mapping[str, Repository]
    requests: list[str]

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def take_requests(self) -> list[str]:
        """The requests since the last call."""
        taken, self.requests = self.requests, []
        return taken


@contextmanager
def serve(repositories: Mapping[str, Repository]) -> Iterator[HubServer]:
    """A running server; afterwards its port refuses connections."""
    server = HubServer(("127.0.0.1", 0), _Handler)
    server.repositories, server.requests = repositories, []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def do_GET(self) -> None:
        self._route()

    def do_HEAD(self) -> None:
        self._route()

    def log_message(self, format: str, *args: Any) -> None:
        """Stay quiet."""

    def _route(self) -> None:
        path = urlsplit(self.path).path
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        line = f"{self.command} {unquote(path)}" + (f" from {start[1]}" if start else "")
        self.server.requests.append(line)
        model, file = _MODEL.fullmatch(path), _FILE.fullmatch(path)
        match = model or file
        repository = self.server.repositories.get(match[1]) if match else None
        if match is None or repository is None:
            self._refuse(404, "RepoNotFound")
            return
        is_page = bool(model and model[2] != "tree")
        if repository.answer != 200 and not (repository.page_alone and is_page):
            self._send(repository.answer, repository.body, repository.headers)
            return
        revision = unquote((match[3] if model else match[2]) or repository.branch)
        if revision not in {repository.branch, repository.commit}:
            self._refuse(404, "RevisionNotFound")
        elif file:
            self._send_file(repository, unquote(file[3]), int(start[1]) if start else 0)
        elif is_page:
            siblings = [{"rfilename": name} for name in repository.files]
            self._send_json({"id": match[1], "sha": repository.commit, "siblings": siblings})
        else:
            self._send_json([_describe(*item) for item in repository.files.items()])

    def _send_file(self, repository: Repository, name: str, start: int) -> None:
        if name not in repository.files:
            self._refuse(404, "EntryNotFound")
            return
        content = repository.files[name]
        headers = {
            "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
            "X-Repo-Commit": repository.commit,
            "X-Linked-Size": str(len(content)),
        }
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        body = content[start : len(content) - (name == repository.cut and self.command == "GET")]
        status = 206 if start else 200
        if self.command == "GET" and repository.dropped.get(name, 0):
            repository.dropped[name] -= 1
            self._send(status, body, headers, only=len(body) // 2 if not start else 0)
            self.close_connection = True
        else:
            self._send(status, body, headers)

    def _refuse(self, status: int, code: str) -> None:
        self._send(status, b"{}", {"X-Error-Code": code})

    def _send_json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(
        self, status: int, body: bytes, headers: Mapping[str, str], only: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:only])


def _describe(name: str, content: bytes) -> dict[str, Any]:
    oid = hashlib.sha1(content).hexdigest()
    entry = {"type": "file", "path": name, "size": len(content), "oid": oid}
    if name.endswith(".safetensors"):
        sha256 = hashlib.sha256(content).hexdigest()
        entry["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 134}
    return entry
