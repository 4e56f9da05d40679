"""llumctl against a running daemon: the tables that operators see, and the JSON that scripts read."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import Start
from tests.e2e.daemon_process import ROOT, Daemon, wait_for
from tests.e2e.load_client import Clients

LONG: dict[str, Any] = {"prompt": "once upon a time", "max_tokens": 4000, "stream": True}


@pytest.fixture(scope="module")
def daemon(start_shared: Start) -> Daemon:
    return start_shared("--frontends", "2", "--max-choices", "4", "--block-size", "128")


def json_of(daemon: Daemon, *args: str) -> Any:
    """Return the output of `llumctl ... --json`."""
    done = daemon.ctl(*args, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


def test_status_shows_load(daemon: Daemon) -> None:
    with Clients(daemon, [LONG] * 4) as clients:
        clients.await_tokens(2)
        status = json_of(daemon, "status")
        text = daemon.ctl("status").stdout
    assert status["address"] == daemon.url
    assert status["supervisor_pid"] == daemon.process.pid
    assert sum(e["running"] for e in status["engines"]) == 4
    assert all(e["kv_used_blocks"] == e["running"] for e in status["engines"])  # a short request fits into one block
    assert sum(f["active"] for f in status["frontends"]) == 4
    for row in (*status["engines"], *status["frontends"], status["coordinator"]):
        assert row["state"] == "serving"
        assert str(row["pid"]) in text
    daemon.await_idle()


def test_requests_and_cancel(daemon: Daemon) -> None:
    assert daemon.ctl("requests").stdout.strip() == "no unfinished requests"
    with Clients(daemon, [LONG, LONG, LONG | {"n": 2}]) as clients:
        clients.await_tokens(2)
        rows = json_of(daemon, "requests")["requests"]
        assert len(rows) == 4
        assert all(row["prompt_tokens"] == 4 and row["max_tokens"] == 4000 for row in rows)
        first, second, twins = clients.outcomes
        for outcome in clients.outcomes:
            assert outcome.id in daemon.ctl("requests").stdout
        assert json_of(daemon, "cancel", f"{first.id}-0") == {"cancelled": [f"{first.id}-0"]}
        wait_for("the end of the stream", lambda: first.ended)
        assert first.failed_cleanly
        assert first.errors[0]["code"] == "cancelled"
        assert daemon.ctl("cancel", twins.id).stdout.startswith("cancelled ")
        wait_for("the end of both choices", lambda: twins.ended)
        assert not second.ended
        wait_for("one remaining request", lambda: len(daemon.requests()) == 1)
    daemon.await_idle()
    gone = daemon.ctl("cancel", first.id)
    assert gone.returncode == 1
    assert len(gone.stderr.splitlines()) == 1


def test_config_shows_the_origin_of_each_value(daemon: Daemon) -> None:
    options = {o["name"]: o for o in json_of(daemon, "config")["options"]}
    assert (options["frontends"]["value"], options["frontends"]["origin"]) == (2, "command line")
    assert (options["max_queued"]["value"], options["max_queued"]["origin"]) == (512, "default")
    line = next(line for line in daemon.ctl("config").stdout.splitlines() if line.startswith("frontends "))
    assert line.split()[1] == "2"


def test_top_without_a_terminal_prints_once(daemon: Daemon) -> None:
    done = daemon.ctl("top")
    assert done.returncode == 0
    assert "\x1b" not in done.stdout
    assert "ENGINE" in done.stdout
    assert "no unfinished requests" in done.stdout


@pytest.mark.skipif(shutil.which("tmux") is None, reason="needs tmux")
def test_top_in_a_terminal_redraws_in_place(daemon: Daemon, tmp_path: Path) -> None:
    def tmux(*args: str) -> str:
        command = ["tmux", "-S", str(tmp_path / "tmux"), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout

    def screen() -> str:
        return tmux("capture-pane", "-p", "-t", "top")

    command = f"{sys.executable} -m daemon.cli.llumctl --run-dir {daemon.run_dir}"
    top = f"{command} top --interval 0.1; echo left with $?; cat"
    tmux("new-session", "-d", "-s", "top", "-x", "120", "-y", "40", top)
    try:
        wait_for("an idle daemon on the screen", lambda: "no unfinished requests" in screen())
        with Clients(daemon, [LONG]) as clients:
            clients.await_tokens(1)
            wait_for("the request on the screen", lambda: clients.outcomes[0].id in screen())
        wait_for("its end on the screen", lambda: "no unfinished requests" in screen())
        assert screen().count("ENGINE  DEVICE") == 1
        tmux("send-keys", "-t", "top", "C-c")
        wait_for("the end of top", lambda: "left with 0" in screen())
    finally:
        tmux("kill-server")


def test_exit_codes_without_a_daemon(tmp_path: Path) -> None:
    def ctl(*args: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "daemon.cli.llumctl", "--run-dir", str(tmp_path), *args]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=20, check=False)

    absent = ctl("status")
    assert absent.returncode == 3
    assert "not running" in absent.stderr
    assert len(absent.stderr.splitlines()) == 1
    assert absent.stdout == ""
    assert ctl("stauts").returncode == 2
