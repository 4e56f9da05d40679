"""Pairing: who gives to whom, that pairs are well formed for any facts, and that noise changes nothing."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.control.policy.freeness import POLICIES, Policy
from daemon.control.policy.rebalancing import Pair, RebalanceRules, explain, pair
from daemon.enums import MigrationReason
from daemon.ipc.messages import EngineFacts, EngineState
from tests.control.factories import engine

LLUMD = POLICIES["llumd"]
DEFAULT = RebalanceRules()
LARGE = {"total_blocks": 62_500, "knee": 64}  # a million tokens
each_policy = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)


def roomy(free: float, running: int = 4, **fields: int) -> EngineFacts:
    """An engine whose memory leaves `free` tokens for each of its requests, and whose compute is plentiful."""
    return engine(total_blocks=1000, used_blocks=1000 - free * running / 16, running=running, knee=4096, **fields)


some_engine = st.builds(
    engine,
    state=st.sampled_from([EngineState.SERVING] * 5 + [EngineState.DRAINING, EngineState.PARKED]),
    block_size=st.sampled_from([16, 16, 16, 32]),
    used_blocks=st.integers(0, 110),
    running=st.integers(0, 80),
    waiting=st.integers(0, 4),
    head_demand_blocks=st.integers(0, 40),
    preempted_waiting=st.integers(0, 9).map(lambda n: max(0, n - 8)),
    high_running=st.integers(0, 9).map(lambda n: max(0, n - 8)),
    incoming=st.integers(0, 4).map(lambda n: max(0, n - 3)),
    outgoing=st.integers(0, 4).map(lambda n: max(0, n - 3)),
)
boxes = st.lists(st.none() | some_engine, max_size=9)
stale = st.lists(
    st.builds(
        Pair,
        st.integers(0, 10),
        st.integers(0, 10),
        st.sampled_from([r for r in MigrationReason if r is not MigrationReason.OPERATOR]),
    ),
    max_size=4,
)


def check(pairs: list[Pair], facts: list[EngineFacts | None], config: RebalanceRules) -> None:
    sources, destinations = [p.source for p in pairs], [p.destination for p in pairs]
    assert not set(sources) & set(destinations)
    assert len({(p.source, p.destination) for p in pairs}) == len(pairs)
    for i in {*sources, *destinations}:
        assert (sources + destinations).count(i) <= config.per_engine
    for p in pairs:
        source, destination = facts[p.source], facts[p.destination]
        assert source is not None and source.running + source.waiting
        assert destination is not None and destination.state == EngineState.SERVING
        assert source.block_size == destination.block_size
        assert (p.reason == MigrationReason.DRAINING) == (source.state != EngineState.SERVING)
        if p.reason != MigrationReason.DRAINING:
            assert config.policy.migration(source) < config.policy.migration(destination)
        if config.policy.sheds_preempted:
            assert not destination.preempted_waiting


@each_policy
@given(facts=boxes, held=stale, per_engine=st.integers(1, 3))
def test_pairs_are_well_formed_whatever_the_facts(policy, facts, held, per_engine):
    config = RebalanceRules(policy, 48, 96, per_engine=per_engine)
    pairs = pair(facts, config, held)
    check(pairs, facts, config)
    for new in set(pairs) - set(held):
        source, destination = facts[new.source], facts[new.destination]
        assert source.incoming == 0 or source.state != EngineState.SERVING
        assert destination.outgoing == 0 or (new.source, new.destination) in {(p[0], p[1]) for p in held}
    assert pair(facts, config, pairs) == pairs  # nothing changes while nothing changes


@each_policy
@given(facts=boxes)
def test_a_drain_goes_on_wherever_somebody_can_take(policy: Policy, facts: list[EngineFacts | None]):
    """Of the engines still free, none drains while another of its kind serves, unless the freest is taken."""
    config = RebalanceRules(policy, 48, 96)
    taken = {i for p in pair(facts, config) for i in p[:2]}
    serving = [
        (i, f) for i, f in enumerate(facts) if f is not None and f.state == EngineState.SERVING
        if not (policy.sheds_preempted and f.preempted_waiting)
    ]  # fmt: skip
    for i, source in enumerate(facts):
        if source is None or source.state == EngineState.SERVING or i in taken or source.incoming + source.outgoing:
            continue
        kin = [(policy.migration(f), j) for j, f in serving if f.block_size == source.block_size]
        if kin and source.running + source.waiting:
            freest = max(free for free, _ in kin)
            moving = {j for j, f in serving if f.incoming + f.outgoing}
            assert all(j in taken | moving for free, j in kin if free == freest)


@each_policy
@given(facts=boxes)
def test_no_pair_is_left_unmade(policy: Policy, facts: list[EngineFacts | None]):
    """Of the engines still free, none is below the low mark while another of its kind is above the high one."""
    config = RebalanceRules(policy, 48, 96)
    taken = {i for p in pair(facts, config) for i in p[:2]}
    left = [f for i, f in enumerate(facts) if f is not None and i not in taken and not f.incoming + f.outgoing]
    left = [f for f in left if f.state == EngineState.SERVING and not f.preempted_waiting]
    low = [f for f in left if policy.migration(f) < 48 and f.running + f.waiting > 1]
    high = [f for f in left if policy.migration(f) > 96]
    assert not {f.block_size for f in low} & {f.block_size for f in high}


def test_lowest_goes_with_highest():
    facts = [roomy(20), roomy(200), roomy(-5), roomy(56), roomy(500), roomy(40)]
    assert pair(facts, DEFAULT) == [Pair(2, 4, MigrationReason.MEMORY), Pair(0, 1, MigrationReason.MEMORY)]


def test_a_lone_request_stays_where_it_is():
    assert pair([engine(used_blocks=100, running=1), engine()], DEFAULT) == []
    assert len(pair([engine(used_blocks=100, running=2), engine()], DEFAULT)) == 1


def test_the_queue_head_asks_for_room():
    """De-fragmentation: what runs would do, but its head does not fit, and elsewhere there is room."""
    fragmented = engine(used_blocks=80, running=4)
    blocked = engine(used_blocks=80, running=4, waiting=1, head_demand_blocks=30, waiting_tokens=480)
    other = engine(used_blocks=50, running=4)
    for policy in POLICIES.values():
        config = RebalanceRules.of(policy)
        assert pair([fragmented, other], config) == []
        assert pair([blocked, other], config) == [Pair(0, 1, MigrationReason.MEMORY)]


def test_normal_requests_leave_an_urgent_one():
    facts = [engine(**LARGE, used_blocks=700, running=12, high_running=1), engine(**LARGE, used_blocks=60, running=5)]
    assert pair(facts, DEFAULT) == [Pair(0, 1, MigrationReason.COMPUTE)]


@pytest.mark.parametrize("state", [EngineState.DRAINING, EngineState.PARKED])
def test_what_drains_goes_first_and_to_the_freest(state: EngineState):
    draining = roomy(900, running=1, state=state)
    assert pair([roomy(10), draining, roomy(300)], DEFAULT) == [Pair(1, 2, MigrationReason.DRAINING)]
    assert pair([draining, roomy(52)], DEFAULT) == [Pair(0, 1, MigrationReason.DRAINING)]
    assert pair([roomy(900, running=0, state=state), roomy(60)], DEFAULT) == []  # it is empty
    wide = RebalanceRules(per_engine=2)
    arriving = roomy(900, running=1, state=state, incoming=1)  # what arrives is sent on
    assert pair([arriving, roomy(300)], wide) == [Pair(0, 1, MigrationReason.DRAINING)]
    assert {p.destination for p in pair([draining, roomy(300), roomy(200)], wide)} == {1, 2}


def test_what_drains_is_given_even_to_who_is_short():
    draining = roomy(900, running=1, state=EngineState.DRAINING)
    assert pair([draining, roomy(5), roomy(40), roomy(-90)], DEFAULT) == [Pair(0, 2, MigrationReason.DRAINING)]
    assert pair([draining, roomy(-90)], DEFAULT) == [Pair(0, 1, MigrationReason.DRAINING)]
    shedding = roomy(40, waiting=1, preempted_waiting=1)
    assert pair([draining, shedding], DEFAULT) == []
    assert pair([draining, roomy(40, block_size=32)], DEFAULT) == []


def test_what_drains_turns_to_another_only_where_that_is_freer_by_far():
    draining = roomy(900, running=1, state=EngineState.DRAINING)
    held = [Pair(0, 1, MigrationReason.DRAINING)]
    assert pair([draining, roomy(5), roomy(20)], DEFAULT, held) == held
    assert pair([draining, roomy(5), roomy(40)], DEFAULT, held) == [Pair(0, 2, MigrationReason.DRAINING)]
    assert pair([draining, roomy(40), roomy(300)], DEFAULT, held) == held  # who is not short keeps it


def test_a_preempted_request_makes_a_source():
    facts = [roomy(60, waiting=1, preempted_waiting=1), roomy(300)]
    assert pair(facts, DEFAULT) == [Pair(0, 1, MigrationReason.PREEMPTED)]
    assert pair(facts, RebalanceRules.of(POLICIES["paper"])) == []
    assert pair([roomy(10), roomy(300, waiting=1, preempted_waiting=1)], DEFAULT) == []


def test_who_is_still_moving_is_left_alone():
    assert pair([roomy(10, outgoing=1), roomy(300)], DEFAULT) == []
    assert pair([roomy(10), roomy(300, incoming=1)], DEFAULT) == []
    held = [Pair(0, 1, MigrationReason.MEMORY)]  # but a pair is not broken by its own migration
    assert pair([roomy(10, outgoing=1), roomy(300, incoming=1)], DEFAULT, held) == held


def test_more_pairs_an_engine_are_spread_first():
    wide = RebalanceRules(per_engine=2)
    pairs = pair([roomy(10), roomy(20), roomy(500), roomy(300)], wide)
    assert [p[:2] for p in pairs] == [(0, 2), (1, 3), (0, 3), (1, 2)]
    assert pair([roomy(10), roomy(300, outgoing=1)], wide) == []  # it still has the other role
    assert pair([roomy(10, incoming=1), roomy(300)], wide) == []


def test_what_was_held_is_not_believed_blindly():
    """Two roles, twice the same, an engine that does not exist, itself."""
    wide = RebalanceRules(per_engine=2)
    facts = [roomy(10), roomy(56), roomy(90)]  # the second could hold on as either
    first, second = Pair(0, 1, MigrationReason.MEMORY), Pair(1, 2, MigrationReason.MEMORY)
    assert pair(facts, wide, [first]) == [first, Pair(0, 2, MigrationReason.MEMORY)]
    assert pair(facts, wide, [second]) == [second, Pair(0, 2, MigrationReason.MEMORY)]
    assert second not in pair(facts, wide, [first, second])
    assert first not in pair(facts, wide, [second, first])
    assert pair(
        facts[:2], wide, [first, first, Pair(0, 2, MigrationReason.MEMORY), Pair(0, 0, MigrationReason.MEMORY)]
    ) == [first]


# -- hysteresis ------------------------------------------------------------------------------------


def test_a_pair_ends_delta_beyond_its_marks():
    held = [Pair(0, 1, MigrationReason.MEMORY)]
    assert pair([roomy(60), roomy(300)], DEFAULT) == []
    assert pair([roomy(60), roomy(300)], DEFAULT, held) == held
    assert pair([roomy(65), roomy(300)], DEFAULT, held) == []
    assert pair([roomy(20), roomy(52)], DEFAULT, held) == held
    assert pair([roomy(20), roomy(44)], DEFAULT, held) == []
    assert pair([None, roomy(300)], DEFAULT, held) == []


def test_a_pair_that_has_met_does_not_turn_round():
    """With one mark for both, as published, each side may pass the other before delta ends the pair."""
    single = RebalanceRules(low=48, high=48)
    held = [Pair(0, 1, MigrationReason.MEMORY)]
    assert pair([roomy(44), roomy(52)], single) == []
    assert pair([roomy(44), roomy(52)], single, held) == held
    assert pair([roomy(52), roomy(44)], single, held) == []
    assert pair([roomy(40), roomy(60)], single) == held


noises = st.lists(st.tuples(*[st.floats(-7.9, 7.9)] * 2), min_size=2, max_size=20)


@given(noises)
def test_noise_about_the_marks_makes_no_pair_flap(noises: list[tuple[float, float]]):
    """Noise of less than delta / 2 to both sides: a pair comes at most once and stays."""
    held: list[Pair] = []
    history = []
    for low, high in noises:
        facts = [roomy(DEFAULT.low + low), roomy(DEFAULT.high + high)]
        held = pair(facts, DEFAULT, held)
        history.append(bool(held))
    assert history == sorted(history)


# -- the large pool -------------------------------------------------------------------------------------


def _even_out(policy: Policy, running: list[int]) -> tuple[list[int], int]:
    """Move one request of 1,000 tokens a period and pair until no pair is left; the batches, and the moves."""
    config = RebalanceRules.of(policy)
    held: list[Pair] = []
    for moves in range(1000):
        facts = [engine(**LARGE, used_blocks=63 * n, running=n) for n in running]
        held = pair(facts, config, held)
        if not held:
            return running, moves
        for p in held:
            running[p.source] -= 1
            running[p.destination] += 1
    raise AssertionError("requests are moved for ever")


def test_a_million_tokens_even_out_by_compute_alone():
    """Memory is never more than a sixteenth full; one engine computes at its knee while others have little to do."""
    start = [64, 3, 60, 5]
    for name in ("paper", "artifact"):
        assert _even_out(POLICIES[name], list(start)) == (start, 0)
    after, moves = _even_out(LLUMD, list(start))
    assert sum(after) == sum(start) and 0 < moves < 60
    assert max(after) <= 0.57 * 64  # nobody is left below the low mark
    assert max(after) - min(after) <= 8


def test_a_monster_prompt_drives_others_away():
    facts = [engine(**LARGE, running=9, used_blocks=7000, pending_prefill_tokens=100_000), engine(**LARGE, running=9)]
    assert pair(facts, DEFAULT) == [Pair(0, 1, MigrationReason.COMPUTE)]
    assert pair(facts, RebalanceRules.of(POLICIES["paper"])) == []


# -- for operators ---------------------------------------------------------------------------------------


def test_explanation_names_every_engine_and_pair():
    facts = [roomy(20), roomy(200), None, roomy(56), roomy(0, running=0), roomy(900, state=EngineState.DRAINING)]
    lines = explain(facts, DEFAULT, [Pair(0, 1, MigrationReason.MEMORY)]).splitlines()
    assert lines[0] == "policy llumd: gives below 48, takes above 64 tokens a request"
    assert lines[1:7] == [
        "engine 0: serving, 4 running, 0 waiting, freeness 20: gives (memory)",
        "engine 1: serving, 4 running, 0 waiting, freeness 200: takes",
        "engine 2: absent",
        "engine 3: serving, 4 running, 0 waiting, freeness 56: stays as it is",
        "engine 4: serving, 0 running, 0 waiting, freeness inf: takes",
        "engine 5: draining, 4 running, 0 waiting, freeness -inf: gives (draining)",
    ]
    assert lines[7:] == [
        "engine 0 goes on moving requests to engine 1: memory",
        "engine 5 would move requests to engine 4: draining",
    ]
    assert explain([roomy(200)], DEFAULT).endswith("nothing to move")


@given(boxes, stale)
def test_explanation_says_what_pair_does(facts: list[EngineFacts | None], held: list[Pair]):
    text = explain(facts, DEFAULT, held)
    moves = [line for line in text.splitlines() if "mov" in line and "nothing" not in line]
    assert len(moves) == len(pair(facts, DEFAULT, held))


def test_impossible_marks_are_refused():
    for marks in ({"low": 50, "high": 40}, {"delta": -1}, {"per_engine": 0}, {"low": math.nan}):
        with pytest.raises(ValueError, match=r"mark|delta"):
            RebalanceRules(**marks)
