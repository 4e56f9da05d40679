"""The supervisor: owns segments, sockets and the process tree; restarts what dies; never reads payloads.

Children are spawned from the main thread alone (their death signal hangs on it), watched through pidfds and
restarted with back-off under a new incarnation. Each birth and death goes into the process table, and
everybody's doorbell is rung.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import multiprocess
import setproctitle

from daemon.config import Config
from daemon.ipc import segment
from daemon.ipc.child import EXIT_CONFIG, EXIT_PARKED, STOP_SIGNAL, ChildSpec
from daemon.ipc.desired_state import DesiredStateReader
from daemon.ipc.fabric import COORDINATOR, Fabric, Topology
from daemon.ipc.messages import EngineState
from daemon.ipc.process_table import ProcessFacts, ProcessState, Progress
from daemon.supervisor import child_entry
from daemon.supervisor.systemd import Notifier

log = logging.getLogger(__name__)

TICK = 0.2  # seconds between looks at timers
LATE_TICK = 2.0  # a tick later than this says more about us than about the children
FIRST_BACKOFF = 0.2
MAX_BACKOFF = 30.0
HEALTHY_AFTER = 60.0  # seconds of life that forget earlier deaths
LAST_WORDS = 5.0  # seconds between LEAVE and SIGKILL for engines and coordinator


@dataclass(slots=True)
class Child:
    """One place in the tree and whoever fills it now."""

    process: int
    name: str
    facts: ProcessFacts
    progress: Progress
    handle: Any = None  # multiprocess.Process
    pidfd: int = -1
    pool: int = -1  # engines: descriptor of the present KV pool
    backoff: float = FIRST_BACKOFF
    start_at: float = 0.0
    suspected: bool = False

    @property
    def alive(self) -> bool:
        return self.facts.state == ProcessState.UP

    @property
    def serving(self) -> bool:
        return (
            self.alive
            and self.progress.incarnation == self.facts.incarnation
            and self.progress.state == EngineState.SERVING
        )


class Supervisor:
    """Runs the daemon from start to exit code."""

    def __init__(
        self, config: Config, model_dir: str, pool_bytes: int, http: socket.socket, admin: socket.socket
    ) -> None:
        self._config = config
        self._model_dir = model_dir
        self._pool_bytes = pool_bytes
        self._http = http
        self._admin = admin
        self._topology = Topology(config.frontends, len(config.devices))
        self._handles = Fabric.create(self._topology, config.journal_memory)
        self._fabric = Fabric(self._handles, -1, 0)
        self._table = self._fabric.table_writer()
        self._desired_states = DesiredStateReader(self._fabric.desired_states())
        self._notifier = Notifier()
        self._context = multiprocess.get_context("spawn")
        self._epoll = select.epoll()
        self._children = [self._place(p) for p in range(self._topology.processes)]
        self._signals: list[int] = []
        self._announced = False
        self._forgiven_until = 0.0

    # -- life of the daemon -------------------------------------------------------------------------

    def run(self, ready: Callable[[], None]) -> int:
        """Serve until SIGTERM or SIGINT; the exit code. `ready` is called once, when the first answer is possible."""
        setproctitle.setproctitle(f"llumd: supervisor of {self._config.served_name}")
        self._catch_signals()
        for child in self._children:
            self._spawn(child)
        last_tick = time.monotonic()
        while not self._signals:
            self._wait(TICK)
            now = time.monotonic()
            if now - last_tick > LATE_TICK:
                self._forgiven_until = now + self._config.hang_timeout
            last_tick = now
            self._tick(now)
            self._announce(ready)
            if all(c.facts.state == ProcessState.FAILED for c in self._engines()):
                log.error("no engine can run; see above")
                self._stop(drain=False)
                return EXIT_CONFIG
        self._stop(drain=True)
        return 0

    def _announce(self, ready: Callable[[], None]) -> None:
        engines, frontends = self._engines(), self._frontends()
        serving = sum(c.serving for c in engines)
        if not self._announced and serving and any(c.serving for c in frontends):
            self._announced = True
            self._notifier.send("READY=1")
            ready()
        state = "ready" if self._announced else "loading"
        parked = sum(c.facts.state == ProcessState.PARKED for c in engines)
        asleep = f", {parked} parked" if parked else ""
        self._notifier.send(f"STATUS={state}: {serving}/{len(engines)} engines serving{asleep}", "WATCHDOG=1")

    def _stop(self, *, drain: bool) -> None:
        """Frontends finish what runs, then everybody goes. A second signal cuts it short."""
        self._notifier.send("STOPPING=1")
        self._signals.clear()
        if drain:
            log.info("draining: running requests have %.0f s", self._config.drain_timeout)
        grace = self._config.drain_timeout + 2.0 if drain else 0.0
        self._end(self._frontends(), grace)
        self._end([c for c in self._children if c.alive], LAST_WORDS)

    def _end(self, children: list[Child], grace: float) -> None:
        for child in children:
            child.start_at = float("inf")
            self._signal(child, STOP_SIGNAL)
        end = time.monotonic() + grace
        while any(c.alive for c in children) and time.monotonic() < end and not self._signals:
            self._wait(TICK)
        for child in children:
            self._signal(child, signal.SIGKILL)
        while any(c.alive for c in children):
            self._wait(TICK)

    # -- children -------------------------------------------------------------------------------------

    def _place(self, process: int) -> Child:
        role, index = self._topology.role(process)
        name = role if role == "coordinator" else f"{role} {index}"
        return Child(process, name, ProcessFacts(), self._fabric.progress(process))

    def _spawn(self, child: Child) -> None:
        role, _ = self._topology.role(child.process)
        incarnation = child.facts.incarnation + 1
        listener = self._http.fileno() if role == "frontend" else -1
        if child.process == COORDINATOR:
            listener = self._admin.fileno()
        if role == "engine":
            self._renew_pool(child)
        spec = ChildSpec(
            self._config,
            self._handles,
            child.process,
            incarnation,
            os.getpid(),
            self._model_dir,
            listener,
            child.pool,
        )
        handles = self._handles
        fds = [handles.segment, *handles.journals, *handles.doorbells, listener, child.pool]
        child.handle = self._context.Process(
            target=child_entry.run,
            args=(spec, child_entry.Inherited([fd for fd in fds if fd >= 0])),
            name=child.name,
        )
        child.handle.start()
        child.pidfd = os.pidfd_open(child.handle.pid)
        self._epoll.register(child.pidfd, select.EPOLLIN)
        child.suspected = False
        child.progress.enter(EngineState.STARTING, incarnation, self._config.load_timeout)
        pool = {"pool_fd": child.pool, "pool_bytes": self._pool_bytes} if role == "engine" else {}
        self._record(
            child,
            state=ProcessState.UP,
            incarnation=incarnation,
            pid=child.handle.pid,
            started_at=time.monotonic(),
            **pool,
        )

    def _renew_pool(self, child: Child) -> None:
        """A fresh KV pool for each incarnation: nobody reads what a dead engine may have left half written."""
        self._close_pool(child)
        child.pool = segment.create(self._pool_bytes)

    def _close_pool(self, child: Child) -> None:
        """Its memory is free once its peers have let go of it too, which the table tells them to."""
        if child.pool >= 0:
            os.close(child.pool)
            child.pool = -1

    def _reap(self, child: Child) -> None:
        """The kernel says that the child is dead."""
        self._epoll.unregister(child.pidfd)
        os.close(child.pidfd)
        child.pidfd = -1
        child.handle.join()
        code = child.handle.exitcode
        child.handle.close()
        how = f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
        stopping = child.start_at == float("inf")
        if stopping:
            self._record(child, state=ProcessState.STOPPED, last_exit=how)
            return
        if code == EXIT_PARKED:
            log.info("%s is parked", child.name)
            self._park(child, last_exit=how)
            return
        last_crashed = child.facts.incarnation
        if code == EXIT_CONFIG:
            log.error("%s cannot run and is not started again", child.name)
            self._record(child, state=ProcessState.FAILED, last_exit=how, last_crashed=last_crashed)
            return
        if self._desired_state(child) == EngineState.PARKED:
            log.error("%s (pid %d) died while it was to be parked: %s", child.name, child.facts.pid, how)
            self._park(child, last_exit=how, last_crashed=last_crashed)
            return
        if time.monotonic() - child.facts.started_at > HEALTHY_AFTER:
            child.backoff = FIRST_BACKOFF
        child.start_at = time.monotonic() + child.backoff
        log.error(
            "%s (pid %d) died: %s; starting it again in %.1f s", child.name, child.facts.pid, how, child.backoff
        )
        child.backoff = min(MAX_BACKOFF, child.backoff * 2)
        restarts = child.facts.restarts + 1
        self._record(child, state=ProcessState.DEAD, last_exit=how, restarts=restarts, last_crashed=last_crashed)

    def _park(self, child: Child, **changes: Any) -> None:
        """Let it sleep. First the table says so, then the descriptor of its pool may go."""
        child.start_at, child.backoff = 0.0, FIRST_BACKOFF
        self._record(child, state=ProcessState.PARKED, pool_fd=-1, pool_bytes=0, **changes)
        self._close_pool(child)

    def _desired_state(self, child: Child) -> EngineState:
        role, index = self._topology.role(child.process)
        return self._desired_states.of(index) if role == "engine" else EngineState.SERVING

    def _due(self, child: Child, now: float) -> bool:
        """Whether it is to be started now."""
        woken = child.facts.state == ProcessState.PARKED and self._desired_state(child) == EngineState.SERVING
        return (child.facts.state == ProcessState.DEAD or woken) and now >= child.start_at

    def _record(self, child: Child, **changes: Any) -> None:
        """Change the child's row in the table and wake everybody who is alive to read it."""
        fields = {name: getattr(child.facts, name) for name in child.facts.__struct_fields__}
        child.facts = ProcessFacts(**(fields | changes))
        self._table.publish(child.process, child.facts)
        for process in range(self._topology.processes):
            self._fabric.ring_bell(process)

    def _tick(self, now: float) -> None:
        """Start who is due, and kill who has been silent for too long."""
        for child in self._children:
            if self._due(child, now):
                self._respawn(child, now)
            elif child.alive and now > self._forgiven_until:
                self._judge_silence(child, child.progress.overdue(now))

    def _respawn(self, child: Child, now: float) -> None:
        try:
            self._spawn(child)
        except OSError as e:  # out of memory or descriptors: that may pass
            child.start_at = now + child.backoff
            child.backoff = min(MAX_BACKOFF, child.backoff * 2)
            log.error("cannot start %s: %s; next try in %.1f s", child.name, e, child.start_at - now)

    def _judge_silence(self, child: Child, overdue: float) -> None:
        if overdue <= 0:
            child.suspected = False
            return
        if not child.suspected:
            child.suspected = True
            log.warning("%s (pid %d) has missed its deadline", child.name, child.facts.pid)
        if overdue > self._config.hang_timeout:
            log.error("%s (pid %d) hangs for %.0f s and is killed", child.name, child.facts.pid, overdue)
            self._signal(child, signal.SIGKILL)

    def _signal(self, child: Child, number: signal.Signals) -> None:
        if child.alive:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(child.pidfd, number)

    def _engines(self) -> list[Child]:
        return self._children[self._topology.engine(0) :]

    def _frontends(self) -> list[Child]:
        return self._children[self._topology.frontend(0) : self._topology.engine(0)]

    # -- waiting --------------------------------------------------------------------------------------

    def _catch_signals(self) -> None:
        """SIGTERM and SIGINT wake the loop through a pipe; SIGHUP, deadly by default, is only noted."""
        self._wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        self._epoll.register(self._wake_read, select.EPOLLIN)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda n, _: self._signals.append(n))
        signal.signal(signal.SIGHUP, lambda *_: log.info("SIGHUP: settings are read at start only"))

    def _wait(self, timeout: float) -> None:
        """Sleep until a child dies, a signal comes or `timeout` seconds have passed."""
        dead = {fd for fd, _ in self._epoll.poll(timeout)}
        if self._wake_read in dead:
            with contextlib.suppress(BlockingIOError):
                os.read(self._wake_read, 4096)
        for child in self._children:
            if child.pidfd in dead:
                self._reap(child)
