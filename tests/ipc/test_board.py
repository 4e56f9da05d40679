"""A board is never torn, even if its writer crashes or is killed."""

from __future__ import annotations

import os
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from daemon.ipc import board as board_module
from daemon.ipc import segment
from daemon.ipc.board import BOARD_BYTES, MAX_FACTS, BoardFault, BoardReader, BoardWriter
from tests.ipc.child_programs import start_program
from tests.ipc.crashing_memory import Crash, CrashingMemory, StoreBudget
from tests.ipc.programs import facts

MIN_KILLS, MIN_CHANGES = 21, 500


def board_memory() -> memoryview:
    return memoryview(bytearray(BOARD_BYTES))


@given(st.lists(st.one_of(st.none(), st.binary(max_size=100)), max_size=12))
def test_readers_get_the_latest_facts(script: list[bytes | None]):
    """None restarts the writer."""
    shared = board_memory()
    writer, reader, published = BoardWriter(shared), BoardReader(shared), []
    for content in script:
        if content is None:
            writer = BoardWriter(shared)
        else:
            writer.publish(content)
            published.append(content)
        assert reader.version == len(published)
        assert reader.read() == ((len(published), published[-1]) if published else None)


def test_the_largest_facts_fit_and_larger_ones_are_refused():
    shared = board_memory()
    writer, reader = BoardWriter(shared), BoardReader(shared)
    large = [os.urandom(MAX_FACTS) for _ in range(3)]
    for content in large:
        writer.publish(content)
        assert reader.read()[1] == content
    with pytest.raises(ValueError):
        writer.publish(bytes(MAX_FACTS + 1))
    assert reader.read() == (3, large[-1])


@pytest.mark.parametrize("torn", [False, True])
def test_a_crash_before_any_store_keeps_the_last_facts(torn: bool):
    contents = [facts(n) for n in range(1, 7)]
    for k in count():
        shared, budget = board_memory(), StoreBudget(k)
        writer, reader, done, died = BoardWriter(CrashingMemory(shared, budget, torn)), BoardReader(shared), 0, False
        while done < len(contents):
            try:
                writer.publish(contents[done])
                done += 1
            except Crash:
                died = True
                assert reader.read() == ((done, contents[done - 1]) if done else None)
                writer = BoardWriter(shared)
        assert reader.read() == (len(contents), contents[-1])
        if not died:
            break
    assert k == budget.made >= 3 * len(contents)


@settings(deadline=None)
@given(
    st.lists(st.binary(max_size=60), min_size=1, max_size=3),
    st.lists(st.tuples(st.integers(0, BOARD_BYTES - 1), st.integers(1, 255)), min_size=1, max_size=3),
)
def test_corrupt_bytes_are_never_returned(contents: list[bytes], flips: list[tuple[int, int]]):
    shared = board_memory()
    writer = BoardWriter(shared)
    for content in contents:
        writer.publish(content)
    for at, mask in flips:
        shared[at] ^= mask
    retries, board_module._READ_RETRIES = board_module._READ_RETRIES, 5
    try:
        found = BoardReader(shared).read()
    except BoardFault:
        return
    finally:
        board_module._READ_RETRIES = retries
    assert found is None or found in list(enumerate(contents, 1))


def test_a_reader_beside_a_writer_that_is_killed_again_and_again():
    """Facts are consistent and versions only grow, while the writer is killed at random points."""
    fd = segment.create(BOARD_BYTES)
    try:
        reader, last, changes = BoardReader(segment.attach(fd, writable=False)), 0, 0
        with start_program("board", fd, MIN_KILLS, fds=(fd,)) as program:
            while changes <= MIN_CHANGES:
                program.check_running()
                for _ in range(200):
                    found = reader.read()
                    if found is None:
                        continue
                    version, content = found
                    assert content == facts(version)
                    assert version >= last
                    changes += version > last
                    last = version
            assert program.result()["kills"] >= MIN_KILLS
    finally:
        os.close(fd)
