"""The start of every child process: bind it to the supervisor, set its name and its logging, attach shared memory."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
from dataclasses import dataclass

import setproctitle

from daemon.config import Config
from daemon.ipc import code_version, output
from daemon.ipc.code_version import CodeVersion
from daemon.ipc.fabric import Fabric, FabricHandles

log = logging.getLogger(__name__)

PR_SET_PDEATHSIG = 1
EXIT_FAILED = 1
EXIT_CONFIG = 78  # sysexits' EX_CONFIG: starting again cannot help
EXIT_PARKED = 79  # an engine whose desired state is PARKED and which holds no work
EXIT_HANDOVER = 80  # a frontend that has stopped in the middle of its work, for its successor to go on
STOP_SIGNAL = signal.SIGUSR1  # from the supervisor: finish and exit
CUT_SIGNAL = signal.SIGUSR2  # from the supervisor to a frontend that drains: end the running requests now
HANDOVER_SIGNAL = signal.SIGRTMIN  # from the supervisor to a frontend: stop at once and exit with EXIT_HANDOVER
# What a terminal, a shell or systemd sends to the whole process group. The supervisor alone handles them. It also
# blocks them while it starts a child, which inherits that: none can end a child before it ignores them.
GROUP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


@dataclass(frozen=True, slots=True)
class ChildSpec:
    """Everything that the supervisor passes to a child: plain values and descriptors."""

    config: Config
    handles: FabricHandles
    process: int  # process number, see `Topology`
    incarnation: int
    supervisor_pid: int
    model_dir: str
    model_text: str = ""  # digest of the model's text files as the daemon began with them; "": they need no check
    listener_fd: int = -1  # frontends: the HTTP socket; coordinator: the admin socket
    pool_fd: int = -1  # engines: their KV pool segment
    keeper_fd: int = -1  # frontends: their channel to the supervisor, see `kept_sockets`
    keeper_capacity: int = 0  # frontends: sockets that the supervisor can keep for each
    code: CodeVersion | None = None  # of the supervisor's code; None: the process need not check its own
    adopt: bool = False  # frontends: go on with the responses of the predecessor, which has died or handed over


def initialize(spec: ChildSpec) -> Fabric:
    """Prepare this process as the child that `spec` describes; return its view of the shared memory.

    From now on the process dies with the supervisor.
    """
    detach(spec, spec.handles.topology.name(spec.process))
    return Fabric(spec.handles, spec.process, spec.incarnation)


def detach(spec: ChildSpec, name: str) -> None:
    """Let this process die with the supervisor, but not by what a terminal sends; set its name and its logging."""
    _die_with(spec.supervisor_pid)
    setproctitle.setproctitle(f"llumd: {name}")
    for number in (*GROUP_SIGNALS, CUT_SIGNAL, HANDOVER_SIGNAL):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, GROUP_SIGNALS)
    output.tolerate_loss()
    start_logging(spec.config.log_level, name)
    if spec.code is not None and not code_version.fits(spec.code):
        log.error("another version of llumd was installed, whose layout of shared memory differs; restart the daemon")
        sys.exit(EXIT_CONFIG)


def start_logging(level: str, name: str) -> None:
    """Write log lines to stderr with date and time; to journald, which adds both, with its priority prefix."""
    under_journald = _stderr_is_journal()
    form = "%(message)s" if under_journald else "%(asctime)s %(levelname)-7s %(message)s"
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter(form.replace("%(message)s", f"llumd {name}: %(message)s"), under_journald))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


def _stderr_is_journal() -> bool:
    """Return True if stderr is the stream that systemd names in $JOURNAL_STREAM as "device:inode"."""
    try:
        found = os.fstat(2)
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"


class _Formatter(logging.Formatter):
    _PRIORITY = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}  # noqa: RUF012

    def __init__(self, form: str, prefixed: bool) -> None:
        super().__init__(form, "%Y-%m-%d %H:%M:%S")
        self._prefixed = prefixed

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return f"<{self._PRIORITY.get(record.levelno, 6)}>{text}" if self._prefixed else text


def _die_with(parent: int) -> None:
    # The kernel sends the signal when the forking *thread* ends, so the supervisor forks from its main thread only.
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:  # the supervisor died before the call
        os._exit(1)
