"""A llumlet over its scheduler, without a worker: the tests pass messages between two of them by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from daemon.engine.migration.actions import Action, Copy, Report, Send, Tell
from daemon.engine.migration.llumlet import Llumlet
from daemon.engine.request import Request
from daemon.engine.runner import StepResult
from daemon.engine.scheduler import Scheduler
from daemon.ipc.messages import (
    Aborted,
    Declined,
    EngineIncarnation,
    MigrateTo,
    OwnedRequests,
    Reclaim,
    RequestParams,
    SamplingParams,
    Takeover,
    TokenLogprobs,
)
from daemon.kvpool.block_manager import BlockManager

SIZE = 4  # tokens in a block
SOURCE, DESTINATION, THIRD = EngineIncarnation(0, 1), EngineIncarnation(1, 1), EngineIncarnation(2, 1)
SEND_ABORTED = Send(DESTINATION, Aborted(move=1, rid=1, epoch=1))
EVENTS = (
    *("migrate_to", "copied", "copy_failed", "after_step", "tick", "on_peer", "on_peer_death"),
    *("on_start", "on_grant", "on_release", "on_owned_requests"),
)


def tell_reclaim(start: int) -> Tell:
    """Return the Reclaim of request 1 at epoch 1 if the journal holds all output before `start`."""
    return Tell(0, Reclaim(rid=1, epoch=1, start=start, tokens=[], logprobs=None))


def declined(reason: str = "full") -> Declined:
    """Return the destination's refusal of move 1."""
    return Declined(move=1, rid=1, epoch=1, reason=reason)


class Journal:
    """The output that the frontend has accepted, by journal slot."""

    def __init__(self) -> None:
        self.slots: dict[int, Request] = {}
        self.num_missing = 0  # emitted tokens that the frontend has not journaled yet
        self.scored = True  # the frontend has journaled the logprobs of the prompts

    def accepted(self, request: Request) -> int:
        return self.slots[request.slot].num_output - self.num_missing

    def is_scored(self, request: Request) -> bool:
        return self.scored

    def load(self, frontend: int, slot: int, rid: int, epoch: int) -> Request | None:
        found = self.slots.get(slot)
        if found is None or (found.rid, found.epoch, found.frontend) != (rid, epoch, frontend):
            return None
        tokens = found.tokens[: len(found.tokens) - self.num_missing]
        return Request(rid, epoch, frontend, found.params, tokens, found.prompt_len)

    def make_request(
        self, rid: int = 1, prompt: int = 9, *, priority: int = 0, epoch: int = 1, **sampling: Any
    ) -> Request:
        """Journal a request with a prompt of `prompt` tokens in slot `rid`."""
        params = RequestParams(SamplingParams(**{"max_tokens": 50, "seed": 0} | sampling), float(rid), priority)
        request = Request(rid, epoch, 0, params, [1000 + rid] * prompt, prompt, slot=rid)
        self.slots[rid] = request
        return request


class RecordingLlumlet(Llumlet):
    """Keeps its reports in `reports`; its methods return only the other actions."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.reports: list[Report] = []

    def _without_reports(self, actions: list[Action]) -> list[Action]:
        self.reports += [a for a in actions if isinstance(a, Report)]
        return [a for a in actions if not isinstance(a, Report)]


def _recording(method: Callable) -> Callable:
    return lambda self, *args, **options: self._without_reports(method(self, *args, **options))


for _event in EVENTS:
    setattr(RecordingLlumlet, _event, _recording(getattr(Llumlet, _event)))


class Engine:
    """A llumlet over its scheduler, and the steps that the worker would run."""

    def __init__(self, journal: Journal, blocks: int = 40, seqs: int = 4, tokens: int = 64, **options: Any) -> None:
        self.scheduler = Scheduler(
            BlockManager(blocks + 1, SIZE),
            max_num_seqs=seqs,
            max_batch_tokens=tokens,
            max_model_len=1000,
            eos_token_ids=(),
        )
        self.llumlet = RecordingLlumlet(self.scheduler, journal, **options)
        self.blocks = self.scheduler.blocks

    def step(self, now: float = 0.0, seconds: float = 0.0, token: int = 7) -> list:
        """Run a step that samples `token` for each row; return what the llumlet does after it.

        `seconds`: duration of a step, as the llumlet sees it.
        """
        plan = self.scheduler.plan(now)
        emissions = []
        if plan is not None:
            sampled = [row for row in plan.rows if row.sample]
            logprobs = [TokenLogprobs(-float(r.request.num_output), [], []) for r in sampled]
            emissions = self.scheduler.apply_result(plan, StepResult([token] * len(sampled), logprobs), now)
        actions = self.llumlet.after_step(emissions, now, seconds)
        self.check()
        return actions

    def check(self) -> None:
        """Check the scheduler's invariants, and that each reserved place belongs to a request of the llumlet."""
        self.scheduler.check(self.llumlet.tables())
        assert self.scheduler.num_reserved_places == len(self.llumlet.frozen) + len(self.llumlet.incoming)

    def run(self, request: Request, steps: int = 1) -> Request:
        """Start the request and run `steps` steps."""
        self.llumlet.on_start(request, 0.0)
        for _ in range(steps):
            self.step()
        return request

    def move(self, peer: EngineIncarnation = DESTINATION, rid: int = 0, now: float = 0.0, **order: Any) -> list:
        """Give the llumlet an order with a lease until 10.0."""
        return self.llumlet.migrate_to(peer, MigrateTo(peer.engine, 10.0, rid, **order), now)

    @property
    def is_empty(self) -> bool:
        """True if no block, no reserved place and no running request is left."""
        return not self.blocks.num_used and not self.scheduler.num_reserved_places and not self.scheduler.running


def only(actions: list) -> Any:
    """Return the only action."""
    (action,) = actions
    return action


def relay(actions: list, sender: EngineIncarnation, to: Engine) -> list:
    """Pass the messages of one engine to the other; return what the other one does."""
    return [a for action in actions for a in to.llumlet.on_peer(sender, action.message, 0.0)]


def move_until_copying(source: Engine, destination: Engine) -> Copy:
    """Begin a move, and return its first copy."""
    return only(relay(relay(source.move(), SOURCE, destination), DESTINATION, source))


def move_until_takeover(source: Engine, destination: Engine) -> Takeover:
    """Begin a move, and return the Takeover that the destination sends to the frontend."""
    for copy in relay(relay(source.move(), SOURCE, destination), DESTINATION, source):
        assert source.llumlet.copied(copy.move, 0.0) == []
    tail = only(source.step())
    handover = source.llumlet.copied(tail.move, 0.0) if isinstance(tail, Copy) else [tail]
    sent = only(relay(handover, SOURCE, destination))
    assert isinstance(sent, Tell) and isinstance(sent.message, Takeover)
    return sent.message


def owned(epochs: dict[int, int], *, accepted: int = 0, priority: int = 0, first: int = 0) -> OwnedRequests:
    """Return the statement that an engine owns these requests (rid: epoch), and no other from id `first` on."""
    n = len(epochs)
    return OwnedRequests(list(epochs), list(epochs.values()), n * [accepted], n * [priority], first)
