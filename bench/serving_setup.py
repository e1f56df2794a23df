"""What bench/serving.py needs beside what bench/peers.py has set up: llama.cpp's server, mlx-lm's folders, Locust.

Made once under the same work folder, a stamp for each step; what fails costs its own rows, with the reason. Knows
nothing of running a server.
"""

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from bench.peer_models import Models
from bench.peer_setup import (
    CMAKE_OPTIONS,
    LLAMA,
    SetupStep,
    StepFailed,
    Word,
    Workplace,
    take_steps,
)

LOCUST = "locust==2.47.0"
# In the same build folder: libraries are shared, the tools of the peers' run stay as they are.
SERVER_OPTIONS = CMAKE_OPTIONS | {
    "LLAMA_BUILD_SERVER": "ON",
    "LLAMA_BUILD_UI": "OFF",
    "LLAMA_USE_PREBUILT_UI": "OFF",  # it would be downloaded
}
POCKET = Path(str(files("mlx_edge") / "assets" / "pocket"))


def set_up_servers(place: Workplace, say: Callable[[str], None]) -> None:
    """Make what is missing; failures are said and kept in `place.failures`."""
    steps: list[SetupStep] = [
        ("llama-server", f"{LLAMA} {sorted(SERVER_OPTIONS.items())}", _build_server),
        ("locust", f"{LOCUST} {sys.version.split()[0]}", _install_locust),
    ]
    take_steps(place, place.root / "stamps-serving.json", steps, say)


def _build_server(place: Workplace) -> None:
    """Also where the peers' own build came before: only what the server adds is compiled."""
    sources = list((place.root / "source").glob("*/vendor/llama.cpp"))
    if not sources:
        raise StepFailed("no sources of llama.cpp; see the setup of bench.peers")
    cmake: Word = shutil.which("cmake") or place.root / "env" / "bin" / "cmake"
    options = [f"-D{name}={value}" for name, value in SERVER_OPTIONS.items()]
    place.run("llama-server", [cmake, "-S", sources[0], "-B", place.root / "build", *options])
    cores = str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2)
    words: list[Word] = ["--build", place.root / "build", "-j", cores, "--target", "llama-server"]
    place.run("llama-server", [cmake, *words])


def locust_python(place: Workplace) -> Path:
    """The interpreter that has Locust, which pins packages that others need otherwise."""
    return place.root / "env-locust" / "bin" / "python"


def _install_locust(place: Workplace) -> None:
    place.run("locust", [sys.executable, "-m", "venv", place.root / "env-locust"])
    place.run("locust", [locust_python(place), "-m", "pip", "install", "--quiet", LOCUST])


@dataclass(frozen=True)
class ServedModel:
    """One model in the form that each server reads."""

    name: str  # in the rows
    folder: Path  # ours
    widened: Path  # mlx-lm's: the same packs, floats as float32, which is its fastest on a CPU
    ggufs: dict[str, Path]  # llama.cpp's, by quantization
    is_story: bool = False  # what its prompts are


def served_models(place: Workplace, shape: Models) -> dict[str, ServedModel]:
    """ "1b" and "pocket", as the keys of the summary call them."""
    ggufs = {name: shape.gguf(name) for name in ("Q4_0", "Q4_K_M")}
    wide = place.models / f"{shape.shape.name}-float32"
    return {
        "1b": ServedModel(shape.shape.name, shape.mlx, wide, ggufs),
        "pocket": ServedModel("pocket", POCKET, place.models / "pocket-float32", {}, is_story=True),
    }


def widen(source: Path, target: Path) -> None:
    """Copy a model's folder with all floats as float32; the folder gets its name when it is whole."""
    import mlx.core as mx

    if target.exists():
        return
    part = target.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for path in source.iterdir():
        if path.suffix == ".safetensors":
            arrays = mx.load(str(path))
            assert isinstance(arrays, dict)
            wide = {name: _as_float32(array) for name, array in arrays.items()}
            mx.save_safetensors(str(part / path.name), wide, metadata={"format": "mlx"})
        elif path.suffix in {".json", ".model"}:
            shutil.copy(path, part / path.name)
    _name_another_end(part)
    part.rename(target)


def _name_another_end(folder: Path) -> None:
    """mlx-lm's server cannot be told to go on after an end token, so the folder calls a token so that never comes."""
    tokenizer = folder / "tokenizer_config.json"
    facts = json.loads(tokenizer.read_text())
    if (
        "unk_token" not in facts
    ):  # random weights with a vocabulary of 128k: the end token is as rare as any
        return
    tokenizer.write_text(json.dumps(facts | {"eos_token": facts["unk_token"]}))
    for name in ("config.json", "generation_config.json"):
        path = folder / name
        if path.exists():
            path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": 0}))


def _as_float32(array: Any) -> Any:
    import mlx.core as mx

    return array.astype(mx.float32) if mx.issubdtype(array.dtype, mx.floating) else array
