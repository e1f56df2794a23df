"""The chat page in headless Chromium: it talks, stops, forgets, asks for the key, and loads nothing from elsewhere."""

import base64
import os
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from tests.serving.browser import Page, browsing, find_browser
from tests.serving.fake_engine import FakeEngine
from tests.serving.running import running, wait_for
from tests.serving.test_images import encode, make_engine

PAGE = files("mlx_edge.serving") / "page"
BROWSER = find_browser()
WORDS = [
    "Use",
    " a",
    " loop:\n",
    "```python\n",
    "for x in y:\n",
    "    print('<b>')\n",
    "```\n",
    "Done.",
]
needs_browser = pytest.mark.skipif(
    BROWSER is None, reason="no Chromium or Chrome on this machine to open the page in"
)


@pytest.fixture(scope="module")
def page() -> Any:
    with browsing(str(BROWSER)) as found:
        yield found


def say(page: Page, text: str) -> None:
    page.run(f"question.value = {text!r}; element('form').requestSubmit(); true")


def test_the_page_names_no_other_place() -> None:
    for name in ("index.html", "chat.js", "chat.css", "icon.svg"):
        text = (PAGE / name).read_text().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?:|@import|innerHTML|eval\(|<script>| style=| on\w+=", text), (
            name
        )


@needs_browser
def test_a_conversation(page: Page) -> None:
    engine = FakeEngine(WORDS, delay_s=0.01)
    with running(lambda _: engine) as server:
        page.problems.clear()
        page.open(server.url)
        page.wait("element('model').value === 'pocket' && element('memory').textContent")
        say(page, "How do I loop?")
        page.wait("!running && document.querySelectorAll('article').length === 2")
        answer = "document.querySelector('article.assistant .text')"
        assert (
            page.run(f"{answer}.querySelector('pre').textContent")
            == "for x in y:\n    print('<b>')"
        )
        assert page.run(f"{answer}.querySelectorAll('b').length") == 0
        assert "tokens/s" in page.run("document.querySelector('.figures').textContent")
        assert "first token" in page.run("document.querySelector('.figures').textContent")
        if folder := os.environ.get("MLX_EDGE_SCREENSHOTS"):
            page.screenshot(Path(folder) / "light.png")
            dark = [{"name": "prefers-color-scheme", "value": "dark"}]
            page.call("Emulation.setEmulatedMedia", features=dark)
            page.screenshot(Path(folder) / "dark.png")
        say(page, "And backwards?")
        page.wait("!running && document.querySelectorAll('article').length === 4")
        assert len(engine.requests[1].prompt) > len(engine.requests[0].prompt) + 5
        page.run("element('new').click(); true")
        assert page.run("document.querySelectorAll('article').length + messages.length") == 0
        assert page.problems == []


DROP = """
const data = new DataTransfer();
const bytes = Uint8Array.from(atob(%r), (letter) => letter.charCodeAt(0));
data.items.add(new File([bytes], "a.png", { type: "image/png" }));
document.dispatchEvent(new DragEvent("drop", { dataTransfer: data, cancelable: true }));
true
"""


@needs_browser
def test_an_image_that_is_dropped_goes_with_the_question(page: Page, tmp_path: Path) -> None:
    engine = make_engine(tmp_path)
    image = encode()
    with running(lambda _: engine) as server:
        page.open(server.url)
        page.wait("element('model').value === 'pocket'")
        page.run(DROP % base64.b64encode(image).decode())
        page.wait("element('status').textContent.startsWith('1 image')")
        say(page, "What is it?")
        page.wait("!running && document.querySelectorAll('article').length === 2")
        assert page.run("document.querySelector('article.user .text').textContent").endswith(
            "[1 image]"
        )
        assert page.run("pictures.length") == 0
    assert engine.requests[0].images == (image,)


@needs_browser
def test_stop_ends_the_request(page: Page) -> None:
    engine = FakeEngine(["word "] * 10_000, delay_s=0.01)
    with running(lambda _: engine) as server:
        page.open(server.url)
        page.wait("element('model').value === 'pocket'")
        say(page, "Talk")
        page.wait("document.querySelector('article.assistant .text').textContent.length > 20")
        page.run("document.dispatchEvent(new KeyboardEvent('keydown', {key: 'Escape'})); true")
        page.wait("!running")
        wait_for(lambda: engine.running == 0)
        assert page.run("messages.length") == 2  # what was said is kept


@needs_browser
def test_the_key_is_asked_for(page: Page) -> None:
    with running(lambda _: FakeEngine(), api_key="the-key") as server:
        page.open(server.url)
        for key in ("wrong", "the-key"):
            page.wait("element('lock').open")
            page.run(
                f"element('key').value = '{key}'; document.querySelector('dialog form').requestSubmit(); true"
            )
        page.wait("element('model').value === 'pocket'")
        say(page, "Hi")
        page.wait("!running && document.querySelectorAll('article').length === 2")
        assert page.run("sessionStorage.getItem('mlx_edge_key')") == "the-key"
        assert page.run("localStorage.length + document.cookie.length") == 0


@needs_browser
def test_an_error_is_shown(page: Page) -> None:
    with running(lambda _: FakeEngine(context_size=3)) as server:
        page.open(server.url)
        page.wait("element('model').value === 'pocket'")
        say(page, "Too long for it")
        page.wait("document.querySelector('.wrong')")
        assert "leaves no room" in page.run("document.querySelector('.wrong').textContent")
