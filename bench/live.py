"""A real daemon on the demo model for the time of a measurement, as an operator and as clients use it."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from time import perf_counter
from typing import Any
from urllib.parse import urlsplit

from bench.connection import Connection, Pool
from bench.stream import Outcome, StreamReader
from daemon.cli.llumctl import call

PATIENCE = 300.0  # seconds for anything to come about: a slow machine is no reason to stop
POLL = 0.05  # seconds between two looks at the daemon's status
BLOCK = 16  # tokens
BLOCK_BYTES = BLOCK * 23040  # of the demo model's KV in bf16
TOKEN_IDS = (100, 40_000)  # of random prompts: words of the demo model, no specials

HELD = ("running", "waiting", "incoming", "outgoing")  # what an engine has or expects


class Daemon:
    """A daemon that serves."""

    def __init__(self, url: str, model: str, run_dir: str) -> None:
        parts = urlsplit(url)
        assert parts.hostname and parts.port
        self.url = url
        self.model = model
        self.run_dir = Path(run_dir)
        self._address = parts.hostname, parts.port

    # -- the admin socket

    def call(self, method: str, route: str) -> dict[str, Any]:
        return call(self.run_dir / "admin.sock", method, route)

    def engines(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.call("GET", "/v1/status")["engines"]
        return found

    def requests(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.call("GET", "/v1/requests")["requests"]
        return found

    def migrate(self, name: str, engine: int, how: str = "live") -> None:
        """Raises llumctl.Refused."""
        self.call("POST", f"/v1/requests/{name}/migrate/{engine}?how={how}")

    def engine_of(self, name: str) -> int:
        return next(int(row["engine"]) for row in self.requests() if row["id"].startswith(name))

    def total(self, fact: str) -> int:
        """The sum of a number in the engines' rows of the status."""
        return sum(engine[fact] for engine in self.engines())

    async def until(self, what: str, ready: Callable[[list[dict[str, Any]]], bool]) -> list[dict[str, Any]]:
        """The engines' rows once `ready` says so of them."""
        end = perf_counter() + PATIENCE
        while not ready(rows := await asyncio.to_thread(self.engines)):
            if perf_counter() > end:
                raise SystemExit(f"not within {PATIENCE:.0f} s: {what}")
            await asyncio.sleep(POLL)
        return rows

    async def until_idle(self) -> None:
        """No engine has or expects anything."""
        await self.until("idle engines", lambda rows: not any(held(row) for row in rows))

    # -- HTTP

    def post(self, route: str, body: dict[str, Any]) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection(*self._address, timeout=PATIENCE)
        payload = json.dumps({"model": self.model} | body)
        connection.request("POST", route, payload, {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise SystemExit(f"{route}: {response.status} {response.read()!r}")
        return response

    def tokenize(self, text: str) -> list[int]:
        body = self.post("/tokenize", {"prompt": text, "add_special_tokens": False})
        tokens: list[int] = json.loads(body.read())["tokens"]
        return tokens

    def metric(self, name: str) -> float:
        """The sum of the series called `name`."""
        connection = http.client.HTTPConnection(*self._address, timeout=PATIENCE)
        connection.request("GET", "/metrics")
        page = connection.getresponse().read().decode()
        return sum(map(float, re.findall(rf"^{re.escape(name)}(?:{{.*}})? (\S+)$", page, re.MULTILINE)))


def held(engine: dict[str, Any]) -> int:
    """Requests that the engine of this status row has or expects."""
    return sum(engine.get(name, 0) for name in HELD)


@contextlib.contextmanager
def serving(*flags: str) -> Iterator[Daemon]:
    """A daemon with the demo model on two CPU engines, unless `flags` say otherwise."""
    with tempfile.TemporaryDirectory() as run_dir:
        given = ["--devices", "cpu,cpu", "--port", "0", "--run-dir", run_dir, "--drain-timeout", "1s"]
        command = [sys.executable, "-m", "daemon.cli.llumd", "serve", *given, "--log-level", "warning", *flags]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            found = re.search(r"serves (\S+) at (http://\S+)", line)
            if not found:
                raise SystemExit(f"the daemon did not start: {line!r}")
            yield Daemon(found[2], found[1], run_dir)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(30)


class Client:
    """Streams completions to their full length. What came so far may be read at any time."""

    def __init__(self, daemon: Daemon, seed: int = 0) -> None:
        self.daemon = daemon
        self._chance = Random(seed)
        self._pool = Pool(daemon.url)
        self._sent: list[asyncio.Task[Outcome]] = []

    def send(self, prompt_tokens: int, max_tokens: int, **fields: Any) -> Outcome:
        """A greedy request under way, its prompt like no other. `fields` are added to its body."""
        return self.ask({"prompt": self.prompt(prompt_tokens), "max_tokens": max_tokens, "temperature": 0} | fields)

    def prompt(self, tokens: int) -> list[int]:
        """One like no other."""
        return self._chance.choices(range(*TOKEN_IDS), k=tokens)

    def ask(self, body: dict[str, Any]) -> Outcome:
        """A request under way."""
        always = {"ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
        outcome = Outcome(len(self._sent), sent=perf_counter())
        asked = json.dumps({"model": self.daemon.model} | body | always).encode()
        request = self._pool.request("/v1/completions", asked)
        self._sent.append(asyncio.create_task(_stream(self._pool, request, outcome)))
        return outcome

    async def finish(self) -> list[Outcome]:
        """All that was sent, once it has ended. Nothing of it may have failed."""
        outcomes = await self.settle()
        if failed := [o.error for o in outcomes if not o.ok]:
            raise SystemExit(f"{len(failed)} of {len(outcomes)} requests failed: {', '.join(sorted(set(failed)))}")
        return outcomes

    async def settle(self) -> list[Outcome]:
        """All that was sent, once it has ended, be it well or not."""
        outcomes = await asyncio.gather(*self._sent)
        self._sent.clear()
        return outcomes

    async def until_tokens(self, outcomes: Sequence[Outcome], count: int) -> None:
        """Until each of these has had `count` chunks of text."""
        end = perf_counter() + PATIENCE
        while not all(len(o.arrivals) >= count for o in outcomes):
            if perf_counter() > end or any(o.error for o in outcomes):
                raise SystemExit("a stream stopped, or nothing came")
            await asyncio.sleep(0.005)


async def _stream(pool: Pool, request: bytes, outcome: Outcome) -> Outcome:
    """On a connection of its own: what failed cannot have been an old one."""
    connection: Connection | None = None
    try:
        connection = await pool.take()
        reader = StreamReader(outcome)
        reader.end(perf_counter(), await connection.exchange(request, reader.feed))
    except OSError as e:
        outcome.error = f"connection failed: {e}"
    finally:
        if connection is not None:
            connection.close()
    outcome.ended = perf_counter()
    return outcome
