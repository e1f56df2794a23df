"""Pixels become patches: resized to a multiple of the model's cells, normalised, cut in the order that a tower reads.

The arithmetic of transformers' Glm4vImageProcessor and Qwen2VLImageProcessor on their Pillow backend, bit for bit;
their torchvision backend rounds the resized pixels differently. Knows no files of images, no tokens and no towers.
"""

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mlx_edge.errors import InvalidRequestError, ModelFormatError, UnsupportedModelError
from mlx_edge.models.config import read_json_object
from mlx_edge.models.fields import Fields

MAX_ASPECT_RATIO = 200
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
MAX_MODEL_PIXELS = 1 << 28  # no model's limit is near it

# Keys that change nothing for one image: names of classes, layouts, defaults of other inputs.
NEUTRAL = frozenset(
    """_processor_class auto_map crop_size data_format default_to_square device disable_grouping
    feature_extractor_type image_processor_type input_data_format processor_class return_tensors
    return_metadata video_processor_type""".split()
)


@dataclass(frozen=True)
class ProcessorConfig:
    """How a model wants its images."""

    patch_size: int = 14  # pixels along a side
    merge_size: int = 2  # patches along a side of the cell that becomes one token
    temporal_patch_size: int = 2  # frames in a patch; a still image is repeated
    min_pixels: int = 56 * 56  # of the resized image
    max_pixels: int = 28 * 28 * 1280
    counts_frames: bool = (
        False  # GLM-4.1V: the limits count repeated frames, and a side below a cell grows first
    )
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    rescale_factor: float = 1 / 255
    resample: int = 3  # Pillow's number: 3 is bicubic

    @property
    def cell_size(self) -> int:
        """Pixels along a side of what becomes one token."""
        return self.patch_size * self.merge_size

    @staticmethod
    def from_folder(folder: Path) -> "ProcessorConfig":
        """Read `processor_config.json` (transformers 5) or `preprocessor_config.json` (before).

        Raises: ModelFormatError when there is none or it is broken, UnsupportedModelError for another processor or
        a key that would change the result.
        """
        fields = _read_fields(folder)
        kind = fields.string("image_processor_type").removesuffix("Fast")
        if kind not in FAMILIES:
            raise UnsupportedModelError(
                f"{fields.name}: image_processor_type {kind!r} is not one of those defined here: "
                f"{', '.join(FAMILIES)}"
            )
        return _read_config(fields, FAMILIES[kind])


FAMILIES = {
    "Glm4vImageProcessor": ProcessorConfig(
        min_pixels=112 * 112, max_pixels=28 * 28 * 15000, counts_frames=True
    ),
    "Qwen2VLImageProcessor": ProcessorConfig(),
}


@dataclass(frozen=True, eq=False)
class Patches:
    """One image as its tower reads it."""

    values: NDArray[
        np.float32
    ]  # (N, 3 * frames * patch * patch); the patches of a cell stand together
    grid: tuple[int, int, int]  # frames, rows and columns of patches; N is their product
    merge_size: int
    content: bytes  # SHA-256 of all that `values` is made from: equal content, equal values

    @property
    def num_tokens(self) -> int:
        """Tokens that this image takes in a prompt."""
        return len(self.values) // self.merge_size**2


def make_patches(
    image: NDArray[np.uint8], config: ProcessorConfig, max_pixels: int | None = None
) -> Patches:
    """Cut an image (H, W, 3) into patches.

    `max_pixels`, of the resized image, lowers the model's own limit and never raises it.
    Raises: InvalidRequestError for sides in a ratio above 200, or a `max_pixels` below one token's.
    """
    from PIL import Image

    height, width = resized_size(image.shape[0], image.shape[1], config, max_pixels)
    resized = Image.fromarray(image).resize(
        (width, height), resample=Image.Resampling(config.resample)
    )
    pixels = np.asarray(resized)
    # Every pixel value has one normalised value a channel, in the reference's steps and precisions.
    scaled = (np.arange(256, dtype=np.float64) * config.rescale_factor).astype(np.float32)
    mean, std = np.array(config.mean, np.float32), np.array(config.std, np.float32)
    table = (scaled[:, None] - mean) / std  # (256, 3)
    rows, columns = height // config.patch_size, width // config.patch_size
    values = _cut(pixels, config, table)
    content = hashlib.sha256(repr((config, pixels.shape)).encode())
    content.update(pixels.tobytes())
    return Patches(values, (1, rows, columns), config.merge_size, content.digest())


def _cut(
    pixels: NDArray[np.uint8], config: ProcessorConfig, table: NDArray[np.float32]
) -> NDArray[np.float32]:
    """(H, W, 3) to (N, 3 * frames * patch * patch): cells row by row, in a cell patches row by row."""
    patch, merge, cell = config.patch_size, config.merge_size, config.cell_size
    height, width, _ = pixels.shape
    cut = pixels.reshape(height // cell, merge, patch, width // cell, merge, patch, 3)
    cut = cut.transpose(0, 3, 1, 4, 6, 2, 5)  # cell row, column, patch row, column, channel, y, x
    cut = cut.reshape(-1, 3, 1, patch * patch)
    values = np.empty((len(cut), 3, config.temporal_patch_size, patch * patch), np.float32)
    for channel in range(3):
        values[:, channel] = table[:, channel][cut[:, channel]]
    return values.reshape(len(cut), -1)


def resized_size(
    height: int, width: int, config: ProcessorConfig, max_pixels: int | None = None
) -> tuple[int, int]:
    """(height, width) after resizing an image for this model: what it will cost, without touching a pixel.

    Raises: InvalidRequestError, as make_patches does.
    """
    num_frames = config.temporal_patch_size if config.counts_frames else 1
    limit = config.max_pixels
    if max_pixels is not None:
        if max_pixels < config.cell_size**2:
            raise InvalidRequestError(
                f"max_pixels is {max_pixels}; one token of this model is {config.cell_size**2} pixels; "
                "give at least that"
            )
        limit = min(limit, max_pixels * num_frames)
    return smart_resize(
        height,
        width,
        factor=config.cell_size,
        min_pixels=min(config.min_pixels, limit),
        max_pixels=limit,
        num_frames=num_frames,
        grows_first=config.counts_frames,
    )


def smart_resize(
    height: int,
    width: int,
    *,
    factor: int,
    min_pixels: int,
    max_pixels: int,
    num_frames: int = 1,
    grows_first: bool = False,
) -> tuple[int, int]:
    """The nearest multiples of `factor` that keep the ratio, with min_pixels <= frames * H * W <= max_pixels.

    Rounds where the function of the same name in transformers rounds, also to even at a half. A side is at least
    `factor`, so a narrow image may pass `max_pixels`. Raises: InvalidRequestError for a ratio above 200.
    """
    found = f"an image of {width} x {height} pixels"
    if height < 1 or width < 1:
        raise InvalidRequestError(f"{found}; at least 1 x 1 is needed")
    if grows_first and min(height, width) < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    if max(height, width) / min(height, width) > MAX_ASPECT_RATIO:
        raise InvalidRequestError(
            f"{found}: one side is more than {MAX_ASPECT_RATIO} times the other, the most that this model reads; "
            "crop it or cut it in several images"
        )
    area = num_frames * height * width
    rows, columns = round(height / factor), round(width / factor)
    rounded = num_frames * rows * columns * factor**2
    if rounded > max_pixels:
        shrink = math.sqrt(area / max_pixels)
        rows = max(1, math.floor(height / shrink / factor))
        columns = max(1, math.floor(width / shrink / factor))
    elif rounded < min_pixels:
        grow = math.sqrt(min_pixels / area)
        rows = math.ceil(height * grow / factor)
        columns = math.ceil(width * grow / factor)
    return rows * factor, columns * factor


def _read_fields(folder: Path) -> Fields:
    """The image processor's object, from the file that transformers would take it from."""
    newer, older = folder / "processor_config.json", folder / "preprocessor_config.json"
    if newer.exists():
        fields = Fields(read_json_object(newer), str(newer)).nested("image_processor")
        if fields is not None:
            return fields
    if not older.exists():
        raise ModelFormatError(
            f"{older} is missing, and processor_config.json holds no image_processor; a model that sees needs one; "
            "download the folder again"
        )
    return Fields(read_json_object(older), str(older))


def _read_config(fields: Fields, default: ProcessorConfig) -> ProcessorConfig:
    for key in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"):
        if not fields.boolean(key, True):
            raise UnsupportedModelError(f"{fields.name}: {key} is false; only true is supported")
    low, high = _read_limits(fields, default)
    config = ProcessorConfig(
        patch_size=fields.integer("patch_size", default.patch_size, high=1024),
        merge_size=fields.integer("merge_size", default.merge_size, high=64),
        temporal_patch_size=fields.integer(
            "temporal_patch_size", default.temporal_patch_size, high=64
        ),
        min_pixels=low,
        max_pixels=high,
        counts_frames=default.counts_frames,
        mean=_read_channels(fields, "image_mean", default.mean),
        std=_read_channels(fields, "image_std", default.std),
        rescale_factor=fields.number("rescale_factor", default.rescale_factor, low=0.0),
        resample=fields.integer("resample", default.resample, low=0, high=5),
    )
    fields.unread -= NEUTRAL
    fields.refuse_unread()
    return config


def _read_limits(fields: Fields, default: ProcessorConfig) -> tuple[int, int]:
    """`size` as {shortest_edge, longest_edge}, over which min_pixels and max_pixels win (Qwen2-VL's older names)."""
    low, high = default.min_pixels, default.max_pixels
    size = fields.nested("size")
    sources = [fields] if size is None else [size, fields]
    for source in sources:
        names = (
            ("shortest_edge", "longest_edge") if source is size else ("min_pixels", "max_pixels")
        )
        low = source.integer(names[0], low, high=MAX_MODEL_PIXELS)
        high = source.integer(names[1], high, high=MAX_MODEL_PIXELS)
    if size is not None:
        size.unread -= {"min_pixels", "max_pixels"}  # a copy, by old versions, of the two beside it
        size.refuse_unread()
    if low > high:
        raise ModelFormatError(
            f"{fields.name}: at least {low} pixels and at most {high}; expected a range"
        )
    return low, high


def _read_channels(
    fields: Fields, key: str, default: tuple[float, float, float]
) -> tuple[float, float, float]:
    fields.unread.discard(key)
    value = fields.raw.get(key)
    if value is None:
        return default
    is_sound = (
        isinstance(value, list)
        and len(value) == 3
        and all(
            isinstance(item, int | float) and not isinstance(item, bool) and math.isfinite(item)
            for item in value
        )
    )
    if not is_sound or (key == "image_std" and min(value) <= 0):
        raise ModelFormatError(
            f"{fields.name}: {key} is {str(value)[:60]}, expected three numbers, one a channel"
        )
    return (float(value[0]), float(value[1]), float(value[2]))
