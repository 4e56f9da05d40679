"""Frozen and pending requests: the frontend decides which engine runs them."""

from __future__ import annotations

import pytest

from daemon.engine.migration.actions import Tell
from daemon.ipc.messages import Declined, HandBack, Reclaim
from tests.engine.migration.harness import (
    DESTINATION,
    SOURCE,
    Engine,
    move_until_copying,
    move_until_takeover,
    only,
    owned,
    relay,
    tell_reclaim,
)


def test_a_frozen_request_is_reclaimed_after_a_time_and_runs_when_granted(source, destination, make):
    request = source.run(make(), 2)
    move_until_takeover(source, destination)
    assert source.llumlet.tick(0.9) == [] and source.step(now=0.9) == []
    assert source.llumlet.tick(1.0) == [tell_reclaim(start=3)]
    assert source.llumlet.tick(9.0) == []
    source.llumlet.on_grant(rid=1, epoch=1, new_epoch=2, now=9.0)
    assert request.epoch == 2
    source.step()
    assert request.num_output == 4 and not source.llumlet.frozen
    destination.llumlet.on_release(rid=1, epoch=1, now=9.0)
    assert destination.is_empty


@pytest.mark.parametrize("when", ["tail", "handed"])
def test_a_frozen_request_is_reclaimed_when_the_destination_dies(source, destination, make, when):
    source.run(make(), 2)
    if when == "handed":
        move_until_takeover(source, destination)
    else:
        source.llumlet.copied(move_until_copying(source, destination).move, 0.0)
        source.step()
    assert source.llumlet.on_peer_death(DESTINATION, 0.0) == [tell_reclaim(start=3)]
    assert source.llumlet.copied(1, 0.0) == [] and source.llumlet.on_peer_death(DESTINATION, 0.0) == []


def test_the_death_of_the_destination_before_the_freeze_changes_nothing(source, destination, make):
    request = source.run(make(), 2)
    copy = move_until_copying(source, destination)
    assert source.llumlet.on_peer_death(DESTINATION, 0.0) == [] and source.llumlet.idle
    assert source.llumlet.copied(copy.move, 0.0) == [] and source.step() == [] and request.num_output == 3


def test_a_pending_request_survives_the_death_of_the_source(source, destination, make):
    source.run(make(), 2)
    move_until_takeover(source, destination)
    destination.llumlet.on_peer_death(SOURCE, 0.0)
    destination.llumlet.on_grant(rid=1, epoch=1, new_epoch=2, now=0.0)
    destination.step()
    assert destination.scheduler.get(1).num_output == 4


def test_a_handover_that_the_journal_does_not_confirm_is_declined_and_reclaimed(source, destination, make, journal):
    source.run(make(), 2)
    source.llumlet.copied(move_until_copying(source, destination).move, 0.0)
    tail = only(source.step())
    handover = source.llumlet.copied(tail.move, 0.0)
    del journal.slots[1]
    declined = relay(handover, SOURCE, destination)
    assert isinstance(only(declined).message, Declined) and destination.is_empty
    assert isinstance(only(relay(declined, DESTINATION, source)).message, Reclaim)


def test_grants_and_releases_of_other_epochs_change_nothing(source, destination, make):
    source.run(make(epoch=3), 2)
    move_until_takeover(source, destination)
    destination.llumlet.on_grant(rid=1, epoch=2, new_epoch=9, now=0.0)
    destination.llumlet.on_release(rid=1, epoch=2, now=0.0)
    source.llumlet.on_release(rid=1, epoch=2, now=0.0)
    assert len(destination.llumlet.pending) == len(source.llumlet.frozen) == 1


@pytest.mark.parametrize("epoch", [2, 3, 4])
def test_a_start_counts_only_above_the_epoch_held(source, destination, make, epoch):
    source.run(make(epoch=3), 2)
    move_until_takeover(source, destination)
    again = make(epoch=epoch)
    for engine in (source, destination):
        engine.llumlet.on_start(again, 0.0)
        engine.check()
        assert (engine.scheduler.get(1) is again) == (epoch == 4)
        assert (engine.llumlet.epoch_of(1)) == max(3, epoch)


def test_owned_requests_drops_reclaims_and_hands_back(source, destination, make):
    source.run(make(), 2)
    claim = move_until_takeover(source, destination)
    running = source.run(make(2))
    assert source.llumlet.on_owned_requests(0, owned({1: 1, 2: 1, 3: 4}), 0.0) == [
        tell_reclaim(start=3),
        Tell(0, HandBack(3, 4)),
    ]
    assert source.scheduler.get(2) is running
    assert destination.llumlet.on_owned_requests(0, owned({}), 0.0) == [Tell(0, claim)]
    destination.llumlet.on_release(1, 1, 0.0)  # the answer, if the request has ended
    assert destination.is_empty
    source.llumlet.on_owned_requests(7, owned({}), 0.0)  # of another frontend
    source.llumlet.on_owned_requests(0, owned({}, first=3), 0.0)  # of other requests
    assert source.llumlet.frozen
    source.llumlet.on_owned_requests(0, owned({2: 2}), 0.0)
    source.check()
    assert source.is_empty


@pytest.mark.parametrize("winner", ["source", "destination"])
def test_owned_requests_stands_in_for_a_lost_grant(source, destination, make, winner):
    """The frontend has journaled the award, and has died before it sent the Grant."""
    request = make()
    source.run(request, 2)
    move_until_takeover(source, destination)
    if winner == "source":
        source.llumlet.tick(1e9)
    engine, other = (source, destination) if winner == "source" else (destination, source)
    assert engine.llumlet.on_owned_requests(0, owned({1: 2}, accepted=request.num_output, priority=-3), 0.0) == []
    running = engine.scheduler.running[1]
    assert (running.epoch, running.params.priority) == (2, -3)
    other.llumlet.on_release(1, 1, 0.0)
    assert other.is_empty


def test_a_lost_grant_of_other_output_is_not_taken(source, destination, make):
    """The frontend has less output than this engine: the request was given to it again, by a Start that was lost."""
    request = make()
    source.run(request, 2)
    move_until_takeover(source, destination)
    less = owned({1: 2}, accepted=request.num_output - 1)
    assert destination.llumlet.on_owned_requests(0, less, 0.0) == [Tell(0, HandBack(1, 2))]
    assert destination.is_empty


def test_frozen_and_pending_requests_are_never_preempted(journal, source, make):
    """The pool runs out of blocks, and an urgent request arrives."""
    destination = Engine(journal, blocks=7, seqs=3)
    source.run(make(max_tokens=12), 2)
    move_until_takeover(source, destination)
    pending = only(destination.llumlet.pending)
    table = list(pending.block_table)
    destination.llumlet.on_start(make(2, 5, priority=1), 0.0)
    destination.step()
    destination.llumlet.on_start(make(3, 9, priority=-5), 0.0)
    for _ in range(12):
        destination.step()
    assert destination.scheduler.num_preemptions
    assert destination.llumlet.pending == [pending] and pending.block_table == table


def test_frozen_and_pending_requests_can_be_reprioritised(source, destination, make):
    frozen = source.run(make(), 2)
    move_until_takeover(source, destination)
    (pending,) = destination.llumlet.pending
    for engine in (source, destination):
        engine.llumlet.on_reprioritise(rid=1, epoch=2, priority=5)
        engine.llumlet.on_reprioritise(rid=1, epoch=1, priority=-1)
    assert (frozen.params.priority, pending.params.priority) == (-1, -1)
    destination.llumlet.on_grant(rid=1, epoch=1, new_epoch=2, now=0.0)
    assert destination.scheduler.running[1].params.priority == -1


def test_a_grant_cancels_an_older_epoch(source, destination, make, journal):
    stale = destination.run(make(epoch=1))
    source.run(make(epoch=2), 2)
    move_until_takeover(source, destination)
    destination.llumlet.on_grant(rid=1, epoch=2, new_epoch=3, now=0.0)
    destination.check()
    assert destination.scheduler.get(1).epoch == 3 and stale.block_table == []
