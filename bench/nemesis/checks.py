"""What must be as before once the load has ended: nothing leaks."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

from bench.nemesis.daemon import Daemon

CALM_WAIT = 90.0  # seconds until the daemon is as at its start: an engine that died often waits half a minute
HELD = ("running", "waiting", "incoming", "outgoing", "kv_used_blocks")  # in an engine's status row


@dataclass(frozen=True)
class Footing:
    """What a daemon without load holds."""

    names: frozenset[str]  # of the processes
    children: int
    supervisor: Counter[str]  # its descriptors, by what they lead to
    segments: int  # different ones that the supervisor has open
    files: int  # of this daemon in /dev/shm


def footing(daemon: Daemon) -> Footing:
    """Return what the daemon holds now."""
    paths = daemon.descriptors(daemon.process.pid)
    return Footing(
        frozenset(daemon.pids()),
        len(daemon.children()),
        Counter(re.sub(r"[0-9a-f]{16}|\d+", "#", path) for path in paths),
        len({path for path in paths if "llumd-" in path}),
        len(list(Path("/dev/shm").glob(f"llumd-{daemon.process.pid}-*"))),
    )


async def await_calm(daemon: Daemon, names: frozenset[str] | None, timeout: float = CALM_WAIT) -> list[str]:
    """Wait until every process serves and nothing runs. Return what is not so at the end.

    `names`: of the processes that must run; None: any, with a standby.
    """
    end = monotonic() + timeout
    while True:
        missing = await _unrest(daemon, names)
        if not missing or monotonic() > end:
            return missing
        await asyncio.sleep(0.2)


async def _unrest(daemon: Daemon, names: frozenset[str] | None) -> list[str]:
    status = await daemon.call("GET", "/v1/status")
    requests = await daemon.call("GET", "/v1/requests")
    if status is None or requests is None:
        return ["the coordinator does not answer"]
    found = []
    for row in [*status["engines"], *status["frontends"], status["coordinator"]]:
        if row["state"] != "serving":
            found.append(f"a process is {row['state']}: {_name(row)}")
    for row in status["engines"]:
        held = {name: row[name] for name in HELD if row.get(name)}
        if held:
            found.append(f"engine {row['engine']} holds {held}")
        if "not_open" in row.get("peer_pools", {}).values():
            found.append(f"engine {row['engine']} has not opened all pools")
    if requests["requests"]:
        found.append(f"{len(requests['requests'])} requests run: {[r['id'] for r in requests['requests'][:5]]}")
    if slots := daemon.memory.journal_slots():
        found.append(f"{slots} journal slots are not free")
    if slots := daemon.memory.outbox_slots():
        found.append(f"{slots} outbox slots are not free")
    running = frozenset(daemon.pids())
    if names is not None and running != names:
        found.append(f"processes: {sorted(running)} instead of {sorted(names)}")
    if names is None and "standby frontend" not in running:
        found.append("there is no standby frontend")
    return found


def _name(row: dict[str, Any]) -> str:
    return next((f"{key} {row[key]}" for key in ("engine", "frontend") if key in row), "coordinator")


async def leaks(daemon: Daemon, before: Footing, connections: dict[str, int]) -> list[str]:
    """Return what the daemon holds more, or less, than before. It must be calm, and all clients gone.

    `connections`: TCP connections of each process that had any before.
    """
    found = await await_calm(daemon, before.names)
    end = monotonic() + 20.0
    while (now := footing(daemon)) != before and monotonic() < end:
        await asyncio.sleep(0.5)
    if now.children != before.children:
        found.append(f"{now.children} children instead of {before.children}")
    if now.supervisor != before.supervisor:
        more, less = now.supervisor - before.supervisor, before.supervisor - now.supervisor
        found.append(f"descriptors of the supervisor: more {dict(more)}, less {dict(less)}")
    if now.segments != before.segments:
        found.append(f"{now.segments} segments instead of {before.segments}")
    if now.files:
        found.append(f"{now.files} files in /dev/shm")
    for name, count in tcp_connections(daemon).items():
        if count > connections.get(name, 0):
            found.append(f"{name} has {count} TCP connections")
    return found


def tcp_connections(daemon: Daemon) -> dict[str, int]:
    """Return the number of TCP connections that each process of the daemon has open, if any."""
    inodes = set()
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        words = line.split()
        if words[3] != "0A":  # all states but LISTEN
            inodes.add(words[9])
    found = {}
    for name, pid in (daemon.pids() | {"supervisor": daemon.process.pid}).items():
        sockets = [path[8:-1] for path in daemon.descriptors(pid) if path.startswith("socket:[")]
        if count := len(inodes.intersection(sockets)):
            found[name] = count
    return found


async def end(daemon: Daemon) -> list[str]:
    """Stop the daemon; return what is wrong with its end."""
    pids = [*daemon.children(), daemon.process.pid]
    daemon.process.terminate()
    try:
        code = await asyncio.to_thread(daemon.process.wait, 40)
    except Exception as e:
        return [f"it does not stop: {e}"]
    found = [f"exit code {code}"] if code else []
    await asyncio.sleep(1.0)
    if left := [pid for pid in pids if _runs(pid)]:
        found.append(f"processes are left: {left}")
    if "Traceback" in daemon.log:
        at = daemon.log.index("Traceback")
        found.append(f"a traceback in the log: {daemon.log[at : at + 1500]}")
    return found


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
