"""Many HTTP clients at once; each records everything that it receives."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from tests.e2e.daemon_process import Daemon, wait_for


@dataclass
class Outcome:
    """What one client has received so far."""

    status: int = 0
    id: str = ""
    text: str = ""
    tokens: list[str] = field(default_factory=list)  # only if the request asks for logprobs
    logprobs: list[tuple[float, Any]] = field(default_factory=list)  # of each token: its own and the top ones
    finish: str | None = None
    errors: list[dict[str, Any]] = field(default_factory=list)
    done: bool = False  # data: [DONE] was received
    closed: bool = False  # the HTTP response ended properly
    broken: str = ""  # how the connection failed; empty: it did not
    body: dict[str, Any] = field(default_factory=dict)  # of an answer that is not streamed

    @property
    def ended(self) -> bool:
        """True once the response or the connection has ended."""
        return self.closed or bool(self.broken)

    @property
    def ok(self) -> bool:
        """True if the answer is complete and has no error."""
        good = self.status == 200 and self.closed and not self.errors
        return good and ((self.done and self.finish is not None) or "choices" in self.body)

    @property
    def failed_cleanly(self) -> bool:
        """True for an error status with a body, or for a stream that ends with exactly one error event."""
        if self.status != 200:
            return self.status >= 500 and "error" in self.body and self.closed
        return self.closed and len(self.errors) == 1 and not self.done and self.finish is None


class Clients:
    """Clients that send one request each, on a thread of their own. On exit of the context all hang up."""

    def __init__(
        self,
        daemon: Daemon,
        bodies: Sequence[dict[str, Any]],
        path: str = "/v1/completions",
        concurrency: int = 1000,
        key: str = "",
    ) -> None:
        """`concurrency`: number of requests in flight; further requests are sent as these end. `key`: API key."""
        self.outcomes = [Outcome() for _ in bodies]
        self._slots = asyncio.Semaphore(concurrency)
        self._url = daemon.url + path
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._bodies = bodies
        self._loop = asyncio.new_event_loop()
        self._tasks: list[asyncio.Task[None]] = []
        self._ended: Future[None] = Future()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._run(),), daemon=True)

    async def _run(self) -> None:
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout()) as session:
            pairs = zip(self._bodies, self.outcomes, strict=True)
            self._tasks = [asyncio.create_task(self._request(session, body, outcome)) for body, outcome in pairs]
            await asyncio.gather(*self._tasks, return_exceptions=True)
        self._ended.set_result(None)

    async def _request(self, session: aiohttp.ClientSession, body: dict[str, Any], outcome: Outcome) -> None:
        try:
            async with self._slots, session.post(self._url, json=body, headers=self._headers) as response:
                outcome.status = response.status
                if response.content_type == "text/event-stream":
                    async for line in response.content:
                        _read_event(line, outcome)
                else:
                    outcome.body = await response.json()
                outcome.closed = True
        except aiohttp.ClientError as e:
            outcome.broken = repr(e)

    def await_tokens(self, count: int = 1) -> None:
        """Wait until every streaming client has received `count` characters or has ended."""
        streams = [o for o, body in zip(self.outcomes, self._bodies, strict=True) if body.get("stream")]
        wait_for(f"{count} characters in every stream", lambda: all(o.ended or len(o.text) >= count for o in streams))

    def hang_up(self, *indices: int) -> None:
        """Close the connections of these clients; without an index, of all."""
        chosen = indices or range(len(self._tasks))
        self._loop.call_soon_threadsafe(lambda: [self._tasks[i].cancel() for i in chosen])

    def stop(self) -> list[Outcome]:
        """Assert that no client has ended or received an error, then hang up all."""
        assert not any(outcome.ended or outcome.errors for outcome in self.outcomes)
        self.hang_up()
        return self.join()

    def join(self, timeout: float = 60.0) -> list[Outcome]:
        """Wait until every request has ended. Return the outcomes."""
        self._ended.result(timeout)
        return self.outcomes

    def __enter__(self) -> Clients:
        self._thread.start()
        wait_for("the clients", lambda: len(self._tasks) == len(self._bodies))
        return self

    def __exit__(self, *exc: object) -> None:
        if not self._ended.done():
            self.hang_up()
        self._thread.join(10)
        self._loop.close()


def _read_event(line: bytes, outcome: Outcome) -> None:
    if not line.startswith(b"data: "):
        return
    if line.strip() == b"data: [DONE]":
        outcome.done = True
        return
    event = json.loads(line[6:])
    if "error" in event:
        outcome.errors.append(event["error"])
        return
    outcome.id = event["id"]
    for choice in event["choices"]:
        outcome.text += choice["text"] if "text" in choice else choice["delta"].get("content", "")
        outcome.finish = choice["finish_reason"] or outcome.finish
        if choice.get("logprobs"):
            logprobs = choice["logprobs"]
            outcome.tokens += logprobs["tokens"]
            top = logprobs["top_logprobs"] or [None] * len(logprobs["tokens"])
            outcome.logprobs += zip(logprobs["token_logprobs"], top, strict=True)


def engines_of(daemon: Daemon, outcomes: Sequence[Outcome]) -> list[int]:
    """Return the engine that runs each of these streams, as `llumctl requests` shows it; -1: none."""
    engines = {row["id"].rsplit("-", 1)[0]: row["engine"] for row in daemon.requests()}
    return [engines.get(outcome.id, -1) for outcome in outcomes]
