"""The ring against a list as model, with crashes at every store, with corrupt bytes and with kill -9."""

from __future__ import annotations

import os
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from daemon.ipc import ring as ring_module
from daemon.ipc import segment
from daemon.ipc.ring import PAGE, RingFault, RingReader, RingWriter, largest_payload, ring_bytes
from tests.ipc.child_programs import start_program
from tests.ipc.crashing_memory import Crash, CrashingMemory, StoreBudget
from tests.ipc.programs import CAPACITY, MAX_UNACKED, MIN_RECORDS

SMALL = 256  # bytes of data: a few records a lap
RECEIVER = 77


def memory(capacity: int = SMALL) -> memoryview:
    return memoryview(bytearray(ring_bytes(capacity)))


def read_all(reader: RingReader) -> list[bytes]:
    found = []
    while (record := reader.read()) is not None:
        found.append(bytes(record.payload))
    return found


class RingAsList(RuleBasedStateMachine):
    """Puts, reads, acknowledgements and restarts of either end, against a list of all records ever put."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = memory()
        self.incarnations = count(1)
        self.sent: list[tuple[int, int, bytes]] = []  # sender, receiver, payload
        self.seen = self.acked = 0
        self.offsets: dict[int, int] = {}  # by record number
        self.restart_writer()
        self.reader = RingReader(self.memory)

    @rule()
    def restart_writer(self) -> None:
        self.incarnation = next(self.incarnations)
        self.writer = RingWriter(self.memory, self.incarnation)

    @rule()
    def restart_reader(self) -> None:
        self.reader = RingReader(self.memory)
        self.seen = self.acked

    @rule(payload=st.binary(max_size=largest_payload(SMALL)), receiver=st.integers(0, 2**32 - 1))
    def put(self, payload: bytes, receiver: int) -> None:
        if self.writer.put(payload, receiver):
            self.sent.append((self.incarnation, receiver, payload))
        else:
            assert self.acked < len(self.sent), "an empty ring refused a record that fits"

    @rule(size=st.integers(SMALL - 23, 4 * SMALL))
    def put_oversize(self, size: int) -> None:
        with pytest.raises(ValueError, match="never"):
            self.writer.put(bytes(size), 0)

    @rule()
    def read(self) -> None:
        record = self.reader.read()
        if self.seen == len(self.sent):
            assert record is None
            return
        assert (record.sender, record.receiver, bytes(record.payload)) == self.sent[self.seen]
        assert self.offsets.setdefault(self.seen, record.offset) == record.offset
        self.seen += 1

    @precondition(lambda self: self.acked < self.seen)
    @rule()
    def ack(self) -> None:
        self.reader.ack()
        self.acked = self.seen

    @invariant()
    def offsets_grow(self) -> None:
        offsets = [self.offsets[number] for number in sorted(self.offsets)]
        assert offsets == sorted(set(offsets))


TestRingAsList = RingAsList.TestCase
TestRingAsList.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)


def test_a_full_ring_refuses_records_until_an_ack():
    shared = memory()
    writer, reader = RingWriter(shared, 1), RingReader(shared)
    taken = 0
    while writer.put(b"%40d" % taken, RECEIVER):
        taken += 1
    assert taken == SMALL // 64
    assert len(read_all(reader)) == taken
    assert not writer.put(bytes(40), RECEIVER)  # to read a record is not to acknowledge it
    reader.ack()
    assert writer.put(bytes(40), RECEIVER)


@pytest.mark.parametrize("before", range(SMALL // 8))
def test_the_largest_payload_fits_an_empty_ring_at_every_offset(before: int):
    shared = memory()
    writer, reader = RingWriter(shared, 1), RingReader(shared)
    shared[:8].cast("Q")[0] = shared[PAGE : PAGE + 8].cast("Q")[0] = 8 * before
    writer, reader = RingWriter(shared, 1), RingReader(shared)
    payload = os.urandom(largest_payload(SMALL))
    assert writer.put(payload, RECEIVER)
    assert read_all(reader) == [payload]


@pytest.mark.parametrize("torn", [False, True])
def test_a_crash_before_any_store_loses_and_repeats_no_record(torn: bool):
    """A producer crashes after k stores and its successor continues, for every k, through several laps."""
    numbers = [b"%d" % n * (1 + n * 5 % 40) for n in range(24)]
    budget = StoreBudget()
    for k in count():
        shared, received = memory(), []
        budget = StoreBudget(k)
        sent, died = 0, False
        writer = RingWriter(CrashingMemory(shared, budget, torn), 1)
        reader = RingReader(shared)
        while sent < len(numbers):
            try:
                full = not writer.put(numbers[sent], RECEIVER)
            except Crash:
                died = True
                assert read_all(RingReader(shared)) == numbers[len(received) : sent]  # exactly the committed records
                writer = RingWriter(shared, 2)
                continue
            sent += not full
            if full or sent % 3 == 0:
                received += read_all(reader)
                reader.ack()
        assert received == numbers, k
        if not died:
            break
    assert k == budget.made > 3 * len(numbers)  # data, header and tail each, and wrap marks


def test_a_reader_that_is_killed_before_the_ack_reads_the_records_again():
    shared = memory(PAGE)
    writer = RingWriter(shared, 5)
    for n in range(6):
        assert writer.put(b"%d" % n, RECEIVER)
    reader = RingReader(shared)
    assert [bytes(reader.read().payload) for _ in range(2)] == [b"0", b"1"]
    reader.ack()
    assert read_all(reader) == [b"2", b"3", b"4", b"5"]
    assert read_all(RingReader(shared)) == [b"2", b"3", b"4", b"5"]
    reader.ack()
    assert read_all(RingReader(shared)) == []


def test_a_record_contains_both_incarnations():
    shared = memory()
    RingWriter(shared, 3).put(b"old", 8)
    RingWriter(shared, 4).put(b"new", 9)
    reader = RingReader(shared)
    assert [(r.sender, r.receiver, bytes(r.payload)) for r in (reader.read(), reader.read())] == [
        (3, 8, b"old"),
        (4, 9, b"new"),
    ]


def test_a_reader_cannot_write_into_a_payload():
    shared = memory()
    RingWriter(shared, 1).put(b"x", 1)
    assert RingReader(shared).read().payload.readonly


sizes = st.lists(st.integers(0, largest_payload(SMALL)), min_size=1, max_size=12)


@settings(max_examples=300, deadline=None)
@given(sizes=sizes, keep=st.integers(1, 4), where=st.data())
def test_corrupt_bytes_raise_a_fault_or_hide_records(sizes: list[int], keep: int, where: st.DataObject):
    """For any corrupt bytes, a reader gets consecutive genuine records and then stops."""
    shared = memory()
    writer, reader = RingWriter(shared, 1), RingReader(shared)
    payloads: list[bytes] = []
    for n, size in enumerate(sizes):  # several laps; the last few records stay
        payload = bytes([n + 1]) * size
        while not writer.put(payload, RECEIVER):
            reader.read()
            reader.ack()
        payloads.append(payload)
    live = [at for at in (*range(8), *range(PAGE, PAGE + 8), *range(2 * PAGE, len(shared)))]
    for at in where.draw(st.lists(st.sampled_from(live), min_size=1, max_size=keep, unique=True)):
        shared[at] ^= where.draw(st.integers(1, 255))
    retries, ring_module._VISIBILITY_RETRIES = ring_module._VISIBILITY_RETRIES, 20
    found, reader = [], RingReader(shared)
    try:
        for _ in range(len(payloads) + 1):
            record = reader.read()
            if record is None:
                break
            assert (record.sender, record.receiver) == (1, RECEIVER)
            found.append(bytes(record.payload))
        else:
            raise AssertionError("more records than were ever written")
    except RingFault:
        pass
    finally:
        ring_module._VISIBILITY_RETRIES = retries
    runs = [payloads[i : i + len(found)] for i in range(len(payloads) - len(found) + 1)]
    assert found in runs


def test_a_fault_is_raised_again_by_the_next_read():
    shared = memory()
    RingWriter(shared, 1).put(b"payload", 1)
    shared[2 * PAGE + 24] ^= 1
    reader = RingReader(shared)
    for _ in range(2):
        with pytest.raises(RingFault):
            reader.read()


def test_the_reader_waits_for_bytes_that_become_visible_late(monkeypatch: pytest.MonkeyPatch):
    """On weakly ordered machines the tail can be visible first: the reader reads again."""
    shared = memory()
    RingWriter(shared, 1).put(b"payload", 1)
    hidden, shared[2 * PAGE + 24] = shared[2 * PAGE + 24], 0
    reader, attempts = RingReader(shared), count()
    parse = reader._parse

    def parse_late(tail: int):
        if next(attempts) == 3:
            shared[2 * PAGE + 24] = hidden
        return parse(tail)

    monkeypatch.setattr(reader, "_parse", parse_late)
    assert bytes(reader.read().payload) == b"payload"


def test_the_wrap_mark_of_an_earlier_lap_is_ignored(monkeypatch: pytest.MonkeyPatch):
    """While the bytes of a record are not visible, an old mark may be in their place."""
    monkeypatch.setattr(ring_module, "_VISIBILITY_RETRIES", 20)
    shared = memory()

    def writer_at(offset: int) -> RingWriter:
        shared[:8].cast("Q")[0] = shared[PAGE : PAGE + 8].cast("Q")[0] = offset
        return RingWriter(shared, 1)

    assert writer_at(192).put(bytes(80), RECEIVER)  # does not fit before the end, so a mark is written there
    mark = bytes(shared[2 * PAGE + 192 : 2 * PAGE + 200])
    assert mark[:4] == b"\xff" * 4
    assert writer_at(SMALL + 192).put(bytes(40), RECEIVER)  # fits
    shared[2 * PAGE + 192 : 2 * PAGE + 200] = mark
    with pytest.raises(RingFault):
        RingReader(shared).read()


def test_kill_nine_of_either_end_loses_no_record():
    """Producer and consumer are killed in turn. Except for repeats, every record arrives once and in order."""
    fd = segment.create(ring_bytes(CAPACITY) + PAGE)
    try:
        with start_program("ring", fd, 200, fds=(fd,)) as program:
            counts = program.result()
    finally:
        os.close(fd)
    assert counts["gaps"] == counts["corrupt"] == 0
    assert counts["received"] == counts["sent"] > MIN_RECORDS
    # Not acknowledged when a consumer was killed, or not counted when a producer was killed.
    kills_of_each = -(-counts["kills"] // 2)
    assert 0 < counts["repeats"] <= kills_of_each * (MAX_UNACKED + 1) + kills_of_each
