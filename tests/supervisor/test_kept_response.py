"""A frontend dies in the middle of a response, and its successors go on with it: the real supervisor and kernel."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from pathlib import Path

import pytest

from daemon.config import Config
from daemon.supervisor import child_entry
from daemon.supervisor.supervisor import Supervisor
from tests.ipc.socket_writer import expected
from tests.supervisor import kept_response_child
from tests.supervisor.kept_response_child import LENGTH, POISON

pytestmark = pytest.mark.integration


class Client(threading.Thread):
    """Reads one response to its end, slowly at first, then ends the daemon, which runs in the main thread."""

    def __init__(self, address: tuple[str, int]) -> None:
        super().__init__()
        self._address = address
        self.received = b""

    def run(self) -> None:
        try:
            with socket.create_connection(self._address) as sock:
                sock.settimeout(60)  # a child may start slowly on a busy machine
                while data := sock.recv(100_000):
                    self.received += data
                    time.sleep(0.001)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)


def serve(tmp_path: Path, name: str) -> bytes:
    """Run the supervisor until a client's connection has ended. Return what the client has received."""
    config = Config(devices=["cpu"], journal_memory=1 << 20, served_name=[name], drain_timeout=1.0)
    with socket.create_server(("127.0.0.1", 0)) as http, socket.socket() as admin:
        client = Client(http.getsockname())
        daemon = Supervisor(config, str(tmp_path), 1 << 20, http, admin)
        client.start()
        assert daemon.run(lambda: None) == 0
        client.join()
    return client.received


def test_a_response_outlives_a_kill_and_a_handover(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, restored_signals: None, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(child_entry, "run", kept_response_child.run)
    assert serve(tmp_path, "model") == expected(0, LENGTH)
    assert "signal SIGKILL; restart in 0.0 s" in caplog.text


def test_a_response_that_kills_each_successor_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, restored_signals: None, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(child_entry, "run", kept_response_child.run)
    received = serve(tmp_path, POISON)
    assert 0 < len(received) < LENGTH
    assert received == expected(0, len(received))
    assert "frontend 0 starts with nothing: 1 connections of its predecessors are closed" in caplog.text
