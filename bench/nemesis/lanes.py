"""Clients under load: each sends one request after the other, compares every answer, and tries again where it may."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from bench.answers import Answer
from bench.nemesis.clients import Attempt, Client
from bench.nemesis.requests import Template
from bench.nemesis.verdicts import Verdict, judge

RETRY = 0.2  # seconds before a request is sent again
TRIES = 600  # of one request


@dataclass
class Failure:
    """A response that is not what it should be."""

    client: str
    template: Template
    attempt: Attempt
    verdict: Verdict
    detail: str

    def __str__(self) -> str:
        a = self.attempt
        when = f"sent {a.sent:.3f}, ended {a.ended:.3f}, {len(a.arrivals)} parts, {len(a.body)} bytes"
        if a.arrivals:
            when += f", first {a.arrivals[0]:.3f}, last {a.arrivals[-1]:.3f}"
        what = f"request {a.name}, template {self.template.number}"
        return f"{self.verdict} ({self.client}, {what}: {when})\n{self.detail}"


@dataclass
class Lane:
    """One client and what it has seen."""

    kind: str
    number: int
    client: Client
    attempts: list[Attempt] = field(default_factory=list)  # those with a verdict that counts as answered
    verdicts: dict[Verdict, int] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)

    async def run(
        self, script: Iterator[int], templates: Sequence[Template], twins: Sequence[Answer], guarded: set[str],
        stop: asyncio.Event,
    ) -> None:  # fmt: skip
        """Send requests until `stop`. `guarded`: the x-request-ids of all responses that an outbox has had so far."""
        sent = 0
        while not stop.is_set():
            template = templates[next(script)]
            sent += 1
            for attempt_number in range(TRIES):
                name = f"{self.kind.replace('/', '-')}-{self.number}-{sent}-{attempt_number}"
                attempt = await self.client.send(template, name)
                verdict, detail = judge(template, attempt, twins[template.number], guarded=name in guarded)
                self.verdicts[verdict] = self.verdicts.get(verdict, 0) + 1
                if not verdict.failed:
                    attempt.body.clear()
                if verdict.again:
                    await asyncio.sleep(RETRY)
                    continue
                self.attempts.append(attempt)
                if verdict.failed:
                    self.failures.append(Failure(self.kind, template, attempt, verdict, detail))
                break
