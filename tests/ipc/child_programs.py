"""Starts `tests.ipc.programs` beside a test, on memory that both share."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
TIMEOUT = 60.0  # seconds


class RunningProgram:
    """A running program."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._deadline = time.monotonic() + TIMEOUT

    def check_running(self) -> None:
        """Fail if the program has ended or runs for more than TIMEOUT seconds."""
        assert self._process.poll() is None, "the program has ended"
        assert time.monotonic() < self._deadline, "the test does not make progress"

    def stop(self) -> None:
        """Let the program end; the programs run until their stdin is closed."""
        if self._process.stdin:
            self._process.stdin.close()
            self._process.stdin = None  # otherwise `communicate` would flush it

    def result(self) -> dict[str, int]:
        """Stop the program, wait for its end and return the JSON that it has printed.

        Fails if the program fails or prints to stderr, or if one of its children ended without being killed.
        """
        self.stop()
        out, err = self._process.communicate(timeout=TIMEOUT)
        assert self._process.returncode == 0 and not err, err
        return json.loads(out)


@contextmanager
def start_program(*args: object, fds: tuple[int, ...]) -> Iterator[RunningProgram]:
    """Start the program with `args`; it inherits `fds`."""
    command = [sys.executable, "-m", "tests.ipc.programs", *map(str, args)]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, cwd=ROOT, pass_fds=fds, stdin=pipe, stdout=pipe, stderr=pipe, text=True
    ) as process:
        try:
            yield RunningProgram(process)
        finally:
            if process.poll() is None:
                process.kill()
