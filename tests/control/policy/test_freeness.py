"""The three policies: the formulas by worked examples, the invariants, and where they disagree."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.control.policy.dispatch import AFFINITY_BOUND, REQUEST_WORTH, choose
from daemon.control.policy.freeness import NOTHING, POLICIES, InFlight, Policy, policy_of, virtual_usage
from daemon.enums import Resource
from daemon.ipc.messages import EngineFacts, EngineState
from tests.control.factories import engine

PAPER, ARTIFACT, LLUMD = POLICIES["paper"], POLICIES["artifact"], POLICIES["llumd"]
A10 = {"total_blocks": 851}  # the paper's pool
LARGE = {"total_blocks": 62_500, "knee": 64}  # a million tokens
each_policy = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)


@st.composite
def loads(draw: st.DrawFn) -> EngineFacts:
    """Facts that agree with each other, of an engine that serves and has something to do."""
    total = draw(st.integers(10, 5000))
    running, waiting = draw(st.integers(1, 80)), draw(st.integers(0, 80))
    tokens = sum(draw(st.lists(st.integers(1, 3000), min_size=min(waiting, 5), max_size=min(waiting, 5))))
    return engine(
        total_blocks=total, used_blocks=draw(st.integers(0, total)), running=running, waiting=waiting,
        waiting_tokens=tokens, head_demand_blocks=draw(st.integers(0, tokens // 16)) if waiting else 0,
        pending_prefill_tokens=tokens + draw(st.integers(0, 5000)), step_seconds=draw(st.floats(0, 1)),
        high_running=draw(st.integers(0, running)), high_waiting=draw(st.integers(0, waiting)),
        incoming=draw(st.integers(0, 3)), knee=draw(st.integers(0, 300)), ideal_tokens=draw(st.integers(0, 9999)),
    )  # fmt: skip


def but(facts: EngineFacts, **changes: int | float) -> EngineFacts:
    return engine(**({name: getattr(facts, name) for name in facts.__struct_fields__} | changes))


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
def test_the_five_rules(fields: dict[str, int], usage: float):
    facts = engine(**A10, **fields)
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
def test_artifact_as_it_ran(fields: dict[str, int], dispatch: float, migration: float):
    facts = engine(**A10, **fields)
    assert (ARTIFACT.dispatch(facts) / 16, ARTIFACT.migration(facts) / 16) == (dispatch, migration)


def test_artifact_without_defragmentation_looks_at_free_blocks_alone():
    policy = type(ARTIFACT)(defrag=False)
    busy = engine(**A10, used_blocks=451, running=4, waiting=6, waiting_tokens=640, high_running=1)
    assert policy.migration(busy) == 400 * 16 / 4
    assert policy.migration(engine(waiting=3, waiting_tokens=99)) == math.inf


@pytest.mark.parametrize(
    ("fields", "free"),
    [
        ({"running": 32}, 64.0),  # half a knee: one horizon
        ({"running": 16}, 3 * 64.0),
        ({"running": 64}, 0.0),
        ({"running": 65}, -64.0),  # a lack is not shared
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
def test_llumd_adds_compute(fields: dict[str, float], free: float):
    facts = engine(**(LARGE | fields))
    assert LLUMD.dispatch(facts) == pytest.approx(free)
    assert LLUMD.migration(facts) == pytest.approx(free)


@each_policy
def test_headroom_is_what_the_engine_measured(policy: Policy):
    """Or was told; only without either a policy goes by a figure of its own."""
    facts = engine(**A10, used_blocks=40, running=4, high_running=1, knee=8192)  # so much that memory is scarcer
    measured = but(facts, ideal_tokens=4800)  # 300 blocks; 8 are the artifact's watermark
    room = (300 - 40 - (8 if policy is ARTIFACT else 0)) * 16
    for judge in (policy.dispatch, policy.migration):
        assert judge(measured) == room / 4
        assert judge(facts) < judge(measured) < judge(but(facts, high_running=0))
        assert judge(but(facts, ideal_tokens=10**6)) == judge(but(facts, high_running=0))


# -- what must hold of any policy ------------------------------------------------------------------


@each_policy
@given(facts=loads(), more=st.integers(1, 50))
def test_more_used_blocks_are_less_free(policy: Policy, facts: EngineFacts, more: int):
    fuller = but(facts, used_blocks=facts.used_blocks + more)
    for judge in (policy.dispatch, policy.migration):
        assert judge(fuller) <= judge(facts)
    if policy.shortest(facts) is Resource.MEMORY:
        assert policy.migration(fuller) < policy.migration(facts)


@given(loads(), st.sampled_from(["running", "waiting", "incoming", "pending_prefill_tokens", "waiting_tokens"]))
def test_llumd_never_calls_more_work_freer(facts: EngineFacts, name: str):
    busier = but(facts, **{name: getattr(facts, name) + 1})
    assert LLUMD.dispatch(busier) <= LLUMD.dispatch(facts)
    assert LLUMD.migration(busier) <= LLUMD.migration(facts)
    slower = but(facts, step_seconds=facts.step_seconds * 2)
    assert LLUMD.dispatch(slower) <= LLUMD.dispatch(facts)
    assert LLUMD.migration(slower) <= LLUMD.migration(facts)


@each_policy
@given(facts=loads(), others=st.integers(1, 9))
def test_headroom_is_counted_once(policy: Policy, facts: EngineFacts, others: int):
    none = but(facts, high_running=0, high_waiting=0)
    one = but(none, high_running=1)
    many = but(none, high_running=1 + others)
    for judge in (policy.dispatch, policy.migration):
        assert judge(many) == judge(one) <= judge(none)


@each_policy
@given(facts=loads())
def test_an_idle_engine_is_freest_and_a_draining_one_least_free(policy: Policy, facts: EngineFacts):
    for judge in (policy.dispatch, policy.migration):
        assert judge(engine(total_blocks=facts.total_blocks)) == math.inf > judge(facts)
        assert judge(but(facts, state=EngineState.DRAINING)) <= -16_000
        assert policy is ARTIFACT or judge(but(facts, state=EngineState.DRAINING)) == -math.inf


@given(loads())
def test_llumd_agrees_with_its_own_terms(facts: EngineFacts):
    """`dispatch` is written out for speed; without a queue and headroom it is what the terms say."""
    alone = but(facts, waiting=0, waiting_tokens=0, head_demand_blocks=0, high_running=0, high_waiting=0)
    assert LLUMD.dispatch(alone) == pytest.approx(LLUMD.migration(alone))


@each_policy
@given(facts=loads(), seconds=st.floats(0, 1))
def test_terms_do_not_know_of_priorities_and_states(policy: Policy, facts: EngineFacts, seconds: float):
    plain = but(facts, high_running=0, high_waiting=0)
    assert policy.terms(facts) == policy.terms(plain) == policy.terms(but(facts, state=EngineState.PARKED))


# -- where they disagree -------------------------------------------------------------------------------


def test_a_long_prompt_on_a_large_pool():
    """Memory alone sees one request with 900,000 tokens to go; what is there is minutes of prefill."""
    reading = engine(**LARGE, used_blocks=6250, running=1, pending_prefill_tokens=100_000)
    decoding = engine(**LARGE, used_blocks=500, running=3)
    assert choose([reading, decoding], [NOTHING] * 2, 0, policy=PAPER) == 0
    assert choose([reading, decoding], [NOTHING] * 2, 0) == 1


def test_a_long_queue_is_no_recommendation():
    """Both lack memory; the paper's division makes the longer queue look less short of it."""
    long = engine(used_blocks=98, running=20, waiting=50, head_demand_blocks=7, waiting_tokens=5000,
                  pending_prefill_tokens=5000)  # fmt: skip
    short = engine(used_blocks=98, running=10, waiting=1, head_demand_blocks=7, waiting_tokens=100,
                   pending_prefill_tokens=100)  # fmt: skip
    assert choose([long, short], [NOTHING] * 2, 0, policy=PAPER) == 0
    assert choose([long, short], [NOTHING] * 2, 0) == 1


# -- priority classes in dispatch ------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [ARTIFACT, LLUMD], ids=["artifact", "llumd"])
def test_high_priority_gathers_and_normal_keeps_away(policy: Policy):
    holder = engine(**A10, used_blocks=60, running=3, high_running=3)
    busier = engine(**A10, used_blocks=300, running=8)
    engines = [busier, holder, busier]
    assert choose(engines, [NOTHING] * 3, 0, policy=policy, high=True) == 1
    assert choose(engines, [NOTHING] * 3, 0, policy=policy) != 1
    # Also while there is an idle engine, which is left to the normal ones.
    assert choose([holder, engine(**A10)], [NOTHING] * 2, 0, policy=policy, high=True) == 0
    assert choose([holder, engine(**A10)], [NOTHING] * 2, 0, policy=policy) == 1


def test_gathering_ends_when_the_holder_is_loaded():
    holder = engine(**A10, used_blocks=700, running=30, high_running=30)
    assert choose([holder, engine(**A10)], [NOTHING] * 2, 0, high=True) == 1


# -- prefix affinity ---------------------------------------------------------------------------------------

boxes = st.lists(st.tuples(loads(), st.integers(0, 500)), min_size=1, max_size=6)


@given(boxes, st.integers(0, 20), st.booleans())
def test_affinity_is_bounded(box: list[tuple[EngineFacts, int]], turn: int, high: bool):
    """Who is preferred for its prefix is no less free, or roomy and no more than a few requests busier."""
    engines, matched = [e for e, _ in box], [m for _, m in box]
    flying = [NOTHING] * len(engines)
    plain = choose(engines, flying, turn, high=high)
    near = choose(engines, flying, turn, high=high, matched=matched)
    assert plain is not None and near is not None
    if near == plain:
        return
    free = [LLUMD.dispatch(e, NOTHING, high) for e in engines]
    work = [(e.running + e.waiting + e.incoming) * REQUEST_WORTH + e.pending_prefill_tokens for e in engines]
    assert matched[near] > matched[plain]
    assert free[near] >= min(free[plain], LLUMD.marks.migrate_high)
    assert work[near] - work[plain] < min((matched[near] - matched[plain]) * 16, AFFINITY_BOUND * REQUEST_WORTH)


def test_affinity_decides_small_differences_only():
    def busy(running: int) -> EngineFacts:
        return engine(**LARGE, running=running, used_blocks=running * 10)

    def near(*running: int, matched: list[int]) -> int | None:
        return choose([busy(r) for r in running], [NOTHING] * len(running), 0, matched=matched)

    assert near(5, 5, matched=[0, 1]) == 1  # a tie
    assert near(0, 1, matched=[0, 8]) == 1  # 128 tokens outweigh one request more
    assert near(0, 1, matched=[0, 4]) == 0  # 64 do not
    assert near(0, 3, matched=[0, 1000]) == 1
    assert near(0, 4, matched=[0, 1000]) == 0  # however much is cached
    assert near(0, 4, matched=[1000, 1000]) == 0
    assert near(40, 41, matched=[0, 1000]) == 0  # neither has room to spare: load decides
    assert near(41, 41, matched=[0, 1000]) == 1


def test_in_flight_counts_against_a_prefix():
    engines = [engine(**LARGE, running=1)] * 2
    assert choose(engines, [NOTHING, InFlight(1, 16)], 0, matched=[0, 1000]) == 1
    assert choose(engines, [NOTHING, InFlight(4, 64)], 0, matched=[0, 1000]) == 0


@pytest.mark.parametrize("name", POLICIES)
def test_without_headroom_high_priority_weighs_like_any_other(name):
    judge, plain = policy_of(name), policy_of(name, headroom=False)
    normal = engine(running=2, used_blocks=10, knee=24, ideal_tokens=400)
    urgent = engine(running=2, used_blocks=10, knee=24, ideal_tokens=400, high_running=1)
    assert plain.dispatch(urgent) == plain.dispatch(normal) == judge.dispatch(normal) > judge.dispatch(urgent)
    assert plain.migration(urgent) == plain.migration(normal) == judge.migration(normal) > judge.migration(urgent)
    assert plain.dispatch(normal, high=True) == plain.dispatch(normal)
