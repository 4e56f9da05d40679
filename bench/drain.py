"""Time to empty an engine under load: by migration of its requests, or by waiting for the longest answer.

Both ways get the same load and no further requests, so a waiting engine gets no new work either: without migration an
operator can only remove an engine from dispatch and wait. Rebalancing is off, so no request moves while it waits.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
from time import perf_counter
from typing import Any

from bench.live import TIMEOUT, Client, Daemon, held, serving

STREAMS = 8  # on each engine
PROMPT = 128  # tokens
OUTPUTS = [200 + 200 * i // (2 * STREAMS - 1) for i in range(2 * STREAMS)]  # tokens of each stream
WARM = 16  # tokens of each stream before the drain
ENGINE = 0
FLAGS = ("--no-rebalance", "--kv-memory", "256MiB")


async def measure(rounds: int) -> dict[str, Any]:
    """Run rounds of both ways in alternation."""
    found: dict[str, list[dict[str, Any]]] = {"moved": [], "waited": []}
    with serving(*FLAGS) as daemon:
        await _warm_up(daemon)
        for turn in range(rounds):
            for name in ("moved", "waited") if turn % 2 == 0 else ("waited", "moved"):
                found[name].append(await _round(daemon, turn, moves=name == "moved"))
    return {name: _summary(rows) for name, rows in found.items()}


async def _warm_up(daemon: Daemon) -> None:
    client = Client(daemon)
    for _ in OUTPUTS:
        client.send(PROMPT, 8)
    await client.finish()
    await daemon.until_idle()


async def _round(daemon: Daemon, turn: int, *, moves: bool) -> dict[str, Any]:
    client = Client(daemon, seed=turn)
    asked = [client.send(PROMPT, tokens) for tokens in OUTPUTS]
    await client.until_tokens(asked, WARM)
    before = await asyncio.to_thread(daemon.metric, "llumd:takeovers_total")
    on_it = held((await asyncio.to_thread(daemon.engines))[ENGINE])
    start = perf_counter()
    seconds = await _drain(daemon) if moves else await _wait(daemon)
    unfinished = sum(not o.ended for o in asked)
    outcomes = await client.finish()
    if [o.output_tokens for o in outcomes] != OUTPUTS:
        raise SystemExit("a stream lost tokens")
    if moves:
        await asyncio.to_thread(daemon.call, "POST", f"/v1/engines/{ENGINE}/undrain")
    await daemon.until_idle()
    await daemon.until("both engines serving", lambda rows: all(row["state"] == "serving" for row in rows))
    return {
        "seconds": seconds,
        "requests": on_it,
        "unfinished": unfinished,
        "all_done": max(o.ended for o in outcomes) - start,
        "tpot": statistics.fmean(o.tpot or 0.0 for o in outcomes),
        "longest_gap": statistics.median(max(o.gaps) for o in outcomes),
        "moves": await asyncio.to_thread(daemon.metric, "llumd:takeovers_total") - before,
        "streams": len(outcomes),
    }


async def _drain(daemon: Daemon) -> float:
    """Return the seconds that `llumctl drain` reports until the engine is empty."""
    command = ["-m", "daemon.cli.llumctl", "--run-dir", str(daemon.run_dir), "drain", str(ENGINE)]
    process = await asyncio.create_subprocess_exec(
        sys.executable, *command, "--json", "--within", f"{TIMEOUT:.0f}s", stdout=asyncio.subprocess.PIPE
    )
    out, _ = await process.communicate()
    answer = json.loads(out) if process.returncode == 0 else {}
    if not answer.get("empty"):
        raise SystemExit(f"llumctl drain failed: {out!r}")
    return float(answer["seconds"])


async def _wait(daemon: Daemon) -> float:
    """Return the seconds until the engine has no request, by the same criterion as llumctl's."""
    start = perf_counter()
    await daemon.until("an empty engine", lambda rows: not held(rows[ENGINE]))
    return perf_counter() - start


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]} | {"rounds": rows}


def lines(found: dict[str, Any]) -> list[str]:
    """Return the lines of the table."""
    head = f"drain: {STREAMS} streams an engine, answers of {OUTPUTS[0]} to {OUTPUTS[-1]} tokens (medians)"
    columns = f"{'way':<12}{'rounds':>7}{'empty after s':>15}{'requests':>10}{'moves':>7}{'TPOT ms':>9}"
    table = [head, columns + f"{'longest gap ms':>16}{'all done s':>12}"]
    for name, r in found.items():
        table.append(
            f"{name:<12}{len(r['rounds']):>7}{r['seconds']:>15.2f}{r['requests']:>10.0f}{r['moves']:>7.0f}"
            f"{1e3 * r['tpot']:>9.1f}{1e3 * r['longest_gap']:>16.0f}{r['all_done']:>12.1f}"
        )
    pairs = zip(found["waited"]["rounds"], found["moved"]["rounds"], strict=True)
    gain = statistics.median(waited["seconds"] / moved["seconds"] for waited, moved in pairs)
    streams = sum(row["streams"] for way in found.values() for row in way["rounds"])
    return [*table, f"waiting over moving: {gain:.1f} (median); each of {streams} streams got all its tokens"]
