"""Why `llumd` judges compute: a pool of a million tokens is never what an engine runs out of.

Two engines in each scene, one of which is overloaded while its memory is all but empty.
"""

from __future__ import annotations

import pytest

from daemon.control.policy.dispatch import choose
from daemon.control.policy.freeness import NOTHING, POLICIES, Policy
from daemon.control.policy.rebalancing import Pair, RebalanceRules, pair
from daemon.enums import MigrationReason
from daemon.ipc.messages import EngineFacts
from tests.control.factories import engine

POOL = {"total_blocks": 62_500, "knee": 64, "max_num_seqs": 512}  # blocks of 16 tokens
BY_MEMORY = [POLICIES["paper"], POLICIES["artifact"]]
LLUMD = POLICIES["llumd"]

# 200,000 tokens of prompts to read, which take up a fifth of the pool; beside a batch of short chats.
READING = engine(**POOL, used_blocks=12_600, running=4, pending_prefill_tokens=200_000)
CHATTING = engine(**POOL, used_blocks=1_000, running=20)
# Two and a half knees of chats; beside a few longer ones.
CROWDED = engine(**POOL, used_blocks=8_000, running=160, step_seconds=0.05)
ROOMY = engine(**POOL, used_blocks=7_000, running=24, step_seconds=0.02)

scenes = pytest.mark.parametrize(
    ("overloaded", "other"),
    [(READING, CHATTING), (CROWDED, ROOMY)],
    ids=["a long prefill is pending", "the batch is beyond the knee"],
)


@scenes
@pytest.mark.parametrize("policy", BY_MEMORY, ids=lambda policy: policy.name)
def test_memory_alone_never_pairs_them(policy: Policy, overloaded: EngineFacts, other: EngineFacts):
    facts: list[EngineFacts | None] = [overloaded, other]
    assert pair(facts, RebalanceRules.of(policy)) == []
    assert min(policy.migration(overloaded), policy.migration(other)) > policy.marks.migrate_low


@scenes
def test_llumd_pairs_them_for_lack_of_compute(overloaded: EngineFacts, other: EngineFacts):
    facts: list[EngineFacts | None] = [overloaded, other]
    assert pair(facts, RebalanceRules.of(LLUMD)) == [Pair(0, 1, MigrationReason.COMPUTE)]


@pytest.mark.parametrize("policy", BY_MEMORY, ids=lambda policy: policy.name)
def test_memory_alone_sends_the_next_request_behind_the_prefill(policy: Policy):
    """It sees four requests with 200,000 tokens of room each."""
    assert choose([READING, CHATTING], [NOTHING] * 2, 0, policy=policy) == 0


@scenes
@pytest.mark.parametrize("high", [False, True], ids=["normal", "high"])
def test_llumd_sends_the_next_request_elsewhere(overloaded: EngineFacts, other: EngineFacts, high: bool):
    for turn in range(2):
        assert choose([overloaded, other], [NOTHING] * 2, turn, high=high) == 1
        assert choose([other, overloaded], [NOTHING] * 2, turn, high=high) == 0


@scenes
def test_a_knee_that_was_not_measured_is_the_size_of_the_batch(overloaded: EngineFacts, other: EngineFacts):
    """Of 512, of which 160 is not much: measuring is what tells."""

    def blind(facts: EngineFacts) -> EngineFacts:
        return engine(**{name: getattr(facts, name) for name in facts.__struct_fields__} | {"knee": 0})

    found = pair([blind(overloaded), blind(other)], RebalanceRules.of(LLUMD))
    assert bool(found) == (overloaded is READING)
