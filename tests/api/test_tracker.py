"""What becomes of a frontend's requests when engines come and go: over the real fabric, with engines by hand."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest

from daemon.api.flight import Flight
from daemon.api.generation import Lost
from daemon.api.tracker import Tracker
from daemon.config import Config
from daemon.control.fabric import Fabric, FabricHandles, Topology
from daemon.control.messages import (
    EngineState,
    Finish,
    SamplingParams,
    Start,
    StepOutput,
    ToEngine,
    decode_to_engine,
    encode,
)
from daemon.control.processes import Life, ProcessFacts
from tests.control.facts import engine

FRONTEND = 5  # its incarnation
PARAMS = SamplingParams(10, 1)


@pytest.fixture
def handles() -> Iterator[FabricHandles]:
    made = Fabric.create(Topology(1, 2), 1 << 20)
    yield made
    for fd in (made.segment, *made.journals, *made.doorbells):
        os.close(fd)


class Box:
    """The supervisor's and the engines' ends, and a frontend's tracker between them."""

    def __init__(self, handles: FabricHandles) -> None:
        self.handles = handles
        self.topology = handles.topology
        self.table = Fabric(handles, -1, 0).table_writer()
        self.table.publish(self.topology.frontend(0), ProcessFacts(Life.UP, FRONTEND))
        self.tracker = Tracker(Fabric(handles, self.topology.frontend(0), FRONTEND), Config(max_queued=10))

    def engine(self, i: int, incarnation: int) -> Fabric:
        return Fabric(self.handles, self.topology.engine(i), incarnation)

    def appear(self, i: int, incarnation: int, *, crashed: int = 0) -> None:
        """Engine i is up and serves."""
        self.table.publish(self.topology.engine(i), ProcessFacts(Life.UP, incarnation, crashed=crashed))
        self.engine(i, incarnation).board().publish(encode(engine(incarnation=incarnation)))
        self.tracker.on_doorbell()

    def leave(self, i: int, incarnation: int, life: Life = Life.PARKED, *, crashed: int = 0) -> None:
        self.table.publish(self.topology.engine(i), ProcessFacts(life, incarnation, crashed=crashed))
        self.tracker.on_doorbell()

    def submit(self) -> Flight:
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
    box.table.publish(box.topology.engine(1), ProcessFacts(Life.PARKED, 1))
    box.leave(0, 1)
    for flight in flights:
        with pytest.raises(Lost, match="no engine is ready"):
            await flight.next()


@pytest.mark.parametrize("life", [Life.DEAD, Life.PARKED])
def test_a_crash_ends_its_requests(handles: FabricHandles, life: Life) -> None:
    """Also that of an engine which was to be parked, and so is not started again."""

    async def body() -> None:
        box = Box(handles)
        box.appear(0, 1)
        lost = box.submit()
        box.appear(1, 1)
        box.leave(0, 1, life, crashed=1)
        with pytest.raises(Lost, match="died"):
            await lost.next()
        assert box.starts(1, 1) == []

    asyncio.run(body())


@on_a_loop
async def test_a_life_that_was_parked_after_one_that_crashed_is_not_mistaken_for_it(box: Box) -> None:
    box.appear(0, 2, crashed=1)
    flight = box.submit()
    box.appear(1, 1)
    box.leave(0, 2, crashed=1)
    assert (flight.engine, flight.epoch) == (1, 2)


@on_a_loop
async def test_states_of_engines_have_the_operators_names(box: Box) -> None:
    assert box.tracker.engine_states() == ["absent", "absent"]
    box.appear(0, 1)
    box.appear(1, 1)
    box.engine(1, 1).board().publish(encode(engine(state=EngineState.PARKED)))
    assert box.tracker.engine_states() == ["serving", "parking"]
    box.leave(1, 1)
    assert box.tracker.engine_states() == ["serving", "parked"]
