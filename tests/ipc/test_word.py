"""The one assumption below every structure in shared memory: a word is stored whole."""

from __future__ import annotations

import os

from daemon.ipc import segment
from tests.ipc.child_programs import victim
from tests.ipc.programs import PATTERNS


def _reads(how: str) -> tuple[int, int]:
    """(values seen that nobody stored, reads) beside a process that alternates two patterns."""
    fd = segment.create(4096)
    try:
        words = segment.attach(fd).cast("Q")
        words[0] = PATTERNS[0]
        strange = reads = 0
        with victim("word", fd, 1.0, how, fds=(fd,)) as run:
            while run.running:
                seen = [words[0] for _ in range(20_000)]
                strange += sum(value not in PATTERNS for value in seen)
                reads += len(seen)
            assert run.result()["stores"] > 1000
        return strange, reads
    finally:
        os.close(fd)


def test_cast_stores_are_never_torn(record_property):
    strange, reads = _reads("cast")
    assert reads > 100_000
    assert strange == 0
    # Why the ring commits through a cast and not struct.pack_into. On one core it may well show nothing.
    record_property("pack_into: strange values, reads", _reads("pack_into"))
