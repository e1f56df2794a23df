"""Packed weights: made once and mapped again, the stored ones restored, and what happens when something is missing."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn

from mlx_edge import ops, stream_generate
from mlx_edge.errors import InvalidRequestError, ModelFormatError
from mlx_edge.models.decoder import Decoder, describe_kernels
from mlx_edge.models.load import load, load_model
from mlx_edge.models.packing import _bytes_of
from mlx_edge.ops import cpu
from mlx_edge.weights.hub import find_model
from tests.models.tiny import CONFIGS, make_model, save_model

lacking = cpu.missing()
needs_kernels = pytest.mark.skipif(lacking is not None, reason=f"no CPU kernels: {lacking}")
TOKENS = mx.array([[5, 3, 8, 1]])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small 4-bit model, and a cache folder of its own."""
    monkeypatch.setenv("MLX_EDGE_CACHE", str(tmp_path / "cache"))
    return save_quantized(tmp_path, seed=1)


def save_quantized(folder: Path, seed: int) -> Path:
    config = CONFIGS["llama3"]
    model = make_model(config, seed)
    nn.quantize(model, group_size=32, bits=4)
    return save_model(model, {**config, "quantization": {"group_size": 32, "bits": 4}}, folder)


def logits(model: Decoder) -> np.ndarray:
    return np.array(model(TOKENS))


@needs_kernels
def test_packed_once_and_mapped_again(folder: Path) -> None:
    first, second = load_model(folder), load_model(folder)
    reports = [model.load_report.packed for model in (first, second)]
    assert [report.how for report in reports if report] == ["built", "reused"]
    assert np.array_equal(logits(first), logits(second))
    assert "repacked" in str(second.load_report)


@needs_kernels
def test_other_weights_are_packed_anew(folder: Path) -> None:
    before = logits(load_model(folder))
    save_quantized(folder, seed=4)
    again = load_model(folder)
    assert again.load_report.packed is not None and again.load_report.packed.how == "built"
    assert not np.array_equal(logits(again), before)


@needs_kernels
def test_without_mapping_nothing_of_the_files_is_needed(folder: Path) -> None:
    mapped = logits(load_model(folder))
    copied = load_model(folder, use_mmap=False)
    assert copied.load_report.shared_bytes == 0
    assert not (folder.parent / "cache").exists() or copied.load_report.packed is not None
    next(folder.glob("*.safetensors")).write_bytes(b"gone")
    assert np.array_equal(logits(copied), mapped)
    copied.check_unchanged()


@needs_kernels
def test_stored_weights_come_back_as_they_were(folder: Path) -> None:
    model = load_model(folder, precision="float")
    weight = model.layers[0].mlp.gate
    assert isinstance(weight, ops.Packed)
    stored = weight.restore()
    assert isinstance(stored, ops.Quantized)
    assert stored.shape == weight.shape
    assert weight.restore() is stored
    x = mx.random.normal((3, weight.shape[1]))
    with ops.reference():
        wanted = np.array(ops.linear(x, stored))
        assert np.array_equal(np.array(ops.linear(x, weight)), wanted)
    found = np.array(ops.linear(x, weight))
    assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()


@needs_kernels
def test_a_float_weight_at_hand_is_used_where_it_lies() -> None:
    memory = _bytes_of(weight := mx.arange(8).astype(mx.bfloat16))
    again = _bytes_of(weight)
    assert memory.ctypes.data == again.ctypes.data
    del weight
    assert memory.view(np.uint16).tolist() == again.view(np.uint16).tolist()
    odd = _bytes_of(mx.arange(9).astype(mx.bfloat16)[1:])  # two bytes behind a word
    assert odd.ctypes.data % 4 == 0 and odd.view(np.uint16)[0] == memory.view(np.uint16)[1]


@needs_kernels
def test_int8_activations_cost_little(folder: Path) -> None:
    exact, coded = (logits(load_model(folder, precision=p)) for p in ("float", "int8"))
    error = np.linalg.norm(exact - coded) / np.linalg.norm(exact)
    assert 0 < error < 0.05


@needs_kernels
def test_a_report_says_what_computes(folder: Path) -> None:
    said = describe_kernels(load_model(folder))
    assert said.startswith(f"CPU kernels ({cpu.describe()}), int8 activations")
    assert "float activations" in describe_kernels(load_model(folder, precision="float"))
    with ops.reference():
        assert describe_kernels(load_model(folder)) == "plain MLX ops"


@needs_kernels
@pytest.mark.parametrize("change", ["replaced", "shortened"])
def test_a_file_that_changes_is_noticed_at_the_next_request(change: str, tmp_path: Path) -> None:
    folder = tmp_path / "pocket"
    shutil.copytree(find_model("pocket"), folder)
    model, tokenizer = load(str(folder))
    for _ in stream_generate(model, tokenizer, "Once", 2):
        pass
    file = folder / "model.safetensors"
    if change == "replaced":
        shutil.copyfile(file, tmp_path / "new")
        (tmp_path / "new").replace(file)
    else:
        os.truncate(file, file.stat().st_size - 100)
    with pytest.raises(ModelFormatError, match=r"model\.safetensors"):
        next(stream_generate(model, tokenizer, "Once", 2))


@needs_kernels
def test_a_fast_op_has_no_gradient_and_says_so(folder: Path) -> None:
    model = load_model(folder)
    mlp = model.layers[0].mlp

    def loss(x: mx.array) -> mx.array:
        return ops.mlp_block(x, mlp).sum()

    x = mx.random.normal((1, 2, model.config.hidden_size))
    with pytest.raises(
        ValueError, match=r"mlp_block .* has no gradient; train inside ops.reference"
    ):
        mx.grad(loss)(x)
    with ops.reference():
        assert np.isfinite(np.array(mx.grad(loss)(x))).all()


def run_python(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, **variables},
        timeout=60,
    )


TELL = """
import logging; logging.basicConfig()
import mlx_edge
print(mlx_edge.generate(*mlx_edge.load(), "Once upon a time", max_tokens=12))
"""


def test_without_the_extension_one_line_and_plain_ops() -> None:
    with_kernels = run_python(TELL)
    without = run_python("import sys; sys.modules['mlx_edge._native'] = None\n" + TELL)
    assert without.returncode == 0
    assert without.stdout == with_kernels.stdout
    assert without.stderr.count("\n") == 1
    assert "runs on plain MLX ops, which are slow on a CPU" in without.stderr


@needs_kernels
def test_an_instruction_set_that_is_not_here_is_one_line_too() -> None:
    done = run_python(TELL, MLX_EDGE_CPU_ISA="sse9")
    assert done.returncode == 0
    assert done.stderr.count("\n") == 1
    assert "MLX_EDGE_CPU_ISA names an instruction set" in done.stderr


@needs_kernels
def test_each_set_of_this_machine_tells_the_same_story() -> None:
    stories = {name: run_python(TELL, MLX_EDGE_CPU_ISA=name).stdout for name in ("scalar", "")}
    assert stories["scalar"] == stories[""]


@needs_kernels
def test_threads_of_its_own_give_the_same(folder: Path) -> None:
    model = load_model(folder)
    wanted = logits(model)
    try:
        for count in (1, 3):
            cpu.extension().set_threads(count)
            assert np.array_equal(logits(model), wanted)
    finally:
        cpu.extension().set_threads(len(os.sched_getaffinity(0)))


@needs_kernels
def test_locked_memory_is_refused_in_one_line(folder: Path) -> None:
    code = f"""
import resource
resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))
import os
if os.geteuid() == 0:  # root may lock what it likes
    os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)
from pathlib import Path
from mlx_edge.models.load import load_model
from mlx_edge.errors import MemoryBudgetError
try:
    load_model(Path({str(folder)!r}), mlock=True)
except MemoryBudgetError as error:
    print("refused:", error)
"""
    folder.parent.chmod(0o755)
    for parent in folder.parents[:4]:
        if not os.access(parent, os.X_OK):
            pytest.skip("the folder of the test is closed to other users")
    done = run_python(code, MLX_EDGE_CACHE="/nonexistent")
    if "Permission" in done.stderr or "ModuleNotFound" in done.stderr:
        pytest.skip("another user cannot read this checkout")
    assert done.stdout.startswith("refused:"), done.stderr


def test_a_bridged_model_takes_no_options_of_ours(tmp_path: Path) -> None:
    options: list[dict[str, Any]] = [{"precision": "float"}, {"use_mmap": False}, {"mlock": True}]
    for option in options:
        with pytest.raises(InvalidRequestError, match="are for models that are defined here"):
            load("pocket", bridge="mlx-lm", **option)
