"""Images and sizes that tests and scripts/make_vision_goldens.py draw alike, from names."""

import zlib

import numpy as np
from numpy.typing import NDArray


def draw_pixels(name: str, width: int, height: int) -> NDArray[np.uint8]:
    """(H, W, 3): a ramp under blocks with sharp edges, with noise; every channel differs."""
    # The old generator: numpy has promised not to change its stream.
    random = np.random.RandomState(zlib.crc32(name.encode()))
    blocks = random.randint(0, 160, (height // 16 + 1, width // 16 + 1, 3))
    pixels = blocks.repeat(16, 0).repeat(16, 1)[:height, :width]
    pixels = pixels + (np.arange(width) * 60 // width)[None, :, None]
    noise = random.randint(0, 36, (64, 64, 3))
    pixels += np.tile(noise, (height // 64 + 1, width // 64 + 1, 1))[:height, :width]
    return pixels.astype(np.uint8)


def draw_sizes(count: int) -> list[tuple[int, int]]:
    """(height, width) of many images, from one pixel to a poster, none narrower than 1 : 150."""
    random = np.random.RandomState(8)
    sizes = []
    for _ in range(count):
        long = int(random.randint(1, 1 << random.randint(1, 14)))
        short = int(random.randint(max(1, -(-long // 150)), long + 1))
        sizes.append((long, short) if random.randint(2) else (short, long))
    return sizes


def sample_positions(count: int) -> NDArray[np.int64]:
    """64 places in an array of `count` values, the first and the last among them."""
    inner = np.random.RandomState(count & 0xFFFFFFFF).randint(0, count, 62)
    return np.concatenate([[0], inner, [count - 1]])


def take_moments(values: NDArray[np.float32]) -> list[float]:
    """Mean, and means that change when rows or columns of (N, D) change places."""
    by_row, by_column = values.mean(1, dtype=np.float64), values.mean(0, dtype=np.float64)
    turns = [(mean * (np.arange(mean.size) % 251)).mean() for mean in (by_row, by_column)]
    return [float(by_row.mean()), *map(float, turns)]
