"""`llumctl restart`: replace processes one by one, each by a successor that serves before the next one ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from daemon.cli.admin_client import CtlError, Lost, NoAnswer, NotRunning, Refused, call, read
from daemon.cli.engine_orders import Interrupted, Reporter, Row, TooLate, carry_out, load_timeout, order, progress

Write = Callable[[str], None]
LIMIT = 60.0  # seconds for a process without a model to be replaced
_POLL = 0.05  # seconds
ALL = "all"


class Target(NamedTuple):
    """A process to replace. `role`: "engine", "frontend" or "coordinator"."""

    role: str
    number: int = 0

    def __str__(self) -> str:
        return self.role if self.role == "coordinator" else f"{self.role} {self.number}"

    @property
    def route(self) -> str:
        return "/v1/coordinator/restart" if self.role == "coordinator" else f"/v1/{self.role}s/{self.number}/restart"

    def row(self, status: Row) -> Row:
        """Return the row of this process. Raises Refused if there is none."""
        if self.role == "coordinator":
            return dict(status["coordinator"])
        rows = status[f"{self.role}s"]
        if not 0 <= self.number < len(rows):
            raise Refused(f"there is no {self}; `llumctl status` lists them", "not_found")
        return dict(rows[self.number])


def targets(status: Row, what: str, number: int | None) -> list[Target]:
    """Return what to replace, in order: engines, which can take the longest, then frontends and the coordinator."""
    if what != ALL:
        return [Target(what, number or 0)]
    engines = [Target("engine", i) for i in range(len(status["engines"]))]
    return [*engines, *(Target("frontend", k) for k in range(len(status["frontends"]))), Target("coordinator")]


def restart(path: Path, what: str, number: int | None, within: float, write: Write) -> list[Row]:
    """Replace one process, or all of them one after the other. Return the JSON answer: a row for each.

    `within`: seconds that an engine has to become empty. `write`: prints a line of progress. An engine that is parked
    or drained stays so. The first failure is the end: what is left goes on to run. Raises CtlError.
    """
    with _alone(path, write):
        return _restart(path, what, number, within, write)


@contextlib.contextmanager
def _alone(path: Path, write: Write) -> Iterator[None]:
    """Wait for another restart of this daemon to end: to each of two, an engine that the other empties is drained.

    The kernel releases the lock of a process that is killed. Without permission to read the directory there is none.
    """
    try:
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        yield
        return
    try:
        try:
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            write("another `llumctl restart` runs: waiting for its end")
            try:
                fcntl.flock(directory, fcntl.LOCK_EX)
            except KeyboardInterrupt:
                raise Interrupted("interrupted while another `llumctl restart` ran; nothing was replaced") from None
        yield
    finally:
        os.close(directory)


def _restart(path: Path, what: str, number: int | None, within: float, write: Write) -> list[Row]:
    done: list[Row] = []
    todo = targets(read(path, "/v1/status"), what, number)
    for i, target in enumerate(todo):
        try:
            done.append(_replace(path, target, within, write))
        except KeyboardInterrupt:
            raise Interrupted(f"interrupted while {target} was replaced{_rest(todo[i + 1 :])}") from None
        except NotRunning:
            raise NotRunning(f"llumd has ended while {target} was replaced") from None
        except CtlError as e:
            if len(todo) > 1:
                e.args = (f"{e}{_rest(todo[i + 1 :])}", *e.args[1:])
            raise
    return done


def _rest(left: list[Target]) -> str:
    return f"; not replaced: {', '.join(map(str, left))}" if left else ""


def _replace(path: Path, target: Target, within: float, write: Write) -> Row:
    start = time.monotonic()
    status = _status(path, start + LIMIT)
    row = target.row(status)
    if target.role == "engine" and row["desired"] == "parked":
        write(f"{target} is parked; its next process starts when it wakes")
        return {"process": str(target), "restarted": False, "seconds": 0.0}
    if target.role == "engine":
        _replace_engine(path, target, status, within, write)
    else:
        _replace_process(path, target, "serving", LIMIT, write)
    seconds = time.monotonic() - start
    write(f"{target} is replaced after {seconds:.2f} s")
    return {"process": str(target), "restarted": True, "seconds": seconds}


def _replace_engine(path: Path, target: Target, status: Row, within: float, write: Write) -> None:
    """Empty an engine by migration, replace it, and let it serve again."""
    number, limit = target.number, load_timeout(path)
    kept_empty = target.row(status)["desired"] == "draining"
    others = any(e["state"] == e["desired"] == "serving" for e in status["engines"] if e["engine"] != number)
    if kept_empty or not others:
        if not kept_empty:
            write(f"{target} is the only one that serves: its requests wait until it serves again")
        _replace_process(path, target, "draining" if kept_empty else "serving", limit, write)
        return
    try:
        carry_out(path, "drain", number, within, write)
        _replace_process(path, target, "draining", limit, write)
    except (KeyboardInterrupt, Interrupted):
        order(path, "undrain", number)
        raise KeyboardInterrupt from None
    except CtlError as e:
        if isinstance(e, TooLate) or e.code not in ("order_replaced", "not_running", "engine_failed"):
            with contextlib.suppress(CtlError):  # the first error says more
                order(path, "undrain", number)
        raise
    carry_out(path, "undrain", number, limit, write)


def _replace_process(path: Path, target: Target, state: str, limit: float, write: Write) -> None:
    """Order the restart of a process, and wait until its successor has the state."""
    incarnation = int(call(path, "POST", target.route)["incarnation"])
    start, reporter = time.monotonic(), Reporter(write)
    while True:
        waited = time.monotonic() - start
        row = target.row(_status(path, start + limit))
        replaced = row["incarnation"] > incarnation
        if replaced and row["state"] == state:
            return
        if row["state"] == "failed":
            raise Refused(f"{target} cannot run any more; the log of the daemon says why", f"{target.role}_failed")
        if waited > limit:
            text = f"{target} does not serve {waited:.0f} s after the order to restart: its state is {row['state']}"
            raise TooLate(text, {"process": str(target), "restarted": replaced, "state": row["state"]})
        if target.role == "engine":
            reporter.report(target.number, progress(row) if replaced else "its process ends", waited)
        time.sleep(_POLL)


def _status(path: Path, end: float) -> dict[str, Any]:
    """Return the status; ask again until `end` (monotonic) while no coordinator answers."""
    while True:
        try:
            return dict(read(path, "/v1/status"))
        except (Lost, NoAnswer):
            if time.monotonic() > end:
                raise
            time.sleep(_POLL)
