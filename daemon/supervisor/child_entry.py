"""The entry points of the child processes, by name and not imported: each child imports only its own package."""

from __future__ import annotations

import importlib

from multiprocess.context import get_spawning_popen

from daemon.ipc.child import ChildSpec

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


def run(spec: ChildSpec, _inherited: Inherited) -> None:
    """Run the process that `spec` names."""
    role, _ = spec.handles.topology.role(spec.process)
    importlib.import_module(_MAIN[role]).main(spec)
