"""One frontend's commands to an engine: off the ring, into the scheduler."""

from __future__ import annotations

from msgspec import DecodeError

from daemon.control.journal import JournalView, SlotState
from daemon.control.messages import Cancel, Demand, Refused, Start, Statement, decode_to_engine
from daemon.control.ring import RingReader
from daemon.engine.outbox import Outbox
from daemon.engine.request import Request
from daemon.engine.scheduler import Scheduler


class Inbox:
    """Commands from one frontend. Counts what it has taken, for the dispatch of all frontends."""

    def __init__(
        self,
        frontend: int,
        incarnation: int,
        ring: RingReader,
        journal: JournalView,
        scheduler: Scheduler,
        outbox: Outbox,
    ) -> None:
        self._frontend = frontend
        self._incarnation = incarnation
        self._ring = ring
        self._journal = journal
        self._scheduler = scheduler
        self._outbox = outbox
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
                self._meet(record.sender)
                self._obey(decode_to_engine(record.payload))
        self._ring.ack()

    def _meet(self, sender: int) -> None:
        """A new incarnation of the frontend owns nothing that its predecessor started, until it states so."""
        if sender == self._outbox.peer:
            return
        self._requests = self._tokens = 0
        self._scheduler.drop_frontend(self._frontend, {})
        self._outbox.forget(sender)

    def _obey(self, message: Start | Cancel | Statement) -> None:
        match message:
            case Start():
                self._start(message)
            case Cancel(rid=rid, epoch=epoch):
                self._scheduler.cancel(rid, epoch)
            case Statement(rids=rids, epochs=epochs):
                self._scheduler.drop_frontend(self._frontend, dict(zip(rids, epochs, strict=True)))

    def _start(self, start: Start) -> None:
        self._requests += 1
        self._tokens += start.tokens
        request = self._read(start)
        if request is None:
            return  # cancelled or moved on before we got here
        reason = self._scheduler.refuse(request)
        if reason is not None:
            self._outbox.refuse(Refused(start.rid, start.epoch, reason))
        else:
            self._scheduler.add(request)

    def _read(self, start: Start) -> Request | None:
        """The request as the journal has it; None once its slot stands for something else."""
        if not self._stands(start):
            return None
        journal, slot = self._journal, start.slot
        try:
            prompt = journal.prompt(slot)
            request = Request(
                rid=start.rid,
                epoch=start.epoch,
                frontend=self._frontend,
                params=journal.params(slot),
                tokens=prompt + journal.output(slot),
                prompt_len=len(prompt),
            )
        except (DecodeError, UnicodeDecodeError):
            if self._stands(start):
                raise
            return None
        # The frontend may have closed it and written another one over it while we read.
        return request if self._stands(start) else None

    def _stands(self, start: Start) -> bool:
        journal, slot = self._journal, start.slot
        live = journal.state(slot) is SlotState.LIVE and journal.rid(slot) == start.rid
        return live and journal.epoch(slot) == start.epoch
