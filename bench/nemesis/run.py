"""One run: the twins, then the load and the faults, then the checks."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple

from bench.answers import Answer
from bench.nemesis import checks
from bench.nemesis.clients import KINDS, AioHttp
from bench.nemesis.daemon import Daemon, serving
from bench.nemesis.faults import Nemesis
from bench.nemesis.lanes import Lane
from bench.nemesis.report import figures, last_faults
from bench.nemesis.requests import Template, lane_script, templates
from bench.nemesis.schedule import Shape, plan

POLL = 0.05  # seconds between two looks into the outboxes
TWINS_AT_ONCE = 6
SHOWN = 10  # failures


class Setup(NamedTuple):
    """How a daemon is started, and what its clients ask for. `longest`: output tokens."""

    engines: int
    frontends: int
    longest: int
    templates: int
    text: bool
    flags: tuple[str, ...]


ENGINES = {
    "hash": Setup(3, 2, 160, 60, False, ("--engine", "hash", "--stub-step", "15ms", "--kv-memory", "100KiB")),
    "demo": Setup(2, 2, 48, 40, True, ("--deterministic", "--kv-memory", "24MiB")),
}
# Every engine may crash as often as it does. The journal and the outbox are as small as they may be; their
# sizes differ from that of every other segment.
FLAGS = ("--max-resumes", "100", "--hang-timeout", "2s", "--drain-timeout", "5s", "--request-deadline", "20m")
JOURNAL_BYTES = (1 << 20) + (3 << 12)
OUTBOX_BYTES = (1 << 20) + (5 << 12)


@dataclass(frozen=True)
class Options:
    seed: int
    faults: int
    engine: str
    lanes: int
    pace: float
    short: bool = False  # a hang of a frontend or of the coordinator takes half a minute
    verbose: bool = False


async def run(options: Options, home: Path) -> tuple[dict[str, Any], list[str]]:
    """Return the figures of a run, and a description of each failure."""
    setup = ENGINES[options.engine]
    devices = ("--devices", ",".join(["cpu"] * setup.engines), "--frontends", str(setup.frontends))
    sizes = {"journal_bytes": JOURNAL_BYTES, "outbox_bytes": OUTBOX_BYTES}
    with serving(home, "demo", *devices, *setup.flags, *FLAGS, **sizes) as daemon:
        return await _Run(options, setup, daemon).run()


class _Run:
    def __init__(self, options: Options, setup: Setup, daemon: Daemon) -> None:
        self._options = options
        self._daemon = daemon
        self._templates = templates(options.seed, setup.templates, longest=setup.longest, text=setup.text)
        shape = Shape(setup.engines, setup.frontends, options.pace, hangs=not options.short)
        self._faults = plan(options.seed, options.faults, shape)
        self._nemesis = Nemesis(daemon, options.seed, verbose=options.verbose)
        kinds = list(KINDS.items())
        self._lanes = [
            Lane(kinds[i % len(kinds)][0], i, kinds[i % len(kinds)][1](daemon.url, daemon.model))
            for i in range(options.lanes)
        ]
        self._guarded: set[str] = set()

    async def run(self) -> tuple[dict[str, Any], list[str]]:
        daemon = self._daemon
        if unrest := await checks.await_calm(daemon, None):
            raise SystemExit(f"the daemon is not ready: {unrest}")
        twins = await self._twins()
        if unrest := await checks.await_calm(daemon, None):
            raise SystemExit(f"the daemon is not ready: {unrest}")
        before, connections = checks.footing(daemon), checks.tcp_connections(daemon)
        begun = monotonic()
        await self._load(twins)
        seconds = monotonic() - begun
        await self._close()
        leaks = await checks.leaks(daemon, before, connections)
        names = ("responses_adopted", "responses_cut", "responses_unguarded", "resumes", "takeovers")
        metrics = {name: int(await daemon.metric(f"llumd:{name}_total")) for name in names}
        leaks += await checks.end(daemon)
        nemesis = self._nemesis
        found = {
            "seed": self._options.seed,
            "engine": self._options.engine,
            "seconds": round(seconds, 1),
            **figures(self._lanes, nemesis.strikes),
            "metrics": metrics,
            "restarts": dict(nemesis.restarts),
            "leaks": leaks,
        }
        return found, [*self._failures(), *nemesis.failures, *(f"leak: {leak}" for leak in leaks)]

    async def _twins(self) -> list[Answer]:
        """Return the answer to each template, without faults."""
        slots = asyncio.Semaphore(TWINS_AT_ONCE)

        async def ask(template: Template) -> Answer:
            async with slots:
                client = AioHttp(self._daemon.url, self._daemon.model)
                answer = (await client.send(template, f"twin-{template.number}")).read(template.stream)
                await client.close()
            if answer.status != 200 or answer.errors:
                raise SystemExit(f"{template}: status {answer.status}: {answer.errors}")
            return answer

        return await asyncio.gather(*map(ask, self._templates))

    async def _load(self, twins: Sequence[Answer]) -> None:
        """Let all clients send while the faults are carried out, and then finish what they have begun."""
        stop = asyncio.Event()
        watch = asyncio.create_task(self._watch_outboxes())
        count = len(self._templates)
        lanes = [
            asyncio.create_task(
                lane.run(lane_script(self._options.seed, i, count), self._templates, twins, self._guarded, stop)
            )
            for i, lane in enumerate(self._lanes)
        ]
        try:
            await self._nemesis.run(self._faults)
            stop.set()
            await asyncio.gather(*lanes)
        finally:
            for task in (watch, *lanes):
                task.cancel()

    async def _watch_outboxes(self) -> None:
        while True:
            self._guarded.update(self._daemon.memory.guarded())
            await asyncio.sleep(POLL)

    async def _close(self) -> None:
        for lane in self._lanes:
            await lane.client.close()

    def _failures(self) -> list[str]:
        failures = [failure for lane in self._lanes for failure in lane.failures]
        failures.sort(key=lambda failure: failure.attempt.ended)
        strikes = self._nemesis.strikes
        shown = [f"{f}\nlast faults:\n{last_faults(strikes, f.attempt.ended)}" for f in failures[:SHOWN]]
        return shown + [f"and {len(failures) - SHOWN} more"] * (len(failures) > SHOWN)
