"""The ids of a kept stream's events: how far the stream is after the event, so that a reader can go on there.

An id has a part for each choice, joined by dots: ``n`` before its first event, the number of output tokens that are
sent, or ``e`` after its last event. ``u`` alone: the events after the last choice are sent too. Then, in an API that
numbers its events, ``@`` and how many are sent. The words are those of `response_facts`; an id is their printable
form.

One step of a stream (what comes before a choice's output, what one chunk of tokens becomes, or what comes after the
last choice) may be several events. The id of the last of them is the state after the step. That of an earlier one is
the state before it, then ``~``, the choice, its part after the step and the number of events that are sent of it:
between the events of one chunk, no number of tokens would tell where a reader is. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from daemon.api.response_facts import EVENTS, USAGE_SENT, choice_position, choice_word
from daemon.ipc.messages import Finish

_MAX_DIGITS = 9
_NOT_BEGUN, _ENDED, _USAGE = "n", "e", "u"
_NO_ID = "it is not the id of an event"
END = -1  # instead of a choice: what comes after the last one


class BadEventId(Exception):
    """No event of the stream has this id. The message says why."""


class Journaled(NamedTuple):
    """What the journal has of one choice: output tokens, and its finish; NONE: none, or an error."""

    tokens: int
    finish: Finish


class Step(NamedTuple):
    """A step of which `sent` events are sent. `choice`: index, or END. `word`: of the choice, after the step."""

    choice: int
    word: int
    sent: int


class Point(NamedTuple):
    """Where a reader is: the answer has come to `state`, and a reader has some events of the `step` that follows."""

    state: list[int]
    step: Step | None = None


def event_id(state: Sequence[int]) -> str:
    """Return the id of an event that brings the answer to `state`."""
    count = state[0] >> EVENTS
    parts = _USAGE if state[0] & USAGE_SENT else ".".join([_part(word) for word in state[1:]])
    return f"{parts}@{count}" if count else parts


def step_id(before: Sequence[int], step: Step) -> str:
    """Return the id of an event of a step that is not its last one. `before`: the state before the step."""
    what = _USAGE if step.choice == END else f"{step.choice}.{_part(step.word)}"
    return f"{event_id(before)}~{what}.{step.sent}"


def _part(word: int) -> str:
    found = choice_position(word)
    if found.finish:
        return _ENDED
    return str(found.position) if found.begun else _NOT_BEGUN


def point_after(id: str, choices: Sequence[Journaled], *, usage: bool) -> Point:
    """Return where a reader is after the event with this id; an empty one: before the first event.

    `choices`: all that the answer has. `usage`: the stream has events after its last choice. Raises BadEventId.
    """
    before, _, step = id.partition("~")
    state = state_after(before, choices, usage=usage)
    if not step:
        return Point(state)
    *what, sent = step.split(".")
    if what == [_USAGE] and usage:
        return Point(state, Step(END, 0, _number(sent)))
    if len(what) != 2 or (index := _number(what[0])) >= len(choices):
        raise BadEventId(_NO_ID)
    return Point(state, Step(index, _word(what[1], choices[index]), _number(sent)))


def state_after(id: str, choices: Sequence[Journaled], *, usage: bool) -> list[int]:
    """Return the state of the answer after the last event of a step. The arguments are those of `point_after`."""
    parts, _, count = id.partition("@")
    sent = (_number(count) if count else 0) << EVENTS
    if not parts:
        return [0] * (1 + len(choices))
    if parts == _USAGE and usage:
        return [USAGE_SENT | sent, *(_word(_ENDED, choice) for choice in choices)]
    words = parts.split(".")
    if len(words) != len(choices):
        raise BadEventId(f"it has {len(words)} parts, the stream has {len(choices)} choices")
    return [sent, *(_word(part, choice) for part, choice in zip(words, choices, strict=True))]


def _word(part: str, choice: Journaled) -> int:
    if part == _NOT_BEGUN:
        return 0
    if part == _ENDED:
        if choice.finish not in (Finish.STOP, Finish.LENGTH):
            raise BadEventId("it names the end of a choice that has not ended")
        return choice_word(choice.tokens, choice.finish)
    if (position := _number(part)) > choice.tokens:
        raise BadEventId(f"it names output token {position} of a choice that has {choice.tokens}")
    return choice_word(position, Finish.NONE)


def _number(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= _MAX_DIGITS):
        raise BadEventId(_NO_ID)
    return int(text)
