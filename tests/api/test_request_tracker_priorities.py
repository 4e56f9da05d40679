"""Priority changes of unfinished requests: over the real fabric, with simulated engines."""

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
from tests.api.test_request_tracker import INCARNATION, Harness
from tests.control.factories import engine_facts


def set_priority(harness: Harness, rid: int, priority: int) -> None:
    coordinator = Fabric(harness.handles, COORDINATOR, 1).writer(harness.topology.frontend(0))
    assert coordinator.put(encode(SetPriority(rid, priority)), INCARNATION)
    harness.tracker.on_doorbell()


def send(harness: Harness, i: int, message: Any) -> None:
    """Send a message from engine i to the frontend."""
    assert harness.engine(i, 1).writer(harness.topology.frontend(0)).put(encode(message), INCARNATION)
    harness.tracker.on_doorbell()


def received(harness: Harness, i: int) -> list[Any]:
    return [m for m in harness.received(i, 1) if not isinstance(m, OwnedRequests)]


def journaled_priority(harness: Harness, request: RequestState) -> int:
    """Return the priority that readers of the journal see."""
    return JournalView(harness.tracker._fabric.journal(0)).priority(request.slot)


def test_new_priority_is_journaled_and_sent_to_the_owner(handles: FabricHandles) -> None:
    async def body() -> None:
        harness = Harness(handles)
        harness.start_engine(0, 1)
        request, other = harness.submit(), harness.submit()
        set_priority(harness, request.rid, -1)
        set_priority(harness, 12345, -1)
        set_priority(harness, request.rid, 7)
        assert (journaled_priority(harness, request), journaled_priority(harness, other)) == (7, 0)
        changes = [Reprioritise(request.rid, 1, -1), Reprioritise(request.rid, 1, 7)]
        assert [m for m in received(harness, 0) if not isinstance(m, Start)] == changes

    asyncio.run(body())


def test_new_owner_receives_a_change_that_it_may_have_missed(handles: FabricHandles) -> None:
    async def body() -> None:
        harness = Harness(handles)
        harness.start_engine(0, 1)
        request = harness.submit()
        harness.start_engine(1, 1)
        set_priority(harness, request.rid, -1)
        send(harness, 1, Takeover(request.rid, epoch=1, start=0, tokens=[], logprobs=None))
        assert received(harness, 1) == [Grant(request.rid, 1, 2), Reprioritise(request.rid, 2, -1)]
        send(harness, 1, Reclaim(request.rid, epoch=2, start=0, tokens=[], logprobs=None))
        assert received(harness, 1)[2:] == [Grant(request.rid, 2, 3)]
        assert received(harness, 0)[1:] == [Reprioritise(request.rid, 1, -1), Release(request.rid, 1)]
        assert journaled_priority(harness, request) == -1

    asyncio.run(body())


@pytest.mark.parametrize(("priority", "chosen"), [(-1, 2), (1, 1)])
def test_handed_back_request_goes_to_the_engine_that_suits_its_new_priority(
    handles: FabricHandles, priority: int, chosen: int
) -> None:
    """Engine 2 runs requests of high priority: others of high priority join them, normal ones avoid it."""

    async def body() -> None:
        harness = Harness(handles)
        harness.start_engine(0, 1)
        request = harness.submit()
        busy_with_high = {"used_blocks": 60, "running": 3, "high_running": 3}
        for i, fields in ((1, {}), (2, busy_with_high)):
            harness.table.publish(harness.topology.engine(i), ProcessFacts(ProcessState.UP, 1))
            facts = engine_facts(total_blocks=851, max_num_seqs=256, **fields)
            harness.engine(i, 1).board().publish(encode(facts))
        set_priority(harness, request.rid, priority)
        send(harness, 0, HandBack(request.rid, 1))
        assert (request.engine, request.epoch) == (chosen, 2)
        assert [(m.rid, m.epoch) for m in received(harness, chosen)] == [(request.rid, 2)]

    asyncio.run(body())
