"""A frontend that does not run for a while, and requests of which nothing is answered yet when it dies."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from urllib.parse import urlsplit

import psutil
import pytest

from bench.answers import Answer
from tests.e2e.daemon_process import Daemon, is_alive, wait_for
from tests.e2e.hash_engine import expected, request
from tests.e2e.raw_client import Client

pytestmark = pytest.mark.e2e
TEXT = "/v1/completions"
DEADLINE = 5.0  # seconds without a sign of life after which a frontend is late


@pytest.fixture(scope="module")
def daemon(start_shared) -> Iterator[Daemon]:
    return start_shared("--devices", "cpu,cpu", "--hang-timeout", "300ms", engine="hash")


def address(daemon: Daemon) -> tuple[str, int]:
    url = urlsplit(daemon.url)
    assert url.hostname and url.port
    return url.hostname, url.port


@contextmanager
def streams(daemon: Daemon, first: int, output: int = 300, count: int = 4) -> Iterator[list[Future[Answer]]]:
    """Read `count` streams that have begun, the last one slowly. At the end assert that every one is exact.

    `output`: tokens of each, which take 20 ms.
    """
    bodies = [request(first + i, output=output) for i in range(count)]
    with ExitStack() as stack:
        clients = [Client(address(daemon), 4096 if i == count - 1 else 0) for i in range(count)]
        for client, fields in zip(clients, bodies, strict=True):
            stack.enter_context(closing(client))
            client.send(TEXT, fields)
        pool = stack.enter_context(ThreadPoolExecutor(count))
        reading = [pool.submit(client.read) for client in clients]
        wait_for("bytes on every stream", lambda: all(client.received > 500 for client in clients))
        yield reading
        for fields, found in zip(bodies, reading, strict=True):
            answer = found.result()
            assert [entry["tokens"] for entry in answer.logprobs[0]] == expected(fields)
            assert answer.finishes[0] == ["length"]
    daemon.await_idle()
    assert daemon.metric("llumd:responses_cut_total") == 0


def test_a_stopped_frontend_is_killed_before_its_successor_starts(daemon: Daemon) -> None:
    with streams(daemon, 100):
        before = daemon.kill("frontend", 0, signal.SIGSTOP)
        stopped = psutil.Process(before["pid"])

        def successor() -> bool:
            row = daemon.child("frontend")
            if row["incarnation"] == before["incarnation"]:
                return False
            assert not is_alive(stopped)  # else both could write to one connection
            return row["state"] == "serving"

        wait_for("a successor", successor, 60)
        assert "SIGKILL" in daemon.child("frontend")["last_exit"]
    assert "is killed: it missed its deadline" in daemon.log


@pytest.mark.parametrize(("seconds", "output"), [(1.5, 100), (DEADLINE + 0.3, 300)])
def test_a_frontend_that_goes_on_in_time_or_at_the_last_moment(daemon: Daemon, seconds: float, output: int) -> None:
    """At the last moment it is killed, or it is not: every stream is exact."""
    with streams(daemon, 200, output):
        before = daemon.kill("frontend", 0, signal.SIGSTOP)
        time.sleep(seconds)
        try:
            os.kill(before["pid"], signal.SIGCONT)
        except ProcessLookupError:
            assert seconds > DEADLINE
    if seconds < DEADLINE:
        assert daemon.child("frontend")["incarnation"] == before["incarnation"]


def test_a_request_without_a_byte_of_its_answer_gets_its_connection_closed(daemon: Daemon) -> None:
    """Also on a connection that is kept since an earlier response. So a client may send it again."""
    with ExitStack() as stack:
        clients = [stack.enter_context(closing(Client(address(daemon)))) for _ in range(4)]
        for client, path in zip(clients, [TEXT, TEXT, "/tokenize", "/tokenize"], strict=True):
            client.send(path, {"prompt": "Hello", "max_tokens": 3} if path == TEXT else {"prompt": "Hello"})
            assert client.read().status == 200
        before = daemon.kill("frontend", 0, signal.SIGSTOP)
        clients[0].send(TEXT, {"prompt": "Hello", "max_tokens": 3})
        clients[1].send("/tokenize", {"prompt": "Hello"})
        clients[2].send(TEXT, {"prompt": ""})  # its answer is an error
        clients[3].send("/tokenize", {"prompt": "Hello"})
        os.kill(before["pid"], signal.SIGKILL)
        for client in clients:
            assert _rest(client.sock) == b""
        daemon.await_successor("frontend", 0, before)
    assert daemon.complete("Hello", max_tokens=3).status_code == 200
    daemon.await_idle()


def _rest(sock: socket.socket) -> bytes:
    try:
        return sock.recv(1000)
    except ConnectionResetError:
        return b""
