"""Separates what a model thinks, between ``<think>`` and ``</think>``, from its answer. Pure.

Only the beginning of an answer can be reasoning. White space around the reasoning belongs neither to it nor to the
answer.
"""

from __future__ import annotations

from daemon.api.parse.markers import find_marker
from daemon.api.parse.parts import Part, PartParser, Reasoning, Text

BEGIN, END = "<think>", "</think>"
_SPACE = " \t\n\r"


def is_open(text: str) -> bool:
    """Return True if `text`, the beginning of an answer, ends inside of its reasoning."""
    return text.rfind(BEGIN) > text.rfind(END)


class ThinkParser:
    """`rest` finds the parts of the answer; None: it is text."""

    def __init__(self, *, thinking: bool, show: bool = True, rest: PartParser | None = None) -> None:
        """`thinking`: the prompt has begun the reasoning. If not `show`, the reasoning is left out."""
        self._thinking = thinking
        self._show = show
        self._rest = rest
        self._decided = False  # it is known whether the answer begins with a marker
        self._held = ""
        self._space: list[str] = []  # white space that may be the last one of the reasoning, or before the answer
        self._said = False  # the reasoning, or the answer after it, has begun
        self.reasoned = thinking
        self.watching = True

    def push(self, text: str) -> list[Part]:
        parts: list[Part] = []
        text, self._held = self._held + text, ""
        at = 0
        if not self._decided:
            at = self._decide(text, parts)
        if self._decided and self._thinking:
            at = self._think(text, at, parts)
        if self._decided and not self._thinking:
            self._answer(text[at:], parts)
        else:
            self._held = text[at:]
        return parts

    def finish(self) -> list[Part]:
        parts: list[Part] = []
        held, self._held = self._held, ""
        if self._thinking:
            self._say(held, parts)
        else:
            self._answer("".join(self._space) + held, parts)
        return parts + self._rest.finish() if self._rest is not None else parts

    def _decide(self, text: str, parts: list[Part]) -> int:
        """Look for the marker at the beginning, after white space. Return the position after what is certain."""
        begin = len(text) - len(text.lstrip(_SPACE))
        self._space.append(text[:begin])
        rest = text[begin : begin + len(BEGIN)]
        if BEGIN.startswith(rest) and rest != BEGIN:
            return begin
        self._decided = True
        space, self._space = "".join(self._space), []
        if rest == BEGIN:
            self._thinking = self.reasoned = True
            return begin + len(BEGIN)
        self.watching = self._thinking
        if not self._thinking:
            self._answer(space, parts)
        return begin

    def _think(self, text: str, at: int, parts: list[Part]) -> int:
        end, marker = find_marker(text, at, (END,))
        self._say(text[at:end], parts)
        if not marker:
            return end
        self._thinking = self.watching = self._said = False
        self._space = []
        return end + len(END)

    def _say(self, text: str, parts: list[Part]) -> None:
        said = text.rstrip(_SPACE)
        if not self._said:
            said = said.lstrip(_SPACE)
            text = text.lstrip(_SPACE)
        if said:
            if self._show:
                parts.append(Reasoning("".join(self._space) + said))
            self._space, self._said = [], True
        if self._said and len(said) < len(text):
            self._space.append(text[len(said) :])

    def _answer(self, text: str, parts: list[Part]) -> None:
        if self.reasoned and not self._said:
            text = text.lstrip(_SPACE)
            self._said = bool(text)
        if text:
            parts += self._rest.push(text) if self._rest is not None else [Text(text)]
