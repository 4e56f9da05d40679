"""Moving KV between GPUs, against a CUDA runtime of the host (fake_cudart.c): real calls, real processes, no GPU."""

from __future__ import annotations

import ctypes
import logging
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from daemon.ipc import doorbell, segment
from daemon.ipc.fabric import Fabric, FabricHandles, Layout
from daemon.ipc.process_table import ProcessFacts, ProcessState
from daemon.kvpool.cuda_pools import CudaTransport, OwnPool, slices
from daemon.kvpool.cudart import CudaError, CudaRuntime
from daemon.kvpool.host_transport import Completion, Outcome, merge
from tests.kvpool.device_peer import BLOCK, TOPOLOGY, fabric, join, memory, publish, view

ROOT = Path(__file__).parents[2]
BLOCKS = 32
SIZE = BLOCKS * BLOCK
ME, PEER = 0, 1
PROBE_COPIES = 3  # the nonce to our pool, on to the peer's, and back to the host
ILLEGAL_ADDRESS, NO_PEER_ACCESS, INVALID = 700, 217, 1


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler")
    library = tmp_path_factory.mktemp("cudart") / "libfake.so"
    source = Path(__file__).with_name("fake_cudart.c")
    subprocess.run([compiler, "-Wall", "-Werror", "-fPIC", "-shared", "-pthread", source, "-o", library], check=True)
    return library


class Engine:
    """A peer in a process of its own."""

    def __init__(self, library: Path, fabric_fd: int, engine: int, incarnation: int) -> None:
        arguments = [str(library), str(fabric_fd), str(TOPOLOGY.engine(engine)), str(incarnation), str(BLOCKS)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.kvpool.device_peer", *arguments],
            cwd=ROOT, pass_fds=[fabric_fd], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert self.process.stdout.readline() == b"ready\n"

    def content(self) -> bytes:
        """Its pool, as it sees it."""
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()
        return self.process.stdout.read(SIZE)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


class Box:
    """This process is the supervisor, and engine 0 with a pool of random bytes; its peers are real processes."""

    def __init__(self, library: Path) -> None:
        self._path = library
        self.fake = ctypes.CDLL(str(library))
        self.fake.fake_permit.argtypes = (ctypes.c_int64,)
        self.fake.fake_lose_context_after.argtypes = (ctypes.c_int64,)
        self._segment = segment.create(Layout(TOPOLOGY).size)
        self._table = Fabric(FabricHandles(TOPOLOGY, self._segment, (), ()), -1, 0).table_writer()
        self._engines: list[Engine] = []
        self.bell = doorbell.create()
        self._end = fabric(self._segment, TOPOLOGY.engine(ME), 1, self.bell)
        self.tensor = memory(self.fake, SIZE, device=0)
        self.own = view(self.tensor)
        self.own[:] = random.Random(0).randbytes(SIZE)
        self.peers, self.mover, self.handle = join(str(library), self.tensor, self._end)

    def start(self, engine: int = PEER, incarnation: int = 1) -> Engine:
        """A peer that is up and has published."""
        self._engines.append(Engine(self._path, self._segment, engine, incarnation))
        self.tell(ProcessState.UP, engine, incarnation)
        return self._engines[-1]

    def tell(self, life: ProcessState, engine: int = PEER, incarnation: int = 1) -> None:
        """Enter it in the process table."""
        self._table.publish(TOPOLOGY.engine(engine), ProcessFacts(life, incarnation))

    def publish(self, handle: bytes, engine: int = PEER, incarnation: int = 1) -> None:
        """Put a handle on the board of a peer."""
        publish(fabric(self._segment, TOPOLOGY.engine(engine), incarnation, self.bell), handle)

    def count(self, call: str) -> int:
        return self.fake.fake_count(call.encode())

    def fail(self, call: str, code: int, after: int = 0) -> None:
        self.fake.fake_fail(call.encode(), code, after)

    def another_mover(self, **options: int) -> CudaTransport:
        """One with other bounds; the first is closed."""
        self.mover.close()
        runtime = CudaRuntime(str(self._path))
        own = OwnPool(self.tensor.data_ptr(), SIZE, "0000:1A:00.0")
        self.mover = CudaTransport(runtime, own, 0, self.bell, **options)
        return self.mover

    def probed(self, engine: int = PEER):
        """The pool of a peer into which something has gone already."""
        pool = self.peers.pool(engine)
        self.mover.push("first", pool, [(0, 0)], BLOCK)
        assert [end.outcome for end in self.await_ends()] == [Outcome.DONE]
        return pool

    def await_ends(self, count: int = 1) -> list[Completion]:
        """The next `count` completions, slept for at the bell alone."""
        ended: list[Completion] = []
        while len(ended) < count:
            ended += self.mover.completed()
            if len(ended) < count:
                assert doorbell.wait(self.bell, 20.0), f"no bell after {ended}"
        return ended

    def close(self) -> None:
        for engine in self._engines:
            engine.kill()
        self.fake.fake_permit(-1)
        os.close(self._segment)
        try:
            self.mover.close()
        except CudaError:
            return  # on a device that has failed threads may wait still, and ring some time
        os.close(self.bell)


@contextmanager
def opened(compiled: Path, folder: Path) -> Iterator[Box]:
    box = Box(Path(shutil.copy(compiled, folder / "libcudart_fake.so")))  # a copy has a state of its own
    try:
        yield box
    finally:
        box.close()


@pytest.fixture
def box(compiled, tmp_path) -> Iterator[Box]:
    with opened(compiled, tmp_path) as b:
        yield b


@pytest.fixture(scope="module")
def pair(compiled, tmp_path_factory) -> Iterator[tuple[Box, Engine]]:
    """A box and a peer for many pushes, slices small and odd."""
    with opened(compiled, tmp_path_factory.mktemp("pair")) as b:
        b.another_mover(slice_bytes=3 * BLOCK // 2, slice_copies=3)
        yield b, b.start()


def block(pool: bytes | memoryview, i: int) -> bytes:
    return bytes(pool[i * BLOCK : (i + 1) * BLOCK])


def all_blocks(shift: int = 0) -> list[tuple[int, int]]:
    return [(i, (i + shift) % BLOCKS) for i in range(BLOCKS)]


# -- slices

places = st.integers(0, BLOCKS - 1)
matchings = st.lists(st.tuples(places, places), unique_by=(lambda p: p[0], lambda p: p[1]), max_size=BLOCKS)


@given(matchings, st.integers(1, 9), st.integers(1, 40), st.integers(1, 5))
def test_slices_cover_the_runs_and_keep_to_their_bounds(pairs, block_bytes, slice_bytes, slice_copies):
    found = list(slices(merge(pairs), block_bytes, slice_bytes, slice_copies))
    moved = sorted((p.source + i, p.destination + i) for pieces in found for p in pieces for i in range(p.nbytes))
    assert moved == sorted((a * block_bytes + i, b * block_bytes + i) for a, b in pairs for i in range(block_bytes))
    assert all(0 < sum(p.nbytes for p in pieces) <= slice_bytes for pieces in found)
    assert all(0 < len(pieces) <= slice_copies for pieces in found)


# -- pushes


@given(st.lists(matchings, min_size=1, max_size=3))
@settings(deadline=None, max_examples=25)
def test_another_process_finds_what_was_pushed_and_nothing_else(pair, pushes):
    box, peer = pair
    box.own[:] = os.urandom(SIZE)
    pool = box.probed()
    expected = bytearray(peer.content())
    taken: set[int] = set()
    for key, pairs in enumerate(pushes):
        mine = [(a, b) for a, b in pairs if b not in taken]  # two pushes to one block have no order
        taken |= {b for _, b in mine}
        for a, b in mine:
            expected[b * BLOCK : (b + 1) * BLOCK] = block(box.own, a)
        box.mover.push(key, pool, mine, BLOCK)
    ended = box.await_ends(len(pushes))
    assert sorted(end.key for end in ended) == list(range(len(pushes)))
    assert {(end.outcome, end.reason) for end in ended} == {(Outcome.DONE, "")}
    assert sum(end.nbytes for end in ended) == len(taken) * BLOCK
    assert peer.content() == expected
    assert box.mover.completed() == []


def test_adjacent_blocks_go_in_one_copy(box):
    box.start()
    pool = box.probed()
    before = box.count("cudaMemcpyAsync")
    box.mover.push("run", pool, [(i, i + 4) for i in random.Random(1).sample(range(20), 20)], BLOCK)
    box.await_ends()
    assert box.count("cudaMemcpyAsync") == before + 1


def test_the_bell_rings_for_an_end_that_nobody_polls_for(box):
    box.start()
    pool = box.probed()
    box.fake.fake_permit(0)
    box.mover.push("move", pool, [(1, 1)], BLOCK)
    assert box.mover.completed() == []
    box.fake.fake_permit(-1)
    assert [end.key for end in box.await_ends()] == ["move"]


def test_an_end_is_told_in_one_round_even_if_it_came_before_the_thread_woke(box):
    box.start()
    pool = box.probed()
    box.mover.push("move", pool, [(1, 1)], BLOCK)
    CudaRuntime(str(box._path)).synchronize_stream(box.mover._lanes[PEER].stream)
    assert [end.key for end in box.mover.completed()] == ["move"]


def test_a_small_push_goes_before_the_rest_of_a_large_one(box):
    box.start()
    pool = box.probed()
    box.another_mover(slice_bytes=BLOCK)
    box.fake.fake_permit(0)
    box.mover.push("large", pool, [(1, 1), (2, 2), (3, 3)], BLOCK)  # two slices are under way
    box.mover.push("small", pool, [(5, 5)], BLOCK)
    box.fake.fake_permit(3)
    assert [end.key for end in box.await_ends()] == ["small"]
    box.fake.fake_permit(-1)
    assert [end.key for end in box.await_ends()] == ["large"]


def test_after_a_drained_push_is_told_no_byte_is_written(box):
    peer = box.start()
    pool = box.probed()
    box.another_mover(slice_bytes=BLOCK)
    before = peer.content()
    box.fake.fake_permit(0)
    box.mover.push("move", pool, all_blocks(), BLOCK)
    assert box.mover.drain("move")
    assert box.mover.completed() == []  # slices are still on the stream
    box.fake.fake_permit(-1)
    [end] = box.await_ends()
    assert (end.outcome, end.nbytes) == (Outcome.CANCELLED, 2 * BLOCK)
    now = peer.content()
    assert now[: end.nbytes] == box.own[: end.nbytes]
    assert now[end.nbytes :] == before[end.nbytes :]
    assert not box.mover.drain("move")
    box.mover.push("move", pool, [(9, 9)], BLOCK)
    assert box.await_ends()[0].outcome is Outcome.DONE


def test_what_is_drained_before_its_turn_ends_with_a_bell(box):
    box.start()
    pool = box.probed()
    box.another_mover(slice_bytes=BLOCK)
    box.fake.fake_permit(0)
    box.mover.push("before", pool, all_blocks(), BLOCK)
    box.mover.push("waits", pool, all_blocks(), BLOCK)
    while doorbell.answer(box.bell):
        pass
    assert box.mover.drain("waits")
    assert doorbell.wait(box.bell, 20.0)
    assert [(c.key, c.outcome, c.nbytes) for c in box.mover.completed()] == [("waits", Outcome.CANCELLED, 0)]
    box.fake.fake_permit(-1)
    assert box.await_ends()[0].outcome is Outcome.DONE


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
def test_a_push_that_cannot_be_fails_untouched_and_the_mover_lives(pair, bad, reason):
    box, peer = pair
    pool = box.probed()
    before = peer.content()
    while doorbell.answer(box.bell):
        pass
    box.mover.push("bad", *bad(pool))
    assert doorbell.answer(box.bell)
    [end] = box.mover.completed()
    assert (end.nbytes, end.outcome) == (0, Outcome.FAILED)
    assert reason in end.reason
    assert peer.content() == before
    assert box.probed() is pool


def test_keys_are_taken_until_told_and_the_queue_is_bounded(box):
    box.start()
    pool = box.probed()
    box.another_mover(max_pushes=2)
    box.fake.fake_permit(0)
    box.mover.push(1, pool, [(1, 1)], BLOCK)
    with pytest.raises(ValueError, match="in flight"):
        box.mover.push(1, pool, [(2, 2)], BLOCK)
    box.mover.push(2, pool, [(2, 2)], BLOCK)
    box.mover.push(3, pool, [(3, 3)], BLOCK)
    [end] = box.mover.completed()
    assert (end.key, end.outcome) == (3, Outcome.FAILED)
    assert "too many" in end.reason
    box.fake.fake_permit(-1)
    assert {end.key for end in box.await_ends(2)} == {1, 2}


def test_closing_ends_every_push_gives_all_back_and_later_ones_fail(box):
    box.start()
    pool = box.probed()
    box.another_mover(slice_bytes=BLOCK)
    for key in range(3):
        box.mover.push(key, pool, all_blocks(shift=key), BLOCK)
    box.mover.close()
    ended = box.mover.completed()
    assert sorted(end.key for end in ended) == [0, 1, 2]
    assert Outcome.FAILED not in {end.outcome for end in ended}
    assert box.count("cudaEventDestroy") == box.count("cudaEventCreateWithFlags") > 0
    assert box.count("cudaStreamDestroy") == box.count("cudaStreamCreateWithPriority") == 2
    box.mover.push("late", pool, [(1, 1)], BLOCK)
    assert box.mover.completed()[0].reason == "the transport is closed"


# -- what fails


@pytest.mark.parametrize(
    ("call", "after"),
    [("cudaMemcpyAsync", 0), ("cudaMemcpyAsync", 3), ("cudaEventCreateWithFlags", 0), ("cudaEventRecord", 0),
     ("cudaEventRecord", 1), ("cudaEventQuery", 0)],
)  # fmt: skip
def test_a_call_that_fails_ends_its_push_alone(box, call, after):
    peer = box.start()
    pool = box.probed()
    box.another_mover(slice_bytes=4 * BLOCK)
    box.fail(call, INVALID, after)
    box.mover.push("move", pool, [(i, 31 - i) for i in range(20)], BLOCK)
    [end] = box.await_ends()
    assert end.outcome is Outcome.FAILED
    assert call in end.reason
    assert "invalid argument (1)" in end.reason
    told = peer.content()
    box.mover.push("next", pool, [(30, 30)], BLOCK)
    assert box.await_ends()[0].outcome is Outcome.DONE
    now = peer.content()
    assert block(now, 30) == block(box.own, 30)
    assert now[: 30 * BLOCK] + now[31 * BLOCK :] == told[: 30 * BLOCK] + told[31 * BLOCK :]


def test_no_error_is_left_for_others_to_find(box):
    box.start()
    pool = box.probed()
    box.fake.fake_permit(0)
    box.mover.push("move", pool, [(1, 1)], BLOCK)
    assert box.mover.completed() == []  # "not ready" is an error to the library
    assert box.fake.cudaGetLastError() == 0
    box.fail("cudaMemcpyAsync", INVALID)
    box.fake.fake_permit(-1)
    box.mover.push("fails", pool, [(1, 1)], BLOCK)
    assert box.fake.cudaGetLastError() == 0
    box.await_ends(2)


def test_a_lost_context_ends_the_engine_and_the_bell_says_so(box):
    box.start()
    pool = box.probed()
    box.fake.fake_permit(0)
    box.mover.push("move", pool, [(i, 31 - i) for i in range(20)], BLOCK)
    box.fake.fake_lose_context_after(3)
    box.fake.fake_permit(-1)
    with pytest.raises(CudaError, match="illegal memory access") as raised:
        box.await_ends()
    assert raised.value.code == ILLEGAL_ADDRESS
    with pytest.raises(CudaError):
        box.mover.push("another", pool, [(1, 1)], BLOCK)


@pytest.mark.parametrize("how", ["stray", "refused"])
def test_without_peer_access_pushes_fail_with_the_reason_and_are_not_tried_again(box, how):
    peer = box.start()
    if how == "stray":
        box.fake.fake_stray(1)
    else:
        box.fail("cudaMemcpyAsync", NO_PEER_ACCESS, after=1)
    copies = []
    for key in range(2):
        box.mover.push(key, box.peers.pool(PEER), all_blocks(), BLOCK)
        [end] = box.await_ends()
        assert (end.outcome, end.nbytes) == (Outcome.FAILED, 0)
        assert end.reason.startswith("no peer access between 0000:1A:00.0 and 0000:1B:00.0")
        copies.append(box.count("cudaMemcpyAsync"))
    assert copies[0] == copies[1] <= 3 * PROBE_COPIES
    assert not any(peer.content())


def test_a_probe_touches_the_dummy_block_alone(box):
    peer = box.start()
    theirs, mine = peer.content(), bytes(box.own)
    box.mover.push("nothing", box.peers.pool(PEER), [(1, 1)], BLOCK)
    box.await_ends()
    now = peer.content()
    assert block(now, 0)[:-64] == block(theirs, 0)[:-64]
    assert block(now, 0) != block(theirs, 0)
    assert now[2 * BLOCK :] == theirs[2 * BLOCK :]
    assert box.own[BLOCK:] == mine[BLOCK:]


# -- opening and closing


def test_a_pool_is_opened_once_for_its_incarnation(box):
    assert box.peers.pool(PEER) is None  # not born yet
    box.tell(ProcessState.UP)
    assert box.peers.pool(PEER) is None  # has not published yet
    box.start()
    pool = box.peers.pool(PEER)
    assert pool is not None
    assert box.peers.pool(PEER, 1) is pool
    assert box.peers.pool(PEER, 2) is None
    box.start(2)
    assert box.peers.pool(2) is not pool
    assert (box.count("cudaIpcOpenMemHandle"), box.fake.fake_mapped()) == (2, 2)
    box.peers.close()
    assert box.fake.fake_mapped() == 0


def test_a_successor_is_not_taken_for_its_predecessor(box):
    box.start().kill()
    old = box.peers.pool(PEER)
    assert old is None  # its memory has gone with it
    first = box.start(incarnation=2)
    old = box.peers.pool(PEER, 2)
    box.tell(ProcessState.DEAD, incarnation=2)
    box.peers.refresh()
    assert (box.peers.pool(PEER), box.fake.fake_mapped()) == (None, 0)
    box.tell(ProcessState.UP, incarnation=3)
    assert box.peers.pool(PEER) is None  # the board is still the predecessor's
    first.kill()
    successor = box.start(incarnation=3)
    assert box.peers.pool(PEER, 2) is None
    pool = box.peers.pool(PEER, 3)
    box.mover.push("old", old, [(1, 1)], BLOCK)
    [end] = box.await_ends()
    assert (end.outcome, end.reason) == (Outcome.FAILED, f"incarnation 2 of engine {PEER} is over")
    box.mover.push("new", pool, [(1, 1)], BLOCK)
    assert box.await_ends()[0].outcome is Outcome.DONE
    assert block(successor.content(), 1) == block(box.own, 1)


def test_a_pool_is_closed_when_its_engine_is_dead_and_the_last_copy_told(box):
    peer = box.start()
    pool = box.probed()
    box.fake.fake_permit(0)
    box.mover.push("move", pool, [(i, 31 - i) for i in range(20)], BLOCK)
    peer.kill()
    box.tell(ProcessState.DEAD)
    box.peers.refresh()
    assert box.peers.pool(PEER) is None
    assert box.fake.fake_mapped() == 1
    box.fake.fake_permit(-1)
    [end] = box.await_ends()
    assert (end.outcome, end.nbytes) == (Outcome.DONE, 20 * BLOCK)
    box.peers.refresh()
    assert (box.fake.fake_mapped(), pool.open) == (0, False)


def test_fifty_restarts_leave_nothing_mapped(box):
    peer = box.start()
    [handle] = [box.peers._published(PEER, 1)]
    for incarnation in range(1, 51):
        box.tell(ProcessState.UP, incarnation=incarnation)
        box.publish(handle, incarnation=incarnation)
        assert box.peers.pool(PEER, incarnation).incarnation == incarnation
        assert box.fake.fake_mapped() == 1
    assert box.count("cudaIpcOpenMemHandle") == 50
    assert not any(peer.content())


@pytest.mark.parametrize("handle", [b"", b"nonsense"])
def test_a_handle_that_cannot_be_read_is_said_once_an_incarnation(box, caplog, handle):
    box.tell(ProcessState.UP)
    box.publish(handle)
    with caplog.at_level(logging.ERROR):
        assert [box.peers.pool(PEER) for _ in range(3)] == [None] * 3
    assert len(caplog.records) == 1
    assert f"engine {PEER}" in caplog.text
    box.start(incarnation=2)
    assert box.peers.pool(PEER) is not None


def test_a_handle_that_the_driver_refuses_is_said_once(box, caplog):
    box.start()
    box.fail("cudaIpcOpenMemHandle", NO_PEER_ACCESS)
    with caplog.at_level(logging.ERROR):
        assert [box.peers.pool(PEER) for _ in range(3)] == [None] * 3
    assert len(caplog.records) == 1
    assert "peer access is not supported" in caplog.text


def test_a_death_in_the_middle_of_opening_is_noticed(box, monkeypatch):
    box.start()
    open_ipc: Callable[[bytes], int] = box.peers._runtime.open_ipc

    def die_first(handle: bytes) -> int:
        box.tell(ProcessState.DEAD)
        return open_ipc(handle)

    monkeypatch.setattr(box.peers._runtime, "open_ipc", die_first)
    assert box.peers.pool(PEER) is None
    assert box.fake.fake_mapped() == 0


@pytest.mark.parametrize("call", ["cuMemGetAddressRange_v2", "cudaIpcGetMemHandle"])
def test_an_engine_whose_memory_cannot_be_shared_says_so_and_serves(box, caplog, call):
    box.fail(call, INVALID)
    with caplog.at_level(logging.ERROR):
        assert join(str(box._path), box.tensor, box._end).handle == b""
    assert "nothing can move here" in caplog.text


def test_the_real_runtime_has_every_call():
    try:
        CudaRuntime()
    except OSError:
        pytest.skip("no CUDA runtime")
