"""Text in, shared library out, kept in a folder so that the same text is compiled once on a machine.

The key is a hash of all that decides the result. An entry is a folder with the library and a report (a hash of the
library, the compiler's warnings, what its basic blocks do); it is renamed into place whole, so that processes may share
the cache, and an entry that does not match its report is built anew. Knows no kernel and no launch.
"""

import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from metal_emulator.compiler import (
    INCLUDE,
    NATIVE,
    Compiler,
    find_compiler,
    kernel_flags,
    runtime_command,
)
from metal_emulator.errors import Diagnostic, Lines, compile_error, parse_diagnostics
from metal_emulator.op_mix import static_mix

CACHE_VARIABLE = "METAL_EMULATOR_CACHE"
_LIBRARY = "library.so"
_REPORT = "report.json"


@dataclass(frozen=True)
class Built:
    """A shared library, and what the compiler said about it."""

    library: Path
    warnings: tuple[Diagnostic, ...] = ()
    blocks: tuple[dict[str, int], ...] = ()  # count mode: operations of each basic block
    was_cached: bool = False


def cache_folder() -> Path:
    """Where libraries are kept: METAL_EMULATOR_CACHE, or `metal_emulator` in the user's cache folder."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen)
    user = os.environ.get("XDG_CACHE_HOME")
    return (Path(user) if user else Path.home() / ".cache") / "metal_emulator"


def build_kernel(text: str, mode: str, lines: Lines) -> Built:
    """Compile a kernel's text for a mode. Raises MetalError with places in `lines` when clang refuses it."""
    compiler = find_compiler()
    flags = kernel_flags(mode)
    key = _key("kernel", compiler.version, *flags, _headers_hash(), text)
    return _cached(key, lambda folder: _compile_kernel(compiler, flags, text, mode, folder, lines))


def build_runtime() -> Built:
    """The runtime's library. Raises MetalError when there is no C++ compiler or it fails."""
    command = runtime_command()
    return _cached(
        _key("runtime", *command, _runtime_hash()), lambda folder: _compile_runtime(command, folder)
    )


def _key(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:40]


@cache
def _headers_hash() -> str:
    """A hash of what every kernel includes."""
    return _hash_of([NATIVE / "interface.h", *INCLUDE.rglob("*")])


@cache
def _runtime_hash() -> str:
    return _hash_of([*NATIVE.glob("*.cpp"), *NATIVE.glob("*.h")])


def _hash_of(paths: Sequence[Path]) -> str:
    files = sorted(path for path in paths if path.is_file())
    return _key(*(f"{path.relative_to(NATIVE)}\0{_hash(path)}" for path in files))


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _cached(key: str, make: Callable[[Path], dict[str, Any]]) -> Built:
    """The entry of a key, made by `make(folder)` (which writes the library and returns the report) if need be."""
    entry = cache_folder() / key[:2] / key
    known = _read(entry)
    if known:
        return known
    entry.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=entry.parent, prefix=".making_"))
    try:
        report = make(folder) | {"library": _hash(folder / _LIBRARY)}
        (folder / _REPORT).write_text(json.dumps(report), encoding="utf-8")
        _publish(folder, entry)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return Built(entry / _LIBRARY, *_from_report(report))


def _publish(folder: Path, entry: Path) -> None:
    """Rename the folder into place; another process that was first, wins, unless its entry is broken."""
    for _ in range(3):
        try:
            folder.rename(entry)
            return
        except OSError:
            if _read(entry):
                return
            broken = entry.with_name(f".broken_{os.getpid()}_{entry.name}")
            entry.rename(broken)
            shutil.rmtree(broken, ignore_errors=True)
    message = f"could not put a library into the cache at {entry}"
    raise OSError(message)


def _read(entry: Path) -> Built | None:
    try:
        report = json.loads((entry / _REPORT).read_text(encoding="utf-8"))
        if report["library"] != _hash(entry / _LIBRARY):
            return None
        return Built(entry / _LIBRARY, *_from_report(report), was_cached=True)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _from_report(
    report: dict[str, Any],
) -> tuple[tuple[Diagnostic, ...], tuple[dict[str, int], ...]]:
    return tuple(Diagnostic(**d) for d in report["warnings"]), tuple(report["blocks"])


def _compile_kernel(
    compiler: Compiler, flags: Sequence[str], text: str, mode: str, folder: Path, lines: Lines
) -> dict[str, Any]:
    module, made = folder / "kernel.o", folder / _LIBRARY
    blocks: list[dict[str, int]] = []
    if mode == "count":  # by way of LLVM's text, which tells what each basic block does
        written = folder / "kernel.ll"
        said = _run(
            [*compiler.clang, *flags, "-S", "-emit-llvm", "-o", str(written), "-"], lines, text
        )
        blocks = static_mix(written.read_text(encoding="utf-8"))
        passes = ("-O2", "-Xclang", "-disable-llvm-passes", "-fPIC", "-Wno-everything")
        _run([*compiler.clang, *passes, "-c", "-x", "ir", "-o", str(module), str(written)], lines)
        written.unlink()
    else:
        said = _run([*compiler.clang, *flags, "-c", "-o", str(module), "-"], lines, text)
    _run([*compiler.linker, "-o", str(made), str(module)], lines)
    module.unlink()
    return {"warnings": [asdict(d) for d in _judge(said, lines)], "blocks": blocks}


def _judge(said: str, lines: Lines) -> list[Diagnostic]:
    """The warnings worth keeping. Metal has no implicit conversion to bfloat; clang only warns of it."""
    diagnostics = [d for d in parse_diagnostics(said) if d.severity == "warning"]
    narrowing = [d for d in diagnostics if "implicit conversion" in d.message]
    for d in narrowing:
        if "to 'bfloat'" in d.message.replace("device ", "").replace("thread ", "").replace(
            "threadgroup ", ""
        ):
            reason = "Metal converts nothing to bfloat implicitly; write bfloat(...)"
            raise compile_error([Diagnostic(d.file, d.line, d.column, "error", reason)], lines)
    return [d for d in diagnostics if d not in narrowing]


def _compile_runtime(command: Sequence[str], folder: Path) -> dict[str, Any]:
    files = sorted(str(path) for path in NATIVE.glob("*.cpp"))
    _run([*command, "-o", str(folder / _LIBRARY), *files], {})
    return {"warnings": [], "blocks": []}


def _run(command: Sequence[str], lines: Lines, text: str | None = None) -> str:
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        diagnostics = parse_diagnostics(done.stderr)
        said = Diagnostic("", 0, 0, "error", done.stderr.strip()[-2000:] or f"{command[0]} failed")
        raise compile_error(diagnostics or [said], lines)
    return done.stderr
