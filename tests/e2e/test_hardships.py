"""The daemon outlives a terminal that closes or is suspended and output that cannot be written, and a start without
room for what it needs ends with a message.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from bench.live import serve_command
from daemon.ipc.child import EXIT_CONFIG
from tests.e2e.conftest import Start
from tests.e2e.daemon_process import ROOT, Daemon, is_alive, title_of, wait_for


@pytest.fixture(scope="module")
def daemon(start_shared: Start) -> Daemon:
    return start_shared("--devices", "cpu")


def incarnations(daemon: Daemon) -> list[int]:
    """Return the incarnation of every child."""
    status = daemon.status()
    return [p["incarnation"] for p in (status["coordinator"], *status["frontends"], *status["engines"])]


def assert_unharmed(daemon: Daemon) -> None:
    """Assert that the daemon serves, and that no child has been started a second time."""
    assert daemon.complete(max_tokens=1).status_code == 200
    assert incarnations(daemon) == [1, 1, 1]


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGPIPE, signal.SIGXFSZ, signal.SIGUSR2])
def test_signals_to_the_group_that_end_no_process(daemon: Daemon, number: signal.Signals) -> None:
    os.killpg(daemon.process.pid, number)
    time.sleep(0.5)  # a child that has died is reported within a tick
    assert_unharmed(daemon)


def test_sighup_is_a_reload(daemon: Daemon) -> None:
    daemon.process.send_signal(signal.SIGHUP)
    wait_for("a line about the reload", lambda: "nothing to read again" in daemon.log)
    assert_unharmed(daemon)


def test_a_suspended_daemon_goes_on_where_it_stopped(start: Start) -> None:
    """Ctrl-Z: after the resume no process is taken for one that hangs."""
    daemon = start("--devices", "cpu", "--hang-timeout", "0")
    os.killpg(daemon.process.pid, signal.SIGSTOP)
    time.sleep(7)  # longer than an engine's deadline
    os.killpg(daemon.process.pid, signal.SIGCONT)
    time.sleep(1)
    assert_unharmed(daemon)


def test_sigquit_ends_everything_at_once(home: Path) -> None:
    """Ctrl-\\ is for a daemon that does not answer, so it does not drain."""
    # A shell starts its background jobs with SIGQUIT ignored, and what they start inherits that.
    inherited = signal.signal(signal.SIGQUIT, signal.SIG_DFL)
    daemon = Daemon(home, "--devices", "cpu")
    try:
        daemon.await_ready()
        daemon.processes()
        os.killpg(daemon.process.pid, signal.SIGQUIT)
        assert daemon.wait() == -signal.SIGQUIT
        wait_for("every process gone", lambda: not daemon.processes())
    finally:
        signal.signal(signal.SIGQUIT, inherited)
        daemon.clean_up()


def closed_pipe() -> int:
    """Return the writing end of a pipe whose reader is gone, as after `llumd serve | head -1`."""
    read, write = os.pipe()
    os.close(read)
    return write


def full_pipe() -> int:
    """Return the writing end of a pipe whose reader does not read, as a pager that is left open."""
    _, write = os.pipe()
    os.set_blocking(write, False)
    with pytest.raises(BlockingIOError):
        while True:
            os.write(write, b"x" * 4096)
    os.set_blocking(write, True)
    return write  # the other end stays open in this process


def full_disk() -> int:
    return os.open("/dev/full", os.O_WRONLY)


@pytest.mark.parametrize("outputs", [(full_disk, closed_pipe), (full_pipe, full_pipe), None])
def test_output_that_cannot_be_written(
    home: Path, outputs: tuple[Callable[[], int], Callable[[], int]] | None
) -> None:
    """A child that dies is started again, the daemon hears SIGTERM and ends with 0. None: both are closed."""
    command = serve_command("demo", "--engine", "stub", "--devices", "cpu", "--port", "0", "--run-dir", str(home))
    out, err = [make() for make in outputs] if outputs else (None, None)
    close = None if outputs else lambda: os.closerange(1, 3)
    process = subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=out, stderr=err,
        preexec_fn=close,  # noqa: PLW1509
    )  # fmt: skip
    top = psutil.Process(process.pid)
    try:
        daemon = Attached(home, process)
        before = wait_for("the daemon", daemon.serving_engine, 30)
        os.kill(before, signal.SIGKILL)
        wait_for("a new engine", lambda: (pid := daemon.serving_engine()) is not None and pid != before)
        children = top.children()
        process.send_signal(signal.SIGTERM)
        assert process.wait(15) == 0
        assert not [p for p in children if is_alive(p) and "llumd:" in title_of(p)]
    finally:
        process.kill()


class Attached(Daemon):
    """A daemon that the test has started itself."""

    def __init__(self, run_dir: Path, process: subprocess.Popen[bytes]) -> None:
        self.run_dir, self.process = run_dir, process

    def serving_engine(self) -> int | None:
        """Return the pid of engine 0; None if it does not serve."""
        status = self.try_status()
        return status["engines"][0]["pid"] if status and status["engines"][0]["state"] == "serving" else None


def ended(home: Path, *command: str, files: int = 0) -> tuple[int, str]:
    """Run a daemon that cannot start, with at most `files` open files. Return exit code and stderr."""
    limit = (lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))) if files else None
    command = (*command, *serve_command("demo", "--engine", "stub", "--port", "0", "--run-dir", str(home / "run")))
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=False, preexec_fn=limit
    )
    assert not (home / "run" / "admin.sock").exists()
    return done.returncode, done.stderr


@pytest.mark.parametrize("files", [12, 24])
def test_too_few_descriptors(home: Path, files: int) -> None:
    code, stderr = ended(home, files=files)
    assert code == EXIT_CONFIG, stderr
    assert "ulimit -n" in stderr
    assert "Traceback" not in stderr


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare"), reason="needs root and unshare")
@pytest.mark.parametrize("size", ["32m", "700m"])
def test_too_little_shared_memory(home: Path, size: str) -> None:
    """32 MiB hold no journal; 700 MiB hold the pool of one engine and not of both."""
    mount = f'mount -t tmpfs -o size={size} tmpfs /dev/shm && exec "$@" --kv-memory 400MiB'
    if subprocess.run(["unshare", "-m", "true"], check=False).returncode:
        pytest.skip("unshare is not allowed here")
    code, stderr = ended(home, "unshare", "-m", "bash", "-c", mount, "serve")
    assert code == EXIT_CONFIG, stderr
    assert "/dev/shm has no room for" in stderr
    assert "Errno" not in stderr and "Traceback" not in stderr
