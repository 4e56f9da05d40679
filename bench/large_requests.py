"""How long others wait while one client sends large requests: /health, and the tokens of a stream.

    python -m bench.large_requests [--seconds 6] [--json FILE]

Starts a daemon with one frontend and stub engines. Quiet and loaded periods alternate. In a loaded one a client sends
bodies of nearly 8 MB one after another: a long prompt, the same to /tokenize, a prompt of random characters and a
body with very many values. The times are wall time, so on a busy machine compare loaded with quiet.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

from bench.live import Daemon, serving
from bench.machine import describe

_SIZE = 7_900_000  # bytes of a body, at most
_PERIODS = 3  # of each kind
_POLL = 0.01  # seconds between two requests to /health


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=6.0, help="length of a period (default 6)")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    bodies = [(path, json.dumps(body).encode()) for path, body in _bodies()]
    found: dict[str, dict[str, list[float]]] = {k: {"health": [], "gap": []} for k in ("quiet", "loaded")}
    sent = 0
    with serving("--engine", "stub", "--stub-step", "0.02", "--frontends", "1") as daemon:
        for _ in range(_PERIODS):
            for kind, times in found.items():
                sent += _period(daemon, args.seconds, bodies if kind == "loaded" else [], times)
    figures = {kind: {name: _summary(times) for name, times in of.items()} for kind, of in found.items()}
    _print(figures, sent)
    if args.json:
        result = {"command": "python -m bench.large_requests", "machine": describe(), "large_requests": sent}
        args.json.write_text(json.dumps(result | figures, indent=2))


def _bodies() -> Iterator[tuple[str, dict[str, Any]]]:
    text = "The quick brown fox jumps over the lazy dog. " * (_SIZE // 45)
    draw = random.Random(1)
    noise = "".join(chr(draw.randrange(0x20, 0x2FFF)) for _ in range(_SIZE // 7))
    yield "/v1/completions", {"prompt": text}
    yield "/tokenize", {"prompt": text}
    yield "/v1/completions", {"prompt": noise}
    yield "/v1/completions", {"prompt": "x", "response_format": [{"a": [1, 2]}] * (_SIZE // 17)}


def _period(daemon: Daemon, seconds: float, bodies: list[tuple[str, bytes]], times: dict[str, list[float]]) -> int:
    """Measure for `seconds`, while `bodies` are sent in turn. Return how many were sent."""
    stop = threading.Event()
    sent: list[int] = []
    work: list[Callable[[], None]] = [
        lambda: _poll_health(daemon, stop, times["health"]),
        lambda: _read_stream(daemon, stop, times["gap"]),
    ]
    if bodies:
        work.append(lambda: _send(daemon, stop, bodies, sent))
    threads = [threading.Thread(target=target) for target in work]
    for thread in threads:
        thread.start()
    time.sleep(seconds)
    stop.set()
    for thread in threads:
        thread.join()
    return len(sent)


def _poll_health(daemon: Daemon, stop: threading.Event, times: list[float]) -> None:
    connection = http.client.HTTPConnection(*daemon.address)
    while not stop.wait(_POLL):
        start = time.perf_counter()
        connection.request("GET", "/health")
        connection.getresponse().read()
        times.append(time.perf_counter() - start)


def _read_stream(daemon: Daemon, stop: threading.Event, gaps: list[float]) -> None:
    response = daemon.post("/v1/completions", {"prompt": "x", "max_tokens": 4000, "stream": True})
    last = 0.0
    while not stop.is_set() and (line := response.readline()):
        if line.startswith(b"data: {"):
            now = time.perf_counter()
            gaps.append(now - last) if last else None
            last = now
    response.close()


def _send(daemon: Daemon, stop: threading.Event, bodies: list[tuple[str, bytes]], sent: list[int]) -> None:
    for path, body in cycle(bodies):
        if stop.is_set():
            return
        connection = http.client.HTTPConnection(*daemon.address)
        connection.request("POST", path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        response.read()
        sent.append(response.status)
        connection.close()


def _summary(times: list[float]) -> dict[str, float]:
    ordered = sorted(times)
    return {
        "count": len(times),
        "median": statistics.median(ordered),
        "p99": ordered[int(0.99 * (len(ordered) - 1))],
        "max": ordered[-1],
    }


def _print(figures: dict[str, dict[str, dict[str, float]]], sent: int) -> None:
    print(f"{sent} large requests; milliseconds of wall time: median, 99 %, longest")
    for name, title in (("health", "/health"), ("gap", "between two tokens of a stream")):
        for kind in figures:
            values = figures[kind][name]
            row = "  ".join(f"{values[k] * 1e3:8.1f}" for k in ("median", "p99", "max"))
            print(f"{title:32} {kind:8} {row}")


if __name__ == "__main__":
    main()
