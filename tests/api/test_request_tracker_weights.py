"""A request ends on the weights it began with: over the real fabric, with simulated engines."""

from __future__ import annotations

import pytest

from daemon.api.generator import EngineLost
from daemon.api.request_tracker import RequestTracker
from daemon.ipc.fabric import Fabric
from daemon.ipc.messages import EngineState, Finish, HandBack
from daemon.ipc.process_table import ProcessState
from tests.api.test_request_tracker import INCARNATION, Harness, handles, step_output, with_harness

__all__ = ["handles"]  # a fixture
OLD, NEW = 7, 8


@with_harness
async def test_output_goes_on_only_where_its_weights_are(harness: Harness) -> None:
    """Engine 0 is replaced by one with other weights; engine 1 is parked at first."""
    harness.end_engine(1, 1)
    harness.start_engine(0, 1, weights=OLD)
    begun, fresh = harness.submit(), harness.submit()
    harness.send(0, 1, step_output(begun.rid, epoch=1, start=0, tokens=[5]))
    harness.end_engine(0, 1, ProcessState.DEAD, last_crashed=1)
    harness.start_engine(0, 2, last_crashed=1, weights=NEW)
    harness.tracker._place_stranded()
    assert harness.received_starts(0, 2) == [(fresh.rid, 2)]  # it has no output yet
    with pytest.raises(EngineLost, match="the engines have other weights now"):
        await begun.next()
        await begun.next()
    assert harness.tracker.active == 1

    harness.start_engine(1, 2, weights=NEW)
    harness.send(0, 2, step_output(fresh.rid, epoch=2, start=0, tokens=[5]))
    harness.end_engine(0, 2)
    assert harness.received_starts(1, 2) == [(fresh.rid, 3)]


@with_harness
async def test_it_waits_for_its_weights_while_an_engine_with_unknown_ones_starts(harness: Harness) -> None:
    harness.start_engine(0, 1, weights=OLD)
    harness.start_engine(1, 1, weights=NEW, state=EngineState.DRAINING)
    request = harness.submit()
    harness.send(0, 1, step_output(request.rid, epoch=1, start=0, tokens=[5]))
    harness.end_engine(0, 1, ProcessState.DEAD, last_crashed=1)
    harness.start_engine(1, 1, weights=NEW)
    harness.tracker._place_stranded()
    assert harness.received_starts(1, 1) == [] and harness.tracker.active == 1
    harness.start_engine(0, 2, last_crashed=1, weights=OLD)
    harness.tracker._place_stranded()
    assert harness.received_starts(0, 2) == [(request.rid, 2)]
    harness.send(0, 2, step_output(request.rid, epoch=2, start=1, tokens=[6], finish=Finish.STOP))
    assert (await request.next()).tokens == [5, 6]


@with_harness
async def test_what_is_handed_back_stays_with_its_weights(harness: Harness) -> None:
    """The source drains, so it is avoided, and the other engine has other weights: it waits for the source."""
    harness.start_engine(0, 1, weights=OLD)
    request = harness.submit()
    harness.send(0, 1, step_output(request.rid, epoch=1, start=0, tokens=[5]))
    harness.start_engine(1, 1, weights=NEW)
    harness.send(0, 1, HandBack(request.rid, 1))
    assert harness.received_starts(1, 1) == []
    assert (request.owner.engine, request.epoch) == (0, 2)


@with_harness
async def test_a_successor_of_the_frontend_knows_the_weights(harness: Harness) -> None:
    harness.start_engine(0, 1, weights=OLD)
    request = harness.submit()
    harness.send(0, 1, step_output(request.rid, epoch=1, start=0, tokens=[5]))
    harness.end_engine(0, 1, ProcessState.DEAD, last_crashed=1)
    harness.start_engine(1, 1, weights=NEW)
    fabric = Fabric(harness.handles, harness.topology.frontend(0), INCARNATION + 1)
    successor = RequestTracker(fabric, harness.config, adopt=True)
    adopted = successor.adopted()[request.slot]
    assert adopted.bound == OLD
    assert harness.received_starts(1, 1) == []


@with_harness
async def test_a_hung_engine_keeps_its_requests_while_no_other_has_its_weights(harness: Harness) -> None:
    harness.start_engine(0, 1, weights=OLD)
    request = harness.submit()
    harness.start_engine(1, 1, weights=NEW)
    progress = harness.engine(0, 1).progress(harness.topology.engine(0))
    progress.enter(EngineState.SERVING, 1, -10.0)
    harness.engine(1, 1).progress(harness.topology.engine(1)).enter(EngineState.SERVING, 1, 60.0)
    harness.tracker.check_engines()
    assert (request.engine, request.epoch) == (0, 1)
    harness.start_engine(1, 1, weights=OLD)
    harness.tracker.check_engines()
    assert (request.engine, request.epoch) == (1, 2)
