"""Load and dispatch: the formulas by worked examples, and what must hold for any facts."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.control.policy.dispatch import choose, in_flight
from daemon.control.policy.freeness import LLUMD, NOTHING, POLICIES, InFlight, Policy, virtual_usage
from daemon.ipc.messages import Demand, EngineFacts, EngineState
from tests.control.factories import engine, frontend

# -- load --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("facts", "flying", "usage", "free"),
    [
        (engine(), NOTHING, 0, math.inf),
        (engine(used_blocks=40, running=4), NOTHING, 40, 60 * 16 / 4),
        (engine(used_blocks=40, running=4, waiting=2, head_demand_blocks=30), NOTHING, 70, 30 * 16 / 6),
        (engine(used_blocks=40, running=4), InFlight(1, 160), 50, 50 * 16 / 5),
        (engine(), InFlight(2, 320), 20, 80 * 16 / 2),
        (engine(used_blocks=90, running=9, waiting=1, head_demand_blocks=30), NOTHING, 120, -20 * 16),
        (engine(state=EngineState.DRAINING), NOTHING, math.inf, -math.inf),
        (engine(state=EngineState.DRAINING, running=3, used_blocks=9), NOTHING, math.inf, -math.inf),
    ],
)
def test_worked_examples(facts: EngineFacts, flying: InFlight, usage: float, free: float):
    assert virtual_usage(facts, flying) == usage
    assert LLUMD.dispatch(facts, flying) == free


loads = {"used_blocks": st.integers(0, 100), "running": st.integers(0, 9), "waiting": st.integers(0, 9),
         "head_demand_blocks": st.integers(0, 200), "pending_prefill_tokens": st.integers(0, 3000),
         "waiting_tokens": st.integers(0, 3000), "step_seconds": st.floats(0, 0.5)}  # fmt: skip


@given(st.builds(engine, **loads), st.integers(0, 9), st.integers(0, 5000), st.integers(1, 5000))
def test_one_more_in_flight_is_one_more_reason_against(facts: EngineFacts, requests: int, tokens: int, more: int):
    """Also of an engine that lacks memory already."""
    fewer, further = InFlight(requests, tokens), InFlight(requests + 1, tokens + more)
    assert LLUMD.dispatch(facts, further) < LLUMD.dispatch(facts, fewer)


# -- choice ------------------------------------------------------------------------------------

some_engine = st.builds(engine, state=st.sampled_from(EngineState), **loads)
flights = st.builds(InFlight, st.integers(0, 9), st.integers(0, 5000))
boxes = st.lists(st.tuples(st.none() | some_engine, flights), max_size=8)


@given(boxes, st.integers(0, 10**6), st.sampled_from(list(POLICIES.values())))
def test_the_freest_of_those_that_serve(box: list[tuple[EngineFacts | None, InFlight]], turn: int, policy: Policy):
    engines, flying = [e for e, _ in box], [f for _, f in box]
    serving = [i for i, e in enumerate(engines) if e is not None and e.state == EngineState.SERVING]
    chosen = choose(engines, flying, turn, policy=policy)
    if not serving:
        assert chosen is None
    else:
        assert chosen in serving
        free = {i: policy.dispatch(engines[i], flying[i]) for i in serving}
        assert free[chosen] == max(free.values())


@given(st.integers(1, 8), st.integers(0, 100), st.booleans(), st.sampled_from(list(POLICIES.values())))
def test_ties_rotate(n: int, turn: int, busy: bool, policy: Policy):
    engines = [engine(running=2, used_blocks=50) if busy else engine()] * n
    chosen = [choose(engines, [NOTHING] * n, turn + i, policy=policy) for i in range(3 * n)]
    assert set(Counter(chosen).values()) == {3}


# -- in flight ---------------------------------------------------------------------------------


def test_in_flight_is_sent_less_taken_over_all_frontends():
    engines = [
        engine(incarnation=10, consumed=[Demand(1, 5, 500), Demand(2, 0, 0)]),
        engine(incarnation=11, consumed=[Demand(1, 2, 20), Demand(2, 8, 800)]),
        None,
    ]
    frontends = [
        frontend(Demand(10, 7, 900), Demand(11, 2, 20), Demand(0, 0, 0), incarnation=1),
        frontend(Demand(10, 1, 30), Demand(11, 9, 810), Demand(0, 0, 0), incarnation=2),
    ]
    assert in_flight(engines, frontends) == [InFlight(3, 430), InFlight(1, 10), NOTHING]


def test_in_flight_of_other_incarnations_does_not_count():
    sent = Demand(10, 7, 900)
    # The engine was replaced: what was sent went to its predecessor.
    assert in_flight([engine(incarnation=11)], [frontend(sent)]) == [NOTHING]
    # The frontend was replaced, and the engine still counts its predecessor: all of it is in flight.
    taken = engine(incarnation=10, consumed=[Demand(1, 100, 10_000)])
    assert in_flight([taken], [frontend(sent, incarnation=2)]) == [InFlight(7, 900)]
    # A frontend that is not there; an engine that has taken more than the frontend's older board says.
    assert in_flight([taken], [None]) == [NOTHING]
    assert in_flight([taken], [frontend(sent)]) == [NOTHING]


@given(st.integers(1, 8), st.integers(0, 60), st.integers(1, 400), st.builds(engine, **loads))
def test_a_burst_spreads_evenly(n: int, burst: int, tokens: int, facts: EngineFacts):
    """Between two publications of the boards a frontend's own burst is spread by what it has sent itself."""
    engines = [facts] * n
    sent = [Demand(1, 0, 0)] * n
    for turn in range(burst):
        chosen = choose(engines, in_flight(engines, [frontend(*sent)]), turn)
        sent[chosen] = Demand(1, sent[chosen].requests + 1, sent[chosen].tokens + tokens)
    counts = [demand.requests for demand in sent]
    assert sum(counts) == burst
    assert max(counts) - min(counts) <= 1


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(1, 300)), max_size=40))
def test_two_frontends_see_each_others_bursts(script: list[tuple[int, int]]):
    """Whoever dispatches, all that is in flight is counted once."""
    engines = [engine(consumed=[Demand(0, 0, 0)] * 2)] * 3
    sent = [[Demand(1, 0, 0)] * 3 for _ in range(2)]
    for turn, (who, tokens) in enumerate(script):
        flying = in_flight(engines, [frontend(*sent[0]), frontend(*sent[1], incarnation=2)])
        chosen = choose(engines, flying, turn)
        before = sent[who][chosen]
        sent[who][chosen] = Demand(1, before.requests + 1, before.tokens + tokens)
    flying = in_flight(engines, [frontend(*sent[0]), frontend(*sent[1], incarnation=2)])
    assert sum(f.requests for f in flying) == len(script)
    assert sum(f.tokens for f in flying) == sum(tokens for _, tokens in script)
