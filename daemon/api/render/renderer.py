"""What every renderer of an answer does: it turns the parts of its choices into the bytes of one API.

A renderer is a fold. What it writes follows from the answer's form, id and parts alone, so a successor of this
process rebuilds it by `replay`. The one thing that replay cannot tell is how many events have been sent: how the
parts were cut decides that. An API that numbers its events keeps their number in the state.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Protocol

from daemon.api.errors import OPENAI_ERRORS, ApiError, ErrorShape
from daemon.api.parse.parts import Part
from daemon.api.render.answer import Answer
from daemon.api.response_facts import EVENTS, USAGE_SENT, choice_word
from daemon.ipc.messages import Finish


class EventWriter(Protocol):
    """Writes the events of an answer: a `Renderer`, or one whose events get ids."""

    closing: bytes
    state: list[int]

    def begin(self, index: int, out: list[bytes]) -> None: ...

    def write(self, index: int, parts: list[Part], out: list[bytes]) -> None: ...

    def end(self, out: list[bytes]) -> None: ...

    def event(self, error: ApiError) -> bytes: ...


class Renderer(ABC):
    """Writes one answer, as events or as a whole. Each entry that a method appends to `out` is one whole event.

    `closing`: bytes after the last event, which are no event. `state`: what has been written so far, in the words of
    `response_facts`.
    """

    closing: bytes = b""
    errors: ClassVar[ErrorShape] = OPENAI_ERRORS

    def __init__(self, answer: Answer) -> None:
        """`answer` has all of its choices."""
        self.answer = answer
        self.state = [0] * (1 + len(answer.choices))

    def begin(self, index: int, out: list[bytes]) -> None:
        """Append the events that come before the first output of this choice, if they are not written yet.

        Call it before `Answer.push`: these events count none of the output that follows them.
        """
        if not self.state[1 + index]:
            self.state[1 + index] = choice_word(0, Finish.NONE)
            self.write_begin(index, out)

    def write(self, index: int, parts: list[Part], out: list[bytes]) -> None:
        """Append the events for the parts that `Answer.push` has just returned for this choice."""
        self.write_parts(index, parts, out)
        choice = self.answer.choices[index]
        self.state[1 + index] = choice_word(choice.position, choice.finish)

    def end(self, out: list[bytes]) -> None:
        """Append the events after the end of the last choice, if they are not written yet."""
        if not self.state[0] & USAGE_SENT:
            self.state[0] |= USAGE_SENT
            self.write_end(out)

    def replay(self, index: int, parts: list[Part]) -> None:
        """Come to where the writer of these parts was, all parts of a choice so far. The caller sets `state`."""
        ignored: list[bytes] = []
        self.write_begin(index, ignored)
        self.write_parts(index, parts, ignored)

    def next_number(self) -> int:
        """Count one more event, and return how many were written before it."""
        number = self.state[0] >> EVENTS
        self.state[0] += 1 << EVENTS
        return number

    def event(self, error: ApiError) -> bytes:
        """Return the event that ends a stream which has failed."""
        return self.errors.event(error)

    @abstractmethod
    def write_begin(self, index: int, out: list[bytes]) -> None: ...

    @abstractmethod
    def write_parts(self, index: int, parts: list[Part], out: list[bytes]) -> None: ...

    @abstractmethod
    def write_end(self, out: list[bytes]) -> None: ...

    @abstractmethod
    def whole(self, parts: list[list[Part]]) -> dict[str, Any]:
        """Return the body of a response that is not streamed; `parts` by choice."""
