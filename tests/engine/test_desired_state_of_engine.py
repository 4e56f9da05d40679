"""An engine heeds its wish, the one that stands when it begins included."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from daemon.engine.standing import Standing
from daemon.ipc.desired_state import DesiredStateWriter
from daemon.ipc.fabric import COORDINATOR, Fabric
from daemon.ipc.messages import EngineState
from tests.engine.loopback import ENGINE_INCARNATION, Lane


@pytest.fixture
def lane() -> Iterator[Lane]:
    made = Lane()
    yield made
    made.close()


def test_it_does_as_wished_until_wished_otherwise(lane: Lane):
    fabric = Fabric(lane.handles, lane.engine_process, ENGINE_INCARNATION)
    desired_states = DesiredStateWriter(Fabric(lane.handles, COORDINATOR, 1).desired_states())
    standing, progress = Standing(fabric, lane.llumlet), fabric.progress(lane.engine_process)
    standing.apply()  # it serves where nobody has wished anything
    assert (standing.state, progress.state) == (EngineState.SERVING, EngineState.SERVING)
    assert lane.llumlet.accepting
    for state in (EngineState.DRAINING, EngineState.PARKED, EngineState.SERVING):
        desired_states.put(0, state)
        standing.apply()
        assert (standing.state, progress.state) == (state, state)
        assert progress.incarnation == ENGINE_INCARNATION
        assert lane.llumlet.accepting == (state == EngineState.SERVING)


def test_a_successor_begins_as_its_predecessor_was_wished(lane: Lane):
    DesiredStateWriter(Fabric(lane.handles, COORDINATOR, 1).desired_states()).put(0, EngineState.DRAINING)
    standing = Standing(Fabric(lane.handles, lane.engine_process, ENGINE_INCARNATION + 1), lane.llumlet)
    standing.apply()
    assert standing.state == EngineState.DRAINING
    assert not lane.llumlet.accepting
