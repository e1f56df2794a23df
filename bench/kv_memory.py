"""Peak memory of a quantized KV cache beside a 16-bit one, prefill included: `python bench/kv_memory.py`.

The caches of all layers of a Qwen3-0.6B-shaped model (28 layers, 8 kv heads of 128) take 8,192 positions in
chunks of 512, then two single ones. In the last chunk and in the single steps, a layer's queries attend to all of
it: the moment when most memory is held. One layer attends, since layers do so one after another and MLX's CPU
backend needs seconds for each; its working memory is in the peak. Writes bench/results/kv_memory.json.
"""

import json
from pathlib import Path

import mlx.core as mx
from tqdm import tqdm

from mlx_edge import ops
from mlx_edge.cache import FloatRows, KVCache, QuantizedRows, RowFormat, prepare_step

RESULT = Path(__file__).parent / "results" / "kv_memory.json"
LAYERS, HEADS, KV_HEADS, HEAD_DIM = 28, 16, 8, 128
POSITIONS, CHUNK, QUERIES = 8192, 512, 8
SIXTEEN_BIT_BYTES = 2 * 2 * LAYERS * KV_HEADS * POSITIONS * HEAD_DIM


def peak_bytes(row_format: RowFormat, dtype: mx.Dtype) -> int:
    """The most memory held above what was held before."""
    mx.synchronize()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    caches = [KVCache(capacity=POSITIONS + CHUNK, row_format=row_format) for _ in range(LAYERS)]
    rows = mx.random.normal((1, KV_HEADS, CHUNK, HEAD_DIM)).astype(dtype)
    queries = mx.random.normal((1, HEADS, QUERIES, HEAD_DIM)).astype(dtype)
    for width in tqdm([CHUNK] * (POSITIONS // CHUNK) + [1, 1], unit="step"):
        prepare_step(caches)
        start = caches[0].offset
        meta = ops.StepMeta.uniform(start, batch_size=1, width=width)
        for index, cache in enumerate(caches):
            segments = cache.extend(rows[:, :, :width], rows[:, :, :width], meta)
            if index == 0 and start + width >= POSITIONS:
                count = min(width, QUERIES)
                last = ops.StepMeta.uniform(start + width - count, batch_size=1, width=count)
                mx.eval(ops.attention(queries[:, :, :count], segments, last, scale=HEAD_DIM**-0.5))
            mx.eval(cache.arrays)
    return mx.get_peak_memory() - before


def main() -> None:
    """Measure the kinds, print each peak as a share of the 16-bit cache, and write them."""
    kinds: dict[str, tuple[RowFormat, mx.Dtype]] = {
        "16 bit (null)": (FloatRows(), mx.float16),
        "8 bit": (QuantizedRows(8, 64), mx.float16),
        "4 bit": (QuantizedRows(4, 64), mx.float16),
        "4 bit, float32 scales (as on a CPU)": (QuantizedRows(4, 64), mx.float32),
    }
    shares = {name: peak_bytes(*kind) / SIXTEEN_BIT_BYTES for name, kind in kinds.items()}
    for name, share in shares.items():
        print(f"{name}: {share:.3f} of {SIXTEEN_BIT_BYTES / 1e6:.0f} MB")
    rounded = {name: round(share, 4) for name, share in shares.items()}
    result = {"sixteen_bit_bytes": SIXTEEN_BIT_BYTES, "peak_share": rounded}
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
