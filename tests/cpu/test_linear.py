"""The matmul kernels in C++, without MLX: sanitized, against doubles, and instruction sets against each other.

Each set is compiled by itself. AVX-512 and NEON run as plain C++ when SIMDe is there, and AVX-512 is compiled for the
real machine everywhere.
"""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.cpu.sets import FLAGS, HERE, KERNELS, SANITIZED, reason_to_skip

AVX512 = [f"-mavx512{part}" for part in ("f", "bw", "vl", "dq", "vnni")]


def command(isa: str, flags: list[str]) -> list[str]:
    options = ["-std=c++20", "-O1", "-ffp-contract=off", "-Wall", "-Wextra", "-DMLX_EDGE_OUTLINED"]
    return ["g++", *options, f"-DMLX_EDGE_ISA={isa}", *flags, f"-I{KERNELS}", f"-I{HERE}"]


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory):
    """The checks' programs by instruction set, compiled side by side; those that cannot be are not there."""
    folder = tmp_path_factory.mktemp("cpu_linear")
    started = {}
    for isa, flags in FLAGS.items():
        if not reason_to_skip(isa):
            # One set has the sanitizers here, AVX2's products in test_blocks.py: all would take minutes to compile.
            checks = ["-g1", *SANITIZED] if isa == "scalar" else []
            sources = [HERE / "check_linear.cpp", KERNELS / "matrix.cpp"]
            whole = [*command(isa, [*flags, *checks]), *map(str, sources), "-o", str(folder / isa)]
            started[isa] = subprocess.Popen(whole, stderr=subprocess.PIPE, text=True)
    for isa, compiler in started.items():
        said = compiler.communicate()[1]
        assert compiler.returncode == 0, f"{isa}: {said}"
    return folder


@pytest.mark.parametrize("isa", FLAGS)
def test_products_meet_doubles(programs: Path, isa: str) -> None:
    """Every width, group and scale type, dense rows, ragged sizes, rows alone and together, pieces in any order.

    The first set that runs writes its results, the others must agree with them.
    """
    if reason := reason_to_skip(isa):
        pytest.skip(reason)
    call = [programs / isa, programs / "results"]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "checks" in done.stdout


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here")
def test_avx512_compiles_for_a_real_machine() -> None:
    machine = subprocess.run(["g++", "-dumpmachine"], capture_output=True, text=True, check=True)
    if not machine.stdout.startswith("x86_64"):
        pytest.skip(f"the compiler makes programs for {machine.stdout.strip()}")
    source = "#include <linear.h>\nauto* kernel = mlx_edge::avx512::multiply;\n"
    whole = [*command("avx512", ["-DMLX_EDGE_AVX512", *AVX512]), "-S", "-x", "c++", "-", "-o", "-"]
    done = subprocess.run(whole, input=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "vpdpbusd" in done.stdout
