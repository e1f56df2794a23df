"""The prefix cache: the longest beginning is found, what is not found is explained, and going on from it is exact."""

from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_edge import ops
from mlx_edge.cache import QuantizedRows
from mlx_edge.engine.prefix.cache import PrefixCache
from mlx_edge.engine.prefix.index import (
    MIN_TOKENS,
    LostPrefixes,
    PrefixIndex,
    count_common,
    pack_tokens,
)
from mlx_edge.errors import InvalidRequestError
from mlx_edge.models.decoder import Decoder
from mlx_edge.models.load import load

BYTES_PER_TOKEN = 100
Tokens = list[int]


class FakeCache:
    """Remembers the tokens themselves; goes back by `reach` of them when it has a window."""

    def __init__(self, tokens: Tokens, window: int | None = None, reach: int = 8) -> None:
        self.tokens, self.window, self.reach = list(tokens), window, reach
        self.nbytes = self.stored_bytes = (BYTES_PER_TOKEN - 4) * len(tokens)

    def fork(self, length: int | None = None) -> "FakeCache":
        length = len(self.tokens) if length is None else length
        if self.window is not None and length < len(self.tokens) - self.reach:
            raise InvalidRequestError(
                f"a cache with a window of {self.window} cannot go back to position {length}: "
                "it moved; process the text anew"
            )
        if length > len(self.tokens):
            raise InvalidRequestError(f"a fork of {length} positions; {len(self.tokens)} stored")
        return FakeCache(self.tokens[:length], self.window, self.reach)


def text(*parts: tuple[int, int]) -> Tokens:
    """Runs (token, count), one after another."""
    return [token for token, count in parts for _ in range(count)]


def put(
    cache: PrefixCache[Any], tokens: Tokens, kind: str = "k", window: int | None = None
) -> None:
    cache.store(tokens, [FakeCache(tokens, window)] * 2, kind)


# The index.


@given(
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), max_size=12),
    st.lists(st.integers(0, 2), max_size=12),
)
def test_matches_are_those_of_a_comparison_with_every_text(
    stored: list[Tokens], tokens: Tokens
) -> None:
    index: PrefixIndex[Tokens] = PrefixIndex()
    for one in stored:
        index.add(pack_tokens(one), one)
    for one in stored[::3]:
        if index.get(pack_tokens(one)) is not None:
            index.remove(pack_tokens(one))
            stored = [other for other in stored if other != one]

    def common(one: Tokens) -> int:
        pairs = zip(one, tokens, strict=False)
        return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(tokens)))

    found = list(index.matches(pack_tokens(tokens)))
    assert [count for count, _ in found] == sorted({common(one) for one in stored}, reverse=True)
    for count, alike in found:
        all_alike, told = (
            {tuple(x) for x in stored if common(x) == count},
            {tuple(x) for x in alike},
        )
        assert told == all_alike or (count == 0 and told and told <= all_alike)
        assert [len(one) for one in alike] == sorted(len(one) for one in alike)
    begun_with = {tuple(one) for one in index.prefixes_of(pack_tokens(tokens))}
    assert begun_with == {tuple(one) for one in stored if tokens[: len(one)] == one}


@pytest.mark.parametrize("differs_at", [0, 1, 1023, 1024, 5000, 99_999])
def test_long_texts_are_compared_to_the_token(differs_at: int) -> None:
    first = np.arange(100_000) % 50_000
    second = first.copy()
    second[differs_at] += 70_000
    packed = pack_tokens(first.tolist()), pack_tokens(second.tolist())
    assert count_common(*packed) == differs_at
    assert count_common(packed[0], packed[0]) == 100_000
    assert count_common(packed[0], packed[0][: 4 * differs_at]) == differs_at


def test_only_so_many_lost_prefixes_are_remembered() -> None:
    lost = LostPrefixes(max_blocks=3)
    old, new = pack_tokens([1] * 2 * MIN_TOKENS), pack_tokens([2] * 2 * MIN_TOKENS)
    lost.remember(old, "k", "old")
    lost.remember(new, "k", "new")
    assert lost.find(new, "k", 0) == (2 * MIN_TOKENS, "new")
    assert lost.find(new, "other", 0) is None
    assert lost.find(new, "k", 2 * MIN_TOKENS) is None
    assert lost.find(old, "k", 0) == (2 * MIN_TOKENS, "old")
    lost.remember(pack_tokens([3] * 2 * MIN_TOKENS), "k", "newer")
    assert lost.find(old, "k", 0) is None


# What is found, and why not more.

SYSTEM = text((1, 60))
REASONS: dict[str, tuple[Callable[[PrefixCache[Any]], None], Tokens, int, str | None]] = {
    "empty": (lambda cache: None, SYSTEM, 0, "the prefix cache is empty"),
    "all but the last token": (lambda cache: put(cache, SYSTEM), SYSTEM, 59, None),
    "all of a longer entry but one": (
        lambda cache: put(cache, SYSTEM + [2] * 40),
        [*SYSTEM, 2],
        60,
        None,
    ),
    "a prompt of one token": (lambda cache: put(cache, SYSTEM), [1], 0, None),
    "a short prompt": (
        lambda cache: put(cache, SYSTEM),
        [1] * 20,
        0,
        f"the prompt has 20 tokens, prefixes below {MIN_TOKENS} are not stored",
    ),
    "another text": (
        lambda cache: put(cache, SYSTEM),
        text((3, 80)),
        0,
        "no entry begins like this",
    ),
    "too little in common": (
        lambda cache: put(cache, SYSTEM),
        text((1, 5), (3, 80)),
        0,
        "the nearest entry differs after 5 tokens",
    ),
    "differs": (
        lambda cache: put(cache, [*SYSTEM, 2, 2]),
        [*SYSTEM, 3, 3],
        60,
        "the nearest entry differs after 60 tokens",
    ),
    "ends": (
        lambda cache: put(cache, SYSTEM),
        [*SYSTEM, 3, 3],
        60,
        "the nearest entry ends after 60 tokens",
    ),
    "window": (
        lambda cache: put(cache, SYSTEM + [2] * 40, window=30),
        [*SYSTEM, 3, 3],
        0,
        "60 tokens are stored, but a cache with a window of 30 cannot go back to position 60: it moved",
    ),
    "window, and a shorter entry serves": (
        lambda cache: [put(cache, SYSTEM[:50], window=30), put(cache, [1] * 99, window=30)],
        [*SYSTEM, 3, 3],
        50,
        "60 tokens are stored, but a cache with a window of 30 cannot go back to position 60: it moved",
    ),
    "window, not moved on so far": (
        lambda cache: put(cache, [*SYSTEM, 2, 2], window=30),
        [*SYSTEM, 3],
        60,
        None,
    ),
    "other options": (
        lambda cache: put(cache, SYSTEM, kind="8 bit"),
        SYSTEM,
        0,
        "59 tokens are stored, but with other cache options or for another model",
    ),
    "more with other options": (
        lambda cache: [put(cache, SYSTEM[:40]), put(cache, SYSTEM, kind="8 bit")],
        SYSTEM,
        40,
        "59 tokens are stored, but with other cache options or for another model",
    ),
    "evicted": (
        lambda cache: [put(cache, SYSTEM), cache.evict(1)],
        [*SYSTEM, 2],
        0,
        f"{MIN_TOKENS} tokens or more were computed before, but were evicted",
    ),
    "more was evicted": (
        lambda cache: [put(cache, SYSTEM + [2] * 40), cache.evict(1), put(cache, SYSTEM)],
        SYSTEM + [2] * 50,
        60,
        "96 tokens or more were computed before, but were evicted",
    ),
    "too large": (
        lambda cache: put(cache, SYSTEM * 20),
        SYSTEM * 20,
        0,
        "1184 tokens or more were computed before, but take 235200 bytes, the prefix cache has 100000",
    ),
    "cannot be forked": (
        lambda cache: cache.store(SYSTEM, [FakeCache(SYSTEM[:9])], "k"),
        SYSTEM,
        0,
        "32 tokens or more were computed before, but not kept: a fork of 60 positions",
    ),
}


@pytest.mark.parametrize("name", REASONS)
def test_what_is_found_and_why_it_is_not_more(name: str) -> None:
    prepare, tokens, num_tokens, miss = REASONS[name]
    cache: PrefixCache[FakeCache] = PrefixCache(100_000)
    prepare(cache)
    found = cache.lookup(tokens, "k")
    assert (found.num_tokens, found.miss) == (num_tokens, miss)
    if num_tokens:
        assert found.caches is not None
        assert [one.tokens for one in found.caches] == [tokens[:num_tokens]] * 2
    else:
        assert found.caches is None
    stats = cache.stats
    assert (stats.hits, stats.misses, stats.hit_tokens) == (
        num_tokens > 0,
        not num_tokens,
        num_tokens,
    )


def test_a_cache_of_no_bytes_says_that_it_is_off() -> None:
    cache: PrefixCache[FakeCache] = PrefixCache(0)
    put(cache, SYSTEM)
    assert cache.lookup(SYSTEM, "k").miss == "the prefix cache is switched off (0 bytes)"


# What is kept.


@pytest.mark.parametrize(
    ("stored", "wanted", "found", "said"),
    [
        (text((1, 40), (-7, 20), (2, 20)), text((1, 40), (-8, 20)), 40, "where image 1 begins"),
        (text((1, 40), (-7, 20), (2, 20)), text((1, 40), (-7, 20), (3, 9)), 60, "after 60 tokens"),
        (
            text((1, 40), (-7, 12)),
            text((1, 40), (-7, 20), (2, 9)),
            40,
            "after 52 tokens, within image 1",
        ),
        (text((1, 30), (-7, 20)), text((1, 30), (-7, 8), (-9, 12), (2, 9)), 0, "within image 1"),
    ],
)
def test_an_image_is_found_whole_or_not_at_all(
    stored: Tokens, wanted: Tokens, found: int, said: str
) -> None:
    cache: PrefixCache[FakeCache] = PrefixCache(1 << 20)
    put(cache, stored)
    begin = next(i for i, token in enumerate(wanted) if token < 0)
    result = cache.lookup(wanted, "k", [range(begin, begin + 20)])
    assert result.num_tokens == found
    assert result.miss is not None
    assert said in result.miss


def test_a_prompt_that_ends_in_its_image_is_found_up_to_there() -> None:
    cache: PrefixCache[FakeCache] = PrefixCache(1 << 20)
    tokens = text((1, 40), (-7, 20))
    put(cache, tokens)
    result = cache.lookup(tokens, "k", [range(40, 60)])
    assert (result.num_tokens, result.miss) == (
        40,
        "the prompt ends in an image, which is read whole",
    )


def kept(cache: PrefixCache[FakeCache], *texts: Tokens) -> list[bool]:
    """Which texts are held whole; looks without using, so by a shorter kind of question."""
    return [any(entry.tokens == pack_tokens(one) for entry in cache._entries) for one in texts]


def test_the_least_recently_used_gives_way() -> None:
    texts = [text((token, 100)) for token in range(4)]
    cache: PrefixCache[FakeCache] = PrefixCache(3 * 2 * 10_000)
    for one in texts[:3]:
        put(cache, one)
    cache.lookup([*texts[0], 9], "k")
    put(cache, texts[1])  # the same tokens again: a use
    put(cache, texts[3])
    assert kept(cache, *texts) == [True, True, False, True]
    assert cache.stats.evictions == 1
    assert cache.nbytes <= cache.limit_bytes


def test_evict_frees_what_is_asked_for_if_there_is_so_much() -> None:
    cache: PrefixCache[FakeCache] = PrefixCache(1 << 20)
    for token in range(4):
        put(cache, text((token, 100)))
    each = cache.nbytes // 4
    assert cache.evict(0) == 0
    assert cache.evict(each + 1) == 2 * each
    assert kept(cache, *(text((token, 100)) for token in range(4))) == [False, False, True, True]
    assert cache.evict(1 << 30) == 2 * each
    assert (cache.nbytes, cache.stats.entries) == (0, 0)


def test_a_prefix_is_dropped_only_where_nothing_is_lost() -> None:
    short, long = text((1, 50)), text((1, 90))
    cache: PrefixCache[FakeCache] = PrefixCache(1 << 20)
    put(cache, short)
    put(cache, long)
    put(cache, short)  # held by the longer one
    assert kept(cache, short, long) == [False, True]
    put(cache, short, "windowed", window=20)
    put(cache, long, "windowed", window=20)
    assert cache.stats.entries == 3
    assert cache.lookup([*short, 2], "windowed").num_tokens == 50
    put(cache, text((1, 55)), "windowed", window=20)  # goes back to 50, but not as far as that can
    assert cache.lookup([*text((1, 44)), 2], "windowed").num_tokens == 44
    assert cache.stats.evictions == 0


def test_an_entry_beyond_the_limit_takes_nothing_away() -> None:
    cache: PrefixCache[FakeCache] = PrefixCache(2 * 10_000)
    put(cache, text((1, 60)))
    put(cache, text((1, 200)))
    assert kept(cache, text((1, 60))) == [True]
    assert cache.stats.too_large == 1


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_whatever_is_done_the_limit_holds_and_what_is_found_is_right(data: st.DataObject) -> None:
    cache: PrefixCache[FakeCache] = PrefixCache(40_000)
    runs = st.lists(st.tuples(st.integers(1, 2), st.integers(1, 60)), min_size=1, max_size=4)
    for _ in range(data.draw(st.integers(1, 25))):
        tokens = text(*data.draw(runs))
        kind, window = data.draw(st.sampled_from([("full", None), ("windowed", 20)]))
        action = data.draw(st.sampled_from(["store", "store", "lookup", "evict"]))
        if action == "store":
            put(cache, tokens, kind, window)
        elif action == "evict":
            before = cache.nbytes
            asked = data.draw(st.integers(0, 30_000))
            assert min(asked, before) <= cache.evict(asked) == before - cache.nbytes
        else:
            held = {e.tokens for e in cache._entries if e.kind == kind}
            longest = max((count_common(one, pack_tokens(tokens)) for one in held), default=0)
            found = cache.lookup(tokens, kind)
            assert found.num_tokens <= len(tokens) - 1
            assert (found.miss is None) == (found.num_tokens == len(tokens) - 1)
            if found.caches:
                assert all(one.tokens == tokens[: found.num_tokens] for one in found.caches)
            if kind == "full" and min(longest, len(tokens) - 1) >= MIN_TOKENS:
                assert found.num_tokens == min(longest, len(tokens) - 1)
        assert cache.nbytes == sum(entry.nbytes for entry in cache._entries) <= 40_000


# With real caches.

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"max_kv_size": 100},
    "8 bit": {"row_format": QuantizedRows(8, 32)},
    "4 bit": {"row_format": QuantizedRows(4, 32)},
    "4 bit window": {"row_format": QuantizedRows(4, 32), "max_kv_size": 100},
    "8 bit later": {"row_format": QuantizedRows(8, 32), "float_until": 64},
}


@pytest.fixture(scope="module", params=["fast", "reference"])
def model(request: pytest.FixtureRequest) -> Iterator[Decoder]:
    if request.param == "fast":
        yield load()[0]
        return
    with ops.reference():
        yield load()[0]


def process(model: Decoder, tokens: Tokens, caches: list[Any]) -> mx.array:
    """The logits (V,) behind the last token; chunks end at multiples of 64, wherever they begin."""
    begin = caches[0].offset
    while begin < len(tokens):
        end = min(len(tokens), begin // 64 * 64 + 64)
        logits = model(mx.array([tokens[begin:end]]), caches, logits_to_keep=1)[0, -1]
        mx.eval(logits, [array for cache in caches for array in cache.arrays])
        begin = end
    return logits


def generate(model: Decoder, tokens: Tokens, caches: list[Any], count: int = 4) -> list[np.ndarray]:
    """The logits of each greedy token; `tokens` grows by them."""
    found = []
    for _ in range(count):
        found.append(np.array(process(model, tokens, caches).astype(mx.float32)))
        tokens.append(int(found[-1].argmax()))
    return found


def prompt_of(length: int, seed: int = 0) -> Tokens:
    return np.random.default_rng(seed).integers(1, 2000, length).tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_going_on_from_what_is_found_is_going_on_from_scratch(model: Decoder, kind: str) -> None:
    cache: PrefixCache[Any] = PrefixCache(1 << 28)
    prompt = prompt_of(150)
    caches = model.make_cache(**KINDS[kind])
    process(model, prompt, caches)
    cache.store(prompt, caches, kind)
    tokens = [*prompt, 7]
    generate(model, tokens, caches)  # the entry must not see this
    cache.store(tokens[:-1], caches, kind)
    for follow, expected in (
        (prompt, 149),
        ([*prompt, *prompt_of(70, 1)], 150),
        ([*tokens, *prompt_of(40, 2)], 154),
    ):
        found = cache.lookup(follow, kind)
        assert found.num_tokens == expected, found.miss
        assert found.caches is not None
        mine, scratch = list(follow), list(follow)
        logits = generate(model, mine, found.caches)
        wanted = generate(model, scratch, model.make_cache(**KINDS[kind]))
        assert mine == scratch
        if ops.uses_cpu_kernels():
            assert all(map(np.array_equal, logits, wanted))
    again = cache.lookup([*prompt, *prompt_of(70, 1)], kind)  # nobody wrote into the entry
    assert again.num_tokens == 150
    assert again.caches is not None
    tokens, scratch = ([*prompt, *prompt_of(70, 1)] for _ in range(2))
    generate(model, tokens, again.caches)
    generate(model, scratch, model.make_cache(**KINDS[kind]))
    assert tokens == scratch


def test_a_window_that_moved_on_is_a_miss_that_says_so(model: Decoder) -> None:
    cache: PrefixCache[Any] = PrefixCache(1 << 28)
    prompt = prompt_of(400)
    caches = model.make_cache(max_kv_size=100)
    process(model, prompt, caches)
    cache.store(prompt, caches, "k")
    found = cache.lookup([*prompt[:120], 5, 6], "k")
    assert found.caches is None
    assert "120 tokens are stored, but" in str(found.miss)
    assert "window of 96 cannot go back to position 120" in str(found.miss)


def test_packed_rows_do_not_go_back_to_floats(model: Decoder) -> None:
    cache: PrefixCache[Any] = PrefixCache(1 << 28)
    prompt = prompt_of(150)
    caches = model.make_cache(**KINDS["8 bit later"])
    process(model, prompt[:50], caches)
    cache.store(prompt[:50], caches, "k")
    process(model, prompt, caches)
    cache.store(prompt, caches, "k")
    assert cache.stats.entries == 2
    found = cache.lookup([*prompt[:55], 3], "k")
    assert found.num_tokens == 50
    assert "is packed from position 64 on and cannot go back to 55" in str(found.miss)
