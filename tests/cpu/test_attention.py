"""The KV store, attention and the kernels over one row, in C++ under the sanitizers; quantized rows are mx.quantize's.

The programs are compiled once for each instruction set that runs here; AVX-512 and NEON run as plain C++ when
`emulated/` and SIMDe are there.
"""

import subprocess
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from tests.cpu.sets import FLAGS, HERE, KERNELS, SANITIZED, reason_to_skip


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
            options = ["-O1"] if isa in ("avx512", "neon") else ["-O1", *SANITIZED]
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
@pytest.mark.parametrize("check", ["check_vector", "check_attention", "check_attention_run"])
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
