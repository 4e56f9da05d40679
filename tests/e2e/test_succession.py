"""Responses that go on after the death of the only frontend, compared with the same requests without a fault."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import pytest

from bench.answers import Answer
from bench.nemesis.shared_memory import SharedMemory
from tests.e2e.daemon_process import Daemon, wait_for
from tests.e2e.hash_engine import expected, prompt_of, request
from tests.e2e.raw_client import Client

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
OUTPUT = 80  # tokens; a step of the engine takes 20 ms


JOURNAL, OUTBOX = 3 << 20, 5 << 20  # bytes; no other segment has these sizes


@pytest.fixture(scope="module")
def daemon(start_shared) -> Iterator[Daemon]:
    # Without prefix caching a request counts as many cached tokens the second time as the first time.
    sizes = ("--journal-memory", str(JOURNAL), "--outbox-memory", str(OUTBOX))
    return start_shared("--devices", "cpu,cpu", "--no-prefix-caching", *sizes, engine="hash")


def address(daemon: Daemon) -> tuple[str, int]:
    url = urlsplit(daemon.url)
    assert url.hostname and url.port
    return url.hostname, url.port


def kill(daemon: Daemon, how: signal.Signals = signal.SIGKILL) -> None:
    """Kill the only frontend and wait until its successor serves."""
    before = daemon.status()["frontends"][0]
    os.kill(before["pid"], how)

    def succeeded() -> bool:
        status = daemon.try_status()
        row = status["frontends"][0] if status else before
        return bool(row["incarnation"] > before["incarnation"] and row["state"] == "serving")

    wait_for("a successor of the frontend", succeeded, 60)


def body(i: int, **fields: Any) -> dict[str, Any]:
    common = {"max_tokens": OUTPUT, "seed": i, "ignore_eos": True, "stream": True}
    return common | ({} if "messages" in fields else {"prompt": prompt_of(i, 20)}) | fields


MESSAGES = [{"role": "user", "content": "hello"}]
USAGE = {"include_usage": True}
REQUESTS = {
    "text": (TEXT, body(1)),
    "choices": (TEXT, body(2, n=3, stream_options=USAGE)),
    "logprobs": (TEXT, body(3, logprobs=2, stream_options=USAGE | {"continuous_usage_stats": True})),
    "stop strings": (TEXT, body(4, n=4, stop=["ab", "xyz", "the q"], min_tokens=5)),
    "echo": (TEXT, body(5, echo=True, n=2)),
    "prompts": (TEXT, body(6, prompt=[prompt_of(60, 9), prompt_of(61, 30)])),
    "chat": (CHAT, body(7, messages=MESSAGES, n=2)),
    "chat logprobs": (CHAT, body(8, messages=MESSAGES, logprobs=True, top_logprobs=2, stream_options=USAGE)),
    "whole": (TEXT, body(9, stream=False, n=2, stop=["ab", "er"])),
    "scored": (TEXT, body(11, echo=True, logprobs=2, n=2)),
    "scored whole": (TEXT, body(12, stream=False, echo=True, logprobs=0, prompt_logprobs=3)),
    "ids": (TEXT, body(13, return_token_ids=True, stream_options=USAGE)),
    "whole chat": (CHAT, body(10, messages=MESSAGES, stream=False, logprobs=True)),
}


def ask(daemon: Daemon, name: str) -> Answer:
    path, fields = REQUESTS[name]
    with closing(Client(address(daemon))) as client:
        client.send(path, fields)
        answer = client.read()
    assert len(answer.ids) <= 1  # one id and one time of creation, in all events
    answer.ids = set()
    return answer


def test_every_kind_of_response_outlives_the_frontend(daemon: Daemon):
    with ThreadPoolExecutor(len(REQUESTS)) as pool:
        unharmed = {name: pool.submit(ask, daemon, name) for name in REQUESTS}
        whole = {name: found.result() for name, found in unharmed.items()}
        before = daemon.metric("llumd:dispatches_total")
        started = {name: pool.submit(ask, daemon, name) for name in REQUESTS}
        wait_for("all choices dispatched", lambda: daemon.metric("llumd:dispatches_total") == before + 23)
        kill(daemon)
        for name, found in started.items():
            assert found.result() == whole[name], name
    _nothing_leaks(daemon)


def _running(daemon: Daemon) -> int:
    return sum(row["running"] + row["waiting"] for row in daemon.status()["engines"])


def _nothing_leaks(daemon: Daemon) -> None:
    wait_for("no request", lambda: daemon.status()["frontends"][0]["active"] == 0)
    wait_for("idle engines", lambda: all(not row["kv_used_blocks"] for row in daemon.status()["engines"]))
    assert daemon.metric("llumd:responses_cut_total") == 0
    memory = SharedMemory(daemon.process.pid, JOURNAL, OUTBOX)
    wait_for("free slots", lambda: memory.journal_slots() == memory.outbox_slots() == 0)


def test_a_response_outlives_frontend_after_frontend(daemon: Daemon):
    """Each of them dies while it streams."""
    fields = request(20, output=1000)
    with closing(Client(address(daemon))) as client:
        client.send(TEXT, fields)
        reading: Future[Answer]
        with ThreadPoolExecutor(1) as pool:
            reading = pool.submit(client.read)
            for _ in range(2):
                before = client.received
                wait_for("more bytes", lambda before=before: reading.done() or client.received > before + 2000)
                kill(daemon)
            answer = reading.result()
    assert [entry["tokens"] for entry in answer.logprobs[0]] == expected(fields)
    assert answer.finishes[0] == ["length"]
    _nothing_leaks(daemon)


def test_a_client_that_reads_slowly_gets_every_byte(daemon: Daemon):
    """Most of its response waits in kernel and outbox when the frontend dies."""
    path, fields = TEXT, body(30, logprobs=20, max_tokens=400)
    with closing(Client(address(daemon))) as client:
        client.send(path, fields)
        whole = client.read()
    with closing(Client(address(daemon), receive_buffer=4096)) as client:
        client.send(path, fields)
        time.sleep(4)
        kill(daemon)
        slow = client.read()
    whole.ids = slow.ids = set()
    assert slow == whole


def test_http_1_0_and_a_kept_alive_connection(daemon: Daemon):
    path, fields = REQUESTS["text"]
    whole = ask(daemon, "text")
    for version in ("1.0", "1.1"):
        with closing(Client(address(daemon))) as client:
            if version == "1.1":  # the third response of its connection
                for _ in range(2):
                    client.send(path, fields | {"max_tokens": 3})
                    client.read()
            client.send(path, fields, version=version)
            threading.Timer(0.5, kill, [daemon]).start()
            answer = client.read()
            answer.ids = set()
            assert answer == whole
            assert client.sock.recv(1) == b""  # the connection ends with the response
        wait_for("a successor", lambda: daemon.status()["frontends"][0]["state"] == "serving")


def test_aiohttp_and_curl(daemon: Daemon):
    url, fields = daemon.url + TEXT, body(40, logprobs=0)
    data = json.dumps(fields)

    async def stream() -> list[str]:
        async with aiohttp.ClientSession() as session, session.post(url, json=fields) as response:
            return [line.decode() async for line in response.content if line.strip()]

    with ThreadPoolExecutor(1) as pool:
        aio = pool.submit(asyncio.run, stream())
        curl = subprocess.Popen(
            ["curl", "-sSN", "--fail-with-body", "-H", "Content-Type: application/json", "-d", data, url],
            stdout=subprocess.PIPE,
            text=True,
        )
        wait_for("both running", lambda: _running(daemon) == 2)
        kill(daemon)
        out, _ = curl.communicate(timeout=60)
        assert curl.returncode == 0
        texts = [_text([line for line in out.splitlines() if line]), _text(aio.result())]
    with closing(Client(address(daemon))) as client:
        client.send(TEXT, fields)
        assert texts == [client.read().texts[0]] * 2


def _text(lines: list[str]) -> str:
    assert lines[-1].strip() == "data: [DONE]"
    return "".join(json.loads(line[6:])["choices"][0]["text"] for line in lines[:-1])


def test_hanging_up_on_a_successor_frees_the_request(daemon: Daemon):
    client = Client(address(daemon))
    client.send(TEXT, request(50, output=4000))
    wait_for("the request runs", lambda: _running(daemon) == 1)
    kill(daemon)
    assert _running(daemon) == 1
    client.close()
    _nothing_leaks(daemon)


@pytest.mark.parametrize("dead", [True, False])
def test_clients_that_hang_up_when_their_frontend_dies_leave_nothing(daemon: Daemon, dead: bool):
    """`dead`: they hang up just after its death, so that the successor finds their connections broken."""
    clients = [Client(address(daemon), receive_buffer=4096) for _ in range(6)]
    for i, client in enumerate(clients):  # they read nothing
        client.send(TEXT, body(60 + i, n=3, logprobs=5, max_tokens=400))
    wait_for("all choices", lambda: _running(daemon) == 18)
    before = daemon.status()["frontends"][0]
    if dead:
        os.kill(before["pid"], signal.SIGKILL)
    for client in clients:
        client.close()
    if not dead:
        os.kill(before["pid"], signal.SIGKILL)
    daemon.await_successor("frontend", 0, before)
    _nothing_leaks(daemon)
