"""The peers' environment, made once in a folder of its own: a venv, llama.cpp built from source, a memory reader.

Each step is done once and leaves a stamp; a killed setup goes on with the step it was in. A step that fails costs the
peers that need it, with the reason, and nothing else. Knows nothing of models and measurements.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

LLAMA = "llama-cpp-python==0.3.36"  # its source archive holds llama.cpp whole, with llama-bench
PACKAGES = {
    "gguf": "gguf==0.19.0",
    "openvino": "openvino-genai==2026.4.1.0",
    "mlx-lm": "mlx-lm==0.32.2",
    "mlx": "mlx[cpu]==0.32.4" if platform.system() == "Linux" else "mlx==0.32.4",
    "plot": "matplotlib>=3.9",
}
TOOLS = ("llama-bench", "llama-completion", "llama-quantize", "llama-batched-bench")
CMAKE_OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "GGML_NATIVE": "ON",  # for this very processor, which is its best
    "BUILD_SHARED_LIBS": "OFF",
    "LLAMA_BUILD_SERVER": "OFF",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_APP": "OFF",
    "LLAMA_OPENSSL": "OFF",
}


Word = str | Path


class StepFailed(Exception):
    """A step that did not work; the message is one line."""


@dataclass
class Workplace:
    """A folder with all that the peers need, and what could not be made."""

    root: Path
    failures: dict[str, str] = field(default_factory=dict)  # step -> reason, one line

    @property
    def python(self) -> Path:
        """The interpreter that has the peers' packages."""
        return self.root / "env" / "bin" / "python"

    def tool(self, name: str) -> Path:
        """A program of llama.cpp."""
        return self.root / "build" / "bin" / name

    @property
    def stream(self) -> Path:
        """The memory reader."""
        return self.root / "stream"

    @property
    def models(self) -> Path:
        """Where the models are."""
        return self.root / "models"

    def run(self, name: str, command: Sequence[Word], folder: Path | None = None) -> None:
        """Run one command of a step, its output in logs/NAME.log."""
        log = self.root / "logs" / f"{name}.log"
        with log.open("a") as lines:
            try:
                done = subprocess.run(
                    [str(word) for word in command],
                    cwd=folder,
                    stdout=lines,
                    stderr=lines,
                    check=False,
                )
            except OSError as failure:
                raise StepFailed(f"{command[0]}: {failure.strerror}") from failure
        if done.returncode:
            raise StepFailed(f"{Path(command[0]).name} ended with {done.returncode}; see {log}")


SetupStep = tuple[str, str, Callable[[Workplace], None]]  # name, what it would make, how


def set_up(root: Path, say: Callable[[str], None]) -> Workplace:
    """Make what is missing under `root`, a step after the other; failures are said and kept."""
    place = Workplace(root)
    (root / "logs").mkdir(parents=True, exist_ok=True)
    steps: list[SetupStep] = [
        ("env", sys.version.split()[0], _make_env),
        *((f"pip {name}", what, _install(what)) for name, what in PACKAGES.items()),
        ("llama.cpp source", LLAMA, _fetch_llama),
        ("llama.cpp", f"{LLAMA} {sorted(CMAKE_OPTIONS.items())} {TOOLS}", _build_llama),
        ("stream", _stream_source().read_text(), _build_stream),
    ]
    take_steps(place, root / "stamps.json", steps, say)
    return place


def take_steps(
    place: Workplace, stamps: Path, steps: Sequence[SetupStep], say: Callable[[str], None]
) -> None:
    """Take the steps whose stamps are not those wanted; failures are said and kept in `place.failures`."""
    done: dict[str, str] = json.loads(stamps.read_text()) if stamps.exists() else {}
    for name, version, step in steps:
        if done.get(name) == version:
            continue
        say(f"setup: {name} (log in {place.root / 'logs'})")
        try:
            step(place)
        except (StepFailed, OSError) as failure:
            place.failures[name] = str(failure)
            say(f"setup: {name} failed: {failure}")
            continue
        done[name] = version
        stamps.write_text(json.dumps(done, indent=1))


def _make_env(place: Workplace) -> None:
    place.run("env", [sys.executable, "-m", "venv", place.root / "env"])


def _install(requirement: str) -> Callable[[Workplace], None]:
    def step(place: Workplace) -> None:
        place.run("pip", [place.python, "-m", "pip", "install", "--quiet", requirement])

    return step


def _fetch_llama(place: Workplace) -> None:
    folder = place.root / "source"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    words = ["download", "--quiet", "--no-deps", "--no-binary", "llama-cpp-python", LLAMA]
    place.run("pip", [place.python, "-m", "pip", *words, "-d", folder])
    for archive in folder.glob("*.tar.gz"):
        with tarfile.open(archive) as files:
            files.extractall(folder, filter="data")
        archive.unlink()


def _build_llama(place: Workplace) -> None:
    sources = list((place.root / "source").glob("*/vendor/llama.cpp"))
    if not sources:
        raise StepFailed("the source archive holds no vendor/llama.cpp")
    cmake: Word | None = shutil.which("cmake")
    if cmake is None:
        place.run("pip", [place.python, "-m", "pip", "install", "--quiet", "cmake"])
        cmake = place.root / "env" / "bin" / "cmake"
    build = place.root / "build"
    options = [f"-D{name}={value}" for name, value in CMAKE_OPTIONS.items()]
    place.run("llama", [cmake, "-S", sources[0], "-B", build, *options])
    cores = str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2)
    place.run("llama", [cmake, "--build", build, "-j", cores, "--target", *TOOLS])


def _stream_source() -> Path:
    return Path(__file__).with_name("stream.cpp")


def _build_stream(place: Workplace) -> None:
    compiler = shutil.which("g++") or shutil.which("c++") or "c++"
    flags = ["-O3", "-march=native", "-std=c++20", "-pthread"]
    place.run("stream", [compiler, *flags, _stream_source(), "-o", place.stream])


def machine_facts() -> dict[str, str | int]:
    """What the figures were made on."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    facts = dict(line.split(":", 1) for line in lines if ":" in line)
    cleaned = {name.strip(): value.strip() for name, value in facts.items()}
    flags = cleaned.get("flags", "").split()
    wanted = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "asimddp")
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": cleaned.get("model name", platform.processor() or "unknown"),
        "family": f"{cleaned.get('cpu family', '?')}/{cleaned.get('model', '?')}",
        "instruction_sets": " ".join(flag for flag in wanted if flag in flags),
        "cores": os.cpu_count() or 0,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "python": platform.python_version(),
    }


def peer_versions(place: Workplace) -> dict[str, str]:
    """The packages that the peers run from."""
    names = ["openvino-genai", "openvino", "mlx-lm", "mlx", "gguf"]
    program = (
        "import importlib.metadata as m, json, sys\n"
        "print(json.dumps({n: m.version(n) for n in sys.argv[1:] if list(m.Distribution.discover(name=n))}))"
    )
    versions = {"llama.cpp": f"in {LLAMA}"}
    try:
        found = subprocess.run(
            [str(place.python), "-c", program, *names], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return versions
    installed: dict[str, str] = json.loads(found.stdout)
    return versions | installed
