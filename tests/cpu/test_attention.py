"""The KV store, attention and the kernels over one row, in C++ under the sanitizers; quantized rows are mx.quantize's.

The programs are compiled once for each instruction set that runs here; AVX-512 and NEON run as plain C++ when
`emulated/` and SIMDe are there.
"""

import shutil
import subprocess
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

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
# Checks of memory become calls, and no debug information (add -g to find a fault): half the time to compile.
SANITIZED = [
    *("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
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


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory):
    """Compiles a check for an instruction set, once; skips where that cannot be."""
    folder = tmp_path_factory.mktemp("cpu_checks")

    def build(check: str, isa: str) -> Path:
        if reason := reason_to_skip(isa):
            pytest.skip(reason)
        built = folder / f"{check}_{isa}"
        if not built.exists():
            # Emulated sets are slow to compile and were seen by the sanitizers as scalar code: they run without.
            options = ["-O1"] if isa in ("avx512", "neon") else SANITIZED
            sources = [HERE / f"{check}.cpp", KERNELS / "kv_store.cpp"]
            command = ["g++", "-std=c++20", "-ffp-contract=off", "-Wall", "-Wextra", *options]
            command += [f"-DMLX_EDGE_ISA={isa}", *FLAGS[isa], f"-I{KERNELS}", f"-I{HERE}"]
            made = subprocess.run(
                [*command, *sources, "-o", built], capture_output=True, text=True, check=False
            )
            assert made.returncode == 0, made.stderr
        return built

    return build


def run(program: Path, *arguments: str, given: bytes = b"") -> None:
    done = subprocess.run([program, *arguments], input=given, capture_output=True, check=False)
    said = done.stdout.decode() + done.stderr.decode()
    assert done.returncode == 0, said
    assert "checks" in said


@pytest.mark.parametrize("isa", FLAGS)
@pytest.mark.parametrize("check", ["check_vector", "check_attention"])
def test_kernels_meet_doubles(program, check: str, isa: str) -> None:
    """Every format, ragged sizes, windows, kept positions, trims, forks; a query as if it were alone."""
    run(program(check, isa))


@pytest.mark.parametrize("isa", FLAGS)
def test_quantized_rows_are_those_of_mlx(program, isa: str) -> None:
    """Codes, scales and offsets equal mx.quantize's to the last bit, on rows with zeros, ties and one sign, too."""
    checker = program("check_attention", isa)
    random = np.random.default_rng(7)
    for bits, group, dims in [(8, 32, 96), (8, 64, 64), (8, 128, 128), (4, 32, 64), (4, 64, 128)]:
        rows = random.normal(size=(120, dims)).astype(np.float32)
        rows[0], rows[1], rows[2] = 0, 0.75, -0.75
        rows[3], rows[4] = np.abs(rows[3]), -np.abs(rows[4])
        rows[5] = np.round(rows[5] * 4) / 4
        rows[6:20] *= 10.0 ** np.arange(-9, 5)[:, None]
        packs, scales, offsets = mx.quantize(mx.array(rows), group_size=group, bits=bits)
        sizes = np.array([bits, group, dims, len(rows)], np.int32)
        arrays = [sizes, rows, *(np.array(a) for a in (packs, scales, offsets))]
        run(checker, "quantized", given=b"".join(a.tobytes() for a in arrays))
