"""Auto-scaling carried out: over real wish words, with engines that load for long and boards that lag."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.config import Config
from daemon.control.autoscaler import Autoscaler
from daemon.control.policy.projection import emptied, outlook
from daemon.control.policy.scaling import Action, Park, Wake
from daemon.control.rebalancer import Rebalancer, Refusal
from daemon.ipc.fabric import COORDINATOR, Fabric, FabricHandles, Topology
from daemon.ipc.messages import EngineFacts, EngineState
from tests.control.factories import engine

SERVING, DRAINING, PARKED = EngineState.SERVING, EngineState.DRAINING, EngineState.PARKED
SCALING = Config(min_engines=1, scale_period=10.0)
Facts = list[EngineFacts | None]


class Box:
    """Coordinator's objects over a real fabric. `up[i]` is what engine i publishes; of one that loads
    `loading[i]` is what its predecessor did."""

    def __init__(self, handles: FabricHandles, config: Config, *up: EngineFacts | None) -> None:
        fabric = Fabric(handles, COORDINATOR, 1)
        self.up: Facts = list(up)
        self.loading: Facts = [None] * len(up)
        self.rebalancer = Rebalancer(fabric, config)
        self.autoscaler = Autoscaler(
            self.rebalancer.desired_states, self.rebalancer.set_desired_state, config, len(up)
        )
        self.now = 0.0

    @property
    def wished(self) -> list[EngineState]:
        return [self.rebalancer.desired_states.of(i) for i in range(len(self.up))]

    def cycle(self, seconds: float = 0.0) -> list[Action]:
        self.now += seconds
        return self.autoscaler.cycle(self.up, outlook(self.up, self.loading, self.wished), self.now)


def busy(running: int, **fields: int) -> EngineFacts:
    return engine(running=running, used_blocks=min(100, running), **fields)


# -- scaling ---------------------------------------------------------------------------------------------


def test_it_is_off_unless_asked_for(handles: FabricHandles):
    box = Box(handles, Config(scale_period=0.0), engine(), engine(), engine())
    assert [box.cycle(100.0) for _ in range(5)] == [[]] * 5
    assert box.wished == [SERVING] * 3


def test_idle_engines_are_parked_one_a_period_down_to_the_least(handles: FabricHandles):
    box = Box(handles, SCALING, engine(), engine(), engine())
    done = [action for _ in range(60) for action in box.cycle(1.0)]
    assert done == [Park(2), Park(1)]  # though their boards never said that they had heard it
    assert box.wished == [SERVING, PARKED, PARKED]


def test_one_that_loads_is_not_taken_for_missing(handles: FabricHandles):
    """Loading takes many periods: nobody else is woken meanwhile, for load nor for number."""
    asleep = emptied(engine(), PARKED)
    box = Box(handles, replace(SCALING, min_engines=2), busy(40), asleep, asleep)
    box.rebalancer.set_desired_state(1, PARKED)
    box.rebalancer.set_desired_state(2, PARKED)
    assert box.cycle() == [Wake(1)]
    box.up[1], box.loading[1] = None, busy(50)
    assert [box.cycle(1.0) for _ in range(60)] == [[]] * 60
    box.up[0] = None  # but one that has died is
    assert box.cycle() == [Wake(2)]


def test_the_last_that_answers_stays_though_another_loads(handles: FabricHandles):
    box = Box(handles, SCALING, None, engine())
    box.loading[0] = engine()
    assert [box.cycle(1.0) for _ in range(30)] == [[]] * 30
    box.up[0], box.loading[0] = engine(), None
    assert [action for _ in range(30) for action in box.cycle(1.0)] == [Park(1)]


def test_a_drain_by_an_operator_is_left_alone(handles: FabricHandles):
    box = Box(handles, SCALING, busy(64), engine(state=DRAINING), emptied(engine(), PARKED))
    box.rebalancer.set_desired_state(1, DRAINING)
    box.rebalancer.set_desired_state(2, DRAINING)  # parked before
    assert [box.cycle(1.0) for _ in range(30)] == [[]] * 30
    assert box.wished == [SERVING, DRAINING, DRAINING]


def test_a_new_coordinator_goes_on(handles: FabricHandles):
    first = Box(handles, SCALING, engine(), engine(), engine())
    while first.wished != [SERVING, SERVING, PARKED]:
        first.cycle(1.0)
    second = Box(handles, SCALING, busy(64), busy(64), emptied(engine(), PARKED))
    assert [action for _ in range(12) for action in second.cycle(1.0)] == [Wake(2)]


def test_what_it_did_is_logged_with_its_reason(handles: FabricHandles, caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO")
    box = Box(handles, replace(SCALING, max_engines=2), engine(), engine(), engine())
    assert box.cycle() == [Park(2)]
    assert "engine 2 is parked" in caplog.text
    assert "1 to 2 engines" in caplog.text


loads = st.lists(st.tuples(st.floats(0, 15), st.lists(st.integers(0, 70), min_size=3, max_size=3)), max_size=20)


@given(script=loads, least=st.integers(1, 3))
def test_somebody_always_serves(script: list[tuple[float, list[int]]], least: int):
    """Whatever the load, with engines that take a cycle to sleep and two to come back."""
    handles = Fabric.create(Topology(1, 3), 1 << 20)
    try:
        box = Box(handles, replace(SCALING, min_engines=least), engine(), engine(), engine())
        for seconds, running in script:
            box.cycle(seconds)
            assert box.wished.count(SERVING) >= least
            assert any(
                f is not None and f.state == SERVING and wanted == SERVING
                for f, wanted in zip(box.up, box.wished, strict=True)
            )
            _come_about(box, running)
    finally:
        for fd in (handles.segment, *handles.journals, *handles.doorbells):
            os.close(fd)


def _come_about(box: Box, running: Sequence[int]) -> None:
    for i, (wanted, n) in enumerate(zip(box.wished, running, strict=True)):
        facts = box.up[i]
        if facts is None:
            box.up[i], box.loading[i] = busy(n, state=wanted), None
        elif wanted == PARKED:
            box.up[i] = emptied(facts, PARKED)
        elif facts.state == PARKED:
            box.up[i], box.loading[i] = None, facts
        else:
            box.up[i] = busy(n)


# -- operators ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", [DRAINING, PARKED])
def test_the_last_that_serves_is_kept(handles: FabricHandles, state: EngineState):
    box = Box(handles, Config(), engine(), engine(), None)
    box.rebalancer.set_state(box.up, 0, state)
    with pytest.raises(Refusal, match="engine 1 is the last"):
        box.rebalancer.set_state(box.up, 1, state)  # though engine 0's board still says that it serves
    assert box.wished == [state, SERVING, SERVING]
    box.rebalancer.set_state([engine(state=DRAINING), None, None], 0, PARKED)  # who drains already serves nobody
    assert box.wished == [PARKED, SERVING, SERVING]


def test_orders_to_nobody_are_refused(handles: FabricHandles):
    box = Box(handles, Config(), engine(), engine(), None)
    for number, state in ((3, SERVING), (-1, SERVING), (3, PARKED), (2, PARKED), (2, DRAINING)):
        with pytest.raises(Refusal, match=f"no engine {number}"):
            box.rebalancer.set_state(box.up, number, state)
    assert box.wished == [SERVING] * 3


# -- the outlook ---------------------------------------------------------------------------------------------

some = st.none() | st.builds(
    engine,
    running=st.integers(0, 9),
    waiting=st.integers(0, 9),
    used_blocks=st.integers(0, 99),
    pending_prefill_tokens=st.integers(0, 999),
    state=st.sampled_from([SERVING, DRAINING, PARKED]),
)


@given(st.lists(st.tuples(some, some, st.sampled_from([SERVING, DRAINING, PARKED])), max_size=5))
def test_outlook_has_every_engine_as_wished(rows: list[tuple[EngineFacts | None, EngineFacts | None, EngineState]]):
    facts, starting, desired_states = ([row[k] for row in rows] for k in range(3))
    for found, (now, last, set_desired_state) in zip(outlook(facts, starting, desired_states), rows, strict=True):
        if found is None:
            assert now is None and last is None
            continue
        assert found.state == set_desired_state
        if now is not None:
            assert (found.running, found.used_blocks) == (now.running, now.used_blocks)
        else:
            assert not (found.running or found.waiting or found.used_blocks or found.pending_prefill_tokens)
            assert last is not None and found.total_blocks == last.total_blocks


def test_an_emptied_engine_holds_nothing():
    """Every field is either one of the engine's make and pace, or 0."""
    full = EngineFacts(**{name: 7 for name in EngineFacts.__struct_fields__} | {"consumed": [], "kv_format": "x"})
    left = {name for name in EngineFacts.__struct_fields__ if getattr(emptied(full, PARKED), name) == 7}
    assert left == {
        *("incarnation", "step", "time", "block_size", "total_blocks", "max_num_seqs", "max_model_len"),
        *("step_seconds", "knee", "ideal_tokens", "measured_knee", "measured_ideal_tokens", "make"),
    }
