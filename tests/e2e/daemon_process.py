"""A real daemon under test: start and stop it, find its processes, read its status and metrics."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import httpx
import psutil

from bench.live import READY_LINE, sample_values, serve_command
from daemon.cli import admin_client

ROOT = Path(__file__).parents[2]
PYTHON = [sys.executable, "-m"]
HEADERS = {"Content-Type": "application/json"}

READY = 150.0  # seconds a start may take: the first start on a machine compiles kernels
# Numbers in an engine's status row that are 0 when it is idle.
HELD = ("running", "waiting", "incoming", "outgoing", "kv_used_blocks")

T = TypeVar("T")


def wait_for(what: str, probe: Callable[[], T | None], timeout: float = 20.0) -> T:
    """Return the first true value of `probe()`. Raises AssertionError with `what` in it after `timeout` seconds."""
    end = time.monotonic() + timeout
    while True:
        value = probe()
        if value:
            return value
        assert time.monotonic() < end, f"not within {timeout:g} s: {what} (last: {value!r})"
        time.sleep(0.02)


def is_alive(process: psutil.Process) -> bool:
    """Return True if the process runs. It may end at any moment."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def title_of(process: psutil.Process) -> str:
    """Return the command line of the process as one string; empty if it has ended."""
    try:
        return " ".join(process.cmdline()).strip()
    except psutil.NoSuchProcess:
        return ""


class Daemon:
    """`llumd serve` in a session of its own. All its files are in `home`.

    Without `standby` it has no standby frontend: few tests need one, and each costs a second of CPU time.
    """

    def __init__(
        self,
        home: Path,
        *flags: str,
        model: str = "demo",
        engine: str = "stub",
        key: str = "",
        standby: bool = False,
        env: dict[str, str] | None = None,
    ) -> None:
        self.home = home
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.run_dir = home / "run"
        home.mkdir(parents=True, exist_ok=True)
        command = serve_command(model, "--engine", engine, "--run-dir", str(self.run_dir))
        if "--port" not in flags:
            command += ["--port", "0"]
        if not standby:
            command += ["--no-standby-frontend"]
        with open(home / "out", "w") as out, open(home / "err", "w") as err:
            self.process = subprocess.Popen(
                [*command, *flags],
                cwd=ROOT,
                env=env,
                stdout=out,
                stderr=err,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        self.url = ""
        self._seen: dict[int, psutil.Process] = {}

    # -- processes

    def await_ready(self, timeout: float = READY) -> Daemon:
        """Wait until the ready line is printed and every process serves."""
        self.await_ready_line(timeout)
        return self.await_serving(timeout)

    def await_ready_line(self, timeout: float = READY) -> None:
        """Wait for the ready line and store the URL that it names."""

        def announced() -> str | None:
            assert self.process.poll() is None, f"the daemon has ended:\n{self.log}"
            found = READY_LINE.search((self.home / "out").read_text())
            return found and found["url"]

        self.url = wait_for("the ready line", announced, timeout)

    def await_serving(self, timeout: float = 30.0) -> Daemon:
        """Wait until every process serves and the frontends see every engine.

        Wait also until each engine has opened its peers' pools: before, orders to migrate are refused.
        """

        def all_serve() -> bool:
            status = self.try_status()
            if status is None:
                return False
            engines, others = status["engines"], [*status["frontends"], status["coordinator"]]
            return all(p["state"] == "serving" for p in others) and all(map(_reaches_its_peers, engines))

        wait_for("every process serving", all_serve, timeout)
        wait_for("every engine known to the frontends", self._frontends_see_all_engines, timeout)
        return self

    def _frontends_see_all_engines(self) -> bool:
        engines = len(self.status()["engines"])
        try:
            text = self.get("/metrics", **self._headers).text
        except httpx.TransportError:
            return False
        return len(re.findall(r"^llumd:engine_serving\{.*\} 1", text, re.MULTILINE)) == engines

    def wait(self, timeout: float = 15.0) -> int:
        """Wait for the supervisor's end and return its exit code."""
        return self.process.wait(timeout)

    def terminate(self, timeout: float = 15.0) -> int:
        """Send SIGTERM to the supervisor and return its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.wait(timeout)

    def processes(self) -> list[psutil.Process]:
        """Return the processes of the daemon that still run, the supervisor included.

        Once the supervisor has ended only processes that an earlier call has seen can be found.
        """
        if self.process.poll() is None:
            top = psutil.Process(self.process.pid)
            for p in [top, *top.children(recursive=True)]:
                self._seen.setdefault(p.pid, p)
        return [p for p in self._seen.values() if is_alive(p)]

    def await_gone(self) -> None:
        """Assert that the supervisor, which has ended, reaped all its children; wait until no helper process is left.

        Helpers, such as Python's resource tracker, end by themselves once their parent has ended.
        """
        left = [title for title in map(title_of, self.processes()) if title.startswith("llumd:")]
        assert not left, f"the supervisor has left {left}"
        wait_for("every process gone", lambda: not self.processes())

    def clean_up(self) -> None:
        """Kill all processes that a failed test has left."""
        processes = self.processes()
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for p in processes:
            with suppress(psutil.NoSuchProcess):
                p.kill()

    @property
    def log(self) -> str:
        """Everything that the daemon has written to stderr."""
        return (self.home / "err").read_text()

    # -- status

    def status(self) -> dict[str, Any]:
        return admin_client.call(self.run_dir / "admin.sock", "GET", "/v1/status")

    def try_status(self) -> dict[str, Any] | None:
        """Return the status; None while no coordinator answers."""
        try:
            return self.status()
        except (admin_client.NotRunning, admin_client.Refused, TimeoutError):
            return None

    def child(self, role: str, index: int = 0) -> dict[str, Any]:
        """Return the status row of an `engine`, `frontend` or `coordinator`. Waits for the coordinator's answer."""
        status = wait_for("an answer from the coordinator", self.try_status)
        return status["coordinator"] if role == "coordinator" else status[f"{role}s"][index]

    def kill(self, role: str, index: int = 0, number: int = signal.SIGKILL) -> dict[str, Any]:
        """Send a signal to a child. Return its status row from before."""
        self.processes()
        row = self.child(role, index)
        os.kill(row["pid"], number)
        return row

    def await_successor(self, role: str, index: int, before: dict[str, Any]) -> dict[str, Any]:
        """Wait until the successor of the child with row `before` serves. Return the successor's row."""

        def successor() -> dict[str, Any] | None:
            row = self.child(role, index)
            return row if row["incarnation"] > before["incarnation"] and row["state"] == "serving" else None

        return wait_for(f"a new {role} {index}", successor)

    def requests(self) -> list[dict[str, Any]]:
        return admin_client.call(self.run_dir / "admin.sock", "GET", "/v1/requests")["requests"]

    def await_idle(self, timeout: float = 10.0) -> None:
        """Wait until no process has a request and no engine holds a block."""

        def idle() -> bool:
            status = self.try_status()
            return (
                status is not None
                and all("running" in e for e in status["engines"])
                and not any(e[name] for e in status["engines"] for name in HELD)
                and not any(f["active"] for f in status["frontends"])
                and not self.requests()
            )

        wait_for("no request and no block held", idle, timeout)

    def ctl(self, *args: str, timeout: float = 20.0) -> subprocess.CompletedProcess[str]:
        """Run `llumctl` as an operator does."""
        command = [*PYTHON, "daemon.cli.llumctl", "--run-dir", str(self.run_dir), *args]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False)

    # -- HTTP

    def get(self, path: str, **headers: str) -> httpx.Response:
        return httpx.get(self.url + path, headers=headers, timeout=20)

    def complete(self, prompt: str | list[int] = "Hello", **fields: Any) -> httpx.Response:
        """POST /v1/completions."""
        return self.post({"prompt": prompt, **fields})

    def post(self, body: dict[str, Any]) -> httpx.Response:
        """POST /v1/completions with exactly this body."""
        return httpx.post(f"{self.url}/v1/completions", json=body, timeout=60)

    def metric(self, name: str) -> float:
        """Return the sum of the series with this name."""
        values = sample_values(self.get("/metrics").text, name)
        assert values, f"no metric {name}"
        return sum(values)


@contextmanager
def running(
    home: Path, *flags: str, all_serving: bool = True, tracebacks: bool = False, **options: Any
) -> Iterator[Daemon]:
    """Start a daemon; at the end assert exit code 0, no process left and, without `tracebacks`, none in the log.

    `all_serving`: wait until every engine serves; otherwise until the first does. A test that stops the daemon checks
    the exit code itself.
    """
    daemon = Daemon(home, *flags, **options)
    try:
        daemon.await_ready_line()
        yield daemon.await_serving() if all_serving else daemon
        if daemon.process.poll() is None:
            daemon.processes()
            assert daemon.terminate() == 0, daemon.log
        daemon.await_gone()
        assert tracebacks or "Traceback" not in daemon.log, daemon.log
    finally:
        daemon.clean_up()
        shutil.rmtree(home, ignore_errors=True)


def refused(home: Path, *arguments: str) -> tuple[int, str]:
    """Run `llumd serve` with arguments that it must refuse. Return exit code and stderr."""
    command = serve_command("--run-dir", str(home / "run"), *arguments)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=False)
    return done.returncode, done.stderr


def checked(home: Path, *arguments: str) -> tuple[int, str]:
    """Run `llumd check`. Return exit code and stderr."""
    command = [*PYTHON, "daemon.cli.llumd", "check", "--run-dir", str(home / "run"), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=False)
    return done.returncode, done.stderr


def _reaches_its_peers(engine: dict[str, Any]) -> bool:
    """Return True if the engine runs and waits for no pool of another one."""
    return "peer_pools" in engine and "not_open" not in engine["peer_pools"].values()
