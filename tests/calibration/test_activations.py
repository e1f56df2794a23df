"""Steps of inputs from a text: one for each linear, the same that a loaded model gets, fit for its folder."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_edge import ops
from mlx_edge.calibration.activations import describe_scales, static_scales
from mlx_edge.calibration.layerwise import LayerwiseModel
from mlx_edge.models.config import ModelConfig
from mlx_edge.models.load import load_model
from mlx_edge.quant import Quantizer, QuantMode
from mlx_edge.quant.tree import find_weights
from mlx_edge.weights import Checkpoint
from tests.models.tiny import CONFIGS, make_model, save_model

ROWS = mx.array(np.random.default_rng(0).integers(0, 131, (6, 40)), dtype=mx.int32)


def measure(folder: Path) -> tuple[dict[str, float], list[tuple[int, int]]]:
    told: list[tuple[int, int]] = []
    with Checkpoint.open(folder) as checkpoint:
        model = LayerwiseModel(checkpoint, ModelConfig.from_folder(folder))
        return static_scales(model, ROWS, on_progress=lambda *done: told.append(done)), told


@pytest.mark.parametrize("name", ["llama-bias", "llama-tied"])
def test_every_input_has_a_step(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    folder = save_model(make_model(config), config, tmp_path)
    scales, told = measure(folder)
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert len(scales) == 3 * 7 + 1 and "lm_head" in scales
    assert all(0 < scale < 10 for scale in scales.values())
    first = "model.layers.0.self_attn."
    assert scales[first + "q_proj"] == scales[first + "k_proj"] == scales[first + "v_proj"]
    with ops.reference():
        model = load_model(folder)
        wanted = np.array(model(ROWS))
        quantized = Quantizer(QuantMode.STATIC, group_size=32).with_calibration(ROWS)
        found = {one.name: one.weight for one in find_weights(quantized.quantize(model))}
    assert scales["lm_head"] == pytest.approx(
        found["head.projection" if name == "llama-bias" else "embedding.table"].input_scale
    )
    down = found["layers.2.mlp.down"].input_scale
    assert scales["model.layers.2.mlp.down_proj"] == pytest.approx(down)
    entry = {"activation_quantization": json.loads(json.dumps(describe_scales(scales)))}
    (folder / "config.json").write_text(json.dumps({**config, **entry}))
    with ops.reference():
        rounded = np.array(load_model(folder)(ROWS))
    error = np.linalg.norm(rounded - wanted) / np.linalg.norm(wanted)
    assert 0 < error < 0.1
