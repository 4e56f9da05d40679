"""`llumctl restart` while processes die, beside another one, and with clients that have read little yet."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from threading import Event
from typing import Any

import pytest

from bench.answers import Answer
from tests.e2e.daemon_process import Daemon, wait_for
from tests.e2e.exact_lanes import connect, stream
from tests.e2e.hash_engine import prompt_of

pytestmark = pytest.mark.e2e
LANES = 3


@pytest.fixture(scope="module")
def daemon(start_shared) -> Iterator[Daemon]:
    return start_shared("--devices", "cpu,cpu", "--frontends", "2", "--no-prefix-caching", engine="hash")


@contextmanager
def load(daemon: Daemon, first: int) -> Iterator[None]:
    """Send requests for as long as the context lasts. Assert at the end that every answer is exact."""
    stop = Event()
    with ThreadPoolExecutor(LANES) as pool:
        lanes = [pool.submit(stream, daemon, first + lane, stop, 60) for lane in range(LANES)]
        try:
            yield
        finally:
            stop.set()
        assert all(lane.result() for lane in lanes)


def nothing_is_left(daemon: Daemon) -> None:
    daemon.await_serving().await_idle()
    assert daemon.metric("llumd:responses_cut_total") == 0


def test_frontends_that_die_while_they_are_replaced(daemon: Daemon) -> None:
    """The one that is replaced, and the other one."""
    with load(daemon, 0), ThreadPoolExecutor(1) as pool:
        for victim, wait in ((0, 0.5), (1, 0.5)):
            before = daemon.child("frontend", 0)
            replacing = pool.submit(daemon.ctl, "restart", "frontend", "0", timeout=90)
            time.sleep(wait)
            os.kill(daemon.child("frontend", victim)["pid"], signal.SIGKILL)
            done = replacing.result()
            assert done.returncode == 0, done.stderr
            assert daemon.child("frontend", 0)["incarnation"] > before["incarnation"]
            daemon.await_serving()
    nothing_is_left(daemon)


def test_two_orders_to_replace_one_engine(daemon: Daemon) -> None:
    """The second one waits for the first, so it does not take the engine for one that is kept drained."""
    before = daemon.child("engine", 0)["incarnation"]
    with load(daemon, 10), ThreadPoolExecutor(2) as pool:
        for done in pool.map(lambda _: daemon.ctl("restart", "engine", "0", timeout=90), range(2)):
            assert done.returncode == 0, done.stderr
            assert done.stdout == "replaced: engine 0\n"
    assert daemon.child("engine", 0)["incarnation"] == before + 2
    assert all(row["desired"] == row["state"] == "serving" for row in daemon.status()["engines"])
    nothing_is_left(daemon)


def ask(daemon: Daemon, fields: dict[str, Any]) -> Answer:
    with closing(connect(daemon)) as client:
        client.send("/v1/completions", fields)
        return without_id(client.read())


def without_id(answer: Answer) -> Answer:
    answer.ids = set()
    return answer


def test_responses_of_which_megabytes_are_not_read_yet(daemon: Daemon) -> None:
    """One is streamed. The other one is written as a whole, so it is complete when its frontends are replaced."""
    common = {"prompt": prompt_of(5, 20), "max_tokens": 150, "n": 8, "seed": 5, "ignore_eos": True, "logprobs": 20}
    both = [common | {"stream": True}, common | {"stream": False}]
    with ThreadPoolExecutor(2) as pool:
        whole = list(pool.map(lambda fields: ask(daemon, fields), both))
    clients = [connect(daemon, 4096) for _ in both]
    for client, fields in zip(clients, both, strict=True):
        client.send("/v1/completions", fields)
    wait_for("the end of all choices", lambda: not daemon.requests())
    for index in ("0", "1"):
        assert daemon.ctl("restart", "frontend", index, timeout=60).returncode == 0
    for client, answer in zip(clients, whole, strict=True):
        with closing(client):
            assert without_id(client.read()) == answer
    nothing_is_left(daemon)
