"""RequestTracker when engines start, park and crash: over the real fabric, with simulated engines."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest
from msgspec.structs import replace

from daemon.api.engine_links import HUNG_AFTER
from daemon.api.generator import EngineLost, RequestAttributes, ShuttingDown
from daemon.api.request_state import RequestState
from daemon.api.request_tracker import RequestTracker
from daemon.config import Config
from daemon.enums import EarlyEnd
from daemon.ipc.event_ring import EventReader
from daemon.ipc.events import Finished
from daemon.ipc.fabric import Fabric, FabricHandles
from daemon.ipc.journal import JournalView
from daemon.ipc.messages import (
    Cancel,
    EngineState,
    Finish,
    Refused,
    Release,
    SamplingParams,
    Start,
    StepOutput,
    Takeover,
    ToEngine,
    ToFrontend,
    decode_to_engine,
    encode,
)
from daemon.ipc.metrics_page import FRONTEND, snapshot
from daemon.ipc.process_table import ProcessFacts, ProcessState
from daemon.ipc.prompt_logprobs import PromptLogprobs
from tests.control.factories import engine_facts
from tests.ipc.factories import fabric_handles

INCARNATION = 5  # of the frontend
PARAMS = SamplingParams(10, 1)


@pytest.fixture
def handles() -> Iterator[FabricHandles]:
    with fabric_handles(1, 2) as made:
        yield made


class Harness:
    """A frontend's tracker, with the fabric ends of the supervisor and of two engines around it."""

    def __init__(self, handles: FabricHandles) -> None:
        self.handles = handles
        self.topology = handles.topology
        self.table = Fabric(handles, -1, 0).table_writer()
        self.table.publish(self.topology.frontend(0), ProcessFacts(ProcessState.UP, INCARNATION))
        self.journal = JournalView(Fabric(handles, -1, 0).journal(0))
        self.config = Config(max_queued=10)
        self.tracker = RequestTracker(Fabric(handles, self.topology.frontend(0), INCARNATION), self.config)

    def engine(self, i: int, incarnation: int) -> Fabric:
        """Return the fabric as this incarnation of engine i maps it."""
        return Fabric(self.handles, self.topology.engine(i), incarnation)

    def start_engine(
        self,
        i: int,
        incarnation: int,
        *,
        last_crashed: int = 0,
        last_failed: int = 0,
        state: EngineState = EngineState.SERVING,
        weights: int = 0,
    ) -> None:
        """Publish that this incarnation of engine i is up, with its state and its weights."""
        row = ProcessFacts(ProcessState.UP, incarnation, last_crashed=last_crashed, last_failed=last_failed)
        self.table.publish(self.topology.engine(i), row)
        facts = engine_facts(incarnation=incarnation, state=state, weights=weights)
        self.engine(i, incarnation).board().publish(encode(facts))
        self.tracker.on_doorbell()

    def ends(self) -> list[tuple[int, str, int]]:
        """Return rid, result and number of output tokens of the requests whose end was recorded."""
        reader = EventReader(Fabric(self.handles, -1, 0).events(self.topology.frontend(0)))
        events = [event for _, event in reader.read()[0]]
        return [(e.rid, e.result, e.output_tokens) for e in events if isinstance(e, Finished)]

    def counter(self, name: str) -> float:
        """Return a counter of the frontend's metrics page."""
        page = Fabric(self.handles, -1, 0).metrics(self.topology.frontend(0))
        return snapshot(page, FRONTEND).counter(name)

    def send(self, i: int, incarnation: int, message: ToFrontend) -> None:
        """Send a message from this incarnation of engine i to the tracker."""
        self.engine(i, incarnation).writer(self.topology.frontend(0)).put(encode(message), INCARNATION)
        self.tracker.on_doorbell()

    def end_engine(
        self,
        i: int,
        incarnation: int,
        state: ProcessState = ProcessState.PARKED,
        *,
        last_crashed: int = 0,
        last_failed: int = 0,
    ) -> None:
        """Publish that this incarnation of engine i has ended, with `state`."""
        row = ProcessFacts(state, incarnation, last_crashed=last_crashed, last_failed=last_failed)
        self.table.publish(self.topology.engine(i), row)
        self.tracker.on_doorbell()

    def fail_engine(self, i: int, incarnation: int) -> None:
        """Publish that this incarnation has ended by an exception of its own."""
        self.end_engine(i, incarnation, ProcessState.DEAD, last_crashed=incarnation, last_failed=incarnation)

    def submit(self, params: SamplingParams = PARAMS) -> RequestState:
        with self.tracker.admit(1):
            return self.tracker.submit([1, 2, 3], params, RequestAttributes("x"))

    def received(self, i: int, incarnation: int) -> list[ToEngine]:
        """Return all messages to this incarnation of engine i that the tracker has put on its ring."""
        reader, found = self.engine(i, incarnation).reader(self.topology.frontend(0)), []
        while (record := reader.read()) is not None:
            if record.receiver == incarnation:
                found.append(decode_to_engine(record.payload))
        return found

    def received_starts(self, i: int, incarnation: int) -> list[tuple[int, int]]:
        """Return (rid, epoch) of each Start among them."""
        return [(m.rid, m.epoch) for m in self.received(i, incarnation) if isinstance(m, Start)]


def step_output(rid: int, *, epoch: int, start: int, tokens: list[int], finish: Finish = Finish.NONE) -> StepOutput:
    """Return a step with one row."""
    return StepOutput(
        rids=[rid],
        epochs=[epoch],
        starts=[start],
        counts=[len(tokens)],
        tokens=tokens,
        finishes=[finish],
        cached=[0],
    )


def with_harness(test: Callable[[Harness], Coroutine[Any, Any, None]]) -> Callable[[FabricHandles], None]:
    """Run a coroutine test with a new harness on an event loop."""

    def go(handles: FabricHandles) -> None:
        async def body() -> None:
            await test(Harness(handles))

        asyncio.run(body())

    go.__name__, go.__doc__ = test.__name__, test.__doc__
    return go


@with_harness
async def test_start_that_its_parked_engine_never_read_goes_to_another_engine(harness: Harness) -> None:
    harness.start_engine(0, 1)
    request = harness.submit()
    harness.start_engine(1, 1)
    harness.end_engine(0, 1)
    assert not request.done
    assert (request.engine, request.epoch) == (1, 2)
    assert harness.received_starts(1, 1) == [(request.rid, 2)]


@with_harness
async def test_start_goes_to_another_engine_also_if_the_parked_one_was_woken_in_the_meantime(
    harness: Harness,
) -> None:
    harness.start_engine(0, 1)
    request = harness.submit()
    harness.start_engine(1, 1)
    harness.start_engine(0, 3)
    assert (request.engine, request.epoch) == (1, 2)
    assert harness.received_starts(1, 1) == [(request.rid, 2)]
    assert harness.received_starts(0, 3) == []


@with_harness
async def test_output_of_the_parked_engine_is_accepted_first(harness: Harness) -> None:
    harness.start_engine(0, 1)
    first, second = harness.submit(), harness.submit()
    harness.start_engine(1, 1)
    output = StepOutput(
        rids=[first.rid, second.rid],
        epochs=[1, 1],
        starts=[0, 0],
        counts=[2, 1],
        tokens=[7, 8, 9],
        finishes=[Finish.STOP, Finish.NONE],
        cached=[0, 0],
    )
    harness.engine(0, 1).writer(harness.topology.frontend(0)).put(encode(output), INCARNATION)
    harness.end_engine(0, 1)
    chunk = await first.next()
    assert (chunk.tokens, chunk.finish) == ([7, 8], Finish.STOP)
    assert harness.received_starts(1, 1) == [(second.rid, 2)]
    assert second.accepted == 1


@with_harness
async def test_requests_of_two_engines_parked_at_once_end_with_an_error(harness: Harness) -> None:
    harness.start_engine(0, 1)
    harness.start_engine(1, 1)
    requests = [harness.submit(), harness.submit()]
    assert {r.engine for r in requests} == {0, 1}
    harness.table.publish(harness.topology.engine(1), ProcessFacts(ProcessState.PARKED, 1))
    harness.end_engine(0, 1)
    for request in requests:
        with pytest.raises(EngineLost, match="no engine is ready"):
            await request.next()


@pytest.mark.parametrize("state", [ProcessState.DEAD, ProcessState.PARKED])
def test_requests_of_a_crashed_engine_continue_on_another(handles: FabricHandles, state: ProcessState) -> None:
    """PARKED: the engine crashed while it was to be parked, so it is not restarted. No output is lost or repeated."""

    async def body() -> None:
        harness = Harness(handles)
        harness.start_engine(0, 1)
        request = harness.submit()
        harness.send(0, 1, step_output(request.rid, epoch=1, start=0, tokens=[7, 8]))
        harness.start_engine(1, 1)
        harness.end_engine(0, 1, state, last_crashed=1)
        assert (await request.next()).tokens == [7, 8]
        assert harness.received_starts(1, 1) == [(request.rid, 2)]
        assert harness.journal.output(request.slot) == [7, 8]
        harness.send(1, 1, step_output(request.rid, epoch=2, start=2, tokens=[9], finish=Finish.STOP))
        assert (await request.next()).tokens == [9]
        assert harness.counter("resumes") == 1

    asyncio.run(body())


@with_harness
async def test_only_new_tokens_of_the_current_epoch_are_accepted(harness: Harness) -> None:
    harness.start_engine(0, 1)
    request = harness.submit()
    harness.send(0, 1, step_output(request.rid, epoch=1, start=0, tokens=[7, 8]))
    harness.send(0, 1, step_output(request.rid, epoch=1, start=1, tokens=[8, 9]))
    harness.send(0, 1, step_output(request.rid, epoch=1, start=0, tokens=[7]))
    harness.send(0, 1, step_output(request.rid, epoch=2, start=3, tokens=[1, 2]))
    assert (await request.next()).tokens == [7, 8, 9]
    assert harness.journal.output(request.slot) == [7, 8, 9]
    assert (request.accepted, request.ownership.accepted) == (3, 3)
    assert harness.counter("stale_tokens") == 1 + 1 + 2


@with_harness
async def test_request_ends_with_an_error_if_output_is_missing(harness: Harness) -> None:
    harness.start_engine(0, 1)
    request = harness.submit()
    harness.send(0, 1, step_output(request.rid, epoch=1, start=1, tokens=[8]))
    with pytest.raises(EngineLost, match="output was lost"):
        await request.next()
    assert harness.tracker.active == 0


@with_harness
async def test_request_ends_after_max_resumes_crashes(harness: Harness) -> None:
    harness.start_engine(0, 1)
    request = harness.submit()
    harness.start_engine(1, 1)
    harness.end_engine(0, 1, ProcessState.DEAD, last_crashed=1)
    younger = harness.submit()
    assert younger.engine == 1
    harness.start_engine(0, 2, last_crashed=1)
    harness.end_engine(1, 1, ProcessState.DEAD, last_crashed=1)
    with pytest.raises(EngineLost, match="died"):
        await request.next()
    assert not younger.done
    assert harness.received_starts(0, 2) == [(younger.rid, 2)]


@with_harness
async def test_request_during_which_two_engines_failed_is_not_tried_on_a_third(harness: Harness) -> None:
    """Whatever `max_resumes` is. A request that was on one of them alone goes on."""
    harness.config.max_resumes = 9
    harness.start_engine(0, 1)
    request = harness.submit()
    harness.start_engine(1, 1)
    harness.fail_engine(0, 1)
    younger = harness.submit()
    assert (request.engine, younger.engine) == (1, 1)
    harness.start_engine(0, 2, last_crashed=1, last_failed=1)
    harness.fail_engine(1, 1)
    with pytest.raises(EngineLost, match="2 engines failed") as lost:
        await request.next()
    assert not lost.value.retry
    assert harness.received_starts(0, 2) == [(younger.rid, 2)]


@with_harness
async def test_killed_engines_do_not_count_as_failed(harness: Harness) -> None:
    harness.config.max_resumes = 9
    harness.start_engine(0, 1)
    request = harness.submit()
    harness.start_engine(1, 1)
    harness.fail_engine(0, 1)
    harness.start_engine(0, 2, last_crashed=1, last_failed=1)
    harness.end_engine(1, 1, ProcessState.DEAD, last_crashed=1)
    assert harness.received_starts(0, 2) == [(request.rid, 3)]


@with_harness
async def test_output_that_cannot_be_journaled_ends_its_request_alone(harness: Harness) -> None:
    """More tokens than the request may have: a fault of an engine, which must not stop the frontend."""
    harness.start_engine(0, 1)
    request, other = harness.submit(), harness.submit()
    out = StepOutput(
        rids=[request.rid, other.rid],
        epochs=[1, 1],
        starts=[0, 0],
        counts=[PARAMS.max_tokens + 1, 1],
        tokens=[*range(PARAMS.max_tokens + 1), 77],
        finishes=[0, 0],
        cached=[0, 0],
    )
    harness.send(0, 1, out)
    with pytest.raises(EngineLost, match="output was lost"):
        await request.next()
    assert (await other.next()).tokens == [77]
    assert Cancel(request.rid, 1) in harness.received(0, 1)


@with_harness
async def test_refused_request_is_not_to_be_sent_again(harness: Harness) -> None:
    harness.start_engine(0, 1)
    request = harness.submit()
    harness.send(0, 1, Refused(request.rid, 1, "it could not be started"))
    with pytest.raises(EngineLost, match="could not be started") as lost:
        await request.next()
    assert not lost.value.retry


def due(harness: Harness, i: int, incarnation: int, seconds: float) -> None:
    """Let engine i promise its next sign of life for `seconds` from now (negative: it is overdue)."""
    fabric = harness.engine(i, incarnation)
    fabric.progress(fabric.process).enter(EngineState.SERVING, incarnation, seconds)


@with_harness
async def test_no_new_request_goes_to_an_overdue_engine(harness: Harness) -> None:
    for i in (0, 1):
        harness.start_engine(i, 1)
        due(harness, i, 1, 60.0)
    due(harness, 0, 1, -0.1)
    assert [harness.submit().engine for _ in range(4)] == [1] * 4
    due(harness, 1, 1, -0.1)  # every engine is late, as on a busy machine
    assert {harness.submit().engine for _ in range(4)} <= {0, 1}


@with_harness
async def test_requests_of_a_hanging_engine_continue_on_another(harness: Harness) -> None:
    harness.start_engine(0, 1)
    request = harness.submit()
    harness.start_engine(1, 1)
    harness.send(0, 1, step_output(request.rid, epoch=1, start=0, tokens=[7]))
    due(harness, 1, 1, 60.0)
    due(harness, 0, 1, 1 - HUNG_AFTER)
    harness.tracker.check_engines()
    assert request.engine == 0  # late, but not yet for long
    due(harness, 0, 1, -1 - HUNG_AFTER)
    harness.tracker.check_engines()
    assert harness.received_starts(1, 1) == [(request.rid, 2)]
    assert Release(request.rid, 1) in harness.received(0, 1)
    harness.send(0, 1, step_output(request.rid, epoch=1, start=1, tokens=[9]))  # it was only slow
    assert harness.journal.output(request.slot) == [7]
    due(harness, 0, 1, 60.0)
    due(harness, 1, 1, -1 - HUNG_AFTER)
    harness.tracker.check_engines()
    assert request.engine == 1  # `max_resumes` is 1: the request may be the cause


@with_harness
async def test_requests_stay_if_every_engine_is_late(harness: Harness) -> None:
    harness.start_engine(0, 1)
    request = harness.submit()
    harness.start_engine(1, 1)
    due(harness, 0, 1, -1 - HUNG_AFTER)
    due(harness, 1, 1, -0.1)
    harness.tracker.check_engines()
    assert (request.engine, request.epoch) == (0, 1)


@with_harness
async def test_requests_wait_for_the_restart_of_the_only_engine(harness: Harness) -> None:
    harness.start_engine(0, 1)
    requests = [harness.submit() for _ in range(3)]
    harness.end_engine(0, 1, ProcessState.DEAD, last_crashed=1)
    requests[1].cancel()
    await asyncio.sleep(0.25)
    assert [r.done for r in requests] == [False, True, False]
    harness.start_engine(0, 2, last_crashed=1)
    await asyncio.sleep(0.25)
    assert harness.received_starts(0, 2) == [(requests[0].rid, 2), (requests[2].rid, 2)]


@with_harness
async def test_request_ends_when_all_engines_have_failed(harness: Harness) -> None:
    harness.start_engine(0, 1)
    request = harness.submit()
    harness.end_engine(0, 1, ProcessState.FAILED, last_crashed=1)
    harness.end_engine(1, 0, ProcessState.FAILED)
    with pytest.raises(EngineLost, match="no engine is ready"):
        await request.next()


@with_harness
async def test_how_a_request_has_ended_is_an_event(harness: Harness) -> None:
    harness.start_engine(0, 1)
    complete, stopped, gone, late, failed, cut = (harness.submit() for _ in range(6))
    harness.send(0, 1, step_output(complete.rid, epoch=1, start=0, tokens=[7], finish=Finish.STOP))
    harness.send(0, 1, step_output(gone.rid, epoch=1, start=0, tokens=[7, 8]))
    stopped.cancel()  # by a stop string
    stopped.cancel(EarlyEnd.CLIENT)  # it has ended already
    gone.cancel(EarlyEnd.CLIENT)
    late.cancel(EarlyEnd.DEADLINE)
    harness.send(0, 1, step_output(failed.rid, epoch=1, start=0, tokens=[], finish=Finish.ERROR))
    reason = "é" * 5000
    refused = harness.submit()
    harness.send(0, 1, Refused(refused.rid, 1, reason))
    harness.tracker.give_up()
    ends = [
        (complete, "stop", 1),
        (stopped, "stop", 0),
        (gone, "client", 2),
        (late, "deadline", 0),
        (failed, "engine", 0),
        (refused, "engine", 0),
        (cut, "shutdown", 0),
    ]
    assert harness.ends() == [(request.rid, why, tokens) for request, why, tokens in ends]


@with_harness
async def test_a_drain_that_runs_out_ends_requests_as_a_shutdown(harness: Harness) -> None:
    harness.start_engine(0, 1)
    request = harness.submit()
    harness.tracker.draining = True
    harness.tracker.give_up()
    with pytest.raises(ShuttingDown):
        await request.next()
    assert harness.tracker.active == 0


@with_harness
async def test_a_request_whose_engine_dies_in_a_drain_ends_as_a_shutdown(harness: Harness) -> None:
    harness.start_engine(0, 1)
    request = harness.submit()
    harness.tracker.draining = True
    harness.end_engine(0, 1, ProcessState.DEAD, last_crashed=1)
    with pytest.raises(ShuttingDown):
        await request.next()


@with_harness
async def test_stranded_request_may_still_be_taken_over_by_its_migration_destination(harness: Harness) -> None:
    """The source died while the request was frozen, and no engine serves: a takeover is faster than a restart."""
    harness.start_engine(0, 1)
    request = harness.submit()
    harness.start_engine(1, 1, state=EngineState.DRAINING)
    harness.end_engine(0, 1, ProcessState.DEAD, last_crashed=1)
    harness.send(1, 1, Takeover(request.rid, epoch=1, start=0, tokens=[5], logprobs=None))
    assert (request.engine, request.epoch, request.accepted) == (1, 2, 1)
    harness.start_engine(0, 2, last_crashed=1)
    await asyncio.sleep(0.25)
    assert harness.received_starts(0, 2) == []


@with_harness
async def test_incarnation_parked_after_a_crashed_one_does_not_count_as_a_crash(harness: Harness) -> None:
    harness.start_engine(0, 2, last_crashed=1)
    request = harness.submit()
    harness.start_engine(1, 1)
    harness.end_engine(0, 2, last_crashed=1)
    assert (request.engine, request.epoch) == (1, 2)


@with_harness
async def test_engine_states_have_the_names_that_operators_see(harness: Harness) -> None:
    assert harness.tracker.engines.states() == ["absent", "absent"]
    harness.start_engine(0, 1)
    harness.start_engine(1, 1)
    harness.engine(1, 1).board().publish(encode(engine_facts(state=EngineState.PARKED)))
    assert harness.tracker.engines.states() == ["serving", "parking"]
    harness.end_engine(1, 1)
    assert harness.tracker.engines.states() == ["serving", "parked"]


def scored(rid: int, start: int, logprobs: list[float], *, epoch: int = 1, tokens: list[int] = ()) -> StepOutput:
    """Return a step with logprobs of the request's prompt."""
    records = b"".join(struct.pack("<fI", logprob, 1) for logprob in logprobs)
    output = step_output(rid, epoch=epoch, start=0, tokens=list(tokens))
    return replace(output, prompt_logprobs={0: PromptLogprobs(start, records)})


@with_harness
async def test_logprobs_of_a_prompt_are_journaled_once_whichever_engine_sends_them(harness: Harness) -> None:
    """A second engine repeats one and adds the rest; what the first one sends at its old epoch is dropped."""
    harness.start_engine(0, 1)
    request = harness.submit(replace(PARAMS, prompt_logprobs=0))
    harness.send(0, 1, scored(request.rid, 0, [-1.0]))
    with pytest.raises(EngineLost, match="prompt"):
        request.prompt_logprobs(1, 3)
    harness.start_engine(1, 1)
    harness.fail_engine(0, 1)
    harness.send(1, 1, scored(request.rid, 0, [-9.0, -9.0], epoch=1))
    harness.send(1, 1, scored(request.rid, 0, [-1.5, -2.0], epoch=2, tokens=[7]))
    assert [entry.logprob for entry in request.prompt_logprobs(1, 3)] == [-1.0, -2.0]
    assert [entry.logprob for entry in request.prompt_logprobs(2, 3)] == [-2.0]
    assert (await request.next()).tokens == [7]


@with_harness
async def test_a_request_ends_if_logprobs_of_its_prompt_are_missing(harness: Harness) -> None:
    harness.start_engine(0, 1)
    request, other = harness.submit(replace(PARAMS, prompt_logprobs=0)), harness.submit()
    harness.send(0, 1, scored(request.rid, 1, [-1.0]))
    with pytest.raises(EngineLost, match="lost"):
        await request.next()
    assert harness.received(0, 1)[-1] == Cancel(request.rid, 1)
    assert not other.done
