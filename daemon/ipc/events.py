"""What the scheduler did, as operators are told: the events of all processes. Pure.

Every request is named twice: by its number and by its public id as `llumctl requests` shows it. Whoever writes
an event adds the time (`control.eventlog`).
"""

from __future__ import annotations

from typing import Any, get_args

import msgspec

# -- frontend ----------------------------------------------------------------------------------


class Dispatched(msgspec.Struct, tag="dispatched", array_like=True, frozen=True):
    """A request was given to an engine. `again`: not for the first time, and why."""

    rid: int
    request: str
    engine: int
    prompt_tokens: int
    priority: int
    again: str = ""


class TakenOver(msgspec.Struct, tag="taken_over", array_like=True, frozen=True):
    """A running request has another owner, which goes on after `output_tokens`."""

    rid: int
    request: str
    engine: int  # it came from
    to: int
    epoch: int  # the new one
    output_tokens: int


# -- engine ------------------------------------------------------------------------------------


class MoveEnded(msgspec.Struct, tag="move_ended", array_like=True, frozen=True):
    """What became of a migration, told by its source."""

    rid: int
    request: str
    to: int  # engine
    reason: str  # `enums.MigrationReason`
    result: str  # `enums.MigrationResult`
    detail: str
    stages: int  # copies begun, the one while frozen included
    blocks: int  # copied
    skipped: int  # blocks that the destination had already
    nbytes: int
    seconds: float  # from choice to end
    frozen_seconds: float  # of these, in no batch


class HandedBack(msgspec.Struct, tag="handed_back", array_like=True, frozen=True):
    """An engine gave a request back to its frontend, which starts it anew."""

    rid: int
    request: str
    reason: str  # of the order
    detail: str


class Preempted(msgspec.Struct, tag="preempted", array_like=True, frozen=True):
    """A running request lost its blocks and waits to be computed anew."""

    rid: int
    request: str
    tokens: int  # to compute anew


class EngineChanged(msgspec.Struct, tag="engine", array_like=True, frozen=True):
    """The engine publishes another state from now on."""

    state: str  # `EngineState`, in lower case


# -- coordinator -------------------------------------------------------------------------------


class Ordered(msgspec.Struct, tag="ordered", array_like=True, frozen=True):
    """An order went out. `engine`: it is about, -1 if none; `request`: the same, or empty."""

    action: str
    request: str
    engine: int
    detail: str
    by: str


Event = Dispatched | TakenOver | MoveEnded | HandedBack | Preempted | EngineChanged | Ordered

MISSED = "missed"  # in the place of events that were overwritten before they were read
KINDS = (*(kind.__struct_config__.tag for kind in get_args(Event)), MISSED)


def kind_of(event: Event) -> str:
    """Its name in JSON."""
    tag = event.__struct_config__.tag
    assert isinstance(tag, str)
    return tag


def fields_of(event: Event) -> dict[str, Any]:
    """Its fields by name, ready for JSON."""
    return msgspec.structs.asdict(event)
