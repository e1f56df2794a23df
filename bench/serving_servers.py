"""The servers under test as processes: how each is started, when it is ready, what it takes, how it rests.

All may be up at once: one whose turn it is not is stopped by a signal, so that it can burn nothing. Knows nothing of
load and rounds.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.child import confined
from bench.peer_setup import Workplace
from bench.serving_setup import ServedModel

ROOT = Path(__file__).parents[1]
Key = tuple[str, str]  # a model's key and a server's name
OURS, LLAMA, MLXLM = "mlx_edge", "llama.cpp", "mlx-lm"
QUIET = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
SLOTS = 32
SLOT_CONTEXT = 512
# Its threads spin for each other unless told to sleep, which is better where another process wants a core.
ASLEEP = {"OMP_WAIT_POLICY": "passive"}
LLAMA_SETTINGS: dict[str, tuple[str, tuple[str, ...], dict[str, str]]] = {
    f"{quantization}, {word}{waiting}": (quantization, flags, env)
    for quantization in ("Q4_0", "Q4_K_M")
    for word, flags in (("repack", ()), ("no repack", ("--no-repack",)))
    for waiting, env in (("", {}), (", asleep", ASLEEP))
}


@dataclass(frozen=True)
class ServerSpec:
    """How one server is started with one model."""

    name: str
    words: tuple[str, ...]  # with {port} where the port goes
    folder: Path
    options: dict[str, Any] = field(default_factory=dict)  # fields that its requests need
    needs: tuple[str, ...] = ()  # steps of the setup
    is_exact: bool = True
    env: dict[str, str] = field(default_factory=dict)


def our_spec(model: ServedModel, *flags: str) -> ServerSpec:
    """mlx_edge with its defaults; a model is not unloaded while others have their turn."""
    words = [sys.executable, "-m", "mlx_edge.serve", "--model", str(model.folder)]
    words += ["--host", "127.0.0.1", "--port", "{port}", "--keep-alive", "-1", *flags]
    return ServerSpec(OURS, tuple(words), ROOT, {"ignore_eos": True})


def llama_spec(place: Workplace, model: ServedModel, setting: str, threads: int) -> ServerSpec:
    """llama.cpp: a slot for every client, flash attention, no copies of prompts of slots that rest."""
    quantization, flags, env = LLAMA_SETTINGS[setting]
    words = [str(place.tool("llama-server")), "-m", str(model.ggufs[quantization])]
    words += ["--host", "127.0.0.1", "--port", "{port}", "-t", str(threads), "-tb", str(threads)]
    words += ["-np", str(SLOTS), "-c", str(SLOTS * SLOT_CONTEXT), "-fa", "on", "-cram", "0"]
    words += ["--no-webui", "--offline", *flags]
    needs = ("llama.cpp", "llama-server", f"GGUF {model.name}")
    options = {"ignore_eos": True}
    return ServerSpec(f"{LLAMA} {setting}", tuple(words), place.root, options, needs, env=env)


def mlxlm_spec(place: Workplace, model: ServedModel) -> ServerSpec:
    """mlx-lm with floats as float32. It has no way to go on after an end token, so its counts are the usage's."""
    words = [str(place.python), "-m", "mlx_lm", "server", "--model", str(model.widened)]
    words += ["--host", "127.0.0.1", "--port", "{port}"]
    return ServerSpec(MLXLM, tuple(words), place.root, {}, ("pip mlx-lm",), is_exact=False)


class ServerFailed(Exception):
    """A server that did not start, or has ended; one line."""


class Server:
    """One running server. It holds still between `resume` and `pause` of others."""

    def __init__(self, spec: ServerSpec, logs: Path, threads: int):
        self.spec = spec
        self.port = _free_port()
        self.log = logs / f"serve-{spec.name.replace(' ', '_').replace(',', '')}.log"
        words = [word.replace("{port}", str(self.port)) for word in spec.words]
        start = time.perf_counter()
        with self.log.open("w") as log, confined(threads):
            self.child = subprocess.Popen(
                words,
                cwd=spec.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **QUIET, **spec.env},
                start_new_session=True,
            )
        self._begin = start
        self.start_s = 0.0
        self.model = "default_model"

    def wait_ready(self, limit_s: float = 120.0) -> None:
        """Until it answers; ServerFailed when it ends or takes longer."""
        url = f"http://127.0.0.1:{self.port}"
        while time.perf_counter() - self._begin < limit_s:
            if self.child.poll() is not None:
                raise ServerFailed(f"ended with {self.child.returncode}: {self._last_words()}")
            try:
                with urllib.request.urlopen(f"{url}/health", timeout=2):
                    break
            except (urllib.error.URLError, OSError):
                time.sleep(0.05)
        else:
            raise ServerFailed(f"not ready within {limit_s:.0f} s: {self._last_words()}")
        self.start_s = time.perf_counter() - self._begin
        if self.spec.name == OURS:
            with urllib.request.urlopen(f"{url}/v1/models", timeout=10) as answer:
                self.model = json.load(answer)["data"][0]["id"]

    def warm_up(self, limit_s: float = 300.0) -> None:
        """One request of two tokens, not counted: mlx-lm answers before it has loaded anything."""
        fields = {"model": self.model, "prompt": "Once", "max_tokens": 2, "temperature": 0.0}
        url = f"http://127.0.0.1:{self.port}/v1/completions"
        kind = {"Content-Type": "application/json"}
        request = urllib.request.Request(url, json.dumps(fields).encode(), kind)
        try:
            with urllib.request.urlopen(request, timeout=limit_s) as answer:
                answer.read()
        except (urllib.error.URLError, OSError) as failure:
            raise ServerFailed(f"no answer to its first request: {failure}") from failure

    def _last_words(self) -> str:
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines()]
        return next((line[:200] for line in reversed(lines) if line), "without a word")

    def is_alive(self) -> bool:
        """Whether the process is still there."""
        return self.child.poll() is None

    def pause(self) -> None:
        """Nothing of it runs until `resume`."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Go on."""
        self._signal(signal.SIGCONT)

    def stop(self, limit_s: float = 10.0) -> None:
        """Ask it to end, then end it."""
        self._signal(signal.SIGCONT)
        self._signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.child.wait(limit_s)
        self._signal(signal.SIGKILL)
        self.child.wait()

    def _signal(self, number: signal.Signals) -> None:
        if self.child.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.child.pid, number)

    def cpu_s(self) -> float:
        """CPU time so far; 0 where the system does not say."""
        try:
            stat = Path(f"/proc/{self.child.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0.0
        return (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")

    def forget_peak(self) -> None:
        """Count the peak of resident memory anew, where the system can."""
        with contextlib.suppress(OSError):
            Path(f"/proc/{self.child.pid}/clear_refs").write_text("5")

    def memory(self) -> dict[str, int]:
        """Bytes: `peak` of resident memory, mapped files included; `private` now, without them."""
        peak = _sum_lines(Path(f"/proc/{self.child.pid}/status"), ("VmHWM:",))
        private = ("Private_Dirty:", "Anonymous:")
        rollup = Path(f"/proc/{self.child.pid}/smaps_rollup")
        return {"peak": peak, "private": max(_sum_lines(rollup, (word,)) for word in private)}


def _sum_lines(path: Path, words: Sequence[str]) -> int:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(tuple(words)))


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


def end_on_sigterm() -> None:
    """Leave by an exception when asked to end, so that no server stays behind."""

    def leave(number: int, _: object) -> None:
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, leave)


class Servers:
    """All that are measured, by model and name; at most one is awake."""

    def __init__(self, specs: Mapping[Key, ServerSpec], place: Workplace, threads: int):
        self.specs, self.place, self.threads = dict(specs), place, threads
        self.running: dict[Key, Server] = {}
        self.failures: dict[Key, str] = {}

    def wake(self, name: Key) -> Server:
        """This server, started if need be, and no other awake. ServerFailed when there is none."""
        if name in self.failures:
            raise ServerFailed(self.failures[name])
        for other in self.running.values():
            other.pause()
        server = self.running.get(name)
        try:
            if server is None:
                server = self._start(name)
            server.resume()
            if not server.is_alive():
                raise ServerFailed(f"ended with {server.child.returncode}: {server._last_words()}")
        except ServerFailed as failure:
            self.failures[name] = str(failure)
            raise
        return server

    def _start(self, name: Key) -> Server:
        spec = self.specs.get(name)
        if spec is None:
            raise ServerFailed("no setting of it ran")
        for need in spec.needs:
            if reason := self.place.failures.get(need):
                raise ServerFailed(f"{need}: {reason}")
        try:
            server = self.running[name] = Server(spec, self.place.root / "logs", self.threads)
        except OSError as failure:
            raise ServerFailed(f"{spec.words[0]}: {failure.strerror}") from failure
        server.wait_ready()
        server.warm_up()
        return server

    def drop(self, name: Key) -> None:
        """End one that is not needed any more."""
        if server := self.running.pop(name, None):
            server.stop()

    def stop(self) -> None:
        """End all."""
        for server in self.running.values():
            server.stop()
        self.running.clear()


def machine_ticks() -> dict[str, float]:
    """CPU seconds of the whole machine so far: busy, and stolen by the host; zeros where it does not say."""
    try:
        line = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    except OSError:
        return {"busy": 0.0, "stolen": 0.0}
    ticks = [int(word) / os.sysconf("SC_CLK_TCK") for word in line]
    return {"busy": sum(ticks[:3]) + sum(ticks[5:7]), "stolen": ticks[7]}
