"""Copies of KV blocks between pools in shared memory, within one process and between two."""

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
from daemon.kvpool.host_transport import NICENESS, HostTransport, copy
from daemon.kvpool.transport import Completion, Outcome, merge

ROOT = Path(__file__).parents[2]
BLOCK = 4096
# The source of a peer process that maps the pool and answers each line with the pool's digest.
PEER_SOURCE = """
import hashlib, sys
from daemon.ipc import segment
pool = segment.attach(int(sys.argv[1]))
for _ in sys.stdin:
    print(hashlib.sha256(pool).hexdigest(), flush=True)
"""


def empty_pool(blocks: int) -> memoryview:
    """Return a pool of zeros."""
    fd = segment.create(blocks * BLOCK)
    try:
        return segment.attach(fd)
    finally:
        os.close(fd)


def random_pool(blocks: int) -> memoryview:
    """Return a pool of random bytes."""
    pool = empty_pool(blocks)
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
def open_transport(pool: memoryview, bell: int, **options: float) -> Iterator[HostTransport]:
    """Open a transport with slices of one block and no rest, unless `options` say otherwise."""
    opened = HostTransport(pool, bell, **({"slice_bytes": BLOCK, "rest": 0.0} | options))
    try:
        yield opened
    finally:
        opened.close()


def wait_for_completions(transport: HostTransport, bell: int, count: int = 1) -> list[Completion]:
    """Return the next `count` completions; between two polls wait for the doorbell."""
    ended: list[Completion] = []
    while len(ended) < count:
        ended += transport.completed()
        if len(ended) < count:
            assert doorbell.wait(bell, 20.0), f"no bell after {ended}"
    return ended


def wait_until(condition: Callable[[], object]) -> None:
    """Poll `condition` until it is true, for at most 10 s."""
    end = time.monotonic() + 10
    while not condition():
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
def test_no_two_runs_could_be_one(pairs):
    runs = merge(pairs)
    ends = {(r.source + r.length, r.destination + r.length) for r in runs}
    assert ends.isdisjoint((r.source, r.destination) for r in runs)


@given(st.integers(0, 9), st.integers(0, 9), st.integers(1, 20), st.randoms(use_true_random=False))
def test_adjacent_blocks_in_any_order_are_one_run(source, destination, length, rng):
    pairs = [(source + i, destination + i) for i in range(length)]
    rng.shuffle(pairs)
    assert merge(pairs) == [(source, destination, length)]


def test_a_destination_with_two_sources_is_an_error():
    with pytest.raises(ValueError, match="twice"):
        merge([(1, 5), (2, 5)])


@given(pairings, st.integers(1, 9), st.integers(1, 12))
@settings(deadline=None)
def test_copy_writes_the_named_blocks_and_no_other_byte(pairs, block_bytes, slice_bytes):
    size = 31 * block_bytes
    source, destination = random.Random(1).randbytes(size), bytearray(random.Random(2).randbytes(size))
    expected = bytearray(destination)
    for a, b in pairs:
        expected[b * block_bytes : (b + 1) * block_bytes] = source[a * block_bytes : (a + 1) * block_bytes]
    slices = list(copy(memoryview(source), memoryview(destination), pairs, block_bytes, slice_bytes))
    assert destination == expected
    assert sum(slices) == len(pairs) * block_bytes
    assert max(slices) <= slice_bytes


# -- the transport


def test_each_push_arrives_completes_once_and_rings_the_bell(bell):
    own, peer = random_pool(64), empty_pool(64)
    with open_transport(own, bell) as transport:
        transport.push("a", peer, [(i, 63 - i) for i in range(32)], BLOCK)
        transport.push("b", peer, [(i, i - 32) for i in range(32, 64)], BLOCK)
        ended = {c.key: c for c in wait_for_completions(transport, bell, 2)}
        assert transport.completed() == []
    assert {k: (c.nbytes, c.outcome, c.reason) for k, c in ended.items()} == {
        "a": (32 * BLOCK, Outcome.DONE, ""),
        "b": (32 * BLOCK, Outcome.DONE, ""),
    }
    assert all(block(peer, 63 - i) == block(own, i) for i in range(32))
    assert all(block(peer, i - 32) == block(own, i) for i in range(32, 64))


@pytest.mark.parametrize("pairs", [[], [(1, 2)], [(3, 7), (1, 2)]])
def test_a_push_of_at_most_one_slice_has_arrived_when_push_returns(bell, pairs):
    own, peer = random_pool(8), empty_pool(8)
    with open_transport(own, bell, slice_bytes=16 * BLOCK) as transport:
        transport.push("tail", peer, pairs, BLOCK)
        [end] = transport.completed()
        assert (end.nbytes, end.outcome) == (len(pairs) * BLOCK, Outcome.DONE)
        assert doorbell.clear(bell)
    assert all(block(peer, b) == block(own, a) for a, b in pairs)


def test_a_small_push_does_not_wait_for_large_ones(bell):
    own, peers = random_pool(1024), [empty_pool(1024) for _ in range(3)]
    everything = [(i, i) for i in range(1024)]
    with open_transport(own, bell, rest=20.0) as transport:
        transport.push("before", peers[0], everything, BLOCK)
        transport.push("small", peers[1], [(0, 1), (5, 3), (9, 5)], BLOCK)
        transport.push("after", peers[2], everything, BLOCK)
        assert wait_for_completions(transport, bell)[0].key == "small"
        assert transport.cancel("before")
        assert transport.cancel("after")


def test_after_the_completion_of_a_cancelled_push_no_byte_is_written(bell):
    own, peer = random_pool(2048), empty_pool(2048)
    with open_transport(own, bell, rest=20.0) as transport:
        transport.push("move", peer, [(i, i) for i in range(2048)], BLOCK)
        wait_until(lambda: peer[BLOCK * 3])
        assert transport.cancel("move")
        [end] = wait_for_completions(transport, bell)
        at_completion = bytes(peer)
        assert end.outcome is Outcome.CANCELLED
        assert 0 < end.nbytes < 2048 * BLOCK
        assert at_completion[: end.nbytes] == own[: end.nbytes]
        assert not any(at_completion[end.nbytes :])
        time.sleep(0.02)
        assert bytes(peer) == at_completion
        assert not transport.cancel("move")


def test_a_key_is_in_use_until_its_completion_is_returned(bell):
    own, peer = random_pool(8), empty_pool(8)
    with open_transport(own, bell) as transport:
        transport.push(1, peer, [(1, 1)], BLOCK)
        assert transport.cancel(1)  # it has ended, but its completion is still to come
        with pytest.raises(ValueError, match="in flight"):
            transport.push(1, peer, [(2, 2)], BLOCK)
        assert [c.outcome for c in transport.completed()] == [Outcome.DONE]
        assert not any(block(peer, 2))
        transport.push(1, peer, [(2, 2)], BLOCK)
        assert block(peer, 2) == block(own, 2)


@pytest.mark.parametrize("count", [1, 3])  # copied by the caller and by the thread
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
def test_an_impossible_push_fails_without_a_copy_and_the_transport_goes_on(bell, count, bad, reason):
    own, peer = random_pool(8), empty_pool(8)
    pairs = [(2 * i, 2 * i) for i in range(count)]
    with open_transport(own, bell) as transport:
        transport.push("bad", *bad(peer, pairs))
        [end] = wait_for_completions(transport, bell)
        assert (end.nbytes, end.outcome) == (0, Outcome.FAILED)
        assert re.search(reason, end.reason), end.reason
        assert not any(peer)
        transport.push("good", peer, pairs, BLOCK)
        assert wait_for_completions(transport, bell)[0].outcome is Outcome.DONE


def test_a_full_queue_fails_new_pushes_until_old_ones_complete(bell):
    own, peer = random_pool(1024), empty_pool(1024)
    pairs = [(i, i) for i in range(1024)]
    with open_transport(own, bell, max_pushes=2, rest=20.0) as transport:
        for key in range(3):
            transport.push(key, peer, pairs, BLOCK)
        [end] = wait_for_completions(transport, bell)
        assert (end.key, end.outcome) == (2, Outcome.FAILED)
        assert "too many" in end.reason
        transport.cancel(0), transport.cancel(1)
        wait_for_completions(transport, bell, 2)
        transport.push(3, peer, [(0, 0)], BLOCK)
        assert transport.completed()[0].outcome is Outcome.DONE


def test_close_cancels_every_push_and_later_pushes_fail(bell):
    own, peer = random_pool(1024), empty_pool(1024)
    with open_transport(own, bell, rest=20.0) as transport:
        for key in range(3):
            transport.push(key, peer, [(i, i) for i in range(1024)], BLOCK)
    at_close = bytes(peer)
    assert {c.key: c.outcome for c in transport.completed()} == dict.fromkeys(range(3), Outcome.CANCELLED)
    transport.push("late", peer, [(1, 1)], BLOCK)
    assert transport.completed()[0].outcome is Outcome.FAILED
    assert bytes(peer) == at_close


def test_a_pool_stays_mapped_until_its_push_ends_and_no_longer(bell):
    own, peer = random_pool(1024), empty_pool(1024)
    mapping = weakref.ref(peer.obj)
    with open_transport(own, bell, rest=20.0) as transport:
        transport.push("move", peer, [(i, i) for i in range(1024)], BLOCK)
        del peer
        gc.collect()
        assert mapping() is not None
        transport.cancel("move")
        wait_for_completions(transport, bell)
        wait_until(lambda: mapping() is None)


def test_only_the_copying_thread_has_a_lower_priority(bell):
    before = os.getpriority(os.PRIO_PROCESS, 0)
    with open_transport(random_pool(1), bell):
        ids = map(int, os.listdir("/proc/self/task"))
        wait_until(lambda: min(19, before + NICENESS) in {os.getpriority(os.PRIO_PROCESS, i) for i in ids})
        assert os.getpriority(os.PRIO_PROCESS, 0) == before


# -- two processes


@contextmanager
def start_peer(blocks: int) -> Iterator[tuple[subprocess.Popen[str], memoryview]]:
    """Start a process with a pool; yield both, the pool as mapped here."""
    fd = segment.create(blocks * BLOCK)
    command = [sys.executable, "-c", PEER_SOURCE, str(fd)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, pass_fds=[fd], stdin=pipe, stdout=pipe, text=True) as process:
        pool = segment.attach(fd)
        os.close(fd)
        try:
            yield process, pool
        finally:
            process.kill()


def digest_at(process: subprocess.Popen[str]) -> str:
    """Return the digest of the pool as the peer reads it."""
    process.stdin.write("\n")
    process.stdin.flush()
    return process.stdout.readline().strip()


def test_another_process_reads_the_pushed_blocks(bell):
    own = random_pool(256)
    places = random.Random(3).sample(range(256), 200)
    expected = bytearray(256 * BLOCK)
    for source, place in enumerate(places):
        expected[place * BLOCK : (place + 1) * BLOCK] = block(own, source)
    with start_peer(256) as (process, pool), open_transport(own, bell) as transport:
        assert digest_at(process) == hashlib.sha256(bytes(len(expected))).hexdigest()
        transport.push("move", pool, list(enumerate(places)), BLOCK)
        wait_for_completions(transport, bell)
        assert digest_at(process) == hashlib.sha256(expected).hexdigest()


def test_a_peer_killed_during_a_copy_does_not_harm_the_source(bell):
    own = random_pool(2048)
    before = hashlib.sha256(own).digest()
    with start_peer(2048) as (process, pool), open_transport(own, bell, rest=20.0) as transport:
        digest_at(process)  # wait until it runs
        transport.push("lost", pool, [(i, i) for i in range(2048)], BLOCK)
        wait_until(lambda: pool[BLOCK * 3])
        process.kill()
        process.wait()
        assert not any(block(pool, 2047))  # the copy had not ended
        assert [(c.nbytes, c.outcome) for c in wait_for_completions(transport, bell)] == [
            (2048 * BLOCK, Outcome.DONE)
        ]
        with start_peer(8) as (successor, fresh_pool):
            transport.push("next", fresh_pool, [(i, i) for i in range(8)], BLOCK)
            assert wait_for_completions(transport, bell)[0].outcome is Outcome.DONE
            assert digest_at(successor) == hashlib.sha256(own[: 8 * BLOCK]).hexdigest()
    assert hashlib.sha256(own).digest() == before
