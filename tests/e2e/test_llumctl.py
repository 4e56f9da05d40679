"""llumctl against a running daemon: the tables that operators see, and the JSON that scripts read."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from daemon.cli.engine_orders import EXIT_TIMEOUT
from tests.e2e.conftest import Start
from tests.e2e.daemon_process import PYTHON, ROOT, Daemon, wait_for
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


# -- orders about engines


@contextmanager
def stopped_engine(daemon: Daemon, index: int) -> Iterator[None]:
    """Stop the engine's process, so that an order about it has no effect yet, while requests run on every engine."""
    with Clients(daemon, [LONG] * 4) as clients:
        clients.await_tokens(2)
        daemon.kill("engine", index, signal.SIGSTOP)
        try:
            yield
        finally:
            daemon.kill("engine", index, signal.SIGCONT)
            daemon.ctl("wake", str(index))
    daemon.await_serving().await_idle()


def start_ctl(daemon: Daemon, *args: str) -> subprocess.Popen[str]:
    """Start `llumctl` with the default SIGINT, which a shell in the background may have set to be ignored."""
    command = ["env", "--default-signal=INT", *PYTHON, "daemon.cli.llumctl", "--run-dir", str(daemon.run_dir), *args]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def first_line(process: subprocess.Popen[str]) -> str:
    """Return the first line of progress."""
    assert process.stderr is not None
    return process.stderr.readline()


@pytest.mark.parametrize("verb", ["drain", "park"])
def test_an_empty_engine_is_no_failure_at_the_limit(daemon: Daemon, verb: str) -> None:
    """The engine is empty at once, and its process ends a moment after the limit of 0 s."""
    done = daemon.ctl(verb, "1", "--within", "0s")
    assert (done.returncode, done.stderr) == (0, "")
    again = json_of(daemon, verb, "1", "--within", "0s")
    assert (again["engine"], again["left"]) == (1, 0)
    assert daemon.ctl("undrain", "1").returncode == 0
    daemon.await_serving()


def test_a_wait_that_is_too_long_says_what_goes_on_and_how_to_look(daemon: Daemon) -> None:
    with stopped_engine(daemon, 1):
        done = daemon.ctl("park", "1", "--within", "1500ms")
        assert (done.returncode, done.stdout) == (EXIT_TIMEOUT, "")
        progress, last = done.stderr.splitlines()
        assert progress.startswith("engine 1: it is serving, with ")
        assert "it parks when it is empty" in last
        assert "`llumctl wake 1`" in last and "`llumctl status`" in last
        assert "serving, to be parked" in daemon.ctl("status").stdout
        done = daemon.ctl("park", "1", "--within", "1ms", "--json")
        answer = json.loads(done.stdout)
        assert (done.returncode, done.stderr) == (EXIT_TIMEOUT, "")
        assert (answer["engine"], answer["parked"], answer["code"]) == (1, False, "timeout")
        assert answer["left"] > 0


def test_ctrl_c_ends_the_wait_but_not_the_order(daemon: Daemon) -> None:
    with stopped_engine(daemon, 1), start_ctl(daemon, "drain", "1", "--within", "1m") as waiting:
        assert first_line(waiting)
        waiting.send_signal(signal.SIGINT)
        out, errors = waiting.communicate(timeout=20)
        assert (waiting.returncode, out) == (130, "")
        assert errors.splitlines()[-1].startswith("llumctl: interrupted; the order to drain engine 1 stands")
        assert daemon.child("engine", 1)["desired"] == "draining"


def test_another_operator_ends_the_wait(daemon: Daemon) -> None:
    with stopped_engine(daemon, 1), start_ctl(daemon, "drain", "1", "--within", "1m") as waiting:
        assert first_line(waiting)
        assert json_of(daemon, "wake", "1", "--no-wait") == {"engine": 1, "desired": "serving"}
        _, errors = waiting.communicate(timeout=20)
        assert waiting.returncode == 1
        assert "another order has changed the desired state of engine 1 to serving" in errors


def test_the_wait_goes_on_with_the_next_coordinator(daemon: Daemon) -> None:
    with stopped_engine(daemon, 1), start_ctl(daemon, "drain", "1", "--within", "1m") as waiting:
        assert first_line(waiting)
        daemon.await_successor("coordinator", 0, daemon.kill("coordinator"))
        daemon.kill("engine", 1, signal.SIGCONT)
        out, errors = waiting.communicate(timeout=30)
        assert waiting.returncode == 0, errors
        assert out.startswith("engine 1 is empty after ")


def test_an_engine_that_has_died_can_be_parked(daemon: Daemon) -> None:
    daemon.kill("engine", 1)
    done = daemon.ctl("park", "1")
    assert done.returncode == 0, done.stderr
    assert daemon.ctl("wake", "1").returncode == 0
    daemon.await_serving()


# -- errors and output


def test_errors_of_the_daemon_are_json_too(daemon: Daemon) -> None:
    for args, code in (
        (("drain", "7"), "not_found"),
        (("wake", "-1"), "not_found"),
        (("cancel", "cmpl-unknown"), "not_found"),
        (("migrate", "cmpl-unknown", "--to", "1"), "not_found"),
        (("priority", "cmpl-unknown", "urgent"), "refused"),
    ):
        done = daemon.ctl(*args, "--json")
        assert (done.returncode, done.stderr) == (1, "")
        answer = json.loads(done.stdout)
        assert answer["code"] == code
        assert daemon.ctl(*args).stderr == f"llumctl: {answer['error']}\n"


def test_the_end_of_a_pipe_is_no_error(daemon: Daemon) -> None:
    command = (
        f"{' '.join(PYTHON)} daemon.cli.llumctl --run-dir {daemon.run_dir} config | true; echo ${{PIPESTATUS[0]}}"
    )
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=20, check=False)
    assert (done.stdout, done.stderr) == ("0\n", "")


def test_status_while_the_daemon_shuts_down(start: Start) -> None:
    daemon = start("--drain-timeout", "30s", "--stub-step", "10ms")
    assert json_of(daemon, "status")["state"] == "serving"
    with Clients(daemon, [LONG] * 2) as clients:
        clients.await_tokens(2)
        daemon.processes()
        daemon.process.send_signal(signal.SIGTERM)
        wait_for("the drain", lambda: daemon.status()["shutdown"])
        status = json_of(daemon, "status")
        assert (status["state"], status["shutdown"]["requests"]) == ("draining", 2)
        assert 0 < status["shutdown"]["seconds_left"] <= 30
        text = daemon.ctl("status").stdout.splitlines()
        assert text[1].startswith("shutting down: 2 requests left, cut off in ")
        done = daemon.ctl("wake", "1", "--json")
        assert (done.returncode, json.loads(done.stdout)["code"]) == (1, "shutting_down")
        clients.hang_up()
    assert daemon.wait() == 0


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
