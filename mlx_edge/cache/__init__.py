"""KV caches: what a model remembers of the positions that it has seen."""

from mlx_edge.cache.full import KVCache, prepare_step

__all__ = ["KVCache", "prepare_step"]
