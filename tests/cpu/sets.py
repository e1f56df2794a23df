"""The instruction sets that programs of the kernels are compiled for, and why one may not run here."""

import shutil
from pathlib import Path

HERE = Path(__file__).parent
KERNELS = HERE.parents[1] / "cpu_kernels"
EMULATED = HERE / "emulated"
SIMDE = Path("/usr/include/simde")
FLAGS = {
    "scalar": [],
    "avx2": ["-DMLX_EDGE_AVX2", "-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-DMLX_EDGE_AVX512", f"-I{EMULATED}"],
    "neon": ["-DMLX_EDGE_NEON", f"-I{EMULATED}"],
}
# Checks of memory become calls: much less to compile.
SANITIZED = [
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    *("--param", "asan-instrumentation-with-call-threshold=0"),
]


def reason_to_skip(isa: str) -> str:
    """Why a program for this instruction set cannot be made or run here; "" when it can."""
    if shutil.which("g++") is None:
        return "no g++ here"
    if isa == "avx2":
        cpu = Path("/proc/cpuinfo")
        flags = set(cpu.read_text().split()) if cpu.exists() else set()
        missing = {"avx2", "fma", "f16c"} - flags
        return f"this CPU lacks {', '.join(sorted(missing))}" if missing else ""
    if isa in ("avx512", "neon") and not SIMDE.is_dir():
        return "SIMDe is not installed (apt-get install libsimde-dev)"
    return ""
