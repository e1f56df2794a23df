"""From the files of images, and a prompt with a place for each, to a prompt that a model can read.

Puts image, processor and prompt together; may run in any thread, since it computes nothing on MLX.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mlx_edge.errors import InvalidRequestError
from mlx_edge.models.vision.image import read_image
from mlx_edge.models.vision.processor import Patches, ProcessorConfig, make_patches
from mlx_edge.models.vision.prompt import ImagePrompt, place_images
from mlx_edge.models.vision.tower import VisionTower

ImageSource = str | Path | bytes | NDArray[np.uint8]  # a path, a file's bytes, or (H, W, 3) RGB


def read_patches(
    images: Sequence[ImageSource], processor: ProcessorConfig, max_pixels: int | None = None
) -> list[Patches]:
    """The patches of each image; `max_pixels` lowers the size to which the model resizes it.

    Raises: InvalidRequestError for what is no image, is too large to be decoded, or does not fit the model.
    """
    return [
        make_patches(_read_pixels(image, index), processor, max_pixels)
        for index, image in enumerate(images, start=1)
    ]


def read_images(
    tokens: Sequence[int],
    images: Sequence[ImageSource],
    tower: VisionTower,
    *,
    max_pixels: int | None = None,
    begin: int = 0,
) -> ImagePrompt | None:
    """The prompt with its images where its tokens have a place for each; None where it has neither.

    `begin` is the position of the first token, behind a stored prompt of text alone.

    Raises: InvalidRequestError for images that cannot be read, and more or fewer of them than places.
    """
    if not images and tower.config.image_token_id not in tokens:
        return None
    patches = read_patches(images, tower.processor, max_pixels)
    return place_images(tokens, patches, tower.config, begin=begin)


def _read_pixels(image: ImageSource, index: int) -> NDArray[np.uint8]:
    if not isinstance(image, np.ndarray):
        name = f"image {index}" if isinstance(image, bytes) else None
        return read_image(image, name)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise InvalidRequestError(
            f"image {index} is an array {image.shape} of {image.dtype}; expected (height, width, 3) of uint8: RGB"
        )
    return image
