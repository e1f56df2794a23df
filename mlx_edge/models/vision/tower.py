"""The vision tower: patches of an image in, one feature per token out.

A stack of bidirectional blocks, made of the same ops as the decoder's; `VisionConfig` says which parts a family has.
Images are computed one by one, and attention goes in blocks of queries, so that no tensor has the patches squared.
Knows nothing of pixels, tokens and files.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlx_edge import ops
from mlx_edge.models.vision.config import VisionConfig
from mlx_edge.models.vision.processor import Patches, ProcessorConfig

Grid = tuple[int, int, int]  # frames, rows and columns
LAYER_NORM_EPS = 1e-5
CUBIC = -0.75  # Keys' coefficient, as torch has it
LARGE = 2048  # patches from which an image is computed part by part, of so many rows
HEAD_GROUPS = 4  # in which its heads attend


@dataclass(frozen=True)
class VisionBlock:
    """The weights of one block."""

    norm: ops.Norm
    qkv: ops.Linear  # (3 * E, E): queries, keys and values of all heads
    output: ops.Linear  # (E, E)
    mlp: ops.MLPWeights


@dataclass(frozen=True)
class LayerNorm:
    """(x - mean) / sqrt(variance + eps) * weight + bias."""

    weight: mx.array  # (E,)
    bias: mx.array  # (E,)


@dataclass(frozen=True)
class ConvMerger:
    """GLM-4.1V's: a convolution over the patches of a token, then a normed and gated layer."""

    norm: ops.Norm
    downsample: ops.Linear  # (out, merge_unit * E): the kernel's rows, columns, channels
    projection: ops.Linear  # (out, out)
    projection_norm: LayerNorm
    gate: ops.Linear  # (inner, out)
    up: ops.Linear
    down: ops.Linear  # (out, inner)

    def __call__(self, x: mx.array, merge_unit: int) -> mx.array:
        """Features (N / merge_unit, out) of the patches (N, E)."""
        x = ops.rms_norm(x, self.norm)
        x = ops.linear(x.reshape(-1, merge_unit * x.shape[-1]), self.downsample)
        x = _gelu(_layer_norm(ops.linear(x, self.projection), self.projection_norm))
        return ops.linear(
            ops.glu(ops.linear(x, self.gate), ops.linear(x, self.up), "silu"), self.down
        )


@dataclass(frozen=True)
class PlainMerger:
    """Qwen2.5-VL's: two layers over the normed patches of a token."""

    norm: ops.Norm
    up: ops.Linear  # (merge_unit * E, merge_unit * E)
    down: ops.Linear  # (out, merge_unit * E)

    def __call__(self, x: mx.array, merge_unit: int) -> mx.array:
        """Features (N / merge_unit, out) of the patches (N, E)."""
        x = ops.rms_norm(x, self.norm).reshape(-1, merge_unit * x.shape[-1])
        return ops.linear(_gelu(ops.linear(x, self.up)), self.down)


@dataclass(frozen=True)
class VisionTower:
    """A loaded tower. Immutable, so that threads may share it."""

    config: VisionConfig
    processor: ProcessorConfig  # how an image becomes the patches that this tower was trained on
    patch_embedding: ops.Linear  # (E, values of a patch)
    patch_norm: ops.Norm | None
    positions: mx.array | None  # (grid * grid, E): learned, of the trained image
    blocks: tuple[VisionBlock, ...]
    merger: ConvMerger | PlainMerger

    def __call__(self, patches: Sequence[Patches]) -> list[mx.array]:
        """The features (num_tokens, out_size) of each image, in the order of its tokens: row after row.

        Each is that of the image alone, whatever stands beside it.
        """
        return [self._see(image.values, image.grid) for image in patches]

    def _see(self, values: NDArray[np.float32], grid: Grid) -> mx.array:
        config = self.config
        x = ops.linear(mx.array(values).astype(self._dtype), self.patch_embedding)
        if self.patch_norm is not None:
            x = ops.rms_norm(x, self.patch_norm)
        if self.positions is not None:
            x = x + self._resize_positions(grid).astype(x.dtype)
        order, windows = find_windows(grid, config.merge_size, config.window_cells)
        if order is not None:
            x = x.reshape(-1, config.merge_unit, x.shape[-1])[mx.array(order)]
            x = x.reshape(-1, x.shape[-1])
        rope, meta = self._turns(grid, order)
        frames = (grid[1] * grid[2],) * grid[0]
        for index, block in enumerate(self.blocks):
            is_full = config.window_cells is None or index in config.full_blocks
            x = self._run_block(x, block, rope, meta, frames if is_full else windows)
        step = LARGE // config.merge_unit * config.merge_unit
        parts = (x[i : i + step] for i in range(0, len(values), step))
        y = _join((self.merger(part, config.merge_unit) for part in parts), 0, len(values) >= LARGE)
        return y if order is None else y[mx.array(np.argsort(order))]

    @property
    def _dtype(self) -> mx.Dtype:
        return self.blocks[0].norm.weight.dtype

    def _run_block(
        self,
        x: mx.array,
        block: VisionBlock,
        rope: ops.Rope,
        meta: ops.StepMeta,
        runs: Sequence[int],
    ) -> mx.array:
        """One block over the patches (N, E); each of the `runs` of patches sees itself alone.

        Of a large image a few heads, then a few rows are computed at a time: what they leave behind is small.
        """
        size, heads = x.shape[0], self.config.num_heads
        is_large = size >= LARGE
        qkv = ops.linear(ops.rms_norm(x, block.norm), block.qkv)
        qkv = qkv.reshape(size, 3, heads, -1).transpose(1, 2, 0, 3)  # (3, H, N, D)
        step = -(-heads // HEAD_GROUPS) if is_large else heads
        groups = (qkv[:, i : i + step] for i in range(0, heads, step))
        y = _join((self._attend(group, rope, meta, runs) for group in groups), 0, is_large)
        x = x + ops.linear(y.transpose(1, 0, 2).reshape(size, -1), block.output)
        rows = (x[None, i : i + LARGE] for i in range(0, size, LARGE))
        return _join((ops.mlp_block(part, block.mlp) for part in rows), 1, is_large)[0]

    def _attend(
        self, qkv: mx.array, rope: ops.Rope, meta: ops.StepMeta, runs: Sequence[int]
    ) -> mx.array:
        """Attention of some heads (3, H, N, D): (H, N, D)."""
        q, k = (ops.rotate(part[None], rope, meta)[0] for part in (qkv[0], qkv[1]))
        return ops.attention_within(q, k, qkv[2], runs, scale=self.config.head_dim**-0.5)

    def _turns(self, grid: Grid, order: NDArray[np.int64] | None) -> tuple[ops.Rope, ops.StepMeta]:
        """Half the pairs of each head turn by the patch's row, half by its column."""
        config = self.config
        quarter = config.head_dim // 4
        periods = config.rope_theta ** (np.arange(quarter, dtype=np.float32) / quarter)
        rope = ops.Rope(
            mx.array(np.concatenate([periods, periods]), mx.float32),
            config.head_dim,
            sections=(quarter, quarter),
        )
        places = find_places(grid, config.merge_size)
        if order is not None:
            places = places.reshape(2, -1, config.merge_unit)[:, order].reshape(2, -1)
        count = places.shape[1]
        axes = np.concatenate([places, np.zeros_like(places[:1])])[:, None]
        meta = ops.StepMeta.uniform(0, batch_size=1, width=count)
        return rope, replace(meta, axes=mx.array(axes, mx.int32))

    def _resize_positions(self, grid: Grid) -> mx.array:
        """The learned positions (N, E) float32 at the places of this grid, between those of the trained one."""
        assert self.positions is not None
        side = self.config.position_grid
        frames, rows, columns = grid
        assert side is not None
        table = self.positions.astype(mx.float32).reshape(side, -1)
        by_row = (mx.array(weigh_cubic(rows, side)) @ table).reshape(rows, side, -1)
        resized = mx.array(weigh_cubic(columns, side)) @ by_row  # (rows, columns, E)
        y, x = find_places((1, rows, columns), self.config.merge_size)
        placed = resized.reshape(rows * columns, -1)[mx.array(y * columns + x)]
        return mx.tile(placed, (frames, 1))


def _join(parts: Iterable[mx.array], axis: int, is_large: bool) -> mx.array:
    """The parts as one; of a large image each is computed before the next one is begun, to hold no more than that."""
    done = []
    for part in parts:
        if is_large:
            mx.eval(part)
        done.append(part)
    return done[0] if len(done) == 1 else mx.concatenate(done, axis)


def find_places(grid: Grid, merge_size: int) -> NDArray[np.int64]:
    """Row and column (2, N) of every patch: those of a token stand together."""
    frames, rows, columns = grid
    places = np.indices((rows, columns)).reshape(
        2, rows // merge_size, merge_size, columns // merge_size, merge_size
    )
    flat = places.transpose(0, 1, 3, 2, 4).reshape(2, -1)
    return np.tile(flat, (1, frames))


def find_windows(
    grid: Grid, merge_size: int, window_cells: int | None
) -> tuple[NDArray[np.int64] | None, tuple[int, ...]]:
    """The tokens in the order of their windows, and how many patches each window has; no order without windows."""
    if window_cells is None:
        return None, ()
    frames, rows, columns = grid[0], grid[1] // merge_size, grid[2] // merge_size
    cells = np.arange(frames * rows * columns).reshape(frames, rows, columns)
    windows = [
        cells[frame, y : y + window_cells, x : x + window_cells].reshape(-1)
        for frame in range(frames)
        for y in range(0, rows, window_cells)
        for x in range(0, columns, window_cells)
    ]
    return np.concatenate(windows), tuple(w.size * merge_size**2 for w in windows)


@lru_cache(maxsize=64)
def weigh_cubic(count: int, side: int) -> NDArray[np.float32]:
    """How `count` places along an axis are mixed from `side` trained ones: (count, side).

    As torch's grid_sample has it: bicubic, align_corners=False, places beyond the border are the border's. Its
    float32 steps are followed one by one.
    """
    f = np.float32
    place = ((np.arange(count, dtype=f) + f(0.5)) / f(count)) * f(2) - f(1)
    place = ((place + f(1)) * f(side) - f(1)) / f(2)
    first = np.floor(place)
    t = (place - first).astype(f)
    taps = (_far(t + f(1)), _near(t), _near(f(1) - t), _far(f(2) - t))
    weights = np.zeros((count, side), f)
    for offset, tap in enumerate(taps, start=-1):
        column = np.clip(first + offset, 0, side - 1).astype(np.int64)
        np.add.at(weights, (np.arange(count), column), tap)
    weights.setflags(write=False)
    return weights


def _near(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Keys' cubic within one place of it."""
    a = np.float32(CUBIC)
    return ((a + 2) * x - (a + 3)) * x * x + 1


def _far(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Keys' cubic between one place and two."""
    a = np.float32(CUBIC)
    return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a


def _layer_norm(x: mx.array, norm: LayerNorm) -> mx.array:
    wide = x.astype(mx.float32)
    wide = wide - wide.mean(axis=-1, keepdims=True)
    scale = mx.rsqrt((wide * wide).mean(axis=-1, keepdims=True) + LAYER_NORM_EPS)
    return (wide * scale * norm.weight + norm.bias).astype(x.dtype)


def _gelu(x: mx.array) -> mx.array:
    """The exact one, by the error function."""
    return x * 0.5 * (1 + mx.erf(x * 0.5**0.5))
