"""The events that operators can read: what frontends, engines and coordinator did. Pure.

An event names a request twice: by its number and by its public id, which is the `id` in the client's answer and the
number of the choice. The first and the last event also have the `x-request-id` that the client has sent.
`EventWriter` adds the time.
"""

from __future__ import annotations

from typing import Any, get_args

import msgspec

# -- frontend ----------------------------------------------------------------------------------


class Dispatched(msgspec.Struct, tag="dispatched", array_like=True, frozen=True):
    """A frontend has dispatched a request to an engine. `again`: why it is not the first time; empty if it is."""

    rid: int
    request: str
    engine: int
    prompt_tokens: int
    priority: int
    again: str = ""
    x_request_id: str = ""  # `clipped`; empty if the client has sent none


class TakenOver(msgspec.Struct, tag="taken_over", array_like=True, frozen=True):
    """A running request has a new owner, which continues it after `output_tokens`."""

    rid: int
    request: str
    engine: int  # the old owner
    to: int
    epoch: int  # the new one
    output_tokens: int


class Finished(msgspec.Struct, tag="finished", array_like=True, frozen=True):
    """A request has ended, with or without an error."""

    rid: int
    request: str
    engine: int  # its last owner
    result: str  # "stop" or "length" if its output is complete, otherwise `enums.EarlyEnd`
    output_tokens: int
    seconds: float  # since its arrival
    detail: str = ""  # the error; `clipped`
    x_request_id: str = ""


# -- engine ------------------------------------------------------------------------------------


class MoveEnded(msgspec.Struct, tag="move_ended", array_like=True, frozen=True):
    """A migration has ended; its source writes this event."""

    rid: int
    request: str
    to: int  # engine
    reason: str  # `enums.MigrationReason`
    result: str  # `enums.MigrationResult`
    detail: str
    stages: int  # copies started, including the one while the request was frozen
    blocks: int  # copied
    skipped: int  # blocks that the destination already had
    nbytes: int
    seconds: float  # from the choice of the request to the end
    frozen_seconds: float  # of these, the time in no batch


class HandedBack(msgspec.Struct, tag="handed_back", array_like=True, frozen=True):
    """An engine has handed a request back to its frontend, which dispatches it again."""

    rid: int
    request: str
    reason: str  # of the order to migrate
    detail: str


class Preempted(msgspec.Struct, tag="preempted", array_like=True, frozen=True):
    """A running request was preempted: it lost its blocks and waits for recomputation."""

    rid: int
    request: str
    tokens: int  # to recompute


class EngineChanged(msgspec.Struct, tag="engine", array_like=True, frozen=True):
    """The engine publishes a new state."""

    state: str  # `EngineState`, in lower case


# -- coordinator -------------------------------------------------------------------------------


class Ordered(msgspec.Struct, tag="ordered", array_like=True, frozen=True):
    """The coordinator has sent an order. `engine`, `request`: its targets; -1 and empty if it has none."""

    action: str
    request: str
    engine: int
    detail: str
    by: str


Event = Dispatched | TakenOver | Finished | MoveEnded | HandedBack | Preempted | EngineChanged | Ordered

MISSED = "missed"  # stands for events that were overwritten before they were read
KINDS = (*(kind.__struct_config__.tag for kind in get_args(Event)), MISSED)


def kind_of(event: Event) -> str:
    """Return the name of the event's kind in JSON."""
    tag = event.__struct_config__.tag
    assert isinstance(tag, str)
    return tag


def fields_of(event: Event) -> dict[str, Any]:
    """Return the fields by name, ready for JSON."""
    return msgspec.structs.asdict(event)


def clipped(text: str, nbytes: int = 64) -> str:
    """Return `text` with at most `nbytes` bytes of UTF-8: an event of a ring has little room."""
    return text.encode()[:nbytes].decode(errors="ignore")
