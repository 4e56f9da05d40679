"""The children of the supervisor, and how one is started: its descriptors, its KV pool and its channel."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import multiprocess

from daemon.config import Config
from daemon.ipc import segment
from daemon.ipc.child import GROUP_SIGNALS, ChildSpec
from daemon.ipc.fabric import Fabric, FabricHandles
from daemon.ipc.messages import EngineState
from daemon.ipc.process_table import ProcessFacts, ProcessState, Progress
from daemon.supervisor import child_entry
from daemon.supervisor.restarts import Backoff, Death, Succession
from daemon.supervisor.socket_keeper import SocketKeeper, capacity


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


@dataclass(slots=True)
class _Channel:
    """The end of a frontend's channel that it inherits; without a frontend there is none."""

    sock: socket.socket | None = None

    @property
    def fd(self) -> int:
        return self.sock.fileno() if self.sock is not None else -1


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
        self._capacity = capacity(handles.topology)

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
        with self._channel(child) as channel:
            spec = self._spec(child, channel.fd)
            handles = self._handles
            fds = [handles.segment, *handles.journals, *handles.outboxes, *handles.doorbells]
            fds += [spec.listener_fd, spec.pool_fd, spec.keeper_fd]
            child.handle = self._context.Process(
                target=child_entry.run,
                args=(spec, child_entry.Inherited([fd for fd in fds if fd >= 0])),
                name=child.name,
            )
            with group_signals_blocked():
                child.handle.start()
            self._watch(child)
        child.suspected = child.hung = False
        child.first_beat = child.progress.steps
        child.progress.enter(EngineState.STARTING, spec.incarnation, self._config.load_timeout)
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
    def _channel(self, child: Child) -> Iterator[_Channel]:
        """Open the channel of the next incarnation of a frontend; close our copy of its end afterwards."""
        if child.keeper is None:
            yield _Channel()
            return
        with child.keeper.open_channel() as theirs:
            self._epoll.register(child.keeper.fileno(), select.EPOLLIN)
            yield _Channel(theirs)

    def _watch(self, child: Child) -> None:
        """Have the loop wake up at the child's end. Kill it if that is not possible: it would run unsupervised."""
        try:
            child.pidfd = os.pidfd_open(child.handle.pid)
            self._epoll.register(child.pidfd, select.EPOLLIN)
        except OSError:
            child.handle.kill()
            child.handle.join()
            child.handle.close()
            if child.pidfd >= 0:
                os.close(child.pidfd)
                child.pidfd = -1
            raise

    def _spec(self, child: Child, keeper_fd: int) -> ChildSpec:
        """Describe the next incarnation of `child`."""
        listener = self._listeners.get(child.role)
        return ChildSpec(
            config=self._config,
            handles=self._handles,
            process=child.process,
            incarnation=child.facts.incarnation + 1,
            supervisor_pid=os.getpid(),
            model_dir=self._model_dir,
            listener_fd=listener.fileno() if listener is not None else -1,
            pool_fd=child.pool_fd,
            keeper_fd=keeper_fd,
            keeper_capacity=self._capacity,
            adopt=child.succession.adopts,
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
