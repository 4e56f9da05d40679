"""Doorbells: no ring is lost, neither in one process nor between two."""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Iterator

import pytest

from daemon.ipc import doorbell, segment
from daemon.ipc.ring import RingReader, ring_bytes
from tests.ipc.child_programs import start_program
from tests.ipc.programs import CAPACITY, LAST_NUMBER

MIN_WAITS = 100


@pytest.fixture
def bell() -> Iterator[int]:
    fd = doorbell.create()
    yield fd
    os.close(fd)


def test_a_ring_before_the_wait_is_not_lost(bell: int):
    doorbell.ring(bell)
    start = time.monotonic()
    assert doorbell.wait(bell, 60)
    assert time.monotonic() - start < 30  # it did not wait for the timeout


def test_one_clear_covers_many_rings(bell: int):
    for _ in range(100):
        doorbell.ring(bell)
    assert doorbell.clear(bell)
    assert not doorbell.clear(bell)
    assert not doorbell.wait(bell, 0)


def test_a_bell_with_the_maximum_count_still_wakes_the_owner(bell: int):
    os.eventfd_write(bell, 2**64 - 2)
    doorbell.ring(bell)
    assert doorbell.wait(bell, 0)


@pytest.mark.parametrize("timeout", [-1, 0, 0.0001, 0.01])
def test_wait_returns_at_its_timeout(bell: int, timeout: float):
    assert not doorbell.wait(bell, timeout)


def test_no_wake_up_is_lost(bell: int):
    """A consumer that clears, reads all records and waits is always woken for the next record."""
    fd = segment.create(ring_bytes(CAPACITY))
    try:
        reader, number, waits = RingReader(segment.attach(fd)), 0, 0
        with start_program("bell", fd, bell, fds=(fd, bell)) as program:
            finished = False
            while not finished:
                assert doorbell.wait(bell, 20), f"no ring after record {number}"
                waits += 1
                if waits > MIN_WAITS:
                    program.stop()
                while (record := reader.read()) is not None:
                    value = struct.unpack("<I", record.payload)[0]
                    finished = value == LAST_NUMBER
                    assert finished or value == number
                    number += not finished
                    reader.ack()
            assert program.result()["sent"] == number
        assert waits > MIN_WAITS
    finally:
        os.close(fd)
