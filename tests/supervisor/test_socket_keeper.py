"""Both sides of a frontend's channel: sockets are kept, released and adopted."""

from __future__ import annotations

import asyncio
import gc
import os
import resource
import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from daemon.ipc.fabric import Topology
from daemon.ipc.kept_sockets import BATCH, KeptSockets
from daemon.supervisor.socket_keeper import SocketKeeper, capacity

CAPACITY = 1000


class Harness:
    """A keeper with one incarnation after the other, all in this process; sockets are ends of pairs."""

    def __init__(self, stack: ExitStack) -> None:
        self.keeper = SocketKeeper("frontend 0")
        self._stack = stack
        self._incarnation = 0

    def start(self, limit: int = CAPACITY) -> KeptSockets:
        """Start the next incarnation."""
        self._incarnation += 1
        theirs = self.keeper.open_channel()
        return KeptSockets(theirs.detach(), self._incarnation, limit)

    def die(self, kept: KeptSockets) -> None:
        """End an incarnation as the kernel does: its descriptors are closed."""
        kept.close()
        self.keeper.close_channel()

    def adopt(self, kept: KeptSockets) -> dict[int, socket.socket]:
        """Adopt while the keeper answers, as it does in its own process."""

        async def both() -> dict[int, socket.socket]:
            asyncio.get_running_loop().add_reader(self.keeper.fileno(), self.keeper.read)
            return await asyncio.to_thread(kept.adopt)

        found = asyncio.run(both())
        for sock in found.values():
            self._stack.enter_context(sock)
        return found

    def pair(self) -> tuple[socket.socket, socket.socket]:
        """Return the client's end and the frontend's end of a connection."""
        client, ours = socket.socketpair()
        client.settimeout(5)
        return self._stack.enter_context(client), self._stack.enter_context(ours)


@pytest.fixture
def harness() -> Iterator[Harness]:
    with ExitStack() as stack:
        harness = Harness(stack)
        stack.callback(harness.keeper.hang_up_all)
        yield harness


def test_a_connection_outlives_its_frontend(harness: Harness) -> None:
    first = harness.start()
    client, ours = harness.pair()
    token = asyncio.run(first.hold(ours))
    ours.send(b"one ")
    ours.close()
    harness.die(first)  # the message is still in the channel
    second = harness.start()
    adopted = harness.adopt(second)
    assert list(adopted) == [token]
    adopted[token].send(b"two")
    adopted[token].close()
    assert client.recv(20) == b"one two"
    client.setblocking(False)
    with pytest.raises(BlockingIOError):  # the keeper's duplicate keeps it open
        client.recv(1)
    second.release(token)
    harness.keeper.read()
    assert client.recv(1) == b""
    assert harness.keeper.num_kept == second.num_held == 0
    harness.die(second)


def test_a_connection_that_is_not_released_goes_on_to_the_next_successor(harness: Harness) -> None:
    first = harness.start()
    tokens = [asyncio.run(first.hold(harness.pair()[1])) for _ in range(3)]
    harness.die(first)
    second = harness.start()
    assert list(harness.adopt(second)) == tokens
    second.release(tokens[1])
    tokens.append(asyncio.run(second.hold(harness.pair()[1])))
    assert len({*tokens, 0}) == 5
    harness.die(second)
    third = harness.start()
    assert list(harness.adopt(third)) == [tokens[0], tokens[2], tokens[3]]
    assert third.num_held == 3
    harness.die(third)


def test_messages_before_an_unread_answer_are_not_lost(harness: Harness) -> None:
    """The kernel reports the reset of a channel before the messages that are still in it."""
    first = harness.start()
    asyncio.run(first.hold(harness.pair()[1]))
    first._channel.send(b"\3" + bytes(8))  # ADOPT, whose answer is never read
    harness.keeper.read()
    _, ours = harness.pair()
    token = asyncio.run(first.hold(ours))
    harness.die(first)
    assert harness.keeper.num_kept == 2
    second = harness.start()
    assert token in harness.adopt(second)
    harness.die(second)


@pytest.mark.parametrize("number", [0, 1, BATCH, BATCH + 1, 3 * BATCH])
def test_adoption_in_batches(harness: Harness, number: int) -> None:
    first = harness.start()
    gc.collect()  # what earlier tests have left open
    before = len(os.listdir("/proc/self/fd"))
    tokens = []
    for _ in range(number):
        client, ours = socket.socketpair()
        tokens.append(asyncio.run(first.hold(ours)))
        harness.keeper.read()
        ours.close()
        client.close()
    harness.die(first)
    second = harness.start()
    adopted = harness.adopt(second)
    assert list(adopted) == tokens
    assert not any(sock.get_inheritable() for sock in adopted.values())
    for token, sock in adopted.items():
        sock.close()
        second.release(token)
        harness.keeper.read()
    assert len(os.listdir("/proc/self/fd")) == before
    harness.die(second)


def test_a_full_channel_makes_hold_wait_and_keeps_the_order(harness: Harness) -> None:
    kept = harness.start()

    async def run() -> None:
        before = len(os.listdir("/proc/self/fd"))
        waiting = []
        while True:  # one after the other, until the channel is full
            client, ours = socket.socketpair()
            task = asyncio.create_task(kept.hold(ours))
            await asyncio.sleep(0)
            client.close()
            ours.close()
            waiting.append(task)
            if not task.done():
                break
        assert len(waiting) > 50
        cancelled = asyncio.create_task(kept.hold(socket.socket()))
        await asyncio.sleep(0)
        cancelled.cancel()
        kept.release(waiting[0].result())
        released = [asyncio.create_task(kept.hold(socket.socket())) for _ in range(20)]
        await asyncio.sleep(0)
        while not all(task.done() for task in released):
            harness.keeper.read()
            await asyncio.sleep(0.001)
        tokens = [await task for task in waiting + released]
        assert 0 not in tokens
        assert cancelled.cancelled()
        for token in tokens[1:]:
            kept.release(token)
        while kept._queue or harness.keeper.num_kept:
            harness.keeper.read()
            await asyncio.sleep(0.001)
        del released, cancelled
        assert len(os.listdir("/proc/self/fd")) <= before + 21  # the sockets of this test itself

    asyncio.run(run())
    assert kept.num_held == 0
    harness.die(kept)


def test_no_more_than_the_capacity_is_held(harness: Harness) -> None:
    kept = harness.start(limit=2)
    tokens = [asyncio.run(kept.hold(harness.pair()[1])) for _ in range(3)]
    assert tokens[2] == 0
    kept.release(tokens[0])
    kept.release(0)
    kept.release(tokens[0])
    assert asyncio.run(kept.hold(harness.pair()[1])) > tokens[1]
    harness.die(kept)


def test_a_closed_socket_is_not_held(harness: Harness) -> None:
    kept = harness.start()
    _, ours = harness.pair()
    ours.close()
    assert asyncio.run(kept.hold(ours)) == 0
    assert kept.num_held == 0
    harness.die(kept)


def test_a_keeper_without_descriptors_says_so_and_goes_on(harness: Harness, caplog: pytest.LogCaptureFixture) -> None:
    kept = harness.start()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    tokens = [asyncio.run(kept.hold(harness.pair()[1])) for _ in range(3)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))), hard))
    taken: list[int] = []
    try:
        with pytest.raises(OSError):
            while True:
                taken.append(os.dup(0))
        harness.keeper.read()
    finally:
        for fd in taken:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert harness.keeper.num_kept == 0
    assert "frontend 0: 1 connections are not kept" in caplog.text
    for token in tokens:
        kept.release(token)
    asyncio.run(kept.hold(harness.pair()[1]))
    harness.keeper.read()
    assert harness.keeper.num_kept == 1
    harness.die(kept)


def test_all_connections_end_when_no_frontend_goes_on(harness: Harness) -> None:
    kept = harness.start()
    pairs = [harness.pair() for _ in range(3)]
    for _, ours in pairs:
        asyncio.run(kept.hold(ours))
        ours.close()
    harness.die(kept)
    assert harness.keeper.hang_up_all() == 3
    assert [client.recv(1) for client, _ in pairs] == [b""] * 3


def test_the_capacity_follows_the_descriptor_limit() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
        assert capacity(Topology(1, 1)) == 1024 - 128 - 3 * 8
        assert capacity(Topology(4, 1)) == (1024 - 128 - 6 * 8) // 4
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))
        assert capacity(Topology(1, 1)) == 0
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_connection_that_another_process_goes_on_with_is_not_shut_down(harness: Harness) -> None:
    kept = harness.start()
    client, ours = harness.pair()
    token = asyncio.run(kept.hold(ours))
    kept.forget(token)
    kept.forget(token)
    assert harness.keeper.read() and harness.keeper.num_kept == kept.num_held == 0
    ours.sendall(b"more")
    assert client.recv(4) == b"more"
