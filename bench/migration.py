"""Cost of the migration of a running request: its pause, and the slow-down of other requests.

    python -m bench.migration [--quick] [--json FILE]

Starts a daemon with two engines on the demo model and orders moves over its admin socket. bench/README.md explains
each number.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from bench.live import TIMEOUT, Daemon, serving
from bench.machine import describe

WAYS = ("live", "blocking", "recompute")
POLL = 0.015  # seconds between two reads of a request's owner; each read delays all processes by 1 or 2 ms
SETTLE = 8  # tokens between two moves, from which the stream's undisturbed gaps are measured
BAR = 2.0  # decode steps that a live move may pause its request
# A prefix that the destination has cached is not copied, so moves back and forth would cost nothing.
FLAGS = ("--no-rebalance", "--no-prefix-caching", "--kv-memory", "512MiB", "--journal-memory", "64MiB")
TEXT = "The river rose for three days before people in the valley thought of counting the boats. "


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured. `moves`: for each way and length; `seconds`: length of a slow-down window."""

    lengths: Sequence[int]
    moves: dict[str, int]
    windows: int
    seconds: float


FULL = Plan((256, 512, 1024, 2048, 4096), {"live": 8, "blocking": 4, "recompute": 2}, 3, 3.0)
QUICK = Plan((256, 1024), {"live": 5, "blocking": 2, "recompute": 1}, 1, 3.0)


@dataclass(frozen=True, slots=True)
class Move:
    """One move as the client and an operator saw it. Times in seconds."""

    gap: float  # between the two tokens around the change of engine
    took: float  # from the order to the change of engine
    nbytes: int  # of KV, copied by the source


# -- a client ----------------------------------------------------------------------------------


class Stream:
    """A streamed answer, read by a thread that records the arrival time of each token (`times`, seconds)."""

    def __init__(self, daemon: Daemon, prompt: list[int]) -> None:
        self.times: list[float] = []
        self.name = ""
        self.ended = ""
        asked = {"prompt": prompt, "max_tokens": 3000, "temperature": 0, "ignore_eos": True, "stream": True}
        self._response = daemon.post("/v1/completions", asked)
        self._leave = False
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def wait(self, ready: Callable[[], bool]) -> None:
        """Wait until `ready()` is true; it becomes true with a token."""
        end = perf_counter() + TIMEOUT
        while not ready():
            if self.ended or perf_counter() > end:
                raise SystemExit(f"a stream stopped: {self.ended or 'no token arrived'}")
            time.sleep(0.002)

    def wait_tokens(self, count: int) -> None:
        """Wait for `count` more tokens."""
        goal = len(self.times) + count
        self.wait(lambda: len(self.times) >= goal)

    def leave(self) -> None:
        """Disconnect, which ends the request."""
        self._leave = True
        self._thread.join(TIMEOUT)
        self._response.close()

    def _read(self) -> None:
        for line in self._response:
            if self._leave:
                return
            if not line.startswith(b"data: {"):
                continue
            event, now = json.loads(line[6:]), perf_counter()
            if "choices" not in event:
                break
            self.name = event["id"]
            if event["choices"][0]["text"]:
                self.times.append(now)
        self.ended = f"it ended with {line!r}"


def gaps(times: Sequence[float], start: float, end: float) -> list[float]:
    """Return the seconds between consecutive tokens that both arrived within [start, end]."""
    inside = [t for t in times if start <= t <= end]
    return [b - a for a, b in itertools.pairwise(inside)]


def gap_around(times: Sequence[float], start: float, end: float) -> float:
    """Return the longest gap that overlaps [start, end]."""
    return max(b - a for a, b in itertools.pairwise(times) if a <= end and b >= start)


# -- moves -------------------------------------------------------------------------------------


def move(daemon: Daemon, stream: Stream, how: str) -> Move:
    """Migrate the stream's request to the other engine and wait until it decodes there."""
    here, before = daemon.engine_of(stream.name), daemon.total("migrated_bytes")
    ordered = asked = perf_counter()
    daemon.migrate(stream.name, 1 - here, how)
    while True:
        look = perf_counter()
        if daemon.engine_of(stream.name) != here:
            break
        if look - ordered > TIMEOUT:
            raise SystemExit(f"a {how} migration did not end")
        asked = look  # the owner changes after this time
        time.sleep(POLL)
    seen = perf_counter()
    stream.wait(lambda: stream.times[-1] > seen)
    stream.wait_tokens(2)
    return Move(gap_around(stream.times, asked, seen), seen - ordered, daemon.total("migrated_bytes") - before)


def measure_length(daemon: Daemon, plan: Plan, prompt: list[int]) -> dict[str, Any]:
    """Migrate one request of that length between idle engines, the ways in turn."""
    stream = Stream(daemon, prompt)
    stream.wait(lambda: len(stream.times) > 2 * SETTLE)
    calm: list[float] = []
    moves: dict[str, list[Move]] = {how: [] for how in WAYS}
    for turn in range(max(plan.moves.values())):
        for how in [how for how in WAYS if turn < plan.moves[how]]:
            start = perf_counter()
            stream.wait_tokens(SETTLE)
            calm += gaps(stream.times, start, perf_counter())
            moves[how].append(move(daemon, stream, how))
    stream.leave()
    itl = statistics.median(calm)
    row: dict[str, Any] = {"prompt_tokens": len(prompt), "output_tokens": len(stream.times), "itl": itl}
    return row | {"itl_p90": _quantile(calm, 0.9)} | {how: summary(moves[how], itl) for how in WAYS}


def summary(moves: Sequence[Move], itl: float) -> dict[str, Any]:
    """Return pauses in seconds and in decode steps, and bytes and duration of a migration."""
    pauses = [m.gap - itl for m in moves]
    return {
        "moves": len(moves),
        "pause": statistics.median(pauses),
        "pause_max": max(pauses),
        "pause_steps": statistics.median(pauses) / itl,
        "pause_steps_p25": _quantile(pauses, 0.25) / itl,
        "pause_steps_max": max(pauses) / itl,
        "pauses": pauses,
        "bytes": statistics.median([m.nbytes for m in moves]),
        "took": statistics.median([m.took for m in moves]),
    }


# -- other requests --------------------------------------------------------------------------------


def measure_others(daemon: Daemon, plan: Plan, prompt: list[int], text: list[int], batch: int) -> dict[str, Any]:
    """Measure `batch` requests that decode on each engine while one more stays, or moves all the time."""
    others = [Stream(daemon, text[i : i + 256]) for i in range(2 * batch)]
    for stream in others:
        stream.wait(lambda s=stream: len(s.times) > 2)  # type: ignore[misc]
    moving = Stream(daemon, prompt)
    moving.wait(lambda: len(moving.times) > SETTLE)
    placed = [daemon.engine_of(stream.name) for stream in others]
    found: dict[str, dict[str, list[Any]]] = {
        how: {"itl": [], "own": [], "moves": [], "seconds": []} for how in ("still", "live", "blocking")
    }
    for _ in range(plan.windows):
        for how in ("still", "live", "still", "blocking"):
            _window(daemon, plan.seconds, how, moving, others, found[how])
            if how == "still":  # half of the time on each engine
                move(daemon, moving, "live")
                _window(daemon, plan.seconds, how, moving, others, found[how])
    for stream in [*others, moving]:
        stream.leave()
    still = found["still"]
    result: dict[str, Any] = {"batch": [placed.count(0), placed.count(1)], "traveller_tokens": len(prompt)}
    result["itl"] = statistics.median(still["itl"])
    result["itl_mean"], result["itl_p99"] = statistics.fmean(still["itl"]), _quantile(still["itl"], 0.99)
    own = statistics.median(still["own"])
    for how in ("live", "blocking"):
        seen, moves = found[how], found[how]["moves"]
        result[how] = summary(moves, own) | {
            "itl_ratio": statistics.median(seen["itl"]) / result["itl"],
            "itl_mean_ratio": statistics.fmean(seen["itl"]) / result["itl_mean"],
            "itl_p99_ratio": _quantile(seen["itl"], 0.99) / result["itl_p99"],
            "moves_per_second": len(moves) / sum(seen["seconds"]),
            "bytes_per_second": sum(m.nbytes for m in moves) / sum(seen["seconds"]),
        }
    return result


def _window(
    daemon: Daemon, seconds: float, how: str, moving: Stream, others: Sequence[Stream], found: dict[str, list[Any]]
) -> None:
    start = perf_counter()
    while perf_counter() - start < seconds:
        if how == "still":  # read the owner as often as `move` does, so that the reads do not count as its cost
            daemon.engine_of(moving.name)
            time.sleep(POLL)
        else:
            found["moves"].append(move(daemon, moving, how))
    end = perf_counter()
    found["seconds"].append(end - start)
    found["own"] += gaps(moving.times, start, end)
    for stream in others:
        found["itl"] += gaps(stream.times, start, end)


def _quantile(values: Sequence[float], q: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


# -- report --------------------------------------------------------------------------------


def _print_length(row: dict[str, Any]) -> None:
    for how in WAYS:
        r = row[how]
        print(
            f"{row['prompt_tokens']:>6}  {how:<9} {r['moves']:>5}"
            f"  {r['pause'] * 1e3:8.1f}  {r['pause_max'] * 1e3:8.1f}"
            f"  {r['pause_steps_p25']:6.2f}  {r['pause_steps']:6.2f}  {r['pause_steps_max']:6.2f}"
            f"  {r['bytes'] / 1e6:7.1f}  {r['took'] * 1e3:8.0f}  {row['itl'] * 1e3:6.1f}",
            flush=True,
        )


def _print_others(row: dict[str, Any]) -> None:
    print(f"\n{row['batch']} others on the engines, ITL {row['itl'] * 1e3:.1f} ms median; ", end="")
    print(f"one of {row['traveller_tokens']} tokens moves all the time:")
    for how in ("live", "blocking"):
        r = row[how]
        print(
            f"  {how:<9} {r['moves_per_second']:.1f} moves/s, {r['bytes_per_second'] / 1e6:.0f} MB/s: others' ITL"
            f" x{r['itl_ratio']:.2f} median, x{r['itl_mean_ratio']:.2f} mean, x{r['itl_p99_ratio']:.2f} p99;"
            f" its own pause {r['pause'] * 1e3:.1f} ms = {r['pause_steps']:.2f} steps"
            f" (p25 {r['pause_steps_p25']:.2f}, most {r['pause_steps_max']:.2f})"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two lengths, few moves: under a minute")
    parser.add_argument("--batch", type=int, default=4, help="other requests on each engine (default 4)")
    parser.add_argument(
        "--option", action="append", default=[], help="option of the daemon, e.g. --option=--dtype=fp32"
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    plan = QUICK if args.quick else FULL
    figures: dict[str, Any] = {"command": "python -m bench.migration", "machine": describe()}
    figures["options"] = args.option
    print("tokens  way       moves  pause ms    max ms  st.p25   steps     max       MB  order ms  ITL ms")
    with serving(*FLAGS, *args.option) as daemon:
        text = daemon.tokenize(TEXT * (max(plan.lengths) // 15))
        figures["lengths"] = []
        for length in plan.lengths:
            figures["lengths"].append(measure_length(daemon, plan, text[:length]))
            _print_length(figures["lengths"][-1])
        figures["others"] = measure_others(daemon, plan, text[:1024], text, args.batch)
    _print_others(figures["others"])
    rows = [*figures["lengths"], figures["others"]]
    figures["bar"] = {
        "steps": BAR,
        "median_within": all(row["live"]["pause_steps"] <= BAR for row in rows),
        "all_within": all(row["live"]["pause_steps_max"] <= BAR for row in rows),
    }
    print(f"live pauses within {BAR:g} decode steps: medians {figures['bar']['median_within']}", end="")
    print(f", every one {figures['bar']['all_within']}")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
