"""The ids of a kept stream's events, as text and as the state of an answer."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.api.event_ids import BadEventId, Journaled, event_id, state_after
from daemon.api.response_facts import USAGE_SENT, choice_word
from daemon.ipc.messages import Finish

RUNNING, ENDED = Journaled(17, Finish.NONE), Journaled(17, Finish.LENGTH)
ends = st.sampled_from([Finish.STOP, Finish.LENGTH])


@st.composite
def choice(draw: st.DrawFn) -> tuple[int, Journaled]:
    """Return the word of a choice, and what the journal may have of it."""
    tokens = draw(st.integers(0, 1 << 24))
    finish = draw(st.sampled_from(Finish))
    words = [0, choice_word(draw(st.integers(0, tokens)), Finish.NONE)]
    if finish in (Finish.STOP, Finish.LENGTH):
        words.append(choice_word(tokens, finish))
    return draw(st.sampled_from(words)), Journaled(tokens, finish)


@given(st.lists(choice(), min_size=1, max_size=64))
def test_an_id_tells_the_state_of_each_choice(choices: list[tuple[int, Journaled]]):
    state = [0, *(word for word, _ in choices)]
    id = event_id(state)
    assert state_after(id, [journaled for _, journaled in choices], usage=False) == state
    assert len(id) <= 640  # a header and a URL have room for it
    assert id.isascii() and not set(id) & set(" \r\n&#")


def test_the_id_after_the_usage():
    state = [USAGE_SENT, choice_word(17, Finish.LENGTH), choice_word(17, Finish.LENGTH)]
    assert event_id(state) == "u"
    assert state_after("u", [ENDED, ENDED], usage=True) == state


def test_no_id_is_before_the_first_event():
    assert state_after("", [RUNNING, ENDED], usage=True) == [0, 0, 0]


@pytest.mark.parametrize(
    ("id", "choices", "why"),
    [
        ("18", [RUNNING], "names output token 18 of a choice that has 17"),
        ("9999999999", [RUNNING], "not the id of an event"),
        ("e", [RUNNING], "has not ended"),
        ("e", [Journaled(17, Finish.CANCELLED)], "has not ended"),
        ("u", [ENDED], "not the id of an event"),
        ("3.4", [RUNNING], "has 2 parts, the stream has 1 choices"),
        ("3", [RUNNING, RUNNING], "has 1 parts"),
        ("-1", [RUNNING], "not the id"),
        ("²", [RUNNING], "not the id"),
        (" 1", [RUNNING], "not the id"),
        (".", [RUNNING, RUNNING], "not the id"),
    ],
)
def test_other_ids_are_refused(id: str, choices: list[Journaled], why: str):
    with pytest.raises(BadEventId, match=why):
        state_after(id, choices, usage=False)


@given(st.text(max_size=20))
def test_any_text_is_read_or_refused(id: str):
    with suppress(BadEventId):
        assert len(state_after(id, [RUNNING, ENDED], usage=True)) == 3
