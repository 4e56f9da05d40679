"""Tokens a second that one frontend process streams: stub engines, many connections, text out.

    python -m bench.frontend [--connections 256] [--seconds 8] [--json FILE]

Starts a daemon with one frontend and stub engines that emit faster than it can stream, and reads and counts on raw
connections. The result includes everything that a token costs a frontend: ring, journal, detokenising, stop strings,
JSON, SSE, the socket. The CPU time of each process shows which one is the bottleneck.
"""

from __future__ import annotations

import argparse
import json
import os
import selectors
import socket
import time
from pathlib import Path
from typing import Any

from bench.live import Daemon, serving
from bench.machine import describe

TOKENS = "vllm:generation_tokens_total"

_TICK = os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--connections", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=8.0, help="length of the measurement (default 8)")
    parser.add_argument("--engines", type=int, default=2)
    parser.add_argument("--step", type=float, default=0.004, help="step time of a stub engine in seconds")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with serving(*_flags(args)) as daemon:
        figures = _measure(args, daemon)
    _print(figures)
    if args.json:
        args.json.write_text(
            json.dumps({"command": "python -m bench.frontend", "machine": describe()} | figures, indent=2)
        )


def _flags(args: argparse.Namespace) -> list[str]:
    options = {
        "engine": "stub",
        "frontends": "1",
        "devices": ",".join(["cpu"] * args.engines),
        "stub-step": str(args.step),
        "max-num-seqs": "256",
        "max-queued": "4096",
        "journal-memory": "256MiB",
    }
    return [word for name, value in options.items() for word in (f"--{name}", value)]


class Reader:
    """A connection that requests one long stream after another and counts chunks and bytes."""

    def __init__(self, address: tuple[str, int], request: bytes) -> None:
        self.sock = socket.create_connection(address)
        self.sock.setblocking(False)
        self.chunks = self.size = 0
        self._request = request
        self.send()

    def send(self) -> None:
        self.sock.send(self._request)

    def read(self, buffer: bytearray) -> None:
        n = self.sock.recv_into(buffer)
        if n == 0:
            raise SystemExit("the server closed a connection")
        self.size += n
        data = bytes(memoryview(buffer)[:n])
        self.chunks += data.count(b"data: {")
        if data.endswith(b"0\r\n\r\n") and b"[DONE]" in data[-64:]:
            self.send()


def _measure(args: argparse.Namespace, daemon: Daemon) -> dict[str, Any]:
    body = json.dumps(
        {
            "model": daemon.model,
            "prompt": "count",
            "max_tokens": 2000,
            "stream": True,
            "stop": ["never generated"],
            "temperature": 0,
        }
    ).encode()
    lines = ["POST /v1/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    head = "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""])
    readers = [Reader(daemon.address, head.encode() + body) for _ in range(args.connections)]
    selector = selectors.DefaultSelector()
    for reader in readers:
        selector.register(reader.sock, selectors.EVENT_READ, reader)
    buffer = bytearray(1 << 18)
    _pump(selector, buffer, 2.0)
    status = daemon.call("GET", "/v1/status")
    pids = {"frontend": status["frontends"][0]["pid"], "client": os.getpid()}
    pids |= {f"engine {e['engine']}": e["pid"] for e in status["engines"]}
    before = daemon.metric(TOKENS), sum(r.chunks for r in readers), {n: _cpu(p) for n, p in pids.items()}
    start = time.monotonic()
    _pump(selector, buffer, args.seconds)
    wall = time.monotonic() - start
    tokens = daemon.metric(TOKENS) - before[0]
    chunks = sum(r.chunks for r in readers) - before[1]
    busy = {n: (_cpu(p) - before[2][n]) / wall for n, p in pids.items()}
    return {
        "connections": args.connections,
        "tokens_per_second": tokens / wall,
        "chunks_per_second": chunks / wall,
        "frontend_microseconds_per_token": busy["frontend"] * wall / tokens * 1e6,
        "cpu_share": busy,
    }


def _pump(selector: selectors.BaseSelector, buffer: bytearray, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for key, _ in selector.select(0.1):
            key.data.read(buffer)


def _cpu(pid: int) -> float:
    """Return the CPU seconds that a process has used so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / _TICK


def _print(figures: dict[str, Any]) -> None:
    print(f"{figures['tokens_per_second']:,.0f} tokens/s in {figures['chunks_per_second']:,.0f} chunks/s", end="")
    print(f" over {figures['connections']} connections, {figures['frontend_microseconds_per_token']:.1f} µs")
    print("of frontend CPU a token; share of a core: ", end="")
    print(", ".join(f"{name} {share:.0%}" for name, share in figures["cpu_share"].items()))


if __name__ == "__main__":
    main()
