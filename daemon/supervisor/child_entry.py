"""The entry points of the child processes, by name and not imported: each child imports only its own package."""

from __future__ import annotations

import gc
import importlib

from multiprocess.context import get_spawning_popen

from daemon.ipc import child
from daemon.ipc.child import ChildSpec
from daemon.supervisor.standby import NAME, wait_for_role

_MAIN = {
    "coordinator": "daemon.control.coordinator",
    "frontend": "daemon.api.frontend",
    "engine": "daemon.engine.worker",
}


class Inherited:
    """Descriptors that a spawned child inherits under the same numbers."""

    def __init__(self, fds: list[int]) -> None:
        self._fds = fds

    def __getstate__(self) -> dict[str, object]:
        popen = get_spawning_popen()
        for fd in self._fds:
            popen.duplicate_for_child(fd)
        return {}


def run_standby(spec: ChildSpec, role_fd: int, _inherited: Inherited) -> None:
    """Load what a frontend needs, wait for the role of one that has ended, then run it."""
    gc.disable()  # as in `run`
    child.detach(spec, NAME)
    frontend = importlib.import_module(_MAIN["frontend"])
    frontend.prepare(spec)
    frontend.main(wait_for_role(spec, role_fd))


def run(spec: ChildSpec, _inherited: Inherited) -> None:
    """Run the process that `spec` names."""
    role, _ = spec.handles.topology.role(spec.process)
    if role == "frontend":
        gc.disable()  # until it has loaded: clients wait, and hardly anything that is loaded is garbage
    importlib.import_module(_MAIN[role]).main(spec)
