"""A call of the start that fails, or a signal in the middle of it, ends the daemon: see `start_faults`."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from daemon.ipc.child import EXIT_CONFIG, EXIT_FAILED

pytestmark = pytest.mark.integration
ROOT = Path(__file__).parents[2]
FORKS = 5  # the resource tracker of `multiprocess`, and four children


class Runner:
    """The process that runs the daemon again and again. `counts`: calls of each target in a start without a fault."""

    def __init__(self, home: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.supervisor.start_faults", str(home)],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.counts: dict[str, int] = self._answer()

    def end_with(self, target: str, n: int, action: str) -> dict[str, Any]:
        """Start the daemon, whose n-th call of `target` does `action`; return how it ended."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([target, n, action]) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the runner has ended; see stderr"
        return json.loads(line)


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    runner = Runner(tmp_path_factory.mktemp("d"))
    yield runner
    runner.process.communicate(timeout=10)


def assert_ended(end: dict[str, Any], code: int) -> None:
    """Assert the exit code, and that no process, no lock and no socket is left."""
    assert end["code"] == code, end
    assert (end["left"], end["locked"], end["socket"]) == ([], False, False), end


def some(calls: int) -> list[int]:
    """Return the first, a middle and the last call of `calls`."""
    return sorted({1, (calls + 1) // 2, calls})


TARGETS = [
    "open", "socket", "SharedMemory", "fallocate", "mmap", "eventfd", "epoll", "register", "pipe2", "pipe", "fork",
    "hand over", "pidfd_open",
]  # fmt: skip


def test_the_targets_are_those_of_a_real_start(runner: Runner) -> None:
    assert list(runner.counts) == TARGETS
    assert all(runner.counts.values())
    assert runner.counts["fork"] == FORKS


@pytest.mark.parametrize("target", TARGETS)
def test_a_call_that_fails_ends_the_start(runner: Runner, target: str) -> None:
    for n in some(runner.counts[target]):
        end = runner.end_with(target, n, "EMFILE")
        assert_ended(end, EXIT_CONFIG)
        (message,) = [line for line in end["log"].splitlines() if line.startswith("llumd: ")]
        assert "Errno" not in message
        # A child that does not get its arguments ends by itself, with a traceback of `multiprocess`.
        assert target == "hand over" or "Traceback" not in end["log"]


@pytest.mark.parametrize("target", TARGETS)
def test_a_signal_in_the_middle_of_the_start_is_heard(runner: Runner, target: str) -> None:
    for n in {1, runner.counts[target]}:
        end = runner.end_with(target, n, "SIGTERM")
        assert_ended(end, 0)
        assert "Traceback" not in end["log"]


@pytest.mark.parametrize("target", ["register", "pipe", "fork", "hand over", "pidfd_open"])
def test_an_error_of_our_own_ends_the_start_too(runner: Runner, target: str) -> None:
    end = runner.end_with(target, runner.counts[target], "RuntimeError")
    assert_ended(end, EXIT_FAILED)
    assert "please report this" in end["log"]


@pytest.mark.slow
@pytest.mark.parametrize("action", ["ENOSPC", "EAGAIN", "SIGINT"])
def test_every_call(runner: Runner, action: str) -> None:
    for target, calls in runner.counts.items():
        for n in range(1, calls + 1):
            assert_ended(runner.end_with(target, n, action), 0 if action.startswith("SIG") else EXIT_CONFIG)
