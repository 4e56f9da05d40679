"""How many tokens a second one frontend process streams: stub engines, many connections, text out.

    python -m bench.frontend [--connections 256] [--seconds 8] [--json FILE]

Starts a daemon with one frontend and stub engines that emit faster than it can stream, opens raw connections that
read and count, and divides. Everything a token costs a frontend is in it: ring, journal, detokenising, stop
strings, JSON, SSE, the socket. The CPU time of each process says who was the limit.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.machine import describe

_TICK = os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--connections", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=8.0, help="length of the measurement (default 8)")
    parser.add_argument("--engines", type=int, default=2)
    parser.add_argument("--step", type=float, default=0.004, help="step time of a stub engine in seconds")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as run_dir:
        daemon, address, model = _start(args, run_dir)
        try:
            figures = _measure(args, address, model, run_dir)
        finally:
            daemon.send_signal(signal.SIGTERM)
            daemon.wait(30)
    _print(figures)
    if args.json:
        args.json.write_text(
            json.dumps({"command": "python -m bench.frontend", "machine": describe()} | figures, indent=2)
        )


def _start(args: argparse.Namespace, run_dir: str) -> tuple[subprocess.Popen[str], tuple[str, int], str]:
    options = {
        "engine": "stub",
        "devices": ",".join(["cpu"] * args.engines),
        "stub-step": str(args.step),
        "max-num-seqs": "512",
        "port": "0",
        "run-dir": run_dir,
        "max-queued": "4096",
        "journal-memory": "256MiB",
        "drain-timeout": "1s",
    }
    flags = [word for name, value in options.items() for word in (f"--{name}", value)]
    command = [sys.executable, "-m", "daemon.cli.llumd", "serve", *flags]
    daemon = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert daemon.stdout is not None
    line = daemon.stdout.readline()
    found = re.search(r"serves (\S+) at http://([\d.]+):(\d+)", line)
    if not found:
        raise SystemExit(f"the daemon did not start: {line!r}")
    return daemon, (found[2], int(found[3])), found[1]


class Reader:
    """A connection that asks for one long stream after another and counts what comes."""

    def __init__(self, address: tuple[str, int], request: bytes) -> None:
        self.sock = socket.create_connection(address)
        self.sock.setblocking(False)
        self.chunks = self.size = 0
        self._request = request
        self.ask()

    def ask(self) -> None:
        self.sock.send(self._request)

    def read(self, buffer: bytearray) -> None:
        n = self.sock.recv_into(buffer)
        if n == 0:
            raise SystemExit("the server closed a connection")
        self.size += n
        data = bytes(memoryview(buffer)[:n])
        self.chunks += data.count(b"data: {")
        if data.endswith(b"0\r\n\r\n") and b"[DONE]" in data[-64:]:
            self.ask()


def _measure(args: argparse.Namespace, address: tuple[str, int], model: str, run_dir: str) -> dict[str, Any]:
    body = json.dumps(
        {
            "model": model,
            "prompt": "count",
            "max_tokens": 2000,
            "stream": True,
            "stop": ["never said"],
            "temperature": 0,
        }
    ).encode()
    lines = ["POST /v1/completions HTTP/1.1", "Host: bench", "Content-Type: application/json"]
    head = "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""])
    readers = [Reader(address, head.encode() + body) for _ in range(args.connections)]
    selector = selectors.DefaultSelector()
    for reader in readers:
        selector.register(reader.sock, selectors.EVENT_READ, reader)
    buffer = bytearray(1 << 18)
    _pump(selector, buffer, 2.0)
    status = _status(run_dir)
    pids = {"frontend": status["frontends"][0]["pid"], "client": os.getpid()}
    pids |= {f"engine {e['engine']}": e["pid"] for e in status["engines"]}
    before = _generated(address), sum(r.chunks for r in readers), {n: _cpu(p) for n, p in pids.items()}
    start = time.monotonic()
    _pump(selector, buffer, args.seconds)
    wall = time.monotonic() - start
    tokens = _generated(address) - before[0]
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


def _status(run_dir: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "daemon.cli.llumctl", "--run-dir", run_dir, "status", "--json"]
    return json.loads(subprocess.run(command, capture_output=True, check=True).stdout)


def _generated(address: tuple[str, int]) -> float:
    """Tokens that the frontend has delivered, from /metrics."""
    with socket.create_connection(address) as sock:
        sock.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        text = b"".join(iter(lambda: sock.recv(65536), b"")).decode()
    found = re.search(r"^vllm:generation_tokens_total\{[^}]*\} (\S+)", text, re.M)
    assert found is not None
    return float(found[1])


def _cpu(pid: int) -> float:
    """CPU seconds of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / _TICK


def _print(figures: dict[str, Any]) -> None:
    print(f"{figures['tokens_per_second']:,.0f} tokens/s in {figures['chunks_per_second']:,.0f} chunks/s", end="")
    print(f" over {figures['connections']} connections, {figures['frontend_microseconds_per_token']:.1f} µs")
    print("of frontend CPU a token; share of a core: ", end="")
    print(", ".join(f"{name} {share:.0%}" for name, share in figures["cpu_share"].items()))


if __name__ == "__main__":
    main()
