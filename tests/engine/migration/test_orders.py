"""Orders of the coordinator: which request moves, and when the source stops."""

from __future__ import annotations

import pytest

from daemon.engine.migration.actions import Tell
from daemon.enums import MigrationMode, MigrationResult
from daemon.ipc.messages import EngineIncarnation, HandBack
from tests.engine.migration.harness import DESTINATION, THIRD, Engine, declined, move_until_takeover, only

# -- which request -----------------------------------------------------------------------------


@pytest.mark.parametrize(("choice", "rid"), [("shortest", 2), ("longest", 1), ("last", 3)])
def test_the_order_chooses_among_requests_of_one_class(source, make, choice, rid):
    for r, prompt in ((1, 20), (2, 5), (3, 10)):
        source.run(make(r, prompt))
    assert only(source.move(choice=choice)).message.rid == rid


def test_less_urgent_classes_leave_first_and_urgent_ones_stay(source, make):
    source.run(make(1, 20, priority=5))
    source.run(make(2, 5, priority=-1))
    source.run(make(3, 9))
    assert only(source.move()).message.rid == 1
    assert only(source.move(THIRD)).message.rid == 3
    assert source.move(EngineIncarnation(3, 1)) == []


def test_a_drain_moves_all_requests_and_hands_waiting_ones_back(journal, make):
    source = Engine(journal, seqs=2, max_outgoing=4)
    source.run(make(1, 20))
    source.run(make(2, 5, priority=-1))
    source.run(make(3, 9))
    source.llumlet.accept(False)
    actions = source.move(drain=True)
    assert actions[0] == Tell(0, HandBack(3, 1))
    assert {a.message.rid for a in actions[1:]} == {1, 2} and not source.scheduler.waiting


def test_a_drain_to_other_weights_hands_back_only_what_has_no_output(journal, make):
    source = Engine(journal, seqs=1, copy_refusal=lambda _: "other weights", has_same_weights=lambda _: False)
    source.run(make(1, 5), steps=2)
    source.scheduler.preempt(source.scheduler.running[1], 0.0)
    source.llumlet.on_start(make(2, 5), 0.0)
    source.llumlet.accept(False)
    assert source.move(drain=True) == [Tell(0, HandBack(2, 1))]
    assert [r.rid for r in source.scheduler.waiting] == [1]  # its output ends here
    assert source.step() == [] and 1 in source.scheduler.running
    assert source.move(rid=1, how=MigrationMode.RECOMPUTE) == []
    assert "other weights" in source.llumlet.reports[-1].detail


def test_an_engine_that_accepts_again_drains_no_longer(journal, make):
    source = Engine(journal, seqs=1, max_outgoing=1)
    source.run(make(1, 5))
    source.llumlet.accept(False)
    assert only(source.move(drain=True)).message.rid == 1
    source.llumlet.accept(True)
    source.llumlet.on_start(make(2, 5), 0.0)
    assert source.llumlet.tick(0.0) == [] and 2 in [r.rid for r in source.scheduler.waiting]
    assert source.move(drain=True) == []  # this order was sent before the change
    assert source.llumlet.tick(0.0) == [] and 2 in [r.rid for r in source.scheduler.waiting]


def test_an_order_applies_until_its_lease_ends(source, destination, make):
    for rid in (1, 2):
        source.run(make(rid, 5))
    assert move_until_takeover(source, destination).rid == 2
    source.llumlet.on_release(rid=2, epoch=1, now=0.0)
    assert only(source.step(now=9.0)).message.rid == 1
    source.llumlet.on_release(rid=1, epoch=1, now=9.0)
    source.llumlet.on_start(make(3, 5), 9.0)
    assert source.step(now=10.0) == [] and not source.llumlet.orders


@pytest.mark.parametrize("state", ["waiting", "barely prefilled"])
def test_a_request_without_kv_worth_a_copy_is_handed_back(journal, make, state):
    source = Engine(journal, tokens=3)
    source.llumlet.on_start(make(1, 30), 0.0)
    if state == "barely prefilled":
        source.step()
    assert source.move(rid=1) == [Tell(0, HandBack(1, 1))]
    assert source.is_empty and source.scheduler.get(1) is None


def test_an_unknown_request_is_not_moved(source):
    assert source.move(rid=99) == []


def test_there_are_at_most_max_outgoing_moves(journal, make):
    source = Engine(journal, max_outgoing=1)
    for rid in (1, 2):
        source.run(make(rid, 5))
    assert len(source.move()) == 1 and source.move(THIRD) == []
    source.llumlet.accept(False)
    assert source.move(drain=True) == []


# -- when the source stops ----------------------------------------------------------------------


def test_a_source_that_is_no_longer_busier_begins_no_move(journal, make):
    compared = []
    busy = True
    source = Engine(journal, is_busier_than=lambda peer: (compared.append(peer), busy)[1])
    for rid in (1, 2, 3):
        source.run(make(rid, 5))
    assert compared == []  # without an order the comparison is not needed
    assert len(source.move()) == 1 and compared == [DESTINATION]
    source.step()
    assert compared == [DESTINATION]  # not during a move
    busy = False
    source.llumlet.on_peer(DESTINATION, declined(), 0.0)
    assert source.move() == [] and source.llumlet.orders  # the order remains: the source may become busier again
    busy = True
    assert len(source.step(now=1.0)) == 1


@pytest.mark.parametrize("order", [{"drain": True}, {"rid": 1}])
def test_drains_and_single_requests_move_even_from_a_less_busy_source(journal, make, order):
    source = Engine(journal, is_busier_than=lambda peer: False)
    source.run(make(1, 5))
    source.llumlet.accept(not order.get("drain"))
    assert len(source.move(**order)) == 1


# -- a peer whose pool is not open


def test_one_request_is_not_moved_to_a_peer_whose_pool_is_not_open(journal, make):
    source = Engine(journal, copy_refusal=lambda peer: "its pool is being opened" if peer == DESTINATION else "")
    source.run(make(1, 5))
    assert source.move(rid=1) == []
    [report] = source.llumlet.reports
    assert (report.result, report.detail, report.to) == (MigrationResult.DECLINED, "its pool is being opened", 1)
    assert source.llumlet.idle and 1 in source.scheduler.running
    assert only(source.move(THIRD, rid=1)).message.rid == 1


def test_a_request_without_kv_needs_no_pool(journal, make):
    source = Engine(journal, copy_refusal=lambda peer: "its pool is being opened")
    source.llumlet.on_start(make(1, 30), 0.0)
    assert source.move(rid=1) == [Tell(0, HandBack(1, 1))]
    source.run(make(2, 5))
    assert source.move(rid=2, how=MigrationMode.RECOMPUTE) == [Tell(0, HandBack(2, 1))]


@pytest.mark.parametrize("drain", [False, True])
def test_a_standing_order_begins_when_the_pool_is_open(journal, make, drain):
    closed = ["its pool is being opened"]
    source = Engine(journal, seqs=2, copy_refusal=lambda peer: closed[0] if closed else "")
    for rid in (1, 2, 3):
        source.run(make(rid, 5))
    source.llumlet.accept(not drain)
    assert source.move(drain=drain) == ([Tell(0, HandBack(3, 1))] if drain else [])
    for _ in range(3):
        assert source.step() == source.llumlet.tick(1.0) == []
    closed.clear()
    assert {a.message.rid for a in source.llumlet.tick(1.0)} == ({1, 2} if drain else {2})
    assert {r.result for r in source.llumlet.reports} <= {MigrationResult.HANDED_BACK}
