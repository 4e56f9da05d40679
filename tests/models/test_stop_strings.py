"""Stop strings in a stream, compared with a search of the whole text."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.models.stop_strings import StopStrings

letters = st.text("abc", max_size=24)
stops = st.lists(st.text("abc", min_size=1, max_size=5), max_size=4)


def brute_force(text, stops):
    for end in range(len(text) + 1):
        matched = [s for s in stops if text[:end].endswith(s)]
        if matched:
            return text[: end - max(map(len, matched))], True
    return text, False


def split(text, points):
    edges = [0, *sorted(p % (len(text) + 1) for p in points), len(text)]
    return [text[a:b] for a, b in pairwise(edges)]


@given(letters, stops, st.lists(st.integers(0, 30), max_size=8))
def test_a_text_split_anywhere_ends_before_the_first_stop_string(text, stops, points):
    matcher = StopStrings(stops)
    out, stopped = "", False
    for chunk in split(text, points):
        emit, stopped = matcher.push(chunk)
        out += emit
        if stopped:
            break
    out += matcher.flush()
    assert (out, stopped) == brute_force(text, stops)
    assert (matcher.matched is not None) == stopped
    assert matcher.push("more")[1] == stopped


@given(letters, stops)
def test_only_the_beginning_of_a_stop_string_is_held_back(text, stops):
    matcher = StopStrings(stops)
    out = ""
    for n, char in enumerate(text, 1):
        emit, stopped = matcher.push(char)
        out += emit
        if stopped:
            return
        held = text[len(out) : n]
        assert not held or any(s.startswith(held) for s in stops)


def test_the_first_complete_stop_string_wins_and_the_longest_of_several():
    assert StopStrings(["abcd", "bc"]).push("xabcd") == ("xa", True)
    matcher = StopStrings(["b", "ab"])
    assert matcher.push("xab") == ("x", True)
    assert matcher.matched == "ab"


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="empty"):
        StopStrings(["a", ""])
