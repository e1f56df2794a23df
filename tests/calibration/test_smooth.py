"""Smoothed models compute the same, and lose less when inputs are rounded to int8; every packing is served."""

from pathlib import Path

import mlx.core as mx
import pytest

from mlx_edge.calibration.layerwise import LayerwiseModel
from mlx_edge.calibration.smooth import quantize_smooth, smoothing_scales
from mlx_edge.quant import Packing
from tests.calibration.converted import convert, logits, uniform
from tests.calibration.pairs import open_model, tiny_folder

ROWS = mx.random.randint(0, 131, (6, 24), key=mx.random.key(1)).astype(mx.int32)


def smooth(
    model: LayerwiseModel, packing: Packing | None, dtype: mx.Dtype, alpha: float = 0.5
) -> dict[str, mx.array]:
    tensors: dict[str, mx.array] = {}
    for part in quantize_smooth(model, ROWS, uniform_or_none(model, packing), dtype, alpha=alpha):
        assert not tensors.keys() & part.keys()
        tensors |= part
    return tensors


def uniform_or_none(model: LayerwiseModel, packing: Packing | None) -> dict[str, Packing | None]:
    return dict.fromkeys(uniform(model, Packing(32, 8)), packing)


def round_inputs(x: mx.array) -> mx.array:
    """To int8, a step per token."""
    step = mx.abs(x).max(-1, keepdims=True) / 127
    return mx.round(x / step) * step


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", ["llama2", "qwen2", "qwen3-tied"])
def test_a_smoothed_model_in_floats_has_the_same_logits(
    name: str, alpha: float, tmp_path: Path
) -> None:
    model = open_model(tiny_folder(tmp_path / "m", name))
    tensors = smooth(model, None, mx.float32, alpha)
    parts = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "layernorm")
    assert all(any(part in n for part in parts) for n in tensors)  # o, down and the head stay
    assert len(tensors) == 7 * model.num_layers
    other = convert(model, {}, tensors, mx.float32, tmp_path / "q")
    wanted, found = logits(model, ROWS), logits(other, ROWS)
    assert mx.abs(found - wanted).max() < 1e-4 * mx.abs(wanted).max()


def test_half_and_half_makes_ranges_equal() -> None:
    largest = mx.array([8.0, 0.5, 0.0, 2.0])
    weights = [mx.array([[0.5, -2.0, 3.0, 0.1]]), mx.array([[-0.25, 1.0, 1.0, 0.2]])]
    scales = smoothing_scales(largest, weights, 0.5)
    assert mx.allclose(scales, mx.array([4.0, 0.5, 1.0, 10**0.5]))
    assert smoothing_scales(largest, weights, 1.0).tolist() == [8.0, 0.5, 1.0, 2.0]


def test_rounded_inputs_lose_less(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m")
    tensors = dict(mx.load(str(folder / "model.safetensors")))
    for key in [key for key in tensors if "layernorm" in key]:
        tensors[key] = tensors[key] * mx.where(mx.arange(64) == 3, 60.0, 1.0)
    mx.eval(tensors)
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": "mlx"})
    model = open_model(folder)
    packing = Packing(64, 8)
    packings = {
        n: packing if "o_proj" not in n and "down" not in n else None
        for n in uniform(model, packing)
    }
    stored: dict[str, mx.array] = {}
    for part in quantize_smooth(model, ROWS, packings, mx.float16):
        stored |= part
    smoothed = convert(model, packings, stored, mx.float16, tmp_path / "smooth")
    rounded = convert(model, packings, {}, mx.float16, tmp_path / "rtn")

    def lost(other: LayerwiseModel) -> float:
        """Mean square error of gate's and up's outputs in the first layer, their inputs in int8."""
        hidden, total = model.embed(ROWS), 0.0
        for name in ("gate_proj", "up_proj"):
            outputs = []
            for each, is_rounded in ((model, False), (other, True)):
                seen: dict[str, mx.array] = {}
                layer = each.read_layer(0)
                each.run_layer(layer, 0, hidden, seen.__setitem__)
                key = f"model.layers.0.mlp.{name}"
                x = round_inputs(seen[key]) if is_rounded else seen[key]
                outputs.append(x @ each.find_linears(layer, 0)[key].weight.T)
            total += float(mx.square(outputs[0] - outputs[1]).mean())
        return total

    assert lost(smoothed) < 0.5 * lost(rounded)


@pytest.mark.parametrize("packing", [Packing(32, 8), Packing(32, 8, "mxfp8"), Packing(32, 4)])
def test_every_packing_is_stored(packing: Packing, tmp_path: Path) -> None:
    model = open_model(tiny_folder(tmp_path / "m", "qwen2"))
    kept = "model.layers.0.self_attn.v_proj"
    packings = uniform(model, packing) | {kept: None}
    stored: dict[str, mx.array] = {}
    for part in quantize_smooth(model, ROWS, packings, mx.bfloat16):
        stored |= part
    assert stored[f"{kept}.weight"].dtype == mx.bfloat16
    assert stored["model.layers.2.post_attention_layernorm.weight"].dtype == mx.bfloat16
    assert stored["model.layers.2.mlp.down_proj.weight"].dtype == mx.uint32
    convert(model, packings, stored, mx.bfloat16, tmp_path / "q").run(ROWS)  # all shapes fit


def test_same_inputs_same_bytes(tmp_path: Path) -> None:
    model = open_model(tiny_folder(tmp_path / "m"))
    first, second = (smooth(model, Packing(32, 8), mx.float16) for _ in range(2))
    assert list(first) == list(second)
    assert all(mx.array_equal(first[name], second[name]) for name in first)
