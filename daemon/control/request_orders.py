"""An operator's orders about one request, sent to the frontend that owns it: cancel, change the priority."""

from __future__ import annotations

from collections.abc import Callable

from daemon.control.status import StatusReader
from daemon.ipc.fabric import Fabric
from daemon.ipc.messages import CancelRequest, FromCoordinator, SetPriority, encode


class RequestOrders:
    """Writes to the frontends' rings. Each method returns the ids of the requests that an order was sent for."""

    def __init__(self, fabric: Fabric, status: StatusReader) -> None:
        topology = fabric.topology
        self._fabric = fabric
        self._status = status
        self._table = fabric.table()
        self._rings = [fabric.writer(topology.frontend(k)) for k in range(topology.frontends)]

    def cancel(self, name: str) -> list[str]:
        """Order the frontends to cancel the request called `name`, with all its choices."""
        return self._send(name, CancelRequest)

    def set_priority(self, name: str, priority: int) -> list[str]:
        """Order the frontends to give the request called `name`, with all its choices, this priority."""
        return self._send(name, lambda rid: SetPriority(rid, priority))

    def _send(self, name: str, message: Callable[[int], FromCoordinator]) -> list[str]:
        sent = []
        for row in self._status.find(name):
            frontend = row["frontend"]
            process = self._fabric.topology.frontend(frontend)
            self._table.refresh()
            receiver = self._table.rows[process].incarnation
            if self._rings[frontend].put(encode(message(row["rid"])), receiver):
                self._fabric.ring_bell(process)
                sent.append(row["id"])
        return sent
