"""Ownership decisions: one winner an epoch, no token lost or doubled, and an answer for every claimant."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.control.policy import ownership
from daemon.control.policy.ownership import Decision, Order, Output, Ownership, fresh
from daemon.ipc.messages import (
    Cancel,
    EngineIncarnation,
    Grant,
    HandBack,
    Reclaim,
    Release,
    Reprioritise,
    Takeover,
    TokenLogprobs,
)

A, B, C = EngineIncarnation(0, 1), EngineIncarnation(1, 1), EngineIncarnation(2, 1)
HELD = Ownership(rid=5, epoch=3, owner=A, accepted=4)


def takeover(start=4, tokens=(), epoch=3, logprobs=None) -> Takeover:
    return Takeover(5, epoch, start, list(tokens), logprobs)


def reclaim(start=4, tokens=(), epoch=3) -> Reclaim:
    return Reclaim(5, epoch, start, list(tokens), None)


def test_the_destination_wins_and_the_source_is_released():
    decision = ownership.takeover(HELD, B, takeover(3, [13, 14, 15]))
    assert decision == Decision(
        Ownership(5, 4, B, 6), Output([14, 15], None), (Order(B, Grant(5, 3, 4)), Order(A, Release(5, 3)))
    )


def test_the_source_wins_and_no_engine_is_released():
    assert ownership.reclaim(HELD, A, reclaim()) == Decision(
        Ownership(5, 4, A, 4), orders=(Order(A, Grant(5, 3, 4)),)
    )


def test_logprobs_are_spliced_with_their_tokens():
    entries = [TokenLogprobs(-float(i), [], []) for i in range(3)]
    decision = ownership.takeover(HELD, B, takeover(3, [13, 14, 15], logprobs=entries))
    assert decision.output == Output([14, 15], entries[1:])


@pytest.mark.parametrize("epoch", [2, 4])
def test_claims_at_another_epoch_are_refused(epoch):
    refusal = (Order(B, Release(5, epoch)),)
    assert ownership.takeover(HELD, B, takeover(epoch=epoch)) == Decision(HELD, orders=refusal)
    assert ownership.reclaim(HELD._replace(owner=B), B, reclaim(epoch=epoch)).orders == refusal


def test_only_the_owner_may_reclaim_or_hand_back():
    former = EngineIncarnation(A.engine, A.incarnation - 1)
    assert ownership.reclaim(HELD, former, reclaim()) == Decision(HELD, orders=(Order(former, Release(5, 3)),))
    assert ownership.hand_back(HELD, former, HandBack(5, 3)) == Decision(HELD)
    assert ownership.hand_back(HELD, A, HandBack(5, 2)) == Decision(HELD)


def test_the_second_claim_at_an_epoch_is_refused():
    taken = ownership.takeover(HELD, B, takeover()).ownership
    assert ownership.reclaim(taken, A, reclaim()).orders == (Order(A, Release(5, 3)),)
    back = ownership.reclaim(HELD, A, reclaim()).ownership
    assert ownership.takeover(back, B, takeover()).orders == (Order(B, Release(5, 3)),)


def test_only_the_death_of_the_owner_orphans_a_request():
    assert ownership.engine_died(HELD, B) == ownership.engine_died(HELD, EngineIncarnation(0, 2)) == Decision(HELD)
    orphan = ownership.engine_died(HELD, A)
    assert orphan == Decision(HELD._replace(owner=None), redispatch=True)
    assert ownership.started(orphan.ownership, C) == Ownership(5, 4, C, 4)


def test_a_claim_on_an_orphan_is_granted():
    orphan = ownership.engine_died(HELD, A).ownership
    assert ownership.takeover(orphan, B, takeover()) == Decision(
        Ownership(5, 4, B, 4), orders=(Order(B, Grant(5, 3, 4)),)
    )


def test_a_request_handed_back_is_redispatched_without_orders():
    assert ownership.hand_back(HELD, A, HandBack(5, 3)) == Decision(HELD._replace(owner=None), redispatch=True)


def test_a_suspected_owner_is_sent_a_release():
    assert ownership.disown(HELD) == Decision(HELD._replace(owner=None), None, (Order(A, Release(5, 3)),), True)
    assert ownership.disown(HELD._replace(owner=None)).orders == ()


def test_a_cancel_is_sent_to_the_owner():
    assert ownership.cancel(HELD) == (Order(A, Cancel(5, 3)),)
    assert ownership.cancel(HELD._replace(owner=None)) == ()


def test_a_priority_is_sent_to_the_owner_at_its_epoch():
    urgent = HELD._replace(priority=-1, changed=True)
    assert ownership.reprioritise(HELD, -1) == Decision(urgent, orders=(Order(A, Reprioritise(5, 3, -1)),))
    assert ownership.reprioritise(HELD._replace(owner=None), -1) == Decision(urgent._replace(owner=None))


def test_the_winner_of_an_award_is_sent_a_changed_priority_once():
    changed = ownership.reprioritise(HELD, -1).ownership
    decision = ownership.takeover(changed, B, takeover())
    grant, priority, release = Grant(5, 3, 4), Reprioritise(5, 4, -1), Release(5, 3)
    assert decision.orders == (Order(B, grant), Order(B, priority), Order(A, release))
    assert decision.ownership == Ownership(5, 4, B, 4, -1)
    later = ownership.takeover(decision.ownership, C, takeover(epoch=4))
    assert later.orders == (Order(C, Grant(5, 4, 5)), Order(B, Release(5, 4)))
    assert ownership.reclaim(changed, A, reclaim()).orders == (Order(A, grant), Order(A, priority))


def test_a_restarted_request_keeps_its_priority():
    orphan = ownership.hand_back(ownership.reprioritise(HELD, -1).ownership, A, HandBack(5, 3)).ownership
    assert ownership.started(orphan, C) == Ownership(5, 4, C, 4, -1)


positions = st.integers(0, 12)


@given(positions, positions, positions)
def test_fresh_counts_the_tokens_that_are_accepted_already(accepted, start, count):
    known = fresh(accepted, start, count)
    if start > accepted:
        assert known is None
    else:
        assert known == len(set(range(start, start + count)) & set(range(accepted)))


@given(positions, positions, positions, st.sampled_from([A, B]))
def test_an_award_leaves_no_gap_and_no_duplicate(accepted, start, count, winner):
    """Each token is its own position: the accepted output must be 0, 1, 2, ..."""
    held = HELD._replace(accepted=accepted)
    carried = list(range(start, start + count))
    if winner == A:
        decision = ownership.reclaim(held, A, reclaim(start, carried))
    else:
        decision = ownership.takeover(held, B, takeover(start, carried))
    stream = list(range(accepted)) + (decision.output.tokens if decision.output else [])
    assert stream == list(range(len(stream)))
    lost = start > accepted or start + count < accepted
    assert decision.fault == decision.redispatch == lost
    if lost:
        assert decision.ownership == held._replace(owner=None) and not decision.output
        assert {o.to for o in decision.orders} == {A, winner}
        assert all(o.message == Release(5, 3) for o in decision.orders)
    else:
        assert decision.ownership == Ownership(5, 4, winner, max(accepted, start + count))
