"""The daemon under test: its start, its processes as the kernel shows them, and orders."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.live import READY_LINE, sample_values, serve_command
from bench.nemesis.shared_memory import SharedMemory
from bench.nemesis.steps import ARMED, STEPS
from daemon.cli import admin_client

ROOT = Path(__file__).parents[2]
HOOKS = Path(__file__).parent / "hooks"
STARTS = 120.0  # seconds that the start may take
TITLE = "llumd: "


class Daemon:
    """`llumd serve` and all that can be seen of it from outside."""

    def __init__(
        self, process: subprocess.Popen[str], home: Path, model: str, url: str, memory: SharedMemory
    ) -> None:
        self.process = process
        self.home = home
        self.model = model
        self.url = url
        self.memory = memory

    @property
    def run_dir(self) -> Path:
        return self.home / "run"

    @property
    def log(self) -> str:
        return (self.home / "err").read_text(errors="replace")

    # -- processes ----------------------------------------------------------------------------------

    def pids(self) -> dict[str, int]:
        """Return the pids of the children that have their name: "engine 0", "frontend 1", "coordinator", ..."""
        found = {}
        for pid in self.children():
            if (title := _title(pid)).startswith(TITLE):
                found[title.removeprefix(TITLE)] = pid
        return found

    def children(self) -> list[int]:
        """Return the pids of all processes whose parent is the supervisor."""
        pid = self.process.pid
        with contextlib.suppress(OSError):
            return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        return []

    def descriptors(self, pid: int) -> list[str]:
        """Return what the descriptors of a process lead to; numbers that differ in each start are cut off."""
        found = []
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                found.append(os.readlink(fd))
        return found

    # -- orders -------------------------------------------------------------------------------------

    async def call(self, method: str, route: str) -> dict[str, Any] | None:
        """Send an order to the admin socket; return None if the daemon refuses it, or the coordinator is gone."""
        try:
            return await asyncio.to_thread(admin_client.call, self.run_dir / "admin.sock", method, route)
        except (admin_client.CtlError, OSError):
            return None

    async def ctl(self, *arguments: str, timeout: float = 90.0) -> int:
        """Run llumctl; return its exit code."""
        command = [sys.executable, "-m", "daemon.cli.llumctl", "--run-dir", str(self.run_dir), *arguments]
        out = subprocess.DEVNULL
        process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdout=out, stderr=out, stdin=out)
        try:
            return await asyncio.wait_for(process.wait(), timeout)
        except TimeoutError:
            process.kill()
            return await process.wait()

    async def metric(self, name: str) -> float:
        """Return the sum of a metric's series, as any frontend tells it."""
        import aiohttp

        async with aiohttp.ClientSession() as session, session.get(f"{self.url}/metrics") as response:
            return sum(sample_values(await response.text(), name))


def _title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").strip()
    except OSError:
        return ""


@contextlib.contextmanager
def serving(home: Path, model: str, *flags: str, journal_bytes: int, outbox_bytes: int) -> Iterator[Daemon]:
    """Start a daemon with the hooks of the nemesis; its files are in `home`. It is killed at the end."""
    home.mkdir(parents=True, exist_ok=True)
    command = serve_command(model, "--run-dir", str(home / "run"), "--port", "0", "--log-level", "info")
    command += ["--journal-memory", str(journal_bytes), "--outbox-memory", str(outbox_bytes), *flags]
    environment = os.environ | {"PYTHONPATH": f"{HOOKS}:{ROOT}", "NEMESIS_STEPS": str(home / "steps")}
    (home / "steps").mkdir()
    (home / "steps" / ARMED).write_bytes(bytes(len(STEPS)))
    with open(home / "out", "w") as out, open(home / "err", "w") as err:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=out, stderr=err, text=True, start_new_session=True
        )
    try:
        url, served = _await_ready(process, home)
        yield Daemon(process, home, served, url, SharedMemory(process.pid, journal_bytes, outbox_bytes))
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGCONT)
            process.kill()
        process.wait()


def _await_ready(process: subprocess.Popen[str], home: Path) -> tuple[str, str]:
    """Wait until the daemon serves; return its URL and the name of its model."""
    end = time.monotonic() + STARTS
    while not (found := READY_LINE.search((home / "out").read_text())):
        if process.poll() is not None or time.monotonic() > end:
            raise SystemExit(f"the daemon did not start:\n{(home / 'err').read_text()[-4000:]}")
        time.sleep(0.05)
    return found["url"], found["model"]
