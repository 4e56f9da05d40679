"""Exploration of the migration protocol: every interleaving of messages, copies, steps and faults in a small world.

In every state: blocks and batch places add up, no block that a peer may write is free, no two engines run a request
at one epoch, and each token was drawn from exactly the text that its client has. And from every state, every
request can still end without a further fault and leave nothing behind.

The fast run has each kind of fault around a move, and few pairs of faults (`SCENES`); of false suspicions only one in
a prefill; with a step in flight (`OVERLAPPED`) no fault but a preemption and a copy that fails. The other pairs, a
suspicion while a request decodes, three engines, and faults beside two requests are in the slow tests
(`LARGE_SCENES`, `LARGE_OVERLAPPED`). A broken rule (`FAULTS`) may be shown in any scene: its exploration ends early.
"""

import multiprocessing
import os
import re
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any

import pytest

from tests.protocol import faults
from tests.protocol.engine_model import Violation
from tests.protocol.explorer import Outcome, explore
from tests.protocol.world import Action, Budget, World

THREE = [([1, 2, 3], 3)]  # three tokens are the least for a freeze between two of them
TWO = [([1, 2, 3], 2)]
FOUR = [([1, 2, 3], 4)]
FIVE = [([1, 2, 3], 5)]
EQUAL_PROMPTS = [
    ([1, 2, 3], 3),
    ([1, 2, 3], 2),
]  # equal prompts, so that one request may find the blocks of the other
TWO_TENANTS = [([1, 2, 3], 3, b"a"), ([1, 2, 3], 2, b"b")]  # neither may find the blocks of the other
TWO_PROMPTS = [([1, 2, 3], 3), ([4, 5, 6], 3)]

MOVED = {"Reserve", "Reserved", "Handover", "Takeover", "Release", "Grant 2"}
SCENES = {
    "a move": (MOVED | {"Reclaim"}, dict(budget=Budget(moves=1))),
    "there and back": (MOVED | {"Grant 3"}, dict(budget=Budget(moves=2), requests=FOUR)),
    "in the middle of a prefill": (
        MOVED | {"HandBack taken"}, dict(budget=Budget(moves=1), requests=[([1, 2, 3, 4, 5], 2)], batch_tokens=2)
    ),
    "a cancel": (MOVED | {"Aborted", "Cancel"}, dict(budget=Budget(moves=2, cancels=1))),
    "a preemption": (MOVED | {"Aborted"}, dict(budget=Budget(moves=1, preemptions=1), requests=FOUR)),
    "a preemption without a prefix cache": (
        MOVED | {"Aborted"}, dict(budget=Budget(moves=1, preemptions=1), requests=FOUR, prefix_caching=False)
    ),
    "a copy that fails": (
        MOVED | {"Aborted", "Reclaim"}, dict(budget=Budget(moves=2, failures=1), requests=FOUR)
    ),
    "a change of priority": (MOVED | {"Reclaim", "Reprioritise"}, dict(budget=Budget(moves=1, changes=2))),
    "a change of priority where two compete": (
        MOVED | {"Reprioritise"},
        dict(budget=Budget(moves=1, changes=1), requests=[([1, 2, 3], 3), ([4, 5, 6], 1)], homes=[0, 0], pool=3),
    ),
    "a crash": (MOVED | {"Reclaim"}, dict(budget=Budget(moves=1, crashes=1))),
    "a crash before a freeze": ({"Reserve", "HandBack taken"}, dict(budget=Budget(moves=1, crashes=1), requests=TWO)),
    "frozen for the whole copy": (
        MOVED | {"Reclaim", "Aborted"}, dict(budget=Budget(moves=1, crashes=1), how="blocking")
    ),
    "a crash and a copy that fails": (
        MOVED | {"Aborted", "Reclaim"}, dict(budget=Budget(moves=1, crashes=1, failures=1))
    ),
    "a false suspicion in a prefill": (
        {"Reserve", "Aborted", "HandBack taken"},
        dict(budget=Budget(moves=1, suspicions=1), requests=[([1, 2, 3, 4, 5], 1)], batch_tokens=2),
    ),
    "a succession without a move": (
        {"HandBack taken", "OwnedRequests"}, dict(budget=Budget(successions=1, cancels=1))
    ),
    "a succession": (MOVED | {"Reclaim", "HandBack taken"}, dict(budget=Budget(moves=1, successions=1))),
    "a succession and a change of priority": (
        {"Reprioritise", "HandBack taken"}, dict(budget=Budget(changes=2, successions=1))
    ),
    "two successions": ({"HandBack taken"}, dict(budget=Budget(successions=2), requests=TWO)),
    "the frontend is lost": (MOVED | {"Declined"}, dict(budget=Budget(moves=1, losses=1))),
    "other weights after a crash": (
        MOVED | {"Declined"},
        dict(budget=Budget(moves=1, crashes=1), requests=[([1, 2, 3, 4, 5], 2)], batch_tokens=2, replaced=True),
    ),
    "other weights and a succession": (
        {"HandBack taken"}, dict(budget=Budget(crashes=1, successions=1), requests=[([1, 2, 3], 2)], replaced=True)
    ),
    "two with one prompt": (MOVED, dict(budget=Budget(moves=1), requests=EQUAL_PROMPTS, homes=[0, 1])),
    "two tenants with one prompt": (MOVED, dict(budget=Budget(moves=1), requests=TWO_TENANTS, homes=[0, 1])),
    "two in a pool too small": (
        MOVED | {"Declined", "HandBack taken"},
        dict(budget=Budget(moves=1), requests=TWO_PROMPTS, homes=[0, 1], pool=3),
    ),
}  # fmt: skip
LARGE_SCENES = {
    "frozen for the whole copy, and a cancel": (
        MOVED | {"Reclaim", "Aborted"}, dict(budget=Budget(moves=1, crashes=1, cancels=1), how="blocking")
    ),
    "a false suspicion": (MOVED | {"Declined", "Aborted"}, dict(budget=Budget(moves=1, suspicions=1))),
    "a crash and a cancel": (MOVED | {"Reclaim"}, dict(budget=Budget(moves=1, crashes=1, cancels=1))),
    "there and back with time between": (MOVED | {"Grant 3"}, dict(budget=Budget(moves=2), requests=FIVE)),
    "a crash among three": (MOVED | {"Reclaim"}, dict(budget=Budget(moves=1, crashes=1), engines=3)),
    "on to a third": (MOVED | {"Grant 3"}, dict(budget=Budget(moves=2), requests=FIVE, engines=3)),
    "two crashes": (MOVED, dict(budget=Budget(moves=1, crashes=2))),
    "a crash and a suspicion": (MOVED, dict(budget=Budget(moves=1, crashes=1, suspicions=1))),
    "two moves and a crash": (MOVED, dict(budget=Budget(moves=2, crashes=1), requests=FOUR)),
    "two moves and a suspicion": (MOVED, dict(budget=Budget(moves=2, suspicions=1))),
    "a change of priority and a crash": (MOVED, dict(budget=Budget(moves=1, changes=1, crashes=1))),
    "a change of priority and a suspicion": (MOVED, dict(budget=Budget(moves=1, changes=1, suspicions=1))),
    "the frontend is lost and a crash": (
        MOVED | {"Declined", "Aborted"}, dict(budget=Budget(moves=1, losses=1, crashes=1))
    ),
    "a crash and a succession": (MOVED, dict(budget=Budget(moves=1, crashes=1, successions=1))),
    "a cancel and a succession": (MOVED, dict(budget=Budget(moves=1, cancels=1, successions=1))),
    "a change of priority and a succession": (MOVED, dict(budget=Budget(moves=1, changes=1, successions=1))),
    "a suspicion and a succession": (MOVED, dict(budget=Budget(moves=1, suspicions=1, successions=1))),
    "two successions and a move": (MOVED, dict(budget=Budget(moves=1, successions=2))),
    "a succession with two requests": (
        MOVED, dict(budget=Budget(moves=1, successions=1), requests=TWO_PROMPTS, homes=[0, 1])
    ),
    "two in a pool too small and a crash": (
        MOVED, dict(budget=Budget(moves=1, crashes=1), requests=TWO_PROMPTS, homes=[0, 1], pool=4)
    ),
}  # fmt: skip

FAULTS = {
    faults.LocalUnfreeze: ("output is missing", "there and back"),
    faults.ReservationTimeout: ("free and writable", "a move"),
    faults.AbortBeforeDrain: ("free and writable", "a cancel"),
    faults.LeakedReservation: ("stuck", "a crash before a freeze"),
    faults.EarlyHashes: (r"drawn from \('garbage'", "two with one prompt"),
    faults.LostSalt: (r"drawn from \('garbage'", "two tenants with one prompt"),
    faults.UnseenPreemption: (r"drawn from \('garbage'", "a preemption without a prefix cache"),
    faults.StaleStart: ("stuck", "a false suspicion in a prefill"),
    faults.LostFrozen: ("leaked|not held|holders", "a crash and a copy that fails"),
    faults.DeathBeforeDrain: ("stuck", "a crash before a freeze"),
    faults.NoOwnedRequests: ("stuck", "the frontend is lost"),
    faults.DroppedClaim: ("stuck", "a succession"),
    faults.UnreadRings: ("output is missing", "a succession without a move"),
    faults.DoubledOutput: ("incoherent", "a succession without a move"),
    faults.UntoldPriority: ("priority", "a succession and a change of priority"),
    faults.NoCarriedOutput: ("output is missing", "a move"),
    faults.StaleGrant: ("two owners", "a move"),
    faults.SilentTakeover: ("stuck", "a move"),
    faults.LostPriority: ("priority", "a change of priority"),
    faults.FrozenPriority: ("priority", "a change of priority"),
    faults.ForeignKv: (r"drawn from \('garbage'", "other weights after a crash"),
    faults.ForeignWeights: ("incoherent", "other weights after a crash"),
    faults.SameEpoch: ("two owners", "a false suspicion"),
}


@pytest.fixture(scope="module")
def explored(request):
    """Futures of outcomes, by test name. All selected tests are explored at once, on all processors."""
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        chosen = [item for item in request.session.items if item.module is request.module]
        yield {item.name: pool.submit(_explore, *_world_of(item.callspec.params)) for item in chosen}
        pool.shutdown(cancel_futures=True)


def _with_large(scenes: dict[str, Any], large: dict[str, Any]) -> list[Any]:
    """Return the names of all scenes; the large ones are slow: each takes minutes and a few GB of memory."""
    return [*scenes, *(pytest.param(name, marks=pytest.mark.slow) for name in large)]


def _world_of(params: dict[str, Any]) -> tuple[type[World], dict[str, Any]]:
    if "fault" in params:
        return params["fault"], (SCENES | LARGE_SCENES)[FAULTS[params["fault"]][1]][1]
    if "lossless" in params:
        return NothingLost, dict(budget=LOSSLESS[params["lossless"]])
    if "overlapped_scene" in params:
        return World, (OVERLAPPED | LARGE_OVERLAPPED)[params["overlapped_scene"]][1] | {"overlap": True}
    return World, (SCENES | LARGE_SCENES)[params["scene"]][1]


def _explore(world: type[World], settings: dict[str, Any]) -> Outcome:
    return explore(world(**settings))


@pytest.fixture
def outcome(explored: dict[str, Future[Outcome]], request) -> Outcome:
    return explored[request.node.name].result()


def describe(outcome: Outcome) -> str:
    """Return the flaw and the path to it."""
    return "\n".join([f"{outcome.flaw} after {outcome.states} states:", *map(str, outcome.path)])


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("scene", _with_large(SCENES, LARGE_SCENES))
def test_every_state_is_correct_and_can_end(scene, outcome):
    expected, _ = (SCENES | LARGE_SCENES)[scene]
    print(f"{scene}: {outcome.states} states, {outcome.edges} transitions")
    assert outcome.flaw is None, describe(outcome)
    assert outcome.complete
    never_read = expected - outcome.messages_read
    assert not never_read, "the scene does not cover all that it should"


class NothingLost(World):
    """A frontend has sent all its commands when it dies, and only a request that decodes is moved.

    So no request may ever be handed back: everything that is computed is used.
    """

    def actions(self) -> Iterator[Action]:
        return (action for action in super().actions() if not self._loses(*action))

    def _loses(self, kind: str, *rest: Any) -> bool:
        if kind != "move":
            return kind == "succeed" and any(rest[-1])
        index, _, rid = rest
        request = self.engines[index].scheduler.running.get(rid)
        return request is None or request.pending > 1

    def apply(self, action: Action) -> None:
        super().apply(action)
        if self.message_read == "HandBack taken":
            raise Violation("a request is handed back")


LOSSLESS = {"one": Budget(moves=1, successions=1), "one and a change of priority": Budget(changes=1, successions=1)}


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("lossless", LOSSLESS)
def test_a_succession_computes_nothing_again(lossless, outcome):
    assert outcome.flaw is None, describe(outcome)
    assert outcome.complete


FOUR_OVERLAPPED = [([1, 2, 3], 4)]  # with a step in flight, a freeze takes one more token
LONG_AND_SHORT = [([1, 2, 3], 4), ([4, 5], 2)]
OVERLAPPED = {
    "a move": (MOVED | {"Reclaim"}, dict(budget=Budget(moves=1), requests=FOUR_OVERLAPPED)),
    "in the middle of a prefill": (
        MOVED, dict(budget=Budget(moves=1), requests=[([1, 2, 3, 4, 5], 4)], batch_tokens=2)
    ),
    "a preemption": (MOVED | {"Aborted"}, dict(budget=Budget(moves=1, preemptions=1), requests=FOUR_OVERLAPPED)),
    "a copy that fails": (MOVED | {"Reclaim"}, dict(budget=Budget(moves=1, failures=1), requests=FOUR_OVERLAPPED)),
}  # fmt: skip
LARGE_OVERLAPPED = {
    "there and back": (MOVED | {"Grant 3"}, dict(budget=Budget(moves=2), requests=FIVE)),
    "a crash": (MOVED | {"Reclaim"}, dict(budget=Budget(moves=1, crashes=1), requests=FOUR_OVERLAPPED)),
    "into blocks of a request that left": (
        MOVED | {"Cancel"}, dict(budget=Budget(moves=1, cancels=1), requests=LONG_AND_SHORT, homes=[0, 1], pool=7)
    ),
}  # fmt: skip


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("overlapped_scene", _with_large(OVERLAPPED, LARGE_OVERLAPPED))
def test_every_state_is_correct_and_can_end_with_a_step_in_flight(overlapped_scene, outcome):
    expected, _ = (OVERLAPPED | LARGE_OVERLAPPED)[overlapped_scene]
    print(f"{overlapped_scene}: {outcome.states} states, {outcome.edges} transitions")
    assert outcome.flaw is None, describe(outcome)
    assert outcome.complete
    never_read = expected - outcome.messages_read
    assert not never_read, "the scene does not cover all that it should"


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_broken_rule_is_found(fault, outcome):
    """In a scene that has no flaw if all rules hold."""
    flaw, _ = FAULTS[fault]
    print(describe(outcome))
    assert outcome.flaw is not None and re.search(flaw, outcome.flaw), describe(outcome)
