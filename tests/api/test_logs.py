"""The access log, and lines that a client can cause."""

from __future__ import annotations

import asyncio
import logging
import time

import pytest

from daemon.api.loop_clock import LoopClock
from daemon.api.rate_limited_log import RateLimitedLog
from daemon.ipc.metrics_page import FRONTEND, MetricsPage, snapshot
from tests.api.harness import CHAT, HELLO, make_api, with_client


@pytest.mark.parametrize(("option", "level", "lines"), [(True, "INFO", 3), (False, "INFO", 0), (False, "DEBUG", 3)])
def test_access_log_has_a_line_for_each_request_and_no_text(model, caplog, option, level, lines):
    api = make_api(model, access_log=option)

    async def body(client):
        headers = {"x-request-id": "from-the-client"}
        await (await client.post(CHAT, json=HELLO | {"stream": True}, headers=headers)).read()
        await client.post(CHAT + "?a=hello", json={"messages": "hello"})
        await client.get("/x%0Ay")

    with caplog.at_level(level, "daemon.api.access"):
        with_client(api, body)
    found = [r.getMessage() for r in caplog.records if r.name == "daemon.api.access"]
    assert len(found) == lines
    if found:
        first, second, third = found
        assert "POST /v1/chat/completions 200 " in first
        assert "id from-the-client, chatcmpl-" in first and ", tokens " in first
        assert "POST /v1/chat/completions 400 " in second
        assert "GET /x%0Ay 404 " in third
        assert "hello" not in "".join(found)


def test_access_log_names_the_answer_once_if_the_client_has_sent_no_id(model, caplog):
    api = make_api(model, access_log=True)

    async def body(client):
        answer = await (await client.post(CHAT, json=HELLO)).json()
        assert caplog.messages[-1].count(answer["id"]) == 1

    with caplog.at_level("INFO", "daemon.api.access"):
        with_client(api, body)


def test_rate_limited_log_counts_what_it_leaves_out(caplog):
    times = [0.0, 1.0, 9.9, 10.0, 12.0, 20.0]
    clock = iter(times)
    log = RateLimitedLog(logging.getLogger("daemon.test"), logging.WARNING, 10.0, lambda: next(clock))
    for _ in times:
        log.write("bad %s", "thing")
    assert [r.getMessage() for r in caplog.records] == [
        "bad thing",
        "bad thing (2 more since the last such line)",
        "bad thing (1 more since the last such line)",
    ]


def test_loop_clock_records_a_callback_that_holds_the_loop():
    memory = bytearray(FRONTEND.nbytes)

    async def body(cpu: float) -> list[float]:
        with LoopClock(MetricsPage(memoryview(memory), FRONTEND)):
            await asyncio.sleep(0.03)
            end = time.thread_time() + cpu
            while time.thread_time() < end:
                pass
            await asyncio.sleep(0.03)
        await asyncio.sleep(0.03)
        return snapshot(memoryview(memory), FRONTEND).histogram("event_loop_cpu_seconds").counts

    held = asyncio.run(body(0.25))
    assert sum(held) >= 3 and sum(held[-3:]) == 1
