"""The bundled vision model drives a phone through our server: a tap on the right thing, the next screen, the end."""

from __future__ import annotations

import importlib
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

from mlx_edge.weights.hub import find_model
from tests.serving.phone_agent import Agent
from tests.serving.running import Running, running

pytest.importorskip("llguidance", reason="constraints need the package llguidance")

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
screens = importlib.import_module("pocket_vision_screens")
score = importlib.import_module("pocket_vision_score")


class DrawnPhone:
    """A home screen of apps; a tap on one opens its page, one on the arrow or the cross leads back."""

    def __init__(self, seed: int, dialog: bool = False) -> None:
        self.seed, self.actions = seed, []
        self.show_home(dialog)

    def show_home(self, dialog: bool = False) -> None:
        self.app = "System Home"
        self.painter = screens.Painter(np.random.default_rng([9, self.seed]))
        self.painter.home()
        self.apps = list(self.painter.marks)
        if dialog:
            self.painter.dialog()

    def show_page(self, word: str) -> None:
        self.app = word
        self.painter = screens.Painter(np.random.default_rng([9, self.seed, 1]))
        self.painter.words.remove(word)
        self.painter.words.append(word)  # the title takes the last
        self.painter.listing()

    def screenshot(self) -> bytes:
        file = io.BytesIO()
        self.painter.image.save(file, "PNG")
        return file.getvalue()

    def act(self, action: dict[str, Any]) -> None:
        self.actions.append(action)
        x, y = action["element"]
        pixel = (int(x / 1000 * screens.WIDTH), int(y / 1000 * screens.HEIGHT))
        touched = [m for m in self.painter.marks if score.is_inside(pixel, m.target)]
        for mark in touched:
            if mark.state in ("close", "back"):
                self.show_home()
            elif mark in self.apps:
                self.show_page(mark.word)


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    tables = {
        "model": {"path": str(find_model("pocket-vision"))},
        "defaults": {"grammar": "autoglm"},
    }
    with running(**tables) as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="EMPTY", max_retries=0) as found:
        yield found


def test_it_opens_an_app_and_sees_that_it_is_open(client: openai.OpenAI) -> None:
    phone = DrawnPhone(1)
    word = phone.apps[4].word
    agent = Agent(client, client.models.list().data[0].id, phone)
    assert agent.run(f"Open the {word} app", max_steps=4) == "Task completed."
    assert phone.app == word
    assert len(phone.actions) == 1


def test_it_closes_a_dialog_and_sees_that_it_is_closed(client: openai.OpenAI) -> None:
    phone = DrawnPhone(2, dialog=True)
    agent = Agent(client, client.models.list().data[0].id, phone)
    assert agent.run("Close the dialog", max_steps=4) == "Task completed."
    assert len(phone.actions) == 1
