"""From the files of images, and a prompt with a place for each, to a prompt that a model can read.

Puts image, processor and prompt together; may run in any thread, since it computes nothing on MLX.
"""

from collections.abc import MutableMapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mlx_edge.errors import InvalidRequestError
from mlx_edge.models.vision.image import read_image
from mlx_edge.models.vision.processor import Patches, make_patches
from mlx_edge.models.vision.prompt import ImagePrompt, place_images
from mlx_edge.models.vision.tower import VisionTower

Known = MutableMapping[tuple[bytes, int | None], Patches]  # by file and max_pixels
ImageSource = str | Path | bytes | NDArray[np.uint8]  # a path, a file's bytes, or (H, W, 3) RGB


def read_images(
    tokens: Sequence[int],
    images: Sequence[ImageSource],
    tower: VisionTower,
    *,
    max_pixels: int | None = None,
    begin: int = 0,
    context_size: int | None = None,
    known: Known | None = None,
) -> ImagePrompt | None:
    """The prompt with its images where its tokens have a place for each; None where it has neither.

    `max_pixels` lowers the size to which the model resizes them; `begin` is the position of the first token, behind a
    stored prompt of text alone. With a `context_size` no more images are read than fit. What is `known` of a file's
    bytes is not made again, and what is made is put there.

    Raises: InvalidRequestError for what is no image, is too large to be decoded or does not fit the model, for more
    or fewer images than places, and for a prompt beyond the context.
    """
    if not images and tower.config.image_token_id not in tokens:
        return None
    known = {} if known is None else known
    patches: list[Patches] = []
    num_tokens = len(tokens)
    for number, image in enumerate(images, start=1):
        key = (image, max_pixels) if isinstance(image, bytes) else None
        made = None if key is None else known.get(key)
        if made is None:
            made = make_patches(_read_pixels(image, number), tower.processor, max_pixels)
        if key is not None:
            known[key] = made
        patches.append(made)
        num_tokens += made.num_tokens - 1
        if context_size is not None and num_tokens > context_size:  # before more of them are made
            raise InvalidRequestError(
                f"the prompt has {num_tokens} tokens with image {number} of {len(images)}, the model's "
                f"context {context_size}; send fewer or smaller images, or lower max_pixels"
            )
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
