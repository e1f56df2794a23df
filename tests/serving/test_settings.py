"""A TOML file and the flags over it: what is unknown, wrong or without meaning is named in one line."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mlx_edge import serve
from mlx_edge.errors import InvalidRequestError
from mlx_edge.serving.flags import REFUSED, make_parser, read_flags
from mlx_edge.serving.settings import Settings, parse_duration, read_settings

FILE = """
[server]
port = 9000
keep_alive = 60
allowed_hosts = ["edge.lan"]
[defaults]
temp = 1
chat_template_args = {enable_thinking = false}
[engine]
max_batch_size = 4
kv_bits = 8
[models.small]
path = "pocket"
[models.big]
path = "owner/name"
precision = "float"
[models.big.engine]
kv_bits = 4
"""


def read(tmp_path: Path, text: str, *flags: str) -> Settings:
    path = tmp_path / "server.toml"
    path.write_text(text)
    args = make_parser("x").parse_args(["--config", str(path), *flags])
    return read_settings(args.config, read_flags(args))


def test_a_file(tmp_path: Path) -> None:
    found = read(tmp_path, FILE)
    small, big = found.models
    assert (found.server.port, found.server.keep_alive, found.defaults.temp) == (9000, "60", 1.0)
    assert found.server.allowed_hosts == ("edge.lan",)
    assert found.defaults.chat_template_args == {"enable_thinking": False}
    assert (small.engine.max_batch_size, small.engine.kv_bits, small.precision) == (4, 8, "int8")
    assert (big.name, big.path, big.engine.max_batch_size, big.engine.kv_bits) == (
        "big",
        "owner/name",
        4,
        4,
    )


def test_flags_go_over_the_file(tmp_path: Path) -> None:
    flags = ("--port", "1", "--temp", "0.5", "--decode-concurrency", "2", "--kv-bits", "8")
    found = read(tmp_path, FILE, *flags, "--model", "owner/other", "--precision", "int8")
    assert (found.server.port, found.defaults.temp) == (1, 0.5)
    assert [model.name for model in found.models] == ["owner/other", "small", "big"]
    assert {model.engine.max_batch_size for model in found.models} == {2}
    assert {model.engine.kv_bits for model in found.models} == {8}
    assert {model.precision for model in found.models} == {"int8"}


def test_without_a_file(tmp_path: Path) -> None:
    found = read_settings(None, {})
    assert (found.server.host, found.server.port) == ("127.0.0.1", 8080)
    assert [model.name for model in found.models] == ["pocket"]
    folder = tmp_path / "My-Model"
    folder.mkdir()
    assert read_settings(None, {"model": {"path": str(folder)}}).models[0].name == "My-Model"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[serve]\nport = 1", r"section \[serve\] is not known; did you mean 'server'"),
        ("[server]\nports = 1", r"\[server\] ports is not known; did you mean 'port'"),
        ("[server]\napi_keys = ['x']", "api_keys is not known; did you mean 'api_key'"),
        ("[server]\nport = '1'", r"\[server\] port is '1', expected int"),
        ("[server]\nlazy = 1", "lazy is 1, expected bool"),
        ("[server]\nport = true", "port is True, expected int"),
        ("[server]\nlog_level = 'LOUD'", "expected one of: DEBUG"),
        ("[server]\nallowed_hosts = 'x'", "a list of strings"),
        ("[server]\nbody_timeout_s = 0", "body_timeout_s is 0.0, expected more than 0"),
        ("[defaults]\ntemperature = 1", "expected one of: max_tokens, temp"),
        ("[engine]\nmax_batch = 1", "did you mean 'max_batch_size'"),
        ("[engine]\nkv_bits = 5", "kv_bits is 5"),
        ("[models.x]\nrevision = 'a'", r"\[models.x\] has no path"),
        ("[models.x]\npath = 'a'\nnane = 1", "did you mean 'name'|is not known"),
        ("[models.x]\npath = 'a'\nname = 'y'", "the section's own name"),
        ("[models]\nx = 'pocket'", "expected a section"),
        ("port = 1", "'server'|is not known"),
        ("[server", "cannot be read as TOML"),
    ],
)
def test_mistakes_in_a_file(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words) as caught:
        read(tmp_path, text)
    assert "\n" not in str(caught.value).strip()


@pytest.mark.parametrize("flag", sorted(REFUSED))
def test_flags_without_a_meaning_say_what_to_use(flag: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as caught:
        make_parser("x").parse_args([flag, "1"])
    assert caught.value.code == 2
    assert f"{flag} has no meaning here: {REFUSED[flag]}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "seconds"), [("0", 0.0), ("90", 90.0), ("5m", 300.0), ("1.5h", 5400.0), ("-1", None)]
)
def test_durations(text: str, seconds: float | None) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--host", "0.0.0.0"], "no API key"),
        (["--config", "/nowhere.toml"], "/nowhere.toml cannot be read: No such file"),
        (["--model", "/nowhere/model"], "/nowhere/model"),
        (["--kv-bits", "5"], "kv_bits is 5"),
        (["--model-dir", "/nowhere"], "--model-dir /nowhere is no folder"),
        (["--api-key-file", "/nowhere"], "cannot be read: No such file"),
        (["--port", "0", "--chat-template", "/nowhere.jinja"], "is no file, no template"),
    ],
)
def test_the_command_ends_with_one_line(flags: list[str], words: str, capsys: Any) -> None:
    assert serve.main(flags) == 2
    printed = capsys.readouterr().err
    assert words in printed
    assert printed.count("\n") == 1


def test_help_needs_no_server_library_and_a_missing_one_is_named() -> None:
    program = (
        "import sys\n"
        "for name in ('fastapi', 'uvicorn', 'pydantic', 'prometheus_client', 'mlx.core'):\n"
        "    sys.modules[name] = None\n"
        "from mlx_edge import serve\n"
        "code = serve.main([])\n"
        "try:\n"
        "    serve.main(['--help'])\n"
        "except SystemExit as end:\n"
        "    sys.exit(code if end.code == 0 else 99)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], check=False, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "pip install 'mlx-edge[serve]'" in done.stderr
    assert done.stderr.count("\n") == 1
    assert "--decode-concurrency" in done.stdout
