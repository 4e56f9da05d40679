"""The model of an engine: the real scheduler, block manager and llumlet, with modelled KV, copies and journals.

KV is modelled: the cell of a position is a number for the weights, the request's salt and all tokens up to it. It is
computed from the cells that the engine *reads*. A token stands for the engine incarnation that drew it and the cells
that it was drawn from. So an engine that reads KV that is lost, stale, overwritten or of another salt draws a token
that does not follow from the client's text.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from daemon.control.policy.ownership import Ownership
from daemon.engine.migration.actions import Copy
from daemon.engine.request import Request
from daemon.engine.runner import Row, StepPlan, StepResult
from daemon.engine.scheduler import Scheduler
from daemon.ipc.messages import EngineIncarnation, Finish, RequestParams, SamplingParams
from daemon.kvpool.block_manager import BlockManager

if TYPE_CHECKING:
    from tests.protocol.world import World

BLOCK_SIZE = 2  # tokens in a block
FRONTEND = -1  # the index of the frontend among the engines
GARBAGE = 0

_ids: dict[tuple[Any, ...], int] = {}
_facts: list[tuple[Any, ...]] = [("garbage",)]


def fact_id(*fact: Any) -> int:
    """Return a small number for a fact, the same for equal facts; 0 is garbage."""
    number = _ids.get(fact)
    if number is None:
        number = _ids[fact] = len(_facts)
        _facts.append(fact)
    return number


def fact_of(number: int) -> tuple[Any, ...]:
    """Return the fact with that number."""
    return _facts[number]


def cell_of(tokens: list[int], salt: bytes, weights: int = 1) -> int:
    """Return the cell of the last of `tokens`, as a correct engine computes it for a request with this salt."""
    cell = fact_id("begin", salt, weights)
    for token in tokens:
        cell = fact_id("kv", cell, token)
    return cell


class Violation(Exception):
    """An invariant does not hold."""


class StepRows(NamedTuple):
    """The output of a step: (rid, epoch, start, tokens, finish) for each request."""

    rows: tuple[tuple[int, int, int, tuple[int, ...], Finish], ...]


class ActiveRow(NamedTuple):
    """A row of a step in flight. The last token may be missing until the previous step has drawn it."""

    row: Row
    tokens: list[int]
    table: list[int]

    @property
    def end(self) -> int:
        return self.row.start + self.row.count


class StepInFlight(NamedTuple):
    """A launched step. It reads and writes the memory as late as possible: just before the next step does."""

    plan: StepPlan
    rows: list[ActiveRow]


class Record(NamedTuple):
    """A message in a ring."""

    sender: int  # incarnation
    receiver: int  # incarnation
    message: Any


class Entry:
    """One request at the frontend, and its journal slot."""

    def __init__(self, rid: int, prompt: list[int], max_tokens: int, salt: bytes = b"") -> None:
        self.prompt = prompt
        self.max_tokens = max_tokens
        self.salt = salt
        self.ownership = Ownership(rid, 0, None, 0)
        self.owner: EngineIncarnation | None = None  # as journaled: the last one, also if it has lost the request
        self.output: list[int] = []
        self.weights = 0  # of the owner, as journaled
        self.begun: int | None = None  # the weights that the client's first token came from
        self.open = True

    @property
    def bound(self) -> int:
        return self.weights if self.output else 0


class Journals:
    """The frontend's journal as engines read it. The slot of a request is its id here."""

    def __init__(self, entries: dict[int, Entry]) -> None:
        self.entries = entries

    def is_scored(self, request: Request) -> bool:
        return True  # no request asks for the logprobs of its prompt

    def accepted(self, request: Request) -> int:
        entry = self.entries[request.slot]
        return len(entry.output) if entry.open else -1

    def salt_of(self, entry: Entry) -> bytes:
        return entry.salt

    def load(self, frontend: int, slot: int, rid: int, epoch: int) -> Request | None:
        entry = self.entries[slot]
        if not entry.open or entry.ownership.epoch != epoch:
            return None
        sampling, priority = SamplingParams(entry.max_tokens, 0), entry.ownership.priority
        params = RequestParams(sampling, float(rid), priority, self.salt_of(entry))
        return Request(rid, epoch, frontend, params, entry.prompt + entry.output, len(entry.prompt), slot=slot)


class Engine:
    """One incarnation of one engine."""

    def __init__(self, world: World, index: int, incarnation: int, known: list[int], frontend: int) -> None:
        """`frontend`: incarnation of the frontend, as this engine knows it; 0: no message has named it yet."""
        self.index = index
        self.incarnation = incarnation
        self.weights = world.weights_of(incarnation)
        self.known = known  # incarnations of the engines, as this engine knows them
        self.frontend = frontend
        self.memory: list[list[int]] = [[GARBAGE] * BLOCK_SIZE for _ in range(world.pool + 1)]
        self.copies: list[Copy] = []
        self.entries = world.entries
        self.reports = 0  # number of moves reported
        self.step_in_flight: StepInFlight | None = None
        self.scheduler = Scheduler(
            BlockManager(world.pool + 1, BLOCK_SIZE, world.prefix_caching, fingerprint=self.weights),
            max_num_seqs=2,
            max_batch_tokens=world.batch_tokens,
            max_model_len=100,
            eos_token_ids=(),
        )
        self.llumlet = world.make_llumlet(self.scheduler, self.weights)

    @property
    def identity(self) -> EngineIncarnation:
        return EngineIncarnation(self.index, self.incarnation)

    def launch(self, plan: StepPlan) -> StepInFlight:
        rows = [ActiveRow(r, r.request.tokens[: r.start + r.count], r.request.block_table) for r in plan.rows]
        return StepInFlight(plan, rows)

    def execute(self, step: StepInFlight) -> StepResult:
        drawn = []
        for active in step.rows:
            for i in range(active.row.start, active.end):
                before = self._read(active, i)
                here = GARBAGE if before == GARBAGE else fact_id("kv", before, active.tokens[i])
                self.memory[active.table[i // BLOCK_SIZE]][i % BLOCK_SIZE] = here
            if active.row.sample:
                cell = self._read(active, active.end)
                drawn.append(GARBAGE if cell == GARBAGE else fact_id("token", self.index, self.incarnation, cell))
        self._feed(step, drawn)
        return StepResult(drawn)

    def _feed(self, step: StepInFlight, drawn: list[int]) -> None:
        """Give the drawn tokens to the next step if it is launched already."""
        sampled = (active.row.request for active in step.rows if active.row.sample)
        given = list(zip(sampled, drawn, strict=True))
        for active in self.step_in_flight.rows if self.step_in_flight else []:
            if len(active.tokens) < active.end:
                active.tokens.append(next(token for request, token in given if request is active.row.request))

    def _read(self, active: ActiveRow, count: int) -> int:
        """Attend to the first `count` positions. Return the cell of the last, or garbage if any cell is wrong."""
        cell = fact_id("begin", self.entries[active.row.request.rid].salt, self.weights)
        for i in range(count):
            cell = fact_id("kv", cell, active.tokens[i])
            if self.memory[active.table[i // BLOCK_SIZE]][i % BLOCK_SIZE] != cell:
                return GARBAGE
        return cell

    def overwrite_free_blocks(self) -> None:
        """Fill the free blocks that are not cached with garbage: their content must not matter."""
        blocks = self.scheduler.blocks
        for block in blocks._free:
            if blocks._hashes[block] is None:
                self.memory[block] = [GARBAGE] * BLOCK_SIZE
