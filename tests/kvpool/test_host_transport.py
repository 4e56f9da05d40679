from __future__ import annotations

import gc
import hashlib
import os
import random
import re
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from daemon.ipc import doorbell, segment
from daemon.kvpool.host_transport import NICENESS, Completion, HostTransport, Outcome, copy, merge

ROOT = Path(__file__).parents[2]
BLOCK = 4096
# Maps the pool it was left, then answers each line with the pool's digest.
OWNER = """
import hashlib, sys
from daemon.ipc import segment
pool = segment.attach(int(sys.argv[1]))
for _ in sys.stdin:
    print(hashlib.sha256(pool).hexdigest(), flush=True)
"""


def fresh(blocks: int) -> memoryview:
    fd = segment.create(blocks * BLOCK)
    try:
        return segment.attach(fd)
    finally:
        os.close(fd)


def filled(blocks: int) -> memoryview:
    pool = fresh(blocks)
    pool[:] = random.Random(blocks).randbytes(len(pool))
    return pool


def block(pool: memoryview, i: int) -> bytes:
    return bytes(pool[i * BLOCK : (i + 1) * BLOCK])


@pytest.fixture
def bell() -> Iterator[int]:
    fd = doorbell.create()
    yield fd
    os.close(fd)


@contextmanager
def mover(pool: memoryview, bell: int, **options: float) -> Iterator[HostTransport]:
    """Slices of a block and no rest, unless said otherwise."""
    m = HostTransport(pool, bell, **({"slice_bytes": BLOCK, "rest": 0.0} | options))
    try:
        yield m
    finally:
        m.close()


def await_ends(m: HostTransport, bell: int, count: int = 1) -> list[Completion]:
    """The next `count` completions, slept for at the bell alone."""
    ended: list[Completion] = []
    while len(ended) < count:
        ended += m.completed()
        if len(ended) < count:
            assert doorbell.wait(bell, 20.0), f"no bell after {ended}"
    return ended


def await_truth(probe: Callable[[], object]) -> None:
    end = time.monotonic() + 10
    while not probe():
        assert time.monotonic() < end
        time.sleep(0.001)


# -- runs and slices

places = st.integers(0, 30)
pairings = st.lists(st.tuples(places, places), unique_by=lambda pair: pair[1], max_size=31)
matchings = st.lists(st.tuples(places, places), unique_by=(lambda pair: pair[0], lambda pair: pair[1]), max_size=31)


@given(pairings)
def test_runs_cover_exactly_the_pairs(pairs):
    runs = merge(pairs)
    assert all(run.length > 0 for run in runs)
    assert sorted((r.source + i, r.destination + i) for r in runs for i in range(r.length)) == sorted(pairs)


@given(matchings)
def test_no_run_continues_another(pairs):
    runs = merge(pairs)
    ends = {(r.source + r.length, r.destination + r.length) for r in runs}
    assert ends.isdisjoint((r.source, r.destination) for r in runs)


@given(st.integers(0, 9), st.integers(0, 9), st.integers(1, 20), st.randoms(use_true_random=False))
def test_adjacent_blocks_are_one_run_in_whatever_order_they_come(source, destination, length, draw):
    pairs = [(source + i, destination + i) for i in range(length)]
    draw.shuffle(pairs)
    assert merge(pairs) == [(source, destination, length)]


def test_a_destination_has_one_source():
    with pytest.raises(ValueError, match="twice"):
        merge([(1, 5), (2, 5)])


@given(pairings, st.integers(1, 9), st.integers(1, 12))
@settings(deadline=None)
def test_copy_moves_the_named_blocks_and_nothing_else(pairs, block_bytes, slice_bytes):
    size = 31 * block_bytes
    source, destination = random.Random(1).randbytes(size), bytearray(random.Random(2).randbytes(size))
    expected = bytearray(destination)
    for a, b in pairs:
        expected[b * block_bytes : (b + 1) * block_bytes] = source[a * block_bytes : (a + 1) * block_bytes]
    slices = list(copy(memoryview(source), memoryview(destination), pairs, block_bytes, slice_bytes))
    assert destination == expected
    assert sum(slices) == len(pairs) * block_bytes
    assert max(slices) <= slice_bytes


# -- the mover


def test_pushes_arrive_each_told_once_with_a_bell(bell):
    own, peer = filled(64), fresh(64)
    with mover(own, bell) as m:
        m.push("a", peer, [(i, 63 - i) for i in range(32)], BLOCK)
        m.push("b", peer, [(i, i - 32) for i in range(32, 64)], BLOCK)
        ended = {c.key: c for c in await_ends(m, bell, 2)}
        assert m.completed() == []
    assert {k: (c.nbytes, c.outcome, c.reason) for k, c in ended.items()} == {
        "a": (32 * BLOCK, Outcome.DONE, ""),
        "b": (32 * BLOCK, Outcome.DONE, ""),
    }
    assert all(block(peer, 63 - i) == block(own, i) for i in range(32))
    assert all(block(peer, i - 32) == block(own, i) for i in range(32, 64))


@pytest.mark.parametrize("pairs", [[], [(1, 2)], [(3, 7), (1, 2)]])
def test_what_fits_in_a_slice_is_there_when_push_returns(bell, pairs):
    own, peer = filled(8), fresh(8)
    with mover(own, bell, slice_bytes=16 * BLOCK) as m:
        m.push("tail", peer, pairs, BLOCK)
        [end] = m.completed()
        assert (end.nbytes, end.outcome) == (len(pairs) * BLOCK, Outcome.DONE)
        assert doorbell.answer(bell)
    assert all(block(peer, b) == block(own, a) for a, b in pairs)


def test_a_small_push_waits_for_no_large_one(bell):
    own, peers = filled(1024), [fresh(1024) for _ in range(3)]
    everything = [(i, i) for i in range(1024)]
    with mover(own, bell, rest=20.0) as m:
        m.push("before", peers[0], everything, BLOCK)
        m.push("small", peers[1], [(0, 1), (5, 3), (9, 5)], BLOCK)
        m.push("after", peers[2], everything, BLOCK)
        assert await_ends(m, bell)[0].key == "small"
        assert m.drain("before")
        assert m.drain("after")


def test_after_a_drained_push_is_told_no_byte_is_written(bell):
    own, peer = filled(2048), fresh(2048)
    with mover(own, bell, rest=20.0) as m:
        m.push("move", peer, [(i, i) for i in range(2048)], BLOCK)
        await_truth(lambda: peer[BLOCK * 3])
        assert m.drain("move")
        [end] = await_ends(m, bell)
        told = bytes(peer)
        assert end.outcome is Outcome.CANCELLED
        assert 0 < end.nbytes < 2048 * BLOCK
        assert told[: end.nbytes] == own[: end.nbytes]
        assert not any(told[end.nbytes :])
        time.sleep(0.02)
        assert bytes(peer) == told
        assert not m.drain("move")


def test_a_key_is_taken_until_its_end_is_told(bell):
    own, peer = filled(8), fresh(8)
    with mover(own, bell) as m:
        m.push(1, peer, [(1, 1)], BLOCK)
        assert m.drain(1)  # over, and not yet told
        with pytest.raises(ValueError, match="in flight"):
            m.push(1, peer, [(2, 2)], BLOCK)
        assert [c.outcome for c in m.completed()] == [Outcome.DONE]
        assert not any(block(peer, 2))
        m.push(1, peer, [(2, 2)], BLOCK)
        assert block(peer, 2) == block(own, 2)


@pytest.mark.parametrize("count", [1, 3])  # in the caller and in the thread
@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (lambda pool, pairs: (pool, [*pairs[:-1], (8, 1)], BLOCK), "source blocks 8"),
        (lambda pool, pairs: (pool, [*pairs[:-1], (-1, 1)], BLOCK), "source blocks -1"),
        (lambda pool, pairs: (pool, [*pairs[:-1], (1, 8)], BLOCK), "destination blocks 8"),
        (lambda pool, pairs: (pool, [*pairs[:-1], (1, -1)], BLOCK), "destination blocks -1"),
        (lambda pool, pairs: (pool[:-1], [*pairs[:-1], (1, 7)], BLOCK), "destination blocks 7"),
        (lambda pool, pairs: (pool, pairs, 0), "0 bytes"),
        (lambda pool, pairs: (pool.toreadonly(), pairs, BLOCK), "read-only"),
        (lambda pool, pairs: (None, pairs, BLOCK), "buffer|bytes-like"),
    ],
)
def test_a_push_that_cannot_be_fails_untouched_and_the_mover_lives(bell, count, bad, reason):
    own, peer = filled(8), fresh(8)
    pairs = [(2 * i, 2 * i) for i in range(count)]
    with mover(own, bell) as m:
        m.push("bad", *bad(peer, pairs))
        [end] = await_ends(m, bell)
        assert (end.nbytes, end.outcome) == (0, Outcome.FAILED)
        assert re.search(reason, end.reason), end.reason
        assert not any(peer)
        m.push("good", peer, pairs, BLOCK)
        assert await_ends(m, bell)[0].outcome is Outcome.DONE


def test_a_full_queue_refuses_and_recovers(bell):
    own, peer = filled(1024), fresh(1024)
    pairs = [(i, i) for i in range(1024)]
    with mover(own, bell, max_pushes=2, rest=20.0) as m:
        for key in range(3):
            m.push(key, peer, pairs, BLOCK)
        [end] = await_ends(m, bell)
        assert (end.key, end.outcome) == (2, Outcome.FAILED)
        assert "too many" in end.reason
        m.drain(0), m.drain(1)
        await_ends(m, bell, 2)
        m.push(3, peer, [(0, 0)], BLOCK)
        assert m.completed()[0].outcome is Outcome.DONE


def test_closing_ends_every_push_and_later_ones_fail(bell):
    own, peer = filled(1024), fresh(1024)
    with mover(own, bell, rest=20.0) as m:
        for key in range(3):
            m.push(key, peer, [(i, i) for i in range(1024)], BLOCK)
    told = bytes(peer)
    assert {c.key: c.outcome for c in m.completed()} == dict.fromkeys(range(3), Outcome.CANCELLED)
    m.push("late", peer, [(1, 1)], BLOCK)
    assert m.completed()[0].outcome is Outcome.FAILED
    assert bytes(peer) == told


def test_a_pool_is_held_to_the_end_of_its_push_and_no_longer(bell):
    own, peer = filled(1024), fresh(1024)
    mapping = weakref.ref(peer.obj)
    with mover(own, bell, rest=20.0) as m:
        m.push("move", peer, [(i, i) for i in range(1024)], BLOCK)
        del peer
        gc.collect()
        assert mapping() is not None
        m.drain("move")
        await_ends(m, bell)
        await_truth(lambda: mapping() is None)


def test_only_the_copying_thread_gives_way(bell):
    before = os.getpriority(os.PRIO_PROCESS, 0)
    with mover(filled(1), bell):
        ids = map(int, os.listdir("/proc/self/task"))
        await_truth(lambda: min(19, before + NICENESS) in {os.getpriority(os.PRIO_PROCESS, i) for i in ids})
        assert os.getpriority(os.PRIO_PROCESS, 0) == before


# -- two processes


@contextmanager
def owner(blocks: int) -> Iterator[tuple[subprocess.Popen[str], memoryview]]:
    """A process with a pool, and that pool as mapped here."""
    fd = segment.create(blocks * BLOCK)
    command = [sys.executable, "-c", OWNER, str(fd)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, pass_fds=[fd], stdin=pipe, stdout=pipe, text=True) as process:
        pool = segment.attach(fd)
        os.close(fd)
        try:
            yield process, pool
        finally:
            process.kill()


def digest_at(process: subprocess.Popen[str]) -> str:
    process.stdin.write("\n")
    process.stdin.flush()
    return process.stdout.readline().strip()


def test_another_process_reads_what_was_pushed(bell):
    own = filled(256)
    places = random.Random(3).sample(range(256), 200)
    expected = bytearray(256 * BLOCK)
    for source, place in enumerate(places):
        expected[place * BLOCK : (place + 1) * BLOCK] = block(own, source)
    with owner(256) as (process, pool), mover(own, bell) as m:
        assert digest_at(process) == hashlib.sha256(bytes(len(expected))).hexdigest()
        m.push("move", pool, list(enumerate(places)), BLOCK)
        await_ends(m, bell)
        assert digest_at(process) == hashlib.sha256(expected).hexdigest()


def test_a_peer_killed_in_mid_copy_does_the_source_no_harm(bell):
    own = filled(2048)
    before = hashlib.sha256(own).digest()
    with owner(2048) as (process, pool), mover(own, bell, rest=20.0) as m:
        digest_at(process)  # it runs
        m.push("lost", pool, [(i, i) for i in range(2048)], BLOCK)
        await_truth(lambda: pool[BLOCK * 3])
        process.kill()
        process.wait()
        assert not any(block(pool, 2047))  # it was in the middle
        assert [(c.nbytes, c.outcome) for c in await_ends(m, bell)] == [(2048 * BLOCK, Outcome.DONE)]
        with owner(8) as (successor, fresh_pool):
            m.push("next", fresh_pool, [(i, i) for i in range(8)], BLOCK)
            assert await_ends(m, bell)[0].outcome is Outcome.DONE
            assert digest_at(successor) == hashlib.sha256(own[: 8 * BLOCK]).hexdigest()
    assert hashlib.sha256(own).digest() == before
