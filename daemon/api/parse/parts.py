"""The parts that the text of a choice is made of. Every renderer writes parts, and knows nothing of their markers.

A stream of parts is a text cut into pieces: adjacent parts of one kind continue each other, wherever they are cut.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import msgspec


class Text(msgspec.Struct, frozen=True, gc=False):
    """A piece of the answer proper."""

    text: str


class Reasoning(msgspec.Struct, frozen=True, gc=False):
    """A piece of what the model thinks before it answers."""

    text: str


class CallBegin(msgspec.Struct, frozen=True, gc=False):
    """The beginning of tool call `index` (0, 1, ... in this choice). The next part that is not of it ends it."""

    index: int
    id: str
    name: str


class CallArguments(msgspec.Struct, frozen=True, gc=False):
    """A piece of the JSON text of the arguments of tool call `index`, which has begun."""

    index: int
    text: str


Part = Text | Reasoning | CallBegin | CallArguments


class Call(msgspec.Struct, frozen=True):
    """A whole tool call. `arguments`: JSON text, as the model has written it."""

    index: int
    id: str
    name: str
    arguments: str


Block = Text | Reasoning | Call


class PartParser(Protocol):
    """A state machine from the text of one choice to its parts.

    Pure, and linear in time. However the text is divided between calls of `push`, the parts are the same but for
    where adjacent ones are cut, and so is the state: a successor pushes all text so far at once, and goes on.
    """

    @property
    def watching(self) -> bool:
        """True while reasoning may still begin, or go on."""
        ...

    @property
    def reasoned(self) -> bool:
        """True once reasoning has begun."""
        ...

    def push(self, text: str) -> list[Part]:
        """Add text. What may become a marker is held back."""
        ...

    def finish(self) -> list[Part]:
        """Return the parts that are held back, because no text follows."""
        ...


def blocks(parts: Iterable[Part]) -> list[Block]:
    """Return the parts with adjacent ones of one kind joined, in their order."""
    found: list[Block] = []
    pieces: list[str] = []  # of the last one
    last: Part | None = None

    def close() -> None:
        match last:
            case Text():
                found.append(Text("".join(pieces)))
            case Reasoning():
                found.append(Reasoning("".join(pieces)))
            case CallBegin(index, id, name):
                found.append(Call(index, id, name, "".join(pieces)))

    for part in parts:
        if isinstance(part, CallArguments):
            pieces.append(part.text)
            continue
        if isinstance(part, CallBegin):
            close()
            last, pieces = part, []
            continue
        if type(part) is not type(last):
            close()
            last, pieces = part, []
        pieces.append(part.text)
    close()
    return found
