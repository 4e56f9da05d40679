"""The event logs of all processes, merged: rows in order of time, ready for JSON."""

from __future__ import annotations

import time
from typing import Any

from daemon.ipc.event_ring import Entry, EventReader
from daemon.ipc.events import MISSED, fields_of, kind_of
from daemon.ipc.fabric import Fabric

Row = dict[str, Any]


class EventHistory:
    """A reader of every process's event log. It starts at the oldest events that the logs still hold."""

    def __init__(self, fabric: Fabric) -> None:
        topology = fabric.topology
        self._logs = [
            (*topology.role(process), EventReader(fabric.events(process))) for process in range(topology.processes)
        ]

    def read(self, since: float = 0.0) -> list[Row]:
        """Return the events written since the last call and after `since` (seconds since 1970), in order of time.

        A row has `time`, `process`, `kind` and the fields of its event; the row of an engine's event also has
        `engine`. Where events were overwritten before they were read, a row of kind "missed" has their `count`.
        """
        rows: list[Row] = []
        for role, index, log in self._logs:
            entries, missed = log.read()
            if missed:
                when = entries[0].time if entries else time.time()
                rows.append({"time": when, "process": _process_name(role, index), "kind": MISSED, "count": missed})
            rows += [_row(role, index, entry) for entry in entries if entry.time > since]
        return sorted(rows, key=lambda row: row["time"])


def _row(role: str, index: int, entry: Entry) -> Row:
    head = {"time": entry.time, "process": _process_name(role, index), "kind": kind_of(entry.event)}
    engine = {"engine": index} if role == "engine" else {}
    return head | engine | fields_of(entry.event)


def _process_name(role: str, index: int) -> str:
    return role if role == "coordinator" else f"{role} {index}"
