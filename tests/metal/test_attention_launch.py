"""Launches of the attention kernels: where a step stands, what is refused, what is read."""

import mlx.core as mx
import pytest

from metal_emulator import Device
from mlx_edge.ops import Rope
from mlx_edge.ops import metal_attention as kernels
from mlx_edge.ops import metal_launch as launch
from tests.metal.attention_scene import Scene

GEOMETRY = {"num_heads": 8, "num_kv_heads": 2, "head_dim": 64, "width": 1}


@pytest.mark.parametrize(
    ("starts", "lengths", "tails", "limits", "first", "parts"),
    [
        ((0,), (1,), (0,), {}, 0, 1),
        ((255,), (1,), (224,), {}, 0, 1),
        ((255,), (2,), (224,), {}, 0, 2),
        ((256,), (1,), (224,), {}, 0, 2),
        ((700, 3), (1, 1), (672, 0), {}, 0, 3),
        ((700,), (1,), (672,), {"window": 100}, 2, 1),
        ((700,), (1,), (672,), {"window": 189}, 2, 1),
        ((700,), (1,), (672,), {"window": 190}, 1, 2),
        ((515,), (1,), (480,), {"window": 2}, 1, 2),  # the tail's part, though no query sees it
        ((700,), (1,), (672,), {"window": 100, "keep": 4}, 2, 2),
        ((50,), (1,), (32,), {"window": 10, "keep": 4}, 1, 1),
        ((300,), (1,), (288,), {"window": 100, "keep": 4}, 1, 2),
        ((0,), (0,), (0,), {}, 0, 1),
    ],
)
def test_grid(starts, lengths, tails, limits, first, parts) -> None:  # type: ignore[no-untyped-def]
    positions = kernels.place(starts, lengths, tails, width=2, **limits)
    assert (positions.first_part, positions.num_parts) == (first, parts)


def test_meta_has_the_columns_of_the_contract() -> None:
    positions = kernels.place(
        (70, 3), (2, 1), (64, 0), width=2, ring=96, window=50, keep=4, keep_window=60
    )
    assert positions.meta.dtype == mx.int32
    assert positions.meta.tolist() == [
        [70, 2, 64, 96, 50, 4, 60, 0],
        [3, 1, 0, 96, 50, 4, 60, 0],
    ]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dtype": mx.int32}, "float16, bfloat16 and float32"),
        ({"head_dim": 72}, "head_dim 72; the nearest served is 64"),
        ({"head_dim": 512}, "256"),
        ({"num_heads": 7}, "7 heads over 2"),
        ({"width": 17}, "at most 16"),
        ({"rope": Rope(mx.ones(7), 14)}, "from 16 to 64"),
        ({"rope": Rope(mx.ones(33), 66)}, "from 16 to 64"),
        ({"keep": 257}, "at most 256"),
        ({"bits": 6, "group_size": 64}, "6 bits; the nearest served is 4"),
        ({"bits": 2, "group_size": 64}, "the nearest served is 4"),
        ({"bits": 8, "group_size": 128}, "groups of 128 in heads of 64; the nearest served is 64"),
        ({"bits": 4, "group_size": 16}, "the nearest served is 32"),
        ({"bits": 4, "group_size": 32, "head_dim": 80}, "packed heads of 80"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refusal_names_the_nearest_case(change: dict[str, object], words: str) -> None:
    geometry = {"dtype": mx.float16, **GEOMETRY, **change}
    assert words in (kernels.refuse(**geometry) or "served")  # type: ignore[arg-type]


@pytest.mark.parametrize("dim", kernels.HEAD_DIMS)
def test_what_is_served_is_not_refused(dim: int) -> None:
    geometry = GEOMETRY | {"head_dim": dim, "width": 16}
    rope = Rope(mx.ones(8), 16)
    assert kernels.refuse(mx.bfloat16, **geometry, rope=rope, keep=256) is None
    groups = [size for size in kernels.GROUP_SIZES if dim % size == 0]
    for bits in kernels.BITS:
        for size in groups:
            packed = kernels.refuse(mx.float32, **geometry, bits=bits, group_size=size)
            assert packed is None


LINE = 128
COUNTED = {
    "4 a group": Scene((640,), heads=4, dim=128, dtype=mx.float16),
    "8 a group": Scene((640,), heads=8, dim=64, dtype=mx.bfloat16),
    "8 a group, 4 rows": Scene((640,), (4,), 4, heads=8, dim=64, dtype=mx.float16),
    "4 bit": Scene((640,), heads=8, dim=128, dtype=mx.float16, bits=4, group_size=64),
    "ring": Scene((640,), heads=4, window=100, ring=160, dtype=mx.float16),
}


@pytest.mark.parametrize("scene", COUNTED.values(), ids=COUNTED)
def test_keys_and_values_are_read_once(scene: Scene) -> None:
    stored, positions = scene.lay_out(), scene.positions
    device = Device(mode="count")
    with launch.on(device):
        mx.eval(kernels.attend(scene.qkv(), stored, positions, **scene.layer)[0])
    counts = device.launches[0].counts
    assert counts is not None
    read = sum(
        buffer.reads.group_lines
        for name, buffer in counts.buffers.items()
        if name.startswith(("body", "tail"))
    )
    seen = scene.starts[0] - max(0, scene.starts[0] - scene.window + 1 if scene.window else 0)
    slots = sum(p.nbytes // p.shape[3] for p in stored.tail)
    assert 0.9 * seen * slots <= read * LINE <= 1.1 * seen * slots


def test_dispatches() -> None:
    device = Device(mode="fast")
    with launch.on(device):
        for scene in (Scene((40,)), Scene((300,)), Scene((300,), bits=8)):
            kernels.attend(scene.qkv(), scene.lay_out(), scene.positions, **scene.layer)
    assert [launched.name for launched in device.launches] == [
        "attn_decode",
        "attn_decode_parts",
        "attn_combine",
        "attn_decode_q_parts",
        "attn_combine",
    ]
