"""The effect of each command that an engine reads from a frontend's ring."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from msgspec import DecodeError

from daemon.engine.fake.hash import expected_stream
from daemon.ipc.fabric import Fabric
from daemon.ipc.messages import (
    Cancel,
    Demand,
    HandBack,
    OwnedRequests,
    Refused,
    Reprioritise,
    Start,
    StepOutput,
    encode,
)
from tests.engine.loopback import ENGINE_INCARNATION, MAX_LEN, VOCAB, Loopback


@pytest.fixture
def loopback() -> Iterator[Loopback]:
    made = Loopback()
    yield made
    made.close()


def run(loopback: Loopback) -> dict[int, list[int]]:
    while loopback.step():
        pass
    return loopback.receive_streams()


def test_start_runs_the_journaled_request(loopback: Loopback):
    first = loopback.journal_request([1, 2, 3], max_tokens=20)
    second = loopback.journal_request([4] * 70, max_tokens=4, seed=9)
    loopback.send(first, second)
    assert loopback.inbox.consumed == Demand(loopback.incarnation, 2, 73)
    assert run(loopback) == {
        first.rid: expected_stream([1, 2, 3], 3, 20, VOCAB),
        second.rid: expected_stream([4] * 70, 9, 4, VOCAB),
    }
    assert loopback.scheduler.blocks.num_used == 0


def test_start_resumes_after_the_accepted_output(loopback: Loopback):
    whole = expected_stream([1, 2, 3], 3, 10, VOCAB)
    start = loopback.journal_request([1, 2, 3], max_tokens=10, epoch=2)
    loopback.journal.append(start.slot, whole[:4], None)
    loopback.send(start)
    while loopback.step():
        pass
    rows = [(m.epochs, m.starts, m.tokens) for m in loopback.receive() if isinstance(m, StepOutput)]
    assert rows == [([2], [4 + i], [token]) for i, token in enumerate(whole[4:])]


def closed(loopback: Loopback, start: Start) -> Start:
    loopback.journal.close(start.slot)
    return start


def overwritten(loopback: Loopback, start: Start) -> Start:
    loopback.journal.close(start.slot)
    assert loopback.journal_request([7] * 50).slot == start.slot  # overwritten by a request that is not started yet
    return start


def moved_on(loopback: Loopback, start: Start) -> Start:
    loopback.journal.assign(start.slot, start.epoch + 1, 0, ENGINE_INCARNATION)
    return start


@pytest.mark.parametrize("happen", [closed, overwritten, moved_on])
def test_a_stale_start_is_counted_and_not_run(loopback: Loopback, happen):
    """The engine counts demand exactly as the frontend does; otherwise the two totals would differ for ever."""
    loopback.send(happen(loopback, loopback.journal_request([1, 2, 3])))
    assert loopback.held_rids() == set()
    assert not loopback.step()
    assert loopback.receive() == []
    assert loopback.inbox.consumed == Demand(loopback.incarnation, 1, 3)


@pytest.mark.parametrize("at", ["prompt", "params", "output"])
def test_a_slot_that_changes_during_the_read_starts_nothing(
    loopback: Loopback, monkeypatch: pytest.MonkeyPatch, at: str
):
    """The frontend closes the request and overwrites it with another one during the read."""
    start = loopback.journal_request([1, 2, 3])
    read = getattr(loopback.view, at)

    def read_during_change(slot: int):
        monkeypatch.setattr(loopback.view, at, read)
        overwritten(loopback, start)
        if at == "params":
            raise DecodeError("bytes of two requests")
        return read(slot)

    monkeypatch.setattr(loopback.view, at, read_during_change)
    loopback.send(start)
    assert loopback.held_rids() == set()


def test_a_request_that_cannot_be_started_ends_and_no_other(loopback: Loopback, monkeypatch: pytest.MonkeyPatch):
    """Its journal is unreadable, or starting it raises: the engine refuses it and reads on."""
    broken, good, late = (loopback.journal_request([n, n]) for n in (1, 2, 3))
    read, on_start = loopback.view.params, loopback.llumlet.on_start

    def params(slot: int):
        if slot == broken.slot:
            raise DecodeError("not written by a frontend")
        return read(slot)

    def start(request, now):
        if request.rid == late.rid:
            raise RuntimeError("a fault of ours")
        return on_start(request, now)

    monkeypatch.setattr(loopback.view, "params", params)
    monkeypatch.setattr(loopback.llumlet, "on_start", start)
    loopback.send(broken, good, late)
    loopback.outbox.flush()
    assert [(m.rid, m.epoch) for m in loopback.receive() if isinstance(m, Refused)] == [
        (broken.rid, 1),
        (late.rid, 1),
    ]
    assert loopback.inbox.consumed == Demand(loopback.incarnation, 3, 6)
    assert run(loopback) == {good.rid: expected_stream([2, 2], 3, 5, VOCAB)}


def test_a_repeated_start_changes_nothing(loopback: Loopback):
    start = loopback.journal_request([1, 2, 3], max_tokens=6)
    loopback.send(start)
    loopback.step()
    loopback.send(start)
    loopback.step()
    loopback.send(start, start)
    assert run(loopback) == {start.rid: expected_stream([1, 2, 3], 3, 6, VOCAB)}


def test_a_newer_epoch_replaces_the_older(loopback: Loopback):
    start = loopback.journal_request([1, 2, 3], max_tokens=6)
    loopback.send(start)
    loopback.step()
    loopback.journal.assign(start.slot, 2, 0, ENGINE_INCARNATION)
    loopback.send(Start(start.rid, 2, start.slot, 3))
    assert loopback.scheduler.get(start.rid).epoch == 2
    loopback.send(start)  # the older one is sent again
    assert loopback.scheduler.get(start.rid).epoch == 2


def test_cancel_frees_at_once_but_not_a_newer_epoch(loopback: Loopback):
    old, new = loopback.journal_request([1, 2, 3]), loopback.journal_request([4, 5], epoch=5)
    loopback.send(old, new)
    loopback.step()
    loopback.send(Cancel(old.rid, 1), Cancel(new.rid, 4), Cancel(12345, 1))
    assert loopback.held_rids() == {new.rid}
    loopback.send(Cancel(new.rid, 5))
    assert loopback.held_rids() == set()
    assert loopback.scheduler.blocks.num_used == 0


def test_a_priority_applies_only_at_exactly_the_epoch_held(loopback: Loopback):
    start = loopback.journal_request([1, 2, 3], epoch=2)
    loopback.send(start, Reprioritise(start.rid, 1, 1), Reprioritise(start.rid, 3, 1), Reprioritise(12345, 2, 1))
    request = loopback.scheduler.get(start.rid)
    assert request.params.priority == 0
    loopback.send(Reprioritise(start.rid, 2, -1))
    assert request.params.priority == -1
    loopback.step()
    loopback.send(Reprioritise(start.rid, 2, 5))
    assert loopback.scheduler.running[start.rid].params.priority == 5


def test_start_uses_the_journaled_priority(loopback: Loopback):
    start = loopback.journal_request([1, 2, 3])
    loopback.journal.reprioritise(start.slot, -7)
    loopback.send(start)
    assert loopback.scheduler.get(start.rid).params.priority == -7


def test_owned_requests_drops_what_it_omits(loopback: Loopback):
    kept, omitted, older = (loopback.journal_request([n]) for n in (1, 2, 3))
    loopback.send(kept, omitted, older)
    loopback.step()
    loopback.send(OwnedRequests([kept.rid, older.rid, 999], [1, 2, 1], [0, 0, 0], [0, 0, 0]))
    assert loopback.held_rids() == {kept.rid}
    loopback.scheduler.check()


def test_a_new_incarnation_of_the_frontend_owns_nothing_of_the_old_one(loopback: Loopback):
    old = loopback.journal_request([1, 2, 3], max_tokens=50)
    loopback.send(old)
    loopback.step()
    loopback.restart_frontend(loopback.incarnation + 1)
    loopback.send(OwnedRequests([], [], [], []))
    new = loopback.journal_request([4, 5], max_tokens=2)
    loopback.send(new)
    assert loopback.held_rids() == {new.rid}
    assert loopback.inbox.consumed == Demand(loopback.incarnation, 1, 2)
    assert run(loopback) == {new.rid: expected_stream([4, 5], 3, 2, VOCAB)}


def test_a_successor_gets_the_requests_and_the_output_of_its_predecessor(loopback: Loopback):
    """It has adopted the journal. Half of the output waits on the ring, the rest is computed later."""
    start = loopback.journal_request([1, 2, 3], max_tokens=20)
    loopback.send(start)
    for _ in range(8):
        loopback.step()
    loopback.restart_frontend(loopback.incarnation + 1, adopt=True)
    loopback.send(OwnedRequests([start.rid], [1], [0], [0]))
    assert loopback.held_rids() == {start.rid}
    assert run(loopback) == {start.rid: expected_stream([1, 2, 3], 3, 20, VOCAB)}


def test_a_start_that_the_predecessor_sent_is_followed(loopback: Loopback):
    start = loopback.journal_request([1, 2, 3], max_tokens=4)
    assert loopback.commands.put(encode(start), ENGINE_INCARNATION)
    loopback.restart_frontend(loopback.incarnation + 1, adopt=True)
    loopback.send(OwnedRequests([start.rid], [1], [0], [0]))
    assert run(loopback) == {start.rid: expected_stream([1, 2, 3], 3, 4, VOCAB)}


def test_a_start_that_was_lost_is_handed_back_after_the_output_of_others(loopback: Loopback):
    """The HandBack waits for rows that may have ended its request, here behind a full ring."""
    other = loopback.journal_request([1, 2, 3], max_tokens=1)
    lost = loopback.journal_request([4, 5], max_tokens=4)
    loopback.send(other)
    put, loopback.outbox._ring.put = loopback.outbox._ring.put, lambda *_: False
    loopback.step()
    loopback.restart_frontend(loopback.incarnation + 1, adopt=True)
    loopback.send(OwnedRequests([lost.rid, other.rid], [1, 1], [0, 0], [0, 0]))
    assert not loopback.outbox.flush()
    loopback.outbox._ring.put = put
    assert loopback.outbox.flush()
    rows, *notes = loopback.receive()
    assert isinstance(rows, StepOutput) and rows.rids == [other.rid]
    assert notes == [HandBack(lost.rid, 1), HandBack(other.rid, 1)]


def test_output_for_an_old_incarnation_goes_to_the_new_one(loopback: Loopback):
    old = loopback.journal_request([1, 2, 3])
    loopback.send(old)
    plan = loopback.scheduler.plan(0.0)
    for emission in loopback.scheduler.apply_result(plan, loopback.runner.execute(plan), 0.0):
        loopback.outbox.emit(emission)  # not flushed, as if the ring were full
    loopback.restart_frontend(loopback.incarnation + 1)
    loopback.send(OwnedRequests([], [], [], []))
    assert loopback.outbox.flush()
    (rows,) = loopback.receive()
    assert isinstance(rows, StepOutput) and rows.rids == [old.rid]  # a frontend drops it if it knows no such request


def test_commands_for_an_earlier_incarnation_of_the_engine_are_dropped(loopback: Loopback):
    loopback.send(loopback.journal_request([1, 2, 3]), receiver=ENGINE_INCARNATION - 1)
    assert loopback.held_rids() == set()
    assert loopback.inbox.consumed.requests == 0


def test_answers_to_the_old_incarnation_reach_the_new_one(loopback: Loopback):
    """One read finds a Start that must be refused, and the first command of the next incarnation."""
    refused = loopback.journal_request([1] * MAX_LEN)
    assert loopback.commands.put(encode(refused), ENGINE_INCARNATION)
    successor = Fabric(loopback.handles, 1, loopback.incarnation + 1).writer(loopback.engine_process)
    assert successor.put(encode(OwnedRequests([], [], [], [])), ENGINE_INCARNATION)
    loopback.read_commands()
    assert loopback.inbox.consumed == Demand(loopback.incarnation + 1, 0, 0)
    assert loopback.outbox.flush()
    loopback.incarnation += 1
    assert [m.rid for m in loopback.receive()] == [refused.rid]


@pytest.mark.parametrize("prompt", [[], [1] * MAX_LEN])
def test_a_request_that_can_never_run_is_refused(loopback: Loopback, prompt: list[int]):
    start = loopback.journal_request(prompt)
    loopback.send(start)
    loopback.step()
    (answer,) = loopback.receive()
    assert isinstance(answer, Refused)
    assert (answer.rid, answer.epoch) == (start.rid, 1)
    assert answer.reason
    assert loopback.held_rids() == set()


def test_commands_are_acknowledged(loopback: Loopback):
    """More commands pass than a ring holds."""
    message = Cancel(1, 1)
    for _ in range(10_000):
        loopback.send(message)
