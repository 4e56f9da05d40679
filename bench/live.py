"""A real daemon on the demo model for one measurement, with an operator's orders and streaming clients.

`tests/e2e/daemon_process.py` uses the start command, the ready line and the metrics reader of this module too.
"""

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
from daemon.cli.admin_client import call

TIMEOUT = 300.0  # seconds; generous, so that a slow machine does not end a measurement
POLL = 0.05  # seconds between two status requests
BLOCK = 16  # tokens
BLOCK_BYTES = BLOCK * 23040  # of the demo model's KV in bf16
TOKEN_IDS = (100, 40_000)  # range of random prompts: the demo model's words, without special tokens

HELD = ("running", "waiting", "incoming", "outgoing")  # numbers of requests in an engine's status row
READY_LINE = re.compile(r"serves (?P<model>\S+) at (?P<url>http://\S+)$", re.MULTILINE)  # on stdout, once it serves


def serve_command(*arguments: str) -> list[str]:
    """Return the command line that starts a daemon."""
    return [sys.executable, "-m", "daemon.cli.llumd", "serve", *arguments]


def sample_values(page: str, name: str) -> list[float]:
    """Return the values of all series with this name on a Prometheus page."""
    return [float(value) for value in re.findall(rf"^{re.escape(name)}(?:{{.*}})? (\S+)$", page, re.MULTILINE)]


class Daemon:
    """A daemon that serves: its admin socket and its HTTP address."""

    def __init__(self, url: str, model: str, run_dir: str) -> None:
        """`model`: the name under which it is served."""
        parts = urlsplit(url)
        assert parts.hostname and parts.port
        self.url = url
        self.model = model
        self.run_dir = Path(run_dir)
        self.address = parts.hostname, parts.port

    # -- the admin socket

    def call(self, method: str, route: str) -> dict[str, Any]:
        """Send a request to the admin socket and return the answer. Raises admin_client.Refused."""
        return call(self.run_dir / "admin.sock", method, route)

    def engines(self) -> list[dict[str, Any]]:
        """Return the engines' status rows."""
        found: list[dict[str, Any]] = self.call("GET", "/v1/status")["engines"]
        return found

    def requests(self) -> list[dict[str, Any]]:
        """Return the rows of the unfinished requests."""
        found: list[dict[str, Any]] = self.call("GET", "/v1/requests")["requests"]
        return found

    def migrate(self, name: str, engine: int, how: str = "live") -> None:
        """Order the migration of a request. Raises admin_client.Refused."""
        self.call("POST", f"/v1/requests/{name}/migrate/{engine}?how={how}")

    def engine_of(self, name: str) -> int:
        """Return the engine that owns the request."""
        return next(int(row["engine"]) for row in self.requests() if row["id"].startswith(name))

    def total(self, fact: str) -> int:
        """Return the sum of a number over the engines' status rows."""
        return sum(engine[fact] for engine in self.engines())

    async def until(self, what: str, ready: Callable[[list[dict[str, Any]]], bool]) -> list[dict[str, Any]]:
        """Wait until `ready(rows)` is true of the engines' status rows; return them. A timeout error names `what`."""
        end = perf_counter() + TIMEOUT
        while not ready(rows := await asyncio.to_thread(self.engines)):
            if perf_counter() > end:
                raise SystemExit(f"not within {TIMEOUT:.0f} s: {what}")
            await asyncio.sleep(POLL)
        return rows

    async def until_idle(self) -> None:
        """Wait until no engine has or expects a request."""
        await self.until("idle engines", lambda rows: not any(held(row) for row in rows))

    # -- HTTP

    def post(self, route: str, body: dict[str, Any]) -> http.client.HTTPResponse:
        """Send `body` with the model's name; ends the program unless the status is 200."""
        connection = http.client.HTTPConnection(*self.address, timeout=TIMEOUT)
        payload = json.dumps({"model": self.model} | body)
        connection.request("POST", route, payload, {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise SystemExit(f"{route}: {response.status} {response.read()!r}")
        return response

    def tokenize(self, text: str) -> list[int]:
        """Return the token ids of a text, without special tokens."""
        body = self.post("/tokenize", {"prompt": text, "add_special_tokens": False})
        tokens: list[int] = json.loads(body.read())["tokens"]
        return tokens

    def metric(self, name: str) -> float:
        """Return the sum of the series with this name."""
        connection = http.client.HTTPConnection(*self.address, timeout=TIMEOUT)
        connection.request("GET", "/metrics")
        page = connection.getresponse().read().decode()
        return sum(sample_values(page, name))


def held(engine: dict[str, Any]) -> int:
    """Return the number of requests that the engine of this status row has or expects."""
    return sum(engine.get(name, 0) for name in HELD)


@contextlib.contextmanager
def serving(*flags: str) -> Iterator[Daemon]:
    """Start a daemon with the demo model on two CPU engines; `flags` override these options."""
    with tempfile.TemporaryDirectory() as run_dir:
        given = ["--devices", "cpu,cpu", "--port", "0", "--run-dir", run_dir, "--drain-timeout", "1s"]
        command = serve_command(*given, "--log-level", "warning", *flags)
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            found = READY_LINE.search(line)
            if not found:
                raise SystemExit(f"the daemon did not start: {line!r}")
            yield Daemon(found["url"], found["model"], run_dir)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(30)


class Client:
    """Streams completions of full length. The outcomes may be read while the streams run."""

    def __init__(self, daemon: Daemon, seed: int = 0) -> None:
        self.daemon = daemon
        self._rng = Random(seed)
        self._pool = Pool(daemon.url)
        self._sent: list[asyncio.Task[Outcome]] = []

    def send(self, prompt_tokens: int, max_tokens: int, **fields: Any) -> Outcome:
        """Send a greedy request with a random prompt. `fields` are added to its body."""
        return self.send_body(
            {"prompt": self.prompt(prompt_tokens), "max_tokens": max_tokens, "temperature": 0} | fields
        )

    def prompt(self, tokens: int) -> list[int]:
        """Return a random prompt of `tokens` token ids."""
        return self._rng.choices(range(*TOKEN_IDS), k=tokens)

    def send_body(self, body: dict[str, Any]) -> Outcome:
        """Send a request with this body. Return its outcome, which is filled while the stream runs."""
        always = {"ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
        outcome = Outcome(len(self._sent), sent=perf_counter())
        payload = json.dumps({"model": self.daemon.model} | body | always).encode()
        request = self._pool.request("/v1/completions", payload)
        self._sent.append(asyncio.create_task(_stream(self._pool, request, outcome)))
        return outcome

    async def finish(self) -> list[Outcome]:
        """Wait for the end of all requests and return their outcomes; ends the program if one has failed."""
        outcomes = await self.settle()
        if failed := [o.error for o in outcomes if not o.ok]:
            raise SystemExit(f"{len(failed)} of {len(outcomes)} requests failed: {', '.join(sorted(set(failed)))}")
        return outcomes

    async def settle(self) -> list[Outcome]:
        """Wait for the end of all requests and return their outcomes, failed ones included."""
        outcomes = await asyncio.gather(*self._sent)
        self._sent.clear()
        return outcomes

    async def until_tokens(self, outcomes: Sequence[Outcome], count: int) -> None:
        """Wait until each of these streams has received `count` chunks of text."""
        end = perf_counter() + TIMEOUT
        while not all(len(o.arrivals) >= count for o in outcomes):
            if perf_counter() > end or any(o.error for o in outcomes):
                raise SystemExit("a stream failed or received nothing")
            await asyncio.sleep(0.005)


async def _stream(pool: Pool, request: bytes, outcome: Outcome) -> Outcome:
    """Stream over a new connection, so that a failure cannot come from a stale one."""
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
