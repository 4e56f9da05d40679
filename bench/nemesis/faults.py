"""Carries out a schedule of faults on a running daemon."""

from __future__ import annotations

import asyncio
import contextlib
import json
import mmap
import os
import signal
import socket
import sys
from collections import Counter
from collections.abc import Coroutine
from dataclasses import dataclass, field
from random import Random
from time import monotonic
from typing import Any
from urllib.parse import urlsplit

from bench.nemesis.daemon import Daemon
from bench.nemesis.requests import TEXT, TOKEN_IDS
from bench.nemesis.schedule import STANDBY, SUPERVISOR, Fault, Kind
from bench.nemesis.steps import ARMED, HIT, NUMBERS, STEPS

TARGET_WAIT = 20.0  # seconds to wait for a process that is down
STANDBY_WAIT = 1.0  # the same for the standby, which is down most of the time
STEP_WAIT = 5.0  # seconds for a process to come to a step
HANG_WAIT = 75.0  # seconds for the supervisor to kill a process that hangs
ORDER_WAIT = 60.0  # seconds until an engine must take requests again
FLOODS: dict[str, tuple[int, dict[str, Any]]] = {  # by what fills up: number of clients, and what each asks for
    "journal": (12, {"n": 4, "max_tokens": 400, "logprobs": 5}),
    "outbox": (160, {"max_tokens": 150}),
}


@dataclass
class Strike:
    """A fault as it was carried out. Times are CLOCK_MONOTONIC. `struck`: names of the processes, with pids.

    `responses`: x-request-ids of those in the outboxes when a process was struck, with their frontends.
    """

    fault: Fault
    begun: float
    struck: dict[str, int] = field(default_factory=dict)
    at: float = 0.0
    responses: dict[str, int] = field(default_factory=dict)
    standby: bool = False  # there was one when the process was struck
    missed: str = ""  # why nothing happened

    def __str__(self) -> str:
        struck = ", ".join(f"{name} (pid {pid})" for name, pid in self.struck.items())
        return f"{self.begun:.3f} {self.fault}: {self.missed or struck or 'done'}"


class Nemesis:
    """Strikes a daemon, one fault after the other; what takes time goes on in the background."""

    def __init__(self, daemon: Daemon, seed: int, *, verbose: bool = False) -> None:
        self._verbose = verbose
        self.strikes: list[Strike] = []
        self.restarts: Counter[int] = Counter()  # by the exit code of llumctl
        self.failures: list[str] = []
        self._daemon = daemon
        self._seed = seed
        self._steps = daemon.home / "steps"
        self._tasks: set[asyncio.Task[None]] = set()
        with open(self._steps / ARMED, "r+b") as file:
            self._armed = mmap.mmap(file.fileno(), 0)

    async def run(self, faults: list[Fault]) -> None:
        """Carry out all faults, and wait for the end of what goes on in the background.

        Raises SystemExit if the daemon has ended: no fault may end the supervisor.
        """
        for fault in faults:
            await asyncio.sleep(fault.gap)
            if (code := self._daemon.process.poll()) is not None:
                log = self._daemon.log[-4000:]
                raise SystemExit(f"the daemon ended with exit code {code} after {len(self.strikes)} faults:\n{log}")
            strike = Strike(fault, monotonic())
            self.strikes.append(strike)
            await self._strike(strike)
            if self._verbose:
                print(strike, file=sys.stderr, flush=True)
        while self._tasks:
            await asyncio.wait(self._tasks)

    def _background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda t: t.cancelled() or t.result())

    async def _strike(self, strike: Strike) -> None:
        fault = strike.fault
        match fault.kind:
            case Kind.KILL:
                await self._signal(strike, signal.SIGKILL)
            case Kind.PAUSE:
                for pidfd in await self._signal(strike, signal.SIGSTOP):
                    self._background(self._go_on(pidfd, fault.seconds))
            case Kind.HANG:
                for pidfd in await self._signal(strike, signal.SIGSTOP):
                    self._background(self._until_killed(pidfd, strike))
            case Kind.STEP_KILL | Kind.STEP_PAUSE:
                if self._armed[NUMBERS[fault.step]]:
                    strike.missed = "this step is armed already"
                else:
                    self._background(self._at_step(strike))
            case Kind.RESTART:
                self._background(self._restart(fault.targets[0]))
            case Kind.DRAIN:
                self._background(self._order(strike, "drain", "undrain", "serving"))
            case Kind.PARK:
                self._background(self._order(strike, "park", "wake", "serving"))
            case Kind.FLOOD:
                self._background(self._flood(fault))

    # -- signals ------------------------------------------------------------------------------------

    async def _signal(self, strike: Strike, number: signal.Signals) -> list[int]:
        """Send a signal to the targets, all at once. Return a pidfd of each that got it."""
        strike.struck = await self._find(strike.fault.targets)
        if not strike.struck:
            strike.missed = "no target runs"
        pidfds = []
        for pid in strike.struck.values():
            with contextlib.suppress(ProcessLookupError):
                pidfds.append(os.pidfd_open(pid))
        self._note(strike)
        for pidfd in pidfds:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, number)
        if number is signal.SIGSTOP:
            return pidfds
        for pidfd in pidfds:
            os.close(pidfd)
        return []

    def _note(self, strike: Strike) -> None:
        strike.responses = self._daemon.memory.guarded()
        strike.standby = STANDBY in self._daemon.pids()
        strike.at = monotonic()

    async def _find(self, names: tuple[str, ...]) -> dict[str, int]:
        """Return the pids of the targets that run, of one at least if it comes up in time."""
        end = monotonic() + (STANDBY_WAIT if names == (STANDBY,) else TARGET_WAIT)
        while True:
            pids = self._daemon.pids() | {SUPERVISOR: self._daemon.process.pid}
            found = {name: pids[name] for name in names if name in pids}
            if len(names) == 1 and not found and names[0].startswith("engine"):
                found = dict(sorted(item for item in pids.items() if item[0].startswith("engine"))[:1])
            if found or monotonic() > end:
                return found
            await asyncio.sleep(0.02)

    async def _go_on(self, pidfd: int, seconds: float) -> None:
        await asyncio.sleep(seconds)
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGCONT)
        os.close(pidfd)

    async def _until_killed(self, pidfd: int, strike: Strike) -> None:
        """Wait until the supervisor has killed the process, which is stopped."""
        end = monotonic() + HANG_WAIT
        try:
            while monotonic() < end:
                signal.pidfd_send_signal(pidfd, 0)
                await asyncio.sleep(0.1)
            self.failures.append(f"not killed within {HANG_WAIT:g} s: {strike}")
            signal.pidfd_send_signal(pidfd, signal.SIGCONT)
        except ProcessLookupError:
            pass
        finally:
            os.close(pidfd)

    # -- steps --------------------------------------------------------------------------------------

    async def _at_step(self, strike: Strike) -> None:
        fault = strike.fault
        number = NUMBERS[fault.step]
        order, hit = self._steps / str(number), self._steps / f"{number}{HIT}"
        order.write_text("kill" if fault.kind is Kind.STEP_KILL else "stop")
        self._armed[number] = 1
        await self._trigger(strike, first=True)
        end = monotonic() + STEP_WAIT
        while not hit.exists():
            await asyncio.sleep(0.02)
            if monotonic() > end:
                with contextlib.suppress(FileNotFoundError):
                    order.unlink()
                    strike.missed = "no process came to this step"
                    break
            await self._trigger(strike, first=False)
        self._armed[number] = 0
        if not strike.missed:
            await self._after_step(strike, hit.read_text())
            hit.unlink()

    async def _after_step(self, strike: Strike, found: str) -> None:
        number, at = found.split()
        pid, strike.at = int(number), float(at)
        strike.struck[STEPS[strike.fault.step].role] = pid
        if strike.fault.kind is Kind.STEP_PAUSE:
            with contextlib.suppress(ProcessLookupError):
                await self._go_on(os.pidfd_open(pid), strike.fault.seconds)

    async def _trigger(self, strike: Strike, *, first: bool) -> None:
        """Make processes come to the step."""
        match strike.fault.trigger:
            case "moves":
                await self._move(strike.fault.number)
            case "death" if first:
                strike.struck = await self._find(strike.fault.targets)
                self._note(strike)
                for pid in strike.struck.values():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            case "restart" if first:
                self._background(self._restart(strike.fault.targets[0]))

    async def _move(self, number: int) -> None:
        """Order the moves of a few requests."""
        rng = Random(f"moves {self._seed} {number}")
        rows = (await self._daemon.call("GET", "/v1/requests") or {}).get("requests", [])
        engines = sorted(name.split()[1] for name in self._daemon.pids() if name.startswith("engine"))
        for row in rng.sample(rows, min(4, len(rows))):
            if others := [e for e in engines if int(e) != row["engine"]]:
                await self._daemon.call("POST", f"/v1/requests/{row['id']}/migrate/{rng.choice(others)}?how=live")

    # -- orders -------------------------------------------------------------------------------------

    async def _restart(self, name: str) -> None:
        self.restarts[await self._daemon.ctl("restart", *name.split())] += 1

    async def _order(self, strike: Strike, do: str, undo: str, then: str) -> None:
        """Give an engine an order, and take it back; insist on the second one."""
        engine = strike.fault.targets[0].split()[1]
        if await self._daemon.call("POST", f"/v1/engines/{engine}/{do}") is None:
            strike.missed = "the order was refused"
        await asyncio.sleep(strike.fault.seconds)
        end = monotonic() + ORDER_WAIT
        while await self._daemon.call("POST", f"/v1/engines/{engine}/{undo}") is None:
            if monotonic() > end:
                self.failures.append(f"{undo} was refused for {ORDER_WAIT:g} s: {strike}")
                return
            await asyncio.sleep(0.2)

    async def _flood(self, fault: Fault) -> None:
        """Send large requests, read nothing of the answers, and hang up."""
        rng = Random(f"flood {self._seed} {fault.number}")
        url = urlsplit(self._daemon.url)
        loop, socks = asyncio.get_running_loop(), []
        number, fields = FLOODS[fault.targets[0]]
        fields |= {"ignore_eos": True, "stream": True, "seed": 1}
        for _ in range(number):
            body = json.dumps(fields | {"prompt": rng.choices(range(*TOKEN_IDS), k=100)}).encode()
            head = f"POST {TEXT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            socks.append(sock := socket.socket())
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.setblocking(False)
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(10):
                    await loop.sock_connect(sock, (url.hostname, url.port))
                    await loop.sock_sendall(sock, head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        await asyncio.sleep(fault.seconds)
        for sock in socks:
            sock.close()
