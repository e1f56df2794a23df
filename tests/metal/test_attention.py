"""The attention kernels in the emulator, against float64 from positions, and bit for bit against themselves."""

import mlx.core as mx
import pytest

from tests.metal.attention_scene import Scene, attend, check_heads, check_tail

BF16, HALF = mx.bfloat16, mx.float16

# What positions, caches and batches can do, on small heads.
POSITIONS = {
    "first token": Scene((0,)),
    "end of a chunk": Scene((31,), rope_dims=64),
    "begin of a chunk": Scene((32,), (2,), 2),
    "tail of two chunks": Scene((40,), (8,), 8, tail_starts=(0,)),
    "48 in the tail": Scene((32,), (16,), 16, tail_starts=(0,)),
    "ragged batch": Scene((5, 40, 70), (3, 1, 0), 3, kv_heads=2, heads=4, rope_dims=64),
    "parts": Scene((600,), (2,), 2, heads=4, rope_dims=32),
    "ragged parts": Scene((3, 300, 560), (2, 1, 2), 2, kv_heads=2, has_sinks=True),
    "tail over two parts": Scene((250,), (10,), 10, tail_starts=(224,), rope_dims=64),
    "tail before the window's part": Scene((260,), (2,), 2, tail_starts=(224,), window=3, ring=64),
    "window in a chunk": Scene((75,), (3,), 3, window=5, ring=64),
    "window over chunks": Scene((100,), (4,), 4, window=50, ring=96),
    "far window": Scene((5001,), (2,), 2, window=40, ring=96, rope_dims=64, seed=3),
    "window without a ring": Scene((330,), (2,), 2, window=40),
    "keep": Scene((400,), (2,), 2, window=20, ring=64, keep=4),
    "keep and its window": Scene((300,), (3,), 3, window=20, ring=64, keep=40, keep_window=280),
    "keep of several chunks": Scene((290,), (1,), window=10, ring=64, keep=75),
    "keep near the window": Scene((50,), (2,), 2, window=16, ring=64, keep=3),
    "keep that is seen": Scene((20,), (2,), 2, window=300, ring=320, keep=9, tail_starts=(0,)),
    "keep still in the tail": Scene((2,), (3,), 3, window=4, ring=64, keep=4),
    "nothing at all": Scene((0, 64), (0, 0), 1),
}


@pytest.mark.parametrize("scene", POSITIONS.values(), ids=POSITIONS)
def test_positions(scene: Scene) -> None:
    outcome = attend(scene)
    check_heads(scene, outcome)
    check_tail(scene, outcome)


# What a layer can be.
LAYERS = {
    "64 float, 1 head a group": Scene((37,), (3,), 3, heads=2, kv_heads=2, rope_dims=64),
    "64 bfloat, 8 heads a group": Scene((37,), (1,), heads=8, dtype=BF16, rope_dims=64),
    "64 float, 3 heads a group": Scene((37,), (2,), 2, heads=6, kv_heads=2, norms=(True, True)),
    "64 float, 128 rows": Scene((20,), (16,), 16, heads=8, dtype=HALF, rope_dims=64),
    "80 half": Scene((70,), (3,), 3, window=20, ring=32, dim=80, dtype=HALF, rope_dims=80),
    "80 float": Scene((40,), (4,), 4, dim=80, heads=2, norms=(True, True)),
    "96 bfloat": Scene((70,), (3,), 3, dim=96, dtype=BF16, rope_dims=96, is_interleaved=True),
    "96 float": Scene((33,), (2,), 2, dim=96, rope_dims=32, norms=(True, True)),
    "128 half": Scene((70,), (2,), 2, dim=128, dtype=HALF, rope_dims=128, norms=(True, True)),
    "128 float": Scene((290,), (2,), 2, dim=128, rope_dims=64, is_interleaved=True),
    "192 bfloat": Scene((40,), (3,), 3, dim=192, dtype=BF16, rope_dims=64),
    "192 float": Scene((290,), (4,), 4, dim=192, rope_dims=192, heads=2),
    "256 half": Scene((40,), (5,), 5, dim=256, dtype=HALF, rope_dims=256),
    "256 float": Scene((270,), (1,), dim=256, norms=(True, True), rope_dims=128),
    "norm of queries": Scene((9,), norms=(True, False)),
    "norm of keys": Scene((9,), norms=(False, True), rope_dims=64, is_interleaved=True),
    "magnitude": Scene((90,), (2,), 2, rope_dims=48, magnitude=1.3, norms=(True, True)),
    "a pair that stands still": Scene((90,), rope_dims=64, has_still_pair=True),
    "shifts": Scene((90, 3), (2, 1), 2, rope_dims=48, shifts=(-70, 11), is_interleaved=True),
    "sinks": Scene((33,), (2,), 2, heads=4, kv_heads=2, has_sinks=True),
    "sinks and padding": Scene((33, 2), (2, 1), 2, heads=10, kv_heads=2, has_sinks=True),
}


@pytest.mark.parametrize("scene", LAYERS.values(), ids=LAYERS)
def test_layers(scene: Scene) -> None:
    outcome = attend(scene)
    check_heads(scene, outcome)
    check_tail(scene, outcome)


PACKED = {
    "4 bit, 64 by 32": Scene((70,), (3,), 3, bits=4, heads=4, kv_heads=2, rope_dims=64),
    "4 bit, 64 by 64": Scene((3, 290), (2, 1), 2, bits=4, group_size=64, dtype=HALF),
    "8 bit, 64 by 32": Scene((40,), (8,), 8, bits=8, tail_starts=(0,), dtype=BF16),
    "8 bit, 64 by 64": Scene((75,), (3,), 3, bits=8, group_size=64, window=5, ring=64),
    "4 bit, 96 by 32": Scene((40,), (2,), 2, dim=96, bits=4, dtype=HALF, rope_dims=96),
    "8 bit, 96 by 32": Scene((40,), (2,), 2, dim=96, bits=8),
    "4 bit, 128 by 32": Scene((40,), (2,), 2, dim=128, bits=4, norms=(True, True)),
    "4 bit, 128 by 64": Scene((40,), (2,), 2, dim=128, bits=4, group_size=64, dtype=BF16),
    "4 bit, 128 by 128": Scene((300,), (2,), 2, dim=128, bits=4, group_size=128, heads=8),
    "8 bit, 128 by 64": Scene((40,), (1,), dim=128, bits=8, group_size=64, rope_dims=128),
    "8 bit, 128 by 128": Scene((40,), (2,), 2, dim=128, bits=8, group_size=128, dtype=HALF),
    "8 bit, 192 by 64": Scene((40,), (2,), 2, dim=192, bits=8, group_size=64, rope_dims=64),
    "4 bit, 192 by 32": Scene((40,), (2,), 2, dim=192, bits=4),
    "8 bit, 256 by 128": Scene((40,), (3,), 3, dim=256, bits=8, group_size=128, dtype=BF16),
    "4 bit, 256 by 64": Scene((40,), (3,), 3, dim=256, bits=4, group_size=64),
    "4 bit, odd values": Scene((40,), (3,), 3, bits=4, has_odd_values=True),
    "8 bit, odd values": Scene((40,), (3,), 3, bits=8, has_odd_values=True, dtype=HALF),
    "keep": Scene((400,), (2,), 2, window=20, ring=64, keep=4, bits=4, has_sinks=True),
    "tail over two parts": Scene((250,), (10,), 10, tail_starts=(224,), bits=8),
}


@pytest.mark.parametrize("scene", PACKED.values(), ids=PACKED)
def test_packed(scene: Scene) -> None:
    outcome = attend(scene)
    check_heads(scene, outcome)
    check_tail(scene, outcome)
