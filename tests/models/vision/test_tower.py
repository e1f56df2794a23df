"""The tower: features against transformers', its parts, and what its files may look like."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_edge import ops
from mlx_edge.errors import MLXEdgeError, ModelFormatError, UnsupportedModelError
from mlx_edge.models.config import ModelConfig
from mlx_edge.models.load import load_model
from mlx_edge.models.vision import tower as tower_module
from mlx_edge.models.vision.processor import Patches
from mlx_edge.models.vision.tower import VisionTower, find_places, find_windows, weigh_cubic
from mlx_edge.ops import reference_attention
from mlx_edge.weights.writer import write_checkpoint
from tests.models.vision.folders import (
    CASES,
    FAMILIES,
    draw_images,
    read_golden,
    relative_difference,
    write_model,
)

TOLERANCE = 1e-4
Folder = Callable[[str], Path]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    made = {
        family: write_model(family, tmp_path_factory.mktemp("models") / family)
        for family in FAMILIES
    }
    return made.__getitem__


def load_tower(folder: Path) -> VisionTower:
    tower = load_model(folder).vision
    assert tower is not None
    return tower


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("family", FAMILIES)
def test_features_equal_transformers(
    family: str, backend: str, folders: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ops.use("reference") if backend == "reference" else monkeypatch.context():
        tower = load_tower(folders(family))
        for case in CASES:
            wanted = read_golden(family)["cases"][case]["features"]
            found = tower(draw_images(family, case, tower.config))
            for own, other in zip(found, wanted, strict=True):
                assert relative_difference(own, other) < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_an_image_is_the_same_whatever_stands_beside_it(family: str, folders: Folder) -> None:
    tower = load_tower(folders(family))
    images = draw_images(family, "three", tower.config)
    together = tower(images)
    for image, found in zip(images, together, strict=True):
        assert mx.array_equal(tower([image])[0], found).item()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_large_image_is_computed_part_by_part(
    family: str, folders: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tower_module, "LARGE", 10)  # of 4 patches a token: parts of 8
    tower = load_tower(folders(family))
    for case in ("one", "three", "tall"):
        wanted = read_golden(family)["cases"][case]["features"]
        found = tower(draw_images(family, case, tower.config))
        for own, other in zip(found, wanted, strict=True):
            assert relative_difference(own, other) < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_no_tensor_has_the_patches_squared(
    family: str, folders: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference_attention, "SCORE_ELEMENTS", 1 << 14)
    monkeypatch.setattr(tower_module, "LARGE", 256)
    count = 32 * 32
    with ops.use("reference"):
        tower = load_tower(folders(family))
        values = np.random.RandomState(0).rand(count, tower.config.patch_values)
        image = Patches(values.astype(np.float32), (1, 32, 32), 2, b"")
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(tower([image]))
        assert mx.get_peak_memory() - before < 4 * count**2  # the scores of a single head


def test_the_patches_of_a_token_stand_together() -> None:
    rows, columns = find_places((1, 4, 6), 2)
    assert rows[:4].tolist() == [0, 0, 1, 1] and columns[:4].tolist() == [0, 1, 0, 1]
    assert rows[4:8].tolist() == [0, 0, 1, 1] and columns[4:8].tolist() == [2, 3, 2, 3]
    assert find_places((2, 4, 6), 2).shape == (2, 48)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (2, 2), (3, 5), (7, 2), (4, 4)])
def test_windows_hold_every_token_once(rows: int, columns: int) -> None:
    order, sizes = find_windows((1, 2 * rows, 2 * columns), 2, 2)
    assert order is not None
    assert sorted(order.tolist()) == list(range(rows * columns))
    assert sum(sizes) == 4 * rows * columns and max(sizes) <= 16
    assert order[0] == 0 and len(sizes) == -(-rows // 2) * -(-columns // 2)


@pytest.mark.parametrize("count", [1, 2, 5, 24, 61])
def test_positions_are_mixed_with_weights_that_add_up_to_one(count: int) -> None:
    weights = weigh_cubic(count, 24)
    assert np.abs(weights.sum(axis=1) - 1).max() < 1e-5
    if count == 24:
        assert np.abs(weights - np.eye(24)).max() < 1e-5
    assert np.abs(weights - weights[::-1, ::-1]).max() < 1e-4


def test_kernels_may_be_stored_as_mlx_has_them(folders: Folder, tmp_path: Path) -> None:
    tensors = {}
    loaded: Any = mx.load(str(folders("glm4v") / "model.safetensors"))
    for name, tensor in loaded.items():
        is_kernel = name.endswith(("patch_embed.proj.weight", "downsample.weight"))
        tensors[name] = mx.contiguous(mx.moveaxis(tensor, 1, -1)) if is_kernel else tensor
    write_checkpoint(tmp_path, tensors)
    for file in ("config.json", "preprocessor_config.json"):
        (tmp_path / file).write_text((folders("glm4v") / file).read_text())
    tower = load_tower(folders("glm4v"))
    images = draw_images("glm4v", "one", tower.config)
    assert mx.array_equal(load_tower(tmp_path)(images)[0], tower(images)[0]).item()


@pytest.mark.parametrize(
    ("family", "rename"),
    [
        ("glm4v", {"model.visual.": "visual.", "model.language_model.": "model."}),
        (
            "glm4v",
            {
                "model.visual.": "vision_tower.",
                "model.language_model.": "language_model.model.",
                "lm_head.": "language_model.lm_head.",
            },
        ),
        ("qwen2_5_vl", {"visual.": "model.visual.", "model.": "model.language_model."}),
    ],
)
def test_exporters_spell_names_in_their_own_ways(
    family: str, rename: dict[str, str], folders: Folder, tmp_path: Path
) -> None:
    tower = load_tower(write_model(family, tmp_path, rename))
    images = draw_images(family, "one", tower.config)
    wanted = load_tower(folders(family))(images)[0]
    assert mx.array_equal(tower(images)[0], wanted).item()


def change(folder: Path, tmp_path: Path, file: str, **changes: Any) -> Path:
    """A copy of the folder with other entries in a JSON file; a dotted name is nested."""
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    raw = json.loads((tmp_path / file).read_text())
    for name, value in changes.items():
        *outer, last = name.split("__")
        target = raw
        for part in outer:
            target = target[part]
        target[last] = value
    (tmp_path / file).write_text(json.dumps(raw))
    return tmp_path


@pytest.mark.parametrize(
    ("error", "match", "file", "changes"),
    [
        (ModelFormatError, "cuts patches", "preprocessor_config.json", {"patch_size": 8}),
        (
            ModelFormatError,
            "out_hidden_size",
            "config.json",
            {"vision_config__out_hidden_size": 64},
        ),
        (ModelFormatError, "blocks.2", "config.json", {"vision_config__depth": 3}),
        (ModelFormatError, "does not use", "config.json", {"vision_config__depth": 1}),
        (ModelFormatError, "expected heads", "config.json", {"vision_config__num_heads": 5}),
        (ModelFormatError, "does not fit", "config.json", {"vision_config__image_size": 3}),
        (ModelFormatError, "in_channels", "config.json", {"vision_config__in_channels": 4}),
        (ModelFormatError, "image_token_id", "config.json", {"image_token_id": "x"}),
        (UnsupportedModelError, "hidden_act", "config.json", {"vision_config__hidden_act": "relu"}),
        (UnsupportedModelError, "use_cls", "config.json", {"vision_config__use_cls": True}),
        (
            UnsupportedModelError,
            "axial",
            "config.json",
            {"vision_config__rope_parameters": {"rope_type": "yarn"}},
        ),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(
    error: type[MLXEdgeError],
    match: str,
    file: str,
    changes: dict[str, Any],
    folders: Folder,
    tmp_path: Path,
) -> None:
    with pytest.raises(error, match=match) as found:
        load_model(change(folders("glm4v"), tmp_path, file, **changes))
    assert "\n" not in str(found.value)


def test_a_configuration_says_how_the_tower_sees() -> None:
    glm, qwen = (ModelConfig.from_hf(read_golden(family)["saved"]).vision for family in FAMILIES)
    assert glm is not None and qwen is not None
    assert (glm.position_grid, glm.window_cells, glm.intermediate_size) == (5, None, 96)
    assert (qwen.position_grid, qwen.window_cells) == (None, 2)
    assert qwen.full_blocks == frozenset({1})
    assert glm.patch_values == 3 * 2 * 4 * 4 and glm.merge_unit == 4


GLM_VISION = {  # as GLM-4.1V-9B-Thinking's file has it
    "hidden_size": 1536,
    "depth": 24,
    "num_heads": 12,
    "attention_bias": False,
    "intermediate_size": 13696,
    "hidden_act": "silu",
    "hidden_dropout_prob": 0.0,
    "initializer_range": 0.02,
    "image_size": 336,
    "patch_size": 14,
    "out_hidden_size": 4096,
    "rms_norm_eps": 1e-05,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
GLM: dict[str, Any] = {
    "architectures": ["Glm4vForConditionalGeneration"],
    "model_type": "glm4v",
    "image_start_token_id": 151339,
    "image_end_token_id": 151340,
    "video_start_token_id": 151341,
    "video_end_token_id": 151342,
    "image_token_id": 151343,
    "video_token_id": 151344,
    "tie_word_embeddings": False,
    "vision_config": GLM_VISION,
}
GLM_TEXT = {
    "attention_bias": True,
    "attention_dropout": 0.0,
    "pad_token_id": 151329,
    "eos_token_id": [151329, 151336],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 13696,
    "max_position_embeddings": 65536,
    "num_attention_heads": 32,
    "num_hidden_layers": 40,
    "num_key_value_heads": 2,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {"type": "default", "mrope_section": [8, 12, 12]},
    "rope_theta": 10000.0,
    "use_cache": True,
    "vocab_size": 151552,
}
QWEN: dict[str, Any] = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "model_type": "qwen2_5_vl",
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "vision_token_id": 151654,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 128000,
    "max_window_layers": 28,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "use_sliding_window": False,
    "vision_config": {
        "depth": 32,
        "hidden_act": "silu",
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "in_chans": 3,
        "out_hidden_size": 3584,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "tokens_per_second": 2,
        "temporal_patch_size": 2,
    },
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vocab_size": 152064,
}


@pytest.mark.parametrize(
    ("raw", "sections", "head_dim", "cells"),
    [
        ({**GLM, **GLM_TEXT}, (8, 12, 12), 128, None),
        ({**GLM, "text_config": {**GLM_TEXT, "model_type": "glm4v_text"}}, (8, 12, 12), 128, None),
        (QWEN, (16, 24, 24), 80, 4),
    ],
    ids=["glm, flat", "glm, nested", "qwen"],
)
def test_files_of_the_hub_are_understood(
    raw: dict[str, Any], sections: tuple[int, ...], head_dim: int, cells: int | None
) -> None:
    config = ModelConfig.from_hf(raw)
    assert config.rope.sections == sections
    assert config.vision is not None
    assert (config.vision.head_dim, config.vision.window_cells) == (head_dim, cells)
    assert config.vision.out_size == config.hidden_size
