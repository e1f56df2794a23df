"""Blocks, pool and store together, in C++ under the sanitizers: one result for any threads, pieces and batches."""

import subprocess
from pathlib import Path

import pytest

from tests.cpu.sets import FLAGS, HERE, KERNELS, SANITIZED, reason_to_skip

SOURCES = (
    *("isa", "pool", "products", "residual", "blocks", "moe", "attention_within"),
    *("matrix", "kv_store"),
)
SANITIZERS = {
    "threads": ["-fsanitize=thread"],
    "memory": SANITIZED,
}


@pytest.mark.parametrize("kind", SANITIZERS)
def test_blocks_give_the_same_bits(kind: str, tmp_path: Path) -> None:
    # The quickest set to compile: what is checked here is the same C++ above any of them.
    isa = "avx2" if not reason_to_skip("avx2") else "scalar"
    if reason := reason_to_skip(isa):
        pytest.skip(reason)
    command = ["g++", "-std=c++20", "-ffp-contract=off", "-O0", "-g1", "-DMLX_EDGE_OUTLINED"]
    command += SANITIZERS[kind]
    command += [f"-DMLX_EDGE_ISA={isa}", *FLAGS[isa], f"-I{KERNELS}", HERE / "check_blocks.cpp"]
    command += [KERNELS / f"{name}.cpp" for name in SOURCES]
    program = tmp_path / "check_blocks"
    made = subprocess.run(
        [*command, "-pthread", "-o", program], capture_output=True, text=True, check=False
    )
    assert made.returncode == 0, made.stderr
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "all good"), done.stdout + done.stderr
