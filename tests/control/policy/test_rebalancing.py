"""Pairing: sources and destinations, well-formed pairs for any facts, and hysteresis against noise."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.control.policy.freeness import POLICIES, Policy
from daemon.control.policy.rebalancing import Pair, RebalanceRules, explain, pair
from daemon.enums import MigrationReason
from daemon.ipc.messages import EngineFacts, EngineState, PoolState
from tests.control.factories import engine_facts

LLUMD = POLICIES["llumd"]
DEFAULT = RebalanceRules()
LARGE = {"total_blocks": 62_500, "knee": 64}  # a million tokens
each_policy = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)


def engine_with_room(room: float, running: int = 4, **fields: Any) -> EngineFacts:
    """Return the facts of an engine with memory for `room` more tokens per request, and plenty of compute."""
    return engine_facts(
        total_blocks=1000, used_blocks=1000 - room * running / 16, running=running, knee=4096, **fields
    )


some_engine = st.builds(
    engine_facts,
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
some_boards = st.lists(st.none() | some_engine, max_size=9)
stale = st.lists(
    st.builds(
        Pair,
        st.integers(0, 10),
        st.integers(0, 10),
        st.sampled_from([r for r in MigrationReason if r is not MigrationReason.OPERATOR]),
    ),
    max_size=4,
)


def check_well_formed(pairs: list[Pair], facts: list[EngineFacts | None], rules: RebalanceRules) -> None:
    sources, destinations = [p.source for p in pairs], [p.destination for p in pairs]
    assert not set(sources) & set(destinations)
    assert len({(p.source, p.destination) for p in pairs}) == len(pairs)
    for i in {*sources, *destinations}:
        assert (sources + destinations).count(i) <= rules.per_engine
    for p in pairs:
        source, destination = facts[p.source], facts[p.destination]
        assert source is not None and source.running + source.waiting
        assert destination is not None and destination.state == EngineState.SERVING
        assert source.block_size == destination.block_size
        assert (p.reason == MigrationReason.DRAINING) == (source.state != EngineState.SERVING)
        if p.reason != MigrationReason.DRAINING:
            assert rules.policy.migration(source) < rules.policy.migration(destination)
        if rules.policy.sheds_preempted:
            assert not destination.preempted_waiting


@each_policy
@given(facts=some_boards, held=stale, per_engine=st.integers(1, 3))
def test_pairs_are_well_formed_for_any_facts(policy, facts, held, per_engine):
    rules = RebalanceRules(policy, 48, 96, per_engine=per_engine)
    pairs = pair(facts, rules, held)
    check_well_formed(pairs, facts, rules)
    for i, j in {p[:2] for p in pairs} - {p[:2] for p in held}:  # a held pair may go on for another reason
        assert facts[i].incoming == 0 or facts[i].state != EngineState.SERVING
        assert facts[j].outgoing == 0
    assert pair(facts, rules, pairs) == pairs  # with the same facts the pairs stay the same


@each_policy
@given(facts=some_boards)
def test_a_draining_engine_is_paired_if_an_engine_can_accept_its_requests(
    policy: Policy, facts: list[EngineFacts | None]
):
    """A draining engine has no pair only if no compatible engine serves, or the freest ones have their pairs."""
    rules = RebalanceRules(policy, 48, 96)
    paired = {i for p in pair(facts, rules) for i in p[:2]}
    serving = [
        (i, f) for i, f in enumerate(facts) if f is not None and f.state == EngineState.SERVING
        if not (policy.sheds_preempted and f.preempted_waiting)
    ]  # fmt: skip
    for i, source in enumerate(facts):
        if source is None or source.state == EngineState.SERVING or i in paired or source.incoming + source.outgoing:
            continue
        compatible = [(policy.migration(f), j) for j, f in serving if f.block_size == source.block_size]
        if compatible and source.running + source.waiting:
            freest = max(freeness for freeness, _ in compatible)
            moving = {j for j, f in serving if f.incoming + f.outgoing}
            assert all(j in paired | moving for freeness, j in compatible if freeness == freest)


@each_policy
@given(facts=some_boards)
def test_no_possible_pair_is_missing(policy: Policy, facts: list[EngineFacts | None]):
    """Of the engines without a pair, no two compatible ones are below the low and above the high threshold."""
    rules = RebalanceRules(policy, 48, 96)
    paired = {i for p in pair(facts, rules) for i in p[:2]}
    left = [f for i, f in enumerate(facts) if f is not None and i not in paired and not f.incoming + f.outgoing]
    left = [f for f in left if f.state == EngineState.SERVING and not f.preempted_waiting]
    low = [f for f in left if policy.migration(f) < 48 and f.running + f.waiting > 1]
    high = [f for f in left if policy.migration(f) > 96]
    assert not {f.block_size for f in low} & {f.block_size for f in high}


def test_the_least_free_source_is_paired_with_the_freest_destination():
    facts = [
        engine_with_room(20),
        engine_with_room(200),
        engine_with_room(-5),
        engine_with_room(56),
        engine_with_room(500),
        engine_with_room(40),
    ]
    assert pair(facts, DEFAULT) == [Pair(2, 4, MigrationReason.MEMORY), Pair(0, 1, MigrationReason.MEMORY)]


def test_an_engine_with_a_single_request_is_not_a_source():
    assert pair([engine_facts(used_blocks=100, running=1), engine_facts()], DEFAULT) == []
    assert len(pair([engine_facts(used_blocks=100, running=2), engine_facts()], DEFAULT)) == 1


def test_the_demand_of_the_queue_head_makes_a_source():
    """De-fragmentation: running requests have room, the queue head does not fit, and the other engine has room."""
    fragmented = engine_facts(used_blocks=80, running=4)
    blocked = engine_facts(used_blocks=80, running=4, waiting=1, head_demand_blocks=30, waiting_tokens=480)
    other = engine_facts(used_blocks=50, running=4)
    for policy in POLICIES.values():
        rules = RebalanceRules.of(policy)
        assert pair([fragmented, other], rules) == []
        assert pair([blocked, other], rules) == [Pair(0, 1, MigrationReason.MEMORY)]


def test_normal_requests_are_moved_away_from_one_of_high_priority():
    facts = [
        engine_facts(**LARGE, used_blocks=700, running=12, high_running=1),
        engine_facts(**LARGE, used_blocks=60, running=5),
    ]
    assert pair(facts, DEFAULT) == [Pair(0, 1, MigrationReason.COMPUTE)]


@pytest.mark.parametrize("state", [EngineState.DRAINING, EngineState.PARKED])
def test_a_draining_engine_is_paired_first_and_with_the_freest(state: EngineState):
    draining = engine_with_room(900, running=1, state=state)
    assert pair([engine_with_room(10), draining, engine_with_room(300)], DEFAULT) == [
        Pair(1, 2, MigrationReason.DRAINING)
    ]
    assert pair([draining, engine_with_room(52)], DEFAULT) == [Pair(0, 1, MigrationReason.DRAINING)]
    assert pair([engine_with_room(900, running=0, state=state), engine_with_room(60)], DEFAULT) == []  # it is empty
    wide = RebalanceRules(per_engine=2)
    arriving = engine_with_room(900, running=1, state=state, incoming=1)  # requests that still arrive are moved on
    assert pair([arriving, engine_with_room(300)], wide) == [Pair(0, 1, MigrationReason.DRAINING)]
    assert {p.destination for p in pair([draining, engine_with_room(300), engine_with_room(200)], wide)} == {1, 2}


def test_a_draining_engine_is_paired_even_with_an_engine_below_the_threshold():
    draining = engine_with_room(900, running=1, state=EngineState.DRAINING)
    assert pair([draining, engine_with_room(5), engine_with_room(40), engine_with_room(-90)], DEFAULT) == [
        Pair(0, 2, MigrationReason.DRAINING)
    ]
    assert pair([draining, engine_with_room(-90)], DEFAULT) == [Pair(0, 1, MigrationReason.DRAINING)]
    shedding = engine_with_room(40, waiting=1, preempted_waiting=1)
    assert pair([draining, shedding], DEFAULT) == []
    assert pair([draining, engine_with_room(40, block_size=32)], DEFAULT) == []


def test_a_draining_engine_changes_its_destination_only_for_a_much_freer_one():
    draining = engine_with_room(900, running=1, state=EngineState.DRAINING)
    held = [Pair(0, 1, MigrationReason.DRAINING)]
    assert pair([draining, engine_with_room(5), engine_with_room(20)], DEFAULT, held) == held
    assert pair([draining, engine_with_room(5), engine_with_room(40)], DEFAULT, held) == [
        Pair(0, 2, MigrationReason.DRAINING)
    ]
    assert (
        pair([draining, engine_with_room(40), engine_with_room(300)], DEFAULT, held) == held
    )  # a destination above the threshold is kept


def test_a_preempted_request_in_the_queue_makes_a_source():
    facts = [engine_with_room(60, waiting=1, preempted_waiting=1), engine_with_room(300)]
    assert pair(facts, DEFAULT) == [Pair(0, 1, MigrationReason.PREEMPTED)]
    assert pair(facts, RebalanceRules.of(POLICIES["paper"])) == []
    assert pair([engine_with_room(10), engine_with_room(300, waiting=1, preempted_waiting=1)], DEFAULT) == []


def test_an_engine_that_still_migrates_gets_no_new_pair():
    assert pair([engine_with_room(10, outgoing=1), engine_with_room(300)], DEFAULT) == []
    assert pair([engine_with_room(10), engine_with_room(300, incoming=1)], DEFAULT) == []
    held = [Pair(0, 1, MigrationReason.MEMORY)]  # a pair is not ended by its own migration
    assert pair([engine_with_room(10, outgoing=1), engine_with_room(300, incoming=1)], DEFAULT, held) == held


def test_several_pairs_per_engine_are_spread_over_engines_first():
    wide = RebalanceRules(per_engine=2)
    pairs = pair([engine_with_room(10), engine_with_room(20), engine_with_room(500), engine_with_room(300)], wide)
    assert [p[:2] for p in pairs] == [(0, 2), (1, 3), (0, 3), (1, 2)]
    assert pair([engine_with_room(10), engine_with_room(300, outgoing=1)], wide) == []  # it still has the other role
    assert pair([engine_with_room(10, incoming=1), engine_with_room(300)], wide) == []


def test_held_pairs_are_checked():
    """An engine with two roles, the same pair twice, an engine that does not exist, an engine paired with itself."""
    wide = RebalanceRules(per_engine=2)
    facts = [
        engine_with_room(10),
        engine_with_room(56),
        engine_with_room(90),
    ]  # engine 1 is within both widened thresholds
    first, second = Pair(0, 1, MigrationReason.MEMORY), Pair(1, 2, MigrationReason.MEMORY)
    assert pair(facts, wide, [first]) == [first, Pair(0, 2, MigrationReason.MEMORY)]
    assert pair(facts, wide, [second]) == [second, Pair(0, 2, MigrationReason.MEMORY)]
    assert second not in pair(facts, wide, [first, second])
    assert first not in pair(facts, wide, [second, first])
    assert pair(
        facts[:2], wide, [first, first, Pair(0, 2, MigrationReason.MEMORY), Pair(0, 0, MigrationReason.MEMORY)]
    ) == [first]


# -- hysteresis ------------------------------------------------------------------------------------


def test_a_pair_ends_delta_beyond_its_thresholds():
    held = [Pair(0, 1, MigrationReason.MEMORY)]
    assert pair([engine_with_room(60), engine_with_room(300)], DEFAULT) == []
    assert pair([engine_with_room(60), engine_with_room(300)], DEFAULT, held) == held
    assert pair([engine_with_room(65), engine_with_room(300)], DEFAULT, held) == []
    assert pair([engine_with_room(20), engine_with_room(52)], DEFAULT, held) == held
    assert pair([engine_with_room(20), engine_with_room(44)], DEFAULT, held) == []
    assert pair([None, engine_with_room(300)], DEFAULT, held) == []


def test_a_pair_is_not_reversed_when_both_sides_are_equally_free():
    """With one threshold for both sides, as published, each may pass the other before delta ends the pair."""
    single = RebalanceRules(low=48, high=48)
    held = [Pair(0, 1, MigrationReason.MEMORY)]
    assert pair([engine_with_room(44), engine_with_room(52)], single) == []
    assert pair([engine_with_room(44), engine_with_room(52)], single, held) == held
    assert pair([engine_with_room(52), engine_with_room(44)], single, held) == []
    assert pair([engine_with_room(40), engine_with_room(60)], single) == held


noises = st.lists(st.tuples(*[st.floats(-7.9, 7.9)] * 2), min_size=2, max_size=20)


@given(noises)
def test_noise_around_the_thresholds_does_not_make_pairs_flap(noises: list[tuple[float, float]]):
    """With noise below delta / 2 on both sides a pair is made at most once, and then stays."""
    held: list[Pair] = []
    history = []
    for low, high in noises:
        facts = [engine_with_room(DEFAULT.low + low), engine_with_room(DEFAULT.high + high)]
        held = pair(facts, DEFAULT, held)
        history.append(bool(held))
    assert history == sorted(history)


# -- the large pool -------------------------------------------------------------------------------------


def _even_out(policy: Policy, running: list[int]) -> tuple[list[int], int]:
    """Pair, and move one request of 1,000 tokens a period, until no pair is left. Return batches and move count."""
    rules = RebalanceRules.of(policy)
    held: list[Pair] = []
    for moves in range(1000):
        facts = [engine_facts(**LARGE, used_blocks=63 * n, running=n) for n in running]
        held = pair(facts, rules, held)
        if not held:
            return running, moves
        for p in held:
            running[p.source] -= 1
            running[p.destination] += 1
    raise AssertionError("requests are moved without end")


def test_only_compute_evens_out_engines_with_a_million_tokens():
    """Memory is at most a sixteenth full. Two engines compute near their knee while the others have little to do."""
    start = [64, 3, 60, 5]
    for name in ("paper", "artifact"):
        assert _even_out(POLICIES[name], list(start)) == (start, 0)
    after, moves = _even_out(LLUMD, list(start))
    assert sum(after) == sum(start) and 0 < moves < 60
    assert max(after) <= 0.57 * 64  # no engine is left below the low threshold
    assert max(after) - min(after) <= 8


def test_other_requests_are_moved_away_from_a_very_long_prompt():
    facts = [
        engine_facts(**LARGE, running=9, used_blocks=7000, pending_prefill_tokens=100_000),
        engine_facts(**LARGE, running=9),
    ]
    assert pair(facts, DEFAULT) == [Pair(0, 1, MigrationReason.COMPUTE)]
    assert pair(facts, RebalanceRules.of(POLICIES["paper"])) == []


# -- explanations ---------------------------------------------------------------------------------------


def test_the_explanation_has_a_line_for_every_engine_and_pair():
    facts = [
        engine_with_room(20),
        engine_with_room(200),
        None,
        engine_with_room(56),
        engine_with_room(0, running=0),
        engine_with_room(900, state=EngineState.DRAINING),
    ]
    lines = explain(facts, DEFAULT, [Pair(0, 1, MigrationReason.MEMORY)]).splitlines()
    assert lines[0] == "policy llumd: gives below 48, takes above 64 tokens a request"
    assert lines[1:7] == [
        "engine 0: serving, 4 running, 0 waiting, freeness 20: gives (memory)",
        "engine 1: serving, 4 running, 0 waiting, freeness 200: takes",
        "engine 2: absent",
        "engine 3: serving, 4 running, 0 waiting, freeness 56: stays as it is",
        "engine 4: serving, 0 running, 0 waiting, freeness max: takes",
        "engine 5: draining, 4 running, 0 waiting, freeness min: gives (draining)",
    ]
    assert lines[7:] == [
        "engine 0 goes on moving requests to engine 1: memory",
        "engine 5 would move requests to engine 4: draining",
    ]
    assert explain([engine_with_room(200)], DEFAULT).endswith("nothing to move")


@given(some_boards, stale)
def test_the_explanation_matches_the_pairs(facts: list[EngineFacts | None], held: list[Pair]):
    text = explain(facts, DEFAULT, held)
    moves = [line for line in text.splitlines() if "mov" in line and "nothing" not in line]
    assert len(moves) == len(pair(facts, DEFAULT, held))


def test_impossible_rules_are_refused():
    for fields in ({"low": 50, "high": 40}, {"delta": -1}, {"per_engine": 0}, {"low": math.nan}):
        with pytest.raises(ValueError, match=r"threshold|delta"):
            RebalanceRules(**fields)


# -- pools that are not open


def reaching(*states: PoolState) -> bytes:
    return bytes(states)


NOT, OPEN, FAILED = PoolState.NOT_OPEN, PoolState.OPEN, PoolState.FAILED


@pytest.mark.parametrize("closed", [NOT, FAILED])
def test_a_source_is_paired_only_with_engines_whose_pools_it_has_open(closed: PoolState):
    """Engine 2 is the freest."""
    facts = [
        engine_with_room(10, peer_pools=reaching(NOT, OPEN, closed)),
        engine_with_room(200, peer_pools=reaching(OPEN, NOT, OPEN)),
        engine_with_room(240, peer_pools=reaching(OPEN, OPEN, NOT)),
    ]
    assert pair(facts, DEFAULT) == [Pair(0, 1, MigrationReason.MEMORY)]
    assert pair([facts[0], None, facts[2]], DEFAULT) == []
    text = explain(facts, DEFAULT)
    assert "cannot copy to engine 2 (yet)" in text.splitlines()[1]
    assert text.count("cannot copy") == 1


def test_a_pair_ends_when_the_pool_of_its_destination_is_closed():
    """The destination has restarted. Its pool is opened again, and the pair is made again."""
    held = [Pair(0, 1, MigrationReason.MEMORY)]
    taker = engine_with_room(200)
    assert pair([engine_with_room(10, peer_pools=reaching(NOT, NOT)), taker], DEFAULT, held) == []
    assert pair([engine_with_room(10, peer_pools=reaching(NOT, OPEN)), taker], DEFAULT, held) == held


def test_a_draining_engine_prefers_open_pools_and_is_paired_without_one_for_its_waiting_requests():
    draining = {"state": EngineState.DRAINING}
    takers = [engine_with_room(20), engine_with_room(300)]
    to_less_free = engine_with_room(10, **draining, peer_pools=reaching(NOT, OPEN, NOT))
    assert pair([to_less_free, *takers], DEFAULT) == [Pair(0, 1, MigrationReason.DRAINING)]
    to_none = engine_with_room(10, **draining, peer_pools=reaching(NOT, NOT, FAILED))
    made = pair([to_none, *takers], DEFAULT)
    assert made == [Pair(0, 2, MigrationReason.DRAINING)]
    assert pair([to_less_free, *takers], DEFAULT, made) == [Pair(0, 1, MigrationReason.DRAINING)]


def test_facts_without_pool_states_say_nothing_against_a_pair():
    assert pair([engine_with_room(10), engine_with_room(200)], DEFAULT) == [Pair(0, 1, MigrationReason.MEMORY)]


def test_engines_with_other_kv_are_paired_only_to_hand_back_what_waits_for_a_draining_one():
    taker, equal = engine_with_room(300, fingerprint=7), engine_with_room(200)
    assert pair([engine_with_room(10), taker], DEFAULT) == []
    assert pair([engine_with_room(10), taker, equal], DEFAULT) == [Pair(0, 2, MigrationReason.MEMORY)]
    assert pair([engine_with_room(10), taker], DEFAULT, [Pair(0, 1, MigrationReason.MEMORY)]) == []
    draining = engine_with_room(10, state=EngineState.DRAINING)
    assert pair([draining, taker, equal], DEFAULT) == [Pair(0, 2, MigrationReason.DRAINING)]
    assert pair([draining, taker], DEFAULT) == [Pair(0, 1, MigrationReason.DRAINING)]
    lines = explain([engine_with_room(10), taker, equal], DEFAULT).splitlines()
    assert lines[1].endswith("other weights or KV than engine 1") and lines[3].endswith("KV than engine 1")
    assert lines[2].endswith("other weights or KV than engine 0, 2") and "cannot copy" not in "".join(lines)
