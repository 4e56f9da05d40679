"""Starting `torture.py` beside a test, on memory that both see."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]


class Victim:
    """The running program."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def result(self) -> dict[str, int]:
        """What it printed; fails if it did, or if any of its children ended without being killed."""
        out, err = self._process.communicate(timeout=60)
        assert self._process.returncode == 0 and not err, err
        return json.loads(out)


@contextmanager
def victim(*args: object, fds: tuple[int, ...]) -> Iterator[Victim]:
    command = [sys.executable, "-m", "tests.ipc.programs", *map(str, args)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, pass_fds=fds, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            yield Victim(process)
        finally:
            if process.poll() is None:
                process.kill()
