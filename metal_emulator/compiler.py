"""The compilers at hand: a clang for kernels, a C++ compiler for the runtime.

Kernels need clang 17 or newer, which is the first that rounds bfloat as it should; the clang inside the `ziglang`
package will do. Knows how to call them, not what they compile or where the result is kept.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from metal_emulator.errors import MetalError

OLDEST_CLANG = 17
NEWEST_CLANG = 30  # names such as clang-22 are tried from here down
CLANG_VARIABLE = "METAL_EMULATOR_CLANG"  # a clang to use instead of looking for one
MODES = ("fast", "check", "count")
NATIVE = Path(__file__).parent / "native"
INCLUDE = NATIVE / "include"

_EXTENSIONS = (
    "+cl_khr_fp16,-cl_khr_fp64,-__opencl_c_fp64,-cl_khr_3d_image_writes,-__opencl_c_3d_image_writes"
)
LANGUAGE = (
    *("-x", "clcpp", "-cl-std=CLC++2021", "-cl-no-stdinc", "-cl-single-precision-constant"),
    *("-Xclang", f"-cl-ext={_EXTENSIONS}", "-isystem", str(INCLUDE), "-I", str(NATIVE)),
    *("-ferror-limit=20", "-fno-caret-diagnostics", "-fno-color-diagnostics"),
)
_WARNINGS = (
    *("-Wno-everything", "-Wimplicit-float-conversion", "-Wno-implicit-int-float-conversion"),
    *("-Wuninitialized", "-Wconditional-uninitialized", "-Wsometimes-uninitialized"),
    *("-Warray-bounds", "-Wreturn-type", "-Wunused-value"),
)
# Without the two excess-precision flags a half or bfloat expression is rounded once, not after every operation.
_NUMBERS = (
    *("-ffp-contract=off", "-fno-math-errno", "-fno-strict-aliasing"),
    *("-Xclang", "-ffloat16-excess-precision=none", "-Xclang", "-fbfloat16-excess-precision=none"),
)
_CODE = ("-fPIC", "-gdwarf-4", "-gline-tables-only", "-fno-vectorize", "-fno-slp-vectorize")
# Each access of memory becomes a call; memcpy keeps a name of its own, or copies of structs would go unseen.
_HOOKS = (
    "-fsanitize=kernel-address",
    *("-mllvm", "-asan-instrumentation-with-call-threshold=0", "-mllvm", "-asan-stack=0"),
    *("-mllvm", "-asan-globals=0", "-mllvm", "-asan-kernel-mem-intrinsic-prefix=1"),
)
_TRAPS = "array-bounds,alignment,shift-exponent,integer-divide-by-zero"
_FLAGS = {
    "fast": ("-O2", "-ftrivial-auto-var-init=uninitialized"),
    "check": (
        *("-O1", "-ftrivial-auto-var-init=pattern", *_HOOKS),
        *("-mllvm", "-asan-opt-same-temp=0", "-mllvm", "-asan-use-after-scope=0"),
        *(f"-fsanitize={_TRAPS}", f"-fsanitize-trap={_TRAPS}"),
    ),
    "count": (
        *("-O2", "-ftrivial-auto-var-init=uninitialized", *_HOOKS),
        "-fsanitize-coverage=bb,no-prune,trace-pc-guard",
    ),
}


@dataclass(frozen=True)
class Compiler:
    """A clang and the linker that goes with it, as commands."""

    clang: tuple[str, ...]
    linker: tuple[str, ...]
    version: str


@cache
def find_compiler() -> Compiler:
    """The clang for kernels. Raises MetalError with what was tried when there is none."""
    if sys.platform != "linux" or platform.machine() not in {"x86_64", "aarch64"}:
        message = f"the emulator runs on Linux with x86-64 or arm64, not on {sys.platform} {platform.machine()}"
        raise MetalError(message, kind="compile")
    tried = []
    for name in _clang_names():
        path = shutil.which(name)
        version = _version([path]) if path else ""
        major = re.search(r"clang version (\d+)", version)
        if path and major and int(major[1]) >= OLDEST_CLANG:
            return Compiler((path,), (path, "-shared", "-nostdlib"), version)
        if version:
            tried.append(f"{name} is {version}")
    zig = _zig()
    if zig:
        clang = (zig, "clang", "-target", f"{platform.machine()}-linux-gnu")
        return Compiler(clang, (zig, "ld.lld", "-shared"), _version([zig, "clang"]))
    found = "; ".join(tried) or "no clang on the path"
    message = (
        f"a kernel needs clang {OLDEST_CLANG} or newer to run here: {found}, and the package ziglang "
        "(which has one) is not installed; install either"
    )
    raise MetalError(message, kind="compile")


def _clang_names() -> Sequence[str]:
    chosen = os.environ.get(CLANG_VARIABLE)
    if chosen:
        return (chosen,)
    return ("clang", *(f"clang-{n}" for n in range(NEWEST_CLANG, OLDEST_CLANG - 1, -1)))


def _zig() -> str | None:
    spec = find_spec("ziglang")
    if os.environ.get(CLANG_VARIABLE) or not spec or not spec.submodule_search_locations:
        return None
    path = Path(spec.submodule_search_locations[0]) / "zig"
    return str(path) if path.is_file() else None


def _version(command: Sequence[str]) -> str:
    try:
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.split("\n", 1)[0]


def kernel_flags(mode: str) -> tuple[str, ...]:
    """clang's flags for a kernel in a mode: "fast", "check" or "count"."""
    return (*LANGUAGE, *_WARNINGS, *_NUMBERS, *_CODE, *_FLAGS[mode], *_machine_flags())


@cache
def _machine_flags() -> tuple[str, ...]:
    """AVX2 and F16C where the processor has them: conversions of half are calls otherwise."""
    cpu = Path("/proc/cpuinfo")
    words = set(cpu.read_text(encoding="utf-8").split()) if cpu.is_file() else set()
    return ("-march=x86-64-v3",) if {"avx2", "f16c", "fma", "bmi2"} <= words else ()


@cache
def runtime_command() -> tuple[str, ...]:
    """The command that compiles C++ files to a shared library; files and `-o` are to be added."""
    flags = ("-std=c++17", "-O2", "-fPIC", "-shared", "-I", str(NATIVE))
    for name in ("c++", "g++", "clang++"):
        path = shutil.which(name)
        if path:
            return (path, *flags)
    zig = _zig()
    if zig:
        return (zig, "c++", *flags)
    message = "the emulator's runtime needs a C++ compiler (c++, g++, clang++ or the package ziglang); there is none"
    raise MetalError(message, kind="compile")
