"""Auto-scaling on real desired-state words, with engines that load slowly and boards that are out of date."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.config import Config
from daemon.control.policy.projection import emptied
from daemon.control.policy.scaling import Park, Wake
from daemon.ipc.fabric import FabricHandles
from daemon.ipc.messages import EngineFacts, EngineState
from tests.control.factories import engine_facts
from tests.control.harness import Coordinator
from tests.ipc.factories import fabric_handles

SERVING, DRAINING, PARKED = EngineState.SERVING, EngineState.DRAINING, EngineState.PARKED
SCALING = Config(min_engines=1, scale_period=10.0)


def busy(running: int, **fields: int) -> EngineFacts:
    return engine_facts(running=running, used_blocks=min(100, running), **fields)


def test_auto_scaling_is_off_by_default(handles: FabricHandles):
    coordinator = Coordinator(handles, Config(scale_period=0.0), *[engine_facts()] * 3)
    assert [coordinator.cycle(100.0) for _ in range(5)] == [[]] * 5
    assert coordinator.desired == [SERVING] * 3
    assert coordinator.orders() == []


def test_idle_engines_are_parked_one_per_period_down_to_the_minimum(handles: FabricHandles):
    coordinator = Coordinator(handles, SCALING, *[engine_facts()] * 3)
    taken = [action for _ in range(60) for action in coordinator.cycle(1.0)]
    assert taken == [Park(2), Park(1)]  # although the boards of these engines never changed
    assert coordinator.desired == [SERVING, PARKED, PARKED]
    assert coordinator.orders() == [("park", 2, "auto-scaling"), ("park", 1, "auto-scaling")]


def test_a_loading_engine_is_not_counted_as_missing(handles: FabricHandles):
    """Loading takes many periods: meanwhile no other engine is woken, neither for the load nor for the number."""
    parked = emptied(engine_facts(), PARKED)
    coordinator = Coordinator(handles, replace(SCALING, min_engines=2), busy(40), parked, parked)
    coordinator.order(1, PARKED)
    coordinator.order(2, PARKED)
    coordinator.orders()
    assert coordinator.cycle() == [Wake(1)]
    assert coordinator.orders() == [("wake", 1, "auto-scaling")]
    coordinator.up[1], coordinator.predecessors[1] = None, busy(50)
    assert [coordinator.cycle(1.0) for _ in range(60)] == [[]] * 60
    coordinator.up[0] = None  # a dead engine is missing
    assert coordinator.cycle() == [Wake(2)]


def test_the_last_serving_engine_is_not_parked_while_another_one_loads(handles: FabricHandles):
    coordinator = Coordinator(handles, SCALING, None, engine_facts())
    coordinator.predecessors[0] = engine_facts()
    assert [coordinator.cycle(1.0) for _ in range(30)] == [[]] * 30
    coordinator.up[0], coordinator.predecessors[0] = engine_facts(), None
    assert [action for _ in range(30) for action in coordinator.cycle(1.0)] == [Park(1)]


def test_an_engine_drained_by_an_operator_is_not_woken(handles: FabricHandles):
    parked = emptied(engine_facts(), PARKED)
    coordinator = Coordinator(handles, SCALING, busy(64), engine_facts(state=DRAINING), parked)
    coordinator.order(1, DRAINING)
    coordinator.order(2, DRAINING)  # it was parked before
    assert [coordinator.cycle(1.0) for _ in range(30)] == [[]] * 30
    assert coordinator.desired == [SERVING, DRAINING, DRAINING]


def test_a_new_coordinator_goes_on_where_its_predecessor_stopped(handles: FabricHandles):
    first = Coordinator(handles, SCALING, *[engine_facts()] * 3)
    while first.desired != [SERVING, SERVING, PARKED]:
        first.cycle(1.0)
    second = Coordinator(handles, SCALING, busy(64), busy(64), emptied(engine_facts(), PARKED))
    assert [action for _ in range(12) for action in second.cycle(1.0)] == [Wake(2)]


def test_an_action_is_logged_with_its_reason(handles: FabricHandles, caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO")
    coordinator = Coordinator(handles, replace(SCALING, max_engines=2), *[engine_facts()] * 3)
    assert coordinator.cycle() == [Park(2)]
    assert "engine 2 is parked" in caplog.text
    assert "1 to 2 engines" in caplog.text


loads = st.lists(st.tuples(st.floats(0, 15), st.lists(st.integers(0, 70), min_size=3, max_size=3)), max_size=20)


@given(script=loads, min_engines=st.integers(1, 3))
def test_at_least_one_engine_always_serves(script: list[tuple[float, list[int]]], min_engines: int):
    """Under any load, with engines that take one cycle to park and two to come back."""
    with fabric_handles(1, 3) as handles:
        coordinator = Coordinator(handles, replace(SCALING, min_engines=min_engines), *[engine_facts()] * 3)
        for seconds, running in script:
            coordinator.cycle(seconds)
            assert coordinator.desired.count(SERVING) >= min_engines
            assert any(
                facts is not None and facts.state == SERVING and desired == SERVING
                for facts, desired in zip(coordinator.up, coordinator.desired, strict=True)
            )
            _advance_engines(coordinator, running)


def _advance_engines(coordinator: Coordinator, running: Sequence[int]) -> None:
    """Take each engine one cycle towards its desired state."""
    for i, (desired, n) in enumerate(zip(coordinator.desired, running, strict=True)):
        facts = coordinator.up[i]
        if facts is None:
            coordinator.up[i], coordinator.predecessors[i] = busy(n, state=desired), None
        elif desired == PARKED:
            coordinator.up[i] = emptied(facts, PARKED)
        elif facts.state == PARKED:
            coordinator.up[i], coordinator.predecessors[i] = None, facts
        else:
            coordinator.up[i] = busy(n)
