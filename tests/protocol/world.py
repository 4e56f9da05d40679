"""A model of all processes of a daemon, in which every delay, loss, death and cancel is an action of its own.

Schedulers, block managers, llumlets and the frontend's ownership rules are the real objects. Rings are FIFO and
outlive their writers. A copy is an action: until it is taken, the destination's blocks may be written.
`engine_model` describes the model of KV and tokens.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from daemon.control.policy import ownership
from daemon.control.policy.ownership import Decision, Ownership
from daemon.engine.migration.actions import Copy, Report, Send, Tell
from daemon.engine.migration.destination import Destination
from daemon.engine.migration.llumlet import Llumlet
from daemon.engine.migration.source import Phase, Source
from daemon.engine.scheduler import Emission, Scheduler
from daemon.enums import MigrationResult
from daemon.ipc.messages import (
    Cancel,
    EngineIncarnation,
    Finish,
    Grant,
    HandBack,
    MigrateTo,
    OwnedRequests,
    Reclaim,
    Release,
    Reprioritise,
    Start,
    Takeover,
)
from tests.protocol.engine_model import (
    BLOCK_SIZE,
    FRONTEND,
    GARBAGE,
    Engine,
    Entry,
    Journals,
    Record,
    StepRows,
    Violation,
    cell_of,
    fact_of,
)
from tests.protocol.invariants import check_invariants
from tests.protocol.succession import handled, lost


class Budget(NamedTuple):
    """How often each fault or order may happen. No request needs any of them to end."""

    moves: int = 0
    crashes: int = 0
    suspicions: int = 0
    cancels: int = 0
    preemptions: int = 0
    successions: int = 0  # the frontend dies, and its successor adopts its journal
    losses: int = 0  # the frontend dies, and its successor begins with an empty journal
    failures: int = 0  # of a copy
    changes: int = 0  # of a priority


Action = tuple[Any, ...]
# The actions that are no faults and no orders. A request must be able to end by these alone.
PROGRESS = frozenset({"step", "read", "copy", "notice", "dispatch", "fail_request", "time_out"})


class World:
    """All processes of the daemon. Subclasses break a rule of the protocol."""

    llumlet_class: type[Llumlet] = Llumlet
    source_class: type[Source] = Source
    destination_class: type[Destination] = Destination
    rules: Any = ownership

    def __init__(
        self,
        budget: Budget,
        *,
        engines: int = 2,
        requests: Sequence[tuple[list[int], int] | tuple[list[int], int, bytes]] = (([1, 2, 3], 3),),
        homes: Sequence[int] = (0,),
        pool: int = 5,
        batch_tokens: int = 8,
        prefix_caching: bool = True,
        how: str = "live",
        overlap: bool = False,
        replaced: bool = False,
    ) -> None:
        """Build a world whose requests have been dispatched.

        `requests`: (prompt, max_tokens) or (prompt, max_tokens, salt) each; `homes`: the engines that they start on;
        `pool`: blocks of an engine; `how`: the `MigrationMode` of all moves; `overlap`: a step is launched before the
        results of the previous step are applied; `replaced`: a successor of an engine has other weights.
        """
        self.replaced = replaced
        self.overlap = overlap
        self.prefix_caching = prefix_caching
        self.how = how
        self.message_read = ""  # the type of the message that was read last
        self.budget = budget
        self.pool = pool
        self.batch_tokens = batch_tokens
        self.incarnation = 1  # of the frontend
        self.generation = 1  # the incarnation that began with an empty journal
        self.entries = {rid: Entry(rid, *request) for rid, request in enumerate(requests, 1)}
        self.journals = self.make_journals()
        self.known = [1] * engines  # incarnations of the engines, as the frontend knows them
        self.engines = [Engine(self, i, 1, [1] * engines, 1) for i in range(engines)]
        ends = [FRONTEND, *range(engines)]
        self.rings: dict[tuple[int, int], list[Record]] = {(a, b): [] for a in ends for b in ends if a != b}
        self.notices: list[tuple[int, EngineIncarnation]] = []  # deaths that the observer has not handled yet
        for rid, home in enumerate(homes, 1):
            self.dispatch(rid, home)

    def make_journals(self) -> Journals:
        return Journals(self.entries)

    def weights_of(self, incarnation: int) -> int:
        """Return the weights of each engine's incarnation."""
        return incarnation if self.replaced else 1

    def make_llumlet(self, scheduler: Scheduler, weights: int) -> Llumlet:
        llumlet = self.llumlet_class(scheduler, self.journals, has_same_weights=SameWeights(self, weights))
        llumlet.source = self.source_class(scheduler, self.journals)
        llumlet.destination = self.destination_class(scheduler, self.journals)
        return llumlet

    # -- possible actions ---------------------------------------------------------------------------

    def actions(self) -> Iterator[Action]:
        for (a, b), ring in self.rings.items():
            if ring:
                yield "read", a, b, 0
                if b == FRONTEND and (other := _first_of_other_kind(ring)):
                    yield "read", a, b, other
        for engine in self.engines:
            yield from self._engine_actions(engine)
        for observer, dead in self.notices:
            if self.may_notice(observer, dead):
                yield "notice", observer, dead
        for rid, entry in self.entries.items():
            if entry.open:
                yield from self._request_actions(rid, entry)
        if self.budget.successions:
            unsent = list(lost(self.rings, len(self.engines)))
            yield from (("succeed", *done, unsent_now) for done in handled(self.rings) for unsent_now in unsent)
        if self.budget.losses:
            yield "lose", True
            yield "lose", False

    def _engine_actions(self, engine: Engine) -> Iterator[Action]:
        index, scheduler = engine.index, engine.scheduler
        if scheduler.running or scheduler.waiting or engine.step_in_flight:
            yield "step", index
        for i in range(len(engine.copies)):
            yield "copy", index, i
            if self.budget.failures:
                yield "fail", index, i
        if any(o.phase is Phase.HANDED_OVER for o in engine.llumlet.outgoing.values()):
            yield "time_out", index
        if self.budget.crashes:
            yield "crash", index
        for rid in sorted(scheduler.running):
            if self.budget.preemptions:
                yield "preempt", index, rid
        if self.budget.moves:
            for request in (*scheduler.running.values(), *scheduler.waiting):
                if not any(o.request is request for o in engine.llumlet.outgoing.values()):
                    others = (i for i in range(len(self.engines)) if i != index)
                    yield from (("move", index, other, request.rid) for other in others)

    def _request_actions(self, rid: int, entry: Entry) -> Iterator[Action]:
        if entry.ownership.owner is None:
            fit = [i for i in range(len(self.engines)) if self.may_continue(entry, i)]
            yield from (("dispatch", rid, index) for index in fit)
            if not fit:
                yield "fail_request", rid
        elif self.budget.suspicions:
            yield "suspect", rid
        if self.budget.cancels:
            yield "cancel", rid
        if self.budget.changes:
            yield "set_priority", rid

    def may_notice(self, observer: int, dead: EngineIncarnation) -> bool:
        """Return True once all messages that the dead engine had written have been read."""
        return all(record.sender != dead.incarnation for record in self.rings[dead.engine, observer])

    def apply(self, action: Action) -> None:
        """Take an action. Raises Violation, or what the objects raise, if a rule is broken."""
        getattr(self, action[0])(*action[1:])
        self.check()

    # -- engines ---------------------------------------------------------------------------------

    def step(self, index: int) -> None:
        engine = self.engines[index]
        plan = engine.scheduler.plan(0.0)
        launched = engine.launch(plan) if plan else None
        ended = launched
        if self.overlap:
            ended, engine.step_in_flight = engine.step_in_flight, launched
        if ended is None:
            self._execute_all(engine, engine.llumlet.tick(0.0))
            return
        emissions = engine.scheduler.apply_result(ended.plan, engine.execute(ended), 0.0)
        self._emit(engine, emissions)
        self._execute_all(engine, engine.llumlet.after_step(emissions, 0.0))

    def _emit(self, engine: Engine, emissions: list[Emission]) -> None:
        rows = [(e.request.rid, e.request.epoch, e.start, tuple(e.tokens), e.finish) for e in emissions]
        if rows:
            self._send(engine.index, FRONTEND, engine.incarnation, engine.frontend, StepRows(tuple(rows)))

    def time_out(self, index: int) -> None:
        self._execute_all(self.engines[index], self.engines[index].llumlet.tick(1000.0))

    def preempt(self, index: int, rid: int) -> None:
        self._use_budget("preemptions")
        scheduler = self.engines[index].scheduler
        scheduler.preempt(scheduler.running[rid], 0.0)

    def move(self, index: int, destination: int, rid: int) -> None:
        self._use_budget("moves")
        engine = self.engines[index]
        peer = EngineIncarnation(destination, engine.known[destination])
        actions = engine.llumlet.migrate_to(peer, MigrateTo(destination, 1.0, rid, how=self.how), 0.0)
        declined = [a for a in actions if isinstance(a, Report) and a.result is MigrationResult.DECLINED]
        self._execute_all(engine, [a for a in actions if a not in declined])  # no move has begun

    def copy(self, index: int, i: int) -> None:
        engine = self.engines[index]
        copy = engine.copies.pop(i)
        destination = self.engines[copy.peer.engine]
        if destination.identity == copy.peer:
            for block_here, block_there in copy.pairs:
                destination.memory[block_there] = list(engine.memory[block_here])
        self._execute_all(engine, engine.llumlet.copied(copy.move, 0.0))

    def fail(self, index: int, i: int) -> None:
        """The copy fails, and its destination blocks hold garbage."""
        self._use_budget("failures")
        engine = self.engines[index]
        copy = engine.copies.pop(i)
        destination = self.engines[copy.peer.engine]
        if destination.identity == copy.peer:
            for _, block_there in copy.pairs:
                destination.memory[block_there] = [GARBAGE] * BLOCK_SIZE
        self._execute_all(engine, engine.llumlet.copy_failed(copy.move, 0.0))

    def crash(self, index: int) -> None:
        """The engine dies. Its successor starts at once with an empty pool. The others have yet to notice."""
        self._use_budget("crashes")
        dead = self.engines[index].identity
        successor = Engine(self, index, dead.incarnation + 1, [e.incarnation for e in self.engines], 0)
        self.engines[index] = successor
        successor.known[index] = successor.incarnation
        self.notices = [n for n in self.notices if n[0] != index]
        for (_, b), ring in self.rings.items():
            if b == index:
                ring.clear()
        self.notices += [(observer, dead) for observer in (FRONTEND, *range(len(self.engines))) if observer != index]

    def _execute_all(self, engine: Engine, actions: list[Any]) -> None:
        for action in actions:
            match action:
                case Send(peer, message):
                    self._send(engine.index, peer.engine, engine.incarnation, peer.incarnation, message)
                case Tell(_, message):
                    self._send(engine.index, FRONTEND, engine.incarnation, engine.frontend, message)
                case Copy():
                    engine.copies.append(action)
                case Report():
                    engine.reports += action.result is not MigrationResult.HANDED_BACK

    def _send(self, a: int, b: int, sender: int, receiver: int, message: Any) -> None:
        """Write a record. One for a dead incarnation is dropped here, as the successor would drop it."""
        known = range(self.generation, self.incarnation + 1) if b == FRONTEND else [self.engines[b].incarnation]
        if receiver in known:
            self.rings[a, b].append(Record(sender, receiver, message))

    # -- rings -----------------------------------------------------------------------------------

    def read(self, a: int, b: int, i: int) -> None:
        """Read the i-th record. In a ring to the frontend, step rows and other messages may overtake each other."""
        record = self.rings[a, b].pop(i)
        self.message_read = type(record.message).__name__
        if b == FRONTEND:
            self._handle_engine_message(EngineIncarnation(a, record.sender), record.message)
        elif a == FRONTEND:
            self._handle_frontend_message(self.engines[b], record)
        else:
            engine = self.engines[b]
            self._execute_all(
                engine, engine.llumlet.on_peer(EngineIncarnation(a, record.sender), record.message, 0.0)
            )

    def _handle_frontend_message(self, engine: Engine, record: Record) -> None:
        llumlet = engine.llumlet
        engine.frontend = record.sender
        match record.message:
            case Start(rid, epoch, slot, _):
                request = self.journals.load(0, slot, rid, epoch)
                self._execute_all(engine, llumlet.on_start(request, 0.0) if request else [])
            case Cancel(rid, epoch) | Release(rid, epoch):
                cancelled = isinstance(record.message, Cancel)
                self._execute_all(engine, llumlet.on_release(rid, epoch, 0.0, cancelled=cancelled))
            case Grant(rid, epoch, new_epoch):
                self.message_read = f"Grant {new_epoch}"
                self._execute_all(engine, llumlet.on_grant(rid, epoch, new_epoch, 0.0))
            case Reprioritise(rid, epoch, priority):
                llumlet.on_reprioritise(rid, epoch, priority)
            case OwnedRequests():
                self._execute_all(engine, llumlet.on_owned_requests(0, record.message, 0.0))

    def notice(self, observer: int, dead: EngineIncarnation) -> None:
        self.notices.remove((observer, dead))
        alive = self.engines[dead.engine].incarnation
        if observer == FRONTEND:
            self.known[dead.engine] = alive
            for entry in self.entries.values():
                if entry.open:
                    self._apply_decision(entry, self.rules.engine_died(entry.ownership, EngineIncarnation(*dead)))
            self.send_owned_requests(self.engines[dead.engine])
        else:
            engine = self.engines[observer]
            engine.known[dead.engine] = alive
            self._execute_all(engine, engine.llumlet.on_peer_death(dead, 0.0))

    # -- the frontend ----------------------------------------------------------------------------

    def _handle_engine_message(self, sender: EngineIncarnation, message: Any) -> None:
        if isinstance(message, StepRows):
            for row in message.rows:
                self._accept(*row)
            return
        entry = self.entries[message.rid]
        if not entry.open:
            if not isinstance(message, HandBack):
                self._send_order(self.rules.stale(message.rid, message.epoch, sender))
            return
        match message:
            case Takeover():
                self._apply_decision(entry, self.rules.takeover(entry.ownership, sender, message))
            case Reclaim():
                self._apply_decision(entry, self.rules.reclaim(entry.ownership, sender, message))
            case HandBack():
                decision = self.rules.hand_back(entry.ownership, sender, message)
                self.message_read = "HandBack taken" if decision.redispatch else "HandBack"
                self._apply_decision(entry, decision)

    def _accept(self, rid: int, epoch: int, start: int, tokens: tuple[int, ...], finish: Finish) -> None:
        entry = self.entries[rid]
        if not entry.open or entry.ownership.epoch != epoch:
            return
        known = self.rules.fresh(entry.ownership.accepted, start, len(tokens))
        if known is None:
            if entry.ownership.owner is not None:
                self._apply_decision(entry, self.rules.disown(entry.ownership)._replace(fault=True))
            return
        self._append(entry, list(tokens[known:]))
        entry.ownership = entry.ownership._replace(accepted=len(entry.output))
        if finish:
            entry.open = False

    def _append(self, entry: Entry, tokens: list[int]) -> None:
        for token in tokens:
            fact = fact_of(token)
            if entry.begun is None:
                entry.begun = self.weights_of(fact[2]) if fact[0] == "token" else 0
            context = cell_of(entry.prompt + entry.output, entry.salt, entry.begun)
            if fact[0] != "token" or fact[3] != context:
                raise Violation(f"incoherent: a token drawn from {fact}, the client has {context}")
            entry.output.append(token)

    def _apply_decision(self, entry: Entry, decision: Decision) -> None:
        if decision.fault:
            raise Violation("incoherent: output is missing")
        if decision.output:
            self._append(entry, decision.output.tokens)
        entry.ownership = decision.ownership
        entry.owner = decision.ownership.owner or entry.owner
        for order in decision.orders:
            self._send_order(order)

    def _send_order(self, order: ownership.Order) -> None:
        """Send an order to the incarnation that it names, which may be newer than the one that the frontend knows."""
        self._send(FRONTEND, order.to.engine, self.incarnation, order.to.incarnation, order.message)

    def dispatch(self, rid: int, index: int) -> None:
        entry = self.entries[rid]
        owner = EngineIncarnation(index, self.known[index])
        entry.ownership = self.rules.started(entry.ownership, owner)
        entry.owner, entry.weights = owner, self.weights_of(owner.incarnation)
        start = Start(rid, entry.ownership.epoch, rid, len(entry.prompt))
        self._send(FRONTEND, index, self.incarnation, owner.incarnation, start)

    def may_continue(self, entry: Entry, index: int) -> bool:
        """Return True if the engine has the weights that the output began with, as far as the frontend knows."""
        return entry.bound in (0, self.weights_of(self.known[index]))

    def fail_request(self, rid: int) -> None:
        """No engine has the weights that the output began with any more."""
        self.entries[rid].open = False

    def suspect(self, rid: int) -> None:
        self._use_budget("suspicions")
        self._apply_decision(self.entries[rid], self.rules.disown(self.entries[rid].ownership))

    def set_priority(self, rid: int) -> None:
        """An operator gives the request high priority, or normal priority again."""
        self._use_budget("changes")
        entry = self.entries[rid]
        self._apply_decision(entry, self.rules.reprioritise(entry.ownership, -1 - entry.ownership.priority))

    def cancel(self, rid: int) -> None:
        self._use_budget("cancels")
        self.entries[rid].open = False
        for order in self.rules.cancel(self.entries[rid].ownership):
            self._send_order(order)

    def succeed(self, reading: int, count: int, half: bool, unsent: tuple[int, ...]) -> None:
        """The frontend dies, and its successor goes on from the journal and the rings.

        The arguments are as in `succession.handled` and `succession.lost`.
        """
        self._use_budget("successions")
        for i, record in enumerate(self.rings[reading, FRONTEND][:count] if count else []):
            if half and i == count - 1:
                self._journal_output(record.message)
            else:
                self._handle_engine_message(EngineIncarnation(reading, record.sender), record.message)
        for index, number in enumerate(unsent):
            ring = self.rings[FRONTEND, index]
            del ring[max(0, len(ring) - number) :]
        self.incarnation += 1
        self.known = [e.incarnation for e in self.engines]
        for rid, entry in self.entries.items():
            held = entry.ownership
            entry.ownership = Ownership(rid, held.epoch, entry.owner, len(entry.output), held.priority, True)
            dead = entry.owner is not None and entry.owner not in [e.identity for e in self.engines]
            if entry.open and dead and (FRONTEND, entry.owner) not in self.notices:
                self.notices.append((FRONTEND, entry.owner))
        for engine in self.engines:
            self.send_owned_requests(engine)

    def _journal_output(self, message: Any) -> None:
        """Journal the output of a message, and nothing else of it."""
        if isinstance(message, StepRows):
            for rid, epoch, start, tokens, _ in message.rows:
                self._accept(rid, epoch, start, tokens, Finish.NONE)
        elif isinstance(message, Takeover | Reclaim):
            self._accept(message.rid, message.epoch, message.start, tuple(message.tokens), Finish.NONE)

    def lose(self, queued: bool) -> None:
        """The frontend dies and its journal is lost. `queued`: all output still waits at the engines, which address
        it to the successor."""
        self._use_budget("losses")
        for entry in self.entries.values():
            entry.open = False
        self.incarnation += 1
        self.generation = self.incarnation
        self.known = [e.incarnation for e in self.engines]
        self.notices = [n for n in self.notices if n[0] != FRONTEND]
        for (_, b), ring in self.rings.items():
            if b == FRONTEND and not queued:
                ring.clear()
        for engine in self.engines:
            self.send_owned_requests(engine)

    def send_owned_requests(self, engine: Engine) -> None:
        """Send the engine what it owns."""
        open_entries = [e.ownership for e in self.entries.values() if e.open]
        (message,) = self.rules.owned_requests(o for o in open_entries if o.owner == engine.identity)
        self._send(FRONTEND, engine.index, self.incarnation, engine.incarnation, message)

    def _use_budget(self, what: str) -> None:
        self.budget = self.budget._replace(**{what: getattr(self.budget, what) - 1})

    # -- state -----------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise Violation or PoolError if an invariant does not hold."""
        for engine in self.engines:
            engine.overwrite_free_blocks()
        check_invariants(self)

    def save(self) -> bytes:
        """Return the pickled state."""
        return pickle.dumps(self, pickle.HIGHEST_PROTOCOL)


class SameWeights:
    """Compares weights, for the llumlet of an engine that has `weights`."""

    def __init__(self, world: World, weights: int) -> None:
        self.world = world
        self.weights = weights

    def __call__(self, peer: EngineIncarnation) -> bool:
        return self.world.weights_of(peer.incarnation) == self.weights


def _first_of_other_kind(ring: list[Record]) -> int:
    """Return the first record that is step rows if the first is not, or the reverse; 0 if there is none.

    A HandBack never overtakes step rows, nor does what is behind it.
    """
    kind = isinstance(ring[0].message, StepRows)
    found = next((i for i, r in enumerate(ring) if isinstance(r.message, StepRows) != kind), 0)
    return 0 if kind and isinstance(ring[found].message, HandBack) else found
