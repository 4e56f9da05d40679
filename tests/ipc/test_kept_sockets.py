"""`bytes_taken`: after the death of a writer the kernel says to the byte what the client will have received."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from daemon.ipc.kept_sockets import bytes_taken
from tests.ipc.socket_writer import expected

ENDLESS = 1 << 40  # bytes
Connect = Callable[..., tuple[socket.socket, socket.socket]]


@pytest.fixture
def connect() -> Iterator[Connect]:
    """Return a function that connects to a listener; it returns the client's socket and the accepted one."""
    with ExitStack() as stack:

        def go(family: socket.AddressFamily = socket.AF_INET) -> tuple[socket.socket, socket.socket]:
            host = "127.0.0.1" if family == socket.AF_INET else "::1"
            listener = stack.enter_context(socket.create_server((host, 0), family=family))
            client = stack.enter_context(socket.create_connection(listener.getsockname()[:2]))
            accepted, _ = listener.accept()
            client.settimeout(20)
            return client, stack.enter_context(accepted)

        yield go


def writer(accepted: socket.socket, seed: int, *lengths: int) -> subprocess.Popen[bytes]:
    program = str(Path(__file__).with_name("socket_writer.py"))
    arguments = [str(accepted.fileno()), str(seed), *map(str, lengths)]
    return subprocess.Popen([sys.executable, "-S", program, *arguments], pass_fds=[accepted.fileno()])


def kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    assert process.wait() == -signal.SIGKILL


def read(client: socket.socket, size: int, piece: int = 1 << 20) -> bytes:
    found = bytearray()
    while len(found) < size and (data := client.recv(min(piece, size - len(found)))):
        found += data
    return bytes(found)


def read_to_end(client: socket.socket) -> bytes:
    return read(client, ENDLESS)


@pytest.mark.parametrize("seed", range(4))
def test_a_reader_that_keeps_up(connect: Connect, seed: int) -> None:
    client, accepted = connect()
    process = writer(accepted, seed, ENDLESS)
    client.sendall(b"?")
    received = read(client, 100_000 * seed + 1, piece=3000)
    kill(process)
    taken = bytes_taken(accepted)
    accepted.shutdown(socket.SHUT_WR)
    received += read_to_end(client)
    assert taken == len(received)
    assert received == expected(0, taken)


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_a_slow_reader_with_megabytes_on_the_way(connect: Connect, family: socket.AddressFamily) -> None:
    """A successor sends the rest of the response and ends it, as for `Connection: close`."""
    try:
        client, accepted = connect(family)
    except OSError:
        pytest.skip("this machine has no IPv6")
    process = writer(accepted, 5, ENDLESS)
    client.sendall(b"?")
    received = read(client, 20_000)
    _await_full(accepted)
    kill(process)
    taken = bytes_taken(accepted)
    assert taken is not None and taken > 1_000_000
    accepted.setblocking(False)
    end, more = taken + 300_001, memoryview(expected(taken, taken + 300_001))
    while more:
        try:
            more = more[accepted.send(more) :]
        except BlockingIOError:
            received += read(client, 50_000)
    assert bytes_taken(accepted) == end
    accepted.shutdown(socket.SHUT_WR)
    assert received + read_to_end(client) == expected(0, end)


def test_a_kept_alive_connection_with_several_responses(connect: Connect) -> None:
    """Only what was taken since the start of a response counts for it."""
    client, accepted = connect()
    lengths = [300_000, 1, 4097, 65_536]
    process = writer(accepted, 9, *lengths, ENDLESS)
    for i, length in enumerate(lengths):
        baseline = bytes_taken(accepted)
        assert baseline is not None
        client.sendall(b"?")
        begin = sum(lengths[:i])
        assert read(client, length) == expected(begin, begin + length)
        taken = bytes_taken(accepted)
        assert taken is not None and taken - baseline == length
    baseline = bytes_taken(accepted)
    assert baseline is not None
    client.sendall(b"?")
    received = read(client, 10_000)
    kill(process)
    taken = bytes_taken(accepted)
    accepted.shutdown(socket.SHUT_WR)
    received += read_to_end(client)
    assert taken is not None and taken - baseline == len(received)
    assert received == expected(sum(lengths), sum(lengths) + len(received))


def test_what_is_no_tcp_connection(connect: Connect) -> None:
    left, right = socket.socketpair()
    with left, right:
        assert bytes_taken(left) is None
    assert bytes_taken(left) is None  # closed
    client, accepted = connect()
    client.close()
    accepted.close()
    assert bytes_taken(accepted) is None


def _await_full(accepted: socket.socket) -> None:
    """Wait until the kernel takes no more bytes of the writer."""
    before, since = bytes_taken(accepted), time.monotonic()
    while time.monotonic() - since < 0.3:
        time.sleep(0.02)
        if (now := bytes_taken(accepted)) != before:
            before, since = now, time.monotonic()
