"""Headless Chromium over its debugging pipe: enough to open a page, run scripts in it and look at it."""

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
MAC = "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"

LAUNCH = """
import os, sys
for source, target in ((int(sys.argv[1]), 63), (int(sys.argv[2]), 64), (63, 3), (64, 4)):
    os.dup2(source, target)  # the browser reads descriptor 3 and writes 4
os.execv(sys.argv[3], sys.argv[3:])
"""


def find_browser() -> str | None:
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    return found or (MAC if Path(MAC).exists() else None)


class Page:
    def __init__(self, write: int, read: int) -> None:
        self._write, self._read = write, read
        self._rest, self._number, self._session = b"", 0, ""
        self.problems: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> Any:
        """The result of a command; what goes wrong in the page meanwhile is kept in `problems`."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]
            if answer.get("method") in {"Runtime.exceptionThrown", "Log.entryAdded"}:
                self.problems.append(json.dumps(answer["params"]))

    def run(self, script: str) -> Any:
        """What a script returns; a promise is waited for."""
        result = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, condition: str) -> None:
        """Wait until a JavaScript expression holds."""
        self.run(
            "new Promise((resolve, reject) => { const end = Date.now() + 60000;"
            f" const look = () => {{ if ({condition}) resolve(true);"
            " else if (Date.now() > end) reject(new Error('it did not happen: ' + document.body.innerText));"
            " else setTimeout(look, 20); }; look(); })"
        )

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.wait(f"document.readyState === 'complete' && location.href.startsWith('{url}')")

    def screenshot(self, path: Path) -> None:
        data = self.call("Page.captureScreenshot", format="png")["data"]
        path.write_bytes(base64.b64decode(data))

    def _receive(self) -> Any:
        while b"\0" not in self._rest:
            assert select.select([self._read], [], [], 60)[0], "the browser says nothing"
            part = os.read(self._read, 1 << 20)
            assert part, "the browser ended"
            self._rest += part
        data, _, self._rest = self._rest.partition(b"\0")
        return json.loads(data)


@contextmanager
def browsing(browser: str) -> Iterator[Page]:
    """A new browser without a history; offline but for this machine."""
    in_read, in_write = os.pipe()
    out_read, out_write = os.pipe()

    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
    flags += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--window-size=900,700"]
    flags += ["--disable-dev-shm-usage", "--no-first-run", "--disable-background-networking"]
    pipes = [str(in_read), str(out_write)]
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        subprocess.Popen(
            [sys.executable, "-c", LAUNCH, *pipes, browser, *flags, f"--user-data-dir={folder}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(in_read, out_write),
        ) as process,
    ):
        os.close(in_read), os.close(out_write)
        try:
            yield Page(in_write, out_read)
        finally:
            os.close(in_write), os.close(out_read)
            process.kill()
