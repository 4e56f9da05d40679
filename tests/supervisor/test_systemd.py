from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from daemon.supervisor.systemd import Notifier


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


def test_children_inherit_nothing(systemd: socket.socket, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WATCHDOG_USEC", "2500000")
    assert Notifier().watchdog_seconds == 2.5
    assert not {"NOTIFY_SOCKET", "WATCHDOG_USEC"} & set(os.environ)
    assert Notifier().watchdog_seconds == 0


def test_silence_without_systemd(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    monkeypatch.setenv("WATCHDOG_USEC", "soon")
    notifier = Notifier()
    assert notifier.watchdog_seconds == 0
    notifier.send("READY=1")
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nobody"))
    Notifier().send("READY=1")  # a lost datagram is no reason to fail
