"""Notifications to systemd."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from daemon.supervisor.systemd import EXTEND_START, Notifier


@pytest.fixture(params=["path", "abstract"])
def systemd(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[socket.socket]:
    name = str(tmp_path / "notify") if request.param == "path" else f"@llumd-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(name.replace("@", "\0", 1))
        listener.settimeout(10)
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        yield listener


def test_lines_arrive_as_one_datagram(systemd: socket.socket):
    notifier = Notifier()
    notifier.send("READY=1", "STATUS=2 engines")
    notifier.send("WATCHDOG=1")
    assert systemd.recv(1000) == b"READY=1\nSTATUS=2 engines"
    assert systemd.recv(1000) == b"WATCHDOG=1"


def test_the_limit_of_the_start_is_extended_while_it_needs_long(systemd: socket.socket, monkeypatch):
    monkeypatch.setattr("daemon.supervisor.systemd._EXTEND_EVERY", 0.01)
    before = threading.active_count()
    with Notifier().start_extended():
        assert [systemd.recv(1000) for _ in range(3)] == [EXTEND_START.encode()] * 3
    assert threading.active_count() == before  # the supervisor starts processes from its only thread
    with pytest.raises(KeyError), Notifier().start_extended():
        raise KeyError
    assert threading.active_count() == before


def test_no_variable_of_systemd_stays_in_the_environment(systemd: socket.socket, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WATCHDOG_USEC", "2500000")
    Notifier()
    assert not {"NOTIFY_SOCKET", "WATCHDOG_USEC"} & set(os.environ)


def test_nothing_is_sent_without_systemd_and_a_lost_datagram_is_no_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    Notifier().send("READY=1")
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "missing"))
    Notifier().send("READY=1")
