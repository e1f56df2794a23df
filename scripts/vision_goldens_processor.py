"""The section "processor": sizes, grids and pixel values of transformers' image processors on their Pillow backend.

`drawn` images come from tests/goldens/images.py; `files` are stored whole, because what an encoder writes differs
from version to version. Of pixel values a golden keeps 64 and two moments.
"""

import base64
import io
from importlib import import_module
from typing import Any

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import Image, ImageOps

from tests.goldens.images import draw_pixels, draw_sizes, sample_positions, take_moments

NUM_SIZES = 250
HALF = [0.5, 0.5, 0.5]
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
SIZES = {
    "patch_size": 14,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "image_mean": MEAN,
    "image_std": STD,
}

# As folders of the hub spell them, except for the limits of "small", which keep big images cheap.
CONFIGS: dict[str, dict[str, Any]] = {
    "glm4v": {
        **SIZES,
        "do_rescale": True,
        "size": {"shortest_edge": 12544, "longest_edge": 9633792},
        "image_processor_type": "Glm4vImageProcessor",
        "processor_class": "Glm4vProcessor",
    },
    "glm4v-small": {
        **SIZES,
        "size": {"shortest_edge": 12544, "longest_edge": 400000},
        "image_processor_type": "Glm4vImageProcessor",
    },
    "qwen2_5_vl": {
        **SIZES,
        "min_pixels": 3136,
        "max_pixels": 12845056,
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
    },
    "qwen-small": {
        "patch_size": 16,
        "merge_size": 2,
        "temporal_patch_size": 1,
        "image_mean": HALF,
        "image_std": HALF,
        "size": {"shortest_edge": 65536, "longest_edge": 200000},
        "image_processor_type": "Qwen2VLImageProcessorFast",
    },
    "odd-cells": {  # cells of three by three patches, bilinear
        **SIZES,
        "patch_size": 6,
        "merge_size": 3,
        "resample": 2,
        "size": {"shortest_edge": 3000, "longest_edge": 50000},
        "image_processor_type": "Qwen2VLImageProcessor",
    },
}
DRAWN = [
    (1, 1),
    (27, 3),
    (28, 28),
    (100, 37),
    (37, 100),
    (320, 240),
    (1100, 8),
    (3000, 2000),
]  # width, height
PHONE = (1080, 2400)


def make() -> dict[str, Any]:
    if int(PIL.__version__.split(".")[0]) >= 13:
        raise SystemExit(
            "use the Pillow that pyproject.toml allows: 13 resizes in another order and rounds otherwise"
        )
    golden: dict[str, Any] = {"configs": {}, "sizes": {}, "drawn": [], "files": {}}
    for name, config in CONFIGS.items():
        processor = _processor(config)
        golden["configs"][name] = {"given": config, "saved": processor.to_dict()}
        golden["sizes"][name] = [_resize(processor, *size) for size in draw_sizes(NUM_SIZES)]
        sizes = DRAWN if name != "glm4v" else [*DRAWN[:-1], PHONE]
        if name == "qwen2_5_vl":
            sizes = DRAWN[:-1]
        golden["drawn"] += [
            {"config": name, "size": size, **_of(processor, [_draw(*size)])} for size in sizes
        ]
    several = [_draw(*size) for size in ((100, 37), (28, 28), (37, 100))]
    golden["several"] = _of(_processor(CONFIGS["glm4v"]), several)
    for name, data in _files().items():
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        if image.mode.startswith("I"):  # they clip 16 bits at 255; this runtime keeps the high byte
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        values = _of(_processor(CONFIGS["glm4v-small"]), [image])
        golden["files"][name] = {"data": base64.b64encode(data).decode(), **values}
    return golden


def _processor(config: dict[str, Any]) -> Any:
    kind = "glm4v" if config["image_processor_type"].startswith("Glm") else "qwen2_vl"
    module: Any = import_module(f"transformers.models.{kind}.image_processing_pil_{kind}")
    name = config["image_processor_type"].removesuffix("Fast") + "Pil"
    return getattr(module, name)(**config)


def _resize(processor: Any, height: int, width: int) -> list[int]:
    """(height, width) after their smart_resize, called as their processor calls it."""
    limits = {"min_pixels": processor.size.shortest_edge, "max_pixels": processor.size.longest_edge}
    limits["factor"] = processor.patch_size * processor.merge_size
    if "glm4v" in type(processor).__module__:
        frames = processor.temporal_patch_size
        limits |= {"num_frames": frames, "temporal_factor": frames}
    module: Any = import_module(type(processor).__module__)
    return list(module.smart_resize(height=height, width=width, **limits))


def _draw(width: int, height: int) -> Image.Image:
    return Image.fromarray(draw_pixels(f"{width}x{height}", width, height))


def _of(processor: Any, images: list[Image.Image]) -> dict[str, Any]:
    out = processor(images, return_tensors="np")
    values: NDArray[np.float32] = out["pixel_values"]
    flat = values.ravel()
    return {
        "grids": np.asarray(out["image_grid_thw"]).tolist(),
        "samples": [round(float(v), 7) for v in flat[sample_positions(flat.size)]],
        "moments": take_moments(values),
    }


def _files() -> dict[str, bytes]:
    """One file for each way in which pixels are stored."""
    rgb = Image.fromarray(draw_pixels("file", 50, 36))
    grey = rgb.convert("L")
    alpha = Image.fromarray(np.linspace(0, 255, 50 * 36).reshape(36, 50).astype(np.uint8))
    clear = rgb.copy()
    clear.putalpha(alpha)
    palette = rgb.quantize(32)
    deep = np.arange(36 * 50, dtype=np.uint16).reshape(36, 50) * 36
    frames = [rgb, rgb.transpose(Image.Transpose.ROTATE_180), rgb.rotate(5)]
    more = {"save_all": True, "append_images": frames[1:]}
    files = {
        "rgb.png": _save(rgb, "PNG"),
        "rgb.bmp": _save(rgb, "BMP"),
        "rgb.jpg": _save(rgb, "JPEG", quality=90),
        "progressive.jpg": _save(rgb, "JPEG", progressive=True),
        "lossy.webp": _save(rgb, "WEBP"),
        "rgba.webp": _save(clear, "WEBP", lossless=True, exact=True),
        "rgba.png": _save(clear, "PNG"),
        "grey-alpha.png": _save(clear.convert("LA"), "PNG"),
        "colour-key.png": _save(rgb, "PNG", transparency=rgb.getpixel((20, 20))),
        "grey-key.png": _save(grey, "PNG", transparency=grey.getpixel((20, 20))),
        "grey.png": _save(grey, "PNG"),
        "grey.jpg": _save(grey, "JPEG"),
        "grey16.png": _save(Image.fromarray(deep), "PNG"),
        "bits.png": _save(grey.convert("1"), "PNG"),
        "palette.png": _save(palette, "PNG"),
        "palette-clear.png": _save(palette, "PNG", transparency=bytes(range(0, 256, 8))),
        "palette.gif": _save(palette, "GIF"),
        "clear.gif": _save(palette, "GIF", transparency=3),
        "palette.bmp": _save(palette, "BMP"),
        "cmyk.jpg": _save(rgb.convert("CMYK"), "JPEG"),
        "animated.gif": _save(palette, "GIF", save_all=True, append_images=[palette.rotate(9)]),
        "animated.png": _save(rgb, "PNG", **more),
        "animated.webp": _save(rgb, "WEBP", lossless=True, **more),
        "turned.png": _save(rgb, "PNG", exif=_exif(6)),
        "turned.webp": _save(rgb, "WEBP", exif=_exif(6)),
    }
    files |= {f"exif-{n}.jpg": _save(rgb, "JPEG", exif=_exif(n)) for n in range(1, 9)}
    return files


def _save(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x010F] = "a camera"
    exif[0x0112] = orientation
    return exif
