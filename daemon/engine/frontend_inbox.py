"""Reads the commands of one frontend from its ring and passes them to the llumlet."""

from __future__ import annotations

import logging
import time

from daemon.engine.journal_reader import JournalReader
from daemon.engine.migration.actions import Action, Readdress, Tell
from daemon.engine.migration.llumlet import Llumlet
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

log = logging.getLogger(__name__)


class FrontendInbox:
    """Commands from one frontend. Counts the demand that it has read, for the dispatch of all frontends."""

    def __init__(
        self, frontend: int, incarnation: int, ring: RingReader, journals: JournalReader, llumlet: Llumlet
    ) -> None:
        """`incarnation`: of this engine; commands for another one are dropped."""
        self._frontend = frontend
        self._incarnation = incarnation
        self._ring = ring
        self._journals = journals
        self._llumlet = llumlet
        self._sender = 0  # incarnation of the frontend that sent the last command
        self._requests = 0
        self._tokens = 0

    @property
    def consumed(self) -> Demand:
        """Totals read since the present incarnation of the frontend began."""
        return Demand(self._sender, self._requests, self._tokens)

    def read(self) -> list[Action]:
        """Read every command on the ring and return the actions, in order. Execute them, then call `ack`."""
        actions: list[Action] = []
        while (record := self._ring.read()) is not None:
            if record.receiver == self._incarnation:
                if record.sender != self._sender:
                    actions.append(self._on_new_incarnation(record.sender))
                actions += self._handle(decode_to_engine(record.payload), time.monotonic())
        return actions

    def ack(self) -> None:
        """Free the ring's space of all that was read. Call it once the actions are executed."""
        self._ring.ack()

    def _on_new_incarnation(self, sender: int) -> Action:
        """Count the demand of the new incarnation from 0, and address output to it.

        Its OwnedRequests, the first message of every incarnation, says which requests of its predecessor it keeps.
        """
        self._sender = sender
        self._requests = self._tokens = 0
        return Readdress(self._frontend, sender)

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
            case OwnedRequests():
                return self._llumlet.on_owned_requests(self._frontend, message, now)

    def _start(self, start: Start, now: float) -> list[Action]:
        """Start the request of the journal slot. Refuse one that cannot be read or queued: it must not end the engine
        and with it all other requests."""
        self._requests += 1
        self._tokens += start.tokens
        try:
            request = self._journals.load(self._frontend, start.slot, start.rid, start.epoch)
            if request is None:
                return []  # cancelled, or moved to another engine, before the command was read
            return self._llumlet.on_start(request, now)
        except Exception:
            log.exception("request %d ends with an error: it cannot be started", start.rid)
            return [Tell(self._frontend, Refused(start.rid, start.epoch, "it could not be started"))]
