"""Token rows to calibrate with, in whatever form they come, as batches of arrays. Knows no tokenizer."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import mlx.core as mx

from mlx_edge.errors import InvalidRequestError

TokenRows = mx.array | Sequence[int] | Sequence[Sequence[int]]
BLOCK_TOKENS = 2048  # in a batch


def read_blocks(data: TokenRows | Iterable[TokenRows]) -> Iterator[mx.array]:
    """Batches (R, L) int32 of what may be one array, rows, or an iterable of either."""
    if hasattr(data, "__array__"):  # ours, or another library's
        yield from _cut(_to_array(data))
        return
    try:
        items: list[Any] = list(data)
    except TypeError:
        raise InvalidRequestError(
            f"the calibration data are {data!r}, expected rows of token ids"
        ) from None
    if items and all(isinstance(item, int) for item in items):
        items = [items]
    for item in items:
        yield from _cut(_to_array(item))


def _to_array(item: Any) -> mx.array:
    try:
        return mx.array(item)
    except (TypeError, ValueError) as error:
        raise InvalidRequestError(
            f"the calibration data hold a {type(item).__name__}, expected rows of token ids: {error}"
        ) from None


def _cut(tokens: mx.array) -> Iterator[mx.array]:
    if tokens.size == 0:
        return
    if not mx.issubdtype(tokens.dtype, mx.integer) or tokens.ndim not in (1, 2):
        raise InvalidRequestError(
            f"the calibration data hold {tokens.dtype} {list(tokens.shape)}, expected rows of token ids"
        )
    rows = tokens.reshape(-1, tokens.shape[-1]).astype(mx.int32)
    step = max(1, BLOCK_TOKENS // rows.shape[1])
    for start in range(0, rows.shape[0], step):
        yield rows[start : start + step]
