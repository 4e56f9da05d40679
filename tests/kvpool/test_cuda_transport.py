"""Copies of KV blocks between GPUs, against a fake CUDA runtime (fake_cudart.c): real calls and processes, no GPU."""

from __future__ import annotations

import os
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from daemon.ipc import doorbell
from daemon.kvpool.cuda_transport import split_into_slices
from daemon.kvpool.cudart import CudaError, CudaRuntime
from daemon.kvpool.transport import Outcome, merge
from tests.kvpool.cuda_harness import BLOCKS, INVALID, PEER, SIZE, all_blocks, block
from tests.kvpool.device_peer import BLOCK

ILLEGAL_ADDRESS = 700

# -- slices

places = st.integers(0, BLOCKS - 1)
matchings = st.lists(st.tuples(places, places), unique_by=(lambda p: p[0], lambda p: p[1]), max_size=BLOCKS)


@given(matchings, st.integers(1, 9), st.integers(1, 40), st.integers(1, 5))
def test_slices_cover_the_runs_and_stay_within_their_limits(pairs, block_bytes, slice_bytes, slice_copies):
    found = list(split_into_slices(merge(pairs), block_bytes, slice_bytes, slice_copies))
    moved = sorted((c.source + i, c.destination + i) for copies in found for c in copies for i in range(c.nbytes))
    assert moved == sorted((a * block_bytes + i, b * block_bytes + i) for a, b in pairs for i in range(block_bytes))
    assert all(0 < sum(c.nbytes for c in copies) <= slice_bytes for copies in found)
    assert all(0 < len(copies) <= slice_copies for copies in found)


# -- pushes


@given(st.lists(matchings, min_size=1, max_size=3))
@settings(deadline=None, max_examples=25)
def test_another_process_reads_the_pushed_blocks_and_no_other_changes(pair, pushes):
    harness, peer = pair
    harness.own_pool[:] = os.urandom(SIZE)
    pool = harness.probed_pool()
    expected = bytearray(peer.read_pool())
    taken: set[int] = set()
    for key, pairs in enumerate(pushes):
        mine = [(a, b) for a, b in pairs if b not in taken]  # two pushes to one block would have no order
        taken |= {b for _, b in mine}
        for a, b in mine:
            expected[b * BLOCK : (b + 1) * BLOCK] = block(harness.own_pool, a)
        harness.transport.push(key, pool, mine, BLOCK)
    ended = harness.wait_for_completions(len(pushes))
    assert sorted(end.key for end in ended) == list(range(len(pushes)))
    assert {(end.outcome, end.reason) for end in ended} == {(Outcome.DONE, "")}
    assert sum(end.nbytes for end in ended) == len(taken) * BLOCK
    assert peer.read_pool() == expected
    assert harness.transport.completed() == []


def test_adjacent_blocks_are_one_copy(harness):
    harness.start_peer()
    pool = harness.probed_pool()
    before = harness.num_calls("cudaMemcpyAsync")
    harness.transport.push("run", pool, [(i, i + 4) for i in random.Random(1).sample(range(20), 20)], BLOCK)
    harness.wait_for_completions()
    assert harness.num_calls("cudaMemcpyAsync") == before + 1


@pytest.fixture
def batching(harness):
    """A harness whose runtime copies in batches."""
    harness.fake.fake_version(13000)
    harness.replace_transport()
    return harness


SCATTERED = [(2 * i, 2 * i + 1) for i in range(12)]


def test_scattered_blocks_are_one_call(batching):
    peer = batching.start_peer()
    pool = batching.probed_pool()
    before = batching.num_calls("cudaMemcpyBatchAsync")
    batching.transport.push("move", pool, SCATTERED, BLOCK)
    [end] = batching.wait_for_completions()
    assert (end.outcome, end.nbytes) == (Outcome.DONE, len(SCATTERED) * BLOCK)
    assert batching.num_calls("cudaMemcpyBatchAsync") == before + 1
    there = peer.read_pool()
    assert all(there[b * BLOCK : (b + 1) * BLOCK] == block(batching.own_pool, a) for a, b in SCATTERED)


def test_a_driver_without_batches_gets_single_copies_from_then_on(batching):
    batching.start_peer()
    pool = batching.probed_pool()
    batching.fail_call("cudaMemcpyBatchAsync", 36)
    for key in ("first", "second"):
        batching.transport.push(key, pool, SCATTERED, BLOCK)
        [end] = batching.wait_for_completions()
        assert (end.key, end.outcome, end.nbytes) == (key, Outcome.DONE, len(SCATTERED) * BLOCK)
    assert batching.num_calls("cudaMemcpyBatchAsync") == 1


def test_a_batch_that_fails_ends_its_push_and_no_other(batching):
    batching.start_peer()
    pool = batching.probed_pool()
    batching.fail_call("cudaMemcpyBatchAsync", INVALID)
    batching.transport.push("failing", pool, SCATTERED, BLOCK)
    batching.transport.push("good", pool, SCATTERED, BLOCK)
    ended = {end.key: end for end in batching.wait_for_completions(2)}
    assert ended["failing"].outcome is Outcome.FAILED and "cudaMemcpyBatchAsync" in ended["failing"].reason
    assert ended["good"].outcome is Outcome.DONE


def test_the_bell_rings_for_a_completion_without_polling(harness):
    harness.start_peer()
    pool = harness.probed_pool()
    harness.fake.fake_permit(0)
    harness.transport.push("move", pool, [(1, 1)], BLOCK)
    assert harness.transport.completed() == []
    harness.fake.fake_permit(-1)
    assert [end.key for end in harness.wait_for_completions()] == ["move"]


def test_a_completion_is_returned_even_before_the_thread_has_seen_the_event(harness):
    harness.start_peer()
    pool = harness.probed_pool()
    harness.transport.push("move", pool, [(1, 1)], BLOCK)
    CudaRuntime(str(harness.library)).synchronize_stream(harness.transport._streams[PEER].stream)
    assert [end.key for end in harness.transport.completed()] == ["move"]


def test_a_small_push_overtakes_the_rest_of_a_large_one(harness):
    harness.start_peer()
    pool = harness.probed_pool()
    harness.replace_transport(slice_bytes=BLOCK)
    harness.fake.fake_permit(0)
    harness.transport.push("large", pool, [(1, 1), (2, 2), (3, 3)], BLOCK)  # two slices are in flight
    harness.transport.push("small", pool, [(5, 5)], BLOCK)
    harness.fake.fake_permit(3)
    assert [end.key for end in harness.wait_for_completions()] == ["small"]
    harness.fake.fake_permit(-1)
    assert [end.key for end in harness.wait_for_completions()] == ["large"]


def test_after_the_completion_of_a_cancelled_push_no_byte_is_written(harness):
    peer = harness.start_peer()
    pool = harness.probed_pool()
    harness.replace_transport(slice_bytes=BLOCK)
    before = peer.read_pool()
    harness.fake.fake_permit(0)
    harness.transport.push("move", pool, all_blocks(), BLOCK)
    assert harness.transport.cancel("move")
    assert harness.transport.completed() == []  # slices are still on the stream
    harness.fake.fake_permit(-1)
    [end] = harness.wait_for_completions()
    assert (end.outcome, end.nbytes) == (Outcome.CANCELLED, 2 * BLOCK)
    now = peer.read_pool()
    assert now[: end.nbytes] == harness.own_pool[: end.nbytes]
    assert now[end.nbytes :] == before[end.nbytes :]
    assert not harness.transport.cancel("move")
    harness.transport.push("move", pool, [(9, 9)], BLOCK)
    assert harness.wait_for_completions()[0].outcome is Outcome.DONE


def test_a_push_cancelled_before_its_first_slice_ends_and_rings_the_bell(harness):
    harness.start_peer()
    pool = harness.probed_pool()
    harness.replace_transport(slice_bytes=BLOCK)
    harness.fake.fake_permit(0)
    harness.transport.push("before", pool, all_blocks(), BLOCK)
    harness.transport.push("waiting", pool, all_blocks(), BLOCK)
    while doorbell.clear(harness.bell):
        pass
    assert harness.transport.cancel("waiting")
    assert doorbell.wait(harness.bell, 20.0)
    assert [(c.key, c.outcome, c.nbytes) for c in harness.transport.completed()] == [
        ("waiting", Outcome.CANCELLED, 0)
    ]
    harness.fake.fake_permit(-1)
    assert harness.wait_for_completions()[0].outcome is Outcome.DONE


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (lambda pool: (pool, [(1, 1), (BLOCKS, 2)], BLOCK), f"source blocks {BLOCKS}"),
        (lambda pool: (pool, [(1, 1), (-1, 2)], BLOCK), "source blocks -1"),
        (lambda pool: (pool, [(1, 1), (2, BLOCKS)], BLOCK), f"destination blocks {BLOCKS}"),
        (lambda pool: (pool, [(1, 1), (2, -1)], BLOCK), "destination blocks -1"),
        (lambda pool: (pool, [(1, 2), (3, 2)], BLOCK), "twice"),
        (lambda pool: (pool, [(1, 1)], 0), "0 bytes"),
        (lambda pool: (None, [(1, 1)], BLOCK), "not a pool"),
        (lambda pool: (memoryview(bytearray(SIZE)), [(1, 1)], BLOCK), "not a pool"),
    ],
)
def test_an_impossible_push_fails_without_a_copy_and_the_transport_goes_on(pair, bad, reason):
    harness, peer = pair
    pool = harness.probed_pool()
    before = peer.read_pool()
    while doorbell.clear(harness.bell):
        pass
    harness.transport.push("bad", *bad(pool))
    assert doorbell.clear(harness.bell)
    [end] = harness.transport.completed()
    assert (end.nbytes, end.outcome) == (0, Outcome.FAILED)
    assert reason in end.reason
    assert peer.read_pool() == before
    assert harness.probed_pool() is pool


def test_a_key_is_in_use_until_its_completion_and_the_queue_is_bounded(harness):
    harness.start_peer()
    pool = harness.probed_pool()
    harness.replace_transport(max_pushes=2)
    harness.fake.fake_permit(0)
    harness.transport.push(1, pool, [(1, 1)], BLOCK)
    with pytest.raises(ValueError, match="in flight"):
        harness.transport.push(1, pool, [(2, 2)], BLOCK)
    harness.transport.push(2, pool, [(2, 2)], BLOCK)
    harness.transport.push(3, pool, [(3, 3)], BLOCK)
    [end] = harness.transport.completed()
    assert (end.key, end.outcome) == (3, Outcome.FAILED)
    assert "too many" in end.reason
    harness.fake.fake_permit(-1)
    assert {end.key for end in harness.wait_for_completions(2)} == {1, 2}


def test_close_ends_every_push_and_releases_everything_and_later_pushes_fail(harness):
    harness.start_peer()
    pool = harness.probed_pool()
    harness.replace_transport(slice_bytes=BLOCK)
    for key in range(3):
        harness.transport.push(key, pool, all_blocks(shift=key), BLOCK)
    harness.transport.close()
    ended = harness.transport.completed()
    assert sorted(end.key for end in ended) == [0, 1, 2]
    assert Outcome.FAILED not in {end.outcome for end in ended}
    assert harness.num_calls("cudaEventDestroy") == harness.num_calls("cudaEventCreateWithFlags") > 0
    assert harness.num_calls("cudaStreamDestroy") == harness.num_calls("cudaStreamCreateWithPriority") == 3
    harness.transport.push("late", pool, [(1, 1)], BLOCK)
    assert harness.transport.completed()[0].reason == "the transport is closed"


# -- failures


@pytest.mark.parametrize(
    ("call", "after"),
    [("cudaMemcpyAsync", 0), ("cudaMemcpyAsync", 3), ("cudaEventCreateWithFlags", 0), ("cudaEventRecord", 0),
     ("cudaEventRecord", 1), ("cudaEventQuery", 0)],
)  # fmt: skip
def test_a_failed_call_ends_only_its_own_push(harness, call, after):
    peer = harness.start_peer()
    pool = harness.probed_pool()
    harness.replace_transport(slice_bytes=4 * BLOCK)
    harness.fail_call(call, INVALID, after)
    harness.transport.push("move", pool, [(i, 31 - i) for i in range(20)], BLOCK)
    [end] = harness.wait_for_completions()
    assert end.outcome is Outcome.FAILED
    assert call in end.reason
    assert "invalid argument (1)" in end.reason
    at_completion = peer.read_pool()
    harness.transport.push("next", pool, [(30, 30)], BLOCK)
    assert harness.wait_for_completions()[0].outcome is Outcome.DONE
    now = peer.read_pool()
    assert block(now, 30) == block(harness.own_pool, 30)
    assert now[: 30 * BLOCK] + now[31 * BLOCK :] == at_completion[: 30 * BLOCK] + at_completion[31 * BLOCK :]


def test_no_error_is_left_in_the_library_for_other_callers(harness):
    harness.start_peer()
    pool = harness.probed_pool()
    harness.fake.fake_permit(0)
    harness.transport.push("move", pool, [(1, 1)], BLOCK)
    assert harness.transport.completed() == []  # the library records "not ready" as an error
    assert harness.fake.cudaGetLastError() == 0
    harness.fail_call("cudaMemcpyAsync", INVALID)
    harness.fake.fake_permit(-1)
    harness.transport.push("fails", pool, [(1, 1)], BLOCK)
    assert harness.fake.cudaGetLastError() == 0
    harness.wait_for_completions(2)


def test_a_lost_context_rings_the_bell_and_raises_an_error_that_ends_the_engine(harness):
    harness.start_peer()
    pool = harness.probed_pool()
    harness.fake.fake_permit(0)
    harness.transport.push("move", pool, [(i, 31 - i) for i in range(20)], BLOCK)
    harness.fake.fake_lose_context_after(3)
    harness.fake.fake_permit(-1)
    with pytest.raises(CudaError, match="illegal memory access") as raised:
        harness.wait_for_completions()
    assert raised.value.code == ILLEGAL_ADDRESS
    with pytest.raises(CudaError):
        harness.transport.push("another", pool, [(1, 1)], BLOCK)
