"""The items in the `output` of a response of OpenAI's Responses API, as they grow: messages, reasoning and calls.

The events of an item are dicts without the number that the renderer gives them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

from msgspec import Raw

from daemon.api.parse.parts import CallArguments, CallBegin, Part, Reasoning, Text

Event = dict[str, Any]

IN_PROGRESS, COMPLETED, INCOMPLETE = "in_progress", "completed", "incomplete"


class InNamespace(NamedTuple):
    """The name that a client gives a function, and the namespace that it is in."""

    namespace: str
    name: str


class OutputItem(ABC):
    """An item that is being written. `index`: in `output`."""

    prefix: ClassVar[str]  # of its id

    def __init__(self, digits: str, index: int) -> None:
        """`digits`: of the id of the answer, from which that of the item follows."""
        self._id = f"{self.prefix}_{digits}{index:02x}"
        self._index = index
        self._pieces: list[str] = []

    @abstractmethod
    def continues(self, part: Part) -> bool:
        """Return True if `part` belongs to this item."""

    def append(self, text: str) -> None:
        self._pieces.append(text)

    @property
    def text(self) -> str:
        if len(self._pieces) > 1:
            self._pieces = ["".join(self._pieces)]
        return self._pieces[0] if self._pieces else ""

    @abstractmethod
    def body(self, status: str) -> dict[str, Any]:
        """Return the item as it is in `output`."""

    def added(self) -> list[Event]:
        """Return the events before its first text."""
        return [{"type": "response.output_item.added", "output_index": self._index, "item": self.body(IN_PROGRESS)}]

    @abstractmethod
    def delta(self, text: str) -> Event:
        """Return the event of a piece of its text."""

    def done(self, status: str) -> list[Event]:
        """Return the events after its last text."""
        return [{"type": "response.output_item.done", "output_index": self._index, "item": self.body(status)}]

    def _event(self, kind: str, **members: Any) -> Event:
        return {"type": f"response.{kind}", "item_id": self._id, "output_index": self._index} | members


class _ContentItem(OutputItem):
    """An item whose text is the only part of its content."""

    kind: ClassVar[str]  # of its part, and of the events of its text

    @abstractmethod
    def part(self) -> dict[str, Any]:
        """Return the part of its content."""

    def added(self) -> list[Event]:
        added = self._event("content_part.added", content_index=0, part=self.part())
        return [*super().added(), added]

    def delta(self, text: str) -> Event:
        return self._event(f"{self.kind}.delta", content_index=0, delta=text)

    def done(self, status: str) -> list[Event]:
        text = self._event(f"{self.kind}.done", content_index=0, text=self.text)
        part = self._event("content_part.done", content_index=0, part=self.part())
        return [text, part, *super().done(status)]


class MessageItem(_ContentItem):
    """A message of the assistant."""

    prefix = "msg"
    kind = "output_text"

    def __init__(self, digits: str, index: int) -> None:
        super().__init__(digits, index)
        self._logprobs: list[Raw] = []

    def continues(self, part: Part) -> bool:
        return isinstance(part, Text)

    def add_logprobs(self, logprobs: Sequence[Raw]) -> None:
        self._logprobs += logprobs

    def part(self) -> dict[str, Any]:
        # A copy: an event is encoded after the next one has been made.
        return {"type": self.kind, "text": self.text, "annotations": [], "logprobs": [*self._logprobs]}

    def body(self, status: str) -> dict[str, Any]:
        content = [] if status == IN_PROGRESS else [self.part()]
        return {"id": self._id, "type": "message", "role": "assistant", "status": status, "content": content}

    def delta(self, text: str) -> Event:
        return super().delta(text) | {"logprobs": []}

    def done(self, status: str) -> list[Event]:
        text, *rest = super().done(status)
        return [text | {"logprobs": [*self._logprobs]}, *rest]


class ReasoningItem(_ContentItem):
    """What the model thinks, as it is: it is neither summarised nor encrypted."""

    prefix = "rs"
    kind = "reasoning_text"

    def continues(self, part: Part) -> bool:
        return isinstance(part, Reasoning)

    def part(self) -> dict[str, Any]:
        return {"type": self.kind, "text": self.text}

    def body(self, status: str) -> dict[str, Any]:
        content = [] if status == IN_PROGRESS else [self.part()]
        return {"id": self._id, "type": "reasoning", "status": status, "summary": [], "content": content}


class CallItem(OutputItem):
    """A call of a function. `names`: of one in a namespace."""

    prefix = "fc"

    def __init__(self, digits: str, index: int, call: CallBegin, names: InNamespace | None) -> None:
        super().__init__(digits, index)
        self._call_id = call.id
        self._name = names.name if names else call.name
        self._namespace = {"namespace": names.namespace} if names else {}

    def continues(self, part: Part) -> bool:
        return isinstance(part, CallArguments)

    def body(self, status: str) -> dict[str, Any]:
        call = {"call_id": self._call_id, "name": self._name, "arguments": self.text}
        return {"id": self._id, "type": "function_call", "status": status} | self._namespace | call

    def delta(self, text: str) -> Event:
        return self._event("function_call_arguments.delta", delta=text)

    def done(self, status: str) -> list[Event]:
        done = self._event("function_call_arguments.done", name=self._name, arguments=self.text)
        return [done, *super().done(status)]


def new_item(part: Part, digits: str, index: int, names: InNamespace | None = None) -> OutputItem:
    """Return the item that begins with `part`. `names`: if it calls a function in a namespace."""
    match part:
        case Text():
            return MessageItem(digits, index)
        case Reasoning():
            return ReasoningItem(digits, index)
        case CallBegin():
            return CallItem(digits, index, part, names)
        case CallArguments():
            raise ValueError("the arguments of a call that has not begun")
