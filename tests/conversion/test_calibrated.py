"""Calibrated conversions of every family: fused tensors, names that begin otherwise, norms of 1 + weight, no norms."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_edge import ops
from mlx_edge.calibration.allocation import bits_per_weight
from mlx_edge.calibration.text import Sample, Samples
from mlx_edge.conversion.calibrated import open_model
from mlx_edge.conversion.converter import Conversion, convert
from mlx_edge.conversion.naming import StoredNames
from mlx_edge.conversion.plan import find_layers
from mlx_edge.conversion.request import Request
from mlx_edge.conversion.source import FolderSource
from mlx_edge.errors import UnsupportedModelError
from mlx_edge.models.load import load_model
from mlx_edge.quant import Packing
from tests.conversion.folders import make_folder, read_config
from tests.models.vision import folders as vision

NEW_NAMES = {"model.": "model.language_model.", "visual.": "model.visual."}  # of transformers 5
FAMILIES = ["phi3", "glm4", "gemma2", "gemma3", "olmo2", "granite", "qwen2_5_vl"]
TOKENS = mx.random.randint(0, 60, (6, 24), key=mx.random.key(1)).astype(mx.int32)
SAMPLE = Sample(TOKENS, "random", "0")


def write_floats(family: str, folder: Path) -> Path:
    if family in vision.FAMILIES:
        folder.mkdir()
        return vision.write_model(family, folder, NEW_NAMES)
    return make_folder(folder, family)


def run(
    source: Path, target: Path, method: str = "rtn", bits: int = 8, **options: Any
) -> Conversion:
    request = Request(
        **{"action": "quantize", "method": method, "packing": Packing(32, bits), **options}
    )
    with FolderSource(source) as opened:
        return convert(opened, target, request, samples=Samples(SAMPLE, SAMPLE))


def kl_of(done: Conversion) -> float:
    assert done.receipt is not None and done.receipt.kl_mean is not None, done.receipt
    return done.receipt.kl_mean


@pytest.mark.parametrize("family", FAMILIES)
def test_with_many_bits_every_method_keeps_the_model(family: str, tmp_path: Path) -> None:
    """A scale that is not taken back, or a part in another's place, would be seen."""
    source = write_floats(family, tmp_path / "floats")
    plain = run(source, tmp_path / "rtn")
    for method in ("gptq", "awq", "smooth", "dwq"):
        done = run(source, tmp_path / method, method)
        assert done.plan.packings == plain.plan.packings
        assert kl_of(done) <= 2 * kl_of(plain) + 1e-6, method


@pytest.mark.parametrize("family", FAMILIES)
def test_with_few_bits_methods_are_better_than_rounding(family: str, tmp_path: Path) -> None:
    source = write_floats(family, tmp_path / "floats")
    plain = kl_of(run(source, tmp_path / "rtn", bits=4))
    found = {m: kl_of(run(source, tmp_path / m, m, bits=4)) for m in ("gptq", "awq", "dwq")}
    assert found["gptq"] < 0.8 * plain
    assert found["awq"] < 1.02 * plain and found["dwq"] <= plain, (found, plain)


@pytest.mark.parametrize("family", ["phi3", "glm4", "gemma3", "granite"])
def test_mlx_lm_has_the_same_logits(family: str, tmp_path: Path) -> None:
    utils = pytest.importorskip("mlx_lm.utils", reason="mlx-lm is not installed")
    run(write_floats(family, tmp_path / "floats"), tmp_path / "made", "awq", bits=4)
    theirs, _ = utils.load_model(tmp_path / "made")
    theirs.set_dtype(mx.float32)
    wanted = np.array(theirs(TOKENS))
    with ops.reference():
        found = np.array(load_model(tmp_path / "made")(TOKENS))
    assert np.abs(found - wanted).max() <= 1e-4 * np.abs(wanted).max()


@pytest.mark.parametrize("family", FAMILIES)
def test_bits_are_allocated_to_tensors_of_the_files(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "mlx_edge.conversion.calibrated.CANDIDATES", tuple(Packing(32, b) for b in (3, 4, 5, 6, 8))
    )
    source = write_floats(family, tmp_path / "floats")
    uniform = run(source, tmp_path / "uniform", bits=5)
    with FolderSource(source) as opened:
        bits = bits_per_weight(uniform.plan.packings, find_layers(opened), 32)
        stored = opened.names()
    options = {"target_bpw": bits, "sensitivities": tmp_path / "table.json"}
    done = run(source, tmp_path / "mixed", **options)
    assert len(set(done.plan.packings.values())) > 1
    assert done.plan.num_bytes <= uniform.plan.num_bytes
    assert kl_of(done) < 1.02 * kl_of(uniform)
    layers = json.loads((tmp_path / "table.json").read_text())["layers"]
    assert all(f"{name}.weight" in stored for name in layers)
    again = run(source, tmp_path / "again", **options)
    assert again.plan.packings == done.plan.packings
    below = run(source, tmp_path / "below", **(options | {"target_bpw": None, "max_kl": 0.01}))
    assert kl_of(below) <= 0.011


@pytest.mark.parametrize("family", FAMILIES)
def test_fixed_steps_of_inputs_have_the_names_of_the_files(family: str, tmp_path: Path) -> None:
    source = write_floats(family, tmp_path / "floats")
    done = run(source, tmp_path / "static", has_static_inputs=True)
    scales = read_config(tmp_path / "static")["activation_quantization"]["scales"]
    head = {name for name in scales if name.endswith("lm_head")}
    assert len(head) == 1 and scales.keys() - head < done.plan.packings.keys()
    assert not any(name.endswith("down_proj") for name in scales)
    with ops.reference():
        wanted, found = (load_model(tmp_path / name)(TOKENS) for name in ("floats", "static"))
    assert ((found - wanted) ** 2).mean() < 0.02 * (wanted**2).mean()


def test_parts_of_a_tensor_that_stay_are_the_sources(tmp_path: Path) -> None:
    """A method that changes some rows of a fused float tensor, and names it whole."""
    folder = write_floats("phi3", tmp_path / "floats")
    with open_model(folder) as model:
        names = StoredNames(model)
        layer = "model.layers.1.mlp."
        up = mx.ones((96, 64))
        joined = names.join({f"{layer}up_proj.weight": up, f"{layer}norm.weight": mx.zeros((3,))})
        both = model.checkpoint.read(f"{layer}gate_up_proj.weight")
    assert joined.keys() == {f"{layer}gate_up_proj.weight", f"{layer}norm.weight"}
    assert mx.array_equal(joined[f"{layer}gate_up_proj.weight"], mx.concatenate([both[:96], up]))


def test_experts_are_told_in_one_line(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "floats", "qwen3_moe")
    said = "does not know experts, which qwen3_moe has; leave the method out: rtn serves it"
    for options in ({"method": "awq"}, {"target_bpw": 5.0}, {"has_static_inputs": True}):
        with pytest.raises(UnsupportedModelError, match=said):
            run(folder, tmp_path / "m", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["floats"]
