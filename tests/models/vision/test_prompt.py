"""Prompts with images: where they stand, what RoPE turns to, what a prefix cache compares."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_edge.errors import InvalidRequestError
from mlx_edge.models.config import ModelConfig
from mlx_edge.models.vision.config import VisionConfig
from mlx_edge.models.vision.processor import Patches
from mlx_edge.models.vision.prompt import ImagePrompt, place_images, turn_step
from mlx_edge.ops import StepMeta
from tests.models.vision.folders import CASES, FAMILIES, draw_images, placed_once, read_golden

IMAGE = 60


def read_config(family: str) -> VisionConfig:
    vision = ModelConfig.from_hf(read_golden(family)["saved"]).vision
    assert vision is not None
    return vision


def place(family: str, case: str) -> ImagePrompt:
    config = read_config(family)
    return place_images(placed_once(family, case, IMAGE), draw_images(family, case, config), config)


@pytest.fixture
def three() -> ImagePrompt:
    return place("glm4v", "three")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_turns_equal_transformers_rope_index(family: str, case: str) -> None:
    golden = read_golden(family)["cases"][case]
    prompt = place(family, case)
    assert prompt.tokens == golden["tokens"]
    assert prompt.turns(0, len(prompt.tokens)).tolist() == golden["turns"]
    assert prompt.shift == golden["shift"]


def test_turns_of_every_part_are_those_of_the_whole(three: ImagePrompt) -> None:
    length = len(three.tokens) + 3  # what follows is turned on by the shift
    whole = three.turns(0, length)
    for begin in range(length):
        for size in {1, min(2, length - begin), min(7, length - begin), length - begin}:
            assert (three.turns(begin, size) == whole[:, begin : begin + size]).all()
    assert (whole[:, -3:] == np.arange(length - 3, length) + three.shift).all()


def test_a_step_with_tokens_of_images_has_axes_and_one_behind_them_a_shift(
    three: ImagePrompt,
) -> None:
    first = three.spans[0]
    before = turn_step(StepMeta.uniform(0, batch_size=1, width=first.start), [three])
    assert before.axes is None and not any(before.shifts)
    inside = turn_step(StepMeta.uniform(first.start - 1, batch_size=1, width=2), [three])
    assert inside.axes is not None
    assert inside.axes.tolist() == three.turns(first.start - 1, 2)[:, None].tolist()
    between = turn_step(StepMeta.uniform(first.end, batch_size=1, width=1), [three])
    assert between.axes is None and between.shifts == (first.shift,)
    behind = turn_step(StepMeta.uniform(len(three.tokens), batch_size=1, width=1), [three])
    assert behind.axes is None and behind.shifts == (three.shift,)


def test_a_ragged_step_turns_each_sequence_by_its_own_images(three: ImagePrompt) -> None:
    end = len(three.tokens)
    meta = StepMeta.ragged([4, end, three.spans[0].start], [2, 1, 3])
    turned = turn_step(meta, [None, three, three])
    assert turned.axes is not None
    found = np.array(turned.axes)[:, 0]
    assert (found[:, :2] == [4, 5]).all()
    assert (found[:, 2] == end + three.shift).all()
    assert (found[:, 3:] == three.turns(three.spans[0].start, 3)).all()
    shifted = turn_step(StepMeta.ragged([4, end], [2, 1]), [None, three])
    assert shifted.axes is None and shifted.shifts == (0, three.shift)


def test_keys_tell_images_apart_by_content(three: ImagePrompt) -> None:
    tokens = [*three.tokens, 5, 6]
    keys = three.keys(tokens)
    assert len(keys) == len(tokens)
    for index, (key, token) in enumerate(zip(keys, tokens, strict=True)):
        assert (key < 0) == three.in_step(index, 1)
        assert key == token or key < 0
    run = keys[three.spans[0].start : three.spans[0].end]
    assert len(set(run)) == len(run)
    assert three.keys(three.tokens) == keys[:-2]
    assert three.keys(tokens[: three.spans[0].start + 2]) == keys[: three.spans[0].start + 2]
    other = place("glm4v", "one").keys(place("glm4v", "one").tokens)
    assert not {key for key in other if key < 0} & set(keys)


def test_a_prompt_behind_a_stored_one_stands_further_on() -> None:
    config = read_config("glm4v")
    [image] = draw_images("glm4v", "one", config)
    tokens = placed_once("glm4v", "one", IMAGE)
    alone, behind = (place_images(tokens, [image], config, begin=begin) for begin in (0, 7))
    assert behind.spans[0].start == alone.spans[0].start + 7
    length = len(alone.tokens)
    assert (behind.turns(7, length) == alone.turns(0, length) + 7).all()


@pytest.mark.parametrize("given", [0, 1, 3])
def test_images_and_places_must_be_as_many(given: int) -> None:
    config = read_config("glm4v")
    images = [Patches(np.zeros((4, 96), np.float32), (1, 2, 2), 2, b"x")] * given
    with pytest.raises(
        InvalidRequestError, match=rf"{given} images? given.* 2 places .*60"
    ) as found:
        place_images([1, IMAGE, 2, IMAGE, 3], images, config)
    assert "\n" not in str(found.value)


def test_missing_names_each_content_once() -> None:
    config = read_config("glm4v")
    image = Patches(np.zeros((4, 96), np.float32), (1, 2, 2), 2, b"x")
    prompt = place_images([1, IMAGE, 2, IMAGE, 3], [image, image], config)
    assert [span.start for span in prompt.missing(0, 5)] == [3]
    assert prompt.missing(2, 1) == []
    prompt.features[b"x"] = mx.zeros((1, 96))
    assert prompt.missing(0, 5) == []
