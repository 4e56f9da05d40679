"""Desired states: what an operator may order, and what setting a state does."""

from __future__ import annotations

import os

import pytest

from daemon.config import Config
from daemon.control.refusal import Refusal
from daemon.ipc.fabric import Fabric, FabricHandles
from daemon.ipc.messages import EngineState
from tests.control.factories import engine_facts
from tests.control.harness import Coordinator

SERVING, DRAINING, PARKED = EngineState.SERVING, EngineState.DRAINING, EngineState.PARKED


def test_setting_a_state_stores_it_rings_the_engine_and_writes_an_event(handles: FabricHandles):
    coordinator = Coordinator(handles, Config(), *[engine_facts()] * 3)
    bell = Fabric(handles, handles.topology.engine(1), 1).bell
    for state, action in ((DRAINING, "drain"), (PARKED, "park"), (SERVING, "wake")):
        coordinator.desired_states.set(1, state, by="a test")
        assert coordinator.desired == [SERVING, state, SERVING]
        assert int.from_bytes(os.read(bell, 8), "little") == 1
        assert coordinator.orders() == [(action, 1, "a test")]


def test_the_event_has_the_action_that_the_operator_used(handles: FabricHandles):
    coordinator = Coordinator(handles, Config(), *[engine_facts()] * 3)
    coordinator.order(2, SERVING, action="undrain")
    assert coordinator.orders() == [("undrain", 2, "an operator")]


@pytest.mark.parametrize("state", [DRAINING, PARKED])
def test_the_last_serving_engine_cannot_be_drained_or_parked(handles: FabricHandles, state: EngineState):
    coordinator = Coordinator(handles, Config(), engine_facts(), engine_facts(), None)
    coordinator.order(0, state)
    with pytest.raises(Refusal, match="engine 1 is the last that serves"):
        coordinator.order(1, state)  # although the board of engine 0 still has it serving
    assert coordinator.desired == [state, SERVING, SERVING]
    coordinator.up = [engine_facts(state=DRAINING), None, None]
    coordinator.order(0, PARKED)  # a draining engine serves no new requests anyway
    assert coordinator.desired == [PARKED, SERVING, SERVING]


def test_orders_for_engines_that_do_not_exist_are_refused(handles: FabricHandles):
    coordinator = Coordinator(handles, Config(), engine_facts(), engine_facts(), None)
    for engine, state in ((3, SERVING), (-1, SERVING), (3, PARKED), (-1, DRAINING)):
        with pytest.raises(Refusal, match=f"no engine {engine}"):
            coordinator.order(engine, state)
    assert coordinator.desired == [SERVING] * 3
    assert coordinator.orders() == []


@pytest.mark.parametrize("state", [DRAINING, PARKED])
def test_an_engine_that_is_down_may_be_drained_or_parked_while_another_serves(
    handles: FabricHandles, state: EngineState
):
    """Otherwise an engine that dies at each start could never be parked."""
    coordinator = Coordinator(handles, Config(), None, engine_facts(), None)
    coordinator.order(2, state)
    assert coordinator.desired == [SERVING, SERVING, state]
    coordinator.up = [None, None, None]
    with pytest.raises(Refusal, match="no engine serves"):
        coordinator.order(0, state)
