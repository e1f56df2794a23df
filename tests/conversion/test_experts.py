"""Mixtures of experts: quantized as mlx-lm stacks them, whatever the form they are saved in."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_edge import ops
from mlx_edge.calibration.text import Sample, Samples
from mlx_edge.conversion.converter import convert
from mlx_edge.conversion.experts import stack_experts
from mlx_edge.conversion.request import Request
from mlx_edge.conversion.source import FolderSource
from mlx_edge.errors import ModelFormatError, UnsupportedModelError
from mlx_edge.models.load import load_model
from mlx_edge.quant import Packing, dequantize, quantize
from tests.conversion.folders import edit_tensors, make_folder, run
from tests.models import expert_forms
from tests.models.expert_forms import write_changed

FAMILIES = {  # golden -> where mlx-lm has its experts
    "qwen3_moe": "mlp.switch_mlp",
    "mixtral": "block_sparse_moe.switch_mlp",
}
FORMS = {"single": dict, "stacked": expert_forms.stack_experts, "fused": expert_forms.fuse_experts}
FOUR = {"action": "quantize", "packing": Packing(32, 4)}
TOKENS = mx.array([[5, 3, 8, 1, 9, 2, 30, 7]])


def load_tensors(folder):
    tensors = mx.load(str(folder / "model.safetensors"))
    mx.eval(tensors)
    return tensors


@pytest.mark.parametrize("name", FAMILIES)
def test_all_forms_become_the_same_folder(name, tmp_path):
    """And in it each expert is what it is quantized by itself."""
    for form, change in FORMS.items():
        run(write_changed(name, tmp_path / form, change), tmp_path / f"{form}-4bit", **FOUR)
    floats, packed = load_tensors(tmp_path / "single"), load_tensors(tmp_path / "single-4bit")
    for form in ("stacked-4bit", "fused-4bit"):
        others = load_tensors(tmp_path / form)
        assert others.keys() == packed.keys()
        assert all(mx.array_equal(packed[key], others[key]) for key in packed)

    where = FAMILIES[name]
    experts = expert_forms.collect(dict(floats))
    for (before, word), matrices in experts.items():
        layer = f"{before}switch_mlp.{expert_forms.MLX_NAMES.get(word, word)}"
        assert layer.startswith("model.layers.") and where in layer
        for index, matrix in enumerate(matrices):
            if FOUR["packing"].refusal(matrix.shape):
                assert mx.array_equal(packed[f"{layer}.weight"][index], matrix)
                continue
            one = quantize(matrix, FOUR["packing"], matrix.dtype)
            for part, array in (("weight", one.weight), ("scales", one.scales)):
                assert mx.array_equal(packed[f"{layer}.{part}"][index], array)
    router = [key for key in packed if key.endswith((".gate.weight", ".router.weight"))]
    assert router and all(packed[key].dtype == floats[key].dtype for key in router)


def theirs_of(folder):
    utils = pytest.importorskip("mlx_lm.utils", reason="mlx-lm is not installed")
    model, _ = utils.load_model(folder)
    model.set_dtype(mx.float32)
    return model


@pytest.mark.parametrize("name", [*FAMILIES, "gpt_oss"])
@pytest.mark.parametrize("mode", ["affine", "mxfp4"])
def test_mlx_lm_has_the_same_logits(name, mode, tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_EDGE_CACHE", str(tmp_path / "cache"))
    folder = make_folder(tmp_path / "floats", name)
    run(folder, tmp_path / "made", action="quantize", packing=Packing(32, 4, mode))
    wanted = np.array(theirs_of(tmp_path / "made")(TOKENS))
    with ops.reference():
        found = np.array(load_model(tmp_path / "made")(TOKENS))
    assert np.abs(found - wanted).max() <= 1e-4 * np.abs(wanted).max()
    found = np.array(load_model(tmp_path / "made", precision="float")(TOKENS))
    assert np.abs(found - wanted).max() <= 1e-4 * np.abs(wanted).max()


def test_a_receipt_is_measured_and_floats_come_back(tmp_path):
    folder = write_changed("qwen3_moe", tmp_path / "floats", dict)
    rows = mx.random.randint(0, 60, (4, 16), key=mx.random.key(1))
    sample = Sample(rows, "random", "0")
    with FolderSource(folder) as source:
        done = convert(source, tmp_path / "m", Request(**FOUR), samples=Samples(sample, sample))
    assert 0 < done.receipt.kl_mean < 1
    run(tmp_path / "m", tmp_path / "back", action="dequantize")
    packed, back = load_tensors(tmp_path / "m"), load_tensors(tmp_path / "back")
    layer = next(key for key in packed if key.endswith("switch_mlp.up_proj.scales"))[:-7]
    expert = [packed[f"{layer}.{part}"][1] for part in ("weight", "scales", "biases")]
    wanted = dequantize(ops.Quantized(*expert, 32, 4))
    assert mx.array_equal(back[f"{layer}.weight"][1].astype(mx.float32), wanted)
    with ops.reference():
        logits, same = (load_model(tmp_path / name)(TOKENS) for name in ("m", "back"))
    assert mx.allclose(logits, same, atol=1e-5)


def test_methods_that_calibrate_say_that_they_do_not_know_experts(tmp_path):
    folder = write_changed("qwen3_moe", tmp_path / "floats", dict)
    rows = mx.random.randint(0, 60, (4, 16), key=mx.random.key(1))
    samples = Samples(Sample(rows, "random", "0"), Sample(rows, "random", "0"))
    with (
        FolderSource(folder) as source,
        pytest.raises(UnsupportedModelError, match="rtn serves it"),
    ):
        convert(source, tmp_path / "m", Request(**FOUR, method="gptq"), samples=samples)
    assert [path.name for path in tmp_path.iterdir()] == ["floats"]


def test_broken_experts_are_named(tmp_path):
    folder = write_changed("qwen3_moe", tmp_path / "a", dict)
    name = "model.layers.0.mlp.experts.2.up_proj.weight"
    matrix = load_tensors(folder)[name]

    edit_tensors(folder, **{name: mx.where(matrix == matrix[0, 0], mx.nan, matrix)})
    with pytest.raises(ModelFormatError, match=f"a NaN in tensor {name}"):
        run(folder, tmp_path / "m", **FOUR)
    edit_tensors(folder, **{name: matrix[1:]})
    with pytest.raises(ModelFormatError, match=rf"{name} is .*\[.*expected .*experts.0.up_proj"):
        run(folder, tmp_path / "m", **FOUR)
    tensors = load_tensors(folder)
    del tensors[name]
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)
    with FolderSource(folder) as source, pytest.raises(ModelFormatError, match="2 is missing"):
        stack_experts(source)
    assert not (tmp_path / "m").exists()


def test_fused_experts_without_their_other_half(tmp_path):
    def drop(tensors):
        tensors = expert_forms.fuse_experts(tensors)
        return {key: v for key, v in tensors.items() if not key.endswith("experts.down_proj")}

    folder = write_changed("qwen3_moe", tmp_path / "a", drop)
    with pytest.raises(ModelFormatError, match=r"experts\.down_proj is missing"):
        run(folder, tmp_path / "m", **FOUR)


def test_fused_experts_in_turns_with_biases(tmp_path):
    """gpt-oss: gate and up in turns, transposed; in 8 bits the model says what it said before."""
    folder = write_changed("gpt_oss", tmp_path / "floats", dict)
    run(folder, tmp_path / "made", action="quantize", packing=Packing(32, 8))
    names = load_tensors(tmp_path / "made")
    assert {
        "model.layers.0.mlp.experts.up_proj.scales",
        "model.layers.0.mlp.experts.up_proj.bias",
    } <= names.keys()
    with ops.reference():
        wanted, found = (load_model(tmp_path / name)(TOKENS) for name in ("floats", "made"))
    assert mx.abs(found - wanted).max() <= 0.02 * mx.abs(wanted).max()
