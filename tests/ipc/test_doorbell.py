from __future__ import annotations

import os
import struct
import time
from collections.abc import Iterator

import pytest

from daemon.ipc import doorbell, segment
from daemon.ipc.ring import RingReader, ring_bytes
from tests.ipc.child_programs import victim
from tests.ipc.programs import CAPACITY, LAST


@pytest.fixture
def bell() -> Iterator[int]:
    fd = doorbell.create()
    yield fd
    os.close(fd)


def test_ring_before_wait_is_not_lost(bell: int):
    doorbell.ring(bell)
    start = time.monotonic()
    assert doorbell.wait(bell, 60)
    assert time.monotonic() - start < 30  # it did not sleep through


def test_many_rings_are_one_answer(bell: int):
    for _ in range(100):
        doorbell.ring(bell)
    assert doorbell.answer(bell)
    assert not doorbell.answer(bell)
    assert not doorbell.wait(bell, 0)


def test_a_bell_that_cannot_be_rung_more_still_rings(bell: int):
    os.eventfd_write(bell, 2**64 - 2)
    doorbell.ring(bell)
    assert doorbell.wait(bell, 0)


@pytest.mark.parametrize("timeout", [-1, 0, 0.0001, 0.01])
def test_wait_comes_back_without_a_ring(bell: int, timeout: float):
    assert not doorbell.wait(bell, timeout)


def test_no_wake_up_is_lost(bell: int):
    """A consumer that answers, drains and waits never waits in vain while there is a record for it."""
    fd = segment.create(ring_bytes(CAPACITY))
    try:
        reader, number, waits = RingReader(segment.attach(fd)), 0, 0
        with victim("bell", fd, bell, 2.0, fds=(fd, bell)) as run:
            finished = False
            while not finished:
                assert doorbell.wait(bell, 20), f"no ring after record {number}"
                waits += 1
                while (record := reader.read()) is not None:
                    value = struct.unpack("<I", record.payload)[0]
                    finished = value == LAST
                    assert finished or value == number
                    number += not finished
                    reader.ack()
            assert run.result()["sent"] == number
        assert waits > 100
    finally:
        os.close(fd)
