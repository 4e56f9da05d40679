"""What streams notice when processes are replaced: the only frontend dies or hands over, or everything restarts.

    python -m bench.succession [--quick] [--only deaths|restarts] [--model] [--json FILE]

The engines are of the hash kind, one token each 8 ms, so that what is measured is the daemon. `--model` restarts with
the demo model instead.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import statistics
import time
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter
from typing import Any

import psutil

from bench.live import TIMEOUT, Client, Daemon, serving
from bench.measures import weighted_distribution
from bench.parts import Part, run_parts
from bench.stream import Outcome
from daemon.cli import restarts

STREAMS = 16
PROMPT = 64  # tokens
OUTPUT = 700
RECEIVED = 64  # tokens of each stream before the frontend ends
ENGINE = ("--engine", "hash", "--stub-step", "8ms")
STANDBY = {"killed": False, "killed, with a standby": True, "handed over": True}  # way -> has a standby
SETTLED = 1.0  # seconds without CPU time after which a standby counts as loaded
QUIET = 6.0  # seconds of load before each restart, for comparison
LANE_OUTPUT = 150  # tokens of each request while everything restarts

# -- the only frontend ends ----------------------------------------------------------------------


async def measure_deaths(rounds: int) -> dict[str, Any]:
    """Run `rounds` rounds of each way in alternation, on one daemon with and one without a standby."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in STANDBY}
    with ExitStack() as stack:
        daemons = {
            standby: stack.enter_context(serving(*ENGINE, *([] if standby else ["--no-standby-frontend"])))
            for standby in (False, True)
        }
        for turn in range(rounds):
            for name in STANDBY if turn % 2 == 0 else reversed(STANDBY):
                found[name].append(await _round(daemons[STANDBY[name]], name, turn))
    return {name: _gaps(rows) for name, rows in found.items()}


async def _round(daemon: Daemon, name: str, turn: int) -> dict[str, float]:
    """End the frontend once while streams run. Return the median and the longest gap of the streams, in seconds."""
    if STANDBY[name]:
        await asyncio.to_thread(_await_standby, daemon)
    client = Client(daemon, seed=turn)
    streams = [client.send(PROMPT, OUTPUT) for _ in range(STREAMS)]
    await client.until_tokens(streams, RECEIVED)
    if name == "handed over":
        ended = perf_counter()
        await asyncio.to_thread(daemon.call, "POST", "/v1/frontends/0/restart")
    else:
        status = await asyncio.to_thread(daemon.call, "GET", "/v1/status")
        ended = perf_counter()
        os.kill(status["frontends"][0]["pid"], signal.SIGKILL)
    if any(o.output_tokens != OUTPUT for o in await client.finish()):
        raise SystemExit("an answer is incomplete")
    await daemon.until_idle()
    await asyncio.sleep(2.5)  # until the successor counts as healthy: its own end is followed at once, too
    gaps = [longest_gap(outcome, ended) for outcome in streams]
    return {"gap": statistics.median(gaps), "most": max(gaps)}


def longest_gap(outcome: Outcome, since: float) -> float:
    """Return the longest time between two chunks of text of which the second came after `since`."""
    return max(gap for gap, at in zip(outcome.gaps, outcome.arrivals[1:], strict=True) if at > since)


def _await_standby(daemon: Daemon) -> None:
    """Wait until the standby frontend has loaded all that it needs: it runs, and uses no CPU time any more."""
    supervisor = psutil.Process(daemon.call("GET", "/v1/status")["supervisor_pid"])
    end, before = perf_counter() + TIMEOUT, (-1, 0.0)
    while perf_counter() < end:
        now = next((_cpu(child) for child in supervisor.children() if _is_standby(child)), (-1, 0.0))
        if now == before and now[0] >= 0:
            return
        before = now
        time.sleep(SETTLED)
    raise SystemExit("no standby frontend is loaded")


def _is_standby(process: psutil.Process) -> bool:
    try:
        return "standby" in " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return False


def _cpu(process: psutil.Process) -> tuple[int, float]:
    times = process.cpu_times()
    return process.pid, times.user + times.system


def _gaps(rows: list[dict[str, float]]) -> dict[str, Any]:
    return {
        "gap": statistics.median(row["gap"] for row in rows),
        "least": min(row["gap"] for row in rows),
        "most": max(row["most"] for row in rows),
        "rounds": rows,
    }


def death_lines(found: dict[str, Any]) -> list[str]:
    """Return the lines of the table."""
    head = f"the only frontend ends: {STREAMS} streams, a token each 8 ms; gap of a stream, s (medians of rounds)"
    table = [head, f"{'way':<24}{'rounds':>7}{'gap':>8}{'least':>8}{'worst':>8}"]
    table += [
        f"{name:<24}{len(r['rounds']):>7}{r['gap']:>8.3f}{r['least']:>8.3f}{r['most']:>8.3f}"
        for name, r in found.items()
    ]
    return [*table, "every answer is complete"]


# -- everything restarts -------------------------------------------------------------------------


class Lanes:
    """A closed loop: each lane sends one request after the other. `outcomes`: of all requests that have ended."""

    def __init__(self, daemon: Daemon, lanes: int) -> None:
        self.outcomes: list[Outcome] = []
        self._daemon = daemon
        self._stop = False
        self._tasks = [asyncio.create_task(self._run(seed)) for seed in range(lanes)]

    async def _run(self, seed: int) -> None:
        client = Client(self._daemon, seed)
        while not self._stop:
            client.send(PROMPT, LANE_OUTPUT)
            self.outcomes += await client.settle()

    async def end(self) -> None:
        """Let each lane finish its request."""
        self._stop = True
        await asyncio.gather(*self._tasks)


async def measure_restarts(rounds: int, *, model: bool) -> dict[str, Any]:
    """Compare the load while everything restarts with the same load before, `rounds` times on one daemon."""
    flags = ("--kv-memory", "256MiB", "--threads", "1") if model else ENGINE
    rows = []
    with serving("--frontends", "2", *flags) as daemon:
        lanes = Lanes(daemon, STREAMS // 2 if model else STREAMS)
        for _ in range(rounds):
            await asyncio.sleep(2.0)
            start = perf_counter()
            await asyncio.sleep(QUIET)
            middle = perf_counter()
            await asyncio.to_thread(restarts.restart, daemon.run_dir / "admin.sock", "all", None, TIMEOUT, print)
            rows.append((start, middle, perf_counter()))
        await lanes.end()
    found = [_compared(lanes.outcomes, *row) for row in rows]
    failed = [o.error for o in lanes.outcomes if not o.ok or o.output_tokens != LANE_OUTPUT]
    return {
        "requests": len(lanes.outcomes),
        "failed": len(failed),
        "errors": sorted(set(failed)),
        "ratio_p50": statistics.median(row["restart"]["p50"] / row["quiet"]["p50"] for row in found),
        "ratio_p99": statistics.median(row["restart"]["p99"] / row["quiet"]["p99"] for row in found),
        "rounds": found,
    }


def _compared(outcomes: list[Outcome], start: float, middle: float, end: float) -> dict[str, Any]:
    quiet, restart = itl(outcomes, start, middle), itl(outcomes, middle, end)
    if quiet is None or restart is None:
        raise SystemExit("no token arrived")
    return {"seconds": end - middle, "quiet": quiet, "restart": restart}


def itl(outcomes: list[Outcome], begin: float, end: float) -> dict[str, float] | None:
    """Return the distribution of the time between tokens that arrived from `begin` to `end`, by token."""
    gaps = [
        (gap / k, k)
        for o in outcomes
        if o.arrivals
        for gap, k, at in zip(o.gaps, o.gap_tokens, o.arrivals[1:], strict=True)
        if k > 0 and begin <= at < end
    ]
    return weighted_distribution([gap for gap, _ in gaps], [k for _, k in gaps])


def restart_lines(found: dict[str, Any]) -> list[str]:
    """Return the lines of the table."""
    why = f": {', '.join(found['errors'])}" if found["failed"] else ""
    lines = [f"everything restarts under load: {found['requests']} requests, {found['failed']} failed{why}"]
    lines += [f"{'':<10}{'seconds':>9}{'ITL p50 ms':>12}{'p99':>9}{'max':>9}"]
    for row in found["rounds"]:
        for name in ("quiet", "restart"):
            d, seconds = row[name], QUIET if name == "quiet" else row["seconds"]
            lines.append(
                f"{name:<10}{seconds:>9.1f}{d['p50'] * 1e3:>12.1f}{d['p99'] * 1e3:>9.1f}{d['max'] * 1e3:>9.0f}"
            )
    ratio = f"{found['ratio_p50']:.2f} at p50, {found['ratio_p99']:.2f} at p99"
    return [*lines, f"restart over quiet: {ratio} (medians of rounds)"]


# -- command -------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rounds")
    parser.add_argument("--only", choices=("deaths", "restarts"))
    parser.add_argument("--model", action="store_true", help="restart with the demo model")
    parser.add_argument("--json", type=Path, help="also write the results here")
    args = parser.parse_args()
    deaths, orders = (2, 1) if args.quick else (10, 3)
    parts: dict[str, Part] = {
        "deaths": (lambda: measure_deaths(deaths), death_lines),
        "restarts": (lambda: measure_restarts(orders, model=args.model), restart_lines),
    }
    run_parts("bench.succession", args, parts)


if __name__ == "__main__":
    main()
