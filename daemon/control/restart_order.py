"""The order to replace a process. The supervisor carries it out; `llumctl restart` waits for the successor."""

from __future__ import annotations

from daemon.control.refusal import NOT_FOUND, SHUTTING_DOWN, Refusal
from daemon.ipc import code_version
from daemon.ipc.child import ChildSpec
from daemon.ipc.fabric import Fabric
from daemon.ipc.model_text import CHANGED, text_digest
from daemon.ipc.process_table import ProcessState
from daemon.ipc.restart_orders import RestartOrders

OTHER_LAYOUT, OTHER_MODEL = "other_layout", "other_model"  # codes for scripts


class RestartOrder:
    """Has the supervisor replace one process by a new incarnation, which runs the code that is installed now."""

    def __init__(self, fabric: Fabric, spec: ChildSpec) -> None:
        self._fabric = fabric
        self._version = spec.code
        self._spec = spec
        self._orders = RestartOrders(fabric.restart_orders())
        self._table = fabric.table()

    def restart(self, role: str, index: int) -> int:
        """Order the restart of a process. Return its incarnation; a later one is its successor.

        Raises Refusal if it does not run, if the daemon shuts down, or if its successor could not join: the installed
        code has another layout, or the text files of the model have changed.
        """
        process = self._process(role, index)
        name = self._fabric.topology.name(process)
        if self._fabric.shutdown().cut_off is not None:
            raise Refusal("llumd is shutting down and restarts no process", SHUTTING_DOWN)
        self._table.refresh()
        row = self._table.rows[process]
        if row.state != ProcessState.UP:
            raise Refusal(f"{name} does not run now; `llumctl status` shows its state")
        if self._version is not None and not code_version.fits(self._version):
            raise Refusal(
                "the llumd that is installed now has another layout of shared memory or messages than the one that "
                "runs, so its processes cannot be replaced one by one; restart the whole daemon",
                OTHER_LAYOUT,
            )
        text = self._spec.model_text
        if role != "coordinator" and text and text != text_digest(self._spec.model_dir):
            raise Refusal(CHANGED.format(self._spec.model_dir), OTHER_MODEL)
        self._orders.put(process, row.incarnation)
        return row.incarnation

    def _process(self, role: str, index: int) -> int:
        topology = self._fabric.topology
        numbers = {
            "engine": [topology.engine(i) for i in range(topology.engines)],
            "frontend": [topology.frontend(k) for k in range(topology.frontends)],
            "coordinator": [0],
        }[role]
        if not 0 <= index < len(numbers):
            raise Refusal(f"there is no {role} {index}; `llumctl status` lists them", NOT_FOUND)
        return numbers[index]
