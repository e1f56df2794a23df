"""Codes in words, against bits set one by one, and what a format costs."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_edge.quant import MODES, Packing, pack_codes, unpack_codes


def words_bit_by_bit(codes: np.ndarray, bits: int) -> np.ndarray:
    words = np.zeros((codes.shape[0], codes.shape[1] * bits // 32), np.uint64)
    for row, column in np.ndindex(*codes.shape):
        for bit in range(bits):
            if int(codes[row, column]) >> bit & 1:
                place = column * bits + bit
                words[row, place // 32] |= np.uint64(1 << place % 32)
    return words.astype(np.uint32)


@pytest.mark.parametrize("rows", [0, 1, 3])
@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_come_back(bits: int, rows: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 1 << bits, (rows, 96), dtype=np.uint8)
    words = pack_codes(mx.array(codes), bits)
    assert words.dtype == mx.uint32 and words.shape == (rows, 3 * bits)
    assert np.array_equal(np.array(words), words_bit_by_bit(codes, bits))
    assert np.array_equal(np.array(unpack_codes(words, bits)), codes)


@given(bits=st.integers(1, 8), eighths=st.integers(1, 5), seed=st.integers(0, 999))
@settings(max_examples=40, deadline=None)
def test_any_words_come_back(bits: int, eighths: int, seed: int) -> None:
    words = np.random.default_rng(seed).integers(0, 1 << 32, (2, bits * eighths), dtype=np.uint32)
    codes = unpack_codes(mx.array(words), bits)
    assert codes.shape == (2, 32 * eighths)
    assert np.array(codes).max() < 1 << bits
    assert np.array_equal(np.array(pack_codes(codes, bits)), words)


@pytest.mark.parametrize("dtype", [mx.float32, mx.int32, mx.uint8], ids=str)
def test_codes_may_be_of_any_dtype(dtype: mx.Dtype) -> None:
    codes = mx.arange(64).reshape(2, 32).astype(dtype)
    assert np.array_equal(np.array(unpack_codes(pack_codes(codes, 6), 6)), np.array(codes))


@pytest.mark.parametrize(
    ("packing", "scale_bits", "wanted"),
    [
        (Packing(64, 4), 16, 4.5),
        (Packing(64, 4), 32, 5.0),
        (Packing(32, 8), 16, 9.0),
        (Packing(128, 3), 16, 3.25),
        (Packing(32, 4, "mxfp4"), 16, 4.25),
        (Packing(32, 8, "mxfp8"), 32, 8.25),
        (Packing(16, 4, "nvfp4"), 16, 4.5),
    ],
    ids=str,
)
def test_bits_per_weight_are_those_of_the_arrays(
    packing: Packing, scale_bits: int, wanted: float
) -> None:
    assert packing.bits_per_weight(scale_bits) == wanted
    weight = mx.random.normal((4, 256)).astype(mx.float16 if scale_bits == 16 else mx.float32)
    arrays = mx.quantize(
        weight, group_size=packing.group_size, bits=packing.bits, mode=packing.mode
    )
    assert 8 * sum(array.nbytes for array in arrays) / weight.size == wanted


def test_what_cannot_be_packed_is_told() -> None:
    packing = Packing(64, 4)
    assert packing.refusal((3, 128)) is None
    assert packing.refusal((3, 96)) == "its 96 columns do not divide into groups of 64"
    assert packing.refusal((128,)) == "it has 1 dimensions, a packed weight has 2"
    refusal = Packing(16, 4, "nvfp4").refusal((3, 48))
    assert refusal == "its 48 columns are not a multiple of 32, which MLX's nvfp4 reads"
    assert str(packing) == "4 bit, groups of 64"
    assert str(Packing(32, 4, "mxfp4")) == "mxfp4, groups of 32"
    assert packing.num_codes == 16


def test_the_first_of_each_mode_is_mlxs_default() -> None:
    for mode, (bits, groups) in MODES.items():
        weight = mx.random.normal((2, 128))
        theirs, ours = (
            mx.quantize(weight, mode=mode, **options)
            for options in ({}, {"bits": bits[0], "group_size": groups[0]})
        )
        assert [a.tolist() for a in theirs] == [a.tolist() for a in ours]
