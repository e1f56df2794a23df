"""Codes of 1 to 8 bits in uint32 words, as MLX lays them out: one stream of bits a row, the lowest first.

For 3, 5 and 6 bits a code may straddle two words; 8 codes always fill as many bytes as a code has bits.
"""

import mlx.core as mx


def pack_codes(codes: mx.array, bits: int) -> mx.array:
    """Codes (N, E) below 2**bits to words (N, E * bits / 32) uint32; E is a multiple of 8, E * bits of 32."""
    import numpy as np  # slow to import, and a start packs nothing

    num_rows, num_columns = codes.shape
    eights = np.array(codes.astype(mx.uint8)).reshape(num_rows, num_columns // 8, 8)
    stream = np.zeros(eights.shape[:2], np.uint64)
    for place in range(8):
        stream |= eights[:, :, place].astype(np.uint64) << np.uint64(place * bits)
    used = stream.astype("<u8").view(np.uint8).reshape(num_rows, num_columns // 8, 8)[:, :, :bits]
    words = np.ascontiguousarray(used).reshape(-1).view("<u4")
    return mx.array(words.reshape(num_rows, num_columns * bits // 32))


def unpack_codes(words: mx.array, bits: int) -> mx.array:
    """Words (N, E * bits / 32) uint32 to codes (N, E) uint8."""
    import numpy as np

    num_rows, num_words = words.shape
    num_columns = num_words * 32 // bits
    used = np.array(words).astype("<u4").view(np.uint8).reshape(num_rows, num_columns // 8, bits)
    stream = np.zeros((num_rows, num_columns // 8, 8), np.uint8)
    stream[:, :, :bits] = used
    eights = stream.view("<u8")
    shifts = np.arange(8, dtype=np.uint64) * np.uint64(bits)
    codes = (eights >> shifts) & np.uint64((1 << bits) - 1)
    return mx.array(codes.astype(np.uint8).reshape(num_rows, num_columns))
