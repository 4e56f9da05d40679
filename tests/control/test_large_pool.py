"""Why the policy `llumd` considers compute: with a pool of a million tokens an engine never runs out of memory first.

Each scene has two engines. One is overloaded while its memory is almost empty.
"""

from __future__ import annotations

import pytest

from daemon.control.policy.dispatch import choose
from daemon.control.policy.freeness import NONE_IN_FLIGHT, POLICIES, Policy
from daemon.control.policy.rebalancing import Pair, RebalanceRules, pair
from daemon.enums import MigrationReason
from daemon.ipc.messages import EngineFacts
from tests.control.factories import engine_facts

POOL = {"total_blocks": 62_500, "knee": 64, "max_num_seqs": 512}  # blocks of 16 tokens
BY_MEMORY = [POLICIES["paper"], POLICIES["artifact"]]
LLUMD = POLICIES["llumd"]

# 200,000 tokens of prompts to compute, which use a fifth of the pool. The other engine has a batch of short chats.
PREFILLING = engine_facts(**POOL, used_blocks=12_600, running=4, pending_prefill_tokens=200_000)
CHATTING = engine_facts(**POOL, used_blocks=1_000, running=20)
# A batch of two and a half knees of chats. The other engine has a few longer ones.
CROWDED = engine_facts(**POOL, used_blocks=8_000, running=160, step_seconds=0.05)
ROOMY = engine_facts(**POOL, used_blocks=7_000, running=24, step_seconds=0.02)

scenes = pytest.mark.parametrize(
    ("overloaded", "other"),
    [(PREFILLING, CHATTING), (CROWDED, ROOMY)],
    ids=["a long prefill is pending", "the batch is beyond the knee"],
)


@scenes
@pytest.mark.parametrize("policy", BY_MEMORY, ids=lambda policy: policy.name)
def test_policies_that_consider_memory_alone_never_pair_the_engines(
    policy: Policy, overloaded: EngineFacts, other: EngineFacts
):
    facts: list[EngineFacts | None] = [overloaded, other]
    assert pair(facts, RebalanceRules.of(policy)) == []
    assert min(policy.migration(overloaded), policy.migration(other)) > policy.thresholds.migrate_low


@scenes
def test_llumd_pairs_the_engines_because_compute_is_scarce(overloaded: EngineFacts, other: EngineFacts):
    facts: list[EngineFacts | None] = [overloaded, other]
    assert pair(facts, RebalanceRules.of(LLUMD)) == [Pair(0, 1, MigrationReason.COMPUTE)]


@pytest.mark.parametrize("policy", BY_MEMORY, ids=lambda policy: policy.name)
def test_policies_that_consider_memory_alone_dispatch_behind_the_prefill(policy: Policy):
    """By memory, the engine has four requests with 200,000 tokens of room each."""
    assert choose([PREFILLING, CHATTING], [NONE_IN_FLIGHT] * 2, 0, policy=policy) == 0


@scenes
@pytest.mark.parametrize("high", [False, True], ids=["normal", "high"])
def test_llumd_dispatches_to_the_other_engine(overloaded: EngineFacts, other: EngineFacts, high: bool):
    for turn in range(2):
        assert choose([overloaded, other], [NONE_IN_FLIGHT] * 2, turn, high=high) == 1
        assert choose([other, overloaded], [NONE_IN_FLIGHT] * 2, turn, high=high) == 0


@scenes
def test_an_unmeasured_knee_is_the_maximum_batch_size(overloaded: EngineFacts, other: EngineFacts):
    """The maximum is 512, and a batch of 160 is far below it: only the measured knee shows the overload."""

    def without_knee(facts: EngineFacts) -> EngineFacts:
        return engine_facts(**{name: getattr(facts, name) for name in facts.__struct_fields__} | {"knee": 0})

    found = pair([without_knee(overloaded), without_knee(other)], RebalanceRules.of(LLUMD))
    assert bool(found) == (overloaded is PREFILLING)
