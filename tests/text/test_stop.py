"""Stop strings against an oracle that looks at the whole text at once."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_edge.errors import InvalidRequestError
from mlx_edge.text import StopMatcher

FEW_LETTERS = st.text("aab", max_size=12)
STOPS = st.lists(st.text("ab", min_size=1, max_size=4), max_size=3)


def cut_at_stop(text: str, stops: list[str]) -> tuple[str, bool]:
    for end in range(len(text) + 1):
        found = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(found)], True
    return text, False


def longest_open_end(text: str, stops: list[str]) -> int:
    return max(
        (n for stop in stops for n in range(len(stop)) if text.endswith(stop[:n])), default=0
    )


@settings(max_examples=400)
@given(segments=st.lists(FEW_LETTERS, min_size=1, max_size=6), stops=STOPS)
def test_every_split_gives_the_same_cut(segments, stops):
    matcher = StopMatcher(stops)
    text, emitted = "", ""
    for segment in segments:
        text += segment
        safe, stopped = matcher.push(segment)
        emitted += safe
        expected, expected_stop = cut_at_stop(text, stops)
        assert stopped == expected_stop
        held = 0 if stopped else longest_open_end(text, stops)
        assert emitted == expected[: len(expected) - held]
    emitted += matcher.flush()
    assert emitted == cut_at_stop(text, stops)[0]
    assert matcher.flush() == ""


def test_nothing_comes_after_a_stop():
    matcher = StopMatcher(["</s>"])
    assert matcher.push("a<") == ("a", False)
    assert matcher.push("/s>b") == ("", True)
    assert matcher.push("more") == ("", True)
    assert matcher.flush() == ""


def test_the_stop_that_is_complete_first_wins():
    assert StopMatcher(["abcd", "bc"]).push("abcd") == ("a", True)
    for stops in (["bc", "abc"], ["abc", "bc"]):  # of two at once, the longest
        assert StopMatcher(stops).push("xabc") == ("x", True)


def test_a_long_repetition_is_not_read_again():
    stop = StopMatcher(["a" * 500 + "b"])
    for _ in range(3000):
        stop.push("a")
    assert stop.push("b") == ("", True)


@pytest.mark.parametrize("stops", [[""], ["a", ""], "abc", [1]])
def test_stops_that_cannot_be_served_are_refused(stops):
    with pytest.raises(InvalidRequestError, match="stop"):
        StopMatcher(stops)
