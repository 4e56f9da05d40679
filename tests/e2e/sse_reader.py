"""Reads a stream event by event, may hang up at any of them, and puts the parts of a stream together again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import httpx

from bench.answers import Answer

KEEP = {"X-Llumd-Keep": "1"}


class Event(NamedTuple):
    """One event. `id`: empty if it has none. `data`: None: [DONE]."""

    id: str
    data: dict[str, Any] | None


class Reader:
    """One response that is being read."""

    def __init__(self, response: httpx.Response) -> None:
        self.response = response
        self._events = self._parse()

    def _parse(self) -> Iterator[Event]:
        id = ""
        for line in self.response.iter_lines():
            if line.startswith("id: "):
                id = line.removeprefix("id: ")
            elif line.startswith("data: "):
                data = line.removeprefix("data: ")
                yield Event(id, None if data == "[DONE]" else json.loads(data))
                id = ""

    def read(self, count: int) -> list[Event]:
        """Return the next events, fewer at the end of the stream."""
        return [event for _, event in zip(range(count), self._events, strict=False)]

    def rest(self) -> list[Event]:
        return list(self._events)


@contextmanager
def begun(url: str, body: dict[str, Any], headers: dict[str, str] = KEEP) -> Iterator[Reader]:
    """Send a request; leaving the context hangs up."""
    with httpx.stream("POST", url, json=body, headers=headers, timeout=60) as response:
        assert response.status_code == 200
        yield Reader(response)


@contextmanager
def resumed(url: str, id: str, after: str = "", *, header: bool = True) -> Iterator[Reader]:
    """Go on with a kept stream after the event with the id `after`."""
    headers = {"Last-Event-ID": after} if header and after else {}
    query = {"from": after} if after and not header else {}
    with httpx.stream("GET", f"{url}/v1/streams/{id}", params=query, headers=headers, timeout=60) as response:
        if response.status_code != 200:
            response.read()
        yield Reader(response)


def id_of(events: list[Event]) -> str:
    """Return the id of the stream that these events belong to."""
    assert events[0].data is not None
    return str(events[0].data["id"])


def last_id(events: list[Event]) -> str:
    """Return what a client sends as Last-Event-ID after these events."""
    return next((event.id for event in reversed(events) if event.id), "")


def answer_of(events: list[Event]) -> Answer:
    """Return what all events of a stream say together."""
    answer = Answer(200)
    for event in events[:-1]:
        assert event.data is not None
        answer.add(event.data)
    assert events[-1].data is None, "the stream does not end with [DONE]"
    answer.ids = set()
    return answer
