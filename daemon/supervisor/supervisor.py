"""The supervisor: it owns segments, sockets and the process tree, restarts dead children and never reads payloads.

It spawns children only from the main thread (their death signal depends on that thread), watches them through pidfds
and restarts them with back-off under a new incarnation. It publishes each start and each death in the process table
and rings all doorbells. No child outlives `Supervisor.run`, however it ends.
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
from typing import Any

import msgspec
import multiprocess
import setproctitle
from multiprocess import resource_tracker

from daemon.config import Config
from daemon.ipc.child import (
    CUT_SIGNAL,
    EXIT_CONFIG,
    EXIT_FAILED,
    EXIT_HANDOVER,
    EXIT_PARKED,
    HANDOVER_SIGNAL,
    STOP_SIGNAL,
)
from daemon.ipc.desired_state import DesiredStateReader
from daemon.ipc.fabric import Fabric, Topology
from daemon.ipc.messages import EngineState
from daemon.ipc.process_table import ProcessState
from daemon.ipc.restart_orders import RestartOrders
from daemon.supervisor.children import Child, Spawner, group_signals_blocked
from daemon.supervisor.key_reload import KeyReload, KeySource
from daemon.supervisor.start_error import StartError, explain
from daemon.supervisor.systemd import EXTEND_START, Notifier

log = logging.getLogger(__name__)

TICK = 0.2  # seconds between checks of the timers
LATE_TICK = 2.0  # seconds; after a longer gap the supervisor itself was stopped, and missed deadlines mean nothing
START_ATTEMPTS = 5  # deaths of every engine, or every frontend, after which a daemon that never served gives up
SAME_SIGNAL = 0.5  # seconds; `timeout` and others send one signal twice, to this process and to its group
STANDBY_WAIT = 20.0  # seconds that the replacement of a frontend waits for a standby that is loaded
STOP_GRACE = 5.0  # seconds between STOP_SIGNAL, or CUT_SIGNAL, and SIGKILL


class Supervisor:
    """Runs the daemon from its start to its exit code."""

    def __init__(
        self,
        config: Config,
        model_dir: str,
        pool_bytes: int,
        http: socket.socket,
        admin: socket.socket,
        keys: KeySource | None = None,
        notifier: Notifier | None = None,
    ) -> None:
        self._config = config
        self._topology = Topology(config.frontends, len(config.devices))
        handles = Fabric.create(self._topology, config.journal_memory, config.outbox_memory)
        self._fabric = Fabric(handles, -1, 0)
        self._table = self._fabric.table_writer()
        self._desired_states = DesiredStateReader(self._fabric.desired_states())
        self._restart_orders = RestartOrders(self._fabric.restart_orders())
        self._keys = KeyReload(self._fabric.keys_page(), keys)
        self._notifier = notifier or Notifier()
        self._epoll = select.epoll()
        listeners = {"frontend": http, "coordinator": admin}
        self._spawner = Spawner(config, model_dir, pool_bytes, listeners, handles, self._epoll)
        self._children = self._spawner.children(self._fabric)
        self._signals: list[int] = []  # SIGTERM and SIGINT that have arrived, repeated ones counted once
        self._signalled_at = float("-inf")  # when the last one was counted
        self._announced = False
        self._ignore_deadlines_until = 0.0

    # -- start and stop -------------------------------------------------------------------------------

    def run(self, ready: Callable[[], None]) -> int:
        """Serve until SIGTERM or SIGINT; return the exit code. Call `ready` once, when the daemon can serve.

        Raises StartError if a child cannot be started for the first time. However it ends, all children have ended.
        """
        try:
            setproctitle.setproctitle(f"llumd: supervisor of {self._config.main_name}")
            self._start()
            return self._supervise(ready)
        finally:
            self._kill_children()
            self._hang_up(self._frontends())

    def _start(self) -> None:
        """Listen to signals and start every child, until a signal asks for the end. Raises StartError."""
        what = "the supervisor"
        try:
            self._install_signal_handlers()
            with group_signals_blocked():
                resource_tracker.ensure_running()  # of multiprocess: it, too, must outlive a closed terminal
            for child in self._children:
                if self._signals:
                    return
                what = child.name
                self._spawn(child)
        except OSError as e:
            raise StartError(f"cannot start {what}: {explain(e)}") from e

    def _supervise(self, ready: Callable[[], None]) -> int:
        """Watch the children until a signal asks for the end, or until the daemon cannot serve."""
        last_tick = time.monotonic()
        while not self._signals:
            self._wait(TICK)
            now = time.monotonic()
            if now - last_tick > LATE_TICK:
                self._ignore_deadlines_until = now + self._config.hang_timeout
            last_tick = now
            if role := self._crash_looping_role():
                log.error("no %s could be started in %d attempts; see the errors above", role, START_ATTEMPTS)
                self._stop(drain=False)
                return EXIT_FAILED
            self._tick(now)
            self._report_status(ready)
            if failed := self._failed_role():
                log.error("no %s can run; see the errors above", failed)
                self._stop(drain=False)
                return EXIT_CONFIG
        return self._stop(drain=True)

    def _crash_looping_role(self) -> str:
        """Return "engine" or "frontend" if the daemon never served and each of them died too often, otherwise ""."""
        if self._announced:
            return ""
        for children in (self._engines(), self._frontends()):
            if all(c.facts.restarts >= START_ATTEMPTS for c in children):
                return self._topology.role(children[0].process)[0]
        return ""

    def _report_status(self, ready: Callable[[], None]) -> None:
        engines, frontends = self._engines(), self._frontends()
        serving = sum(c.serving for c in engines)
        if not self._announced and serving and any(c.serving for c in frontends):
            self._announced = True
            self._notifier.send("READY=1")
            ready()
        state = "ready" if self._announced else "loading"
        parked = sum(c.facts.state == ProcessState.PARKED for c in engines)
        suffix = f", {parked} parked" if parked else ""
        lines = [f"STATUS={state}: {serving}/{len(engines)} engines serving{suffix}", "WATCHDOG=1"]
        self._notifier.send(*lines, *([] if self._announced else [EXTEND_START]))

    def _stop(self, *, drain: bool) -> int:
        """Stop the frontends, which may finish requests if `drain`, then the rest. Return the exit code.

        A second signal ends the requests that still run, with an error, and a third one kills what is left.
        """
        self._notifier.send("STOPPING=1")
        self._signals.clear()
        self._fabric.shutdown().begin(time.monotonic() + (self._config.drain_timeout if drain else 0.0))
        if drain:
            log.info("draining: running requests have %.0f s to finish", self._config.drain_timeout)
        frontends = self._frontends()
        self._request_end(frontends)
        interrupted = self._await_end(frontends, self._config.drain_timeout + 2.0 if drain else 0.0)
        if interrupted:
            log.warning("second signal: the requests that still run are cut off")
            self._signals.clear()
            for child in frontends:
                self._signal(child, CUT_SIGNAL)
            self._await_end(frontends, STOP_GRACE)
        self._kill(frontends)
        others = [c for c in self._children if c.alive]
        self._request_end(others)
        self._await_end(others, STOP_GRACE)
        self._kill(others)
        return EXIT_FAILED if interrupted else 0

    def _request_end(self, children: list[Child]) -> None:
        """Send STOP_SIGNAL, and start none of these children again."""
        for child in children:
            child.start_at = float("inf")
            self._signal(child, STOP_SIGNAL)

    def _await_end(self, children: list[Child], grace: float) -> bool:
        """Wait up to `grace` seconds until all have ended. Return True if a signal has ended the wait before."""
        end = time.monotonic() + grace
        while any(c.alive for c in children) and time.monotonic() < end:
            if self._signals:
                return True
            self._wait(TICK)
        return False

    def _kill(self, children: list[Child]) -> None:
        """Send SIGKILL to the children that still run, and wait for their end."""
        for child in children:
            self._signal(child, signal.SIGKILL)
        while any(c.alive for c in children):
            self._wait(TICK)

    def _kill_children(self) -> None:
        """Kill what still runs, without this object's own records: an exception may have left them half changed."""
        started = multiprocess.active_children()
        for process in started:
            process.kill()
        for process in started:
            process.join()

    # -- children -------------------------------------------------------------------------------------

    def _spawn(self, child: Child) -> None:
        if child.keeper is not None and not child.succession.adopts and (cut := child.keeper.hang_up_all()):
            log.error("%s starts with nothing: %d connections of its predecessors are closed", child.name, cut)
        self._record(child, **self._spawner.spawn(child))

    def _reap(self, child: Child) -> None:
        """Handle the death of a child, which the kernel has reported: record it and schedule the restart."""
        code = self._spawner.reap(child)
        how = f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
        last_crashed = child.facts.incarnation
        if child.start_at == float("inf"):  # the daemon stops
            self._record(child, state=ProcessState.STOPPED, last_exit=how)
            self._hang_up([child])
        elif code == EXIT_PARKED:
            log.info("%s is parked", child.name)
            self._park(child, last_exit=how)
        elif code == EXIT_CONFIG:
            log.error("%s cannot run and is not restarted", child.name)
            self._record(child, state=ProcessState.FAILED, last_exit=how, last_crashed=last_crashed)
            self._hang_up([child])
        elif code == EXIT_HANDOVER or (child.replaced_at and self._desired_state(child) != EngineState.PARKED):
            log.info("%s (pid %d) has ended for its successor: %s", child.name, child.facts.pid, how)
            child.succession.on_handover()
            child.start_at = 0.0
            self._record(child, state=ProcessState.DEAD, last_exit="replaced")  # not a crash
        elif self._desired_state(child) == EngineState.PARKED:
            log.error("%s (pid %d) died before it was parked: %s", child.name, child.facts.pid, how)
            self._park(child, last_exit=how, last_crashed=last_crashed)
        else:
            self._schedule_restart(child, how, code)

    def _schedule_restart(self, child: Child, how: str, code: int) -> None:
        """Record the crash of a child, which has ended by `how`, and set the time of its restart."""
        now = time.monotonic()
        death = child.death(code, now)
        delay = child.backoff.after(death)
        child.succession.on_death(death)
        child.start_at = now + delay
        log.error("%s (pid %d) died: %s; restart in %.1f s", child.name, child.facts.pid, how, delay)
        self._record(
            child,
            state=ProcessState.DEAD,
            last_exit=how,
            restarts=child.facts.restarts + 1,
            last_crashed=child.facts.incarnation,
            last_failed=child.facts.incarnation if code == EXIT_FAILED else child.facts.last_failed,
        )

    @staticmethod
    def _hang_up(children: list[Child]) -> None:
        """Close the connections that are kept for these frontends, which will not run again."""
        for child in children:
            if child.keeper is not None:
                child.keeper.hang_up_all()

    def _park(self, child: Child, **changes: Any) -> None:
        """Record that the engine is parked, then close its pool; the table must change before the descriptor."""
        child.start_at = 0.0
        child.backoff.reset()
        self._record(child, state=ProcessState.PARKED, pool_fd=-1, pool_bytes=0, **changes)
        self._spawner.close_pool(child)

    def _desired_state(self, child: Child) -> EngineState:
        role, index = self._topology.role(child.process)
        return self._desired_states.of(index) if role == "engine" else EngineState.SERVING

    def _must_start(self, child: Child, now: float) -> bool:
        """Return True if the child must start now."""
        woken = child.facts.state == ProcessState.PARKED and self._desired_state(child) == EngineState.SERVING
        return (child.facts.state == ProcessState.DEAD or woken) and now >= child.start_at

    def _record(self, child: Child, **changes: Any) -> None:
        """Change the child's row in the process table and ring all doorbells."""
        child.facts = msgspec.structs.replace(child.facts, **changes)
        self._table.publish(child.process, child.facts)
        for process in range(self._topology.processes):
            self._fabric.ring_bell(process)

    def _tick(self, now: float) -> None:
        """Reload the keys if asked to, start the children that must start, kill those long past their deadline."""
        self._keys.poll()
        if (standby := self._spawner.standby) is not None:
            standby.tick(now, calm=self._announced and all(c.serving for c in self._frontends()))
        for child in self._children:
            if self._must_start(child, now):
                self._respawn(child, now)
            elif child.alive and self._restart_orders.of(child.process) == child.facts.incarnation:
                self._replace(child, now)
            elif child.alive and now > self._ignore_deadlines_until:
                self._check_deadline(child, child.progress.overdue(now))

    def _replace(self, child: Child, now: float) -> None:
        """Have this incarnation end for its successor; kill it if it takes too long, as one that is stopped does.

        A frontend waits for a standby, so that its clients hardly wait.
        """
        if not child.replaced_at:
            child.ordered_at = child.ordered_at or now
            standby = self._spawner.standby
            if child.keeper and standby and not standby.loaded and now < child.ordered_at + STANDBY_WAIT:
                return
            child.replaced_at = now
            log.info("%s (pid %d) is replaced", child.name, child.facts.pid)
            self._signal(child, HANDOVER_SIGNAL if child.keeper is not None else STOP_SIGNAL)
        elif now > child.replaced_at + STOP_GRACE:
            self._signal(child, signal.SIGKILL)

    def _respawn(self, child: Child, now: float) -> None:
        try:
            self._spawn(child)
        except OSError as e:  # out of memory or descriptors: a later try can succeed
            child.start_at = now + child.backoff.next()
            log.error("cannot start %s: %s; next attempt in %.1f s", child.name, explain(e), child.start_at - now)

    def _check_deadline(self, child: Child, overdue: float) -> None:
        if overdue <= 0:
            child.suspected = False
            return
        if not child.suspected:
            child.suspected = True
            log.warning("%s (pid %d) has missed its deadline", child.name, child.facts.pid)
        if overdue > self._config.hang_timeout:
            log.error("%s (pid %d) is killed: it missed its deadline by %.0f s", child.name, child.facts.pid, overdue)
            child.hung = True
            self._signal(child, signal.SIGKILL)

    def _signal(self, child: Child, number: signal.Signals) -> None:
        if child.alive:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(child.pidfd, number)

    def _failed_role(self) -> str:
        """Return "engine", "frontend" or "coordinator" if none of them can ever run, otherwise ""."""
        for children in (self._engines(), self._frontends(), self._children[:1]):
            if all(c.facts.state == ProcessState.FAILED for c in children):
                return self._topology.role(children[0].process)[0]
        return ""

    def _engines(self) -> list[Child]:
        return self._children[self._topology.engine(0) :]

    def _frontends(self) -> list[Child]:
        return self._children[self._topology.frontend(0) : self._topology.engine(0)]

    # -- waiting --------------------------------------------------------------------------------------

    def _install_signal_handlers(self) -> None:
        """Let signals wake the loop through a pipe: SIGTERM and SIGINT end it, SIGHUP reads the key file again.

        A closed terminal sends SIGHUP too, so it must never end the daemon.
        """
        self._wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        self._epoll.register(self._wake_read, select.EPOLLIN)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda n, _: self._count_signal(n))
        signal.signal(signal.SIGHUP, lambda *_: self._keys.request())
        for number in (signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, lambda *_: None)  # not SIG_IGN: children would inherit it

    def _count_signal(self, number: int) -> None:
        now = time.monotonic()
        if now - self._signalled_at >= SAME_SIGNAL:
            self._signalled_at = now
            self._signals.append(number)

    def _wait(self, timeout: float) -> None:
        """Wait until a child dies, a signal arrives or `timeout` seconds have passed; reap dead children."""
        ready = {fd for fd, _ in self._epoll.poll(timeout)}
        if self._wake_read in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(self._wake_read, 4096)
        if (standby := self._spawner.standby) is not None and standby.pidfd in ready:
            standby.reap(time.monotonic())
        for child in self._children:
            if child.keeper is not None and child.keeper.fileno() in ready and not child.keeper.read():
                self._epoll.unregister(child.keeper.fileno())
            if child.pidfd in ready:
                self._reap(child)
