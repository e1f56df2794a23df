"""What calibrating methods refuse before they begin."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import mlx.core as mx
import pytest

from mlx_edge.calibration.layerwise import LayerwiseModel
from mlx_edge.conversion.calibrated import calibrate, fix_inputs
from mlx_edge.errors import UnsupportedModelError
from mlx_edge.models.config import ModelConfig
from mlx_edge.weights import Checkpoint
from tests.models.vision.folders import write_model

NEW_NAMES = {"model.": "model.language_model.", "visual.": "model.visual."}  # of transformers 5
ANYTHING = cast(Any, None)


@pytest.mark.parametrize(
    ("family", "rename", "said"),
    [
        ("glm4v", {}, "fused projections, which glm4v has"),
        ("qwen2_5_vl", NEW_NAMES, r"tensors named model.language_model.\*, which qwen2_5_vl has"),
    ],
)
def test_families_that_methods_do_not_know_are_told_in_one_line(
    family: str, rename: dict[str, str], said: str, tmp_path: Path
) -> None:
    folder = write_model(family, tmp_path, rename)
    request = cast(Any, SimpleNamespace(method="gptq"))
    with Checkpoint.open(folder) as checkpoint:
        model = LayerwiseModel(checkpoint, ModelConfig.from_folder(folder))
        with pytest.raises(UnsupportedModelError, match=f"gptq does not know {said}"):
            calibrate(model, mx.zeros((1, 2), mx.int32), {}, ANYTHING, request, ANYTHING)
        with pytest.raises(UnsupportedModelError, match=f"fixing inputs does not know {said}"):
            fix_inputs(model, mx.zeros((1, 2), mx.int32), {}, ANYTHING)
