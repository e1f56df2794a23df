"""Images in messages: read from data: URIs alone, in order, each in its place; what is wrong is a 400 that names it."""

import base64
import io
import json
import re
import struct
import threading
import zlib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mlx_edge.models.vision import image as image_module
from mlx_edge.text import Tokenizer, load_tokenizer
from mlx_edge.weights.hub import find_model
from tests.serving.fake_engine import FakeEngine
from tests.serving.running import Running, running, wait_for

MARK = "<|image|>"
TEMPLATE = (
    "{% for m in messages %}<user>{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{{ '<|image|>' if p.type == 'image' else p.text }}{% endfor %}{% endif %}"
    "{% endfor %}<assistant>"
)
TEXT = {"type": "text", "text": "What is it?"}


def make_tokenizer(folder: Path, template: str = TEMPLATE) -> Tokenizer:
    """Pocket's, with a token for an image and a template that writes it."""
    source = find_model("pocket")
    contents = json.loads((source / "tokenizer.json").read_text())
    size = len(contents["model"]["vocab"])
    kinds = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    contents["added_tokens"].append({"id": size, "content": MARK, "special": True, **kinds})
    (folder / "tokenizer.json").write_text(json.dumps(contents))
    config = json.loads((source / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
    return load_tokenizer(folder)


def make_engine(folder: Path, template: str = TEMPLATE) -> FakeEngine:
    engine = FakeEngine(context_size=4096)
    engine.tokenizer = make_tokenizer(folder, template)
    engine.image_token_id = engine.tokenizer.token_to_id(MARK)
    return engine


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> FakeEngine:
    return make_engine(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def server(engine: FakeEngine) -> Any:
    with running(lambda _: engine, max_images=3) as found:
        yield found


def encode(width: int = 6, height: int = 4, kind: str = "PNG", color: int = 9) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), (color, 2, 3)).save(file, kind)
    return file.getvalue()


def bomb() -> bytes:
    """A PNG of 30000 x 30000 pixels in a few bytes."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    head = struct.pack(">IIBBBBB", 30000, 30000, 8, 0, 0, 0, 0)
    data = zlib.compress(bytes(1 << 16))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def uri(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def part(url: str, **more: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, **more}}


def user(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def test_images_come_to_the_engine_in_their_places(server: Running, engine: FakeEngine) -> None:
    files = [encode(color=1), encode(kind="JPEG"), encode(kind="WEBP")]
    messages = [
        user(part(uri(files[0])), TEXT),
        {"role": "assistant", "content": "It is red."},
        user(TEXT, part(uri(files[1], "jpeg")), {"type": "image_url", "image_url": uri(files[2])}),
    ]
    status, headers, body = server.chat(messages=messages)
    assert status == 200
    assert "x-mlx-edge-ignored-fields" not in headers
    request = engine.requests[-1]
    assert request.images == tuple(files)
    text = engine.tokenizer.decode(request.prompt)
    assert text == (
        f"<user>{MARK}What is it?<user>It is red.<user>What is it?{MARK}{MARK}<assistant>"
    )
    assert body["usage"]["prompt_tokens_details"]["image_tokens"] == 0  # as the fake engine counts


@pytest.mark.parametrize(
    "fields",
    [
        {"max_pixels": 5000},
        {"mm_processor_kwargs": {"max_pixels": 5000}},
        {"max_pixels": 5000, "mm_processor_kwargs": {"max_pixels": 5000}},
    ],
)
def test_the_size_of_images(server: Running, engine: FakeEngine, fields: dict[str, Any]) -> None:
    assert server.chat(messages=[user(part(uri(encode())))], **fields)[0] == 200
    assert engine.requests[-1].max_pixels == 5000


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_pixels": 1, "mm_processor_kwargs": {"max_pixels": 2}}, "max_pixels"),
        ({"max_pixels": 0}, "max_pixels"),
        ({"mm_processor_kwargs": {"min_pixels": 2}}, "mm_processor_kwargs.min_pixels"),
    ],
)
def test_sizes_that_are_none(server: Running, fields: dict[str, Any], param: str) -> None:
    status, _, body = server.chat(messages=[user(part(uri(encode())))], **fields)
    assert (status, body["error"]["param"]) == (400, param)


def test_a_size_without_an_image_is_listed_as_ignored(server: Running) -> None:
    status, headers, _ = server.chat(max_pixels=5, mm_processor_kwargs={"max_pixels": 5})
    assert status == 200
    assert headers["x-mlx-edge-ignored-fields"] == "max_pixels, mm_processor_kwargs"


@pytest.mark.parametrize("detail", ["auto", "low", "high"])
def test_detail_is_listed_as_ignored(server: Running, detail: str) -> None:
    status, headers, _ = server.chat(messages=[user(part(uri(encode()), detail=detail))])
    assert status == 200
    assert headers["x-mlx-edge-ignored-fields"] == "image_url.detail"


PNG = encode(40, 40)
BAD_URLS = {
    "address": ("http://127.0.0.1:1/x.png", "no address is fetched; send the image itself"),
    "file": ("file:///etc/passwd", "no address is fetched"),
    "path": ("/etc/passwd", "no address is fetched"),
    "empty": ("", "no address is fetched"),
    "no base64": ("data:image/png;base64,@@@@", "not base64"),
    "spaces": ("data:image/png;base64,AAAA AAAA", "not base64"),
    "not ASCII": ("data:image/png;base64,ÄÖÜ!", "not base64"),
    "padding": ("data:image/png;base64,A", "not base64"),
    "nothing": ("data:image/png;base64,", "is empty"),
    "plain": ("data:image/png,abc", "expected data:image/png;base64"),
    "text": ("data:text/plain;base64,AAAA", "expected data:image/png;base64"),
    "cut": (uri(PNG[:-30]), "cut short"),
    "head alone": (uri(PNG[:20]), ""),
    "noise": (uri(b"\x01\x02\x03\x04" * 50), "no image format begins"),
    "pdf": (uri(b"%PDF-1.4 ..."), "a PDF file"),
    "svg": (uri(b"<svg xmlns='http://www.w3.org/2000/svg'/>"), "an SVG file"),
    "bomb": (uri(bomb()), "pixels"),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", BAD_URLS)
def test_an_image_that_cannot_be_read(server: Running, name: str, stream: bool) -> None:
    url, words = BAD_URLS[name]
    messages = [{"role": "system", "content": "x"}, user(TEXT, part(url))]
    status, _, body = server.chat(messages=messages, stream=stream)
    error = body["error"]
    assert (status, error["param"]) == (400, "messages[1].content[1]")
    assert error["message"].startswith("messages[1].content[1]: ")
    assert words in error["message"]
    assert "\n" not in error["message"]


@pytest.mark.parametrize("role", ["system", "developer", "assistant", "tool"])
def test_roles_that_show_no_images(server: Running, role: str) -> None:
    message = {"role": role, "content": [part(uri(encode()))]}
    if role == "tool":
        message["tool_call_id"] = "c"
    status, _, body = server.chat(messages=[user(TEXT), message])
    assert (status, body["error"]["param"]) == (400, "messages[1].content[0]")
    assert "expected 'user'" in body["error"]["message"]


@pytest.mark.parametrize(
    ("image", "param"),
    [
        ({"type": "image_url"}, "image_url"),
        ({"type": "image_url", "image_url": None}, "image_url"),
        ({"type": "image_url", "image_url": {}}, "url"),
        ({"type": "image_url", "image_url": {"url": 5}}, "url"),
        ({"type": "image_url", "image_url": {"url": "data:", "detail": "huge"}}, "detail"),
        ({"type": "image_url", "image_url": {"url": "data:", "size": 3}}, "size"),
        ({"type": "image", "image": "x"}, ""),
    ],
)
def test_parts_that_are_no_images(server: Running, image: dict[str, Any], param: str) -> None:
    status, _, body = server.chat(messages=[user(image)])
    assert status == 400
    assert body["error"]["param"].startswith("messages.0.content")
    assert body["error"]["param"].endswith(param)


def test_too_many_images(server: Running) -> None:
    status, _, body = server.chat(messages=[user(*[part(uri(encode()))] * 4)])
    assert (status, body["error"]["param"]) == (400, "messages[0].content[3]")
    assert "at most 3" in body["error"]["message"]


def test_a_text_that_says_the_images_token(server: Running) -> None:
    for parts in (
        [{"type": "text", "text": MARK}],
        [{"type": "text", "text": MARK}, part(uri(PNG))],
    ):
        status, _, body = server.chat(messages=[user(*parts)])
        assert status == 400
        assert "stands for an image" in body["error"]["message"]


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.role }}{% endfor %}",
        "{% for m in messages %}{{ m.content }}{% endfor %}",
        "{% for m in messages %}{{ m.content + '' }}{% endfor %}",
    ],
)
def test_a_template_without_a_place(tmp_path: Path, template: str) -> None:
    with running(lambda _: make_engine(tmp_path, template)) as server:
        status, _, body = server.chat(messages=[user(TEXT, part(uri(PNG)))])
    assert status == 400
    assert "template" in body["error"]["message"]


def test_a_model_of_text_alone() -> None:
    with running(lambda _: FakeEngine()) as server:
        status, _, body = server.chat(messages=[user(TEXT, part(uri(PNG)))])
        assert (status, body["error"]["param"]) == (400, "messages[0].content[1]")
        assert "reads text only" in body["error"]["message"]
        assert server.ask("GET", "/v1/models/pocket")[2]["x_takes_images"] is False


def test_models_say_that_they_take_images(server: Running) -> None:
    assert server.ask("GET", "/v1/models/pocket")[2]["x_takes_images"] is True


def test_an_image_is_not_in_the_log(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    url = uri(PNG)
    with caplog.at_level("DEBUG"):
        server.chat(messages=[user(part(url))])
        server.chat(messages=[user(part(url[:-40]))])
    assert not re.search(r"[A-Za-z0-9+/]{60}", caplog.text)


def test_a_large_image_needs_little_beside_itself(server: Running) -> None:
    """A screenshot of 10 MB as base64 passes the limit of the body; it is the engine's in one piece."""
    data = encode(1400, 1900, "BMP")
    assert len(data) > 7 << 20
    assert server.chat(messages=[user(part(uri(data)))])[0] == 200


def test_texts_do_not_wait_for_images(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few images are decoded at a time, and a text is answered while others wait for that."""
    may_go, num_begun = threading.Event(), []

    def decode_slowly(data: bytes, name: str) -> None:
        num_begun.append(len(data))
        assert may_go.wait(60)

    monkeypatch.setattr(image_module, "read_image", decode_slowly)
    found: list[int] = []
    messages = [user(part(uri(PNG)))]
    threads = [
        threading.Thread(target=lambda: found.append(server.chat(messages=messages)[0]))
        for _ in range(40)
    ]
    for thread in threads:
        thread.start()
    try:
        wait_for(lambda: len(num_begun) == 2)
        assert server.chat()[0] == 200
        assert len(num_begun) == 2
    finally:
        may_go.set()
        for thread in threads:
            thread.join(60)
    assert found == [200] * 40
