"""Wishes: what was never written, what survives, and who is left to serve."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.ipc.desired_state import DesiredStateReader, DesiredStateWriter, served_without
from daemon.ipc.fabric import COORDINATOR, Fabric, FabricHandles
from daemon.ipc.messages import EngineFacts, EngineState
from tests.control.factories import engine

SERVING, DRAINING, PARKED = EngineState.SERVING, EngineState.DRAINING, EngineState.PARKED
wishable = st.sampled_from([SERVING, DRAINING, PARKED])


def desired_states(*states: EngineState) -> DesiredStateWriter:
    writer = DesiredStateWriter(memoryview(bytearray(8 * len(states))))
    for i, state in enumerate(states):
        writer.put(i, state)
    return writer


def test_everybody_is_wished_serving_until_something_is_written(handles: FabricHandles):
    reader = DesiredStateReader(Fabric(handles, handles.topology.engine(1), 1).desired_states())
    assert [reader.of(i) for i in range(3)] == [SERVING] * 3


def test_a_wish_outlives_its_writer_and_reaches_every_life_of_its_engine(handles: FabricHandles):
    DesiredStateWriter(Fabric(handles, COORDINATOR, 1).desired_states()).put(1, DRAINING)
    DesiredStateWriter(Fabric(handles, COORDINATOR, 2).desired_states()).put(2, PARKED)
    for incarnation in (1, 2):
        reader = DesiredStateReader(Fabric(handles, handles.topology.engine(1), incarnation).desired_states())
        assert [reader.of(i) for i in range(3)] == [SERVING, DRAINING, PARKED]


@given(st.lists(st.tuples(st.integers(0, 4), wishable), max_size=20))
def test_each_engine_has_the_last_wish_for_it(script: list[tuple[int, EngineState]]):
    writer = desired_states(*[SERVING] * 5)
    for i, state in script:
        writer.put(i, state)
    expected = dict.fromkeys(range(5), SERVING) | dict(script)
    assert {i: writer.of(i) for i in range(5)} == expected


@pytest.mark.parametrize("state", [EngineState.STARTING, EngineState.LOADING])
def test_nobody_is_wished_in_a_state_that_only_comes_about(state: EngineState):
    with pytest.raises(ValueError, match=state.name.lower()):
        desired_states(SERVING).put(0, state)


def test_who_serves_must_also_be_wished_to():
    """Boards lag: of two engines ordered away in a row, the second must not be thought replaced by the first."""
    facts: list[EngineFacts | None] = [engine(), engine(), None, engine(state=DRAINING)]
    assert served_without(0, facts, desired_states(SERVING, SERVING, SERVING, SERVING))
    assert not served_without(0, facts, desired_states(SERVING, PARKED, SERVING, SERVING))
    assert not served_without(0, [engine(), None, None, None], desired_states(*[SERVING] * 4))
