"""One child process, timed and limited: what it said, how long it took, how much memory, why it failed.

A child that runs past its limit is ended, and what it had said is kept. Knows nothing of what is measured.
"""

import contextlib
import os
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO


@dataclass(frozen=True)
class Finished:
    """A child that has ended."""

    out: str
    err: str
    error: str | None  # why it did not do its work, one line
    wall_s: float
    first_byte_s: float | None  # from the start to the first byte of its standard output
    peak_bytes: int  # of resident memory, mapped files included
    stolen_s: float  # CPU time that the host gave to others meanwhile, all cores together


def run_child(
    command: Sequence[str | Path], *, limit_s: float, cores: int, folder: Path
) -> Finished:
    """Run a command on the first `cores` of the cores that this process may use, for at most `limit_s`."""
    words = [str(word) for word in command]
    stolen = _stolen_ticks()
    start = time.perf_counter()
    with tempfile.TemporaryFile() as errors:
        try:
            child = start_child(words, cores=cores, folder=folder, errors=errors)
        except OSError as failure:
            reason = f"{words[0]}: {failure.strerror}"
            return Finished("", "", reason, 0.0, None, 0, 0.0)
        pieces: list[bytes] = []
        first_byte = None
        try:
            for piece in _pieces(child, start + limit_s):
                first_byte = first_byte or time.perf_counter() - start
                pieces.append(piece)
        except BaseException:  # an interrupted run leaves nothing behind
            end_child(child, 0.0)
            raise
        is_late = time.perf_counter() - start >= limit_s
        peak = end_child(child, start + limit_s)
        wall = time.perf_counter() - start
        errors.seek(0)
        said = errors.read().decode(errors="replace")
    return Finished(
        out=b"".join(pieces).decode(errors="replace"),
        err=said,
        error=_reason(child.returncode, said, limit_s if is_late else None),
        wall_s=wall,
        first_byte_s=first_byte,
        peak_bytes=peak,
        stolen_s=(_stolen_ticks() - stolen) / os.sysconf("SC_CLK_TCK"),
    )


def start_child(
    words: list[str], *, cores: int, folder: Path, errors: IO[bytes] | int, is_asked: bool = False
) -> subprocess.Popen[bytes]:
    """Start a command in a process group of its own; `is_asked` gives it a standard input."""
    with confined(cores):
        return subprocess.Popen(
            words,
            cwd=folder,
            stdin=subprocess.PIPE if is_asked else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
            start_new_session=True,
        )


@contextlib.contextmanager
def confined(cores: int) -> Iterator[None]:
    """This thread on some of its cores, which a child that is started meanwhile inherits."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    own = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(own)[:cores])
    try:
        yield
    finally:
        os.sched_setaffinity(0, own)


def _pieces(child: subprocess.Popen[bytes], deadline: float) -> Iterator[bytes]:
    """What the child writes, as it comes, until it stops or is late."""
    assert child.stdout is not None
    pipe = child.stdout.fileno()
    while (left := deadline - time.perf_counter()) > 0:
        if not select.select([pipe], [], [], left)[0]:
            return
        piece = os.read(pipe, 1 << 16)
        if not piece:
            return
        yield piece


def end_child(child: subprocess.Popen[bytes], deadline: float) -> int:
    """Wait for the child until the deadline, then end it; its peak of resident memory in bytes."""
    while True:
        pid, status, usage = os.wait4(child.pid, os.WNOHANG)
        if pid:
            break
        if time.perf_counter() >= deadline:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
        time.sleep(0.002)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.stdout is not None:
        child.stdout.close()
    return usage.ru_maxrss * 1024


def _reason(code: int, said: str, limit_s: float | None) -> str | None:
    if limit_s is not None:
        return f"took longer than {limit_s:.0f} s"
    if code == 0:
        return None
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    last = lines[-1][:200] if lines else "without a word"
    return f"killed by signal {-code}: {last}" if code < 0 else f"ended with {code}: {last}"


def _stolen_ticks() -> int:
    """The steal column of /proc/stat; 0 where there is none."""
    try:
        return int(Path("/proc/stat").read_text().split("\n", 1)[0].split()[8])
    except (OSError, IndexError, ValueError):
        return 0
