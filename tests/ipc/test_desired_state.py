"""Desired states: their default, their lifetime, and which engines will go on serving."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.ipc.desired_state import DesiredStateReader, DesiredStateWriter, served_without
from daemon.ipc.fabric import COORDINATOR, Fabric, FabricHandles
from daemon.ipc.messages import EngineFacts, EngineState
from tests.control.factories import engine_facts

SERVING, DRAINING, PARKED = EngineState.SERVING, EngineState.DRAINING, EngineState.PARKED
desirable = st.sampled_from([SERVING, DRAINING, PARKED])


def desired_states(*states: EngineState) -> DesiredStateWriter:
    writer = DesiredStateWriter(memoryview(bytearray(8 * len(states))))
    for i, state in enumerate(states):
        writer.put(i, state)
    return writer


def test_every_engine_is_desired_serving_until_a_state_is_written(handles: FabricHandles):
    reader = DesiredStateReader(Fabric(handles, handles.topology.engine(1), 1).desired_states())
    assert [reader.of(i) for i in range(3)] == [SERVING] * 3


def test_a_desired_state_outlives_its_writer_and_reaches_every_incarnation_of_its_engine(handles: FabricHandles):
    DesiredStateWriter(Fabric(handles, COORDINATOR, 1).desired_states()).put(1, DRAINING)
    DesiredStateWriter(Fabric(handles, COORDINATOR, 2).desired_states()).put(2, PARKED)
    for incarnation in (1, 2):
        reader = DesiredStateReader(Fabric(handles, handles.topology.engine(1), incarnation).desired_states())
        assert [reader.of(i) for i in range(3)] == [SERVING, DRAINING, PARKED]


@given(st.lists(st.tuples(st.integers(0, 4), desirable), max_size=20))
def test_each_engine_has_the_last_state_written_for_it(script: list[tuple[int, EngineState]]):
    writer = desired_states(*[SERVING] * 5)
    for i, state in script:
        writer.put(i, state)
    expected = dict.fromkeys(range(5), SERVING) | dict(script)
    assert {i: writer.of(i) for i in range(5)} == expected


@pytest.mark.parametrize("state", [EngineState.STARTING, EngineState.LOADING])
def test_a_state_that_an_engine_only_passes_through_cannot_be_desired(state: EngineState):
    with pytest.raises(ValueError, match=state.name.lower()):
        desired_states(SERVING).put(0, state)


def test_an_engine_counts_as_serving_only_if_it_is_also_desired_serving():
    """Boards lag: when two engines are parked in a row, the first must not count as a replacement of the second."""
    facts: list[EngineFacts | None] = [engine_facts(), engine_facts(), None, engine_facts(state=DRAINING)]
    assert served_without(0, facts, desired_states(SERVING, SERVING, SERVING, SERVING))
    assert not served_without(0, facts, desired_states(SERVING, PARKED, SERVING, SERVING))
    assert not served_without(0, [engine_facts(), None, None, None], desired_states(*[SERVING] * 4))
