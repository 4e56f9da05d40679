"""Gives each event of a kept stream an id, whatever API the stream is written in."""

from __future__ import annotations

from collections.abc import Callable

from daemon.api.errors import ApiError
from daemon.api.event_ids import END, Step, event_id, step_id
from daemon.api.parse.parts import Part
from daemon.api.render.renderer import Renderer


class NumberedRenderer:
    """Writes what another renderer writes, with ids."""

    def __init__(self, renderer: Renderer) -> None:
        self._renderer = renderer
        self.state = renderer.state
        self.closing = renderer.closing

    def begin(self, index: int, out: list[bytes]) -> None:
        self._numbered(index, out, lambda events: self._renderer.begin(index, events))

    def write(self, index: int, parts: list[Part], out: list[bytes]) -> None:
        self._numbered(index, out, lambda events: self._renderer.write(index, parts, events))

    def end(self, out: list[bytes]) -> None:
        self._numbered(END, out, self._renderer.end)

    def event(self, error: ApiError) -> bytes:
        return self._renderer.event(error)

    def _numbered(self, index: int, out: list[bytes], write: Callable[[list[bytes]], None]) -> None:
        """Append the events of one step. The last one has the id of the state that follows."""
        events: list[bytes] = []
        before = list(self.state)
        write(events)
        for sent, event in enumerate(events, 1):
            if sent == len(events):
                id = event_id(self.state)
            else:
                id = step_id(before, Step(index, self.state[1 + index] if index != END else 0, sent))
            out.append(b"id: %b\n%b" % (id.encode(), event))
