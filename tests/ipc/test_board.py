"""A board slot is never torn, whatever happens to its writer."""

from __future__ import annotations

import os
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from daemon.ipc import board as board_module
from daemon.ipc import segment
from daemon.ipc.board import MAX_FACTS, SLOT_BYTES, BoardFault, BoardReader, BoardWriter
from tests.ipc.child_programs import victim
from tests.ipc.crashing_memory import Died, Life, Mortal
from tests.ipc.programs import facts


def slot() -> memoryview:
    return memoryview(bytearray(SLOT_BYTES))


@given(st.lists(st.one_of(st.none(), st.binary(max_size=100)), max_size=12))
def test_readers_get_the_latest(script: list[bytes | None]):
    """None restarts the writer."""
    shared = slot()
    writer, reader, published = BoardWriter(shared), BoardReader(shared), []
    for content in script:
        if content is None:
            writer = BoardWriter(shared)
        else:
            writer.publish(content)
            published.append(content)
        assert reader.version == len(published)
        assert reader.read() == ((len(published), published[-1]) if published else None)


def test_largest_facts_fit_and_larger_are_refused():
    shared = slot()
    writer, reader = BoardWriter(shared), BoardReader(shared)
    large = [os.urandom(MAX_FACTS) for _ in range(3)]
    for content in large:
        writer.publish(content)
        assert reader.read()[1] == content
    with pytest.raises(ValueError):
        writer.publish(bytes(MAX_FACTS + 1))
    assert reader.read() == (3, large[-1])


@pytest.mark.parametrize("torn", [False, True])
def test_death_before_any_store_leaves_the_last_facts(torn: bool):
    contents = [facts(n) for n in range(1, 7)]
    for k in count():
        shared, life = slot(), Life(k)
        writer, reader, done, died = BoardWriter(Mortal(shared, life, torn)), BoardReader(shared), 0, False
        while done < len(contents):
            try:
                writer.publish(contents[done])
                done += 1
            except Died:
                died = True
                assert reader.read() == ((done, contents[done - 1]) if done else None)
                writer = BoardWriter(shared)
        assert reader.read() == (len(contents), contents[-1])
        if not died:
            break
    assert k == life.made >= 3 * len(contents)


@settings(deadline=None)
@given(
    st.lists(st.binary(max_size=60), min_size=1, max_size=3),
    st.lists(st.tuples(st.integers(0, SLOT_BYTES - 1), st.integers(1, 255)), min_size=1, max_size=3),
)
def test_corrupt_bytes_never_show(contents: list[bytes], flips: list[tuple[int, int]]):
    shared = slot()
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


def test_reader_beside_a_writer_that_is_killed_again_and_again():
    """Facts are self-consistent and versions only grow, while the writer dies anywhere in its work."""
    fd = segment.create(SLOT_BYTES)
    try:
        reader, last, changes = BoardReader(segment.attach(fd, writable=False)), 0, 0
        with victim("board", fd, 2.0, fds=(fd,)) as run:
            while run.running:
                for _ in range(200):
                    found = reader.read()
                    if found is None:
                        continue
                    version, content = found
                    assert content == facts(version)
                    assert version >= last
                    changes += version > last
                    last = version
            assert run.result()["kills"] > 20
        assert changes > 500
    finally:
        os.close(fd)
