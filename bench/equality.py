"""Effect of migrations on the answers in the default mode, compared with the effect of batching.

    python -m bench.equality [--quick] [--json FILE]

In the default mode an answer can depend on the batch that it is computed in. This benchmark runs the same requests
one at a time, under load, and under load with constant migrations. It counts the answers that differ, and finds their
first different token. In `--deterministic` mode no answer differs: tests/e2e/test_migration.py checks that.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from bench.live import Client, Daemon, serving
from bench.machine import describe
from daemon.cli.admin_client import Refused

AT_ONCE = 24  # requests in flight
OPENING = "The lighthouse keeper wrote in his diary every night, and always began so: "
PAUSE = 0.02  # seconds between two rounds of migrations
ORDERS = 6  # migrations of a round
FLAGS = ("--no-rebalance", "--kv-memory", "512MiB")

Answers = list[list[str]]  # of one run: the tokens of each request


@dataclass(slots=True)
class Difference:
    """Result of comparing pairs of answers: their number, and the first different position of those that differ."""

    compared: int
    firsts: list[int]

    @property
    def share(self) -> float:
        """Share of the pairs that differ."""
        return len(self.firsts) / self.compared


def bodies(count: int) -> list[dict[str, Any]]:
    """Return request bodies: greedy (a third) and seeded, with and without penalties, most with a common prefix."""
    requests = []
    for i in range(count):
        text = f"{OPENING if i % 4 else ''}Number {i}."
        body = {"prompt": text, "max_tokens": 48 + i % 12, "logprobs": i % 4, "seed": i}
        body["temperature"] = float(i % 3 > 0)
        if i % 2:
            body |= {"presence_penalty": 0.4, "frequency_penalty": 0.3}
        requests.append(body)
    return requests


async def run(daemon: Daemon, asked: Sequence[dict[str, Any]], name: str, at_once: int) -> Answers:
    """Send all requests, at most `at_once` at the same time. The salt gives each run a separate prefix cache."""
    gate = asyncio.Semaphore(at_once)

    async def one(body: dict[str, Any]) -> list[str]:
        async with gate:
            client = Client(daemon)
            client.send_body(body | {"cache_salt": name})
            [outcome] = await client.finish()
            return outcome.tokens

    return await asyncio.gather(*map(one, asked))


async def shuffle(daemon: Daemon, rng: Random) -> None:
    """Migrate random requests to the other of two engines, until cancelled."""
    while True:
        rows = await asyncio.to_thread(daemon.requests)
        for row in rng.sample(rows, min(ORDERS, len(rows))):
            try:
                await asyncio.to_thread(daemon.migrate, row["id"], 1 - row["engine"])
            except Refused:
                continue  # the request has ended
        await asyncio.sleep(PAUSE)


async def run_moved(daemon: Daemon, asked: Sequence[dict[str, Any]], name: str) -> Answers:
    """Send all requests under load, with constant migrations."""
    moving = asyncio.create_task(shuffle(daemon, Random(name)))
    try:
        return await run(daemon, asked, name, AT_ONCE)
    finally:
        moving.cancel()


def compare(pairs: Iterable[tuple[Answers, Answers]]) -> Difference:
    """Compare all answers of each pair of runs."""
    found = Difference(0, [])
    for one, other in pairs:
        for a, b in zip(one, other, strict=True):
            found.compared += 1
            if a != b:
                alike = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False))
                found.firsts.append(sum(1 for _ in alike))
    return found


async def measure(count: int, rounds: int) -> dict[str, Any]:
    """Run the requests one at a time, then alternate runs under load without and with migrations."""
    asked = bodies(count)
    loaded: list[Answers] = []
    moved: list[Answers] = []
    with serving(*FLAGS) as daemon:
        alone = await run(daemon, asked, "alone", 1)
        for turn in range(rounds):
            loaded.append(await run(daemon, asked, f"loaded {turn}", AT_ONCE))
            moved.append(await run_moved(daemon, asked, f"moved {turn}"))
        takeovers = await asyncio.to_thread(daemon.metric, "llumd:takeovers_total")
    compared = {
        "alone, loaded": compare((alone, each) for each in loaded),
        "alone, moved": compare((alone, each) for each in moved),
        "loaded, loaded again": compare(itertools.combinations(loaded, 2)),
        "loaded, moved": compare(itertools.product(loaded, moved)),
    }
    return {
        "requests": count,
        "rounds": rounds,
        "moves_per_request": takeovers / count / rounds,
        "differing": {name: _described(each, count) for name, each in compared.items()},
    }


def _described(found: Difference, count: int) -> dict[str, Any]:
    """Return a comparison as JSON figures.

    `noise`: two standard errors of the share with `count` requests (pairs of the same request are not independent).
    """
    noise = 2 * (found.share * (1 - found.share) / count) ** 0.5
    first = statistics.median(found.firsts) if found.firsts else None
    return {"compared": found.compared, "share": found.share, "noise": noise, "first_difference": first}


def lines(found: dict[str, Any]) -> list[str]:
    """Return the lines of the table."""
    head = f"{found['requests']} requests, {AT_ONCE} at once, {found['moves_per_request']:.1f} moves per request"
    table = [head, f"{'runs':<24}{'compared':>9}{'differ':>9}{'noise':>8}{'first at token':>16}"]
    for name, r in found["differing"].items():
        first = "-" if r["first_difference"] is None else f"{r['first_difference']:.0f}"
        table.append(f"{name:<24}{r['compared']:>9}{r['share']:>9.1%}{'±' + format(r['noise'], '.1%'):>8}{first:>16}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few requests: less than a minute")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()
    figures: dict[str, Any] = {"command": "python -m bench.equality", "machine": describe()}
    figures |= asyncio.run(measure(24, 2) if args.quick else measure(96, 3))
    print("\n".join(lines(figures)))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
