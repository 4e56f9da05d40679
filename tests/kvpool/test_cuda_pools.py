"""Other GPUs' KV pools, opened through a fake CUDA runtime (fake_cudart.c): real calls and processes, no GPU."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import msgspec
import pytest

from daemon.ipc import doorbell
from daemon.ipc.messages import PoolState
from daemon.ipc.process_table import ProcessState
from daemon.kvpool import pool_directory, pool_opener
from daemon.kvpool.cudart import CudaRuntime
from daemon.kvpool.pool_opener import POLL
from daemon.kvpool.transport import Outcome
from tests.kvpool.cuda_harness import INVALID, NO_PEER_ACCESS, PEER, block
from tests.kvpool.device_peer import BLOCK, connect

SLOW = 3.0  # seconds that a driver may take for a large pool
PROBE_COPIES = 3  # the nonce to our pool, on to the peer's, and back to the host
OUT_OF_MEMORY = 2  # cudaError_t


def test_a_pool_is_opened_once_per_incarnation(harness):
    assert harness.pools.pool(PEER) is None  # not started yet
    harness.publish_state(ProcessState.UP)
    assert harness.pools.pool(PEER) is None  # has not published yet
    harness.start_peer()
    pool = harness.await_pool()
    assert pool is not None
    assert harness.pools.pool(PEER, 1) is pool
    assert harness.pools.pool(PEER, 2) is None
    harness.start_peer(2)
    assert harness.await_pool(2) is not pool
    assert list(harness.pools.states) == [PoolState.NOT_OPEN, PoolState.OPEN, PoolState.OPEN]
    assert (harness.num_calls("cudaIpcOpenMemHandle"), harness.fake.fake_mapped()) == (2, 2)
    harness.pools.close()
    assert harness.fake.fake_mapped() == 0


def test_a_pool_is_opened_without_being_asked_for_and_the_bell_rings(harness):
    harness.start_peer()
    doorbell.clear(harness.bell)
    harness.pools.refresh()
    assert doorbell.wait(harness.bell, 20.0)
    harness.pools.refresh()
    assert harness.pools.states[PEER] == PoolState.OPEN


def test_a_successor_is_not_mistaken_for_its_predecessor(harness):
    first = harness.start_peer(incarnation=2)
    old = harness.await_pool(PEER, 2)
    harness.publish_state(ProcessState.DEAD, incarnation=2)
    harness.pools.refresh()
    assert harness.pools.pool(PEER) is None
    harness.await_mapped(0)
    harness.publish_state(ProcessState.UP, incarnation=3)
    for _ in range(3):  # the board still has the predecessor's handle
        assert harness.pools.pool(PEER) is None
        time.sleep(POLL)
    first.kill()
    successor = harness.start_peer(incarnation=3)
    assert harness.pools.pool(PEER, 2) is None
    pool = harness.await_pool(PEER, 3)
    harness.transport.push("old", old, [(1, 1)], BLOCK)
    [end] = harness.wait_for_completions()
    assert (end.outcome, end.reason) == (Outcome.FAILED, f"incarnation 2 of engine {PEER} is dead")
    harness.transport.push("new", pool, [(1, 1)], BLOCK)
    assert harness.wait_for_completions()[0].outcome is Outcome.DONE
    assert block(successor.read_pool(), 1) == block(harness.own_pool, 1)


def test_a_pool_is_closed_when_its_engine_is_dead_and_its_last_push_completed(harness):
    peer = harness.start_peer()
    pool = harness.probed_pool()
    harness.fake.fake_permit(0)
    harness.transport.push("move", pool, [(i, 31 - i) for i in range(20)], BLOCK)
    peer.kill()
    harness.publish_state(ProcessState.DEAD)
    harness.pools.refresh()
    assert harness.pools.pool(PEER) is None
    assert harness.fake.fake_mapped() == 1
    harness.fake.fake_permit(-1)
    [end] = harness.wait_for_completions()
    assert (end.outcome, end.nbytes) == (Outcome.DONE, 20 * BLOCK)
    harness.pools.refresh()
    assert not pool.open
    harness.await_mapped(0)


def test_fifty_restarts_leave_nothing_mapped(harness):
    peer = harness.start_peer()
    [handle] = [harness.pools._published(PEER, 1)]
    for incarnation in range(1, 51):
        harness.publish_state(ProcessState.UP, incarnation=incarnation)
        harness.publish_handle(handle, incarnation=incarnation)
        assert harness.await_pool(PEER, incarnation).incarnation == incarnation
        harness.await_mapped(1)
    assert harness.num_calls("cudaIpcOpenMemHandle") == 50
    assert not any(peer.read_pool()[BLOCK:])


def test_restarts_while_pools_are_being_opened_leave_only_the_last_one(harness):
    """Attempts that have begun end late, for incarnations that are dead by then."""
    harness.slow_call("cudaIpcOpenMemHandle", 0.05)
    harness.start_peer()
    [handle] = [harness.pools._published(PEER, 1)]
    for incarnation in range(1, 8):
        harness.publish_state(ProcessState.UP, incarnation=incarnation)
        harness.publish_handle(handle, incarnation=incarnation)
        harness.pools.refresh()
        time.sleep(0.03)
    assert harness.await_pool(PEER).incarnation == 7
    harness.await_mapped(1)


@pytest.mark.parametrize("handle", [b"", b"nonsense", bytes(msgspec.msgpack.encode((b"short", 0, 1, "")))])
def test_an_invalid_handle_is_logged_once_per_incarnation(harness, caplog, handle):
    harness.publish_state(ProcessState.UP)
    harness.publish_handle(handle)
    with caplog.at_level(logging.ERROR):
        assert [harness.await_pool() for _ in range(3)] == [None] * 3
    assert len(caplog.records) == 1
    assert f"engine {PEER}" in caplog.text and "next attempt" not in caplog.text
    assert harness.pools.refusal(PEER, 1) == f"the KV pool of engine {PEER} cannot be opened"
    harness.start_peer(incarnation=2)
    harness.pools.refresh()
    assert harness.await_pool() is not None


def test_a_handle_that_the_driver_refuses_for_good_is_tried_and_logged_once(harness, caplog):
    harness.start_peer()
    harness.fail_call("cudaIpcOpenMemHandle", NO_PEER_ACCESS)
    with caplog.at_level(logging.ERROR):
        assert [harness.await_pool() for _ in range(3)] == [None] * 3
    assert len(caplog.records) == 1
    assert "peer access is not supported" in caplog.text
    assert harness.num_calls("cudaIpcOpenMemHandle") == 1


def test_another_failure_of_the_driver_is_tried_again_later(harness, caplog, monkeypatch):
    monkeypatch.setattr(pool_opener, "RETRY_DELAYS", (0.05,))
    harness.start_peer()
    harness.fail_call("cudaIpcOpenMemHandle", OUT_OF_MEMORY)
    with caplog.at_level(logging.ERROR):
        assert harness.await_pool() is None
        assert doorbell.wait(harness.bell, 20.0)
    assert "next attempt in" in caplog.text
    harness.pools.refresh()
    assert harness.pools.pool(PEER) is not None
    assert harness.pools.refusal(PEER, 1) == ""


def test_attempts_end_after_some_failures():
    delays = [pool_opener.retry_delay(OSError(), n) for n in range(1, 7)]
    assert delays == [*pool_opener.RETRY_DELAYS, 0.0, 0.0]
    assert pool_opener.retry_delay(pool_opener.CannotOpen(), 1) == 0.0


def test_a_death_while_the_pool_is_being_opened_is_detected(harness, monkeypatch):
    harness.start_peer()
    open_ipc: Callable[[bytes], int] = harness.pools._runtime.open_ipc

    def open_then_die(handle: bytes) -> int:
        base = open_ipc(handle)
        harness.publish_state(ProcessState.DEAD)
        return base

    monkeypatch.setattr(harness.pools._runtime, "open_ipc", open_then_die)
    harness.pools.refresh()
    assert doorbell.wait(harness.bell, 20.0)
    assert harness.pools.pool(PEER) is None
    harness.await_mapped(0)


@pytest.mark.parametrize("failure", ["bytes lost", "refused"])
def test_without_peer_access_the_pool_is_not_used_and_the_probe_runs_once(harness, caplog, failure):
    peer = harness.start_peer()
    if failure == "bytes lost":
        harness.fake.fake_lose_copies(1)
    else:
        harness.fail_call("cudaMemcpyAsync", NO_PEER_ACCESS, after=1)
    copies = []
    with caplog.at_level(logging.ERROR):
        for _ in range(2):
            assert harness.await_pool() is None
            copies.append(harness.num_calls("cudaMemcpyAsync"))
    assert copies[0] == copies[1] <= 3 * PROBE_COPIES
    assert "no peer access between 0000:1A:00.0 and 0000:1B:00.0" in caplog.text
    assert harness.num_calls("cudaStreamDestroy") == harness.num_calls("cudaStreamCreateWithPriority") == 1
    harness.await_mapped(0)
    assert not any(peer.read_pool())


def test_a_probe_writes_only_into_the_dummy_block(harness):
    peer = harness.start_peer()
    theirs, mine = peer.read_pool(), bytes(harness.own_pool)
    assert harness.await_pool() is not None
    now = peer.read_pool()
    assert block(now, 0)[:-64] == block(theirs, 0)[:-64]
    assert block(now, 0) != block(theirs, 0)
    assert now[BLOCK:] == theirs[BLOCK:]
    assert harness.own_pool[BLOCK:] == mine[BLOCK:]


# -- a driver that takes seconds


def test_no_call_of_the_loop_waits_for_a_slow_open_and_copies_to_other_peers_go_on(harness):
    harness.start_peer(2)
    other = harness.probed_pool(2)
    harness.slow_call("cudaIpcOpenMemHandle", SLOW)
    harness.start_peer()
    began, longest, num_copies = time.monotonic(), 0.0, 0
    while harness.pools.states[PEER] != PoolState.OPEN:
        before = time.monotonic()
        harness.pools.refresh()
        if harness.pools.states[PEER] == PoolState.NOT_OPEN:
            assert harness.pools.refusal(PEER, 1) == f"the KV pool of engine {PEER} is not open yet"
        harness.transport.push("move", other, [(1, 1)], BLOCK)
        assert harness.wait_for_completions()[0].outcome is Outcome.DONE
        longest, num_copies = max(longest, time.monotonic() - before), num_copies + 1
    assert time.monotonic() - began >= SLOW
    assert longest < SLOW / 2
    assert num_copies > 20
    harness.transport.push("move", harness.pools.pool(PEER, 1), [(2, 2)], BLOCK)
    assert harness.wait_for_completions()[0].outcome is Outcome.DONE


def test_no_call_of_the_loop_waits_for_a_slow_close(harness):
    harness.start_peer()
    harness.probed_pool()
    harness.slow_call("cudaIpcCloseMemHandle", SLOW)
    harness.publish_state(ProcessState.DEAD)
    began = time.monotonic()
    harness.pools.refresh()
    assert harness.pools.pool(PEER) is None
    assert time.monotonic() - began < SLOW / 2
    harness.await_mapped(0)


def test_close_waits_only_for_a_while_for_a_driver_that_does_not_answer(harness, monkeypatch, caplog):
    monkeypatch.setattr(pool_directory, "CLOSE_SECONDS", 0.1)
    harness.slow_call("cudaIpcOpenMemHandle", SLOW)
    harness.start_peer()
    harness.pools.refresh()
    time.sleep(0.1)
    began = time.monotonic()
    harness.pools.close()
    assert time.monotonic() - began < SLOW / 2
    assert "still opening one" in caplog.text


@pytest.mark.parametrize("call", ["cuMemGetAddressRange_v2", "cudaIpcGetMemHandle"])
def test_an_engine_whose_memory_cannot_be_exported_logs_it_and_serves(harness, caplog, call):
    harness.fail_call(call, INVALID)
    with caplog.at_level(logging.ERROR):
        assert connect(str(harness.library), harness.tensor, harness.fabric).handle == b""
    assert "no request can migrate to this engine" in caplog.text


def test_the_real_runtime_has_every_call():
    try:
        CudaRuntime()
    except OSError:
        pytest.skip("no CUDA runtime")
