"""What every child process does first: die with the supervisor, say in `ps` what it is, log, find the fabric."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
from dataclasses import dataclass

import setproctitle

from daemon.config import Config
from daemon.ipc.fabric import Fabric, FabricHandles

PR_SET_PDEATHSIG = 1
EXIT_FAILED = 1
EXIT_CONFIG = 78  # sysexits' EX_CONFIG: starting again cannot help
EXIT_PARKED = 79  # an engine that is wished parked and has nothing left to do
STOP_SIGNAL = signal.SIGUSR1  # the supervisor's word to finish and exit


@dataclass(frozen=True, slots=True)
class ChildSpec:
    """Everything a child is told: plain values and descriptors."""

    config: Config
    handles: FabricHandles
    process: int
    incarnation: int
    supervisor_pid: int
    model_dir: str
    listener: int = -1  # frontends: the HTTP socket; coordinator: the admin socket
    pool: int = -1  # engines: their KV pool segment


def begin(spec: ChildSpec) -> Fabric:
    """Tie this process to the supervisor's life and attach it to the fabric."""
    _die_with(spec.supervisor_pid)
    role, index = spec.handles.topology.role(spec.process)
    name = role if role == "coordinator" else f"{role} {index}"
    setproctitle.setproctitle(f"llumd: {name}")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # they may reach the whole group; the supervisor decides
    start_logging(spec.config.log_level, name)
    return Fabric(spec.handles, spec.process, spec.incarnation)


def start_logging(level: str, name: str) -> None:
    """Log lines to stderr; under systemd with the priority prefix that journald understands."""
    under_journald = "JOURNAL_STREAM" in os.environ
    form = "%(message)s" if under_journald else "%(asctime)s %(levelname)-7s %(message)s"
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter(form.replace("%(message)s", f"llumd {name}: %(message)s"), under_journald))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


class _Formatter(logging.Formatter):
    _PRIORITY = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}  # noqa: RUF012

    def __init__(self, form: str, prefixed: bool) -> None:
        super().__init__(form, "%H:%M:%S")
        self._prefixed = prefixed

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return f"<{self._PRIORITY.get(record.levelno, 6)}>{text}" if self._prefixed else text


def _die_with(parent: int) -> None:
    # The kernel sends the signal when the forking *thread* ends: the supervisor forks from its main thread only.
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:  # it died before the call
        os._exit(1)
