"""Other GPUs' KV pools, opened through a fake CUDA runtime (fake_cudart.c): real calls and processes, no GPU."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest

from daemon.ipc.process_table import ProcessState
from daemon.kvpool.cudart import CudaRuntime
from daemon.kvpool.transport import Outcome
from tests.kvpool.cuda_harness import INVALID, NO_PEER_ACCESS, PEER, block
from tests.kvpool.device_peer import BLOCK, connect


def test_a_pool_is_opened_once_per_incarnation(harness):
    assert harness.pools.pool(PEER) is None  # not started yet
    harness.publish_state(ProcessState.UP)
    assert harness.pools.pool(PEER) is None  # has not published yet
    harness.start_peer()
    pool = harness.pools.pool(PEER)
    assert pool is not None
    assert harness.pools.pool(PEER, 1) is pool
    assert harness.pools.pool(PEER, 2) is None
    harness.start_peer(2)
    assert harness.pools.pool(2) is not pool
    assert (harness.num_calls("cudaIpcOpenMemHandle"), harness.fake.fake_mapped()) == (2, 2)
    harness.pools.close()
    assert harness.fake.fake_mapped() == 0


def test_a_successor_is_not_mistaken_for_its_predecessor(harness):
    harness.start_peer().kill()
    old = harness.pools.pool(PEER)
    assert old is None  # its memory ended with it
    first = harness.start_peer(incarnation=2)
    old = harness.pools.pool(PEER, 2)
    harness.publish_state(ProcessState.DEAD, incarnation=2)
    harness.pools.refresh()
    assert (harness.pools.pool(PEER), harness.fake.fake_mapped()) == (None, 0)
    harness.publish_state(ProcessState.UP, incarnation=3)
    assert harness.pools.pool(PEER) is None  # the board still has the predecessor's handle
    first.kill()
    successor = harness.start_peer(incarnation=3)
    assert harness.pools.pool(PEER, 2) is None
    pool = harness.pools.pool(PEER, 3)
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
    assert (harness.fake.fake_mapped(), pool.open) == (0, False)


def test_fifty_restarts_leave_nothing_mapped(harness):
    peer = harness.start_peer()
    [handle] = [harness.pools._published(PEER, 1)]
    for incarnation in range(1, 51):
        harness.publish_state(ProcessState.UP, incarnation=incarnation)
        harness.publish_handle(handle, incarnation=incarnation)
        assert harness.pools.pool(PEER, incarnation).incarnation == incarnation
        assert harness.fake.fake_mapped() == 1
    assert harness.num_calls("cudaIpcOpenMemHandle") == 50
    assert not any(peer.read_pool())


@pytest.mark.parametrize("handle", [b"", b"nonsense"])
def test_an_invalid_handle_is_logged_once_per_incarnation(harness, caplog, handle):
    harness.publish_state(ProcessState.UP)
    harness.publish_handle(handle)
    with caplog.at_level(logging.ERROR):
        assert [harness.pools.pool(PEER) for _ in range(3)] == [None] * 3
    assert len(caplog.records) == 1
    assert f"engine {PEER}" in caplog.text
    harness.start_peer(incarnation=2)
    assert harness.pools.pool(PEER) is not None


def test_a_handle_that_the_driver_refuses_is_logged_once(harness, caplog):
    harness.start_peer()
    harness.fail_call("cudaIpcOpenMemHandle", NO_PEER_ACCESS)
    with caplog.at_level(logging.ERROR):
        assert [harness.pools.pool(PEER) for _ in range(3)] == [None] * 3
    assert len(caplog.records) == 1
    assert "peer access is not supported" in caplog.text


def test_a_death_while_the_pool_is_being_opened_is_detected(harness, monkeypatch):
    harness.start_peer()
    open_ipc: Callable[[bytes], int] = harness.pools._runtime.open_ipc

    def die_then_open(handle: bytes) -> int:
        harness.publish_state(ProcessState.DEAD)
        return open_ipc(handle)

    monkeypatch.setattr(harness.pools._runtime, "open_ipc", die_then_open)
    assert harness.pools.pool(PEER) is None
    assert harness.fake.fake_mapped() == 0


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
