"""What becomes of good files, bad files and files that are made to cost."""

import base64
import io
import json
import random
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from mlx_edge.errors import InvalidRequestError
from mlx_edge.models.vision import image as image_module
from mlx_edge.models.vision.image import MAX_ENCODED_BYTES, read_data_uri, read_image
from tests.goldens.images import draw_pixels

GOLDEN = json.loads((Path(__file__).parents[2] / "goldens" / "vision_processor.json").read_text())
FILES = {name: base64.b64decode(one["data"]) for name, one in GOLDEN["files"].items()}
RGB = draw_pixels("file", 50, 36)


def save(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("name", ["rgb.png", "rgb.bmp", "animated.png", "animated.webp"])
def test_lossless_files_give_their_first_frames_pixels(name: str) -> None:
    np.testing.assert_array_equal(read_image(FILES[name]), RGB)


@pytest.mark.parametrize("name", ["rgba.png", "rgba.webp", "grey-alpha.png"])
def test_transparency_is_laid_over_white(name: str) -> None:
    image = Image.open(io.BytesIO(FILES[name])).convert("RGBA")
    colour, alpha = np.split(np.asarray(image).astype(float), [3], axis=2)
    expected = (colour * alpha + 255 * (255 - alpha)) / 255
    assert np.abs(read_image(FILES[name]) - expected).max() <= 1


@pytest.mark.parametrize("name", ["colour-key.png", "grey-key.png"])
def test_a_transparent_colour_is_white(name: str) -> None:
    assert (read_image(FILES[name])[20, 20] == 255).all()


def test_16_bit_grey_keeps_its_high_byte_and_its_transparent_level() -> None:
    deep = np.array([[0, 255, 256, 32767, 32768, 65535]], np.uint16)
    pixels = read_image(save(Image.fromarray(deep)))
    assert pixels.tolist() == [[[v, v, v] for v in (0, 0, 1, 127, 128, 255)]]
    assert read_image(save(Image.fromarray(deep), transparency=256))[0, :, 1].tolist() == [
        0, 0, 255, 127, 128, 255,
    ]  # fmt: skip


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_exif_turns_the_image(orientation: int, kind: str, order: str) -> None:
    exif = Image.Exif()
    exif.endian = order
    exif[0x010F], exif[0x0112] = "camera", orientation
    data = save(Image.fromarray(RGB[:, :33]), kind, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    np.testing.assert_array_equal(read_image(data), np.asarray(expected.convert("RGB")))


def test_a_broken_exif_leaves_the_image_as_it_is() -> None:
    for exif in (b"II*\0\xff\0\0\0", b"MM\0*", b"no", b"II*\0\x08\0\0\0\xff\xff"):
        data = save(Image.fromarray(RGB), exif=b"Exif\0\0" + exif)
        np.testing.assert_array_equal(read_image(data), RGB)


def test_an_image_of_many_bands_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_module, "BAND_PIXELS", 350)
    for name in ("rgb.png", "rgba.png", "palette-clear.png", "grey16.png"):
        pixels = read_image(FILES[name])
        monkeypatch.undo()
        np.testing.assert_array_equal(pixels, read_image(FILES[name]))
        monkeypatch.setattr(image_module, "BAND_PIXELS", 350)


def test_a_path_is_read_and_named_in_messages(tmp_path: Path) -> None:
    path = tmp_path / "screen.png"
    path.write_bytes(FILES["rgb.png"])
    assert read_image(path).shape == read_image(str(path)).shape == (36, 50, 3)
    path.write_bytes(FILES["rgb.png"][:99])
    with pytest.raises(InvalidRequestError, match=r"screen\.png: this PNG file cannot be decoded"):
        read_image(path)
    with pytest.raises(InvalidRequestError, match="there is no such file"):
        read_image(tmp_path / "none.png")
    with pytest.raises(InvalidRequestError, match="cannot be read"):
        read_image(tmp_path)
    with pytest.raises(InvalidRequestError, match="cannot be read"):
        read_image("a\0b")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "image 2 is empty; PNG, JPEG, WebP, GIF and BMP are read"),
        (b"hello", "no image format begins with the bytes 68 65 6c 6c 6f"),
        (b"II*\0more", "found a TIFF file; .* convert it"),
        (b"\0\0\0\x18ftypheic", "found a HEIC"),
        (b"%PDF-1.7", "found a PDF file"),
        (b"\x89PNG\r\n\x1a\n" + bytes(MAX_ENCODED_BYTES), "more than 64 MiB"),
    ],
)
def test_what_is_no_readable_image_is_named(data: bytes, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        read_image(data, "image 2")


@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_short_is_refused_and_never_half_read(name: str) -> None:
    data = FILES[name]
    whole = read_image(data)
    for end in [*range(0, len(data), max(1, len(data) // 40)), len(data) // 2]:
        try:
            pixels = read_image(data[:end])
        except InvalidRequestError as error:
            assert "\n" not in str(error)
        else:  # cut behind the first frame, or in what follows the pixels
            np.testing.assert_array_equal(pixels, whole)


@pytest.mark.parametrize("name", FILES)
def test_changed_bytes_raise_nothing_but_an_invalid_request(name: str) -> None:
    chance = random.Random(name)
    for _ in range(60):
        data = bytearray(FILES[name])
        for _ in range(chance.choice((1, 2, 8))):
            # Mostly in the header, where the structure is.
            at = chance.randrange(min(len(data), chance.choice((64, 512, len(data)))))
            data[at] = chance.choice((0, 255, chance.randrange(256)))
        if chance.random() < 0.2:
            at = chance.randrange(len(data))
            data[at:at] = data[:at][-chance.randrange(1, 99) :]
        try:
            pixels = read_image(bytes(data))
        except InvalidRequestError as error:
            assert "\n" not in str(error)
        else:
            assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3


def test_data_uris() -> None:
    text = base64.b64encode(FILES["rgb.png"]).decode()
    for head in ("data:image/png;base64,", "DATA:image/jpeg;charset=utf-8;BASE64,"):
        assert read_data_uri(head + text) == FILES["rgb.png"]


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("", "an image begins with ''"),
        ("https://a.example/b.png", "begins with 'https://a.example/b.png', expected data:"),
        ("data:text/plain;base64,AAAA", "expected data:image/png;base64"),
        ("data:image/png,AAAA", "expected data:image/png;base64"),
        ("data:image/png;base64,", "is empty"),
        ("data:image/png;base64,AAA", "is not base64"),
        ("data:image/png;base64,AA AA", "is not base64"),
        ("data:image/png;base64,AAAA\n", "is not base64"),
        ("data:image/png;base64,AA-_", "is not base64"),
        ("data:image/png;base64,AAAé", "is not base64 .not ASCII"),
        ("data:image/png;base64," + "A" * (MAX_ENCODED_BYTES // 3 * 4 + 8), "more than 64 MiB"),
    ],
    ids=range(11),
)
def test_other_uris_are_refused(uri: str, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message) as info:
        read_data_uri(uri)
    assert len(str(info.value)) < 200


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, more: bytes = b"") -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(64)))
    return b"\x89PNG\r\n\x1a\n" + header + more + pixels + chunk(b"IEND", b"")


def gif(screen: int, frame: int, more: bytes = b"") -> bytes:
    head = b"GIF89a" + struct.pack("<HHBBB", screen, screen, 0x80, 0, 0) + bytes(6)
    restore = b"!\xf9\4\x08\0\0\0\0"  # to background: Pillow fills a frame at once
    return (
        head
        + more
        + restore
        + b","
        + struct.pack("<HHHHB", 0, 0, frame, frame, 0)
        + b"\2\2\x4c\1\0;"
    )


def jpeg(size: int = 8, more: bytes = b"") -> bytes:
    data = save(Image.new("RGB", (8, 8)), "JPEG")
    at = data.index(b"\xff\xc0")
    return data[:2] + more + data[2 : at + 5] + struct.pack(">HH", size, size) + data[at + 9 :]


def segment(data: bytes) -> bytes:
    return b"\xff\xe1" + struct.pack(">H", len(data) + 2) + data


def costly_files() -> dict[str, bytes]:
    canvas = b"WEBPVP8X" + struct.pack("<I", 10) + b"\2\0\0\0" + b"\xff\x3f\0" * 2
    entries = b"".join(struct.pack("<HHII", 0x9000 + i, 7, 50000, 0) for i in range(4000))
    table = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 4000) + entries
    scans = save(Image.fromarray(RGB), "JPEG", progressive=True)
    last = scans.rindex(b"\xff\xda")
    return {
        "png": png(60000, 60000),
        "png just above": png(13000, 13000),
        "gif screen": gif(60000, 4),
        "gif frame": gif(4, 13000),
        "jpeg": jpeg(60000),
        "jpeg without pixels": jpeg(8000),
        "webp": b"RIFF" + struct.pack("<I", len(canvas)) + canvas,
        "bmp": b"BM" + struct.pack("<IIIIiiHH6I", 0, 0, 54, 40, 60000, 60000, 1, 24, *[0] * 6),
        "png text": png(4, 4, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1_000_000))) * 70),
        "png profile": png(4, 4, chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(9_000_000)))),
        "png chunks": png(4, 4, chunk(b"abCd", b"") * 50_000),
        "jpeg segments": jpeg(8, segment(b"") * 50_000),
        "jpeg exif": jpeg(8, segment(table)),
        "jpeg scans": scans[:last] + scans[last:-2] * 600 + scans[-2:],
        "gif comment": gif(4, 4, b"!\xfe" + (b"\xff" + bytes(255)) * 20_000 + b"\0"),
        "gif pieces": gif(4, 4, b"!\xfe" + b"\1\1" * 20_000 + b"\0"),
    }


MEASURE = """
import sys
from pathlib import Path
from mlx_edge.errors import InvalidRequestError
from mlx_edge.models.vision.image import read_image
assert "PIL" not in sys.modules, "Pillow is imported before an image is read"

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1])

def refuse(path):
    try:
        read_image(path)
    except InvalidRequestError as error:
        return str(error)
    return "read"

refuse(sys.argv[1])
for path in sys.argv[2:]:
    before = peak()
    print(Path(path).stem, "|", refuse(path), "|", peak() - before)
"""


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="the peak of memory is read from /proc"
)
def test_costly_files_are_refused_before_they_cost(tmp_path: Path) -> None:
    files = {"first": FILES["lossy.webp"], **costly_files()}
    for name, data in files.items():
        (tmp_path / f"{name}.bin").write_bytes(data)
    command = [sys.executable, "-c", MEASURE, *(str(tmp_path / f"{name}.bin") for name in files)]
    out = subprocess.run(command, check=True, capture_output=True, text=True)
    assert out.stderr == ""  # no warning of Pillow's either
    lines = [line.split(" | ") for line in out.stdout.splitlines()]
    assert [name for name, _, _ in lines] == list(files)[1:]
    for name, message, kib in lines:
        assert int(kib) < 16 * 1024, f"{name} cost {kib} KiB"
        assert message != "read" or name == "jpeg exif"  # sound, but for a table that nobody needs
