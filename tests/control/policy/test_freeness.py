"""The three policies: worked examples of the formulas, invariants, and where the policies disagree."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.control.policy.dispatch import AFFINITY_BOUND, REQUEST_COST, choose
from daemon.control.policy.freeness import (
    NONE_IN_FLIGHT,
    POLICIES,
    Artifact,
    InFlight,
    Policy,
    policy_of,
    virtual_usage,
)
from daemon.enums import Resource
from daemon.ipc.messages import EngineFacts, EngineState
from tests.control.factories import engine_facts

PAPER, ARTIFACT, LLUMD = POLICIES["paper"], POLICIES["artifact"], POLICIES["llumd"]
A10 = {"total_blocks": 851}  # the paper's pool
LARGE = {"total_blocks": 62_500, "knee": 64}  # a million tokens
each_policy = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)


@st.composite
def busy_engines(draw: st.DrawFn) -> EngineFacts:
    """Draw consistent facts of a serving engine that has requests."""
    total = draw(st.integers(10, 5000))
    running, waiting = draw(st.integers(1, 80)), draw(st.integers(0, 80))
    tokens = sum(draw(st.lists(st.integers(1, 3000), min_size=min(waiting, 5), max_size=min(waiting, 5))))
    return engine_facts(
        total_blocks=total, used_blocks=draw(st.integers(0, total)), running=running, waiting=waiting,
        waiting_tokens=tokens, head_demand_blocks=draw(st.integers(0, tokens // 16)) if waiting else 0,
        pending_prefill_tokens=tokens + draw(st.integers(0, 5000)), step_seconds=draw(st.floats(0, 1)),
        high_running=draw(st.integers(0, running)), high_waiting=draw(st.integers(0, waiting)),
        incoming=draw(st.integers(0, 3)), knee=draw(st.integers(0, 300)), ideal_tokens=draw(st.integers(0, 9999)),
    )  # fmt: skip


def changed(facts: EngineFacts, **changes: int | float) -> EngineFacts:
    return engine_facts(**({name: getattr(facts, name) for name in facts.__struct_fields__} | changes))


# -- virtual usage (Algorithm 1) -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "usage"),
    [
        ({"used_blocks": 40, "running": 4}, 40),
        ({"used_blocks": 40, "running": 4, "waiting": 1, "head_demand_blocks": 7}, 47),
        ({"used_blocks": 40, "running": 4, "waiting": 9, "head_demand_blocks": 7, "waiting_tokens": 9999}, 47),
        ({"used_blocks": 40, "running": 4, "high_running": 1}, 40 + 751),  # headroom leaves the published 100 blocks
        ({"used_blocks": 40, "running": 4, "high_running": 4}, 40 + 751),  # once, however many there are
        ({"used_blocks": 40, "running": 4, "waiting": 2, "high_waiting": 2}, 40),  # a queued one has no headroom
        ({"used_blocks": 40, "state": EngineState.DRAINING}, math.inf),
        ({"used_blocks": 40, "state": EngineState.PARKED}, math.inf),
    ],
)
def test_the_five_rules_of_virtual_usage(fields: dict[str, int], usage: float):
    facts = engine_facts(**A10, **fields)
    assert virtual_usage(facts) == usage
    batch = max(1, facts.running)
    assert PAPER.migration(facts) == PAPER.dispatch(facts) == (851 - usage) * 16 / batch


@pytest.mark.parametrize(
    ("fields", "dispatch", "migration"),
    [  # in blocks a request; 8 blocks are the watermark
        ({}, math.inf, math.inf),
        ({"used_blocks": 403, "running": 4}, 440 / 4, 440 / 4),
        ({"used_blocks": 403, "running": 4, "waiting": 6, "head_demand_blocks": 5, "waiting_tokens": 640}, 40, 80),
        ({"used_blocks": 403, "running": 4, "high_running": 2}, (440 - 751) / 4, (440 - 751) / 4),
        ({"used_blocks": 403, "running": 3, "waiting": 1, "high_waiting": 1}, (440 - 751) / 4, (440 - 751) / 4),
        ({"used_blocks": 9, "running": 2, "state": EngineState.DRAINING}, -1000, -1000),
    ],
)
def test_artifact_as_in_the_published_experiments(fields: dict[str, int], dispatch: float, migration: float):
    facts = engine_facts(**A10, **fields)
    assert (ARTIFACT.dispatch(facts) / 16, ARTIFACT.migration(facts) / 16) == (dispatch, migration)


def test_artifact_without_defragmentation_considers_free_blocks_alone():
    policy = Artifact(defrag=False)
    busy = engine_facts(**A10, used_blocks=451, running=4, waiting=6, waiting_tokens=640, high_running=1)
    assert policy.migration(busy) == 400 * 16 / 4
    assert policy.migration(engine_facts(waiting=3, waiting_tokens=99)) == math.inf


@pytest.mark.parametrize(
    ("fields", "freeness"),
    [
        ({"running": 32}, 64.0),  # half a knee: one horizon
        ({"running": 16}, 3 * 64.0),
        ({"running": 64}, 0.0),
        ({"running": 65}, -64.0),  # a deficit is not divided
        ({"running": 32, "pending_prefill_tokens": 1024}, 32.0),
        ({"running": 30, "incoming": 2}, 64.0),
        ({"running": 32, "step_seconds": 0.1}, 32.0),  # twice the target: half the horizon
        ({"running": 32, "step_seconds": 0.04}, 64.0),
        ({"running": 32, "knee": 0, "max_num_seqs": 96}, 128.0),
        ({"running": 32, "used_blocks": 62_500 - 64}, 32.0),  # memory is scarcer
        ({"running": 4, "high_running": 1}, 64.0),  # an eighth of the knee
        ({"running": 4, "high_running": 1, "used_blocks": 100, "ideal_tokens": 1720}, 30.0),
        ({"state": EngineState.PARKED}, -math.inf),
        ({}, math.inf),
    ],
)
def test_llumd_considers_compute_too(fields: dict[str, float], freeness: float):
    facts = engine_facts(**(LARGE | fields))
    assert LLUMD.dispatch(facts) == pytest.approx(freeness)
    assert LLUMD.migration(facts) == pytest.approx(freeness)


@each_policy
def test_the_headroom_is_the_one_that_the_engine_measured(policy: Policy):
    """Or that the operator has set. Without either, a policy uses its own figure."""
    # The knee is so large that memory is scarcer than compute.
    facts = engine_facts(**A10, used_blocks=40, running=4, high_running=1, knee=8192)
    measured = changed(facts, ideal_tokens=4800)  # 300 blocks; 8 are the artifact's watermark
    room = (300 - 40 - (8 if policy is ARTIFACT else 0)) * 16
    for freeness in (policy.dispatch, policy.migration):
        assert freeness(measured) == room / 4
        assert freeness(facts) < freeness(measured) < freeness(changed(facts, high_running=0))
        assert freeness(changed(facts, ideal_tokens=10**6)) == freeness(changed(facts, high_running=0))


# -- properties of any policy ------------------------------------------------------------------


@each_policy
@given(facts=busy_engines(), more=st.integers(1, 50))
def test_more_used_blocks_lower_the_freeness(policy: Policy, facts: EngineFacts, more: int):
    fuller = changed(facts, used_blocks=facts.used_blocks + more)
    for freeness in (policy.dispatch, policy.migration):
        assert freeness(fuller) <= freeness(facts)
    if policy.scarcest_resource(facts) is Resource.MEMORY:
        assert policy.migration(fuller) < policy.migration(facts)


@given(
    busy_engines(), st.sampled_from(["running", "waiting", "incoming", "pending_prefill_tokens", "waiting_tokens"])
)
def test_more_work_never_raises_the_freeness_of_llumd(facts: EngineFacts, name: str):
    busier = changed(facts, **{name: getattr(facts, name) + 1})
    assert LLUMD.dispatch(busier) <= LLUMD.dispatch(facts)
    assert LLUMD.migration(busier) <= LLUMD.migration(facts)
    slower = changed(facts, step_seconds=facts.step_seconds * 2)
    assert LLUMD.dispatch(slower) <= LLUMD.dispatch(facts)
    assert LLUMD.migration(slower) <= LLUMD.migration(facts)


@each_policy
@given(facts=busy_engines(), others=st.integers(1, 9))
def test_headroom_is_counted_once(policy: Policy, facts: EngineFacts, others: int):
    none = changed(facts, high_running=0, high_waiting=0)
    one = changed(none, high_running=1)
    many = changed(none, high_running=1 + others)
    for freeness in (policy.dispatch, policy.migration):
        assert freeness(many) == freeness(one) <= freeness(none)


@each_policy
@given(facts=busy_engines())
def test_an_idle_engine_is_freest_and_a_draining_one_least_free(policy: Policy, facts: EngineFacts):
    for freeness in (policy.dispatch, policy.migration):
        assert freeness(engine_facts(total_blocks=facts.total_blocks)) == math.inf > freeness(facts)
        assert freeness(changed(facts, state=EngineState.DRAINING)) <= -16_000
        assert policy is ARTIFACT or freeness(changed(facts, state=EngineState.DRAINING)) == -math.inf


@given(busy_engines())
def test_dispatch_and_migration_of_llumd_agree(facts: EngineFacts):
    """`dispatch` is inlined for speed. Without a queue and headroom it must equal `migration`."""
    alone = changed(facts, waiting=0, waiting_tokens=0, head_demand_blocks=0, high_running=0, high_waiting=0)
    assert LLUMD.dispatch(alone) == pytest.approx(LLUMD.migration(alone))


@each_policy
@given(facts=busy_engines())
def test_resource_loads_ignore_priorities_and_states(policy: Policy, facts: EngineFacts):
    for other in (changed(facts, high_running=0, high_waiting=0), changed(facts, state=EngineState.PARKED)):
        assert policy.resource_loads(other) == policy.resource_loads(facts)


# -- where the policies disagree -------------------------------------------------------------------------------


def test_a_long_prompt_on_a_large_pool():
    """By memory alone the engine has one request and room for 900,000 tokens; in fact it has minutes of prefill."""
    reading = engine_facts(**LARGE, used_blocks=6250, running=1, pending_prefill_tokens=100_000)
    decoding = engine_facts(**LARGE, used_blocks=500, running=3)
    assert choose([reading, decoding], [NONE_IN_FLIGHT] * 2, 0, policy=PAPER) == 0
    assert choose([reading, decoding], [NONE_IN_FLIGHT] * 2, 0) == 1


def test_a_longer_queue_does_not_make_an_engine_freer():
    """Both lack memory. The paper divides the deficit by the batch, so the longer queue seems to lack less."""
    long = engine_facts(used_blocks=98, running=20, waiting=50, head_demand_blocks=7, waiting_tokens=5000,
                  pending_prefill_tokens=5000)  # fmt: skip
    short = engine_facts(used_blocks=98, running=10, waiting=1, head_demand_blocks=7, waiting_tokens=100,
                   pending_prefill_tokens=100)  # fmt: skip
    assert choose([long, short], [NONE_IN_FLIGHT] * 2, 0, policy=PAPER) == 0
    assert choose([long, short], [NONE_IN_FLIGHT] * 2, 0) == 1


# -- priority classes in dispatch ------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [ARTIFACT, LLUMD], ids=["artifact", "llumd"])
def test_high_priority_requests_gather_and_normal_ones_keep_away(policy: Policy):
    holder = engine_facts(**A10, used_blocks=60, running=3, high_running=3)
    busier = engine_facts(**A10, used_blocks=300, running=8)
    engines = [busier, holder, busier]
    assert choose(engines, [NONE_IN_FLIGHT] * 3, 0, policy=policy, high=True) == 1
    assert choose(engines, [NONE_IN_FLIGHT] * 3, 0, policy=policy) != 1
    # Also while there is an idle engine, which stays free for normal requests.
    assert choose([holder, engine_facts(**A10)], [NONE_IN_FLIGHT] * 2, 0, policy=policy, high=True) == 0
    assert choose([holder, engine_facts(**A10)], [NONE_IN_FLIGHT] * 2, 0, policy=policy) == 1


def test_high_priority_requests_stop_gathering_on_a_loaded_engine():
    holder = engine_facts(**A10, used_blocks=700, running=30, high_running=30)
    assert choose([holder, engine_facts(**A10)], [NONE_IN_FLIGHT] * 2, 0, high=True) == 1


# -- prefix affinity ---------------------------------------------------------------------------------------

engine_rows = st.lists(st.tuples(busy_engines(), st.integers(0, 500)), min_size=1, max_size=6)


@given(engine_rows, st.integers(0, 20), st.booleans())
def test_affinity_is_bounded(rows: list[tuple[EngineFacts, int]], turn: int, high: bool):
    """An engine chosen for its prefix is as free as the freest, or has room and is only a few requests busier."""
    engines, matched = [e for e, _ in rows], [m for _, m in rows]
    in_flight = [NONE_IN_FLIGHT] * len(engines)
    freest = choose(engines, in_flight, turn, high=high)
    chosen = choose(engines, in_flight, turn, high=high, matched=matched)
    assert freest is not None and chosen is not None
    if chosen == freest:
        return
    freeness = [LLUMD.dispatch(e, NONE_IN_FLIGHT, high) for e in engines]
    work = [(e.running + e.waiting + e.incoming) * REQUEST_COST + e.pending_prefill_tokens for e in engines]
    assert matched[chosen] > matched[freest]
    assert freeness[chosen] >= min(freeness[freest], LLUMD.thresholds.migrate_high)
    saved = (matched[chosen] - matched[freest]) * 16
    assert work[chosen] - work[freest] < min(saved, AFFINITY_BOUND * REQUEST_COST)


def test_affinity_decides_only_small_differences_of_load():
    def busy(running: int) -> EngineFacts:
        return engine_facts(**LARGE, running=running, used_blocks=running * 10)

    def chosen(*running: int, matched: list[int]) -> int | None:
        return choose([busy(r) for r in running], [NONE_IN_FLIGHT] * len(running), 0, matched=matched)

    assert chosen(5, 5, matched=[0, 1]) == 1  # a tie
    assert chosen(0, 1, matched=[0, 8]) == 1  # 128 tokens outweigh one more request
    assert chosen(0, 1, matched=[0, 4]) == 0  # 64 do not
    assert chosen(0, 3, matched=[0, 1000]) == 1
    assert chosen(0, 4, matched=[0, 1000]) == 0  # even if the whole prompt is cached
    assert chosen(0, 4, matched=[1000, 1000]) == 0
    assert chosen(40, 41, matched=[0, 1000]) == 0  # no engine has room to spare: the load decides
    assert chosen(41, 41, matched=[0, 1000]) == 1


def test_in_flight_counts_against_a_prefix():
    engines = [engine_facts(**LARGE, running=1)] * 2
    assert choose(engines, [NONE_IN_FLIGHT, InFlight(1, 16)], 0, matched=[0, 1000]) == 1
    assert choose(engines, [NONE_IN_FLIGHT, InFlight(4, 64)], 0, matched=[0, 1000]) == 0


@pytest.mark.parametrize("name", POLICIES)
def test_without_headroom_high_priority_does_not_change_the_freeness(name):
    policy, plain = policy_of(name), policy_of(name, headroom=False)
    normal = engine_facts(running=2, used_blocks=10, knee=24, ideal_tokens=400)
    urgent = engine_facts(running=2, used_blocks=10, knee=24, ideal_tokens=400, high_running=1)
    assert plain.dispatch(urgent) == plain.dispatch(normal) == policy.dispatch(normal) > policy.dispatch(urgent)
    assert plain.migration(urgent) == plain.migration(normal) == policy.migration(normal) > policy.migration(urgent)
    assert plain.dispatch(normal, high=True) == plain.dispatch(normal)
