"""Forks of a cache of arrays: both go on as if the other were not there; a body is copied once, when it is written."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_edge.cache import KVCache, QuantizedRows
from mlx_edge.errors import InvalidRequestError
from mlx_edge.models.bridge import BridgedCache
from tests.cache.test_layer import TRIMMED, Attending, address, run_alike

WIDTHS = ((1,), (40,), (1,), (3,), (33,), (1,))


@pytest.mark.parametrize("kind", TRIMMED)
@pytest.mark.parametrize("cuts", [(50, 20), (70, 9), (20, 31), (64, 32)], ids=str)
def test_a_fork_and_its_source_go_on_by_themselves(kind: str, cuts: tuple[int, int]) -> None:
    first, more = cuts
    source, longer, shorter = (KVCache(**TRIMMED[kind]) for _ in range(3))
    run_alike([source, longer, shorter], (first,))
    run_alike([source, longer], (more,))
    forks = [source.fork()]
    pairs = [(source, longer)]
    try:
        forks.append(source.fork(first))
        pairs.append((forks[1], shorter))
    except InvalidRequestError:
        assert kind not in ("full", "8 bit")  # a ring has moved on, or rows are packed by now
    assert [fork.offset for fork in forks] == [first + more, first][: len(forks)]
    for index, width in enumerate(WIDTHS):
        for cache, alone in pairs[:: 1 if index % 2 else -1]:
            found, wanted = run_alike([cache, alone], width)
            assert np.array_equal(found, wanted)
    assert forks[0].offset == first + more  # whatever the source did meanwhile


def test_a_chunk_is_merged_once_for_both() -> None:
    source = KVCache()
    run_alike([source], (100,))
    fork = source.fork()
    assert source.nbytes == fork.nbytes
    assert [address(a) for a in source.arrays] == [address(a) for a in fork.arrays]


def test_a_body_is_copied_once_and_then_never() -> None:
    model = Attending(1, 4096)
    fork = model.caches[0].fork()
    shared = address(fork.arrays[0])
    assert [address(a) for a in model.bodies()] == [shared]
    model.decode(40)  # a merge
    mx.synchronize()
    own = [address(a) for a in model.bodies()]
    assert own != [shared]
    model.decode(70)
    mx.synchronize()
    assert [address(a) for a in model.bodies()] == own
    assert address(fork.arrays[0]) == shared


@pytest.mark.parametrize(
    ("kind", "length", "message"),
    [
        ({}, 301, "first 301 positions; 300 are stored"),
        ({"window": 40}, 50, "cannot go back to position 50"),
        ({"row_format": QuantizedRows(8, 32), "float_until": 60}, 50, "packed from position 60 on"),
    ],
)
def test_a_fork_of_what_is_gone_is_refused(kind: dict[str, Any], length: int, message: str) -> None:
    cache = KVCache(**kind)
    for width in ((200,), (99,), (1,)):
        run_alike([cache], width)
    with pytest.raises(InvalidRequestError, match=message):
        cache.fork(length)
    assert cache.offset == 300
    assert KVCache(**kind).fork().offset == KVCache(**kind).fork(0).offset == 0
    assert cache.fork(290).offset == 290


def test_a_cache_of_mlx_lm_cannot_be_forked() -> None:
    with pytest.raises(InvalidRequestError, match="dict cannot be forked"):
        BridgedCache({}).fork()
