"""An engine is killed under load: the daemon resumes its requests, or the clients send them again.

Both ways get the same load and the same death. A request that a client sends again first has to generate the tokens
that the client already had. Rebalancing is off, so no other request moves.
"""

from __future__ import annotations

import asyncio
import os
import signal
import statistics
from contextlib import ExitStack
from time import perf_counter
from typing import Any

from bench.live import TIMEOUT, Client, Daemon, serving
from bench.stream import Outcome

STREAMS = 8  # on each engine
PROMPT = 128  # tokens
OUTPUT = 200
RECEIVED = 64  # tokens of each stream before the engine dies
ENGINE = 0
FLAGS = ("--no-rebalance", "--kv-memory", "256MiB")
WAYS = {"resumed": (), "sent again": ("--max-resumes", "0")}


async def measure(rounds: int) -> dict[str, Any]:
    """Run rounds of both ways in alternation, each on its own daemon."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in WAYS}
    with ExitStack() as stack:
        daemons = {name: stack.enter_context(serving(*FLAGS, *flags)) for name, flags in WAYS.items()}
        for turn in range(rounds):
            for name in WAYS if turn % 2 == 0 else reversed(WAYS):
                found[name].append(await _round(daemons[name], turn))
    return {name: _summary(rows) for name, rows in found.items()}


async def _round(daemon: Daemon, turn: int) -> dict[str, Any]:
    client = Client(daemon, seed=turn)
    prompts = [client.prompt(PROMPT) for _ in range(2 * STREAMS)]
    asked = [client.send_body(_body(prompt)) for prompt in prompts]
    await client.until_tokens(asked, RECEIVED)
    where = {row["id"].rsplit("-", 1)[0]: row["engine"] for row in await asyncio.to_thread(daemon.requests)}
    struck = [where[o.id] == ENGINE for o in asked]
    os.kill((await asyncio.to_thread(daemon.engines))[ENGINE]["pid"], signal.SIGKILL)
    killed = perf_counter()
    again = {i: client.send_body(_body(prompts[i])) for i in await _failed(asked, struck, killed)}
    await client.settle()
    if not all(o.ok and o.output_tokens == OUTPUT for o in [again.get(i, o) for i, o in enumerate(asked)]):
        raise SystemExit("an answer is incomplete")
    done = perf_counter() - killed
    await daemon.until("both engines serving", lambda rows: all(row["state"] == "serving" for row in rows))
    await daemon.until_idle()
    pauses = [_pause(o, again.get(i), killed) for i, o in enumerate(asked)]
    return {
        "struck": sum(struck),
        "pause": statistics.median(p for p, hit in zip(pauses, struck, strict=True) if hit),
        "pause_max": max(p for p, hit in zip(pauses, struck, strict=True) if hit),
        "others": statistics.median(p for p, hit in zip(pauses, struck, strict=True) if not hit),
        "all_done": done,
    }


def _body(prompt: list[int]) -> dict[str, Any]:
    return {"prompt": prompt, "max_tokens": OUTPUT, "temperature": 0}


async def _failed(asked: list[Outcome], struck: list[bool], killed: float) -> list[int]:
    """Wait until each affected stream has failed or continued. Return the indices of the failed ones."""
    hit = [i for i, is_hit in enumerate(struck) if is_hit]
    while not all(asked[i].error or asked[i].arrivals[-1] > killed for i in hit):
        if perf_counter() > killed + TIMEOUT:
            raise SystemExit("a stream neither failed nor continued")
        await asyncio.sleep(0.002)
    return [i for i in hit if asked[i].error]


def _pause(first: Outcome, again: Outcome | None, killed: float) -> float:
    """Return the seconds between the last token before the death and the first one after it."""
    if again is not None:
        return again.arrivals[len(first.arrivals)] - first.arrivals[-1]
    at = next((i for i, t in enumerate(first.arrivals) if t > killed), len(first.arrivals) - 1)
    return first.arrivals[at] - first.arrivals[at - 1]


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]} | {"rounds": rows}


def lines(found: dict[str, Any]) -> list[str]:
    """Return the lines of the table."""
    head = (
        f"death: {STREAMS} streams an engine, {PROMPT}+{OUTPUT} tokens, kill -9 after {RECEIVED} (medians of rounds)"
    )
    columns = f"{'way':<12}{'rounds':>7}{'struck':>8}{'pause s':>9}{'most':>8}{'others s':>10}{'all done s':>12}"
    table = [head, columns]
    for name, r in found.items():
        most = max(row["pause_max"] for row in r["rounds"])
        table.append(
            f"{name:<12}{len(r['rounds']):>7}{r['struck']:>8.0f}{r['pause']:>9.2f}{most:>8.2f}"
            f"{r['others']:>10.2f}{r['all_done']:>12.1f}"
        )
    pairs = zip(*(found[name]["rounds"] for name in WAYS), strict=True)
    gain = statistics.median(again["pause"] / resumed["pause"] for resumed, again in pairs)
    return [*table, f"sent again over resumed: {gain:.1f} (median); every answer is complete"]
