"""Bit for bit: a row of attention depends on its position and on what is stored, and on nothing else."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from tests.metal.attention_scene import Planes, Scene, attend
from tests.metal.devices import bits


def of_row(scene: Scene, heads: mx.array, sequence: int, row: int) -> np.ndarray:
    """The bits of one row's heads."""
    return bits(heads).reshape(scene.batch, scene.width, -1)[sequence, row]


def shift(scene: Scene, by: int) -> mx.array:
    """The raw heads of the single new row `by` of the scene's."""
    return scene.new_rows()[:, by]


STEPS = {
    "4 rows": Scene((75,), (4,), 4, heads=2, rope_dims=64),
    "over a chunk, 3 a group": Scene((62,), (4,), 4, heads=3, norms=(True, True), window=40),
    "over a part": Scene((254,), (4,), 4, tail_starts=(224,), has_sinks=True),
    "16 rows, 8 a group": Scene((40,), (16,), 16, heads=8, dtype=mx.bfloat16),
    "packed": Scene((250,), (9,), 9, tail_starts=(224,), bits=4, rope_dims=64),
    "128 half": Scene((40,), (3,), 3, dim=128, dtype=mx.float16),
    "keep": Scene((300,), (3,), 3, window=9, ring=64, keep=4, bits=8),
}


@pytest.mark.parametrize("scene", STEPS.values(), ids=STEPS)
def test_rows_of_a_step_are_single_steps(scene: Scene) -> None:
    together = attend(scene)
    stored = scene.lay_out()
    for row in sorted({0, 1, scene.width // 2, scene.width - 1}):
        # The tail that the steps before have left: that of the long step, forgotten from this row on.
        at = scene.starts[0] + row
        held = at - scene.tail_starts[0]
        tail = together.tail if row else stored.tail
        one = replace(scene, starts=(at,), lengths=(1,), width=1, tail_starts=scene.tail_starts)
        alone = attend(one, replace(stored, tail=_forget(tail, held)), shift(scene, row))
        np.testing.assert_array_equal(
            of_row(one, alone.heads, 0, 0), of_row(scene, together.heads, 0, row)
        )
        for plane, whole in zip(alone.tail, together.tail, strict=True):
            np.testing.assert_array_equal(
                bits(plane)[:, :, :, : held + 1], bits(whole)[:, :, :, : held + 1]
            )


def _forget(planes: Planes, slots: int) -> Planes:
    """The planes with poison from a slot on."""
    poisoned = []
    for plane in planes:
        unsigned = bits(plane).copy()
        unsigned[:, :, :, slots:] = np.iinfo(unsigned.dtype).max
        poisoned.append(mx.array(unsigned).view(plane.dtype))
    return tuple(poisoned)


LAYOUTS = {
    "tail of one chunk or two": (
        Scene((75,), (2,), 2, tail_starts=(64,)),
        Scene((75,), (2,), 2, tail_starts=(32,)),
    ),
    "tail over two parts": (
        Scene((260,), (2,), 2, tail_starts=(256,), bits=4),
        Scene((260,), (2,), 2, tail_starts=(224,), bits=4),
    ),
    "ring or not": (
        Scene((300,), (2,), 2, window=50, ring=96),
        Scene((300,), (2,), 2, window=50),
    ),
    "larger ring": (
        Scene((300,), (2,), 2, window=50, ring=96, bits=8),
        Scene((300,), (2,), 2, window=50, ring=160, bits=8),
    ),
    "one part or several": (
        Scene((260,), (2,), 2, window=3, has_sinks=True, tail_starts=(256,)),
        Scene((260,), (2,), 2, window=3, has_sinks=True, tail_starts=(224,)),
    ),
    "padding": (Scene((40,), (2,), 2), Scene((40,), (2,), 5)),
    "prefix that is not needed": (
        Scene((300,), (2,), 2, window=20),
        Scene((300,), (2,), 2, window=20, keep=3, keep_window=200, ring=64),
    ),
}


@pytest.mark.parametrize(("one", "other"), LAYOUTS.values(), ids=LAYOUTS)
def test_layout_does_not_show(one: Scene, other: Scene) -> None:
    results = [
        bits(attend(scene, qkv=_pad(scene)).heads)[: max(one.lengths)] for scene in (one, other)
    ]
    np.testing.assert_array_equal(*results)


def _pad(scene: Scene) -> mx.array:
    return scene.new_rows()[0, : scene.width]


BATCHES = {
    "longer and shorter": Scene((40, 300, 3), (2, 1, 2), 2, kv_heads=2, heads=4, rope_dims=64),
    "packed": Scene((290, 33), (1, 2), 2, bits=8, has_sinks=True),
}


@pytest.mark.parametrize("scene", BATCHES.values(), ids=BATCHES)
def test_a_sequence_of_a_batch_is_the_sequence_alone(scene: Scene) -> None:
    together = attend(scene)
    stored = scene.lay_out()
    for b in range(scene.batch):
        alone = replace(
            scene,
            starts=scene.starts[b : b + 1],
            lengths=scene.lengths[b : b + 1],
            tail_starts=scene.tail_starts[b : b + 1],
        )
        parts = {
            part: tuple(plane[:, b : b + 1] for plane in getattr(stored, part))
            for part in ("body", "tail", "prefix")
        }
        columns = slice(b * scene.width, (b + 1) * scene.width)
        single = attend(alone, replace(stored, **parts), scene.qkv()[columns])
        np.testing.assert_array_equal(bits(single.heads), bits(together.heads)[columns])
        for plane, whole in zip(single.tail, together.tail, strict=True):
            slots = alone.ends[0] - alone.tail_starts[0]
            np.testing.assert_array_equal(
                bits(plane)[:, 0, :, :slots], bits(whole)[:, b, :, :slots]
            )
