"""The children of the supervisor, and how one is started: its descriptors, its KV pool and its channel."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import multiprocess

from daemon.config import Config
from daemon.ipc import code_version, segment
from daemon.ipc.child import GROUP_SIGNALS, ChildSpec
from daemon.ipc.fabric import Fabric, FabricHandles
from daemon.ipc.messages import EngineState
from daemon.ipc.model_text import text_digest
from daemon.ipc.process_table import ProcessFacts, ProcessState, Progress
from daemon.supervisor import child_entry
from daemon.supervisor.restarts import Backoff, Death, Succession
from daemon.supervisor.socket_keeper import SocketKeeper, capacity
from daemon.supervisor.standby import NAME, Standby, Started

START_TIMEOUT = 60.0  # seconds for a process without a model to say that it runs


class Child:
    """One process of the tree, through all its incarnations."""

    def __init__(self, process: int, name: str, role: str, progress: Progress) -> None:
        self.process = process
        self.name = name
        self.role = role
        self.progress = progress
        self.facts = ProcessFacts()
        self.handle: Any = None  # multiprocess.Process
        self.pidfd = -1
        self.pool_fd = -1  # engines: descriptor of the current KV pool
        self.start_at = 0.0  # earliest time of the next start, monotonic; infinite when the daemon stops
        self.suspected = False  # has missed its deadline
        self.hung = False  # has been killed for that
        self.ordered_at = 0.0  # when the replacement of this incarnation was ordered, monotonic; 0: it was not
        self.replaced_at = 0.0  # when this incarnation was told to end for its successor, monotonic; 0: it was not
        self.first_beat = 0  # number of beats at the start of this incarnation
        self.backoff = Backoff(frontend=role == "frontend")
        self.succession = Succession()
        self.keeper = SocketKeeper(name) if role == "frontend" else None

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

    def death(self, code: int, now: float) -> Death:
        """Describe the end of the current incarnation, whose exit code is `code`."""
        beats = self.progress.steps - self.first_beat
        return Death(now - self.facts.started_at, beats, code == -signal.SIGKILL and not self.hung)


class Spawner:
    """Starts children. Every incarnation of an engine gets a new KV pool, and one of a frontend a new channel."""

    def __init__(
        self,
        config: Config,
        model_dir: str,
        pool_bytes: int,
        listeners: dict[str, socket.socket],
        handles: FabricHandles,
        epoll: select.epoll,
    ) -> None:
        """`listeners`: by role. `epoll`: where the caller waits for a child's end and for its messages."""
        self._config = config
        self._model_dir = model_dir
        self._pool_bytes = pool_bytes
        self._listeners = listeners
        self._handles = handles
        self._epoll = epoll
        self._context = multiprocess.get_context("spawn")
        self._code = code_version.installed()
        self._model_text = text_digest(model_dir)
        self._capacity = capacity(handles.topology)
        self.standby = Standby(self._start_standby) if config.standby_frontend else None

    def children(self, fabric: Fabric) -> list[Child]:
        """Return all children, by process number. None of them runs yet."""
        topology = self._handles.topology
        return [
            Child(p, topology.name(p), topology.role(p)[0], fabric.progress(p)) for p in range(topology.processes)
        ]

    def spawn(self, child: Child) -> dict[str, Any]:
        """Start the next incarnation of `child`. Return how its row in the process table changes. Raises OSError."""
        if child.role == "engine":
            self._create_pool(child)
        with self._channel(child) as keeper_fd:
            spec = dataclasses.replace(
                self._spec(child.role, child.process),
                incarnation=child.facts.incarnation + 1,
                pool_fd=child.pool_fd,
                keeper_fd=keeper_fd,
                adopt=child.succession.adopts,
            )
            started = self.standby.take(spec) if self.standby is not None and child.keeper is not None else None
            if started is None:
                inherited = self._inherited(spec.listener_fd, spec.pool_fd, spec.keeper_fd)
                started = self._start(child.name, child_entry.run, spec, inherited)
        child.handle, child.pidfd = started
        child.suspected = child.hung = False
        child.ordered_at = child.replaced_at = 0.0
        child.first_beat = child.progress.steps
        within = (
            self._config.load_timeout if child.role == "engine" else min(self._config.load_timeout, START_TIMEOUT)
        )
        child.progress.enter(EngineState.STARTING, spec.incarnation, within)
        pool = {"pool_fd": child.pool_fd, "pool_bytes": self._pool_bytes} if child.role == "engine" else {}
        return {
            "state": ProcessState.UP,
            "incarnation": spec.incarnation,
            "pid": child.handle.pid,
            "started_at": time.monotonic(),
        } | pool

    def reap(self, child: Child) -> int:
        """Forget a process that has ended. Return its exit code."""
        self._epoll.unregister(child.pidfd)
        os.close(child.pidfd)
        child.pidfd = -1
        child.handle.join()
        code: int = child.handle.exitcode
        child.handle.close()
        if child.keeper is not None:
            child.keeper.close_channel()
        return code

    def close_pool(self, child: Child) -> None:
        """Close the supervisor's descriptor of the pool.

        The kernel frees the memory when the peers have unmapped it, too; they do so when the table shows the death.
        """
        if child.pool_fd >= 0:
            os.close(child.pool_fd)
            child.pool_fd = -1

    @contextlib.contextmanager
    def _channel(self, child: Child) -> Iterator[int]:
        """Open the channel of the next incarnation of a frontend; yield the descriptor of its end, otherwise -1."""
        if child.keeper is None:
            yield -1
            return
        with child.keeper.open_channel() as theirs:
            self._epoll.register(child.keeper.fileno(), select.EPOLLIN)
            yield theirs.fileno()

    def _inherited(self, *more: int) -> child_entry.Inherited:
        """Return the descriptors of the fabric and `more`; those below 0 do not exist."""
        handles = self._handles
        fds = [handles.segment, *handles.journals, *handles.outboxes, *handles.doorbells, *more]
        fds += [fd for pair in handles.frontend_channels for fd in pair]
        return child_entry.Inherited([fd for fd in fds if fd >= 0])

    def _start_standby(self, role_fd: int) -> Started:
        """Start a process that waits for its role on `role_fd`. Raises OSError."""
        spec = self._spec("frontend", self._handles.topology.frontend(0))
        return self._start(NAME, child_entry.run_standby, spec, role_fd, self._inherited(spec.listener_fd, role_fd))

    def _start(self, name: str, target: Callable[..., None], *args: object) -> Started:
        """Start a process and have the loop wake up at its end. Raises OSError."""
        handle = self._context.Process(target=target, args=args, name=name)
        with group_signals_blocked():
            handle.start()
        pidfd = -1
        try:
            pidfd = os.pidfd_open(handle.pid)
            self._epoll.register(pidfd, select.EPOLLIN)
        except OSError:  # kill it: it would run unsupervised
            handle.kill()
            handle.join()
            handle.close()
            if pidfd >= 0:
                os.close(pidfd)
            raise
        return Started(handle, pidfd)

    def _spec(self, role: str, process: int) -> ChildSpec:
        """Describe a process of this role, without what differs between its incarnations."""
        listener = self._listeners.get(role)
        return ChildSpec(
            config=self._config,
            handles=self._handles,
            process=process,
            incarnation=0,
            supervisor_pid=os.getpid(),
            model_dir=self._model_dir,
            model_text=self._model_text,
            listener_fd=listener.fileno() if listener is not None else -1,
            keeper_capacity=self._capacity,
            code=self._code,
        )

    def _create_pool(self, child: Child) -> None:
        """Create a new KV pool for the next incarnation: a dead engine may have left blocks half written."""
        self.close_pool(child)
        child.pool_fd = segment.create(self._pool_bytes)


@contextlib.contextmanager
def group_signals_blocked() -> Iterator[None]:
    """Block GROUP_SIGNALS; a process that starts meanwhile has them blocked too. They arrive here afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, GROUP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
