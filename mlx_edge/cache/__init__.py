"""KV caches: what a model remembers of the positions that it has seen."""

from mlx_edge.cache.layer import KVCache, prepare_step
from mlx_edge.cache.paged import MAX_HEAD_DIM, PagedKVCache
from mlx_edge.cache.quantized import QuantizedRows
from mlx_edge.cache.rows import FloatRows, RowFormat
from mlx_edge.cache.saved import CacheFacts, CacheState

AnyKVCache = KVCache | PagedKVCache  # MLX arrays, or pages of the CPU kernels

__all__ = [
    "MAX_HEAD_DIM",
    "AnyKVCache",
    "CacheFacts",
    "CacheState",
    "FloatRows",
    "KVCache",
    "PagedKVCache",
    "QuantizedRows",
    "RowFormat",
    "prepare_step",
]
