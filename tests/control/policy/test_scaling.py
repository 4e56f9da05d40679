"""Scaling: which engines are woken and parked and when, and the range of the number of serving engines."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.control.policy.freeness import POLICIES, Policy
from daemon.control.policy.scaling import Action, Park, ScalingRules, ScalingState, Wake, average_freeness, decide
from daemon.ipc.messages import EngineFacts, EngineState
from tests.control.factories import engine_facts

PERIOD = 10.0
PARKED, SERVING, DRAINING = EngineState.PARKED, EngineState.SERVING, EngineState.DRAINING
each_policy = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)


def busy(running: int, used: int = 0, **fields: int) -> EngineFacts:
    """Return the facts of an engine with 1600 tokens of memory and a knee of 64."""
    return engine_facts(running=running, used_blocks=used, **fields)


def rules(**changes: object) -> ScalingRules:
    return ScalingRules(**({"max_engines": 8, "low": 48, "high": 192, "period": PERIOD} | changes))


def settle(facts: list[EngineFacts | None], scaling: ScalingRules) -> list[Action]:
    """Return the actions once these facts have lasted a period. No action may be taken before."""
    actions, state = decide(facts, ScalingState(), 100.0, scaling)
    assert actions == []
    actions, state = decide(facts, state, 100.0 + PERIOD - 0.1, scaling)
    assert actions == []
    actions, state = decide(facts, state, 100.0 + PERIOD, scaling)
    assert state == ScalingState() or not actions
    return actions


# -- the average ---------------------------------------------------------------------------------


@each_policy
def test_the_average_pools_room_and_requests(policy: Policy):
    engines = {0: busy(4, 40), 1: busy(16, 60), 2: busy(0)}
    watermark = {"artifact": 3}.get(policy.name, 0)  # blocks: a hundredth of each engine
    assert average_freeness(engines, {0, 1, 2}, policy) == (300 - watermark - 100) * 16 / 20
    assert average_freeness(engines, {0, 1}, policy) == (200 - watermark * 2 / 3 - 100) * 16 / 20
    assert average_freeness(engines, {1}, policy) == (100 - watermark / 3 - 100) * 16 / 20  # the load of 0 moves to 1
    assert average_freeness({2: busy(0)}, {2}, policy) == math.inf


def test_the_average_is_that_of_the_scarcer_resource():
    large = {"total_blocks": 62_500}
    engines = {0: engine_facts(**large, running=32), 1: engine_facts(**large)}
    assert average_freeness(engines, {0, 1}) == (128 - 32) * 64 / 32


@each_policy
@given(running=st.integers(1, 40), used=st.integers(0, 100), high=st.integers(1, 9))
def test_the_average_ignores_headroom(policy: Policy, running: int, used: int, high: int):
    plain, urgent = busy(running, used), busy(running, used, high_running=min(high, running))
    averages = [average_freeness({0: facts, 1: busy(3, 9)}, {0, 1}, policy) for facts in (plain, urgent)]
    assert averages[0] == averages[1]


# -- waking ------------------------------------------------------------------------------------------


def test_as_many_engines_are_woken_as_the_average_needs():
    parked = engine_facts(state=PARKED)
    assert settle([busy(20, 60), parked, parked, parked], rules()) == [
        Wake(1)
    ]  # the average becomes (200 - 60) * 16 / 20
    assert settle([busy(60, 90), parked, parked, parked], rules()) == [Wake(1), Wake(2)]
    assert settle([busy(60, 90), parked, parked], rules(max_engines=2)) == [Wake(1)]
    assert settle([busy(60, 90)], rules()) == []
    assert settle([busy(20, 20), parked], rules()) == []


def test_parked_engines_that_still_drain_are_woken_first():
    facts = [busy(20, 80), engine_facts(state=PARKED), busy(2, 5, state=PARKED), busy(5, 5, state=PARKED)]
    assert settle(facts, rules()) == [Wake(3)]
    assert settle([busy(60, 90), *facts[1:]], rules()) == [Wake(3), Wake(2), Wake(1)]


def test_an_engine_drained_by_an_operator_is_not_woken():
    assert settle([busy(60, 90), busy(2, state=DRAINING), None], rules()) == []


# -- parking ----------------------------------------------------------------------------------------


def test_the_engine_with_the_fewest_running_requests_is_parked():
    assert settle([busy(4, 5), busy(1, 2), busy(2, 2)], rules()) == [Park(1)]
    assert settle([busy(4, 5), busy(0), busy(0)], rules()) == [Park(2)]


def test_no_engine_is_parked_that_the_others_cannot_spare():
    facts = [busy(6, 10), busy(5, 10)]
    assert average_freeness(dict(enumerate(facts)), {0, 1}) > 192  # together they are far above the threshold
    assert average_freeness(dict(enumerate(facts)), {0}) < 192
    assert settle(facts, rules()) == []
    assert settle([busy(0), busy(0)], rules(min_engines=2)) == []


# -- time and range --------------------------------------------------------------------------------


def test_the_average_must_stay_beyond_a_threshold_without_a_break():
    low, normal = [busy(30, 90), engine_facts(state=PARKED)], [busy(4, 40), engine_facts(state=PARKED)]
    state = ScalingState()
    for now, facts in ((0.0, low), (9.0, low), (9.5, normal), (10.0, low), (19.9, low)):
        actions, state = decide(facts, state, now, rules())
        assert actions == []
    actions, state = decide(low, state, 20.0, rules())
    assert actions == [Wake(1)]
    assert decide(low, state, 20.1, rules())[0] == []  # a full period passes before the next action


def test_a_number_outside_the_range_is_corrected_at_once():
    parked = engine_facts(state=PARKED)
    assert decide([None, parked, parked], ScalingState(), 0.0, rules()) == ([Wake(1)], ScalingState())
    assert decide([None, parked], ScalingState(), 0.0, rules(min_engines=2))[0] == [Wake(1)]
    assert decide([None, None], ScalingState(), 0.0, rules())[0] == []
    assert decide([busy(3), busy(2), busy(9)], ScalingState(), 0.0, rules(max_engines=2))[0] == [Park(1)]


steps = st.lists(
    st.tuples(st.floats(0, 12), st.lists(st.tuples(st.integers(0, 70), st.integers(0, 100)), min_size=6, max_size=6)),
    max_size=25,
)


@each_policy
@given(st.integers(1, 6), st.integers(0, 5), st.integers(1, 6), steps)
def test_the_number_never_leaves_its_range(policy: Policy, min_engines: int, more: int, start: int, script):
    """Under any load. A number outside the range at the start is brought inside and stays there."""
    max_engines = min(6, min_engines + more)
    scaling = ScalingRules(
        max_engines=max_engines, min_engines=min_engines, policy=policy, low=48, high=192, period=PERIOD
    )
    states = [SERVING] * start + [PARKED] * (6 - start)
    state, now = ScalingState(), 0.0
    inside = min_engines <= start <= max_engines
    for seconds, loads in script:
        now += seconds
        facts = [busy(n, used, state=s) for (n, used), s in zip(loads, states, strict=True)]
        actions, state = decide(facts, state, now, scaling)
        assert sum(isinstance(a, Park) for a in actions) <= 1
        for action in actions:
            assert states[action.engine] == (PARKED if isinstance(action, Wake) else SERVING)
            states[action.engine] = SERVING if isinstance(action, Wake) else PARKED
        inside = inside or min_engines <= states.count(SERVING) <= max_engines
        assert not inside or min_engines <= states.count(SERVING) <= max_engines


@each_policy
@given(total=st.integers(0, 300), start=st.integers(1, 6))
def test_a_steady_load_reaches_a_steady_number_of_engines(policy: Policy, total: int, start: int):
    """With requests spread evenly over the serving engines, no engine is parked and woken in turn."""
    scaling = ScalingRules(max_engines=6, policy=policy, low=48, high=192, period=PERIOD)
    states, state, kinds = [SERVING] * start + [PARKED] * (6 - start), ScalingState(), set()
    for step in range(40):
        serving = states.count(SERVING)
        facts = []
        for i, s in enumerate(states):
            rank = states[:i].count(SERVING)
            n = total // serving + (rank < total % serving) if s == SERVING else 0
            facts.append(engine_facts(total_blocks=300, state=s, running=n, used_blocks=3 * n))
        actions, state = decide(facts, state, step * PERIOD, scaling)
        kinds |= {type(a) for a in actions}
        for action in actions:
            states[action.engine] = SERVING if isinstance(action, Wake) else PARKED
    assert len(kinds) <= 1
    assert actions == []


def test_impossible_rules_are_refused():
    for changes in ({"low": 200}, {"min_engines": 0}, {"min_engines": 9}, {"high": math.nan}):
        with pytest.raises(ValueError, match=r"threshold|range"):
            rules(**changes)
