"""A request's priority changes while it is under way: over the real fabric, with engines by hand."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from daemon.api.request_state import RequestState
from daemon.ipc.fabric import COORDINATOR, Fabric, FabricHandles
from daemon.ipc.journal import JournalView
from daemon.ipc.messages import (
    Grant,
    HandBack,
    OwnedRequests,
    Reclaim,
    Release,
    Reprioritise,
    SetPriority,
    Start,
    Takeover,
    encode,
)
from daemon.ipc.process_table import ProcessFacts, ProcessState
from tests.api.test_request_tracker import FRONTEND, Box
from tests.control.factories import engine


def prioritise(box: Box, rid: int, priority: int) -> None:
    advice = Fabric(box.handles, COORDINATOR, 1).writer(box.topology.frontend(0))
    assert advice.put(encode(SetPriority(rid, priority)), FRONTEND)
    box.tracker.on_doorbell()


def say(box: Box, i: int, message: Any) -> None:
    """Engine i says it to the frontend."""
    assert box.engine(i, 1).writer(box.topology.frontend(0)).put(encode(message), FRONTEND)
    box.tracker.on_doorbell()


def orders(box: Box, i: int) -> list[Any]:
    return [m for m in box.told(i, 1) if not isinstance(m, OwnedRequests)]


def shown(box: Box, flight: RequestState) -> int:
    """What a reader of the journal sees."""
    return JournalView(box.tracker._fabric.journal(0)).priority(flight.slot)


def test_it_is_journaled_and_the_owner_hears_of_it(handles: FabricHandles) -> None:
    async def body() -> None:
        box = Box(handles)
        box.appear(0, 1)
        flight, other = box.submit(), box.submit()
        prioritise(box, flight.rid, -1)
        prioritise(box, 12345, -1)
        prioritise(box, flight.rid, 7)
        assert (shown(box, flight), shown(box, other)) == (7, 0)
        changes = [Reprioritise(flight.rid, 1, -1), Reprioritise(flight.rid, 1, 7)]
        assert [m for m in orders(box, 0) if not isinstance(m, Start)] == changes

    asyncio.run(body())


def test_a_new_owner_hears_of_a_change_that_it_may_have_missed(handles: FabricHandles) -> None:
    async def body() -> None:
        box = Box(handles)
        box.appear(0, 1)
        flight = box.submit()
        box.appear(1, 1)
        prioritise(box, flight.rid, -1)
        say(box, 1, Takeover(flight.rid, 1, 0, [], None))
        assert orders(box, 1) == [Grant(flight.rid, 1, 2), Reprioritise(flight.rid, 2, -1)]
        say(box, 1, Reclaim(flight.rid, 2, 0, [], None))
        assert orders(box, 1)[2:] == [Grant(flight.rid, 2, 3)]
        assert orders(box, 0)[1:] == [Reprioritise(flight.rid, 1, -1), Release(flight.rid, 1)]
        assert shown(box, flight) == -1

    asyncio.run(body())


@pytest.mark.parametrize(("priority", "chosen"), [(-1, 2), (1, 1)])
def test_what_is_handed_back_goes_where_its_present_priority_belongs(
    handles: FabricHandles, priority: int, chosen: int
) -> None:
    """Urgent requests gather on engine 2, the others keep away from it."""

    async def body() -> None:
        box = Box(handles)
        box.appear(0, 1)
        flight = box.submit()
        gathering = {"used_blocks": 60, "running": 3, "high_running": 3}
        for i, fields in ((1, {}), (2, gathering)):
            box.table.publish(box.topology.engine(i), ProcessFacts(ProcessState.UP, 1))
            facts = engine(total_blocks=851, max_num_seqs=256, **fields)
            box.engine(i, 1).board().publish(encode(facts))
        prioritise(box, flight.rid, priority)
        say(box, 0, HandBack(flight.rid, 1))
        assert (flight.engine, flight.epoch) == (chosen, 2)
        assert [(m.rid, m.epoch) for m in orders(box, chosen)] == [(flight.rid, 2)]

    asyncio.run(body())
