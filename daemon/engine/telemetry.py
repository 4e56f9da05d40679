"""Reports what one engine did: events for operators, and metrics."""

from __future__ import annotations

from collections.abc import Iterable

from daemon.engine.migration.actions import Report
from daemon.engine.request import Request
from daemon.enums import MigrationResult
from daemon.ipc.event_ring import EventWriter
from daemon.ipc.events import EngineChanged, HandedBack, MoveEnded, Preempted
from daemon.ipc.messages import EngineState
from daemon.ipc.metrics_page import MetricsPage


class Telemetry:
    """Writes to `log` and `page`. `block_bytes`: size of a KV block."""

    def __init__(self, log: EventWriter, page: MetricsPage, block_bytes: int) -> None:
        self._log = log
        self._page = page
        self._block_bytes = block_bytes
        self._state: EngineState | None = None

    def move(self, report: Report) -> None:
        """Report that a move, or an order to move, is over."""
        self._page.inc("migrations", 1.0, report.reason, report.result)
        request = report.request
        if report.result is MigrationResult.HANDED_BACK:
            self._log.write(HandedBack(request.rid, _name(request), report.reason, report.detail))
            return
        if report.result is MigrationResult.MOVED:
            self._page.observe("migration_stages", report.num_copies)
            self._page.observe("migration_blocks", report.blocks)
            self._page.observe("migration_seconds", report.seconds)
            self._page.observe("migration_frozen_seconds", report.frozen_seconds)
        event = MoveEnded(
            rid=request.rid,
            request=_name(request),
            to=report.to,
            reason=report.reason,
            result=report.result,
            detail=report.detail,
            stages=report.num_copies,
            blocks=report.blocks,
            skipped=report.skipped,
            nbytes=report.blocks * self._block_bytes,
            seconds=report.seconds,
            frozen_seconds=report.frozen_seconds,
        )
        self._log.write(event)

    def preempted(self, requests: Iterable[Request]) -> None:
        """Report the requests that were preempted at the beginning of a step."""
        for request in requests:
            self._log.write(Preempted(request.rid, _name(request), len(request.tokens)))

    def state(self, state: EngineState) -> None:
        """Report the engine's state if it has changed."""
        if state != self._state:
            self._state = state
            self._log.write(EngineChanged(state.name.lower()))


def _name(request: Request) -> str:
    """Return the name that `llumctl requests` shows."""
    return request.params.label or f"{request.rid:x}"
