"""The report of each move: its result, sizes and times."""

from __future__ import annotations

import pytest

from daemon.engine.migration.actions import Report
from daemon.enums import MigrationResult
from tests.engine.migration.harness import (
    DESTINATION,
    SOURCE,
    Engine,
    declined,
    move_until_copying,
    move_until_takeover,
    only,
    relay,
)


def outcome_of(engine: Engine) -> tuple[MigrationResult, str]:
    """Return result and detail of the only report."""
    report = only(engine.llumlet.reports)
    return report.result, report.detail


def test_a_successful_move_is_reported_once_with_its_sizes_and_times(source, destination, make):
    request = source.run(make(prompt=9), 2)
    answer = relay(source.move(now=1.0, reason="memory"), SOURCE, destination)
    copy = only(source.llumlet.on_peer(DESTINATION, answer[0].message, 2.0))
    source.llumlet.copied(copy.move, 3.0)
    tail = only(source.step(now=4.0))
    relay(source.llumlet.copied(tail.move, 5.0), SOURCE, destination)
    destination.llumlet.on_grant(rid=1, epoch=1, new_epoch=2, now=5.0)
    assert source.llumlet.reports == []  # the move ends when the source receives the Release
    source.llumlet.on_release(rid=1, epoch=1, now=7.0)
    assert only(source.llumlet.reports) == Report(
        request=request,
        to=1,
        reason="memory",
        result=MigrationResult.MOVED,
        num_copies=2,
        blocks=3,
        skipped=0,
        seconds=6.0,
        frozen_seconds=3.0,
    )
    source.llumlet.on_release(rid=1, epoch=1, now=8.0)
    assert len(source.llumlet.reports) == 1 and destination.llumlet.reports == []


def test_blocks_in_the_prefix_cache_of_the_destination_are_reported_as_skipped(source, destination, make):
    destination.run(make(rid=2, prompt=9), 1)
    twin = make(rid=3, prompt=9)
    twin.tokens[:] = [1002] * 9
    source.run(twin, 1)
    relay(relay(source.move(), SOURCE, destination), DESTINATION, source)
    tail = only(source.step())
    source.llumlet.copied(tail.move, 0.0)
    source.llumlet.on_release(rid=3, epoch=1, now=0.0)
    report = only(source.llumlet.reports)
    assert (report.result, report.num_copies, report.blocks, report.skipped) == (MigrationResult.MOVED, 1, 1, 2)


def test_a_refusal_is_reported_with_its_reason(source, make):
    source.run(make())
    source.move()
    source.llumlet.on_peer(DESTINATION, declined(), 0.0)
    assert outcome_of(source) == (MigrationResult.DECLINED, "full")


def test_a_refusal_after_the_handover_is_reported_after_the_frontends_decision(source, destination, make, journal):
    source.run(make(), 2)
    move_until_takeover(source, destination)
    source.llumlet.on_peer(DESTINATION, declined("the journal no longer holds it"), 0.0)
    assert source.llumlet.reports == []
    source.llumlet.on_release(rid=1, epoch=1, now=0.0)
    assert outcome_of(source) == (MigrationResult.DECLINED, "the journal no longer holds it")


@pytest.mark.parametrize(
    ("end", "result"), [("finish", MigrationResult.FINISHED), ("preempt", MigrationResult.PREEMPTED)]
)
def test_the_end_or_preemption_of_the_request_is_reported(source, destination, make, end, result):
    request = source.run(make(max_tokens=3), 2)
    copy = move_until_copying(source, destination)
    if end == "preempt":
        source.scheduler.preempt(request, 0.0)
    source.step()
    assert source.llumlet.reports == []  # its copy is in progress
    source.llumlet.copied(copy.move, 0.0)
    assert outcome_of(source) == (result, "") and source.llumlet.reports[0].blocks == len(copy.pairs)


@pytest.mark.parametrize("when", ["reserving", "ready", "tail", "handed"])
def test_a_cancel_is_reported(source, destination, make, when):
    source.run(make(), 2)
    if when == "handed":
        move_until_takeover(source, destination)
    else:
        answers = relay(source.move(), SOURCE, destination)
    if when in ("ready", "tail"):
        source.llumlet.copied(only(relay(answers, DESTINATION, source)).move, 0.0)
    if when == "tail":
        source.step()
    source.llumlet.on_release(rid=1, epoch=1, now=0.0, cancelled=True)
    source.llumlet.copied(1, 0.0)
    assert outcome_of(source) == (MigrationResult.CANCELLED, "")


@pytest.mark.parametrize("phase", ["copying", "tail"])
def test_a_failed_copy_is_reported_once_no_decision_is_due(source, destination, make, phase):
    source.run(make(), 2)
    move_until_copying(source, destination)
    if phase == "tail":
        source.llumlet.copied(1, 0.0)
        source.step()
    source.llumlet.copy_failed(1, 0.0)
    if phase == "tail":
        assert source.llumlet.reports == []
        source.llumlet.on_grant(rid=1, epoch=1, new_epoch=2, now=0.0)
    assert outcome_of(source) == (MigrationResult.COPY_FAILED, "")


@pytest.mark.parametrize("frozen", [False, True])
def test_the_death_of_the_destination_is_reported(source, destination, make, frozen):
    source.run(make(), 2)
    if frozen:
        move_until_takeover(source, destination)
    else:
        move_until_copying(source, destination)
    source.llumlet.on_peer_death(DESTINATION, 0.0)
    source.llumlet.on_grant(rid=1, epoch=1, new_epoch=2, now=0.0)
    assert outcome_of(source) == (MigrationResult.PEER_DIED, "")


def test_a_request_granted_to_its_source_is_reported_with_its_frozen_time(source, destination, make):
    source.run(make(), 2)
    move_until_takeover(source, destination)
    source.llumlet.tick(2.0)
    source.llumlet.on_grant(rid=1, epoch=1, new_epoch=2, now=3.0)
    assert outcome_of(source) == (MigrationResult.TAKEN_BACK, "") and source.llumlet.reports[0].frozen_seconds == 3.0


def test_a_handed_back_request_is_reported_with_the_reason_of_the_order(journal, make):
    source = Engine(journal, seqs=1)
    running, waiting = source.run(make(1)), source.run(make(2))
    source.llumlet.accept(False)
    source.move(drain=True, reason="draining")
    assert only(source.llumlet.reports) == Report(
        request=waiting, to=-1, reason="draining", result=MigrationResult.HANDED_BACK, detail="it waited"
    )
    source.move(rid=1, how="recompute")
    assert source.llumlet.reports[1:] == []  # it is already moving
    source.llumlet.on_peer(DESTINATION, declined(), 0.0)
    source.move(rid=1, how="recompute")
    assert source.llumlet.reports[2] == Report(
        request=running,
        to=-1,
        reason="operator",
        result=MigrationResult.HANDED_BACK,
        detail="its KV is to be recomputed",
    )
