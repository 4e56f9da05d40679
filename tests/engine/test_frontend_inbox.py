"""What each command does to the engine that takes it off the ring."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from msgspec import DecodeError

from daemon.engine.fake.hash import expected_stream
from daemon.ipc.messages import Cancel, Demand, OwnedRequests, Refused, Reprioritise, Start, StepOutput
from tests.engine.loopback import ENGINE_INCARNATION, MAX_LEN, VOCAB, Lane


@pytest.fixture
def lane() -> Iterator[Lane]:
    made = Lane()
    yield made
    made.close()


def run(lane: Lane) -> dict[int, list[int]]:
    while lane.step():
        pass
    return lane.streams()


def test_start_runs_what_the_journal_holds(lane: Lane):
    first, second = lane.write([1, 2, 3], max_tokens=20), lane.write([4] * 70, max_tokens=4, seed=9)
    lane.tell(first, second)
    assert lane.inbox.consumed == Demand(lane.incarnation, 2, 73)
    assert run(lane) == {
        first.rid: expected_stream([1, 2, 3], 3, 20, VOCAB),
        second.rid: expected_stream([4] * 70, 9, 4, VOCAB),
    }
    assert lane.scheduler.blocks.num_used == 0


def test_start_resumes_after_the_output_that_was_accepted(lane: Lane):
    whole = expected_stream([1, 2, 3], 3, 10, VOCAB)
    start = lane.write([1, 2, 3], max_tokens=10, epoch=2)
    lane.journal.append(start.slot, whole[:4], None)
    lane.tell(start)
    while lane.step():
        pass
    rows = [(m.epochs, m.starts, m.tokens) for m in lane.hear() if isinstance(m, StepOutput)]
    assert rows == [([2], [4 + i], [token]) for i, token in enumerate(whole[4:])]


def closed(lane: Lane, start: Start) -> Start:
    lane.journal.close(start.slot)
    return start


def overwritten(lane: Lane, start: Start) -> Start:
    lane.journal.close(start.slot)
    assert lane.write([7] * 50).slot == start.slot  # by a request that is not started yet
    return start


def moved_on(lane: Lane, start: Start) -> Start:
    lane.journal.assign(start.slot, start.epoch + 1, 0, ENGINE_INCARNATION)
    return start


@pytest.mark.parametrize("happen", [closed, overwritten, moved_on])
def test_stale_start_is_counted_and_not_run(lane: Lane, happen):
    """Demand is counted as the frontend counted it, or the two totals would drift apart for ever."""
    lane.tell(happen(lane, lane.write([1, 2, 3])))
    assert lane.here() == set()
    assert not lane.step()
    assert lane.hear() == []
    assert lane.inbox.consumed == Demand(lane.incarnation, 1, 3)


@pytest.mark.parametrize("at", ["prompt", "params", "output"])
def test_a_slot_that_changes_while_it_is_read(lane: Lane, monkeypatch: pytest.MonkeyPatch, at: str):
    """The frontend closes the request, and writes another one over it, while the engine is reading."""
    start = lane.write([1, 2, 3])
    read = getattr(lane.view, at)

    def meanwhile(slot: int):
        monkeypatch.setattr(lane.view, at, read)
        overwritten(lane, start)
        if at == "params":
            raise DecodeError("bytes of two requests")
        return read(slot)

    monkeypatch.setattr(lane.view, at, meanwhile)
    lane.tell(start)
    assert lane.here() == set()


def test_a_journal_that_cannot_be_read_is_an_error(lane: Lane, monkeypatch: pytest.MonkeyPatch):
    def broken(slot: int):
        raise DecodeError("not what a frontend writes")

    monkeypatch.setattr(lane.view, "params", broken)
    with pytest.raises(DecodeError):
        lane.tell(lane.write([1, 2, 3]))


def test_redelivered_start_changes_nothing(lane: Lane):
    start = lane.write([1, 2, 3], max_tokens=6)
    lane.tell(start)
    lane.step()
    lane.tell(start)
    lane.step()
    lane.tell(start, start)
    assert run(lane) == {start.rid: expected_stream([1, 2, 3], 3, 6, VOCAB)}


def test_a_newer_epoch_replaces_the_older(lane: Lane):
    start = lane.write([1, 2, 3], max_tokens=6)
    lane.tell(start)
    lane.step()
    lane.journal.assign(start.slot, 2, 0, ENGINE_INCARNATION)
    lane.tell(Start(start.rid, 2, start.slot, 3))
    assert lane.scheduler.get(start.rid).epoch == 2
    lane.tell(start)  # and the older one comes again
    assert lane.scheduler.get(start.rid).epoch == 2


def test_cancel_frees_at_once_but_not_a_newer_epoch(lane: Lane):
    old, new = lane.write([1, 2, 3]), lane.write([4, 5], epoch=5)
    lane.tell(old, new)
    lane.step()
    lane.tell(Cancel(old.rid, 1), Cancel(new.rid, 4), Cancel(12345, 1))
    assert lane.here() == {new.rid}
    lane.tell(Cancel(new.rid, 5))
    assert lane.here() == set()
    assert lane.scheduler.blocks.num_used == 0


def test_a_priority_counts_at_the_very_epoch_that_is_held(lane: Lane):
    start = lane.write([1, 2, 3], epoch=2)
    lane.tell(start, Reprioritise(start.rid, 1, 1), Reprioritise(start.rid, 3, 1), Reprioritise(12345, 2, 1))
    request = lane.scheduler.get(start.rid)
    assert request.params.priority == 0
    lane.tell(Reprioritise(start.rid, 2, -1))
    assert request.params.priority == -1
    lane.step()
    lane.tell(Reprioritise(start.rid, 2, 5))
    assert lane.scheduler.running[start.rid].params.priority == 5


def test_start_takes_the_priority_of_the_journal(lane: Lane):
    start = lane.write([1, 2, 3])
    lane.journal.reprioritise(start.slot, -7)
    lane.tell(start)
    assert lane.scheduler.get(start.rid).params.priority == -7


def test_statement_drops_what_it_omits(lane: Lane):
    kept, omitted, older = (lane.write([n]) for n in (1, 2, 3))
    lane.tell(kept, omitted, older)
    lane.step()
    lane.tell(OwnedRequests([kept.rid, older.rid, 999], [1, 2, 1]))
    assert lane.here() == {kept.rid}
    lane.scheduler.check()


def test_a_new_incarnation_of_the_frontend_owns_nothing_of_the_old(lane: Lane):
    old = lane.write([1, 2, 3], max_tokens=50)
    lane.tell(old)
    lane.step()
    lane.restart_frontend(lane.incarnation + 1)
    new = lane.write([4, 5], max_tokens=2)
    lane.tell(new)
    assert lane.here() == {new.rid}
    assert lane.inbox.consumed == Demand(lane.incarnation, 1, 2)
    assert run(lane) == {new.rid: expected_stream([4, 5], 3, 2, VOCAB)}


def test_what_was_owed_to_the_old_incarnation_goes_to_nobody(lane: Lane):
    old = lane.write([1, 2, 3])
    lane.tell(old)
    plan = lane.scheduler.plan(0.0)
    for emission in lane.scheduler.apply_result(plan, lane.runner.execute(plan), 0.0):
        lane.outbox.emit(emission)  # not flushed: the ring was full, say
    lane.restart_frontend(lane.incarnation + 1)
    lane.tell(OwnedRequests([], []))
    assert not lane.outbox.flush()


def test_commands_for_the_engines_predecessor_are_dropped(lane: Lane):
    lane.tell(lane.write([1, 2, 3]), receiver=ENGINE_INCARNATION - 1)
    assert lane.here() == set()
    assert lane.inbox.consumed.requests == 0


@pytest.mark.parametrize("prompt", [[], [1] * MAX_LEN])
def test_what_can_never_run_is_refused(lane: Lane, prompt: list[int]):
    start = lane.write(prompt)
    lane.tell(start)
    lane.step()
    (answer,) = lane.hear()
    assert isinstance(answer, Refused)
    assert (answer.rid, answer.epoch) == (start.rid, 1)
    assert answer.reason
    assert lane.here() == set()


def test_commands_are_acknowledged_once_taken(lane: Lane):
    """More than a ring of them passes through."""
    message = Cancel(1, 1)
    for _ in range(10_000):
        lane.tell(message)
