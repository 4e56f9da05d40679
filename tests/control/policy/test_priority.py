"""Parsing of priorities."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.control.policy.priority import PRIORITIES, parse_priority


@given(st.integers(-100, 100))
def test_a_number_is_its_own_priority(priority: int):
    assert parse_priority(str(priority)) == priority


def test_words_are_ordered():
    assert [parse_priority(word) for word in PRIORITIES] == [-1, 0, 1]


WRONG = ["", "urgent", "High", "101", "-101", "1000", "1.0", "+1", "--1", " 1", "1 ", "٣", "1\n"]


@pytest.mark.parametrize("text", WRONG)
def test_any_other_text_is_an_error_that_lists_what_is_allowed(text: str):
    with pytest.raises(ValueError, match="high, normal, low or a whole number from -100 to 100") as e:
        parse_priority(text)
    assert not text.strip() or text not in str(e.value).split()
