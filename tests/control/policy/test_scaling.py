"""Scaling: when engines are woken and parked, which, and that the number never leaves its range."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.control.policy.freeness import POLICIES, Policy
from daemon.control.policy.scaling import Action, Park, ScalingRules, ScalingState, Wake, average, decide
from daemon.ipc.messages import EngineFacts, EngineState
from tests.control.factories import engine

PERIOD = 10.0
PARKED, SERVING, DRAINING = EngineState.PARKED, EngineState.SERVING, EngineState.DRAINING
each_policy = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)


def busy(running: int, used: int = 0, **fields: int) -> EngineFacts:
    """1600 tokens of memory, a knee of 64."""
    return engine(running=running, used_blocks=used, **fields)


def config(**changes: object) -> ScalingRules:
    return ScalingRules(**({"max_engines": 8, "low": 48, "high": 192, "period": PERIOD} | changes))


def settle(facts: list[EngineFacts | None], settings: ScalingRules) -> list[Action]:
    """What is done once these facts have lasted a period; nothing may be done before."""
    actions, state = decide(facts, ScalingState(), 100.0, settings)
    assert actions == []
    actions, state = decide(facts, state, 100.0 + PERIOD - 0.1, settings)
    assert actions == []
    actions, state = decide(facts, state, 100.0 + PERIOD, settings)
    assert state == ScalingState() or not actions
    return actions


# -- the average ---------------------------------------------------------------------------------


@each_policy
def test_average_pools_room_over_requests(policy: Policy):
    engines = {0: busy(4, 40), 1: busy(16, 60), 2: busy(0)}
    spare = {"artifact": 3}.get(policy.name, 0)  # its watermark: a hundredth of each engine
    assert average(engines, {0, 1, 2}, policy) == (300 - spare - 100) * 16 / 20
    assert average(engines, {0, 1}, policy) == (200 - spare * 2 / 3 - 100) * 16 / 20
    assert average(engines, {1}, policy) == (100 - spare / 3 - 100) * 16 / 20  # the load of 0 goes to 1
    assert average({2: busy(0)}, {2}, policy) == math.inf


def test_average_takes_the_scarcer_resource():
    large = {"total_blocks": 62_500}
    assert average({0: engine(**large, running=32), 1: engine(**large)}, {0, 1}) == (128 - 32) * 64 / 32


@each_policy
@given(running=st.integers(1, 40), used=st.integers(0, 100), high=st.integers(1, 9))
def test_average_has_no_headroom(policy: Policy, running: int, used: int, high: int):
    plain, urgent = busy(running, used), busy(running, used, high_running=min(high, running))
    assert average({0: plain, 1: busy(3, 9)}, {0, 1}, policy) == average({0: urgent, 1: busy(3, 9)}, {0, 1}, policy)


# -- up ------------------------------------------------------------------------------------------


def test_wakes_as_many_as_it_takes():
    asleep = engine(state=PARKED)
    assert settle([busy(20, 60), asleep, asleep, asleep], config()) == [Wake(1)]  # then (200 - 60) * 16 / 20
    assert settle([busy(60, 90), asleep, asleep, asleep], config()) == [Wake(1), Wake(2)]
    assert settle([busy(60, 90), asleep, asleep], config(max_engines=2)) == [Wake(1)]
    assert settle([busy(60, 90)], config()) == []
    assert settle([busy(20, 20), asleep], config()) == []


def test_a_running_drain_is_called_off_first():
    facts = [busy(20, 80), engine(state=PARKED), busy(2, 5, state=PARKED), busy(5, 5, state=PARKED)]
    assert settle(facts, config()) == [Wake(3)]
    assert settle([busy(60, 90), *facts[1:]], config()) == [Wake(3), Wake(2), Wake(1)]


def test_what_an_operator_drains_is_not_woken():
    assert settle([busy(60, 90), busy(2, state=DRAINING), None], config()) == []


# -- down ----------------------------------------------------------------------------------------


def test_parks_the_engine_with_the_fewest_running():
    assert settle([busy(4, 5), busy(1, 2), busy(2, 2)], config()) == [Park(1)]
    assert settle([busy(4, 5), busy(0), busy(0)], config()) == [Park(2)]


def test_parks_only_what_the_others_can_do_without():
    facts = [busy(6, 10), busy(5, 10)]
    assert average(dict(enumerate(facts)), {0, 1}) > 192  # all together have plenty
    assert average(dict(enumerate(facts)), {0}) < 192
    assert settle(facts, config()) == []
    assert settle([busy(0), busy(0)], config(min_engines=2)) == []


# -- time and range --------------------------------------------------------------------------------


def test_a_mark_must_be_passed_without_a_break():
    short, fine = [busy(30, 90), engine(state=PARKED)], [busy(4, 40), engine(state=PARKED)]
    state = ScalingState()
    for now, facts in ((0.0, short), (9.0, short), (9.5, fine), (10.0, short), (19.9, short)):
        actions, state = decide(facts, state, now, config())
        assert actions == []
    actions, state = decide(short, state, 20.0, config())
    assert actions == [Wake(1)]
    assert decide(short, state, 20.1, config())[0] == []  # and a whole period until the next


def test_too_few_or_too_many_are_put_right_at_once():
    asleep = engine(state=PARKED)
    assert decide([None, asleep, asleep], ScalingState(), 0.0, config()) == ([Wake(1)], ScalingState())
    assert decide([None, asleep], ScalingState(), 0.0, config(min_engines=2))[0] == [Wake(1)]
    assert decide([None, None], ScalingState(), 0.0, config())[0] == []
    assert decide([busy(3), busy(2), busy(9)], ScalingState(), 0.0, config(max_engines=2))[0] == [Park(1)]


steps = st.lists(
    st.tuples(st.floats(0, 12), st.lists(st.tuples(st.integers(0, 70), st.integers(0, 100)), min_size=6, max_size=6)),
    max_size=25,
)


@each_policy
@given(st.integers(1, 6), st.integers(0, 5), st.integers(1, 6), steps)
def test_the_number_never_leaves_its_range(policy: Policy, least: int, more: int, start: int, script):
    """Whatever the load does; a number outside at the start is brought inside and stays there."""
    most = min(6, least + more)
    settings = ScalingRules(max_engines=most, min_engines=least, policy=policy, low=48, high=192, period=PERIOD)
    states = [SERVING] * start + [PARKED] * (6 - start)
    state, now = ScalingState(), 0.0
    inside = least <= start <= most
    for seconds, loads in script:
        now += seconds
        facts = [busy(n, used, state=s) for (n, used), s in zip(loads, states, strict=True)]
        actions, state = decide(facts, state, now, settings)
        assert sum(isinstance(a, Park) for a in actions) <= 1
        for action in actions:
            assert states[action.engine] == (PARKED if isinstance(action, Wake) else SERVING)
            states[action.engine] = SERVING if isinstance(action, Wake) else PARKED
        inside = inside or least <= states.count(SERVING) <= most
        assert not inside or least <= states.count(SERVING) <= most


@each_policy
@given(total=st.integers(0, 300), start=st.integers(1, 6))
def test_a_steady_load_comes_to_rest(policy: Policy, total: int, start: int):
    """With its requests spread evenly over who serves, no engine is parked and woken by turns."""
    settings = ScalingRules(max_engines=6, policy=policy, low=48, high=192, period=PERIOD)
    states, state, kinds = [SERVING] * start + [PARKED] * (6 - start), ScalingState(), set()
    for step in range(40):
        serving = states.count(SERVING)
        facts = []
        for i, s in enumerate(states):
            rank = states[:i].count(SERVING)
            n = total // serving + (rank < total % serving) if s == SERVING else 0
            facts.append(engine(total_blocks=300, state=s, running=n, used_blocks=3 * n))
        actions, state = decide(facts, state, step * PERIOD, settings)
        kinds |= {type(a) for a in actions}
        for action in actions:
            states[action.engine] = SERVING if isinstance(action, Wake) else PARKED
    assert len(kinds) <= 1
    assert actions == []


def test_impossible_settings_are_refused():
    for changes in ({"low": 200}, {"min_engines": 0}, {"min_engines": 9}, {"high": math.nan}):
        with pytest.raises(ValueError, match=r"mark|range"):
            config(**changes)
