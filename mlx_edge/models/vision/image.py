"""An image's bytes become red, green and blue: (H, W, 3) uint8, upright, on white.

Whatever is wrong with the bytes is one InvalidRequestError in one line. What an image costs is known before it is
decoded: its bytes, its pixels, the pieces of its header. Colour profiles are ignored, as the models' own processors
do. Knows no models; Pillow is imported when the first image is read.
"""

import base64
import binascii
import io
import re
import struct
import threading
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mlx_edge.errors import InvalidRequestError

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFile import ImageFile

MAX_PIXELS = (
    1 << 26
)  # 8192 x 8192; decoding takes 7 bytes for each, 10 to turn it, more if progressive
MAX_ENCODED_BYTES = 1 << 26
MAX_SCANS = 500  # of a progressive JPEG; each is a pass over all pixels, ten are usual
HEADER_READS = (
    8192  # Pillow reads a header piece by piece; some of its joins are quadratic in the pieces
)
LARGE_PIXELS = 1 << 23  # larger ones are decoded one at a time, in whichever threads
_LARGE_DECODING = threading.Lock()
BAND_PIXELS = 1 << 20  # converted at a time, so that a conversion costs a band and not an image

FORMATS = ("PNG", "JPEG", "WebP", "GIF", "BMP")
READABLE = f"{', '.join(FORMATS[:-1])} and {FORMATS[-1]} are read"
_DATA_URI = re.compile(r"data:image/[a-z0-9.+-]+(?:;[a-z0-9=.+_-]+)*;base64,", re.IGNORECASE)
_UPRIGHT: dict[int, Callable[[NDArray[np.uint8]], NDArray[np.uint8]]] = {  # by EXIF orientation
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a.swapaxes(0, 1)[:, ::-1],
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: a.swapaxes(0, 1)[::-1],
}


def read_image(source: str | Path | bytes, name: str | None = None) -> NDArray[np.uint8]:
    """Decode a file (a path, or its bytes) to (H, W, 3) uint8 RGB; an animation gives its first frame.

    EXIF's rotation is applied. Transparency is laid over white, as transformers 5 does when a processor gets the
    image (its loader of chat messages drops the alpha channel instead). 16-bit grey keeps its high byte, as Pillow
    does for 16-bit colour; transformers clips it at 255. CMYK is Pillow's, inverted where Adobe inverts it.
    `name` says in messages which image it is. Raises: InvalidRequestError.
    """
    if isinstance(source, bytes):
        name = name or "the image"
        data = source
    else:
        name = name or str(source)
        data = _read_file(Path(source), name)
    if len(data) > MAX_ENCODED_BYTES:
        raise InvalidRequestError(
            f"{name}: more than {MAX_ENCODED_BYTES >> 20} MiB encoded; that is the most that is read; "
            "scale the image down"
        )
    kind = recognise_format(data, name)
    try:
        return _decode(data, kind, name)
    except InvalidRequestError:
        raise
    except Exception as error:  # Pillow raises whatever broken bytes make it stumble over
        reason = " ".join(str(error).split())[:100] or type(error).__name__
        raise InvalidRequestError(
            f"{name}: this {kind} file cannot be decoded ({reason}); it is damaged or cut short; "
            "save it again, or send all of it"
        ) from None


def read_data_uri(uri: str) -> bytes:
    """The bytes in `data:image/png;base64,...`. Raises: InvalidRequestError, also for stray characters."""
    head = _DATA_URI.match(uri[:256])
    if head is None:
        raise InvalidRequestError(
            f"an image begins with {uri[:32]!r}, expected data:image/png;base64,... "
            "(or jpeg, webp, gif, bmp); send the image itself as a data: URI"
        )
    num_digits = len(uri) - head.end()
    if num_digits // 4 * 3 > MAX_ENCODED_BYTES:
        raise InvalidRequestError(
            f"an image's data: URI holds more than {MAX_ENCODED_BYTES >> 20} MiB; scale the image down"
        )
    try:
        data = base64.b64decode(uri[head.end() :].encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError) as error:
        reason = error if isinstance(error, binascii.Error) else "not ASCII"
        raise InvalidRequestError(
            f"an image's data: URI is not base64 ({reason}); expected A-Z a-z 0-9 + / with = padding, "
            "no white space"
        ) from None
    if not data:
        raise InvalidRequestError("an image's data: URI is empty; append the image's base64")
    return data


def recognise_format(data: bytes, name: str) -> str:
    """Which of FORMATS the first bytes are. Raises: InvalidRequestError naming what else they are."""
    if not data:
        raise InvalidRequestError(f"{name} is empty; {READABLE}")
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WebP"
    for start, kind in _READABLE_STARTS.items():
        if data.startswith(start):
            return kind
    for start, kind in _OTHER_STARTS.items():
        if data.startswith(start, 4 if start == b"ftyp" else 0):
            raise InvalidRequestError(f"{name}: found {kind}; {READABLE}; convert it to PNG")
    raise InvalidRequestError(
        f"{name}: no image format begins with the bytes {data[:8].hex(' ')}; {READABLE}"
    )


_READABLE_STARTS = {
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"\xff\xd8\xff": "JPEG",
    b"GIF87a": "GIF",
    b"GIF89a": "GIF",
    b"BM": "BMP",
}
_OTHER_STARTS = {
    b"II*\0": "a TIFF file",
    b"MM\0*": "a TIFF file",
    b"ftyp": "a HEIC, AVIF or video file",
    b"%PDF": "a PDF file",
    b"<svg": "an SVG file",
    b"<?xml": "an XML file",
    b"\0\0\1\0": "an icon file",
    b"8BPS": "a Photoshop file",
    b"\0\0\0\x0cjP  ": "a JPEG 2000 file",
    b"\xff\x4f\xff\x51": "a JPEG 2000 file",
    b"PK\3\4": "a ZIP archive",
    b"\x1f\x8b": "a gzip archive",
}


def _read_file(path: Path, name: str) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(MAX_ENCODED_BYTES + 1)
    except FileNotFoundError:
        raise InvalidRequestError(
            f"{name}: there is no such file; give the path of an image"
        ) from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        reason = getattr(error, "strerror", None) or error
        raise InvalidRequestError(
            f"{name}: cannot be read ({reason}); give the path of an image"
        ) from None


def _decode(data: bytes, kind: str, name: str) -> NDArray[np.uint8]:
    if kind == "GIF":
        _check_size(*_gif_size(data), name)
    elif kind == "WebP":
        _check_size(*_webp_size(data), name)
    elif kind == "JPEG" and data.count(b"\xff\xda") > MAX_SCANS:
        raise InvalidRequestError(f"{name}: a JPEG of more than {MAX_SCANS} scans; save it as PNG")
    file = _CountedBytes(data)
    image = _open_function(kind)(file)
    _check_size(*image.size, name)
    if kind == "JPEG" and image.width * image.height > len(data) * 512:
        # A block of 64 pixels takes at least a bit; libjpeg paints missing ones grey and says nothing.
        raise ValueError("its pixels are missing")
    file.num_left += len(data) // 128
    with _LARGE_DECODING if image.width * image.height > LARGE_PIXELS else nullcontext():
        image.load()
        upright = _UPRIGHT.get(_orientation(image.info.get("exif")))
        pixels = _to_rgb(image)
        return pixels if upright is None else np.ascontiguousarray(upright(pixels))


def _check_size(width: int, height: int, name: str) -> None:
    if width < 1 or height < 1:
        raise InvalidRequestError(f"{name}: {width} x {height} pixels; at least 1 x 1 is needed")
    if width * height > MAX_PIXELS:
        raise InvalidRequestError(
            f"{name}: {width} x {height} pixels; at most {MAX_PIXELS} are decoded; scale the image down"
        )


class _CountedBytes(io.BytesIO):
    """A file that gives up after so many reads: the loops of Pillow over the pieces of a file end in time."""

    num_left = HEADER_READS

    def read(self, size: int | None = -1, /) -> bytes:
        self.num_left -= 1
        if self.num_left < 0:
            raise ValueError("it is in too many pieces")
        return super().read(size)


@cache
def _open_function(kind: str) -> Callable[[io.BytesIO], "ImageFile"]:
    """Pillow's reader of one format; Image.open would try more, and warn of sizes that are refused here."""
    from PIL import BmpImagePlugin, GifImagePlugin, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

    class Jpeg(JpegImagePlugin.JpegImageFile):
        def _read_dpi_from_exif(self) -> None:
            """Nothing: the table that Pillow would read may name the same bytes 65535 times."""

    readers: dict[str, Callable[[io.BytesIO], ImageFile]] = {
        "PNG": PngImagePlugin.PngImageFile,
        "JPEG": Jpeg,
        "WebP": WebPImagePlugin.WebPImageFile,
        "GIF": GifImagePlugin.GifImageFile,
        "BMP": BmpImagePlugin.BmpImageFile,
    }
    return readers[kind]


def _to_rgb(image: "Image") -> NDArray[np.uint8]:
    width, height = image.size
    pixels = np.empty((height, width, 3), np.uint8)
    num_rows = max(1, BAND_PIXELS // width)
    for top in range(0, height, num_rows):
        bottom = min(height, top + num_rows)
        pixels[top:bottom] = _band_to_rgb(image.crop((0, top, width, bottom)))
    return pixels


def _band_to_rgb(band: "Image") -> NDArray[np.uint8]:
    from PIL import Image

    if band.mode.startswith("I"):
        deep = np.asarray(band)
        grey = (deep >> 8).astype(np.uint8)
        grey[deep == band.info.get("transparency", -1)] = 255
        return np.broadcast_to(grey[..., None], (*grey.shape, 3))
    if band.has_transparency_data:
        white = Image.new("RGBA", band.size, (255, 255, 255, 255))
        band = Image.alpha_composite(white, band.convert("RGBA"))
    return np.asarray(band.convert("RGB"))


def _orientation(exif: bytes | None) -> int:
    """The orientation that EXIF's first table gives, 1 (upright) where there is none or it is broken.

    Not Pillow's reader, see `Jpeg`. EXIF 2.3, section 4.5: a TIFF header, then entries of 12 bytes.
    """
    data = (exif or b"").removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(data[:2])
    try:
        if order is None:
            return 1
        (start,) = struct.unpack_from(f"{order}I", data, 4)
        (num_entries,) = struct.unpack_from(f"{order}H", data, start)
        for index in range(num_entries):
            tag, kind, count, value = struct.unpack_from(
                f"{order}HHIH", data, start + 2 + 12 * index
            )
            if tag == 0x0112:
                return value if kind == 3 and count == 1 else 1
    except struct.error:
        pass
    return 1


def _gif_size(data: bytes) -> tuple[int, int]:
    """The canvas that holds the screen and the first frame: Pillow may fill it while it reads the header."""
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    at = 13 + (3 << (flags & 7) + 1 if flags & 128 else 0)
    is_inside = False  # an extension: pieces that each begin with their length, up to one of none
    for _ in range(HEADER_READS):
        if is_inside:
            is_inside = data[at] > 0
            at += 1 + data[at]
        elif data[at] == ord(","):
            left, top, frame_width, frame_height = struct.unpack_from("<HHHH", data, at + 1)
            return max(width, left + frame_width), max(height, top + frame_height)
        else:
            is_inside = data[at] == ord("!")
            at += 2 if is_inside else 1
    raise ValueError("it is in too many pieces")


def _webp_size(data: bytes) -> tuple[int, int]:
    """The canvas that the first chunk announces: the decoder allocates it while it reads the header."""
    if data[12:16] == b"VP8X":
        size = int.from_bytes(data[24:27], "little"), int.from_bytes(data[27:30], "little")
        return size[0] + 1, size[1] + 1
    if data[12:16] == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    width, height = struct.unpack_from("<HH", data, 26)
    return width & 0x3FFF, height & 0x3FFF
