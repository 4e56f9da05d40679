"""The protocol, explored: every interleaving of messages, copies, steps and faults of a small box.

What must hold in every state: blocks and batch places add up, no block that a peer may write is free, no two
engines run a request at one epoch, each token was drawn from exactly what its client has. And from every state,
by what the box does without a fault, every request can still end and leave nothing behind.
"""

import multiprocessing
import os
import re
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any

import pytest

from tests.protocol import faults
from tests.protocol.explorer import Outcome, explore
from tests.protocol.world import Budget, World

THREE = [([1, 2, 3], 3)]  # it takes three tokens to freeze a request between two of them
FOUR = [([1, 2, 3], 4)]
TWINS = [([1, 2, 3], 3), ([1, 2, 3], 2)]  # one prompt, so that one may find the other's blocks
RIVALS = [([1, 2, 3], 3), ([4, 5, 6], 3)]

MOVED = {"Reserve", "Reserved", "Handover", "Takeover", "Release", "Grant 2"}
SCENES = {
    "a move": (MOVED | {"Reclaim"}, dict(budget=Budget(moves=1))),
    "there and back": (MOVED | {"Grant 3"}, dict(budget=Budget(moves=2), requests=[([1, 2, 3], 5)])),
    "in the middle of a prefill": (
        MOVED | {"HandBack"}, dict(budget=Budget(moves=1), requests=[([1, 2, 3, 4, 5], 2)], batch_tokens=2)
    ),
    "a cancel": (MOVED | {"Aborted", "Cancel"}, dict(budget=Budget(moves=2, cancels=1))),
    "a preemption": (MOVED | {"Aborted"}, dict(budget=Budget(moves=1, preemptions=1), requests=FOUR)),
    "a preemption without a prefix cache": (
        MOVED | {"Aborted"}, dict(budget=Budget(moves=1, preemptions=1), requests=FOUR, prefix_caching=False)
    ),
    "a copy that fails": (
        MOVED | {"Aborted", "Reclaim"}, dict(budget=Budget(moves=2, failures=1), requests=[([1, 2, 3], 4)])
    ),
    "another priority": (MOVED | {"Reclaim", "Reprioritise"}, dict(budget=Budget(moves=1, changes=2))),
    "another priority where two compete": (
        MOVED | {"Reprioritise"},
        dict(budget=Budget(moves=1, changes=1), requests=[([1, 2, 3], 3), ([4, 5, 6], 1)], homes=[0, 0], pool=3),
    ),
    "a crash": (MOVED | {"Reclaim"}, dict(budget=Budget(moves=1, crashes=1))),
    "frozen for the whole copy": (
        MOVED | {"Reclaim", "Aborted"}, dict(budget=Budget(moves=1, crashes=1, cancels=1), how="blocking")
    ),
    "a crash and a cancel": (MOVED | {"Reclaim"}, dict(budget=Budget(moves=1, crashes=1, cancels=1))),
    "a crash and a copy that fails": (
        MOVED | {"Aborted", "Reclaim"}, dict(budget=Budget(moves=1, crashes=1, failures=1))
    ),
    "a false suspicion": (MOVED | {"Declined", "Aborted"}, dict(budget=Budget(moves=1, suspicions=1))),
    "the frontend restarts": (MOVED | {"HandBack", "Declined"}, dict(budget=Budget(moves=1, restarts=1))),
    "the frontend is lost": (MOVED | {"Declined", "Aborted"}, dict(budget=Budget(moves=1, losses=1, crashes=1))),
    "two with one prompt": (MOVED, dict(budget=Budget(moves=1), requests=TWINS, homes=[0, 1])),
    "two in a pool too small": (
        MOVED | {"Declined", "HandBack"}, dict(budget=Budget(moves=1), requests=RIVALS, homes=[0, 1], pool=3)
    ),
}  # fmt: skip
LARGE_SCENES = {
    "a crash among three": (MOVED | {"Reclaim"}, dict(budget=Budget(moves=1, crashes=1), engines=3)),
    "on to a third": (MOVED | {"Grant 3"}, dict(budget=Budget(moves=2), requests=[([1, 2, 3], 5)], engines=3)),
    "two crashes": (MOVED, dict(budget=Budget(moves=1, crashes=2))),
    "a crash and a suspicion": (MOVED, dict(budget=Budget(moves=1, crashes=1, suspicions=1))),
    "two moves and a crash": (MOVED, dict(budget=Budget(moves=2, crashes=1), requests=FOUR)),
    "two moves and a suspicion": (MOVED, dict(budget=Budget(moves=2, suspicions=1))),
    "another priority and a crash": (MOVED, dict(budget=Budget(moves=1, changes=1, crashes=1))),
    "another priority and a suspicion": (MOVED, dict(budget=Budget(moves=1, changes=1, suspicions=1))),
    "a crash and a restart": (MOVED, dict(budget=Budget(moves=1, crashes=1, restarts=1))),
    "two in a pool too small and a crash": (
        MOVED, dict(budget=Budget(moves=1, crashes=1), requests=RIVALS, homes=[0, 1], pool=4)
    ),
}  # fmt: skip
if os.environ.get("LLUMD_EXPLORE"):  # minutes each, and a few GB of memory
    SCENES |= LARGE_SCENES

FAULTS = {
    faults.LocalUnfreeze: ("output is missing", "there and back"),
    faults.ReservationTimeout: ("free and writable", "a move"),
    faults.AbortBeforeDrain: ("free and writable", "a cancel"),
    faults.LeakedReservation: ("stuck", "a crash"),
    faults.EarlyHashes: (r"drawn from \('garbage'", "two with one prompt"),
    faults.UnseenPreemption: (r"drawn from \('garbage'", "a preemption without a prefix cache"),
    faults.StaleStart: ("stuck", "a false suspicion"),
    faults.LostFrozen: ("leaked|not held|holders", "a crash and a copy that fails"),
    faults.DeathBeforeDrain: ("stuck", "a crash"),
    faults.NoStatement: ("stuck", "the frontend is lost"),
    faults.NoCarry: ("output is missing", "a move"),
    faults.StaleGrant: ("two owners", "a move"),
    faults.SilentTakeover: ("stuck", "a move"),
    faults.LostPriority: ("priority", "another priority"),
    faults.FrozenPriority: ("priority", "another priority"),
    faults.SameEpoch: ("two owners", "a false suspicion"),
}


@pytest.fixture(scope="module")
def explored(request):
    """Outcomes to come, by test: all chosen are explored on all processors from the first one's start."""
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        chosen = [item for item in request.session.items if item.module is request.module]
        yield {item.name: pool.submit(_explore, *_world_of(item.callspec.params)) for item in chosen}
        pool.shutdown(cancel_futures=True)


def _world_of(params: dict[str, Any]) -> tuple[type[World], dict[str, Any]]:
    if "fault" in params:
        return params["fault"], SCENES[FAULTS[params["fault"]][1]][1]
    if "late" in params:
        return World, OVERLAPPED[params["late"]][1] | {"overlap": True}
    return World, SCENES[params["scene"]][1]


def _explore(world: type[World], box: dict[str, Any]) -> Outcome:
    return explore(world(**box))


@pytest.fixture
def outcome(explored: dict[str, Future[Outcome]], request) -> Outcome:
    return explored[request.node.name].result()


def told(outcome: Outcome) -> str:
    return "\n".join([f"{outcome.flaw} after {outcome.states} states:", *map(str, outcome.path)])


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("scene", SCENES)
def test_every_state_is_sound_and_can_end(scene, outcome):
    expected, _ = SCENES[scene]
    print(f"{scene}: {outcome.states} states, {outcome.edges} transitions")
    assert outcome.flaw is None, told(outcome)
    assert outcome.complete
    assert expected <= outcome.said, f"never heard {expected - outcome.said}: the scene shows less than it should"


LATE = [([1, 2, 3], 4)]  # with a step in flight it takes one more to freeze a request
STRANGERS = [([1, 2, 3], 4), ([4, 5], 2)]
OVERLAPPED = {
    "a move": (MOVED | {"Reclaim"}, dict(budget=Budget(moves=1), requests=LATE)),
    "in the middle of a prefill": (
        MOVED, dict(budget=Budget(moves=1), requests=[([1, 2, 3, 4, 5], 4)], batch_tokens=2)
    ),
    "a preemption": (MOVED | {"Aborted"}, dict(budget=Budget(moves=1, preemptions=1), requests=LATE)),
    "a copy that fails": (MOVED | {"Reclaim"}, dict(budget=Budget(moves=1, failures=1), requests=LATE)),
}  # fmt: skip
LARGE_OVERLAPPED = {
    "there and back": (MOVED | {"Grant 3"}, dict(budget=Budget(moves=2), requests=[([1, 2, 3], 5)])),
    "a crash": (MOVED | {"Reclaim"}, dict(budget=Budget(moves=1, crashes=1), requests=LATE)),
    "into blocks of a request that left": (
        MOVED | {"Cancel"}, dict(budget=Budget(moves=1, cancels=1), requests=STRANGERS, homes=[0, 1], pool=7)
    ),
}  # fmt: skip
if os.environ.get("LLUMD_EXPLORE"):
    OVERLAPPED |= LARGE_OVERLAPPED


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("late", OVERLAPPED)
def test_every_state_is_sound_and_can_end_with_a_step_in_flight(late, outcome):
    expected, _ = OVERLAPPED[late]
    print(f"{late}: {outcome.states} states, {outcome.edges} transitions")
    assert outcome.flaw is None, told(outcome)
    assert outcome.complete
    assert expected <= outcome.said, f"never heard {expected - outcome.said}: the scene shows less than it should"


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_broken_rule_is_caught(fault, outcome):
    """In a scene that is sound with every rule in place."""
    flaw, _ = FAULTS[fault]
    print(told(outcome))
    assert outcome.flaw is not None and re.search(flaw, outcome.flaw), told(outcome)
