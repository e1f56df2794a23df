"""Models from a hub: what is fetched and when, and one line for each thing that can go wrong.

The hub is a server on loopback. Its client reads its settings when imported, so it runs in processes of its own;
one of them serves for all the errors.
"""

import errno
import json
import os
import pty
import re
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from mlx_edge.errors import InvalidRequestError, ModelFormatError
from mlx_edge.weights.hub import find_model
from tests.weights.hub_server import Repository, serve

POCKET = {path.name: path.read_bytes() for path in find_model("pocket").iterdir()}
SMALL = {
    "README.md": b"-",
    "config.json": b"{}",
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"-",
    "additional_chat_templates/tools.jinja": b"-",
    "model.safetensors": bytes(range(256)) * 100,
}
UNWANTED = {
    "modeling.py": b"raise SystemExit",
    "pytorch_model.bin": b"pickle",
    "consolidated.safetensors": b"the same again",
    "onnx/config.json": b"{}",
    "original/model.safetensors": b"-",
}
WEIGHTS_NAME = "model.safetensors"
REFUSED = json.dumps({"error": "Invalid \x1b[31m credentials\nin header"}).encode()

# One find_model per case, each a table: name, revision, and what to break in this process. A JSON line for each.
DRIVER = """
import json, sys, time
time.sleep = lambda seconds: None  # the client waits between its tries, and writes in steps of 10 MiB
from mlx_edge.weights.hub import find_model
find_model("pocket"), find_model("/")
assert "huggingface_hub" not in sys.modules
from huggingface_hub import constants, file_download
constants.DOWNLOAD_CHUNK_SIZE = 1024
get, cache = file_download.http_get, constants.HF_HUB_CACHE
def fail(*args, **kwargs):
    raise OSError(int(case["errno"]), "No space left on device")
for case in json.loads(sys.argv[1]):
    file_download.http_get = fail if "errno" in case else get
    constants.HF_HUB_CACHE = case.get("cache", cache)
    try:
        folder = find_model(case["name"], revision=case.get("revision"))
        found = [str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()]
        print(json.dumps({"folder": str(folder), "files": sorted(found)}), flush=True)
    except Exception as error:
        print(json.dumps({"kind": type(error).__name__, "message": str(error)}), flush=True)
"""


def settings(endpoint: str, home: Path, **more: str) -> dict[str, str]:
    inherited = {
        k: v for k, v in os.environ.items() if not re.match("HF_|HUGGING|TQDM|.*_proxy", k)
    }
    return {**inherited, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "NO_PROXY": "*", **more}


def drive(
    cases: list[dict[str, str]], endpoint: str, home: Path, **more: str
) -> tuple[list[dict[str, Any]], str]:
    """The results of `find_model`, and what stood on stderr."""
    command = [sys.executable, "-W", "error", "-c", DRIVER, json.dumps(cases)]
    environment = settings(endpoint, home, **more)
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    return [json.loads(line) for line in found.stdout.splitlines()], found.stderr


REPOSITORIES = {
    "o/whole": Repository({**SMALL, **UNWANTED}),
    "o/other-name": Repository({"config.json": b"{}", "weights.00.safetensors": b"-"}),
    "o/branch": Repository(SMALL, commit="c" * 40, branch="refs/pr/1"),
    "o/gated-401": Repository(SMALL, answer=401, headers={"X-Error-Code": "GatedRepo"}),
    "o/gated-403": Repository(SMALL, answer=403, headers={"X-Error-Code": "GatedRepo"}),
    "o/private": Repository(SMALL, answer=401, headers={"X-Error-Code": "RepoNotFound"}),
    "o/token": Repository(SMALL, answer=401, body=REFUSED),
    "o/forbidden": Repository(SMALL, answer=403),
    "o/bin": Repository({"config.json": b"{}", "pytorch_model.bin": b"-"}),
    "o/gguf": Repository({f"model-{i}.gguf": b"-" for i in range(3)}),
    "o/empty": Repository({"README.md": b"-"}),
    "o/nested": Repository({"config.json": b"{}", "unet/model.safetensors": b"-"}),
    "o/adapter": Repository({"adapter_config.json": b"{}", "adapter_model.safetensors": b"-"}),
    "o/down": Repository(SMALL, answer=503),
    "o/busy": Repository(SMALL, answer=429, headers={"Retry-After": "77"}),
    "o/half-down": Repository(SMALL, answer=500, page_alone=True),
    "o/portal": Repository(SMALL, answer=203, body=b"<html>please log in</html>"),
    "o/cut": Repository(SMALL, cut=WEIGHTS_NAME),
    "o/partial": Repository(SMALL),
    "o/unlisted": Repository(SMALL),
    "o/shaky": Repository(SMALL, dropped={WEIGHTS_NAME: 1}),
    "o/breaking": Repository(SMALL, dropped={WEIGHTS_NAME: 6}),  # a try and five resumptions
}
CASES: dict[str, dict[str, str]] = {
    **{name: {"name": name} for name in REPOSITORIES},
    "other-branch": {"name": "o/branch", "revision": "refs/pr/1"},
    "commit": {"name": "o/branch", "revision": "c" * 40},
    "missing": {"name": "o/missing"},
    "revision": {"name": "o/whole", "revision": "v9"},
    "again": {"name": "o/breaking"},
    "full": {
        "name": "o/branch",
        "revision": "refs/pr/1",
        "errno": str(errno.ENOSPC),
        "cache": "c2",
    },
    "no cache": {"name": "o/whole", "cache": "/dev/null/hub"},
}


class Hub(NamedTuple):
    """What each case gave, by name; every request that the server saw; where it was, and where the cache is."""

    results: dict[str, dict[str, Any]]
    requests: list[str]
    endpoint: str
    home: Path


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Hub:
    """All the cases, in one process; then the server is gone."""
    home = tmp_path_factory.mktemp("hub")
    CASES["full"]["cache"] = str(home / "full")
    with serve(REPOSITORIES) as server:
        results, _ = drive(list(CASES.values()), server.endpoint, home)
        named = dict(zip(CASES, results, strict=True))
        return Hub(named, server.take_requests(), server.endpoint, home)


@pytest.mark.parametrize("case", ["o/whole", "other-branch", "commit", "o/shaky", "again"])
def test_fetches_the_model_and_nothing_else(hub: Hub, case: str) -> None:
    result = hub.results[case]
    assert result.get("files") == sorted(set(SMALL) - {"README.md"}), result
    content = (Path(result["folder"]) / WEIGHTS_NAME).read_bytes()
    assert content == SMALL[WEIGHTS_NAME]
    assert not [line for line in hub.requests if line.endswith(tuple(UNWANTED))]


def test_fetches_weights_of_another_name(hub: Hub) -> None:
    assert hub.results["o/other-name"]["files"] == ["config.json", "weights.00.safetensors"]


def test_broken_connection_is_resumed_where_it_broke(hub: Hub) -> None:
    written = len(SMALL[WEIGHTS_NAME]) // 2 // 1024 * 1024
    gets = [line for line in hub.requests if re.match("GET /o/shaky/.*/model.safetensors", line)]
    assert [line.partition(" from ")[2] for line in gets] == ["", str(written)]


def test_second_call_fetches_only_what_the_first_lost(hub: Hub) -> None:
    gets = [line.split()[1] for line in hub.requests if line.startswith("GET /o/breaking/")]
    others = [line for line in gets if not line.endswith(WEIGHTS_NAME)]
    assert len(gets) - len(others) == 7 and len(others) == len(set(others))


INVALID, FORMAT = InvalidRequestError.__name__, ModelFormatError.__name__
ERRORS = {
    "o/gated-401": (INVALID, "o/gated-401: a gated repository", "/o/gated-401, then log in"),
    "o/gated-403": (INVALID, "a gated repository", "`hf auth login` or set HF_TOKEN"),
    "o/private": (INVALID, "no such repository on the hub, or a private one", "check the name"),
    "missing": (INVALID, "o/missing: no such folder here, and no such repo", "check the name"),
    "revision": (INVALID, "o/whole at revision v9: the repository has no such", "branches, tags"),
    "o/branch": (INVALID, "o/branch: the repository has no such revision", "branches, tags"),
    "o/token": (INVALID, "answers 401 (Invalid [31m credentials in header)", "may read this model"),
    "o/forbidden": (INVALID, "answers 403 (Forbidden)", "may read this model"),
    "o/bin": (FORMAT, "pytorch_model.bin, but no safetensors", "; nothing was downloaded"),
    "o/gguf": (FORMAT, "model-0.gguf and 2 more such files, but no safetensors", "nothing was"),
    "o/empty": (FORMAT, "found no weights", "nothing was downloaded"),
    "o/nested": (FORMAT, "found no weights", "nothing was downloaded"),
    "o/adapter": (FORMAT, "found no config.json", "not an adapter"),
    "o/down": (FORMAT, "answers 503 (Service Unavailable), and the copy in the cache", "later"),
    "o/busy": (FORMAT, "answers 429 (Too Many Requests)", "try again in 77 s"),
    "o/half-down": (FORMAT, "answers 500 (Internal Server Error)", "try again later"),
    "o/portal": (FORMAT, "answers with something else than a model", "check HF_ENDPOINT"),
    "o/cut": (FORMAT, "the download broke off: ", "25600 but has size 25599", "run it again"),
    "o/breaking": (FORMAT, "the download broke off: ", "run it again: finished files are kept"),
    "full": (FORMAT, "is full; free space or set HF_HOME, then run it again"),
    "no cache": (FORMAT, "the hub's cache (/dev/null/hub) cannot be used", "or set HF_HOME"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_one_line(hub: Hub, case: str) -> None:
    result = hub.results[case]
    kind, *words = ERRORS[case]
    assert result["kind"] == kind, result
    for word in words:
        assert word in result["message"]
    assert result["message"].isprintable() and len(result["message"]) < 500


@pytest.mark.parametrize("name", ["o/bin", "o/gguf", "o/empty", "o/nested", "o/adapter"])
def test_list_of_files_is_looked_at_first(hub: Hub, name: str) -> None:
    asked = [line for line in hub.requests if f"{name}/" in f"{line}/"]
    assert asked == [f"GET /api/models/{name}"]


MALFORMED = (
    "a a/b/c /a/b a/ a//b -a/b a/b- a/b.git a--b/c a/b..c a/é hf://a/b https://huggingface.co/a/b"
)


@pytest.mark.parametrize("name", ["", "a/b c", "a/b\n", "a/" + "b" * 97, *MALFORMED.split()])
def test_malformed_name(name: str) -> None:
    with pytest.raises(ModelFormatError, match="no such folder, and no well-formed hub id"):
        find_model(name)


@pytest.mark.parametrize("revision", ["", "../main", "a..b", "-f", "a b", "a\n", "v^1", "/x", "~"])
def test_malformed_revision(revision: str) -> None:
    with pytest.raises(InvalidRequestError, match="expected a branch, a tag or a commit"):
        find_model("o/name", revision=revision)


def test_local_folder_has_no_revision(tmp_path: Path) -> None:
    for name in ("pocket", str(tmp_path)):
        with pytest.raises(InvalidRequestError, match="has no revision 'main'"):
            find_model(name, revision="main")


def test_offline_start(hub: Hub) -> None:
    """Cold, warm, warm by commit, and copies that lack a file."""
    (Path(hub.results["o/partial"]["folder"]) / "tokenizer.json").unlink()
    (Path(hub.results["o/unlisted"]["folder"]) / WEIGHTS_NAME).unlink()
    (trees,) = (hub.home / "hub" / "models--o--unlisted" / "trees").iterdir()
    trees.unlink()  # as older versions of the client leave the cache
    cases = [{"name": "o/cold"}, {"name": "o/whole"}, {"name": "o/whole", "revision": "a" * 40}]
    cases += [{"name": name} for name in ("o/other-name", "o/partial", "o/unlisted")]
    (cold, warm, commit, other, *broken), errors = drive(cases, hub.endpoint, hub.home)
    assert f"o/cold: the hub ({hub.endpoint}) cannot be reached: " in cold["message"]
    assert "the copy in the cache (" in cold["message"] and ") is missing; " in cold["message"]
    assert warm["folder"] == commit["folder"] == hub.results["o/whole"]["folder"]
    assert other["folder"] == hub.results["o/other-name"]["folder"]
    assert errors.count("the copy in the cache is used") == errors.count("\n") == 3
    for result in broken:
        assert result["kind"] == FORMAT and ") is incomplete; check the name" in result["message"]
    (cold, warm), errors = drive(cases[:2], hub.endpoint, hub.home, HF_HUB_OFFLINE="1")
    assert cold["message"].startswith("o/cold: HF_HUB_OFFLINE is set, and the copy in the cache (")
    assert cold["message"].endswith(") is missing; unset it, or download the model first")
    assert (warm["folder"], errors) == (commit["folder"], "")


@pytest.mark.parametrize("disabled", ["", "1"])
def test_progress_bar_on_a_terminal(tmp_path: Path, disabled: str) -> None:
    terminal, stderr = pty.openpty()
    termios.tcsetwinsize(stderr, (25, 80))
    with serve({"o/a": Repository(SMALL)}) as server:
        more = {"HF_HUB_DISABLE_PROGRESS_BARS": disabled} if disabled else {}
        command = [sys.executable, "-c", DRIVER, '[{"name": "o/a"}]']
        environment = settings(server.endpoint, tmp_path, **more)
        subprocess.run(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=stderr, check=True
        )
    os.write(stderr, b"end\n")
    shown = ""
    while not shown.endswith("end\r\n"):
        shown += os.read(terminal, 1 << 16).decode()
    os.close(stderr)
    os.close(terminal)
    if disabled:
        assert shown == "end\r\n"
    else:  # one bar, wiped off at the end
        assert "o/a:   0%|" in shown and shown.endswith(" \rend\r\n") and shown.count("\n") == 1


def test_generate_cold_warm_and_offline(tmp_path: Path) -> None:
    def generate() -> tuple[int, str, str]:
        command = [sys.executable, "-m", "mlx_edge.generate", "--model", "owner/pocket"]
        command += ["--max-tokens", "12", "--verbose", "False"]
        environment = settings(server.endpoint, tmp_path)
        found = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False
        )
        return found.returncode, found.stdout, found.stderr

    with serve({"owner/pocket": Repository(POCKET)}) as server:
        cold = generate()
        assert cold == (0, cold[1], "") and cold[1].strip()
        assert len([line for line in server.take_requests() if "/resolve/" in line]) > len(POCKET)
        assert generate() == cold
        warm = server.take_requests()
        assert warm and not [line for line in warm if "/resolve/" in line]
    code, text, errors = generate()
    assert (code, text) == cold[:2]
    assert errors.count("\n") == 1 and "the copy in the cache is used" in errors
