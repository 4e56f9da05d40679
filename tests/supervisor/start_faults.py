"""Run `llumd serve` many times, each time with one call of its start that fails, and report how each run ended.

`python -m tests.supervisor.start_faults` reads faults from stdin, a JSON list `[target, n, action]` a line: the n-th
call of the target raises the action's error or sends its signal. It writes a JSON line for each: exit code, log, and
the titles of processes that outlived the supervisor. Each run is a fork of this process, which has imported all.
"""

from __future__ import annotations

import _posixsubprocess
import ctypes
import errno
import fcntl
import json
import mmap
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import posix_ipc
import psutil
from multiprocess import popen_spawn_posix

from daemon.cli import llumd
from daemon.supervisor.supervisor import Supervisor

PR_SET_CHILD_SUBREAPER = 36
ENDS_WITHIN = 20.0  # seconds


REAL_EPOLL = select.epoll


class Epoll:
    """`select.epoll`, whose `register` can be made to fail: an object of the real class accepts no new attribute."""

    def __init__(self) -> None:
        self._epoll = REAL_EPOLL()

    def register(self, fd: int, events: int) -> None:
        self._epoll.register(fd, events)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._epoll, name)


TARGETS: dict[str, tuple[Any, str]] = {
    "open": (os, "open"),
    "socket": (socket, "socket"),
    "SharedMemory": (posix_ipc, "SharedMemory"),
    "fallocate": (os, "posix_fallocate"),
    "mmap": (mmap, "mmap"),
    "eventfd": (os, "eventfd"),
    "epoll": (select, "epoll"),
    "register": (Epoll, "register"),
    "pipe2": (os, "pipe2"),
    "pipe": (os, "pipe"),
    "fork": (_posixsubprocess, "fork_exec"),
    "hand over": (popen_spawn_posix, "open"),  # the child has been forked and waits for its arguments
    "pidfd_open": (os, "pidfd_open"),
}


def act(action: str) -> None:
    """Raise the error, or send the signal, that `action` names."""
    if action.startswith("SIG"):
        os.kill(os.getpid(), getattr(signal, action))
    elif action == "RuntimeError":
        raise RuntimeError("injected")
    else:
        raise OSError(getattr(errno, action), os.strerror(getattr(errno, action)))


def replace(owner: Any, name: str, value: Any) -> None:
    setattr(owner, name, value)


def instrument(fault: tuple[str, int, str] | None) -> dict[str, int]:
    """Count the calls of every target, and let the one of `fault` fail."""
    replace(select, "epoll", Epoll)
    replace(popen_spawn_posix, "open", open)
    counts = dict.fromkeys(TARGETS, 0)

    def wrapped(target: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[target] += 1
            if fault and (target, counts[target]) == (fault[0], fault[1]):
                act(fault[2])
            return real(*args, **kwargs)

        return call

    for target, (owner, name) in TARGETS.items():
        replace(owner, name, wrapped(target, getattr(owner, name)))
    return counts


def serve(run_dir: str, fault: tuple[str, int, str] | None, count_to: int = -1) -> None:
    """Run the daemon with this fault; with `count_to` only count the calls, up to the start of the last child."""
    counts = instrument(fault)

    def report(*_: Any) -> int:
        os.write(count_to, json.dumps(counts).encode())
        return 0

    if count_to >= 0:
        replace(Supervisor, "_supervise", report)
    llumd.main(["serve", "demo", "--engine", "stub", "--port", "0", "--kv-memory", "16MiB", "--run-dir", run_dir])


def forked(log: Path, body: Callable[[], None]) -> dict[str, Any]:
    """Run `body` in a fork until it ends the process, and describe its end."""
    pid = os.fork()
    if pid == 0:
        os.setsid()
        fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(fd, 1)
        os.dup2(fd, 2)
        os.close(fd)
        body()
        raise AssertionError("llumd.main has returned")
    code = end_of(pid)
    left = orphans()
    for process in psutil.Process().children(recursive=True):
        process.kill()
    while True:
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            break
    return {"code": code, "left": left, "log": log.read_text()}


def end_of(pid: int) -> int | None:
    """Return the exit code of this process; None if it does not end."""
    deadline = time.monotonic() + ENDS_WITHIN
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    return None


def orphans() -> list[str]:
    """Return the titles of the processes that the supervisor has left.

    The resource tracker, and a child whose hand-over failed, end by themselves once the supervisor has.
    """
    deadline = time.monotonic() + 5.0
    while True:
        titles = [title for title in map(title_of, psutil.Process().children()) if title]
        ours = [title for title in titles if "llumd:" in title]
        if ours or not titles or time.monotonic() > deadline:
            return titles
        time.sleep(0.01)


def title_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline()) if process.status() != psutil.STATUS_ZOMBIE else ""
    except psutil.NoSuchProcess:
        return ""


def locked(run_dir: Path) -> bool:
    """Return True if a process holds the lock of the run directory."""
    if not (run_dir / "lock").exists():
        return False
    with open(run_dir / "lock") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def main() -> None:
    """Answer the faults on stdin; the first line of the output has the number of calls of each target."""
    home = Path(sys.argv[1])
    run_dir, log = home / "run", home / "log"
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    read, write = os.pipe()
    end = forked(log, partial(serve, str(run_dir), None, write))
    assert end["code"] == 0, end
    print(os.read(read, 10000).decode(), flush=True)
    for line in sys.stdin:
        target, n, action = json.loads(line)
        end = forked(log, partial(serve, str(run_dir), (target, n, action)))
        end["socket"], end["locked"] = (run_dir / "admin.sock").exists(), locked(run_dir)
        print(json.dumps(end), flush=True)


if __name__ == "__main__":
    main()
