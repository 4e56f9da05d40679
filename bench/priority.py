"""Requests of high priority among many normal ones: the effect of the priority and of its headroom.

Normal requests arrive at a fixed share of the two engines' capacity, and one of high priority every EVERY seconds.
The same arrivals run in three settings: all sent as normal; high priority without headroom, so that these requests
are only scheduled first; with headroom, which dispatch keeps free and rebalancing restores by moving other requests.
"""

from __future__ import annotations

import asyncio
import statistics
from contextlib import ExitStack
from dataclasses import dataclass
from random import Random
from time import perf_counter
from typing import Any

from bench.live import Client, Daemon, serving
from bench.measures import distribution
from bench.prompts import arrival_times
from bench.stream import Outcome

NORMAL = ((64, 320), (32, 160))  # ranges of prompt and output tokens, drawn uniformly
HIGH = (96, 64)  # prompt and output tokens
CALIBRATION = 48  # requests
IN_FLIGHT = 24  # calibration requests at once
SHARE = 0.85  # rate of normal requests, as a share of the calibrated rate
EVERY = 3.0  # seconds between two requests of high priority
SKIPPED = 3.0  # seconds at the start, while the load builds up: not counted
FLAGS = ("--kv-memory", "256MiB")
SETTINGS = ("as normal", "no headroom", "headroom")


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request that is sent `at` seconds after the start."""

    at: float
    prompt: int
    output: int
    high: bool


async def measure(rounds: int, seconds: float) -> dict[str, Any]:
    """Run rounds of `seconds` each in every setting, in rotation."""
    found: dict[str, list[tuple[list[Outcome], list[Outcome]]]] = {name: [] for name in SETTINGS}
    moves = dict.fromkeys(SETTINGS, 0.0)
    with ExitStack() as stack:
        without = stack.enter_context(serving("--no-headroom", *FLAGS))
        with_headroom = stack.enter_context(serving(*FLAGS))
        daemons = dict(zip(SETTINGS, (with_headroom, without, with_headroom), strict=True))
        await _capacity(without)  # warms up
        rate = SHARE * await _capacity(with_headroom)
        for turn in range(rounds):
            schedule = _schedule(seconds, rate, seed=turn)
            for name in SETTINGS[turn % 3 :] + SETTINGS[: turn % 3]:
                before = await _takeovers(daemons[name])
                found[name].append(await _run(daemons[name], schedule, marked=name != "as normal"))
                moves[name] += await _takeovers(daemons[name]) - before
    return {"rate": rate, "seconds": seconds, "rounds": rounds} | {
        name: _summary(runs) | {"moves": moves[name]} for name, runs in found.items()
    }


async def _takeovers(daemon: Daemon) -> float:
    return await asyncio.to_thread(daemon.metric, "llumd:takeovers_total")


async def _capacity(daemon: Daemon) -> float:
    """Return the rate of normal requests, a second, with IN_FLIGHT of them at once."""
    rng, slots = Random(0), asyncio.Semaphore(IN_FLIGHT)

    async def one(seed: int) -> None:
        async with slots:
            client = Client(daemon, seed)
            client.send(*_normal(rng))
            await client.finish()

    start = perf_counter()
    await asyncio.gather(*map(one, range(CALIBRATION)))
    return CALIBRATION / (perf_counter() - start)


def _normal(rng: Random) -> tuple[int, int]:
    return rng.randint(*NORMAL[0]), rng.randint(*NORMAL[1])


def _schedule(seconds: float, rate: float, seed: int) -> list[Arrival]:
    rng = Random(seed)
    times = arrival_times(int(seconds * rate), rate, arrivals="poisson", cv=1.0, seed=seed)
    if not times or times[-1] < SKIPPED:
        raise SystemExit(f"{rate:.2f} normal requests a second are the capacity of this machine: too few to measure")
    normal = [Arrival(at, *_normal(rng), False) for at in times]
    high = [Arrival(EVERY * (i + 0.5), *HIGH, True) for i in range(int(seconds / EVERY))]
    return sorted(normal + high, key=lambda arrival: arrival.at)


async def _run(daemon: Daemon, schedule: list[Arrival], *, marked: bool) -> tuple[list[Outcome], list[Outcome]]:
    """Send the requests of a schedule. Return outcomes (high priority, normal) without those of the first seconds."""
    client = Client(daemon, seed=len(schedule))
    start = perf_counter()
    sent: list[Outcome] = []
    for arrival in schedule:
        await asyncio.sleep(max(0.0, start + arrival.at - perf_counter()))
        fields = {"priority": "high"} if arrival.high and marked else {}
        sent.append(client.send(arrival.prompt, arrival.output, **fields))
    await client.finish()
    await daemon.until_idle()
    counted = [(a, o) for a, o in zip(schedule, sent, strict=True) if a.at >= SKIPPED]
    return [o for a, o in counted if a.high], [o for a, o in counted if not a.high]


def _summary(runs: list[tuple[list[Outcome], list[Outcome]]]) -> dict[str, Any]:
    return {
        "high": _latencies([o for high, _ in runs for o in high]),
        "normal": _latencies([o for _, normal in runs for o in normal]),
        "by_round": [{"high": _latencies(high), "normal": _latencies(normal)} for high, normal in runs],
    }


def _latencies(outcomes: list[Outcome]) -> dict[str, Any]:
    return {
        "requests": len(outcomes),
        "ttft": distribution([o.ttft for o in outcomes]),
        "tpot": distribution([o.tpot for o in outcomes if o.tpot is not None]),
        "e2e": distribution([o.e2e for o in outcomes]),
    }


def lines(found: dict[str, Any]) -> list[str]:
    """Return the lines of the table."""
    head = f"priority: {found['rate']:.1f} normal requests a second, one of high priority each {EVERY:g} s (ms)"
    table = [head, f"{'setting':<20}{'class':<8}{'requests':>9}{'TTFT p50':>10}{'p99':>7}{'TPOT p50':>10}{'p99':>7}"]
    table[1] += f"{'E2E p50':>9}{'moves':>7}"
    for name in SETTINGS:
        for kind in ("high", "normal"):
            r = found[name][kind]
            times = f"{1e3 * r['ttft']['p50']:10.0f}{1e3 * r['ttft']['p99']:7.0f}"
            times += f"{1e3 * r['tpot']['p50']:10.1f}{1e3 * r['tpot']['p99']:7.1f}{1e3 * r['e2e']['p50']:9.0f}"
            moves = f"{found[name]['moves']:7.0f}" if kind == "high" else ""
            table.append(f"{name:<20}{kind:<8}{r['requests']:>9}{times}{moves}")
    return [*table, *_ratios(found)]


def _ratios(found: dict[str, Any]) -> list[str]:
    """Return, for the requests of high priority, latencies when sent as normal over those when sent as high."""
    found_lines = []
    for name in SETTINGS[1:]:
        parts = [f"{what.upper()} {_gain(found, name, what):.2f}" for what in ("ttft", "tpot", "e2e")]
        found_lines.append(f"as normal over {name}, medians of the rounds' medians: {', '.join(parts)}")
    return found_lines


def _gain(found: dict[str, Any], name: str, what: str) -> float:
    pairs = zip(found["as normal"]["by_round"], found[name]["by_round"], strict=True)
    return statistics.median(a["high"][what]["p50"] / b["high"][what]["p50"] for a, b in pairs)
