"""The lock, the port and the admin socket that one daemon has for itself, claimed for good and on trial."""

from __future__ import annotations

import fcntl
import os
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from daemon.cli.claims import claimed
from daemon.config import Config, ConfigError


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., Config]:
    return lambda **options: Config(**{"port": 0, "run_dir": str(tmp_path / "a" / "run")} | options)


def claim(config: Config) -> None:
    with claimed(config):
        pass


def test_a_claim_holds_lock_port_and_socket(config):
    with claimed(config()) as claims:
        port = claims.http.getsockname()[1]
        assert port > 0
        assert (claims.directory / "admin.sock").is_socket()
        with pytest.raises(ConfigError, match=r"^run_dir: another llumd uses .*a/run; stop it, or choose"):
            claim(config())
        claims.http.listen()
        with pytest.raises(ConfigError, match=rf"^port: {port} on 127.0.0.1 is in use; choose another port"):
            claim(config(port=port, run_dir=str(claims.directory.parent / "other")))
    assert not (claims.directory / "admin.sock").exists()
    with claimed(config(port=port)):
        pass


def test_a_trial_leaves_nothing(config, tmp_path: Path):
    with claimed(config(), on_trial=True) as claims:
        assert (claims.directory / "admin.sock").is_socket()
    assert list(tmp_path.iterdir()) == []


def test_a_trial_leaves_what_was_there(config, tmp_path: Path):
    with claimed(config()):
        pass
    before = sorted(tmp_path.rglob("*"))
    with claimed(config(), on_trial=True):
        pass
    assert sorted(tmp_path.rglob("*")) == before


def test_nothing_is_held_after_a_refusal(config, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"^host: "), claimed(config(host="192.0.2.1"), on_trial=True):
        pass
    assert list(tmp_path.iterdir()) == []
    with claimed(config()):
        pass


@pytest.mark.parametrize("host", ["no-such-host.invalid", "192.0.2.1", "..", "a" * 100])
def test_a_host_that_is_none_of_this_machine(config, host: str):
    with pytest.raises(ConfigError, match=r"^host: cannot listen on .*; choose another address with --host"):
        claim(config(host=host))


@pytest.mark.parametrize("path", ["/proc/1/run", "/dev/null/run", "/" + "x" * 300])
def test_a_directory_that_cannot_be_used(config, path: str):
    with pytest.raises(ConfigError, match=r"^run_dir: cannot use .*; choose another directory with --run-dir"):
        claim(config(run_dir=path))


def test_a_path_too_long_for_a_socket(config, tmp_path: Path):
    with (
        pytest.raises(
            ConfigError, match=r"^run_dir: the path of the socket .* more than 107 bytes; choose a shorter"
        ),
        claimed(config(run_dir=str(tmp_path / ("x" * 100)))),
    ):
        pass


def test_a_lock_file_that_was_deleted_meanwhile_protects_nothing(config, tmp_path: Path, monkeypatch):
    """Between its open and its lock a check deletes the file: the daemon must lock the file that others will find."""
    file = tmp_path / "a" / "run" / "lock"
    real, deleted = fcntl.flock, []

    def flock(fd: int, operation: int) -> None:
        if not deleted:
            deleted.append(file.unlink())
        real(fd, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with claimed(config()):
        fd = os.open(file, os.O_RDWR)
        with pytest.raises(BlockingIOError):
            real(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(fd)


def test_a_port_of_another_llumd_is_named(config):
    class Handler(BaseHTTPRequestHandler):
        def version_string(self) -> str:
            return "llumd"

        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        with pytest.raises(ConfigError, match="is in use by another llumd; choose another port"):
            claim(config(port=server.server_port))


def test_ipv6(config):
    if not socket.has_ipv6:
        pytest.skip("no IPv6")
    with claimed(config(host="::1")) as claims:
        assert claims.http.family == socket.AF_INET6
