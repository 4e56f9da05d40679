"""The assumption of every structure in shared memory: the store of a word is atomic."""

from __future__ import annotations

import os

from daemon.ipc import segment
from tests.ipc.child_programs import start_program
from tests.ipc.programs import PATTERNS

MIN_READS, MIN_CHANGES = 100_000, 20


def count_torn_reads(how: str) -> tuple[int, int]:
    """Read beside a process that alternates two patterns; return (reads of other values, reads)."""
    fd = segment.create(4096)
    try:
        words = segment.attach(fd).cast("Q")
        words[0] = PATTERNS[0]
        torn = reads = changes = 0
        with start_program("word", fd, how, fds=(fd,)) as program:
            while reads <= MIN_READS or changes <= MIN_CHANGES:
                program.check_running()
                values = [words[0] for _ in range(20_000)]
                torn += sum(value not in PATTERNS for value in values)
                reads += len(values)
                changes += values[0] != values[-1]
            assert program.result()["stores"] > 1000
        return torn, reads
    finally:
        os.close(fd)


def test_a_store_through_a_cast_is_never_torn(record_property):
    torn, reads = count_torn_reads("cast")
    assert reads > MIN_READS
    assert torn == 0
    # Why the ring commits through a cast and not with struct.pack_into. On one core this may find no torn read.
    record_property("pack_into: torn reads, reads", count_torn_reads("pack_into"))
