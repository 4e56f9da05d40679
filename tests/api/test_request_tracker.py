"""What becomes of a frontend's requests when engines come and go: over the real fabric, with engines by hand."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest

from daemon.api.generator import EngineLost
from daemon.api.request_state import RequestState
from daemon.api.request_tracker import RequestTracker
from daemon.config import Config
from daemon.ipc.fabric import Fabric, FabricHandles
from daemon.ipc.journal import JournalView
from daemon.ipc.messages import (
    EngineState,
    Finish,
    SamplingParams,
    Start,
    StepOutput,
    Takeover,
    ToEngine,
    ToFrontend,
    decode_to_engine,
    encode,
)
from daemon.ipc.metrics_page import FRONTEND as FRONTEND_STATS
from daemon.ipc.metrics_page import snapshot
from daemon.ipc.process_table import ProcessFacts, ProcessState
from tests.control.factories import engine
from tests.ipc.factories import handles_of

FRONTEND = 5  # its incarnation
PARAMS = SamplingParams(10, 1)


@pytest.fixture
def handles() -> Iterator[FabricHandles]:
    with handles_of(1, 2) as made:
        yield made


class Box:
    """The supervisor's and the engines' ends, and a frontend's tracker between them."""

    def __init__(self, handles: FabricHandles) -> None:
        self.handles = handles
        self.topology = handles.topology
        self.table = Fabric(handles, -1, 0).table_writer()
        self.table.publish(self.topology.frontend(0), ProcessFacts(ProcessState.UP, FRONTEND))
        self.journal = JournalView(Fabric(handles, -1, 0).journal(0))
        self.tracker = RequestTracker(Fabric(handles, self.topology.frontend(0), FRONTEND), Config(max_queued=10))

    def engine(self, i: int, incarnation: int) -> Fabric:
        return Fabric(self.handles, self.topology.engine(i), incarnation)

    def appear(
        self, i: int, incarnation: int, *, last_crashed: int = 0, state: EngineState = EngineState.SERVING
    ) -> None:
        """Engine i is up."""
        self.table.publish(
            self.topology.engine(i), ProcessFacts(ProcessState.UP, incarnation, last_crashed=last_crashed)
        )
        self.engine(i, incarnation).board().publish(encode(engine(incarnation=incarnation, state=state)))
        self.tracker.on_doorbell()

    def resumes(self) -> float:
        page = Fabric(self.handles, -1, 0).metrics(self.topology.frontend(0))
        return snapshot(page, FRONTEND_STATS).counter("resumes")

    def say(self, i: int, incarnation: int, message: ToFrontend) -> None:
        self.engine(i, incarnation).writer(self.topology.frontend(0)).put(encode(message), FRONTEND)
        self.tracker.on_doorbell()

    def leave(
        self, i: int, incarnation: int, life: ProcessState = ProcessState.PARKED, *, last_crashed: int = 0
    ) -> None:
        self.table.publish(self.topology.engine(i), ProcessFacts(life, incarnation, last_crashed=last_crashed))
        self.tracker.on_doorbell()

    def submit(self) -> RequestState:
        with self.tracker.admit(1):
            return self.tracker.submit([1, 2, 3], PARAMS, label="x")

    def told(self, i: int, incarnation: int) -> list[ToEngine]:
        """What that life of engine i finds on its ring from the beginning."""
        reader, found = self.engine(i, incarnation).reader(self.topology.frontend(0)), []
        while (record := reader.read()) is not None:
            if record.receiver == incarnation:
                found.append(decode_to_engine(record.payload))
        return found

    def starts(self, i: int, incarnation: int) -> list[tuple[int, int]]:
        return [(m.rid, m.epoch) for m in self.told(i, incarnation) if isinstance(m, Start)]


def on_a_loop(test: Callable[[Box], Coroutine[Any, Any, None]]) -> Callable[[FabricHandles], None]:
    def go(handles: FabricHandles) -> None:
        async def body() -> None:
            await test(Box(handles))

        asyncio.run(body())

    go.__name__, go.__doc__ = test.__name__, test.__doc__
    return go


@on_a_loop
async def test_a_start_that_crossed_its_engines_parking_goes_elsewhere(box: Box) -> None:
    box.appear(0, 1)
    flight = box.submit()
    box.appear(1, 1)
    box.leave(0, 1)
    assert not flight.done
    assert (flight.engine, flight.epoch) == (1, 2)
    assert box.starts(1, 1) == [(flight.rid, 2)]


@on_a_loop
async def test_it_goes_elsewhere_also_if_the_engine_was_woken_before_anybody_looked(box: Box) -> None:
    box.appear(0, 1)
    flight = box.submit()
    box.appear(1, 1)
    box.appear(0, 3)
    assert (flight.engine, flight.epoch) == (1, 2)
    assert box.starts(1, 1) == [(flight.rid, 2)]
    assert box.starts(0, 3) == []


@on_a_loop
async def test_what_the_parked_engine_had_said_counts_first(box: Box) -> None:
    box.appear(0, 1)
    first, second = box.submit(), box.submit()
    box.appear(1, 1)
    said = StepOutput([first.rid, second.rid], [1, 1], [0, 0], [2, 1], [7, 8, 9], [Finish.STOP, Finish.NONE], [0, 0])
    box.engine(0, 1).writer(box.topology.frontend(0)).put(encode(said), FRONTEND)
    box.leave(0, 1)
    piece = await first.next()
    assert (piece.tokens, piece.finish) == ([7, 8], Finish.STOP)
    assert box.starts(1, 1) == [(second.rid, 2)]
    assert second.accepted == 1


@on_a_loop
async def test_two_engines_parked_at_once_send_nothing_to_each_other(box: Box) -> None:
    box.appear(0, 1)
    box.appear(1, 1)
    flights = [box.submit(), box.submit()]
    assert {f.engine for f in flights} == {0, 1}
    box.table.publish(box.topology.engine(1), ProcessFacts(ProcessState.PARKED, 1))
    box.leave(0, 1)
    for flight in flights:
        with pytest.raises(EngineLost, match="no engine is ready"):
            await flight.next()


@pytest.mark.parametrize("life", [ProcessState.DEAD, ProcessState.PARKED])
def test_what_a_crashed_engine_had_goes_on_elsewhere(handles: FabricHandles, life: ProcessState) -> None:
    """Also what one had which was to be parked, and so is not started again. Nothing that it said is lost or asked
    for twice."""

    async def body() -> None:
        box = Box(handles)
        box.appear(0, 1)
        flight = box.submit()
        box.say(0, 1, StepOutput([flight.rid], [1], [0], [2], [7, 8], [Finish.NONE], [0]))
        box.appear(1, 1)
        box.leave(0, 1, life, last_crashed=1)
        assert (await flight.next()).tokens == [7, 8]
        assert box.starts(1, 1) == [(flight.rid, 2)]
        assert box.journal.output(flight.slot) == [7, 8]
        box.say(1, 1, StepOutput([flight.rid], [2], [2], [1], [9], [Finish.STOP], [0]))
        assert (await flight.next()).tokens == [9]
        assert box.resumes() == 1

    asyncio.run(body())


@on_a_loop
async def test_a_request_that_may_be_what_kills_engines_ends(box: Box) -> None:
    box.appear(0, 1)
    flight = box.submit()
    box.appear(1, 1)
    box.leave(0, 1, ProcessState.DEAD, last_crashed=1)
    younger = box.submit()
    assert younger.engine == 1
    box.appear(0, 2, last_crashed=1)
    box.leave(1, 1, ProcessState.DEAD, last_crashed=1)
    with pytest.raises(EngineLost, match="died"):
        await flight.next()
    assert not younger.done
    assert box.starts(0, 2) == [(younger.rid, 2)]


@on_a_loop
async def test_it_waits_for_the_only_engines_successor(box: Box) -> None:
    box.appear(0, 1)
    flights = [box.submit() for _ in range(3)]
    box.leave(0, 1, ProcessState.DEAD, last_crashed=1)
    flights[1].cancel()
    await asyncio.sleep(0.25)
    assert [f.done for f in flights] == [False, True, False]
    box.appear(0, 2, last_crashed=1)
    await asyncio.sleep(0.25)
    assert box.starts(0, 2) == [(flights[0].rid, 2), (flights[2].rid, 2)]


@on_a_loop
async def test_it_ends_when_no_engine_can_come_any_more(box: Box) -> None:
    box.appear(0, 1)
    flight = box.submit()
    box.leave(0, 1, ProcessState.FAILED, last_crashed=1)
    box.leave(1, 0, ProcessState.FAILED)
    with pytest.raises(EngineLost, match="no engine is ready"):
        await flight.next()


@on_a_loop
async def test_the_destination_of_its_move_may_still_take_it_over(box: Box) -> None:
    """Its source died with the request frozen, and nobody else serves: that is sooner than anew."""
    box.appear(0, 1)
    flight = box.submit()
    box.appear(1, 1, state=EngineState.DRAINING)
    box.leave(0, 1, ProcessState.DEAD, last_crashed=1)
    box.say(1, 1, Takeover(flight.rid, 1, 0, [5], None))
    assert (flight.engine, flight.epoch, flight.accepted) == (1, 2, 1)
    box.appear(0, 2, last_crashed=1)
    await asyncio.sleep(0.25)
    assert box.starts(0, 2) == []


@on_a_loop
async def test_a_life_that_was_parked_after_one_that_crashed_is_not_mistaken_for_it(box: Box) -> None:
    box.appear(0, 2, last_crashed=1)
    flight = box.submit()
    box.appear(1, 1)
    box.leave(0, 2, last_crashed=1)
    assert (flight.engine, flight.epoch) == (1, 2)


@on_a_loop
async def test_states_of_engines_have_the_operators_names(box: Box) -> None:
    assert box.tracker.engines.states() == ["absent", "absent"]
    box.appear(0, 1)
    box.appear(1, 1)
    box.engine(1, 1).board().publish(encode(engine(state=EngineState.PARKED)))
    assert box.tracker.engines.states() == ["serving", "parking"]
    box.leave(1, 1)
    assert box.tracker.engines.states() == ["serving", "parked"]
