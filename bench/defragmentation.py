"""A long prompt that fits on no engine until other requests move: its waiting time with and without rebalancing.

Two engines with small pools run a few requests each. The free blocks of both together are enough for the long prompt,
but those of one engine are not. Without migration the prompt waits until a request of its engine has ended.
"""

from __future__ import annotations

import asyncio
import statistics
from contextlib import ExitStack
from typing import Any

from bench.live import BLOCK, BLOCK_BYTES, Client, Daemon, held, serving

BLOCKS = 140  # of each pool; one of them is reserved
FILLERS = 3  # requests on each engine
FILLER = (368, 128)  # prompt and output tokens of each: 23 blocks that grow to 31; four of them fit as well
LONG = 1120  # tokens of the long prompt: 70 blocks, where 62 to 70 are free
WARM = 6  # tokens of each filler before the long prompt is sent
TRIES = 3  # attempts to fill the pools this way
QUEUED = "vllm:request_queue_time_seconds_sum"
FLAGS = ("--dtype", "bf16", "--no-prefix-caching", "--kv-memory", str(BLOCKS * BLOCK_BYTES))


async def measure(rounds: int) -> dict[str, Any]:
    """Run rounds on two daemons in alternation; the other daemon is idle."""
    found: dict[str, list[dict[str, Any]]] = {"off": [], "on": []}
    with ExitStack() as stack:
        daemons = {
            "off": stack.enter_context(serving("--no-rebalance", *FLAGS)),
            "on": stack.enter_context(serving("--rebalance", *FLAGS)),
        }
        for daemon in daemons.values():
            await _alone(daemon)  # warms up
        for turn in range(rounds):
            for name in ("off", "on") if turn % 2 == 0 else ("on", "off"):
                found[name].append(await _round(daemons[name], turn))
    return {name: _summary(rows) for name, rows in found.items()}


async def _alone(daemon: Daemon) -> float:
    """Return the TTFT of the long prompt on an idle daemon, seconds."""
    client = Client(daemon)
    asked = client.send(LONG, 4)
    await client.finish()
    await daemon.until_idle()
    return asked.ttft


async def _round(daemon: Daemon, turn: int) -> dict[str, Any]:
    alone = await _alone(daemon)
    for attempt in range(TRIES):
        client = Client(daemon, seed=TRIES * turn + attempt)
        fillers = [client.send(*FILLER) for _ in range(2 * FILLERS)]
        await client.until_tokens(fillers, WARM)
        await _even_out(daemon)
        rows = await asyncio.to_thread(daemon.engines)
        free = [row["kv_total_blocks"] - row["kv_used_blocks"] for row in rows]
        if max(free) * BLOCK < LONG <= sum(free) * BLOCK:
            break
        await client.finish()
        await daemon.until_idle()
    else:
        raise SystemExit(f"the pools were never filled as needed: {free} blocks are free")
    before, waited = await _counters(daemon), await asyncio.to_thread(daemon.metric, QUEUED)
    asked = client.send(LONG, 4)
    await client.until_tokens([asked], 1)
    waited = await asyncio.to_thread(daemon.metric, QUEUED) - waited
    await client.finish()
    await daemon.until_idle()
    after = await _counters(daemon)
    return {
        "alone": alone,
        "ttft": asked.ttft,
        "queued": waited,
        "free_blocks": free,
        "moves": after[0] - before[0],
        "preemptions": after[1] - before[1],
        "fillers_tpot": statistics.fmean(o.tpot or 0.0 for o in fillers),
        "fillers_e2e": statistics.fmean(o.e2e for o in fillers),
    }


async def _even_out(daemon: Daemon) -> None:
    """Move requests until each engine has FILLERS: dispatch favours an engine whose steps are shorter."""
    rows = await asyncio.to_thread(daemon.requests)
    for source in (0, 1):
        there = [row["id"] for row in rows if row["engine"] == source]
        for name in there[FILLERS:]:
            await asyncio.to_thread(daemon.migrate, name, 1 - source)
    await daemon.until(
        "an equal number on each", lambda engines: all(held(e) == e["running"] == FILLERS for e in engines)
    )


async def _counters(daemon: Daemon) -> tuple[float, float]:
    """Return (takeovers, preemptions) so far."""
    takeovers = await asyncio.to_thread(daemon.metric, "llumd:takeovers_total")
    return takeovers, await asyncio.to_thread(daemon.total, "preemptions")


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    names = [name for name in rows[0] if name != "free_blocks"]
    return {name: statistics.median(row[name] for row in rows) for name in names} | {"rounds": rows}


def lines(found: dict[str, Any]) -> list[str]:
    """Return the lines of the table."""
    head = f"de-fragmentation: {FILLERS} requests an engine, a prompt of {LONG} tokens fits on neither (ms, medians)"
    columns = f"{'rebalance':<12}{'rounds':>7}{'queued':>9}{'TTFT':>9}{'alone':>9}{'most':>9}"
    table = [head, columns + f"{'moves':>7}{'preempted':>11}{'others TPOT':>13}"]
    for name, r in found.items():
        most = max(row["ttft"] for row in r["rounds"])
        times = "".join(f"{1e3 * t:9.0f}" for t in (r["queued"], r["ttft"], r["alone"], most))
        table.append(
            f"{name:<12}{len(r['rounds']):>7}{times}{r['moves']:>7.0f}{r['preemptions']:>11.0f}"
            f"{1e3 * r['fillers_tpot']:>13.1f}"
        )
    gain = statistics.median(
        off["ttft"] / on["ttft"] for off, on in zip(found["off"]["rounds"], found["on"]["rounds"], strict=True)
    )
    return [*table, f"TTFT without over with: {gain:.2f} (median of the rounds)"]
