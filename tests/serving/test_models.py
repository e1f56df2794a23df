"""Names and engines: loaded on demand, unloaded when idle, one making room for another, none from outside a folder."""

import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import mlx_edge
from mlx_edge.errors import ModelFormatError
from mlx_edge.serving import models as models_module
from mlx_edge.serving.settings import ModelSettings, read_settings
from tests.serving.fake_engine import FakeEngine
from tests.serving.running import Running, serving, wait_for

POCKET = Path(mlx_edge.__file__).parent / "assets" / "pocket"


class Engines:
    """Makes fake engines and remembers them."""

    def __init__(self, **options: Any) -> None:
        self.made: list[tuple[str, FakeEngine]] = []
        self.options = options
        self.error: Exception | None = None

    def __call__(self, settings: ModelSettings) -> Any:
        if self.error is not None:
            raise self.error
        self.made.append((settings.name, FakeEngine(**self.options)))
        return self.made[-1][1]

    def open_names(self) -> list[str]:
        return [name for name, engine in self.made if not engine.is_closed]


def settings(tmp_path: Path, **server: Any) -> Any:
    path = tmp_path / "server.toml"
    path.write_text("[models.a]\npath = 'pocket'\n[models.b]\npath = 'pocket'\n")
    found = read_settings(str(path), {})
    return replace(found, server=replace(found.server, port=0, lazy=True, **server))


def say(server: Running, model: str | None) -> int:
    return server.chat(model=model)[0]


def test_loaded_on_demand_one_at_a_time(tmp_path: Path) -> None:
    engines = Engines()
    with serving(settings(tmp_path), engines) as server:
        assert engines.made == []
        assert [say(server, name) for name in (None, "a", "b", "b", "default_model")] == [200] * 5
        assert [name for name, _ in engines.made] == ["a", "b", "a"]
        assert engines.open_names() == ["a"]
        listed = server.ask("GET", "/v1/models")[2]["data"]
        assert {model["id"]: model["x_loaded"] for model in listed} == {"a": True, "b": False}
    assert engines.open_names() == []


def test_two_fit(tmp_path: Path) -> None:
    engines = Engines()
    with serving(settings(tmp_path, max_loaded_models=2), engines) as server:
        assert [say(server, name) for name in ("a", "b", "a")] == [200] * 3
        assert engines.open_names() == ["a", "b"]


def test_a_model_in_use_is_waited_for(tmp_path: Path) -> None:
    engines = Engines(words=["word "] * 40, delay_s=0.01)
    with serving(settings(tmp_path), engines) as server:
        statuses: list[int] = []
        first = threading.Thread(target=lambda: statuses.append(server.chat(max_tokens=40)[0]))
        first.start()
        wait_for(lambda: engines.made and engines.made[0][1].running)
        assert server.chat(model="b", max_tokens=1)[0] == 200
        assert statuses == [200]  # it was not broken off
        first.join()


def test_a_model_that_stays_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models_module, "ROOM_TIMEOUT_S", 0.05)
    engines = Engines(words=["word "] * 1000, delay_s=0.01)
    with serving(settings(tmp_path), engines) as server:
        first = threading.Thread(target=lambda: server.chat(max_tokens=1000))
        first.start()
        wait_for(lambda: engines.made and engines.made[0][1].running)
        status, headers, body = server.chat(model="b")
        assert (status, body["error"]["code"]) == (429, "queue_full")
        assert "retry-after" in headers
        engines.made[0][1].tickets[0].cancel()
        first.join()


@pytest.mark.parametrize(("keep_alive", "is_kept"), [("0", False), ("0.1s", False), ("-1", True)])
def test_idle_models_are_unloaded(tmp_path: Path, keep_alive: str, is_kept: bool) -> None:
    engines = Engines()
    with serving(settings(tmp_path, keep_alive=keep_alive), engines) as server:
        assert say(server, "a") == 200
        if is_kept:
            assert engines.open_names() == ["a"]
        else:
            wait_for(lambda: engines.open_names() == [])
            assert say(server, "a") == 200


def test_a_model_that_cannot_be_loaded(tmp_path: Path) -> None:
    engines = Engines()
    engines.error = ModelFormatError("/secret/path is broken")
    with serving(settings(tmp_path), engines) as server:
        status, _, body = server.chat()
        assert (status, body["error"]["code"]) == (500, "model_error")
        assert "secret" not in body["error"]["message"]
        engines.error = None
        assert say(server, "a") == 200


def test_the_folders_of_a_folder(tmp_path: Path) -> None:
    root = tmp_path / "models"
    for name in ("one", "owner/two"):
        shutil.copytree(POCKET, root / name)
    shutil.copytree(POCKET, tmp_path / "outside")
    engines = Engines()
    with serving(settings(tmp_path, model_dir=str(root)), engines) as server:
        listed = [model["id"] for model in server.ask("GET", "/v1/models")[2]["data"]]
        assert listed == ["a", "b", "one", "owner/two"]
        assert say(server, "one") == say(server, "owner/two") == 200
        assert server.ask("GET", "/v1/models/owner/two")[0] == 200
        for name in ("../outside", "one/../../outside", "/etc", "owner", ".", "one/", str(root)):
            assert say(server, name) == 404
        assert server.ask("GET", "/v1/models/../outside")[0] == 404
        assert server.ask("GET", "/v1/models/%2e%2e%2foutside")[0] == 404
