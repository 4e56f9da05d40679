"""Moves that end early: the destination declines, the request ends, or a copy fails."""

from __future__ import annotations

import pytest

from daemon.ipc.messages import Aborted, Declined, EngineIncarnation, Reserve, Reserved
from tests.engine.migration.harness import (
    DESTINATION,
    SEND_ABORTED,
    SOURCE,
    Engine,
    declined,
    move_until_copying,
    move_until_takeover,
    only,
    owned,
    relay,
    tell_reclaim,
)

# -- the destination declines -------------------------------------------------------------------


def reserve(move: int = 1, rid: int = 1, num_tokens: int = 8, longest: int = 50, reservation: int = 0) -> Reserve:
    return Reserve(
        move=move, rid=rid, epoch=1, frontend=0, slot=rid, reservation=reservation,
        num_tokens=num_tokens, longest=longest, hashes=[],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "sent"),
    [
        ({"blocks": 4}, reserve(num_tokens=20, longest=16)),
        ({"blocks": 4}, reserve(longest=17)),
        ({"max_incoming": 0}, reserve()),
        ({}, reserve(reservation=1)),
    ],
)
def test_a_move_without_room_is_declined(journal, options, sent):
    destination = Engine(journal, **options)
    answer = only(destination.llumlet.on_peer(SOURCE, sent, 0.0))
    assert isinstance(answer.message, Declined) and destination.is_empty


def test_kv_of_another_fingerprint_is_declined_by_name(journal):
    destination = Engine(journal)
    destination.blocks.fingerprint = 7
    answer = only(destination.llumlet.on_peer(SOURCE, reserve(), 0.0))
    assert answer.message.reason == "the engine has other weights, or KV of another form"
    assert destination.is_empty


def test_a_draining_engine_declines_every_move(destination):
    destination.llumlet.accept(False)
    answer = only(destination.llumlet.on_peer(SOURCE, reserve(), 0.0))
    assert isinstance(answer.message, Declined) and destination.is_empty


def test_a_place_in_the_batch_is_reserved(journal, make):
    destination = Engine(journal, seqs=2)
    destination.run(make(2))
    assert isinstance(only(destination.llumlet.on_peer(SOURCE, reserve(), 0.0)).message, Reserved)
    assert isinstance(only(destination.llumlet.on_peer(SOURCE, reserve(move=2), 0.0)).message, Declined)
    destination.run(make(3))
    assert 3 not in destination.scheduler.running  # the place stays reserved
    destination.llumlet.on_peer(SOURCE, Aborted(move=1, rid=1, epoch=1), 0.0)
    destination.step()
    assert 3 in destination.scheduler.running


def test_running_requests_keep_a_block_to_grow_into(journal, make):
    destination = Engine(journal, blocks=5)
    destination.run(make(2, 7))
    large = only(destination.llumlet.on_peer(SOURCE, reserve(num_tokens=12, longest=12), 0.0))
    assert isinstance(large.message, Declined)
    small = only(destination.llumlet.on_peer(SOURCE, reserve(num_tokens=8, longest=12), 0.0))
    assert isinstance(small.message, Reserved)


def test_after_declined_the_request_continues_and_the_order_ends(source, make):
    request = source.run(make())
    source.move()
    assert source.llumlet.on_peer(DESTINATION, declined(), 0.0) == [SEND_ABORTED]
    assert source.llumlet.idle and source.step() == [] and request.num_output == 2


def test_a_late_answer_to_an_older_move_changes_nothing(source, destination, make):
    source.run(make())
    first = relay(source.move(), SOURCE, destination)
    source.llumlet.on_peer(DESTINATION, declined(), 0.0)
    second = only(source.move())
    assert second.message.move == 2
    assert relay(first, DESTINATION, source) == []


# -- the request ends, or loses its KV, during the move --------------------------------------------


def test_the_move_of_a_finished_request_is_aborted_after_its_copy(source, destination, make):
    source.run(make(max_tokens=3), 2)
    copy = move_until_copying(source, destination)
    assert source.step() == [] and source.scheduler.get(1) is None
    assert source.llumlet.copied(copy.move, 0.0) == [SEND_ABORTED]
    assert source.is_empty and source.llumlet.outgoing == {}


def test_the_move_of_a_request_that_finishes_before_the_freeze_is_aborted(source, destination, make):
    source.run(make(max_tokens=3), 2)
    source.llumlet.copied(move_until_copying(source, destination).move, 0.0)
    assert source.step() == [SEND_ABORTED]


@pytest.mark.parametrize("readmitted", [False, True])
def test_the_move_of_a_preempted_request_is_aborted_even_if_it_runs_again(source, destination, make, readmitted):
    request = source.run(make(), 2)
    source.llumlet.copied(move_until_copying(source, destination).move, 0.0)
    source.scheduler.preempt(request, 0.0)
    actions = source.step() if readmitted else source.llumlet.tick(0.0)
    assert SEND_ABORTED in actions and not source.llumlet.frozen


@pytest.mark.parametrize("when", ["reserving", "copying", "ready", "tail"])
def test_a_cancel_frees_the_source_at_once_and_the_destination_after_the_copy(source, destination, make, when):
    source.run(make(), 2)
    actions = source.move()
    answers = relay(actions, SOURCE, destination)
    if when != "reserving":
        relay(answers, DESTINATION, source)
    if when in ("ready", "tail"):
        source.llumlet.copied(1, 0.0)
    if when == "tail":
        source.step()
    actions = source.llumlet.on_release(rid=1, epoch=1, now=0.0)
    source.check()
    assert source.is_empty
    if when in ("copying", "tail"):
        assert actions == []
        actions = source.llumlet.copied(1, 0.0)
    assert actions == [SEND_ABORTED]
    relay(actions, SOURCE, destination)
    assert destination.is_empty and not source.llumlet.outgoing


def test_a_cancel_after_the_handover_sends_no_aborted(source, destination, make):
    source.run(make(), 2)
    move_until_takeover(source, destination)
    assert source.llumlet.on_release(rid=1, epoch=1, now=0.0) == []
    assert source.is_empty and not destination.is_empty
    assert destination.llumlet.on_release(rid=1, epoch=1, now=0.0) == []
    assert destination.is_empty


def test_only_aborted_frees_a_reservation(source, destination, make):
    source.run(make(), 2)
    move_until_copying(source, destination)
    used = destination.blocks.num_used
    destination.llumlet.on_release(rid=1, epoch=5, now=0.0)
    destination.llumlet.on_owned_requests(0, owned({}), 0.0)
    destination.llumlet.on_peer_death(EngineIncarnation(0, 0), 0.0)  # an earlier incarnation of the source
    destination.llumlet.on_peer_death(EngineIncarnation(2, 1), 0.0)
    destination.llumlet.tick(1e9)
    assert destination.blocks.num_used == used
    destination.llumlet.on_peer_death(EngineIncarnation(0, 3), 0.0)  # two incarnations have passed unseen
    assert destination.is_empty


@pytest.mark.parametrize("phase", ["copying", "tail", "aborting"])
def test_a_failed_copy_frees_the_reservation_and_keeps_the_request(source, destination, make, phase):
    request = source.run(make(), 2)
    move_until_copying(source, destination)
    if phase == "tail":
        source.llumlet.copied(1, 0.0)
        source.step()
    if phase == "aborting":
        source.llumlet.on_release(rid=1, epoch=1, now=0.0)
    aborted, *others = source.llumlet.copy_failed(1, 0.0)
    relay([aborted], SOURCE, destination)
    assert destination.is_empty and not source.llumlet.orders
    assert others == ([tell_reclaim(start=3)] if phase == "tail" else [])
    assert source.scheduler.running.get(1) is (request if phase == "copying" else None)
    assert source.llumlet.copy_failed(1, 0.0) == []
