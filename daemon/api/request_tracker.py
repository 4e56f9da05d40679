"""The frontend's request table: journals each request, dispatches it to an engine and accepts its output.

The frontend decides alone about its requests. Every row of output names (request, epoch, position); rows that are
stale, repeated or from a former owner are dropped by rule. Accepted tokens are journaled before they are delivered.
An engine's ring is acknowledged once the journal holds what was read from it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from array import array
from collections.abc import Collection, Sequence

from daemon.api.admission import Holder, Places
from daemon.api.engine_links import EngineLink, EngineLinks
from daemon.api.generator import EngineLost, NoEngine, RequestAttributes, ShuttingDown, TooLong
from daemon.api.request_events import RequestEvents
from daemon.api.request_state import CANCELLED_AS, SHUTTING_DOWN, RequestState
from daemon.api.request_store import RequestStore, holder_of, journaled_params, record_holder
from daemon.config import Config
from daemon.control.policy import ownership
from daemon.control.policy.ownership import Decision, Order, Ownership
from daemon.enums import DispatchKind, EarlyEnd
from daemon.ipc.event_ring import EventWriter
from daemon.ipc.fabric import COORDINATOR, Fabric
from daemon.ipc.journal import Failure, Journal, SlotState
from daemon.ipc.messages import (
    CancelRequest,
    EngineIncarnation,
    Finish,
    HandBack,
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
from daemon.ipc.prompt_logprobs import PromptLogprobs
from daemon.ipc.ring import Record

log = logging.getLogger(__name__)

_REDISPATCH_PERIOD = 0.1  # seconds between two attempts to dispatch stranded requests
_OTHER_WEIGHTS = "the engines have other weights now than those that this answer began with; please send it again"
_MAX_FAILURES = 1  # engines that may end by an exception of their own while they run a request


class RequestTracker:
    """All requests of one frontend. Implements `Generator`. Used on the event loop's thread only."""

    def __init__(self, fabric: Fabric, config: Config, *, adopt: bool = False) -> None:
        """`adopt`: go on with the requests that a predecessor has left in the journal."""
        _, index = fabric.topology.role(fabric.process)
        self._fabric = fabric
        self._config = config
        self._journal = Journal(fabric.journal(index, writable=True), adopt=adopt, generation=fabric.incarnation)
        self.store = RequestStore(self._journal, config.max_queued, config.max_client_requests)
        self.engines = EngineLinks(fabric, config)
        self._coordinator = fabric.reader(COORDINATOR)
        self.metrics = MetricsPage(fabric.metrics(fabric.process), FRONTEND)
        self._events = RequestEvents(EventWriter(fabric.events(fabric.process)))
        self._requests: dict[int, RequestState] = {}
        self._stranded: dict[int, str] = {}  # rid -> why no engine runs the request now
        self._redispatch_timer: asyncio.TimerHandle | None = None
        self._next_rid = index << 56 | (fabric.incarnation & 0xFFFF) << 40 | 1
        self.draining = False
        self._adopted = {slot: self._adopt(slot) for slot in self._journal.kept_slots()}
        self.on_doorbell()

    # -- Generator --------------------------------------------------------------------------------

    @property
    def max_model_len(self) -> int:
        """Smallest context of the engines that serve, tokens; 0 if none serves."""
        return min((f.max_model_len for f in self.engines.serving()), default=0)

    @property
    def ready(self) -> bool:
        """True if at least one engine serves and this frontend does not drain."""
        return not self.draining and bool(self.engines.serving())

    @property
    def active(self) -> int:
        """Number of unfinished requests."""
        return len(self._requests)

    def admit(self, count: int, *, client: str = "", priority: int = 0) -> Places:
        """Take `count` places in the queue limit, released on exit. Raises Overloaded, TooMany or NoEngine."""
        if not self.ready:
            raise NoEngine("shutting down" if self.draining else "no engine is ready")
        return self.store.take(count, Holder(client, priority < 0))

    def check_room(
        self,
        lengths: list[tuple[int, int]],
        params: SamplingParams,
        attributes: RequestAttributes,
    ) -> None:
        """Raise TooMany if the journal can never hold all choices of a request."""
        self.store.check_room(lengths, params, attributes)

    def submit(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        attributes: RequestAttributes,
    ) -> RequestState:
        """Journal the request and start it on the freest engine. Raises Overloaded, NoEngine or TooLong."""
        if self.draining:
            raise NoEngine("shutting down")
        prompt = array("I", prompt)
        prefix_keys = self.engines.prefix_keys(prompt, attributes.cache_salt)
        engine = self.engines.choose(high=attributes.priority < 0, prefix_keys=prefix_keys)
        self._refuse_oversized(engine, len(prompt), params.max_tokens)
        rid = self._next_rid
        record = journaled_params(params, time.monotonic(), attributes)
        slot = self.store.open(rid, record, prompt, holder := holder_of(attributes))
        self._next_rid += 1
        owned = Ownership(rid, epoch=1, owner=self.engines.current(engine), accepted=0, priority=attributes.priority)
        request = RequestState(self._journal, slot, owned, prefix_keys, holder, self.cancel, self._release)
        self._requests[rid] = request
        request.weights = self.engines.weights(engine)
        request.assign(owned)
        self._start(request, len(prompt))
        self._record_dispatch(request, len(prompt), record)
        return request

    def _start(self, request: RequestState, prompt_len: int) -> None:
        """Send a Start to the request's owner and publish the new demand."""
        self.engines.start(request.owner, Start(request.rid, request.epoch, request.slot, prompt_len))
        self._publish()

    def _record_dispatch(
        self, request: RequestState, prompt_len: int, record: RequestParams, again: str = ""
    ) -> None:
        """Record the dispatch in prefix affinity, metrics and events: after the Start, which need not wait for it."""
        self.engines.record_prefixes(request.prefix_keys, request.engine)
        self.metrics.inc("dispatches", 1.0, DispatchKind.AGAIN if again else DispatchKind.FIRST)
        self._events.dispatched(request, prompt_len, record, again)

    # -- the requests of a predecessor --------------------------------------------------------------

    def adopted(self) -> dict[int, RequestState]:
        """Return the requests of the predecessor that are not released yet, by journal slot."""
        return dict(self._adopted)

    def abandon_unclaimed(self, slots_in_use: Collection[int]) -> None:
        """Cancel and release the requests of the predecessor that no response needs: it died before it began one."""
        for slot, request in self.adopted().items():
            if slot not in slots_in_use:
                request.cancel(EarlyEnd.FRONTEND)
                request.release()

    def _adopt(self, slot: int) -> RequestState:
        holder = record_holder(self._journal.params(slot))
        request = RequestState.adopt(self._journal, slot, holder, self.cancel, self._release)
        if self._journal.state(slot) is SlotState.LIVE:
            self._requests[request.rid] = request
        return request

    # -- input ------------------------------------------------------------------------------------

    def on_doorbell(self) -> None:
        """Handle everything that other processes have written.

        The process table is read first and deaths are handled last: output that a dead engine had written to its ring
        is accepted before its death counts. A new incarnation of an engine gets to know first what it owns: before
        the answers to claims, which it may have sent to a predecessor of this process.
        """
        changed = self.engines.refresh_table()
        if changed:
            for link in self.engines.update_incarnations():
                self._send_owned(link)
        for link in self.engines.links:
            self._read_outputs(link)
            self.engines.flush(link)
        while (record := self._coordinator.read()) is not None:
            if self._is_for_us(record):
                self._handle(decode_from_coordinator(record.payload))
        self._coordinator.ack()
        if changed:
            for link in self.engines.links:
                self._handle_engine_death(link)
            self._publish()

    def _is_for_us(self, record: Record) -> bool:
        """Return True for a record to this process, or to a predecessor whose journal it has adopted."""
        return self._journal.generation <= record.receiver <= self._fabric.incarnation

    def cancel(self, request: RequestState, why: EarlyEnd | None) -> None:
        """Cancel a request: its engine frees its blocks, its stream ends. `why`: None if its output is complete."""
        finish = CANCELLED_AS.get(why, Finish.CANCELLED)
        self._close(request, why or _result(finish), finish=finish)
        for order in ownership.cancel(request.ownership):
            self._send(order)
        request.end(finish)

    def give_up(self) -> None:
        """End every unfinished request, because the daemon ends."""
        for request in list(self._requests.values()):
            self._cut_off(request)

    def _cut_off(self, request: RequestState) -> None:
        self._close(request, EarlyEnd.SHUTDOWN, failure=Failure.SHUTDOWN)
        request.fail(ShuttingDown(SHUTTING_DOWN))

    def _release(self, request: RequestState) -> None:
        self._adopted.pop(request.slot, None)
        self.store.free(request.slot, request.holder)

    def _read_outputs(self, link: EngineLink) -> None:
        link.refresh()  # here, because no request waits for a dispatch now
        read = link.outputs.read
        while (record := read()) is not None:
            if not self._is_for_us(record):
                continue
            message = decode_to_frontend(record.payload)
            if type(message) is StepOutput:
                self._accept(message)
            else:
                self._handle_claim(message, EngineIncarnation(link.index, record.sender))
        link.outputs.ack()

    def _accept(self, out: StepOutput) -> None:
        """Apply the rows of one step; epoch and position decide which tokens are new."""
        if out.prompt_logprobs:
            self._accept_prompt_logprobs(out, out.prompt_logprobs)
        end = 0
        now = time.monotonic()
        for rid, epoch, start, count, finish, cached in zip(
            out.rids, out.epochs, out.starts, out.counts, out.finishes, out.cached, strict=True
        ):
            begin, end = end, end + count
            request = self._requests.get(rid)
            if request is None or request.epoch != epoch:
                self.metrics.inc("stale_tokens", count)
                continue
            logprobs = out.logprobs[begin:end] if out.logprobs is not None else None
            try:
                new = request.accept(start, out.tokens[begin:end], logprobs, Finish(finish), cached, now)
            except Exception:  # it must not end the other requests of this frontend
                log.exception("the output of request %d cannot be journaled", rid)
                new = -1
            if new < 0:
                self._end_broken(request)
                continue
            if new < count:
                self.metrics.inc("stale_tokens", count - new)
            if new and request.paused_since:
                self.metrics.observe("migration_pause_seconds", now - request.paused_since)
                request.paused_since = 0.0
            if finish:
                self._close(request, _result(Finish(finish)), finish=Finish(finish))

    def _accept_prompt_logprobs(self, out: StepOutput, rows: dict[int, PromptLogprobs]) -> None:
        """Journal logprobs of prompts, before the output of the same step: a reader takes them for complete then."""
        for row, new in rows.items():
            request = self._requests.get(out.rids[row])
            if request is None or request.epoch != out.epochs[row]:
                continue
            try:
                self._journal.append_prompt_logprobs(request.slot, new)
            except ValueError:
                log.exception("the logprobs of the prompt of request %d cannot be journaled", request.rid)
                self._end_broken(request)

    def _end_broken(self, request: RequestState) -> None:
        """End a request whose output does not continue what is journaled; its engine must not go on with it."""
        self._fail(request, "output was lost between engine and frontend")
        for order in ownership.cancel(request.ownership):
            self._send(order)

    def _handle_claim(self, claim: Refused | Takeover | Reclaim | HandBack, sender: EngineIncarnation) -> None:
        """Handle an engine's message about one request."""
        request = self._requests.get(claim.rid)
        if request is None:
            self._send(ownership.stale(claim.rid, claim.epoch, sender))
            return
        match claim:
            case Refused(epoch=epoch, reason=reason):
                if request.epoch == epoch:
                    self._fail(request, reason, retry=False)
            case Takeover():
                decision = ownership.takeover(request.ownership, sender, claim)
                if decision.ownership.owner == sender and decision.ownership.epoch > request.epoch:
                    self._record_takeover(request, decision.ownership)
                self._apply(request, decision)
            case Reclaim():
                self._apply(request, ownership.reclaim(request.ownership, sender, claim))
            case HandBack():
                self._apply(request, ownership.hand_back(request.ownership, sender, claim))

    def _record_takeover(self, request: RequestState, new: Ownership) -> None:
        """Record a takeover in prefix affinity, metrics and events. Call it before `new` is assigned."""
        assert new.owner is not None
        request.paused_since = request.paused_since or request.last_output_at
        self.metrics.inc("takeovers")
        self.engines.record_prefixes(request.prefix_keys, new.owner.engine)
        self._events.taken_over(request, self._journal.params(request.slot), new)

    def _apply(self, request: RequestState, decision: Decision, why: str = "handed back") -> None:
        """Journal the output, then the ownership with one store, then send the orders.

        `why`: the reason that the event of a new dispatch gives.
        """
        output = decision.output
        if output is not None:
            request.append(output.tokens, output.logprobs)
        if decision.redispatch:
            self._redispatch(request, decision, "output was lost" if decision.fault else why)
            return
        if decision.ownership != request.ownership:
            self._assign(request, decision.ownership)
        for order in decision.orders:
            self._send(order)

    def _redispatch(self, request: RequestState, decision: Decision, why: str) -> None:
        """Send the orders, and start the request on the freest engine as soon as one serves."""
        for order in decision.orders:
            self._send(order)
        self._stranded[request.rid] = why
        self._place_stranded()

    def _place_stranded(self) -> None:
        """Dispatch stranded requests. Without an engine try again later, or fail them if no engine can come.

        Output goes on only on the weights that it began with.
        """
        if self._redispatch_timer is not None:
            self._redispatch_timer.cancel()
            self._redispatch_timer = None
        missing: set[int] = set()  # weights that no engine has which serves
        for rid, why in list(self._stranded.items()):
            request = self._requests[rid]
            if request.bound in missing:
                continue
            high = request.priority < 0
            try:
                engine = self.engines.choose(request.engine, high, request.prefix_keys, request.bound)
            except NoEngine as e:
                if self.engines.may_serve_later(draining=self.draining, weights=request.bound):
                    missing.add(request.bound)
                elif self.draining:  # the supervisor starts no engine again
                    self._cut_off(request)
                else:
                    others = request.bound and self.engines.may_serve_later(draining=False)
                    self._fail(request, _OTHER_WEIGHTS if others else str(e))
            else:
                self._restart(request, engine, why)
        if missing:
            loop = asyncio.get_running_loop()
            self._redispatch_timer = loop.call_later(_REDISPATCH_PERIOD, self._place_stranded)

    def _restart(self, request: RequestState, engine: int, why: str) -> None:
        request.weights = self.engines.weights(engine)
        self._assign(request, ownership.started(request.ownership, self.engines.current(engine)))
        prompt_len = self._journal.prompt_len(request.slot)
        self._start(request, prompt_len)
        self._record_dispatch(request, prompt_len, self._journal.params(request.slot), why)

    def _assign(self, request: RequestState, new: Ownership) -> None:
        self._stranded.pop(request.rid, None)
        request.assign(new)

    def _send(self, order: Order) -> None:
        self.engines.send(order.to, order.message)

    def _handle(self, message: CancelRequest | SetPriority) -> None:
        """Handle a message of the coordinator."""
        request = self._requests.get(message.rid)
        if request is None:
            return
        match message:
            case CancelRequest():
                self.cancel(request, EarlyEnd.OPERATOR)
            case SetPriority(priority=priority):
                self._reprioritise(request, priority)

    def _reprioritise(self, request: RequestState, priority: int) -> None:
        """Journal the priority, then send the orders: an engine reads it there after a later Start or Handover."""
        decision = ownership.reprioritise(request.ownership, priority)
        request.reprioritise(decision.ownership)
        for order in decision.orders:
            self._send(order)

    # -- engine incarnations ------------------------------------------------------------------------

    def _handle_engine_death(self, link: EngineLink) -> None:
        """Dispatch again the requests that dead incarnations of this engine own.

        A request that a parked engine still owns had never reached it. A request may be the cause of a crash, so it
        ends with an error after `max_resumes` crashes. An engine that ends by an exception of its own is suspicious,
        so no request is tried after two of them, whatever `max_resumes` is.
        """
        row = self.engines.table_row(link)
        dead = row.incarnation - (row.state == ProcessState.UP)
        orphaned = [
            r
            for r in self._requests.values()
            if r.engine == link.index and r.owner.incarnation <= dead and r.rid not in self._stranded
        ]
        crashed = [r for r in orphaned if r.owner.incarnation <= row.last_crashed]
        for request in crashed:
            request.count_crash(failed=request.owner.incarnation == row.last_failed)
        failed = [r for r in crashed if self._may_be_the_cause(r)]
        if crashed:
            log.warning(
                "engine %d died: %d of its requests continue on other engines, %d end with an error",
                link.index,
                len(crashed) - len(failed),
                len(failed),
            )
        for request in failed:
            if request.crashes.failed > _MAX_FAILURES:
                self._fail(request, f"{request.crashes.failed} engines failed while they ran it", retry=False)
            else:
                self._fail(request, "the engine that ran this request died; please send it again")
        for request in orphaned:
            if not self._may_be_the_cause(request):
                self._resume(request, crashed=request.owner.incarnation <= row.last_crashed)

    def check_engines(self) -> None:
        """Take their requests from engines that hang, and dispatch them again. Call it about once a second.

        It is safe even if the engine only was slow: what it still sends is of an older epoch and is dropped. The
        request may be the cause, so this counts as a crash; after `max_resumes` of them it stays where it is.
        """
        for link in self.engines.hung(time.monotonic()):
            owner = self.engines.current(link.index)
            held = [r for r in self._requests.values() if r.owner == owner and r.rid not in self._stranded]
            moved = [r for r in held if r.crashes.crashed < self._config.max_resumes]
            if moved:
                log.warning("engine %d hangs: %d of its requests continue on other engines", link.index, len(moved))
            for request in moved:
                request.count_crash(failed=False)
                self.metrics.inc("resumes")
                self._apply(request, ownership.disown(request.ownership), "its engine hangs")

    def _may_be_the_cause(self, request: RequestState) -> bool:
        """Return True if the request has been through too many crashes to be tried on another engine."""
        return request.crashes.crashed > self._config.max_resumes or request.crashes.failed > _MAX_FAILURES

    def _resume(self, request: RequestState, *, crashed: bool) -> None:
        if crashed:
            self.metrics.inc("resumes")
        decision = ownership.engine_died(request.ownership, request.owner)
        self._apply(request, decision, "its engine died" if crashed else "its engine was parked")

    def _send_owned(self, link: EngineLink) -> None:
        """Send an engine the list of requests that it owns of this frontend; it drops all others."""
        owner = self.engines.current(link.index)
        for message in ownership.owned_requests(r.ownership for r in self._requests.values() if r.owner == owner):
            self.engines.send(owner, message)

    def _fail(self, request: RequestState, reason: str, *, retry: bool = True) -> None:
        self._close(request, EarlyEnd.ENGINE, reason, failure=Failure.LOST if retry else Failure.REFUSED)
        request.fail(EngineLost(reason, retry=retry))

    def _close(
        self,
        request: RequestState,
        result: str,
        detail: str = "",
        *,
        finish: Finish = Finish.NONE,
        failure: Failure = Failure.NONE,
    ) -> None:
        """Journal the end of a request, and write its last event. Its slot stays until its output is delivered."""
        del self._requests[request.rid]
        self._stranded.pop(request.rid, None)
        self.store.end(request.slot, request.holder, finish, failure)
        self._events.finished(request, self._journal.params(request.slot), result, detail)

    # -- limits -------------------------------------------------------------------------------------

    def _refuse_oversized(self, engine: int, prompt_len: int, max_tokens: int) -> None:
        facts = self.engines.links[engine].facts
        assert facts is not None
        limit = min(facts.max_model_len, facts.total_blocks * facts.block_size)
        if prompt_len + min(1, max_tokens) > limit:
            raise TooLong(f"the prompt has {prompt_len} tokens; prompt and answer together may have {limit}")

    def _publish(self) -> None:
        self.engines.publish(len(self._requests), taking=not self.draining)


def _result(finish: Finish) -> str:
    """Return how a request has ended, for its last event, if its engine or a stop string has ended it."""
    return EarlyEnd.ENGINE if finish is Finish.ERROR else finish.name.lower()
