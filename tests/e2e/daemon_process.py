"""A real daemon to test against, and what the kernel says of it."""

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

from daemon.cli import llumctl

ROOT = Path(__file__).parents[2]
PYTHON = [sys.executable, "-m"]
HEADERS = {"Content-Type": "application/json"}

READY = 150.0  # seconds that a start may take: the first on a machine compiles kernels, here beside other work
HELD = ("running", "waiting", "incoming", "outgoing", "kv_used_blocks")  # of an engine

T = TypeVar("T")


def wait_for(what: str, probe: Callable[[], T | None], timeout: float = 20.0) -> T:
    """The first true value that `probe` gives; AssertionError naming `what` after `timeout` seconds."""
    end = time.monotonic() + timeout
    while True:
        value = probe()
        if value:
            return value
        assert time.monotonic() < end, f"not within {timeout:g} s: {what} (last: {value!r})"
        time.sleep(0.02)


def lives(process: psutil.Process) -> bool:
    """Whether it runs; it may end at any moment."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class Daemon:
    """`llumd serve` in a session of its own, with everything it leaves in `home`."""

    def __init__(self, home: Path, *flags: str, model: str = "demo", engine: str = "stub", key: str = "") -> None:
        self.home = home
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.run_dir = home / "run"
        home.mkdir(parents=True, exist_ok=True)
        command = [*PYTHON, "daemon.cli.llumd", "serve", model, "--engine", engine, "--run-dir", str(self.run_dir)]
        if "--port" not in flags:
            command += ["--port", "0"]
        with open(home / "out", "w") as out, open(home / "err", "w") as err:
            self.process = subprocess.Popen(
                [*command, *flags], cwd=ROOT, stdout=out, stderr=err, stdin=subprocess.DEVNULL, start_new_session=True
            )
        self.url = ""
        self._family: dict[int, psutil.Process] = {}

    # -- life

    def await_ready(self, timeout: float = READY) -> Daemon:
        """Until the ready line is printed and every process serves."""
        self.await_announced(timeout)
        return self.await_whole(timeout)

    def await_announced(self, timeout: float = READY) -> None:
        def announced() -> str | None:
            assert self.process.poll() is None, f"the daemon has ended:\n{self.log}"
            found = re.search(r"serves \S+ at (\S+)$", (self.home / "out").read_text(), re.MULTILINE)
            return found and found[1]

        self.url = wait_for("the ready line", announced, timeout)

    def await_whole(self, timeout: float = 30.0) -> Daemon:
        """Until every process serves and every frontend sees every engine."""

        def whole() -> bool:
            status = self.try_status()
            if status is None:
                return False
            engines, others = status["engines"], [*status["frontends"], status["coordinator"]]
            return all(p["state"] == "serving" for p in others) and all("running" in e for e in engines)

        wait_for("every process serving", whole, timeout)
        wait_for("every engine known to the frontends", self._answers_alike, timeout)
        return self

    def _answers_alike(self) -> bool:
        engines = len(self.status()["engines"])
        try:
            text = self.get("/metrics", **self._headers).text
        except httpx.TransportError:
            return False
        return len(re.findall(r"^llumd:engine_serving\{.*\} 1", text, re.MULTILINE)) == engines

    def wait(self, timeout: float = 15.0) -> int:
        """The exit code."""
        return self.process.wait(timeout)

    def terminate(self, timeout: float = 15.0) -> int:
        """SIGTERM, and the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.wait(timeout)

    def family(self) -> list[psutil.Process]:
        """Every process of the daemon that was ever seen and still lives, the supervisor's included."""
        if self.process.poll() is None:
            top = psutil.Process(self.process.pid)
            for p in [top, *top.children(recursive=True)]:
                self._family.setdefault(p.pid, p)
        return [p for p in self._family.values() if lives(p)]

    def clean_up(self) -> None:
        """Whatever a failed test has left must not disturb the next."""
        family = self.family()
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for p in family:
            with suppress(psutil.NoSuchProcess):
                p.kill()

    @property
    def log(self) -> str:
        return (self.home / "err").read_text()

    # -- its processes, by status

    def status(self) -> dict[str, Any]:
        return llumctl.call(self.run_dir / "admin.sock", "GET", "/v1/status")

    def try_status(self) -> dict[str, Any] | None:
        """None while no coordinator answers."""
        try:
            return self.status()
        except (llumctl.NotRunning, llumctl.Refused, TimeoutError):
            return None

    def child(self, role: str, index: int = 0) -> dict[str, Any]:
        """The status row of `engine`, `frontend` or `coordinator`; waits for a coordinator that answers."""
        status = wait_for("an answer of the coordinator", self.try_status)
        return status["coordinator"] if role == "coordinator" else status[f"{role}s"][index]

    def kill(self, role: str, index: int = 0, number: int = signal.SIGKILL) -> dict[str, Any]:
        """Signal a child; its row of before."""
        self.family()
        row = self.child(role, index)
        os.kill(row["pid"], number)
        return row

    def await_successor(self, role: str, index: int, before: dict[str, Any]) -> dict[str, Any]:
        """The row of the process that took the place of `before`."""

        def successor() -> dict[str, Any] | None:
            row = self.child(role, index)
            return row if row["incarnation"] > before["incarnation"] and row["state"] == "serving" else None

        return wait_for(f"a new {role} {index}", successor)

    def requests(self) -> list[dict[str, Any]]:
        return llumctl.call(self.run_dir / "admin.sock", "GET", "/v1/requests")["requests"]

    def await_idle(self, timeout: float = 10.0) -> None:
        """Until no request is anywhere and no block is held."""

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

    def ctl(self, *args: str) -> subprocess.CompletedProcess[str]:
        """`llumctl` as an operator runs it."""
        command = [*PYTHON, "daemon.cli.llumctl", "--run-dir", str(self.run_dir), *args]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=False)

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
        """The sum of the series called `name`."""
        lines = re.findall(rf"^{re.escape(name)}(?:{{.*}})? (\S+)$", self.get("/metrics").text, re.MULTILINE)
        assert lines, f"no metric {name}"
        return sum(map(float, lines))


@contextmanager
def running(home: Path, *flags: str, whole: bool = True, **options: Any) -> Iterator[Daemon]:
    """A daemon that is ready (`whole`: with every engine), and that must end well: exit code 0, no process left,
    no traceback logged.

    A test that ends the daemon itself judges the exit code itself.
    """
    daemon = Daemon(home, *flags, **options)
    try:
        daemon.await_announced()
        yield daemon.await_whole() if whole else daemon
        if daemon.process.poll() is None:
            daemon.family()
            assert daemon.terminate() == 0, daemon.log
        wait_for("every process gone", lambda: not daemon.family(), 2.0)
        assert "Traceback" not in daemon.log, daemon.log
    finally:
        daemon.clean_up()
        shutil.rmtree(home, ignore_errors=True)


def refused(home: Path, *arguments: str) -> tuple[int, str]:
    """`llumd serve` with arguments that must not work: exit code and stderr."""
    command = [*PYTHON, "daemon.cli.llumd", "serve", "--run-dir", str(home / "run"), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=False)
    return done.returncode, done.stderr
