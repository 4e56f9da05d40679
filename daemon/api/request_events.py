"""The events of a frontend's requests: dispatched, taken over by another engine, finished."""

from __future__ import annotations

import time

from daemon.api.request_state import RequestState
from daemon.control.policy.ownership import Ownership
from daemon.ipc.event_ring import EventWriter
from daemon.ipc.events import Dispatched, Finished, TakenOver, clipped
from daemon.ipc.messages import RequestParams


class RequestEvents:
    """Writes each event after its effect is done. `record`: of the request, from the journal."""

    def __init__(self, events: EventWriter) -> None:
        self._events = events

    def dispatched(self, request: RequestState, prompt_len: int, record: RequestParams, again: str) -> None:
        """`again`: why it is dispatched once more; "" if it is for the first time."""
        name, client_name = _name(request, record), clipped(record.x_request_id)
        self._events.write(
            Dispatched(request.rid, name, request.engine, prompt_len, request.priority, again, client_name)
        )

    def taken_over(self, request: RequestState, record: RequestParams, new: Ownership) -> None:
        """Call it before `new` is assigned: the event names both engines."""
        assert new.owner is not None
        name, to = _name(request, record), new.owner.engine
        self._events.write(TakenOver(request.rid, name, request.engine, to, new.epoch, new.accepted))

    def finished(self, request: RequestState, record: RequestParams, result: str, detail: str) -> None:
        event = Finished(
            rid=request.rid,
            request=_name(request, record),
            engine=request.engine,
            result=result,
            output_tokens=request.accepted,
            seconds=time.monotonic() - record.arrival,
            detail=clipped(detail),
            x_request_id=clipped(record.x_request_id),
        )
        self._events.write(event)


def _name(request: RequestState, record: RequestParams) -> str:
    """Return the public id of a request."""
    return record.label or f"{request.rid:x}"
