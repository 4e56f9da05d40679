"""Dispatch: worked examples of the formulas, and properties that hold for any facts."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.control.policy.dispatch import choose, count_in_flight
from daemon.control.policy.freeness import LLUMD, NONE_IN_FLIGHT, POLICIES, InFlight, Policy, virtual_usage
from daemon.ipc.messages import Demand, EngineFacts, EngineState
from tests.control.factories import engine_facts, frontend_facts

# -- freeness --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("facts", "in_flight", "usage", "freeness"),
    [
        (engine_facts(), NONE_IN_FLIGHT, 0, math.inf),
        (engine_facts(used_blocks=40, running=4), NONE_IN_FLIGHT, 40, 60 * 16 / 4),
        (engine_facts(used_blocks=40, running=4, waiting=2, head_demand_blocks=30), NONE_IN_FLIGHT, 70, 30 * 16 / 6),
        (engine_facts(used_blocks=40, running=4), InFlight(1, 160), 50, 50 * 16 / 5),
        (engine_facts(), InFlight(2, 320), 20, 80 * 16 / 2),
        (engine_facts(used_blocks=90, running=9, waiting=1, head_demand_blocks=30), NONE_IN_FLIGHT, 120, -20 * 16),
        (engine_facts(state=EngineState.DRAINING), NONE_IN_FLIGHT, math.inf, -math.inf),
        (engine_facts(state=EngineState.DRAINING, running=3, used_blocks=9), NONE_IN_FLIGHT, math.inf, -math.inf),
    ],
)
def test_worked_examples(facts: EngineFacts, in_flight: InFlight, usage: float, freeness: float):
    assert virtual_usage(facts, in_flight) == usage
    assert LLUMD.dispatch(facts, in_flight) == freeness


loads = {"used_blocks": st.integers(0, 100), "running": st.integers(0, 9), "waiting": st.integers(0, 9),
         "head_demand_blocks": st.integers(0, 200), "pending_prefill_tokens": st.integers(0, 3000),
         "waiting_tokens": st.integers(0, 3000), "step_seconds": st.floats(0, 0.5)}  # fmt: skip


@given(st.builds(engine_facts, **loads), st.integers(0, 9), st.integers(0, 5000), st.integers(1, 5000))
def test_one_more_request_in_flight_lowers_the_freeness(facts: EngineFacts, requests: int, tokens: int, more: int):
    """Also of an engine without free memory."""
    fewer, further = InFlight(requests, tokens), InFlight(requests + 1, tokens + more)
    assert LLUMD.dispatch(facts, further) < LLUMD.dispatch(facts, fewer)


# -- choice ------------------------------------------------------------------------------------

some_engine = st.builds(engine_facts, state=st.sampled_from(EngineState), **loads)
counts_in_flight = st.builds(InFlight, st.integers(0, 9), st.integers(0, 5000))
engine_rows = st.lists(st.tuples(st.none() | some_engine, counts_in_flight), max_size=8)


@given(engine_rows, st.integers(0, 10**6), st.sampled_from(list(POLICIES.values())))
def test_the_freest_serving_engine_is_chosen(
    rows: list[tuple[EngineFacts | None, InFlight]], turn: int, policy: Policy
):
    engines, in_flight = [e for e, _ in rows], [f for _, f in rows]
    serving = [i for i, e in enumerate(engines) if e is not None and e.state == EngineState.SERVING]
    chosen = choose(engines, in_flight, turn, policy=policy)
    if not serving:
        assert chosen is None
    else:
        assert chosen in serving
        freeness = {i: policy.dispatch(engines[i], in_flight[i]) for i in serving}
        assert freeness[chosen] == max(freeness.values())


@given(st.integers(1, 8), st.integers(0, 100), st.booleans(), st.sampled_from(list(POLICIES.values())))
def test_ties_rotate(n: int, turn: int, busy: bool, policy: Policy):
    engines = [engine_facts(running=2, used_blocks=50) if busy else engine_facts()] * n
    chosen = [choose(engines, [NONE_IN_FLIGHT] * n, turn + i, policy=policy) for i in range(3 * n)]
    assert set(Counter(chosen).values()) == {3}


# -- in flight ---------------------------------------------------------------------------------


def test_in_flight_is_sent_minus_consumed_summed_over_frontends():
    engines = [
        engine_facts(incarnation=10, consumed=[Demand(1, 5, 500), Demand(2, 0, 0)]),
        engine_facts(incarnation=11, consumed=[Demand(1, 2, 20), Demand(2, 8, 800)]),
        None,
    ]
    frontends = [
        frontend_facts(Demand(10, 7, 900), Demand(11, 2, 20), Demand(0, 0, 0), incarnation=1),
        frontend_facts(Demand(10, 1, 30), Demand(11, 9, 810), Demand(0, 0, 0), incarnation=2),
    ]
    assert count_in_flight(engines, frontends) == [InFlight(3, 430), InFlight(1, 10), NONE_IN_FLIGHT]


def test_totals_of_other_incarnations_do_not_count():
    sent = Demand(10, 7, 900)
    # The engine was replaced: the requests were sent to its predecessor.
    assert count_in_flight([engine_facts(incarnation=11)], [frontend_facts(sent)]) == [NONE_IN_FLIGHT]
    # The frontend was replaced, and the engine still counts its predecessor: all of it is in flight.
    engine = engine_facts(incarnation=10, consumed=[Demand(1, 100, 10_000)])
    assert count_in_flight([engine], [frontend_facts(sent, incarnation=2)]) == [InFlight(7, 900)]
    # The frontend is absent; the engine has consumed more than the older board of the frontend shows as sent.
    assert count_in_flight([engine], [None]) == [NONE_IN_FLIGHT]
    assert count_in_flight([engine], [frontend_facts(sent)]) == [NONE_IN_FLIGHT]


@given(st.integers(1, 8), st.integers(0, 60), st.integers(1, 400), st.builds(engine_facts, **loads))
def test_a_burst_spreads_evenly(n: int, burst: int, tokens: int, facts: EngineFacts):
    """While the boards do not change, a frontend spreads its own burst by the counts of what it has sent."""
    engines = [facts] * n
    sent = [Demand(1, 0, 0)] * n
    for turn in range(burst):
        chosen = choose(engines, count_in_flight(engines, [frontend_facts(*sent)]), turn)
        sent[chosen] = Demand(1, sent[chosen].requests + 1, sent[chosen].tokens + tokens)
    counts = [demand.requests for demand in sent]
    assert sum(counts) == burst
    assert max(counts) - min(counts) <= 1


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(1, 300)), max_size=40))
def test_each_frontend_counts_the_bursts_of_the_other(script: list[tuple[int, int]]):
    """Every request in flight is counted once, whichever frontend dispatched it."""
    engines = [engine_facts(consumed=[Demand(0, 0, 0)] * 2)] * 3
    sent = [[Demand(1, 0, 0)] * 3 for _ in range(2)]
    for turn, (sender, tokens) in enumerate(script):
        in_flight = count_in_flight(engines, [frontend_facts(*sent[0]), frontend_facts(*sent[1], incarnation=2)])
        chosen = choose(engines, in_flight, turn)
        before = sent[sender][chosen]
        sent[sender][chosen] = Demand(1, before.requests + 1, before.tokens + tokens)
    in_flight = count_in_flight(engines, [frontend_facts(*sent[0]), frontend_facts(*sent[1], incarnation=2)])
    assert sum(f.requests for f in in_flight) == len(script)
    assert sum(f.tokens for f in in_flight) == sum(tokens for _, tokens in script)
