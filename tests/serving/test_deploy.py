"""The container's files say what the server understands, and nothing in them opens a door."""

import json
import tomllib
from pathlib import Path

import pytest

from mlx_edge.errors import InvalidRequestError
from mlx_edge.serving.settings import read_settings

ROOT = Path(__file__).parents[2]


def test_the_settings_are_known_and_need_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLX_EDGE_API_KEY", raising=False)
    path = str(ROOT / "deploy" / "server.toml")
    with pytest.raises(InvalidRequestError, match="no API key"):
        read_settings(path, {})
    monkeypatch.setenv("MLX_EDGE_API_KEY", "k")
    assert read_settings(path, {}).models[0].name == "pocket"


def test_the_image_runs_as_nobody_special_and_asks_for_health() -> None:
    text = (ROOT / "Dockerfile").read_text()
    assert text.index("USER edge") < text.index("ENTRYPOINT")
    assert "/health" in text.split("HEALTHCHECK")[1]
    assert "API_KEY=" not in text.split("\n", 1)[1]


def test_the_wheel_takes_the_page_along() -> None:
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["scikit-build"]
    assert packages["wheel"]["packages"] == ["mlx_edge"]
    ignored = (ROOT / ".dockerignore").read_text().split()
    needed = packages["sdist"]["include"]
    assert all(f"!{name}" in ignored for name in needed), json.dumps(needed)
