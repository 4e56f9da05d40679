"""One frontend's commands to an engine: off the ring, into the llumlet and its scheduler."""

from __future__ import annotations

import time
from collections.abc import Callable

from daemon.engine.frontend_outbox import FrontendOutbox
from daemon.engine.journal_reader import JournalReader
from daemon.engine.migration.llumlet import Action, Llumlet
from daemon.ipc.messages import (
    Cancel,
    Demand,
    Grant,
    OwnedRequests,
    Refused,
    Release,
    Reprioritise,
    Start,
    ToEngine,
    decode_to_engine,
)
from daemon.ipc.ring import RingReader


class FrontendInbox:
    """Commands from one frontend. Counts what it has taken, for the dispatch of all frontends.

    `execute` gets what the llumlet wants done.
    """

    def __init__(
        self,
        frontend: int,
        incarnation: int,
        ring: RingReader,
        records: JournalReader,
        llumlet: Llumlet,
        outbox: FrontendOutbox,
        execute: Callable[[list[Action]], None],
    ) -> None:
        self._frontend = frontend
        self._incarnation = incarnation
        self._ring = ring
        self._records = records
        self._llumlet = llumlet
        self._outbox = outbox
        self._execute = execute
        self._requests = 0
        self._tokens = 0

    @property
    def consumed(self) -> Demand:
        """Totals taken since the frontend's present incarnation began."""
        return Demand(self._outbox.peer, self._requests, self._tokens)

    def drain(self) -> None:
        """Take every command on the ring; acknowledge when all have taken effect."""
        while (record := self._ring.read()) is not None:
            if record.receiver == self._incarnation:
                self._on_new_incarnation(record.sender)
                self._execute(self._handle(decode_to_engine(record.payload), time.monotonic()))
        self._ring.ack()

    def _on_new_incarnation(self, sender: int) -> None:
        """A new incarnation of the frontend owns nothing that its predecessor started, until it states so."""
        if sender == self._outbox.peer:
            return
        self._requests = self._tokens = 0
        self._outbox.forget(sender)
        self._execute(self._llumlet.on_owned_requests(self._frontend, {}, time.monotonic()))

    def _handle(self, message: ToEngine, now: float) -> list[Action]:
        match message:
            case Start():
                return self._start(message, now)
            case Cancel(rid=rid, epoch=epoch):
                return self._llumlet.on_release(rid, epoch, now, cancelled=True)
            case Release(rid=rid, epoch=epoch):
                return self._llumlet.on_release(rid, epoch, now)
            case Grant(rid=rid, epoch=epoch, new_epoch=new_epoch):
                return self._llumlet.on_grant(rid, epoch, new_epoch, now)
            case Reprioritise(rid=rid, epoch=epoch, priority=priority):
                self._llumlet.on_reprioritise(rid, epoch, priority)
                return []
            case OwnedRequests(rids=rids, epochs=epochs):
                return self._llumlet.on_owned_requests(self._frontend, dict(zip(rids, epochs, strict=True)), now)

    def _start(self, start: Start, now: float) -> list[Action]:
        self._requests += 1
        self._tokens += start.tokens
        request = self._records.load(self._frontend, start.slot, start.rid, start.epoch)
        if request is None:
            return []  # cancelled or moved on before we got here
        reason = self._llumlet.scheduler.refuse(request)
        if reason is None:
            return self._llumlet.on_start(request, now)
        self._outbox.tell(Refused(start.rid, start.epoch, reason))
        return []
