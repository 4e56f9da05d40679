"""A box in a bottle: the real schedulers, block managers, llumlets and frontend's verdicts, and a world around
them in which everything that can be late, lost or killed is an action of its own.

Rings are FIFO and outlive their writer. A copy is an action: until it is taken, the destination's blocks may be
written. KV is modelled: the cell of a position is a name of all tokens up to there, computed from the cells that
the engine *reads*; a token names the engine life that drew it and the cells it was drawn from. So whoever reads
KV that is lost, stale or written over draws a token that does not fit what the client has.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import msgspec

from daemon.control.policy import ownership
from daemon.control.policy.ownership import Decision, Ownership
from daemon.engine.migration.llumlet import Copy, Llumlet, Report, Send, Stage, Tell
from daemon.engine.request import Request
from daemon.engine.runner import Row, StepPlan, StepResult
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
    RequestParams,
    Reserved,
    SamplingParams,
    Start,
    Struct,
    Takeover,
)
from daemon.kvpool.block_manager import BlockManager

SIZE = 2  # tokens in a block
F = -1  # the frontend's address
GARBAGE = 0

_names: dict[tuple[Any, ...], int] = {}
_facts: list[tuple[Any, ...]] = [("garbage",)]


def name(*fact: Any) -> int:
    """A small number for a fact, the same for equal facts; 0 is garbage."""
    number = _names.get(fact)
    if number is None:
        number = _names[fact] = len(_facts)
        _facts.append(fact)
    return number


def cell_of(tokens: list[int]) -> int:
    """The cell of the last of `tokens`, as a sound engine computes it."""
    cell = name("begin")
    for token in tokens:
        cell = name("kv", cell, token)
    return cell


class Violation(Exception):
    """An invariant does not hold."""


class Rows(NamedTuple):
    """A step's output: (rid, epoch, start, tokens, finish) each."""

    rows: tuple[tuple[int, int, int, tuple[int, ...], Finish], ...]


class Line(NamedTuple):
    """A row of a step in flight. The last token may be missing: the step before draws it."""

    row: Row
    tokens: list[int]
    table: list[int]

    @property
    def end(self) -> int:
        return self.row.start + self.row.count


class RequestState(NamedTuple):
    """A step that is launched. It reads and writes the memory as late as it may: just before the next one."""

    plan: StepPlan
    lines: list[Line]


class Record(NamedTuple):
    sender: int  # incarnation
    receiver: int  # incarnation
    message: Any


class Entry:
    """One request at the frontend, and its journal slot."""

    def __init__(self, rid: int, prompt: list[int], max_tokens: int) -> None:
        self.prompt = prompt
        self.max_tokens = max_tokens
        self.ownership = Ownership(rid, 0, None, 0)
        self.output: list[int] = []
        self.open = True


class Journals:
    """What engines read of the frontend's journal. Slots are request ids here."""

    def __init__(self, entries: dict[int, Entry]) -> None:
        self.entries = entries

    def accepted(self, request: Request) -> int:
        entry = self.entries[request.slot]
        return len(entry.output) if entry.open else -1

    def load(self, frontend: int, slot: int, rid: int, epoch: int) -> Request | None:
        entry = self.entries[slot]
        if not entry.open or entry.ownership.epoch != epoch:
            return None
        params = RequestParams(SamplingParams(entry.max_tokens, 0), float(rid), entry.ownership.priority)
        return Request(rid, epoch, frontend, params, entry.prompt + entry.output, len(entry.prompt), slot=slot)


class Engine:
    """One life of one engine."""

    def __init__(self, world: World, index: int, incarnation: int, known: list[int]) -> None:
        self.index = index
        self.incarnation = incarnation
        self.known = known  # incarnations of the engines, as this one knows them
        self.frontend = world.incarnation  # of the frontend, as this one knows it
        self.memory: list[list[int]] = [[GARBAGE] * SIZE for _ in range(world.pool + 1)]
        self.copies: list[Copy] = []
        self.reports = 0  # of moves
        self.flying: RequestState | None = None
        self.scheduler = Scheduler(
            BlockManager(world.pool + 1, SIZE, world.prefix_caching),
            max_num_seqs=2,
            max_batch_tokens=world.batch_tokens,
            max_model_len=100,
            eos_token_ids=(),
        )
        self.llumlet = world.llumlet_class(self.scheduler, world.journals)

    @property
    def life(self) -> EngineIncarnation:
        return EngineIncarnation(self.index, self.incarnation)

    def launch(self, plan: StepPlan) -> RequestState:
        lines = [Line(r, r.request.tokens[: r.start + r.count], r.request.block_table) for r in plan.rows]
        return RequestState(plan, lines)

    def execute(self, flight: RequestState) -> StepResult:
        drawn = []
        for line in flight.lines:
            for i in range(line.row.start, line.end):
                before = self._read(line, i)
                here = GARBAGE if before == GARBAGE else name("kv", before, line.tokens[i])
                self.memory[line.table[i // SIZE]][i % SIZE] = here
            if line.row.sample:
                cell = self._read(line, line.end)
                drawn.append(GARBAGE if cell == GARBAGE else name("token", self.index, self.incarnation, cell))
        self._feed(flight, drawn)
        return StepResult(drawn)

    def _feed(self, flight: RequestState, drawn: list[int]) -> None:
        """Give the tokens to the next step, where that is launched."""
        tokens = zip((line.row.request for line in flight.lines if line.row.sample), drawn, strict=True)
        given = [(request, token) for request, token in tokens]
        for line in self.flying.lines if self.flying else []:
            if len(line.tokens) < line.end:
                line.tokens.append(next(token for request, token in given if request is line.row.request))

    def _read(self, line: Line, count: int) -> int:
        """Attend to the first `count` positions: the cell of the last, or garbage if any of them is not sound."""
        cell = name("begin")
        for i in range(count):
            cell = name("kv", cell, line.tokens[i])
            if self.memory[line.table[i // SIZE]][i % SIZE] != cell:
                return GARBAGE
        return cell

    def sweep(self) -> None:
        """What is free and cached under no name may hold anything: let it be garbage."""
        blocks = self.scheduler.blocks
        for block in blocks._free:
            if blocks._names[block] is None:
                self.memory[block] = [GARBAGE] * SIZE


class Budget(NamedTuple):
    """How often each thing may happen that nobody needs to happen."""

    moves: int = 0
    crashes: int = 0
    suspicions: int = 0
    cancels: int = 0
    preemptions: int = 0
    restarts: int = 0  # of the frontend, whose journal survives
    losses: int = 0  # of the frontend and its journal
    failures: int = 0  # of a copy
    changes: int = 0  # of a priority


Action = tuple[Any, ...]
# What the world does by itself. A request must be able to end by these alone: no fault may be needed as a rescue.
PROGRESS = frozenset({"step", "read", "copy", "notice", "dispatch", "patience"})


class World:
    """All processes of the box. Subclasses plant faults."""

    llumlet_class: type[Llumlet] = Llumlet
    verdicts: Any = ownership

    def __init__(
        self,
        budget: Budget,
        *,
        engines: int = 2,
        requests: Sequence[tuple[list[int], int]] = (([1, 2, 3], 3),),
        homes: Sequence[int] = (0,),
        pool: int = 5,
        batch_tokens: int = 8,
        prefix_caching: bool = True,
        how: str = "live",
        overlap: bool = False,
    ) -> None:
        """`requests`: (prompt, max_tokens) each; `homes`: the engines they start on; `pool`: blocks of an engine;
        `overlap`: a step is launched before the one before it is folded."""
        self.overlap = overlap
        self.prefix_caching = prefix_caching
        self.how = how  # requests move
        self.said = ""  # what was read last
        self.budget = budget
        self.pool = pool
        self.batch_tokens = batch_tokens
        self.incarnation = 1  # of the frontend
        self.lossy = False  # the frontend has died: output may be missing
        self.entries = {rid: Entry(rid, *request) for rid, request in enumerate(requests, 1)}
        self.journals = self.make_journals()
        self.known = [1] * engines  # the engines' incarnations, as the frontend knows them
        self.engines = [Engine(self, i, 1, [1] * engines) for i in range(engines)]
        ends = [F, *range(engines)]
        self.rings: dict[tuple[int, int], list[Record]] = {(a, b): [] for a in ends for b in ends if a != b}
        self.notices: list[tuple[int, EngineIncarnation]] = []  # deaths that the observer has not handled yet
        for rid, home in enumerate(homes, 1):
            self.dispatch(rid, home)

    def make_journals(self) -> Journals:
        return Journals(self.entries)

    # -- what can happen -------------------------------------------------------------------------

    def actions(self) -> Iterator[Action]:
        for (a, b), ring in self.rings.items():
            if ring:
                yield "read", a, b, 0
                if b == F and (other := _other_lane(ring)):
                    yield "read", a, b, other
        for engine in self.engines:
            yield from self._engine_actions(engine)
        for observer, dead in self.notices:
            if self.may_notice(observer, dead):
                yield "notice", observer, dead
        for rid, entry in self.entries.items():
            if entry.open:
                yield from self._request_actions(rid, entry)
        if self.budget.restarts:
            yield ("restart",)
            for (a, b), ring in self.rings.items():
                if b == F and ring and not isinstance(ring[0].message, Rows):
                    yield "restart", a  # in the middle of handling that record
        if self.budget.losses:
            yield ("lose",)

    def _engine_actions(self, engine: Engine) -> Iterator[Action]:
        x, scheduler = engine.index, engine.scheduler
        if scheduler.running or scheduler.waiting or engine.flying:
            yield "step", x
        for i in range(len(engine.copies)):
            yield "copy", x, i
            if self.budget.failures:
                yield "fail", x, i
        if any(o.stage is Stage.HANDED for o in engine.llumlet.outgoing.values()):
            yield "patience", x
        if self.budget.crashes:
            yield "crash", x
        for rid in sorted(scheduler.running):
            if self.budget.preemptions:
                yield "preempt", x, rid
        if self.budget.moves:
            for request in (*scheduler.running.values(), *scheduler.waiting):
                if not any(o.request is request for o in engine.llumlet.outgoing.values()):
                    yield from (("move", x, y, request.rid) for y in range(len(self.engines)) if y != x)

    def _request_actions(self, rid: int, entry: Entry) -> Iterator[Action]:
        if entry.ownership.owner is None:
            for x in range(len(self.engines)):
                yield "dispatch", rid, x
        elif self.budget.suspicions:
            yield "suspect", rid
        if self.budget.cancels:
            yield "cancel", rid
        if self.budget.changes:
            yield "prioritise", rid

    def may_notice(self, observer: int, dead: EngineIncarnation) -> bool:
        """A death counts once all that the dead had written is taken."""
        return all(record.sender != dead.incarnation for record in self.rings[dead.engine, observer])

    def apply(self, action: Action) -> None:
        """Do it. Raises Violation, or whatever the objects raise, if that cannot be."""
        getattr(self, action[0])(*action[1:])
        self.check()

    # -- engines ---------------------------------------------------------------------------------

    def step(self, x: int) -> None:
        engine = self.engines[x]
        plan = engine.scheduler.plan(0.0)
        launched = engine.launch(plan) if plan else None
        ended = launched
        if self.overlap:
            ended, engine.flying = engine.flying, launched
        if ended is None:
            self._do(engine, engine.llumlet.tick(0.0))
            return
        emissions = engine.scheduler.apply_result(ended.plan, engine.execute(ended), 0.0)
        self._emit(engine, emissions)
        self._do(engine, engine.llumlet.after_step(emissions, 0.0))

    def _emit(self, engine: Engine, emissions: list[Emission]) -> None:
        rows = [(e.request.rid, e.request.epoch, e.start, tuple(e.tokens), e.finish) for e in emissions]
        if rows:
            self._put(engine.index, F, engine.incarnation, engine.frontend, Rows(tuple(rows)))

    def patience(self, x: int) -> None:
        self._do(self.engines[x], self.engines[x].llumlet.tick(1000.0))

    def preempt(self, x: int, rid: int) -> None:
        self._spend("preemptions")
        scheduler = self.engines[x].scheduler
        scheduler.preempt(scheduler.running[rid], 0.0)

    def move(self, x: int, y: int, rid: int) -> None:
        self._spend("moves")
        engine = self.engines[x]
        peer = EngineIncarnation(y, engine.known[y])
        self._do(engine, engine.llumlet.migrate_to(peer, MigrateTo(y, 1.0, rid, how=self.how), 0.0))

    def copy(self, x: int, i: int) -> None:
        engine = self.engines[x]
        copy = engine.copies.pop(i)
        there = self.engines[copy.peer.engine]
        if there.life == copy.peer:
            for source, destination in copy.pairs:
                there.memory[destination] = list(engine.memory[source])
        self._do(engine, engine.llumlet.copied(copy.move, 0.0))

    def fail(self, x: int, i: int) -> None:
        """The copy ends having written half of it, and rubbish."""
        self._spend("failures")
        engine = self.engines[x]
        copy = engine.copies.pop(i)
        there = self.engines[copy.peer.engine]
        if there.life == copy.peer:
            for _, destination in copy.pairs:
                there.memory[destination] = [GARBAGE] * SIZE
        self._do(engine, engine.llumlet.copy_failed(copy.move, 0.0))

    def crash(self, x: int) -> None:
        """The engine dies; its successor lives at once, with a fresh pool. The others have to find out."""
        self._spend("crashes")
        dead = self.engines[x].life
        reborn = Engine(self, x, dead.incarnation + 1, [e.incarnation for e in self.engines])
        self.engines[x] = reborn
        reborn.known[x] = reborn.incarnation
        self.notices = [n for n in self.notices if n[0] != x]
        for (_, b), ring in self.rings.items():
            if b == x:
                ring.clear()
        self.notices += [(observer, dead) for observer in (F, *range(len(self.engines))) if observer != x]

    def _do(self, engine: Engine, actions: list[Any]) -> None:
        for action in actions:
            match action:
                case Send(peer, message):
                    self._put(engine.index, peer.engine, engine.incarnation, peer.incarnation, message)
                case Tell(_, message):
                    self._put(engine.index, F, engine.incarnation, engine.frontend, message)
                case Copy():
                    engine.copies.append(action)
                case Report():
                    engine.reports += action.result is not MigrationResult.HANDED_BACK

    def _put(self, a: int, b: int, sender: int, receiver: int, message: Any) -> None:
        """What is meant for a life that is over would be dropped by its successor: drop it here."""
        if receiver == (self.incarnation if b == F else self.engines[b].incarnation):
            self.rings[a, b].append(Record(sender, receiver, message))

    # -- rings -----------------------------------------------------------------------------------

    def read(self, a: int, b: int, i: int) -> None:
        """Take the i-th record: from an engine to the frontend, rows and notes may overtake one another."""
        record = self.rings[a, b].pop(i)
        self.said = type(record.message).__name__
        if b == F:
            self._judge(EngineIncarnation(a, record.sender), record.message)
        elif a == F:
            self._obey(self.engines[b], record)
        else:
            engine = self.engines[b]
            self._do(engine, engine.llumlet.on_peer(EngineIncarnation(a, record.sender), record.message, 0.0))

    def _obey(self, engine: Engine, record: Record) -> None:
        llumlet = engine.llumlet
        engine.frontend = record.sender
        match record.message:
            case Start(rid, epoch, slot, _):
                request = self.journals.load(0, slot, rid, epoch)
                self._do(engine, llumlet.on_start(request, 0.0) if request else [])
            case Cancel(rid, epoch) | Release(rid, epoch):
                cancelled = isinstance(record.message, Cancel)
                self._do(engine, llumlet.on_release(rid, epoch, 0.0, cancelled=cancelled))
            case Grant(rid, epoch, new_epoch):
                self.said = f"Grant {new_epoch}"
                self._do(engine, llumlet.on_grant(rid, epoch, new_epoch, 0.0))
            case Reprioritise(rid, epoch, priority):
                llumlet.on_reprioritise(rid, epoch, priority)
            case OwnedRequests(rids, epochs):
                self._do(engine, llumlet.on_owned_requests(0, dict(zip(rids, epochs, strict=True)), 0.0))

    def notice(self, observer: int, dead: EngineIncarnation) -> None:
        self.notices.remove((observer, dead))
        alive = self.engines[dead.engine].incarnation
        if observer == F:
            self.known[dead.engine] = alive
            for entry in self.entries.values():
                if entry.open:
                    self._act(entry, self.verdicts.engine_died(entry.ownership, EngineIncarnation(*dead)))
        else:
            engine = self.engines[observer]
            engine.known[dead.engine] = alive
            self._do(engine, engine.llumlet.peer_died(dead, 0.0))

    # -- the frontend ----------------------------------------------------------------------------

    def _judge(self, sender: EngineIncarnation, message: Any) -> None:
        if isinstance(message, Rows):
            for row in message.rows:
                self._accept(*row)
            return
        entry = self.entries[message.rid]
        if not entry.open:
            if not isinstance(message, HandBack):
                self._command(self.verdicts.stale(message.rid, message.epoch, sender))
            return
        match message:
            case Takeover():
                self._act(entry, self.verdicts.takeover(entry.ownership, sender, message))
            case Reclaim():
                self._act(entry, self.verdicts.reclaim(entry.ownership, sender, message))
            case HandBack():
                self._act(entry, self.verdicts.hand_back(entry.ownership, sender, message))

    def _accept(self, rid: int, epoch: int, start: int, tokens: tuple[int, ...], finish: Finish) -> None:
        entry = self.entries[rid]
        if not entry.open or entry.ownership.epoch != epoch:
            return
        known = self.verdicts.fresh(entry.ownership.accepted, start, len(tokens))
        if known is None:
            if entry.ownership.owner is not None:
                self._act(entry, self.verdicts.disown(entry.ownership)._replace(fault=True))
            return
        self._append(entry, list(tokens[known:]))
        entry.ownership = entry.ownership._replace(accepted=len(entry.output))
        if finish:
            entry.open = False

    def _append(self, entry: Entry, tokens: list[int]) -> None:
        for token in tokens:
            context = cell_of(entry.prompt + entry.output)
            if _facts[token][0] != "token" or _facts[token][3] != context:
                raise Violation(f"incoherent: a token drawn from {_facts[token]}, the client has {context}")
            entry.output.append(token)

    def _act(self, entry: Entry, decision: Decision, *, send: bool = True) -> None:
        if decision.fault and not self.lossy:
            raise Violation("incoherent: output is missing")
        if decision.output:
            self._append(entry, decision.output.tokens)
        entry.ownership = decision.ownership
        if send:
            for order in decision.orders:
                self._command(order)

    def _command(self, order: ownership.Order) -> None:
        """To the very life that the order names, which may be newer than the one the frontend knows of."""
        self._put(F, order.to.engine, self.incarnation, order.to.incarnation, order.message)

    def dispatch(self, rid: int, x: int) -> None:
        entry = self.entries[rid]
        owner = EngineIncarnation(x, self.known[x])
        entry.ownership = self.verdicts.started(entry.ownership, owner)
        start = Start(rid, entry.ownership.epoch, rid, len(entry.prompt))
        self._put(F, x, self.incarnation, owner.incarnation, start)

    def suspect(self, rid: int) -> None:
        self._spend("suspicions")
        self._act(self.entries[rid], self.verdicts.disown(self.entries[rid].ownership))

    def prioritise(self, rid: int) -> None:
        """An operator makes the request urgent, or normal again."""
        self._spend("changes")
        entry = self.entries[rid]
        self._act(entry, self.verdicts.reprioritise(entry.ownership, -1 - entry.ownership.priority))

    def cancel(self, rid: int) -> None:
        self._spend("cancels")
        for order in self.verdicts.cancel(self.entries[rid].ownership):
            self._command(order)
        self.entries[rid].open = False

    def restart(self, reading: int | None = None) -> None:
        """The frontend dies, perhaps having journaled a verdict that nobody hears of; its successor goes on from
        the journal."""
        self._spend("restarts")
        if reading is not None:
            record = self.rings[reading, F][0]
            entry, sender = self.entries[record.message.rid], EngineIncarnation(reading, record.sender)
            judge = {Takeover: "takeover", Reclaim: "reclaim", HandBack: "hand_back"}[type(record.message)]
            if entry.open:
                decision = getattr(self.verdicts, judge)(entry.ownership, sender, record.message)
                self._act(entry, decision, send=False)
        self._replace_frontend()
        for entry in self.entries.values():
            ownership = entry.ownership
            if entry.open and ownership.owner and self.known[ownership.owner.engine] != ownership.owner.incarnation:
                self._act(entry, self.verdicts.engine_died(ownership, ownership.owner))
        self.state_ownership()

    def lose(self) -> None:
        """The frontend dies and its journal is void."""
        self._spend("losses")
        for entry in self.entries.values():
            entry.open = False
        self._replace_frontend()
        self.state_ownership()

    def _replace_frontend(self) -> None:
        self.lossy = True
        self.incarnation += 1
        self.known = [e.incarnation for e in self.engines]
        self.notices = [n for n in self.notices if n[0] != F]
        for (_, b), ring in self.rings.items():
            if b == F:
                ring.clear()

    def state_ownership(self) -> None:
        """Tell each engine all that it owns."""
        for engine in self.engines:
            owned = [
                e.ownership
                for e in self.entries.values()
                if e.open and e.ownership.owner == EngineIncarnation(*engine.life)
            ]
            message = OwnedRequests([c.rid for c in owned], [c.epoch for c in owned])
            self._put(F, engine.index, self.incarnation, engine.incarnation, message)

    def _spend(self, what: str) -> None:
        self.budget = self.budget._replace(**{what: getattr(self.budget, what) - 1})

    # -- what must hold ----------------------------------------------------------------------------

    def check(self) -> None:
        """Everything that must hold in every state. Raises Violation or PoolError."""
        for engine in self.engines:
            engine.sweep()
            engine.scheduler.check(engine.llumlet.tables())
            self._check_slots(engine)
            self._check_reports(engine)
            for copy in engine.copies:
                self._check_copy(engine, copy)
        for rid, entry in self.entries.items():
            self._check_owner(rid, entry)
            self._check_priority(entry.ownership)

    def _check_slots(self, engine: Engine) -> None:
        held = len(engine.llumlet.frozen) + len(engine.llumlet.incoming)
        if engine.scheduler.held_slots != held:
            raise Violation(f"leaked: {engine.scheduler.held_slots} places are kept, for {held} requests")

    def _check_reports(self, engine: Engine) -> None:
        """Every move is reported when it is over, and once."""
        over = engine.llumlet._moves - len(engine.llumlet.outgoing)
        if engine.reports != over:
            raise Violation(f"unreported: {over} moves are over, {engine.reports} were reported")

    def _check_copy(self, engine: Engine, copy: Copy) -> None:
        there = self.engines[copy.peer.engine]
        if there.life != copy.peer:
            return
        incoming = there.llumlet.incoming.get((engine.life, copy.move))
        for _, block in copy.pairs:
            if incoming is None or incoming.request is not None or block not in incoming.table:
                raise Violation(f"free and writable: block {block} of engine {there.index}")

    def _check_owner(self, rid: int, entry: Entry) -> None:
        running = [r for e in self.engines if (r := e.scheduler.get(rid)) is not None]
        epochs = [r.epoch for r in running]
        if len(set(epochs)) < len(epochs) or max(epochs, default=0) > entry.ownership.epoch:
            raise Violation(f"two owners: running at epochs {epochs}, journaled {entry.ownership.epoch}")

    def _check_priority(self, ownership: Ownership) -> None:
        """Once its owner has read everything, it runs (or waits, or is frozen) there in the class journaled."""
        if ownership.owner is None or self.rings[F, ownership.owner.engine]:
            return
        engine = self.engines[ownership.owner.engine]
        if engine.incarnation != ownership.owner.incarnation:
            return
        here = engine.scheduler.get(ownership.rid)
        for request in (*engine.llumlet.frozen, *([here] if here else [])):
            held = (request.rid, request.epoch) == (ownership.rid, ownership.epoch)
            if held and request.params.priority != ownership.priority:
                raise Violation(f"priority: {request.params.priority} where {ownership.priority} is journaled")

    def finished(self) -> bool:
        """Every request has ended, and nothing is left of any."""
        if any(e.open for e in self.entries.values()) or any(self.rings.values()) or self.notices:
            return False
        return not any(
            e.scheduler.running or e.scheduler.waiting or e.flying or e.copies
            or e.llumlet.outgoing or e.llumlet.incoming or e.scheduler.blocks.num_used or e.scheduler.held_slots
            for e in self.engines
        )  # fmt: skip

    # -- identity --------------------------------------------------------------------------------

    def save(self) -> bytes:
        return pickle.dumps(self, pickle.HIGHEST_PROTOCOL)

    def key(self) -> tuple[Any, ...]:
        """Equal for states that differ in nothing but the numbers of their blocks."""
        orders = [_block_order(engine) for engine in self.engines]
        lives = [engine.life for engine in self.engines]

        def block(peer: EngineIncarnation, number: int) -> int:
            return orders[peer.engine][number] if peer in lives else number

        def say(a: int, record: Record) -> Any:
            message = record.message
            if isinstance(message, Reserved):
                there = EngineIncarnation(a, record.sender)
                message = msgspec.structs.replace(message, blocks=[block(there, b) for b in message.blocks])
            return record.sender, type(message).__name__, _freeze(message)

        return (
            self.incarnation,
            self.lossy,
            self.budget,
            tuple(self.known),
            tuple((e.open, e.ownership, tuple(e.output)) for e in self.entries.values()),
            tuple(sorted(self.notices)),
            tuple(tuple(say(a, r) for r in ring) for (a, _), ring in self.rings.items()),
            tuple(_engine_key(e, orders[e.index], block) for e in self.engines),
        )


def _other_lane(ring: list[Record]) -> int:
    """The first record of the other kind than the first, rows or a note; 0 if there is none."""
    kind = isinstance(ring[0].message, Rows)
    return next((i for i, r in enumerate(ring) if isinstance(r.message, Rows) != kind), 0)


def _block_order(engine: Engine) -> dict[int, int]:
    """Block numbers by first appearance: tables in order, then the free list in its order."""
    order: dict[int, int] = {0: 0}
    tables = [r.block_table for r in engine.scheduler.running.values()] + engine.llumlet.tables()
    for table in (*tables, engine.scheduler.blocks._free):
        for block in table:
            order.setdefault(block, len(order))
    return order


def _engine_key(engine: Engine, order: dict[int, int], block: Any) -> tuple[Any, ...]:
    scheduler, llumlet, blocks = engine.scheduler, engine.llumlet, engine.scheduler.blocks
    memory = tuple((blocks._names[b], tuple(engine.memory[b])) for b in order if b)
    outgoing = tuple(
        (
            o.move, o.peer, _request_key(o.request, order), o.request in llumlet.frozen, llumlet._intact(o), o.first,
            o.stage.value, o.round, tuple(block(o.peer, b) for b in o.table), o.sent, o.copying, _freeze(o.records),
        )
        for o in llumlet.outgoing.values()
    )  # fmt: skip
    incoming = tuple(
        (i.peer, _freeze(i.reserve), tuple(order[b] for b in i.table), i.request and _request_key(i.request, order))
        for i in llumlet.incoming.values()
    )
    copies = tuple((c.move, c.peer, tuple((order[a], block(c.peer, b)) for a, b in c.pairs)) for c in engine.copies)
    return (
        engine.incarnation, engine.frontend, tuple(engine.known), memory, copies, scheduler.held_slots,
        len(blocks._free), tuple(_request_key(r, order) for r in scheduler.running.values()),
        tuple(_request_key(r, order) for r in scheduler.waiting), llumlet._moves, outgoing, incoming,
        tuple(_line_key(line, scheduler, order) for line in (engine.flying.lines if engine.flying else ())),
        tuple(sorted(order[b] for b in scheduler._unsettled)),
    )  # fmt: skip


def _line_key(line: Line, scheduler: Scheduler, order: dict[int, int]) -> tuple[Any, ...]:
    row = line.row
    counts = scheduler.running.get(row.request.rid) is row.request and row.request.preemptions == row.preemptions
    table = tuple(order[b] for b in line.table)
    return row.request.rid, row.request.epoch, row.start, row.count, row.sample, counts, tuple(line.tokens), table


def _request_key(request: Request, order: dict[int, int]) -> tuple[Any, ...]:
    table = tuple(order[b] for b in request.block_table)
    output = tuple(request.tokens[request.prompt_len :])
    going = (request.num_computed, request.num_inflight_tokens, request.num_sampling, request.held)
    return request.rid, request.epoch, request.params.priority, output, table, going


def _freeze(value: Any) -> Any:
    """Something hashable of a message."""
    if isinstance(value, Struct):
        return tuple(_freeze(getattr(value, f)) for f in value.__struct_fields__)
    if isinstance(value, list | tuple):
        return tuple(_freeze(v) for v in value)
    return value
