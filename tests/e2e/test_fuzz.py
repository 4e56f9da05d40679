"""Thousands of request bodies, right and wrong, at a running daemon: none harms it, and each gets a proper answer.

The bodies follow from one number, which a failure prints: LLUMD_FUZZ=NUMBER repeats them. CI always takes the same.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
from collections import Counter
from typing import Any

import aiohttp
import psutil
import pytest

from tests.e2e.bodies import Case, cases
from tests.e2e.conftest import Start
from tests.e2e.daemon_process import HEADERS, Daemon

NUMBER = int(os.environ.get("LLUMD_FUZZ") or (1 if os.environ.get("CI") else random.randrange(1 << 32)))
# Answers are short: a prompt of the chat template, and a few tokens.
LIMITS = ("--devices", "cpu,cpu", "--served-name", "demo", "--max-model-len", "80", "--max-output-tokens", "4")
CONCURRENCY = 24
GROWTH = 1.2  # of the memory of a process, over its memory after the warm-up
STATUSES = {200, 400, 404, 429, 503}
LEAKS = re.compile(
    r"Traceback|object has no attribute|invalid literal|NoneType|<class |unhashable|not subscriptable"
    r"|\b[A-Z]\w*(?:Error|Exception)\b"
)


@pytest.mark.parametrize("count", [5_000, pytest.param(20_000, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
def test_no_body_harms_the_stub_engine(start: Start, count: int) -> None:
    fuzz(start(*LIMITS, "--stub-step", "1ms"), cases(NUMBER, count))


@pytest.mark.parametrize("count", [300, pytest.param(2_000, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
def test_no_body_harms_the_demo_model(start: Start, count: int) -> None:
    daemon = start(*LIMITS, "--kv-memory", "64MiB", engine="model")
    fuzz(daemon, cases(NUMBER, count, share_of_odd=0.1))


def fuzz(daemon: Daemon, requests: list[Case]) -> None:
    """Send all requests; assert that every answer is proper, that no process has died and none has grown."""
    warm_up = len(requests) // 5
    before = incarnations(daemon)
    send_all(daemon, requests[:warm_up])
    daemon.await_idle()
    memory = resident(daemon)
    seen = send_all(daemon, requests[warm_up:])
    assert seen[200] > len(requests) / 10, f"too few requests reach an engine: {seen}"
    assert seen[400] > len(requests) / 20, f"too few requests are wrong: {seen}"
    daemon.await_idle()
    assert incarnations(daemon) == before, f"LLUMD_FUZZ={NUMBER}: a process has died\n{daemon.log}"
    grown = {pid: (old, new) for pid, new in resident(daemon).items() if new > GROWTH * (old := memory[pid])}
    assert not grown, f"LLUMD_FUZZ={NUMBER}: bytes before and after, by process: {grown}"


def incarnations(daemon: Daemon) -> dict[str, int]:
    """Return the incarnation of every child, as `llumctl status` shows them."""
    status = json.loads(daemon.ctl("status", "--json").stdout)
    rows = [("coordinator", status["coordinator"])]
    rows += [(f"{role} {i}", row) for role in ("frontend", "engine") for i, row in enumerate(status[f"{role}s"])]
    return {name: row["incarnation"] for name, row in rows}


def resident(daemon: Daemon) -> dict[int, int]:
    """Return the resident bytes of each frontend and engine, by process id."""
    status = daemon.status()
    pids = [row["pid"] for role in ("frontends", "engines") for row in status[role]]
    return {pid: psutil.Process(pid).memory_info().rss for pid in pids}


def send_all(daemon: Daemon, requests: list[Case]) -> Counter[int]:
    """Send the requests, CONCURRENCY at a time; assert that each answer is proper. Count the statuses."""
    return asyncio.run(_send_all(daemon, requests))


async def _send_all(daemon: Daemon, requests: list[Case]) -> Counter[int]:
    statuses: Counter[int] = Counter()
    connector = aiohttp.TCPConnector(limit=CONCURRENCY)
    async with aiohttp.ClientSession(daemon.url, connector=connector, timeout=aiohttp.ClientTimeout(60)) as session:
        waiting = iter(requests)

        async def client() -> None:
            for case in waiting:
                status, complaint = await _send(session, case)
                statuses[status] += 1
                if complaint:
                    smallest, complaint = await _shrink(session, case, complaint)
                    raise AssertionError(_report(smallest, case, complaint, daemon))

        await asyncio.gather(*(client() for _ in range(CONCURRENCY)))
    return statuses


async def _send(session: aiohttp.ClientSession, case: Case) -> tuple[int, str]:
    """Send one request. Return the status and what is wrong with the answer; "" if nothing is."""
    try:
        async with session.post(case.path, data=case.body, headers=HEADERS) as response:
            body = await response.read()
    except (aiohttp.ClientError, TimeoutError) as e:
        return 0, f"no whole answer: {e!r}"
    streamed = response.content_type == "text/event-stream"
    try:
        check = _check_stream(body) if streamed else _check_whole(response.status, response.headers, body)
    except (ValueError, KeyError, TypeError, AssertionError) as e:
        check = f"{type(e).__name__}: {e}"
    return response.status, check and f"{response.status} {check}: {body[:2000]!r}"


def _check_whole(status: int, headers: Any, body: bytes) -> str:
    answer = _strict_json(body)
    if status == 200:
        return "" if answer.get("choices") or "count" in answer or "prompt" in answer else "no answer"
    if status not in STATUSES:
        return "a status that no body may cause"
    if status in (429, 503) and "Retry-After" not in headers:
        return "no Retry-After"
    return _check_error(answer)


def _check_stream(body: bytes) -> str:
    *events, done, end = body.split(b"\n\n")
    if b'"code":"grammar_dead_end"' in done:  # a body may ask for a character that the model cannot write
        return _check_error(_strict_json(done.removeprefix(b"data: "))) or end.decode()
    if (done, end) != (b"data: [DONE]", b""):
        return "the stream does not end with [DONE]"
    chunks = [_strict_json(event.removeprefix(b"data: ")) for event in events]
    return "" if all("choices" in chunk for chunk in chunks) else "an event without choices"


def _check_error(answer: dict[str, Any]) -> str:
    error = answer["error"]
    if set(error) != {"message", "type", "param", "code"} or not (error["message"] and error["type"]):
        return "not OpenAI's error object"
    return "Python's words" if LEAKS.search(error["message"]) else ""


def _strict_json(text: bytes) -> Any:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    return json.loads(text.decode(), parse_constant=refuse)


async def _shrink(session: aiohttp.ClientSession, case: Case, complaint: str) -> tuple[Case, str]:
    """Leave out members of the body while the answer is not proper. Return the smallest case and its complaint."""
    smaller = True
    while smaller:
        smaller = False
        for i in range(len(case.members)):
            less = case._replace(members=case.members[:i] + case.members[i + 1 :])
            _, found = await _send(session, less)
            if found:
                case, complaint, smaller = less, found, True
                break
    return case, complaint


def _report(smallest: Case, case: Case, complaint: str, daemon: Daemon) -> str:
    return (
        f"{complaint}\nsmallest body: POST {smallest.path} {smallest.body[:4000]!r}\n"
        f"whole body: {case.body[:4000]!r}\nrepeat all with LLUMD_FUZZ={NUMBER}\n{daemon.log[-4000:]}"
    )
