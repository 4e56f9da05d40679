"""A standby frontend takes over from one that has died, and is replaced."""

from __future__ import annotations

import os
import signal

import psutil
import pytest

from tests.e2e.conftest import Start
from tests.e2e.daemon_process import Daemon, title_of, wait_for

pytestmark = pytest.mark.e2e
TITLE = "llumd: standby frontend"


def standby(daemon: Daemon) -> psutil.Process | None:
    return next((p for p in daemon.processes() if title_of(p) == TITLE), None)


def other_standby(daemon: Daemon, pid: int) -> psutil.Process | None:
    """Return the standby unless it is `pid`, which may be listed for a moment after its death."""
    found = standby(daemon)
    return found if found is not None and found.pid != pid else None


def test_a_standby_takes_over_and_is_replaced(start: Start) -> None:
    daemon = start("--frontends", "2", standby=True)
    first = wait_for("a standby", lambda: standby(daemon))
    before = daemon.kill("frontend", 1)
    row = daemon.await_successor("frontend", 1, before)
    assert (row["pid"], row["incarnation"]) == (first.pid, before["incarnation"] + 1)
    assert daemon.complete(max_tokens=2).status_code == 200
    second = wait_for("another standby", lambda: standby(daemon))
    os.kill(second.pid, signal.SIGKILL)
    third = wait_for("a standby after the death of one", lambda: other_standby(daemon, second.pid))
    assert "the standby frontend died: exit code -9" in daemon.log
    os.kill(third.pid, signal.SIGSTOP)  # it takes the role, never serves, and must not stop the daemon's end
    daemon.kill("frontend", 0)
    assert daemon.terminate(30) == 0


def test_no_standby_if_none_is_asked_for(start: Start) -> None:
    daemon = start()
    before = daemon.kill("frontend")
    daemon.await_successor("frontend", 0, before)
    assert standby(daemon) is None
