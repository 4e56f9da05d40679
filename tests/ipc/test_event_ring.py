"""An event log never blocks and never lies: each event at most once, in order, and what is lost is counted."""

from __future__ import annotations

import os
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from daemon.ipc import segment
from daemon.ipc.event_ring import MAX_EVENT, SLOT_BYTES, EventReader, EventWriter
from daemon.ipc.events import EngineChanged, MoveEnded, Preempted
from daemon.ipc.fabric import EVENT_BYTES
from tests.ipc.child_programs import victim
from tests.ipc.crashing_memory import Died, Life, Mortal
from tests.ipc.programs import happening

SLOTS = 4


def page(slots: int = SLOTS) -> memoryview:
    return memoryview(bytearray((1 + slots) * SLOT_BYTES))


def seen(reader: EventReader) -> tuple[list[int], int]:
    """The numbers of the events it reads, and how many it says are lost."""
    entries, lost = reader.read()
    numbers = [entry.event.rid for entry in entries]
    assert [entry.event for entry in entries] == [happening(n) for n in numbers]
    return numbers, lost


@given(st.lists(st.sampled_from(["write"] * 4 + ["read 0", "read 1", "restart", "newcomer"]), max_size=60))
def test_readers_miss_nothing_that_is_not_counted(script: list[str]):
    shared = page()
    log, written = EventWriter(shared), 0
    readers, upto = [EventReader(shared), EventReader(shared)], [0, 0]
    for step in script:
        match step.split():
            case ["write"]:
                log.write(happening(written))
                written += 1
            case ["restart"]:
                log = EventWriter(shared)
            case ["newcomer"]:
                assert seen(EventReader(shared)) == (list(range(max(0, written - SLOTS), written)), 0)
            case ["read", which]:
                i = int(which)
                first = max(upto[i], written - SLOTS)
                assert seen(readers[i]) == (list(range(first, written)), first - upto[i])
                upto[i] = written


def test_the_largest_event_fits_and_a_larger_one_is_refused():
    shared = page()
    log, reader = EventWriter(shared), EventReader(shared)
    whole = EngineChanged("x" * (MAX_EVENT - 20))
    while True:  # up to the last byte
        try:
            log.write(whole)
        except ValueError:
            break
        last, whole = whole, EngineChanged(whole.state + "x")
    assert reader.read()[0][-1].event == last
    assert len(last.state) > MAX_EVENT - 30
    log.write(happening(1))
    assert seen(reader) == ([1], 0)


def test_any_move_fits():
    log = EventWriter(page())
    label, largest = "chatcmpl-" + "0" * 32 + "-127", 2**63
    log.write(
        MoveEnded(largest, label, 1000, "preempted", "copy_failed", "x" * 80, 99, 10**9, 10**9, largest, 0.1, 0.1)
    )


@pytest.mark.parametrize("torn", [False, True])
def test_death_before_any_store_leaves_a_readable_log(torn: bool):
    """Of what was there, the event whose place was being taken is lost, and no other."""
    total = 3 * SLOTS
    for k in count():
        shared, life = page(), Life(k)
        log, done, died = EventWriter(Mortal(shared, life, torn)), 0, False
        while done < total:
            try:
                log.write(happening(done))
                done += 1
            except Died:
                died = True
                oldest = max(0, done - SLOTS)
                numbers, lost = seen(EventReader(shared))
                assert numbers in (list(range(oldest, done)), list(range(oldest + 1, done)))
                assert lost == (done - oldest) - len(numbers)
                log = EventWriter(shared)
        assert seen(EventReader(shared)) == (list(range(total - SLOTS, total)), 0)
        if not died:
            break
    assert k == life.made >= 3 * total


@settings(deadline=None)
@given(st.integers(1, 2 * SLOTS), st.lists(st.tuples(st.integers(8, 5 * SLOT_BYTES - 1), st.integers(1, 255))))
def test_corrupt_bytes_never_show(written: int, flips: list[tuple[int, int]]):
    shared = page()
    log, reader = EventWriter(shared), EventReader(shared)
    for n in range(written):
        log.write(happening(n))
    for at, mask in flips:
        shared[at] ^= mask
    numbers, lost = seen(reader)
    assert numbers == sorted(set(numbers)) and len(numbers) + lost == written


def test_reader_beside_a_writer_that_is_killed_again_and_again():
    fd = segment.create(EVENT_BYTES)
    try:
        view = segment.attach(fd, writable=False)
        reader, last, found, missed = EventReader(view), -1, 0, 0
        with victim("events", fd, 2.0, fds=(fd,)) as run:
            while run.running:
                numbers, lost = seen(reader)
                assert numbers == sorted(set(numbers))
                assert not numbers or numbers[0] > last
                last = numbers[-1] if numbers else last
                found, missed = found + len(numbers), missed + lost
            assert run.result()["kills"] > 20
        numbers, lost = seen(reader)
        assert found + missed + len(numbers) + lost == view[:8].cast("Q")[0]
        assert found > 500
    finally:
        os.close(fd)


def test_an_event_says_when_it_was_written():
    shared = page()
    EventWriter(shared).write(Preempted(1, "a", 2))
    [entry], _ = EventReader(shared).read()
    assert entry.event == Preempted(1, "a", 2) and 1.7e9 < entry.time < 1e11
