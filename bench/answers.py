"""What a client has received, checked strictly and without what differs between two equal requests."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any


class Broken(Exception):
    """The connection ended in the middle of a response, or its bytes are not valid."""


@dataclass
class Answer:
    """A response: its events, or its body. Texts, reasoning, calls, logprobs, ends and roles are by choice."""

    status: int
    body: dict[str, Any] = field(default_factory=dict)
    texts: dict[int, str] = field(default_factory=lambda: defaultdict(str))
    reasoning: dict[int, str] = field(default_factory=lambda: defaultdict(str))
    calls: dict[int, list[list[str]]] = field(default_factory=lambda: defaultdict(list))  # name and arguments
    logprobs: dict[int, list[Any]] = field(default_factory=lambda: defaultdict(list))
    finishes: dict[int, list[str]] = field(default_factory=lambda: defaultdict(list))
    roles: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    usage: list[Any] = field(default_factory=list)
    errors: list[Any] = field(default_factory=list)
    ids: set[str] = field(default_factory=set)
    call_ids: list[str] = field(default_factory=list, compare=False)

    def add(self, event: dict[str, Any]) -> None:
        """Add one event of a stream."""
        if "error" in event:
            self.errors.append(event["error"])
            return
        self.ids.add(f"{event['id']} {event['created']}")
        if event.get("usage") is not None and not event["choices"]:
            self.usage.append(event["usage"])
        for choice in event["choices"]:
            index, delta = choice["index"], choice.get("delta", {})
            self.texts[index] += choice.get("text") or delta.get("content") or ""
            if text := delta.get("reasoning_content"):
                self.reasoning[index] += text
            for call in delta.get("tool_calls") or ():
                self._add_call(index, call)
            self.roles[index] += delta.get("role") is not None
            if choice.get("finish_reason"):
                self.finishes[index].append(choice["finish_reason"])
            if found := choice.get("logprobs"):
                self.logprobs[index] += found["content"] if found.get("content") is not None else _entries(found)

    def _add_call(self, index: int, call: dict[str, Any]) -> None:
        """Add a piece of a tool call; raises KeyError or IndexError if its beginning has not come."""
        calls, function = self.calls[index], call["function"]
        if call["index"] == len(calls):
            self.call_ids.append(call["id"])
            calls.append([function["name"], ""])
        calls[call["index"]][1] += function["arguments"]


def read_events(status: int, body: bytes) -> Answer:
    """Read a whole stream: its events in order, exactly one [DONE], and nothing after it. Raises Broken."""
    answer = Answer(status)
    *events, rest = body.decode().split("\n\n")
    if rest:
        raise Broken(f"the stream ends inside an event: {rest!r}")
    for i, event in enumerate(events):
        if event.startswith(":"):
            continue
        if not event.startswith("data: "):
            raise Broken(f"this is no event: {event[:80]!r}")
        if event == "data: [DONE]":
            if i != len(events) - 1:
                raise Broken("an event comes after [DONE]")
            return answer
        try:
            answer.add(json.loads(event.removeprefix("data: ")))
        except (ValueError, KeyError, TypeError, IndexError) as e:
            raise Broken(f"{e!r} in the event {event[:200]!r}") from None
    if not answer.errors:
        raise Broken("the stream has no [DONE]")
    return answer


def read_body(status: int, body: dict[str, Any]) -> Answer:
    """Read a response that is not streamed."""
    if "error" in body:
        return Answer(status, errors=[body["error"]])
    calls = [call for choice in body.get("choices", ()) for call in choice.get("message", {}).get("tool_calls") or ()]
    ids = [call.pop("id") for call in calls]
    return Answer(status, body={k: v for k, v in body.items() if k not in ("id", "created")}, call_ids=ids)


def _entries(found: dict[str, list[Any] | None]) -> list[dict[str, Any]]:
    """Return the parallel lists of a text completion's logprobs as one entry for each token."""
    names = [name for name, values in found.items() if values is not None]
    return [
        dict(zip(names, values, strict=True)) for values in zip(*(found[name] or [] for name in names), strict=True)
    ]
