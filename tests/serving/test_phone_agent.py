"""Open-AutoGLM's agent against our server over a socket, with a scripted phone: screenshots and actions to the end."""

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from PIL import Image, ImageDraw

from mlx_edge.decoding.stream import generate
from mlx_edge.models.load import load
from tests.serving.phone_agent import PARAMETERS, Agent
from tests.serving.running import Running, running
from tests.serving.seeing_model import write_seeing_model

pytest.importorskip("llguidance", reason="constraints need the package llguidance")

NUMBER = "(0|[1-9][0-9]{0,2})"
TAPS = rf"""start: /do\(action="Tap", element=\[{NUMBER},{NUMBER}\]\)/
"""
FINISH = {"type": "regex", "regex": r'finish\(message="[a-z]{1,8}"\)'}


class ScriptedPhone:
    """Shows a button in another place after every action."""

    def __init__(self) -> None:
        self.app = "System Home"
        self.actions: list[dict[str, Any]] = []

    def screenshot(self) -> bytes:
        image = Image.new("RGB", (72, 144), (240, 240, 245))
        top = 10 + 30 * len(self.actions)
        ImageDraw.Draw(image).rectangle((20, top, 52, top + 20), fill=(20, 90, 200))
        file = io.BytesIO()
        image.save(file, "PNG")
        return file.getvalue()

    def act(self, action: dict[str, Any]) -> None:
        self.actions.append(action)
        self.app = "Settings"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_seeing_model(tmp_path_factory.mktemp("models") / "autoglm-phone-9b")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Running]:
    grammar = folder / "taps.lark"
    grammar.write_text(TAPS)
    engine = {"kv_group_size": 32, "max_batch_size": 4}
    tables = {"model": {"path": str(folder)}, "defaults": {"grammar": str(grammar)}}
    with running(engine=engine, **tables) as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="EMPTY", max_retries=0) as found:
        yield found


def test_the_agent_drives_a_phone(client: openai.OpenAI) -> None:
    phone = ScriptedPhone()
    agent = Agent(client, "autoglm-phone-9b", phone)
    agent.context = [{"role": "system", "content": agent.system}]
    for step in range(3):
        agent.step("Open the Wi-Fi settings" if step == 0 else None)
    agent.extra_body = {"response_format": FINISH}
    last = agent.step(None)
    assert [action["action"] for action in phone.actions] == ["Tap"] * 3
    assert all(0 <= n <= 999 for action in phone.actions for n in action["element"])
    assert last["_metadata"] == "finish"
    assert all(reply.first_token_s for reply in agent.replies)
    # Earlier turns are sent without their images, as one list of one text.
    assert [len(m["content"]) for m in agent.context if m["role"] == "user"] == [1] * 4


def test_its_checks_before_the_start(client: openai.OpenAI) -> None:
    hi: Any = [{"role": "user", "content": "Hi"}]
    answer = client.chat.completions.create(
        model="autoglm-phone-9b", messages=hi, max_tokens=5, temperature=0.0, stream=False
    )
    assert len(answer.choices) == 1
    image = base64.b64encode(ScriptedPhone().screenshot()).decode()
    url = {"url": f"data:image/png;base64,{image}"}
    parts = [{"type": "image_url", "image_url": url}, {"type": "text", "text": "Open it."}]
    messages: Any = [{"role": "system", "content": "x"}, {"role": "user", "content": parts}]
    fields = {**PARAMETERS, "stream": False}
    answer = client.chat.completions.create(model="autoglm-phone-9b", messages=messages, **fields)
    assert answer.choices[0].message.content.startswith("do(action=")
    assert answer.usage.prompt_tokens > answer.usage.prompt_tokens_details.image_tokens > 8


def test_what_is_served_is_what_the_single_loop_says(folder: Path, client: openai.OpenAI) -> None:
    model, tokenizer = load(str(folder))
    phone = ScriptedPhone()
    first = phone.screenshot()
    phone.act({})
    images = [first, phone.screenshot()]
    shown = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Which?"}]
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": shown}], tokenize=True)
    expected = generate(model, tokenizer, prompt, images=images, max_pixels=1024, max_tokens=20)
    urls = [f"data:image/png;base64,{base64.b64encode(image).decode()}" for image in images]
    parts: Any = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    answer = client.chat.completions.create(
        model="autoglm-phone-9b",
        messages=[{"role": "user", "content": [*parts, shown[-1]]}],
        max_tokens=20,
        extra_body={
            "response_format": {"type": "text"},
            "separate_reasoning": False,
            "mm_processor_kwargs": {"max_pixels": 1024},
        },
    )
    assert answer.choices[0].message.content == expected


def test_the_model_says_that_it_takes_images(client: openai.OpenAI) -> None:
    assert client.models.retrieve("autoglm-phone-9b").model_extra["x_takes_images"] is True
