"""Sizes, order and values of patches against transformers' (stored goldens), and what a folder may ask for."""

import base64
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mlx_edge.errors import InvalidRequestError, ModelFormatError, UnsupportedModelError
from mlx_edge.models.vision.image import read_image
from mlx_edge.models.vision.processor import (
    Patches,
    ProcessorConfig,
    make_patches,
    resized_size,
    smart_resize,
)
from tests.goldens.images import draw_pixels, draw_sizes, sample_positions, take_moments

GOLDEN = json.loads((Path(__file__).parents[2] / "goldens" / "vision_processor.json").read_text())
GLM = GOLDEN["configs"]["glm4v"]["given"]


@cache
def draw(width: int, height: int) -> NDArray[np.uint8]:
    return draw_pixels(f"{width}x{height}", width, height)


def read_config(
    folder: Path, raw: dict[str, Any], file: str = "preprocessor_config.json"
) -> ProcessorConfig:
    (folder / file).write_text(json.dumps(raw))
    return ProcessorConfig.from_folder(folder)


def check(patches: list[Patches], golden: dict[str, Any]) -> None:
    values = np.concatenate([one.values for one in patches])
    assert [list(one.grid) for one in patches] == golden["grids"]
    samples = values.ravel()[sample_positions(values.size)]
    np.testing.assert_allclose(samples, golden["samples"], rtol=0, atol=2e-7)
    np.testing.assert_allclose(take_moments(values), golden["moments"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("golden", GOLDEN["drawn"], ids=lambda g: f"{g['config']}-{g['size']}")
def test_a_drawn_image_is_cut_as_by_transformers(tmp_path: Path, golden: dict[str, Any]) -> None:
    width, height = golden["size"]
    config = read_config(tmp_path, GOLDEN["configs"][golden["config"]]["given"])
    check([make_patches(draw(width, height), config)], golden)


@pytest.mark.parametrize("name", GOLDEN["files"])
def test_a_file_is_read_and_cut_as_by_transformers(tmp_path: Path, name: str) -> None:
    golden = GOLDEN["files"][name]
    config = read_config(tmp_path, GOLDEN["configs"]["glm4v-small"]["given"])
    check([make_patches(read_image(base64.b64decode(golden["data"])), config)], golden)


def test_several_images_stand_one_behind_the_other(tmp_path: Path) -> None:
    config = read_config(tmp_path, GLM)
    sizes = ((100, 37), (28, 28), (37, 100))
    images = [make_patches(draw(w, h), config) for w, h in sizes]
    check(images, GOLDEN["several"])


@pytest.mark.parametrize("name", GOLDEN["configs"])
def test_sizes_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    config = read_config(tmp_path, GOLDEN["configs"][name]["given"])
    expected = GOLDEN["sizes"][name]
    assert [list(resized_size(*size, config)) for size in draw_sizes(len(expected))] == expected


@pytest.mark.parametrize("name", GOLDEN["configs"])
def test_what_transformers_saves_reads_as_what_it_was_given(tmp_path: Path, name: str) -> None:
    both = GOLDEN["configs"][name]
    given = read_config(tmp_path, both["given"])
    assert read_config(tmp_path, both["saved"]) == given
    nested = {
        "processor_class": "Any",
        "image_processor": both["saved"],
        "video_processor": {"a": 1},
    }
    (tmp_path / "preprocessor_config.json").unlink()
    assert read_config(tmp_path, nested, "processor_config.json") == given


def test_a_processor_config_without_images_leaves_the_older_file_to_speak(tmp_path: Path) -> None:
    (tmp_path / "processor_config.json").write_text('{"processor_class": "Glm4vProcessor"}')
    assert read_config(tmp_path, GLM).max_pixels == 9633792


def test_values_follow_the_definition() -> None:
    config = ProcessorConfig(
        patch_size=2, merge_size=3, temporal_patch_size=2, min_pixels=1, max_pixels=144
    )
    pixels = draw_pixels("definition", 12, 12)
    patches = make_patches(pixels, config)
    assert patches.grid == (1, 6, 6)
    assert patches.num_tokens == 4
    normal = (pixels / 255 - config.mean) / config.std
    at = 0
    for cell_row in range(2):
        for cell_column in range(2):
            for row in range(3):
                for column in range(3):
                    y, x = 6 * cell_row + 2 * row, 6 * cell_column + 2 * column
                    patch = normal[y : y + 2, x : x + 2].transpose(2, 0, 1)  # channel, y, x
                    expected = np.stack([patch, patch], axis=1).ravel()
                    np.testing.assert_allclose(patches.values[at], expected, rtol=0, atol=1e-6)
                    at += 1


def test_content_tells_pixels_and_configurations_apart() -> None:
    config = ProcessorConfig()
    image = draw_pixels("content", 56, 56)
    content = make_patches(image, config).content
    assert make_patches(image.copy(), config).content == content
    assert make_patches(image, ProcessorConfig(mean=(0.5, 0.5, 0.5))).content != content
    image[55, 55, 2] ^= 1
    assert make_patches(image, config).content != content


def test_a_users_limit_lowers_the_models_and_never_raises_it(tmp_path: Path) -> None:
    glm = read_config(tmp_path, GLM)
    assert resized_size(2400, 1080, glm) == resized_size(2400, 1080, glm, 5_000_000) == (2408, 1092)
    height, width = resized_size(2400, 1080, glm, 1_000_000)
    assert 900_000 < height * width <= 1_000_000
    assert resized_size(9000, 9000, glm, 1 << 40) == resized_size(9000, 9000, glm)
    assert resized_size(2400, 1080, glm, 28 * 28) == (28, 28)
    with pytest.raises(InvalidRequestError, match=r"max_pixels is 783; one token .* is 784 pixels"):
        resized_size(10, 10, glm, 783)


@pytest.mark.parametrize(("height", "width"), [(1, 201), (1000, 4), (0, 5), (5, 0)])
@pytest.mark.parametrize("grows_first", [False, True])
def test_too_narrow_an_image_is_refused(height: int, width: int, grows_first: bool) -> None:
    limits = {"factor": 28, "min_pixels": 3136, "max_pixels": 1 << 20}
    with pytest.raises(
        InvalidRequestError, match=f"an image of {width} x {height} pixels.*; (at|crop)"
    ):
        smart_resize(height, width, **limits, grows_first=grows_first)
    smart_resize(200, 1, **limits, grows_first=grows_first)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"image_processor_type": "CLIPImageProcessor"},
            UnsupportedModelError,
            "CLIPImageProcessor",
        ),
        ({"image_processor_type": None}, ModelFormatError, "image_processor_type is missing"),
        ({"do_resize": False}, UnsupportedModelError, "do_resize is false"),
        ({"do_normalize": False}, UnsupportedModelError, "do_normalize is false"),
        ({"do_pad": True}, UnsupportedModelError, "do_pad = True"),
        ({"tiles": 4}, UnsupportedModelError, "tiles = 4"),
        ({"size": {"height": 4, "width": 4}}, UnsupportedModelError, "height = 4, width = 4"),
        (
            {"size": {"shortest_edge": 9, "longest_edge": 8}},
            ModelFormatError,
            "at least 9 .* most 8",
        ),
        ({"size": [1, 2]}, ModelFormatError, "size is .*expected an object"),
        ({"image_mean": [0.5, 0.5]}, ModelFormatError, "image_mean .*three numbers"),
        ({"image_std": [0.5, 0, 0.5]}, ModelFormatError, "image_std .*three numbers"),
        ({"patch_size": 0}, ModelFormatError, "patch_size is 0"),
        ({"resample": 9}, ModelFormatError, "resample is 9"),
    ],
)
def test_a_folder_that_asks_for_more_is_refused(
    tmp_path: Path, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        read_config(tmp_path, {**GLM, **change})


def test_a_folder_without_a_processor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFormatError, match=r"preprocessor_config\.json is missing"):
        ProcessorConfig.from_folder(tmp_path)
