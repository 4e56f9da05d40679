"""An event ring returns each event at most once and in order, and counts the lost ones."""

from __future__ import annotations

import os
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from daemon.ipc import segment
from daemon.ipc.event_ring import ENTRY_BYTES, MAX_EVENT, EventReader, EventWriter
from daemon.ipc.events import Dispatched, EngineChanged, Finished, MoveEnded, Ordered, Preempted, clipped
from daemon.ipc.fabric import EVENT_BYTES
from tests.ipc.child_programs import start_program
from tests.ipc.crashing_memory import Crash, CrashingMemory, StoreBudget
from tests.ipc.programs import numbered_event

ENTRIES = 4
MIN_KILLS, MIN_EVENTS = 21, 500


def page(entries: int = ENTRIES) -> memoryview:
    return memoryview(bytearray((1 + entries) * ENTRY_BYTES))


def read_numbers(reader: EventReader) -> tuple[list[int], int]:
    """Return the numbers of the events that `reader` reads, and its number of lost events."""
    entries, lost = reader.read()
    numbers = [entry.event.rid for entry in entries]
    assert [entry.event for entry in entries] == [numbered_event(n) for n in numbers]
    return numbers, lost


@given(st.lists(st.sampled_from(["write"] * 4 + ["read 0", "read 1", "restart", "new reader"]), max_size=60))
def test_readers_count_every_event_that_they_miss(script: list[str]):
    shared = page()
    writer, written = EventWriter(shared), 0
    readers, upto = [EventReader(shared), EventReader(shared)], [0, 0]
    for step in script:
        match step.split():
            case ["write"]:
                writer.write(numbered_event(written))
                written += 1
            case ["restart"]:
                writer = EventWriter(shared)
            case ["new", "reader"]:
                assert read_numbers(EventReader(shared)) == (list(range(max(0, written - ENTRIES), written)), 0)
            case ["read", which]:
                i = int(which)
                first = max(upto[i], written - ENTRIES)
                assert read_numbers(readers[i]) == (list(range(first, written)), first - upto[i])
                upto[i] = written


def test_the_longest_names_of_a_request_fit():
    """An event that does not fit would end the request's frontend."""
    shared, label, huge = page(), f"chatcmpl-{'f' * 32}-9999", 1 << 63
    writer, reader = EventWriter(shared), EventReader(shared)
    name, text = clipped("i" * 128), clipped("\N{SNOWMAN}" * 99)
    first = Dispatched(huge, label, 1 << 15, 1 << 31, -100, "its engine was parked", name)
    last = Finished(huge, label, 1 << 15, "deadline", 1 << 31, 1e9, text, name)
    order = Ordered("priority", "i" * 128, -1, "-100", f"uid {1 << 32} (pid {1 << 22})")
    for event in (first, last, order):
        writer.write(event)
    assert [entry.event for entry in reader.read()[0]] == [first, last, order]


def test_the_largest_event_fits_and_a_larger_one_is_refused():
    shared = page()
    writer, reader = EventWriter(shared), EventReader(shared)
    whole = EngineChanged("x" * (MAX_EVENT - 20))
    while True:  # until the event is one byte too long
        try:
            writer.write(whole)
        except ValueError:
            break
        last, whole = whole, EngineChanged(whole.state + "x")
    assert reader.read()[0][-1].event == last
    assert len(last.state) > MAX_EVENT - 30
    writer.write(numbered_event(1))
    assert read_numbers(reader) == ([1], 0)


def test_the_largest_migration_event_fits():
    writer = EventWriter(page())
    label, largest = "chatcmpl-" + "0" * 32 + "-127", 2**63
    writer.write(
        MoveEnded(largest, label, 1000, "preempted", "copy_failed", "x" * 80, 99, 10**9, 10**9, largest, 0.1, 0.1)
    )


@pytest.mark.parametrize("torn", [False, True])
def test_a_crash_before_any_store_leaves_a_readable_ring(torn: bool):
    """Only the event that was being overwritten is lost."""
    total = 3 * ENTRIES
    for k in count():
        shared, budget = page(), StoreBudget(k)
        writer, done, died = EventWriter(CrashingMemory(shared, budget, torn)), 0, False
        while done < total:
            try:
                writer.write(numbered_event(done))
                done += 1
            except Crash:
                died = True
                oldest = max(0, done - ENTRIES)
                numbers, lost = read_numbers(EventReader(shared))
                assert numbers in (list(range(oldest, done)), list(range(oldest + 1, done)))
                assert lost == (done - oldest) - len(numbers)
                writer = EventWriter(shared)
        assert read_numbers(EventReader(shared)) == (list(range(total - ENTRIES, total)), 0)
        if not died:
            break
    assert k == budget.made >= 3 * total


@settings(deadline=None)
@given(st.integers(1, 2 * ENTRIES), st.lists(st.tuples(st.integers(8, 5 * ENTRY_BYTES - 1), st.integers(1, 255))))
def test_corrupt_bytes_are_never_returned(written: int, flips: list[tuple[int, int]]):
    shared = page()
    writer, reader = EventWriter(shared), EventReader(shared)
    for n in range(written):
        writer.write(numbered_event(n))
    for at, mask in flips:
        shared[at] ^= mask
    numbers, lost = read_numbers(reader)
    assert numbers == sorted(set(numbers)) and len(numbers) + lost == written


def test_a_reader_beside_a_writer_that_is_killed_again_and_again():
    fd = segment.create(EVENT_BYTES)
    try:
        view = segment.attach(fd, writable=False)
        reader, last, found, missed = EventReader(view), -1, 0, 0
        with start_program("events", fd, MIN_KILLS, fds=(fd,)) as program:
            while found <= MIN_EVENTS:
                program.check_running()
                numbers, lost = read_numbers(reader)
                assert numbers == sorted(set(numbers))
                assert not numbers or numbers[0] > last
                last = numbers[-1] if numbers else last
                found, missed = found + len(numbers), missed + lost
            assert program.result()["kills"] >= MIN_KILLS
        numbers, lost = read_numbers(reader)
        assert found + missed + len(numbers) + lost == view[:8].cast("Q")[0]
    finally:
        os.close(fd)


def test_an_entry_contains_the_time_of_its_event():
    shared = page()
    EventWriter(shared).write(Preempted(1, "a", 2))
    [entry], _ = EventReader(shared).read()
    assert entry.event == Preempted(1, "a", 2) and 1.7e9 < entry.time < 1e11
