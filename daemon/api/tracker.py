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

from daemon.api.affinity import Affinity
from daemon.api.flight import Flight
from daemon.api.generation import NoEngine, Overloaded, TooLong
from daemon.api.links import Link, Peer
from daemon.config import Config
from daemon.control import ownership
from daemon.control.dispatch import choose, in_flight
from daemon.control.eventlog import EventLog
from daemon.control.events import Dispatched, TakenOver
from daemon.control.fabric import COORDINATOR, Fabric
from daemon.control.journal import Journal, JournalFull, JournalTooSmall
from daemon.control.load import policy_of
from daemon.control.messages import (
    AskBack,
    CancelRequest,
    Demand,
    EngineFacts,
    EngineState,
    Finish,
    FrontendFacts,
    HandBack,
    Refused,
    RequestParams,
    SamplingParams,
    SetPriority,
    Start,
    Statement,
    StepOutput,
    Takeover,
    ToEngine,
    decode_from_coordinator,
    decode_to_frontend,
    encode,
)
from daemon.control.ownership import Custody, Order, Owner, Verdict
from daemon.control.processes import Life, engine_state
from daemon.control.stats import FRONTEND, StatsPage

log = logging.getLogger(__name__)

_FULL_RETRY = 0.05  # seconds until a command that found its ring full is tried again
_RESCUE_PERIOD = 0.1  # seconds from one look for an engine to the next, while requests are without


class Tracker:
    """All requests of one frontend. Implements `Generator`. Lives on the event loop's thread."""

    def __init__(self, fabric: Fabric, config: Config) -> None:
        topology = fabric.topology
        _, self._index = topology.role(fabric.process)
        self._fabric = fabric
        self._config = config
        self._journal = Journal(fabric.journal(self._index, writable=True))
        self._links = [Link(fabric, i) for i in range(topology.engines)]
        self._peers = [Peer(fabric, k) if k != self._index else None for k in range(topology.frontends)]
        self._advice = fabric.reader(COORDINATOR)
        self._table = fabric.table()
        self._board = fabric.board()
        self.stats = StatsPage(fabric.stats(fabric.process), FRONTEND)
        self._log = EventLog(fabric.events(fabric.process))
        self._flights: dict[int, Flight] = {}
        self._stranded: dict[int, str] = {}  # requests that no engine has, and why
        self._rescue: asyncio.TimerHandle | None = None  # the next look for an engine
        self._reserved = 0  # admitted and not submitted yet
        self._next_rid = self._index << 56 | (fabric.incarnation & 0xFFFF) << 40 | 1
        self._turn = self._index
        self._policy = policy_of(config.policy, config.headroom)
        self._affinity: Affinity | None = None
        if config.prefix_affinity and config.prefix_caching and topology.engines > 1:
            self._affinity = Affinity(topology.engines, config.block_size)
        self.draining = False
        self.on_doorbell()

    # -- Generator --------------------------------------------------------------------------------

    @property
    def max_model_len(self) -> int:
        return min((f.max_model_len for f in self._serving()), default=0)

    @property
    def ready(self) -> bool:
        return not self.draining and bool(self._serving())

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
    ) -> Flight:
        """Journal the request and start it on the freest engine. Raises Overloaded, NoEngine or TooLong."""
        if self.draining:
            raise NoEngine("shutting down")
        prompt = array("I", prompt)
        names = self._affinity.names(prompt, cache_salt) if self._affinity is not None else []
        engine = self._choose(high=priority < 0, names=names)
        link = self._links[engine]
        self._refuse_oversized(link, len(prompt))
        rid = self._next_rid
        record = RequestParams(params, time.monotonic(), priority, cache_salt, label)
        slot = self._open(rid, record, prompt)
        self._next_rid += 1
        flight = Flight(self, rid, slot, priority)
        flight.names = names
        self._flights[rid] = flight
        self._assign(flight, Custody(rid, 1, Owner(engine, link.incarnation), 0, priority))
        self._start(flight, len(prompt))
        self._note_dispatch(flight, len(prompt), label)
        return flight

    def _start(self, flight: Flight, prompt_len: int) -> None:
        """Send the Start to the flight's engine, and say how much was sent."""
        link = self._links[flight.engine]
        before = link.submitted
        link.submitted = Demand(before.peer, before.requests + 1, before.tokens + prompt_len)
        self._send(link, Start(flight.rid, flight.epoch, flight.slot, prompt_len), flight.incarnation)
        self._publish()

    def _note_dispatch(self, flight: Flight, prompt_len: int, label: str, again: str = "") -> None:
        """For the record, after the engine was rung: it need not wait for that."""
        if self._affinity is not None:
            self._affinity.record(flight.names, flight.engine)
        self.stats.inc("dispatches", 1.0, "again" if again else "first")
        name = label or f"{flight.rid:x}"
        self._log.write(Dispatched(flight.rid, name, flight.engine, prompt_len, flight.priority, again))

    # -- what arrives -----------------------------------------------------------------------------

    def on_doorbell(self) -> None:
        """Take everything that peers have written. The table is read first, deaths are handled last:
        what a dead engine had put on its ring before is accepted before its death counts."""
        changed = self._table.refresh()
        for link in self._links:
            self._drain(link)
            if link.backlog:
                self._flush(link)
        while (record := self._advice.read()) is not None:
            if record.receiver == self._fabric.incarnation:
                self._obey(decode_from_coordinator(record.payload))
        self._advice.ack()
        if changed:
            self._handle_changes()

    def cancel(self, flight: Flight, finish: Finish) -> None:
        """End a request from this side and free its blocks."""
        for order in ownership.cancel(flight.custody):
            self._order(order)
        self._close(flight)
        flight.end(finish)

    def give_up(self, reason: str) -> None:
        """End every unfinished request with an error: nobody will wait for it any longer."""
        for flight in list(self._flights.values()):
            self._lose(flight, reason)

    def _drain(self, link: Link) -> None:
        link.refresh()  # now, while nobody waits for a dispatch
        read = link.outputs.read
        while (record := read()) is not None:
            if record.receiver != self._fabric.incarnation:
                continue
            message = decode_to_frontend(record.payload)
            if type(message) is StepOutput:
                self._accept(message)
            else:
                self._judge(message, Owner(link.index, record.sender))
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
                self.stats.inc("stale_tokens", count)
                continue
            known = flight.accepted - start
            if known < 0:
                self._lose(flight, "output was lost between engine and frontend")
                continue
            if known:
                self.stats.inc("stale_tokens", min(known, count))
                begin = min(begin + known, end)
            tokens = out.tokens[begin:end]
            logprobs = out.logprobs[begin:end] if out.logprobs is not None else None
            if tokens:
                self._journal.append(flight.slot, tokens, logprobs)
                flight.accepted += len(tokens)
                flight.heard = now
                if flight.paused:
                    self.stats.observe("migration_pause_seconds", now - flight.paused)
                    flight.paused = 0.0
            if finish:
                self._close(flight)
            flight.deliver(tokens, logprobs, Finish(finish), cached)

    def _judge(self, claim: Refused | Takeover | AskBack | HandBack, sender: Owner) -> None:
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
                verdict = ownership.takeover(flight.custody, sender, claim)
                if verdict.custody.owner == sender and verdict.custody.epoch > flight.epoch:
                    self._note_takeover(flight, verdict.custody)
                self._apply(flight, verdict)
            case AskBack():
                self._apply(flight, ownership.ask_back(flight.custody, sender, claim))
            case HandBack():
                self._apply(flight, ownership.hand_back(flight.custody, sender, claim))

    def _note_takeover(self, flight: Flight, custody: Custody) -> None:
        """For the record, before `custody` takes the place of the flight's own."""
        assert custody.owner is not None
        flight.paused = flight.paused or flight.heard
        self.stats.inc("takeovers")
        name = self._journal.params(flight.slot).label or f"{flight.rid:x}"
        to = custody.owner.engine
        if self._affinity is not None:
            self._affinity.record(flight.names, to)
        self._log.write(TakenOver(flight.rid, name, flight.engine, to, custody.epoch, custody.accepted))

    def _apply(self, flight: Flight, verdict: Verdict, why: str = "handed back") -> None:
        """Journal the output, then the custody with one store, then send the orders. `why`: it is started anew, for
        the record."""
        output = verdict.output
        if output is not None:
            self._journal.append(flight.slot, output.tokens, output.logprobs)
            flight.accepted += len(output.tokens)
            flight.deliver(output.tokens, output.logprobs, Finish.NONE, flight.cached)
        if verdict.redispatch:
            self._redispatch(flight, verdict, "output was lost" if verdict.fault else why)
            return
        if verdict.custody != flight.custody:
            self._assign(flight, verdict.custody)
        for order in verdict.orders:
            self._order(order)

    def _redispatch(self, flight: Flight, verdict: Verdict, why: str) -> None:
        """Nobody runs it now: start it where there is most room, as soon as there is an engine."""
        for order in verdict.orders:
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
                engine = self._choose(avoid=flight.engine, high=flight.priority < 0, names=flight.names)
            except NoEngine as e:
                if self._may_come():
                    self._rescue = asyncio.get_running_loop().call_later(_RESCUE_PERIOD, self._place_stranded)
                    return
                self._lose(flight, str(e))
            else:
                self._restart(flight, engine, why)

    def _restart(self, flight: Flight, engine: int, why: str) -> None:
        self._assign(flight, ownership.started(flight.custody, Owner(engine, self._links[engine].incarnation)))
        prompt_len = self._journal.prompt_len(flight.slot)
        self._start(flight, prompt_len)
        self._note_dispatch(flight, prompt_len, self._journal.params(flight.slot).label, why)

    def _may_come(self) -> bool:
        """Whether an engine may serve some time, though none does now. None is started while the daemon drains."""
        coming = (Life.UP,) if self.draining else (Life.UP, Life.DEAD, Life.ABSENT)
        return any(self._table.rows[link.process].life in coming for link in self._links)

    def _assign(self, flight: Flight, custody: Custody) -> None:
        assert custody.owner is not None
        self._stranded.pop(flight.rid, None)
        flight.epoch, flight.changed = custody.epoch, custody.changed
        flight.engine, flight.incarnation = custody.owner
        self._journal.assign(flight.slot, custody.epoch, *custody.owner)

    def _order(self, order: Order) -> None:
        self._send(self._links[order.to.engine], order.message, order.to.incarnation)

    def _obey(self, advice: CancelRequest | SetPriority) -> None:
        flight = self._flights.get(advice.rid)
        if flight is None:
            return
        match advice:
            case CancelRequest():
                self.cancel(flight, Finish.CANCELLED)
            case SetPriority(priority=priority):
                self._reprioritise(flight, priority)

    def _reprioritise(self, flight: Flight, priority: int) -> None:
        """Journal it first: whoever is sent a Start or a Handover from now on reads it there."""
        verdict = ownership.reprioritise(flight.custody, priority)
        flight.priority, flight.changed = verdict.custody.priority, verdict.custody.changed
        self._journal.reprioritise(flight.slot, flight.priority)
        for order in verdict.orders:
            self._order(order)

    # -- engines come and go ------------------------------------------------------------------------

    def _handle_changes(self) -> None:
        """Know all who are alive before anything is started anew."""
        for link in self._links:
            row = self._table.rows[link.process]
            alive = row.incarnation if row.life == Life.UP else 0
            if alive != link.incarnation:
                link.meet(alive)
                if self._affinity is not None:
                    self._affinity.forget(link.index)
                if alive:
                    self._state(link)
        for link in self._links:
            self._bury(link)
        self._publish()

    def _bury(self, link: Link) -> None:
        """Have what lives of the engine that are over have left go on elsewhere. What one that was parked still owned
        had never reached it. A request may be what made one crash, so it is not taken from engine to engine for long.
        """
        row = self._table.rows[link.process]
        dead = row.incarnation - (row.life == Life.UP)
        left = [f for f in self._flights.values()
                if f.engine == link.index and f.incarnation <= dead and f.rid not in self._stranded]
        crashed = [f for f in left if f.incarnation <= row.crashed]
        for flight in crashed:
            flight.crashes += 1
        lost = [f for f in crashed if f.crashes > self._config.max_resumes]
        if crashed:
            log.warning("engine %d died: of its requests %d go on elsewhere, %d end with an error", link.index,
                        len(crashed) - len(lost), len(lost))
        for flight in lost:
            self._lose(flight, "the engine that ran this request died; please send it again")
        for flight in left:
            if flight.crashes <= self._config.max_resumes:
                self._resume(flight, crashed=flight.incarnation <= row.crashed)

    def _resume(self, flight: Flight, *, crashed: bool) -> None:
        if crashed:
            self.stats.inc("resumes")
        verdict = ownership.engine_died(flight.custody, Owner(flight.engine, flight.incarnation))
        self._apply(flight, verdict, "its engine died" if crashed else "its engine was parked")

    def _state(self, link: Link) -> None:
        """Tell an engine all that it owns of this frontend: whatever else it holds it drops."""
        owned = [f for f in self._flights.values() if (f.engine, f.incarnation) == (link.index, link.incarnation)]
        self._send(link, Statement([f.rid for f in owned], [f.epoch for f in owned]), link.incarnation)

    def _lose(self, flight: Flight, reason: str) -> None:
        self._close(flight)
        flight.fail(reason)

    def _close(self, flight: Flight) -> None:
        del self._flights[flight.rid]
        self._stranded.pop(flight.rid, None)
        self._journal.close(flight.slot)

    # -- dispatch -----------------------------------------------------------------------------------

    def engine_facts(self) -> list[EngineFacts | None]:
        """Facts of each engine as last published; None of one that is not there."""
        return [link.refresh() for link in self._links]

    def engine_states(self) -> list[str]:
        """What operators call the state of each engine."""
        found = []
        for link in self._links:
            facts, progress = link.refresh(), self._fabric.progress(link.process)
            published = EngineState(facts.state) if facts is not None else progress.state
            found.append(engine_state(self._table.rows[link.process].life, published))
        return found

    def _serving(self) -> list[EngineFacts]:
        return [f for f in self.engine_facts() if f is not None and f.state == EngineState.SERVING]

    def _choose(self, avoid: int = -1, high: bool = False, names: Sequence[int] = ()) -> int:
        """The freest engine, or one about as free that is thought to hold a beginning of the prompt, by its `names`;
        `avoid` only if there is no other."""
        facts = self.engine_facts()
        if avoid >= 0:
            others = [f if i != avoid else None for i, f in enumerate(facts)]
            if any(f is not None and f.state == EngineState.SERVING for f in others):
                facts = others
        frontends = [self._facts() if peer is None else peer.refresh() for peer in self._peers]
        matched = self._affinity.matched(names) if self._affinity is not None else None
        self._turn += 1
        flying = in_flight(facts, frontends)
        engine = choose(facts, flying, self._turn, policy=self._policy, high=high, matched=matched)
        if engine is None:
            raise NoEngine("no engine is ready")
        return engine

    def _refuse_oversized(self, link: Link, prompt_len: int) -> None:
        assert link.facts is not None
        room = min(link.facts.max_model_len, link.facts.total_blocks * link.facts.block_size)
        if prompt_len >= room:
            raise TooLong(f"the prompt has {prompt_len} tokens; an engine holds at most {room} with the answer")

    def _open(self, rid: int, record: RequestParams, prompt: Sequence[int]) -> int:
        try:
            return self._journal.open(rid, record, prompt)
        except JournalFull as e:
            raise Overloaded(str(e)) from None
        except JournalTooSmall as e:
            raise TooLong(str(e)) from None

    def _facts(self) -> FrontendFacts:
        submitted = [link.submitted for link in self._links]
        return FrontendFacts(self._fabric.incarnation, submitted, len(self._flights), not self.draining)

    def _publish(self) -> None:
        self._board.publish(encode(self._facts()))

    def _send(self, link: Link, message: ToEngine, receiver: int) -> None:
        """To that life of the engine, be it known here yet or not: another one drops it."""
        blob = encode(message)
        if link.backlog or not link.commands.put(blob, receiver):
            link.backlog.append((receiver, blob))
            asyncio.get_running_loop().call_later(_FULL_RETRY, self._flush, link)
        self._fabric.ring_bell(link.process)

    def _flush(self, link: Link) -> None:
        while link.backlog and link.commands.put(link.backlog[0][1], link.backlog[0][0]):
            link.backlog.popleft()
        self._fabric.ring_bell(link.process)
        if link.backlog:
            asyncio.get_running_loop().call_later(_FULL_RETRY, self._flush, link)


class _Places:
    """Places in the queue limit, held from before tokenising until the requests are submitted."""

    def __init__(self, tracker: Tracker, count: int) -> None:
        self._tracker = tracker
        self._count = count

    def __enter__(self) -> _Places:
        self._tracker.reserve(self._count)
        return self

    def __exit__(self, *exc: object) -> None:
        self._tracker.reserve(-self._count)
