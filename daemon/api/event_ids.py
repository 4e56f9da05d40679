"""The ids of a kept stream's events: how far the stream is after the event, so that a reader can go on there.

An id has a part for each choice, joined by dots: ``n`` before its first event, the number of output tokens that are
sent, or ``e`` after its last event. ``u`` alone: the event with the usage is sent too. The words are those of
`response_facts`; an id is their printable form. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from daemon.api import sse
from daemon.api.answer import AnswerWriter
from daemon.api.request_metrics import REASONS
from daemon.api.response_facts import USAGE_SENT, choice_position, choice_word
from daemon.ipc.messages import Finish

_MAX_DIGITS = 9
_NOT_BEGUN, _ENDED, _USAGE = "n", "e", "u"


class BadEventId(Exception):
    """No event of the stream has this id. The message says why."""


class Journaled(NamedTuple):
    """What the journal has of one choice: output tokens, and its finish; NONE: none, or an error."""

    tokens: int
    finish: Finish


def event_id(state: Sequence[int]) -> str:
    """Return the id of an event that brings the answer to `state`."""
    if state[0] & USAGE_SENT:
        return _USAGE
    return ".".join([_part(word) for word in state[1:]])


def _part(word: int) -> str:
    found = choice_position(word)
    if found.finish:
        return _ENDED
    return str(found.position) if found.begun else _NOT_BEGUN


def state_after(id: str, choices: Sequence[Journaled], *, usage: bool) -> list[int]:
    """Return the state that the answer has after the event with this id; an empty one: before the first event.

    `choices`: all that the answer has. `usage`: the stream has an event for it. Raises BadEventId.
    """
    if not id:
        return [0] * (1 + len(choices))
    if id == _USAGE and usage:
        return [USAGE_SENT, *(_word(_ENDED, choice) for choice in choices)]
    parts = id.split(".")
    if len(parts) != len(choices):
        raise BadEventId(f"it has {len(parts)} parts, the stream has {len(choices)} choices")
    return [0, *(_word(part, choice) for part, choice in zip(parts, choices, strict=True))]


def _word(part: str, choice: Journaled) -> int:
    if part == _NOT_BEGUN:
        return 0
    if part == _ENDED:
        if choice.finish not in (Finish.STOP, Finish.LENGTH):
            raise BadEventId("it names the end of a choice that has not ended")
        return choice_word(choice.tokens, choice.finish)
    if not (part.isascii() and part.isdigit() and len(part) <= _MAX_DIGITS):
        raise BadEventId("it is not the id of an event")
    if int(part) > choice.tokens:
        raise BadEventId(f"it names output token {int(part)} of a choice that has {choice.tokens}")
    return choice_word(int(part), Finish.NONE)


class NumberedWriter(AnswerWriter):
    """Writes each event with its id.

    What a chunk of tokens becomes is one event, and so is what comes before a choice's first output: between two
    events that one chunk becomes, no number of tokens would tell where a reader is.
    """

    def _append(self, event: bytes, out: list[bytes]) -> None:
        out.append(b"id: %b\n%b" % (event_id(self.state).encode(), event))

    def begin(self, index: int, out: list[bytes]) -> None:
        if self.state[1 + index]:
            return
        self.state[1 + index] = choice_word(0, Finish.NONE)
        writer, usage, echo = self._writers[index], self._usage(), self._answer.echo(index)
        if self._answer.chat:
            self._append(writer.role(usage, echo), out)
        elif echo:
            self._append(writer.text(echo, None, usage), out)

    def write(self, index: int, text: str, out: list[bytes]) -> None:
        choice, writer = self._answer.choices[index], self._writers[index]
        logprobs = choice.logprobs.take() if choice.logprobs else None
        self.state[1 + index] = choice_word(choice.position, choice.finish)
        if choice.finish:
            self._append(writer.last(text, logprobs, REASONS[choice.finish], self._usage()), out)
        elif text or logprobs:
            self._append(writer.text(text, logprobs, self._usage()), out)

    def end(self, out: list[bytes]) -> None:
        if self._include_usage and not self.state[0] & USAGE_SENT:
            self.state[0] |= USAGE_SENT
            self._append(sse.usage_chunk(sse.chunk_head(**self._identity), self._answer.usage()), out)
        out.append(sse.DONE)
