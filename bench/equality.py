"""In the default mode an answer depends on the batch it is computed in. Does it depend on moves more than on that?

    python -m bench.equality [--quick] [--json FILE]

The same requests one at a time, under load, and under load while each is moved about; how many answers differ, and
from which token on. In `--deterministic` mode none does: that is tests/e2e/test_migration.py's to show.
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
from daemon.cli.llumctl import Refused

AT_ONCE = 24  # requests in flight
OPENING = "The lighthouse keeper wrote in his diary every night, and always began so: "
PAUSE = 0.02  # seconds between two rounds of orders
ORDERS = 6  # in a round
FLAGS = ("--no-rebalance", "--kv-memory", "512MiB")

Answers = list[list[str]]  # of a run: each request's tokens


@dataclass(slots=True)
class Difference:
    """Answers compared in pairs: how many there were, and the first differing position of those that differ."""

    compared: int
    firsts: list[int]

    @property
    def share(self) -> float:
        return len(self.firsts) / self.compared


def bodies(count: int) -> list[dict[str, Any]]:
    """Greedy (a third) and seeded, with and without penalties, most with a common beginning."""
    made = []
    for i in range(count):
        text = f"{OPENING if i % 4 else ''}Number {i}."
        body = {"prompt": text, "max_tokens": 48 + i % 12, "logprobs": i % 4, "seed": i}
        body["temperature"] = float(i % 3 > 0)
        if i % 2:
            body |= {"presence_penalty": 0.4, "frequency_penalty": 0.3}
        made.append(body)
    return made


async def run(daemon: Daemon, asked: Sequence[dict[str, Any]], name: str, at_once: int) -> Answers:
    """All of them, `at_once` in flight. Each run has a prefix cache of its own, by a salt."""
    gate = asyncio.Semaphore(at_once)

    async def one(body: dict[str, Any]) -> list[str]:
        async with gate:
            client = Client(daemon)
            client.ask(body | {"cache_salt": name})
            [outcome] = await client.finish()
            return outcome.tokens

    return await asyncio.gather(*map(one, asked))


async def shuffle(daemon: Daemon, chance: Random) -> None:
    """Order random requests to the other of two engines, until cancelled."""
    while True:
        rows = await asyncio.to_thread(daemon.requests)
        for row in chance.sample(rows, min(ORDERS, len(rows))):
            try:
                await asyncio.to_thread(daemon.migrate, row["id"], 1 - row["engine"])
            except Refused:
                continue  # it has ended
        await asyncio.sleep(PAUSE)


async def run_moved(daemon: Daemon, asked: Sequence[dict[str, Any]], name: str) -> Answers:
    """Under load, with moves all the time."""
    moving = asyncio.create_task(shuffle(daemon, Random(name)))
    try:
        return await run(daemon, asked, name, AT_ONCE)
    finally:
        moving.cancel()


def compare(pairs: Iterable[tuple[Answers, Answers]]) -> Difference:
    """All answers of each pair of runs."""
    found = Difference(0, [])
    for one, other in pairs:
        for a, b in zip(one, other, strict=True):
            found.compared += 1
            if a != b:
                alike = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False))
                found.firsts.append(sum(1 for _ in alike))
    return found


async def measure(count: int, rounds: int) -> dict[str, Any]:
    """Loaded and moved runs in turn, after one of the requests one at a time."""
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
    """`noise`: two standard errors of the share in so many requests (pairs of the same one are not independent)."""
    noise = 2 * (found.share * (1 - found.share) / count) ** 0.5
    first = statistics.median(found.firsts) if found.firsts else None
    return {"compared": found.compared, "share": found.share, "noise": noise, "first_difference": first}


def lines(found: dict[str, Any]) -> list[str]:
    """The table."""
    head = f"{found['requests']} requests, {AT_ONCE} at once, {found['moves_per_request']:.1f} moves a request"
    table = [head, f"{'runs':<24}{'compared':>9}{'differ':>9}{'noise':>8}{'first at token':>16}"]
    for name, r in found["differing"].items():
        first = "-" if r["first_difference"] is None else f"{r['first_difference']:.0f}"
        table.append(f"{name:<24}{r['compared']:>9}{r['share']:>9.1%}{'±' + format(r['noise'], '.1%'):>8}{first:>16}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few requests: under a minute")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    args = parser.parse_args()
    figures: dict[str, Any] = {"command": "python -m bench.equality", "machine": describe()}
    figures |= asyncio.run(measure(24, 2) if args.quick else measure(96, 3))
    print("\n".join(lines(figures)))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
