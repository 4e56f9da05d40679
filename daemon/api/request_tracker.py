"""The frontend's side of the fabric: journals a request, picks its engine, accepts its tokens.

The frontend is the only judge of its requests. Every row of output names (request, epoch, position); what
is stale, repeated or of a former owner is dropped by rule, and accepted tokens are journaled before anyone
sees them. Rings are acknowledged after the journal holds what they carried.
"""

from __future__ import annotations

import asyncio
import logging
import time
from array import array
from collections.abc import Sequence

from daemon.api.engine_link import EngineLink
from daemon.api.engine_links import EngineLinks
from daemon.api.generator import NoEngine, Overloaded, TooLong
from daemon.api.request_state import RequestState
from daemon.config import Config
from daemon.control.policy import ownership
from daemon.control.policy.ownership import Decision, Order, Ownership
from daemon.enums import DispatchKind
from daemon.ipc.event_ring import EventWriter
from daemon.ipc.events import Dispatched, TakenOver
from daemon.ipc.fabric import COORDINATOR, Fabric
from daemon.ipc.journal import Journal, JournalFull, JournalTooSmall
from daemon.ipc.messages import (
    CancelRequest,
    EngineIncarnation,
    Finish,
    HandBack,
    OwnedRequests,
    Reclaim,
    Refused,
    RequestParams,
    SamplingParams,
    SetPriority,
    Start,
    StepOutput,
    Takeover,
    decode_from_coordinator,
    decode_to_frontend,
)
from daemon.ipc.metrics_page import FRONTEND, MetricsPage
from daemon.ipc.process_table import ProcessState

log = logging.getLogger(__name__)

_RESCUE_PERIOD = 0.1  # seconds from one look for an engine to the next, while requests are without


class RequestTracker:
    """All requests of one frontend. Implements `Generator`. Lives on the event loop's thread."""

    def __init__(self, fabric: Fabric, config: Config) -> None:
        _, index = fabric.topology.role(fabric.process)
        self._fabric = fabric
        self._config = config
        self._journal = Journal(fabric.journal(index, writable=True))
        self.engines = EngineLinks(fabric, config)
        self._advice = fabric.reader(COORDINATOR)
        self.metrics = MetricsPage(fabric.metrics(fabric.process), FRONTEND)
        self._log = EventWriter(fabric.events(fabric.process))
        self._flights: dict[int, RequestState] = {}
        self._stranded: dict[int, str] = {}  # requests that no engine has, and why
        self._rescue: asyncio.TimerHandle | None = None  # the next look for an engine
        self._reserved = 0  # admitted and not submitted yet
        self._next_rid = index << 56 | (fabric.incarnation & 0xFFFF) << 40 | 1
        self.draining = False
        self.on_doorbell()

    # -- Generator --------------------------------------------------------------------------------

    @property
    def max_model_len(self) -> int:
        return min((f.max_model_len for f in self.engines.serving()), default=0)

    @property
    def ready(self) -> bool:
        return not self.draining and bool(self.engines.serving())

    @property
    def active(self) -> int:
        """Unfinished requests."""
        return len(self._flights)

    def admit(self, count: int) -> _Places:
        """Raises Overloaded or NoEngine."""
        if not self.ready:
            raise NoEngine("shutting down" if self.draining else "no engine is ready")
        if len(self._flights) + self._reserved + count > self._config.max_queued:
            raise Overloaded(f"{len(self._flights)} requests are queued or running; try again shortly")
        return _Places(self, count)

    def reserve(self, count: int) -> None:
        """Take (or, negative, give back) places in the queue limit."""
        self._reserved += count

    def submit(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        label: str,
        priority: int = 0,
        cache_salt: bytes = b"",
    ) -> RequestState:
        """Journal the request and start it on the freest engine. Raises Overloaded, NoEngine or TooLong."""
        if self.draining:
            raise NoEngine("shutting down")
        prompt = array("I", prompt)
        names = self.engines.names(prompt, cache_salt)
        engine = self.engines.choose(high=priority < 0, names=names)
        self._refuse_oversized(engine, len(prompt))
        rid = self._next_rid
        record = RequestParams(params, time.monotonic(), priority, cache_salt, label)
        slot = self._open(rid, record, prompt)
        self._next_rid += 1
        flight = RequestState(self, rid, slot, priority)
        flight.names = names
        self._flights[rid] = flight
        self._assign(flight, Ownership(rid, 1, self.engines.owner(engine), 0, priority))
        self._start(flight, len(prompt))
        self._note_dispatch(flight, len(prompt), label)
        return flight

    def _start(self, flight: RequestState, prompt_len: int) -> None:
        """Send the Start to the flight's engine, and say how much was sent."""
        owner = EngineIncarnation(flight.engine, flight.incarnation)
        self.engines.start(owner, Start(flight.rid, flight.epoch, flight.slot, prompt_len))
        self._publish()

    def _note_dispatch(self, flight: RequestState, prompt_len: int, label: str, again: str = "") -> None:
        """For the record, after the engine was rung: it need not wait for that."""
        self.engines.note(flight.names, flight.engine)
        self.metrics.inc("dispatches", 1.0, DispatchKind.AGAIN if again else DispatchKind.FIRST)
        name = label or f"{flight.rid:x}"
        self._log.write(Dispatched(flight.rid, name, flight.engine, prompt_len, flight.priority, again))

    # -- what arrives -----------------------------------------------------------------------------

    def on_doorbell(self) -> None:
        """Take everything that peers have written. The table is read first, deaths are handled last:
        what a dead engine had put on its ring before is accepted before its death counts."""
        changed = self.engines.look()
        for link in self.engines.links:
            self._drain(link)
            self.engines.flush(link)
        while (record := self._advice.read()) is not None:
            if record.receiver == self._fabric.incarnation:
                self._handle(decode_from_coordinator(record.payload))
        self._advice.ack()
        if changed:
            self._handle_changes()

    def cancel(self, flight: RequestState, finish: Finish) -> None:
        """End a request from this side and free its blocks."""
        for order in ownership.cancel(flight.ownership):
            self._order(order)
        self._close(flight)
        flight.end(finish)

    def give_up(self, reason: str) -> None:
        """End every unfinished request with an error: nobody will wait for it any longer."""
        for flight in list(self._flights.values()):
            self._lose(flight, reason)

    def _drain(self, link: EngineLink) -> None:
        link.refresh()  # now, while nobody waits for a dispatch
        read = link.outputs.read
        while (record := read()) is not None:
            if record.receiver != self._fabric.incarnation:
                continue
            message = decode_to_frontend(record.payload)
            if type(message) is StepOutput:
                self._accept(message)
            else:
                self._judge(message, EngineIncarnation(link.index, record.sender))
        link.outputs.ack()

    def _accept(self, out: StepOutput) -> None:
        """Fold one step's rows: epoch and position decide what counts."""
        end = 0
        now = time.monotonic()
        for rid, epoch, start, count, finish, cached in zip(
            out.rids, out.epochs, out.starts, out.counts, out.finishes, out.cached, strict=True
        ):
            begin, end = end, end + count
            flight = self._flights.get(rid)
            if flight is None or flight.epoch != epoch:
                self.metrics.inc("stale_tokens", count)
                continue
            known = flight.accepted - start
            if known < 0:
                self._lose(flight, "output was lost between engine and frontend")
                continue
            if known:
                self.metrics.inc("stale_tokens", min(known, count))
                begin = min(begin + known, end)
            tokens = out.tokens[begin:end]
            logprobs = out.logprobs[begin:end] if out.logprobs is not None else None
            if tokens:
                self._journal.append(flight.slot, tokens, logprobs)
                flight.accepted += len(tokens)
                flight.heard = now
                if flight.paused:
                    self.metrics.observe("migration_pause_seconds", now - flight.paused)
                    flight.paused = 0.0
            if finish:
                self._close(flight)
            flight.deliver(tokens, logprobs, Finish(finish), cached)

    def _judge(self, claim: Refused | Takeover | Reclaim | HandBack, sender: EngineIncarnation) -> None:
        """What an engine says about one request."""
        flight = self._flights.get(claim.rid)
        if flight is None:
            self._order(ownership.stale(claim.rid, claim.epoch, sender))
            return
        match claim:
            case Refused(epoch=epoch, reason=reason):
                if flight.epoch == epoch:
                    self._lose(flight, reason)
            case Takeover():
                decision = ownership.takeover(flight.ownership, sender, claim)
                if decision.ownership.owner == sender and decision.ownership.epoch > flight.epoch:
                    self._note_takeover(flight, decision.ownership)
                self._apply(flight, decision)
            case Reclaim():
                self._apply(flight, ownership.reclaim(flight.ownership, sender, claim))
            case HandBack():
                self._apply(flight, ownership.hand_back(flight.ownership, sender, claim))

    def _note_takeover(self, flight: RequestState, ownership: Ownership) -> None:
        """For the record, before `ownership` takes the place of the flight's own."""
        assert ownership.owner is not None
        flight.paused = flight.paused or flight.heard
        self.metrics.inc("takeovers")
        name = self._journal.params(flight.slot).label or f"{flight.rid:x}"
        to = ownership.owner.engine
        self.engines.note(flight.names, to)
        self._log.write(TakenOver(flight.rid, name, flight.engine, to, ownership.epoch, ownership.accepted))

    def _apply(self, flight: RequestState, decision: Decision, why: str = "handed back") -> None:
        """Journal the output, then the custody with one store, then send the orders. `why`: it is started anew, for
        the record."""
        output = decision.output
        if output is not None:
            self._journal.append(flight.slot, output.tokens, output.logprobs)
            flight.accepted += len(output.tokens)
            flight.deliver(output.tokens, output.logprobs, Finish.NONE, flight.cached)
        if decision.redispatch:
            self._redispatch(flight, decision, "output was lost" if decision.fault else why)
            return
        if decision.ownership != flight.ownership:
            self._assign(flight, decision.ownership)
        for order in decision.orders:
            self._order(order)

    def _redispatch(self, flight: RequestState, decision: Decision, why: str) -> None:
        """Nobody runs it now: start it where there is most room, as soon as there is an engine."""
        for order in decision.orders:
            self._order(order)
        self._stranded[flight.rid] = why
        self._place_stranded()

    def _place_stranded(self) -> None:
        """Start anew what no engine has, or look again a little later; end it if none can come any more."""
        if self._rescue is not None:
            self._rescue.cancel()
            self._rescue = None
        for rid, why in list(self._stranded.items()):
            flight = self._flights[rid]
            try:
                engine = self.engines.choose(avoid=flight.engine, high=flight.priority < 0, names=flight.names)
            except NoEngine as e:
                if self.engines.may_come(draining=self.draining):
                    self._rescue = asyncio.get_running_loop().call_later(_RESCUE_PERIOD, self._place_stranded)
                    return
                self._lose(flight, str(e))
            else:
                self._restart(flight, engine, why)

    def _restart(self, flight: RequestState, engine: int, why: str) -> None:
        self._assign(flight, ownership.started(flight.ownership, self.engines.owner(engine)))
        prompt_len = self._journal.prompt_len(flight.slot)
        self._start(flight, prompt_len)
        self._note_dispatch(flight, prompt_len, self._journal.params(flight.slot).label, why)

    def _assign(self, flight: RequestState, ownership: Ownership) -> None:
        assert ownership.owner is not None
        self._stranded.pop(flight.rid, None)
        flight.epoch, flight.changed = ownership.epoch, ownership.changed
        flight.engine, flight.incarnation = ownership.owner
        self._journal.assign(flight.slot, ownership.epoch, *ownership.owner)

    def _order(self, order: Order) -> None:
        self.engines.send(order.to, order.message)

    def _handle(self, advice: CancelRequest | SetPriority) -> None:
        flight = self._flights.get(advice.rid)
        if flight is None:
            return
        match advice:
            case CancelRequest():
                self.cancel(flight, Finish.CANCELLED)
            case SetPriority(priority=priority):
                self._reprioritise(flight, priority)

    def _reprioritise(self, flight: RequestState, priority: int) -> None:
        """Journal it first: whoever is sent a Start or a Handover from now on reads it there."""
        decision = ownership.reprioritise(flight.ownership, priority)
        flight.priority, flight.changed = decision.ownership.priority, decision.ownership.changed
        self._journal.reprioritise(flight.slot, flight.priority)
        for order in decision.orders:
            self._order(order)

    # -- engines come and go ------------------------------------------------------------------------

    def _handle_changes(self) -> None:
        """Know all who are alive before anything is started anew."""
        for link in self.engines.meet():
            self._state(link)
        for link in self.engines.links:
            self._handle_engine_death(link)
        self._publish()

    def _handle_engine_death(self, link: EngineLink) -> None:
        """Have what lives of the engine that are over have left go on elsewhere. What one that was parked still owned
        had never reached it. A request may be what made one crash, so it is not taken from engine to engine for long.
        """
        row = self.engines.row(link)
        dead = row.incarnation - (row.state == ProcessState.UP)
        left = [
            f
            for f in self._flights.values()
            if f.engine == link.index and f.incarnation <= dead and f.rid not in self._stranded
        ]
        last_crashed = [f for f in left if f.incarnation <= row.last_crashed]
        for flight in last_crashed:
            flight.crashes += 1
        lost = [f for f in last_crashed if f.crashes > self._config.max_resumes]
        if last_crashed:
            log.warning(
                "engine %d died: of its requests %d go on elsewhere, %d end with an error",
                link.index,
                len(last_crashed) - len(lost),
                len(lost),
            )
        for flight in lost:
            self._lose(flight, "the engine that ran this request died; please send it again")
        for flight in left:
            if flight.crashes <= self._config.max_resumes:
                self._resume(flight, last_crashed=flight.incarnation <= row.last_crashed)

    def _resume(self, flight: RequestState, *, last_crashed: bool) -> None:
        if last_crashed:
            self.metrics.inc("resumes")
        decision = ownership.engine_died(flight.ownership, EngineIncarnation(flight.engine, flight.incarnation))
        self._apply(flight, decision, "its engine died" if last_crashed else "its engine was parked")

    def _state(self, link: EngineLink) -> None:
        """Tell an engine all that it owns of this frontend: whatever else it holds it drops."""
        owner = self.engines.owner(link.index)
        owned = [f for f in self._flights.values() if (f.engine, f.incarnation) == owner]
        self.engines.send(owner, OwnedRequests([f.rid for f in owned], [f.epoch for f in owned]))

    def _lose(self, flight: RequestState, reason: str) -> None:
        self._close(flight)
        flight.fail(reason)

    def _close(self, flight: RequestState) -> None:
        del self._flights[flight.rid]
        self._stranded.pop(flight.rid, None)
        self._journal.close(flight.slot)

    # -- room ---------------------------------------------------------------------------------------

    def _refuse_oversized(self, engine: int, prompt_len: int) -> None:
        facts = self.engines.links[engine].facts
        assert facts is not None
        room = min(facts.max_model_len, facts.total_blocks * facts.block_size)
        if prompt_len >= room:
            raise TooLong(f"the prompt has {prompt_len} tokens; an engine holds at most {room} with the answer")

    def _open(self, rid: int, record: RequestParams, prompt: Sequence[int]) -> int:
        try:
            return self._journal.open(rid, record, prompt)
        except JournalFull as e:
            raise Overloaded(str(e)) from None
        except JournalTooSmall as e:
            raise TooLong(str(e)) from None

    def _publish(self) -> None:
        self.engines.publish(len(self._flights), taking=not self.draining)


class _Places:
    """Places in the queue limit, held from before tokenising until the requests are submitted."""

    def __init__(self, tracker: RequestTracker, count: int) -> None:
        self._tracker = tracker
        self._count = count

    def __enter__(self) -> _Places:
        self._tracker.reserve(self._count)
        return self

    def __exit__(self, *exc: object) -> None:
        self._tracker.reserve(-self._count)
