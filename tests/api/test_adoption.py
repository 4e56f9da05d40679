"""RequestTracker that goes on with the journal of a predecessor: over the real fabric, with simulated engines."""

from __future__ import annotations

import asyncio

import pytest
from msgspec.structs import replace

from daemon.api.generator import EngineLost, RequestAttributes
from daemon.api.request_state import RequestState
from daemon.api.request_tracker import RequestTracker
from daemon.enums import EarlyEnd
from daemon.ipc.fabric import Fabric
from daemon.ipc.journal import SlotState
from daemon.ipc.messages import (
    Finish,
    HandBack,
    OwnedRequests,
    Refused,
    Release,
    SamplingParams,
    Takeover,
    TokenLogprobs,
    encode,
)
from daemon.ipc.process_table import ProcessState
from tests.api.test_request_tracker import INCARNATION, Harness, handles, step_output, with_harness

__all__ = ["handles"]  # a fixture


def put(harness: Harness, message: object, receiver: int = INCARNATION) -> None:
    """Let engine 0 write to the ring of a frontend that does not read it."""
    engine = harness.engine(0, 1)
    assert engine.writer(harness.topology.frontend(0)).put(encode(message), receiver)


def succeed(harness: Harness, *, adopt: bool = True) -> RequestTracker:
    """Kill the frontend; return the tracker of its successor."""
    incarnation = harness.tracker._fabric.incarnation + 1
    fabric = Fabric(harness.handles, harness.topology.frontend(0), incarnation)
    harness.tracker = RequestTracker(fabric, harness.config, adopt=adopt)
    return harness.tracker


def heir(tracker: RequestTracker, request: RequestState) -> RequestState:
    return tracker.adopted()[request.slot]


@with_harness
async def test_a_successor_goes_on_from_any_position(harness: Harness) -> None:
    harness.start_engine(0, 1)
    request = harness.submit()
    harness.send(0, 1, step_output(request.rid, epoch=1, start=0, tokens=[7, 8]))
    put(harness, step_output(request.rid, epoch=1, start=2, tokens=[9]))  # the dead process has not read it
    tracker = succeed(harness)
    assert tracker.active == 1
    adopted = heir(tracker, request)
    assert adopted.replay(1).tokens == [7]
    assert (await adopted.next()).tokens == [8, 9]
    harness.send(0, 1, step_output(request.rid, epoch=1, start=3, tokens=[4], finish=Finish.STOP))
    chunk = await adopted.next()
    assert (chunk.tokens, chunk.finish) == ([4], Finish.STOP)
    assert harness.journal.state(request.slot) is SlotState.ENDED
    assert tracker.active == 0
    adopted.release()
    assert harness.journal.state(request.slot) is SlotState.FREE
    assert tracker.adopted() == {}


@with_harness
async def test_output_that_was_journaled_and_not_acknowledged_is_not_doubled(harness: Harness) -> None:
    harness.start_engine(0, 1)
    request = harness.submit()
    row = step_output(request.rid, epoch=1, start=0, tokens=[7, 8], finish=Finish.LENGTH)
    put(harness, row)
    harness.tracker._journal.append(request.slot, [7, 8], None)  # the last store of the predecessor
    adopted = heir(succeed(harness), request)
    chunk = await adopted.next()
    assert (chunk.tokens, chunk.finish) == ([7, 8], Finish.LENGTH)


@with_harness
async def test_a_request_that_has_ended_keeps_its_end_and_its_logprobs(harness: Harness) -> None:
    harness.start_engine(0, 1)
    params = SamplingParams(10, 1, logprobs=1)
    request = harness.tracker.submit([1, 2, 3], params, RequestAttributes("x", client="me"))
    row = step_output(request.rid, epoch=1, start=0, tokens=[7, 8], finish=Finish.STOP)
    entry = TokenLogprobs(-0.5, [3], [-0.25])
    harness.send(0, 1, replace(row, cached=[2], logprobs=[entry, None]))
    tracker = succeed(harness)
    adopted = heir(tracker, request)
    assert adopted.done and tracker.active == 0
    replayed = adopted.replay(1)
    assert (replayed.tokens, replayed.logprobs, replayed.finish) == ([7], [entry], Finish.NONE)
    chunk = await adopted.next()
    assert chunk == ([8], [None], Finish.STOP, 2)
    with pytest.raises(ValueError, match="not 3"):
        adopted.replay(3)
    adopted.release()
    adopted.release()
    assert tracker.store._admission._journal.used == 0


@with_harness
async def test_a_request_that_failed_ends_with_an_error(harness: Harness) -> None:
    harness.start_engine(0, 1)
    request = harness.submit()
    harness.send(0, 1, Refused(request.rid, 1, "it could not be started"))
    with pytest.raises(EngineLost) as lost:
        await heir(succeed(harness), request).next()
    assert not lost.value.retry


@with_harness
async def test_the_first_message_to_each_engine_states_what_it_owns(harness: Harness) -> None:
    harness.start_engine(0, 1)
    first, second = harness.submit(), harness.submit()
    harness.send(0, 1, step_output(first.rid, epoch=1, start=0, tokens=[7, 8]))
    harness.start_engine(1, 1)
    put(harness, Takeover(99, 1, 0, [], None))  # a claim that gets an answer
    succeed(harness)
    messages = [m for m in harness.received(0, 1) if isinstance(m, OwnedRequests)][-1:]
    owned = [dict(zip(m.rids, zip(m.epochs, m.accepted, m.priorities, strict=True), strict=True)) for m in messages]
    assert owned == [{first.rid: (1, 2, 0), second.rid: (1, 0, 0)}]
    assert harness.received(1, 1)[-1].rids == []


@with_harness
async def test_a_crash_counts_once_although_two_frontends_see_it(harness: Harness) -> None:
    """`max_resumes` is 1: counted twice, the request would end with an error."""
    harness.start_engine(0, 1)
    request = harness.submit()
    harness.end_engine(0, 1, ProcessState.DEAD, last_crashed=1)  # stranded: no engine serves
    tracker = succeed(harness)
    adopted = heir(tracker, request)
    assert not adopted.done
    harness.start_engine(1, 1)
    tracker._place_stranded()
    assert harness.received_starts(1, 1) == [(request.rid, 2)]


@with_harness
async def test_a_request_whose_start_was_lost_is_started_again(harness: Harness) -> None:
    harness.start_engine(0, 1)
    request = harness.submit()
    tracker = succeed(harness)
    harness.send(0, 1, HandBack(request.rid, 1))
    assert (heir(tracker, request).epoch, tracker.active) == (2, 1)


@with_harness
async def test_requests_that_no_response_claims_are_cancelled(harness: Harness) -> None:
    harness.start_engine(0, 1)
    kept, lost = harness.submit(), harness.submit()
    tracker = succeed(harness)
    tracker.abandon_unclaimed({kept.slot})
    assert set(tracker.adopted()) == {kept.slot}
    assert harness.journal.kept_slots() == [kept.slot]
    assert harness.ends() == [(lost.rid, EarlyEnd.FRONTEND, 0)]


@with_harness
async def test_records_to_a_predecessor_of_another_generation_are_dropped(harness: Harness) -> None:
    harness.start_engine(0, 1)
    request = harness.submit()
    tracker = succeed(harness, adopt=False)
    assert tracker.adopted() == {} and tracker.active == 0
    put(harness, Takeover(request.rid, 1, 0, [], None))
    tracker.on_doorbell()
    assert not [m for m in harness.received(0, 1) if isinstance(m, Release) and m.rid == request.rid]


@with_harness
async def test_successors_of_successors_accept_records_to_all_of_the_generation(harness: Harness) -> None:
    harness.start_engine(0, 1)
    request = harness.submit()
    put(harness, step_output(request.rid, epoch=1, start=0, tokens=[7]))
    succeed(harness)
    put(harness, step_output(request.rid, epoch=1, start=1, tokens=[8]), INCARNATION + 1)
    tracker = succeed(harness)
    put(harness, step_output(request.rid, epoch=1, start=2, tokens=[9]), INCARNATION)
    tracker.on_doorbell()
    assert (await heir(tracker, request).next()).tokens == [7, 8, 9]


@with_harness
async def test_a_second_reader_starts_while_the_first_waits(harness: Harness) -> None:
    harness.start_engine(0, 1)
    request = harness.submit()
    harness.send(0, 1, step_output(request.rid, epoch=1, start=0, tokens=[7, 8]))
    first = asyncio.create_task(request.next())
    await asyncio.sleep(0)
    assert first.done() and first.result().tokens == [7, 8]
    first = asyncio.create_task(request.next())
    await asyncio.sleep(0)
    assert request.replay(1).tokens == [7]
    assert (await request.next()).tokens == [8]
    second = asyncio.create_task(request.next())
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.sleep(0)
    harness.send(0, 1, step_output(request.rid, epoch=1, start=2, tokens=[9], finish=Finish.STOP))
    assert await asyncio.wait_for(second, 5) == ([9], None, Finish.STOP, 0)
    for position in (3, 0):
        assert request.replay(position).tokens == [7, 8, 9][:position]
        assert await request.next() == ([7, 8, 9][position:], None, Finish.STOP, 0)


@with_harness
async def test_output_comes_before_the_end_that_is_an_error(harness: Harness) -> None:
    harness.start_engine(0, 1)
    request = harness.submit()
    harness.send(0, 1, step_output(request.rid, epoch=1, start=0, tokens=[7, 8]))
    request.cancel(EarlyEnd.DEADLINE)
    for reader in (request, heir(succeed(harness), request)):
        reader.replay(1)
        assert await reader.next() == ([8], None, Finish.NONE, 0)
        assert await reader.next() == ([], None, Finish.DEADLINE, 0)
