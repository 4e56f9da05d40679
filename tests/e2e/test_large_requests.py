"""Large requests, unfinished ones and clients that send nothing: the others are served all the time."""

from __future__ import annotations

import json
import random
import re
import socket
from collections.abc import Iterator

import httpx
import psutil
import pytest

from tests.e2e.conftest import Start
from tests.e2e.daemon_process import HEADERS, Daemon, wait_for
from tests.e2e.load_client import Clients

SIZE = 7_900_000  # characters, nearly the largest body
TEXT = "The quick brown fox jumps over the lazy dog. " * (SIZE // 45)
TURN = 0.03  # seconds of CPU time between two ticks: 10 ms of other callbacks and 20 ms of the longest
LIMIT = 60  # connections


def chat(content: object) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": content}]}


def large_bodies() -> Iterator[tuple[str, dict[str, object]]]:
    """Yield paths and bodies that are costly to decode, check, render, tokenise, submit or answer."""
    draw = random.Random(3)
    noise = "".join(chr(draw.randrange(0x20, 0x2FFF)) for _ in range(400_000))
    text, chats = "/v1/completions", "/v1/chat/completions"
    yield text, {"prompt": TEXT}
    yield text, {"prompt": TEXT[:400_000]}
    yield text, {"prompt": noise}
    yield chats, chat(TEXT)
    yield chats, {"messages": [{"role": "user", "content": ""}] * 8192}
    yield chats, chat([{"type": "text", "text": "a"}] * 15_000) | {"max_tokens": 1}
    yield text, {"prompt": ["a"] * 500, "max_tokens": 1}
    yield text, {"prompt": [[5] * 8000] * 32, "max_tokens": 1}
    yield text, {"prompt": [5] * 500_000}
    yield text, {"prompt": [5] * 2_600_000}
    yield text, {"prompt": "x", "response_format": [{"a": [1, 2]}] * 30_000}
    yield text, {"prompt": "x", "response_format": [{"a": [1, 2]}] * 400_000}
    yield text, {"prompt": "x", "unknown": [{"a": [1, 2]}] * 400_000}
    yield "/tokenize", {"prompt": TEXT}
    yield "/tokenize", {"prompt": noise[:40_000], "return_token_strs": True}
    yield "/detokenize", {"tokens": [5] * 500_000}


@pytest.fixture(scope="module")
def daemon(start_shared: Start) -> Daemon:
    return start_shared("--max-connections", str(LIMIT), "--body-memory", "32MiB", "--stub-step", "20ms")


def long_turns(daemon: Daemon) -> float:
    """Return the number of times that the event loop was held for longer than TURN."""
    text = daemon.get("/metrics").text
    name = "llumd:event_loop_cpu_seconds_bucket"
    counts = {m[1]: float(m[2]) for m in re.finditer(rf'^{name}\{{le="([^"]+)".*\}} (\S+)$', text, re.MULTILINE)}
    return counts["+Inf"] - counts[str(TURN)]


def post(daemon: Daemon, path: str, body: dict[str, object]) -> httpx.Response:
    return httpx.post(daemon.url + path, content=json.dumps(body), headers=HEADERS, timeout=120)


def connect(daemon: Daemon, data: bytes = b"") -> socket.socket:
    url = httpx.URL(daemon.url)
    client = socket.create_connection((url.host, url.port))
    client.sendall(data)
    return client


def test_no_request_holds_the_event_loop(daemon: Daemon) -> None:
    endless = {"prompt": "x", "max_tokens": 4000, "stream": True, "ignore_eos": True}
    before = long_turns(daemon)
    with Clients(daemon, [endless]) as clients:
        clients.await_tokens()
        for path, body in large_bodies():
            assert post(daemon, path, body).status_code in (200, 400)
            assert long_turns(daemon) == before, f"{path} {str(body)[:80]} has held the event loop"
        clients.stop()


def test_memory_of_large_bodies_is_given_back(daemon: Daemon) -> None:
    frontend = psutil.Process(daemon.child("frontend")["pid"])
    post(daemon, "/v1/completions", {"prompt": TEXT[:400_000]})
    before = frontend.memory_info().rss
    for path, body in [*large_bodies()] * 2:
        if len(body) == 1:  # the costly ones in memory: each is one long text or list
            post(daemon, path, body)
    wait_for("the memory given back", lambda: frontend.memory_info().rss < 1.2 * before + (20 << 20), timeout=10.0)


def test_unfinished_bodies_leave_room_for_others(daemon: Daemon) -> None:
    frontend = psutil.Process(daemon.child("frontend")["pid"])
    before = frontend.memory_info().rss
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    clients = [connect(daemon, f"{head}Content-Length: {SIZE}\r\n\r\n".encode()) for _ in range(20)]
    for client in clients:
        client.settimeout(0.5)
        try:
            client.sendall(b"x" * (SIZE - 1))
        except (OSError, TimeoutError):
            continue  # refused
    assert frontend.memory_info().rss < before + (100 << 20)
    assert daemon.complete(max_tokens=1).status_code == 200
    for client in clients:
        client.close()


def test_silent_connections_do_not_keep_others_out(daemon: Daemon) -> None:
    stream = {"prompt": "x", "max_tokens": 4000, "stream": True, "ignore_eos": True}
    with Clients(daemon, [stream] * 2) as clients:
        clients.await_tokens()
        silent = [connect(daemon, b"GET /health HT" if i % 2 else b"") for i in range(3 * LIMIT)]
        for _ in range(5):
            assert daemon.complete(max_tokens=1).status_code == 200
        clients.stop()
    row = daemon.status()["frontends"][0]
    assert row["max_connections"] == LIMIT and row["connections_cut"]["limit"] > LIMIT
    assert "has reached its limit of connections" in daemon.ctl("status").stdout
    for client in silent:
        client.close()
    wait_for("no connection", lambda: daemon.status()["frontends"][0]["connections"] == 0)


def test_malformed_requests_do_not_fill_the_log(daemon: Daemon) -> None:
    before = len(daemon.log)
    for _ in range(200):
        with connect(daemon, b"GET / HTTP/nonsense\r\n\r\n\r\n\r\n") as client:
            answer = client.recv(4096)
            assert re.match(rb"HTTP/1\.[01] 400 ", answer) and b'"invalid_request_error"' in answer
    lines = daemon.log[before:].splitlines()
    assert len(lines) <= 2, lines
    assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d WARNING ", lines[-1])
    assert daemon.metric("llumd:malformed_requests_total") == 200
