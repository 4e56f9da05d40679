"""A child that dies again and again: the daemon gives up if it has never served."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from daemon.config import Config
from daemon.ipc.child import EXIT_FAILED
from daemon.supervisor import child_entry, restarts
from daemon.supervisor.supervisor import START_ATTEMPTS, Supervisor


def die(*_: object) -> None:
    """Stand in for a child that fails before it says anything."""
    os._exit(1)


@pytest.mark.integration
def test_a_daemon_whose_children_die_at_once_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, restored_signals: None, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(child_entry, "run", die)
    monkeypatch.setattr(restarts, "FIRST_BACKOFF", 0.001)
    config = Config(devices=["cpu"], journal_memory=1 << 20, served_name=["none"])
    with socket.socket() as http, socket.socket() as admin:
        daemon = Supervisor(config, str(tmp_path), 1 << 20, http, admin)
        assert daemon.run(lambda: pytest.fail("ready")) == EXIT_FAILED
    deaths = [record for record in caplog.records if "died" in record.getMessage()]
    assert "could be started" in caplog.text
    assert len(deaths) >= START_ATTEMPTS
