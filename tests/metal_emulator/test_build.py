"""The cache of libraries and the search for compilers: what happens when one is missing, broken or shared."""

import json
import multiprocessing
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from metal_emulator import compiler
from metal_emulator.build import Built, build_kernel, cache_folder
from metal_emulator.errors import MetalError

TEXT = '#include <metal_stdlib>\nextern "C" void emu_entry(thread emu_thread* t) {{ {} }}\n'


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("METAL_EMULATOR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def unfound() -> Iterator[None]:
    """A machine on which no compiler has been looked for yet."""
    compiler.find_compiler.cache_clear()
    compiler.runtime_command.cache_clear()
    yield
    compiler.find_compiler.cache_clear()
    compiler.runtime_command.cache_clear()


def build(body: str = "") -> Built:
    return build_kernel(TEXT.format(body), "fast", {})


def test_the_cache_lies_where_it_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("METAL_EMULATOR_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("METAL_EMULATOR_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "metal_emulator"


def test_the_same_text_is_compiled_once(empty_cache: Path) -> None:
    first, again, other = build(), build(), build("return;")
    assert not first.was_cached
    assert again.was_cached
    assert again.library == first.library != other.library


@pytest.mark.parametrize(
    "damage", ["truncated", "changed", "no report", "report is nonsense", "report is a list"]
)
def test_a_broken_entry_is_built_anew(empty_cache: Path, damage: str) -> None:
    library = build().library
    report = library.with_name("report.json")
    match damage:
        case "truncated":
            library.write_bytes(library.read_bytes()[:100])
        case "changed":
            library.write_bytes(library.read_bytes()[:-1] + b"?")
        case "no report":
            report.unlink()
        case "report is nonsense":
            report.write_text("{")
        case _:
            report.write_text(json.dumps([1]))
    again = build()
    assert not again.was_cached
    assert again.library == library
    assert build().was_cached


def test_nothing_half_made_stays_in_the_cache(empty_cache: Path) -> None:
    with pytest.raises(MetalError):
        build("this is no Metal;")
    build()
    assert not [p for p in empty_cache.rglob("*") if p.name.startswith(".")]


def test_warnings_are_shown_on_a_cache_hit_too(empty_cache: Path) -> None:
    body = "float x; *(device float*)t->group->buffer[0] = x;"
    first, again = build(body), build(body)
    assert [w.message for w in first.warnings] == [w.message for w in again.warnings]
    assert any("uninitialized" in w.message for w in again.warnings)


def build_in_process(cache: str) -> str:
    os.environ["METAL_EMULATOR_CACHE"] = cache
    return str(build("int x = 7;").library)


def test_processes_share_the_cache(empty_cache: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(3, spawn) as processes:
        libraries = set(processes.map(build_in_process, [str(empty_cache)] * 3))
    assert len(libraries) == 1
    assert build("int x = 7;").was_cached


@pytest.mark.usefixtures("unfound")
def test_without_a_compiler_the_message_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compiler, "find_spec", lambda name: None)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(
        MetalError, match=r"no clang on the path, and the package ziglang .* install either"
    ):
        compiler.find_compiler()
    with pytest.raises(MetalError, match=r"needs a C\+\+ compiler"):
        compiler.runtime_command()


@pytest.mark.usefixtures("unfound")
@pytest.mark.parametrize(
    ("version", "is_taken"), [("16.0.6", False), ("17.0.1", True), ("22.1.8", True)]
)
def test_a_system_clang_is_taken_from_17_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: str, is_taken: bool
) -> None:
    clang = tmp_path / "clang"
    clang.write_text(f"#!/bin/sh\necho 'clang version {version}'\n")
    clang.chmod(0o755)
    monkeypatch.setattr(compiler, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    if is_taken:
        assert compiler.find_compiler().clang == (str(clang),)
    else:
        with pytest.raises(MetalError, match=f"clang is clang version {version}"):
            compiler.find_compiler()


@pytest.mark.usefixtures("unfound")
def test_another_system_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "sys", SimpleNamespace(platform="plan9"))
    with pytest.raises(MetalError, match="runs on Linux with x86-64 or arm64, not on plan9"):
        compiler.find_compiler()


def test_a_mode_has_flags_of_its_own() -> None:
    flags = {mode: compiler.kernel_flags(mode) for mode in compiler.MODES}
    assert len(set(flags.values())) == len(compiler.MODES)
