"""One engine's side of a migration, event by event: what it sends, what it keeps, what it frees."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from daemon.engine.migration.llumlet import Action, Copy, Llumlet, Report, Send, Tell
from daemon.engine.request import Request
from daemon.engine.runner import StepResult
from daemon.engine.scheduler import Scheduler
from daemon.enums import MigrationResult
from daemon.ipc.messages import (
    Aborted,
    Declined,
    EngineIncarnation,
    HandBack,
    Handover,
    MigrateTo,
    Reclaim,
    RequestParams,
    Reserve,
    Reserved,
    SamplingParams,
    Takeover,
    TokenLogprobs,
)
from daemon.kvpool.block_manager import BlockManager, block_hashes

SIZE = 4
HERE, THERE, THIRD = EngineIncarnation(0, 1), EngineIncarnation(1, 1), EngineIncarnation(2, 1)


class Journal:
    """What the frontend has accepted, by slot."""

    def __init__(self) -> None:
        self.slots: dict[int, Request] = {}
        self.behind = 0  # tokens that have not arrived yet

    def accepted(self, request: Request) -> int:
        return self.slots[request.slot].num_output - self.behind

    def load(self, frontend: int, slot: int, rid: int, epoch: int) -> Request | None:
        found = self.slots.get(slot)
        if found is None or (found.rid, found.epoch, found.frontend) != (rid, epoch, frontend):
            return None
        tokens = found.tokens[: len(found.tokens) - self.behind]
        return Request(rid, epoch, frontend, found.params, tokens, found.prompt_len)


class Recorded(Llumlet):
    """Keeps its reports apart from what it wants done."""

    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options)
        self.reports: list[Report] = []

    def _part(self, actions: list[Action]) -> list[Action]:
        self.reports += [a for a in actions if isinstance(a, Report)]
        return [a for a in actions if not isinstance(a, Report)]


def _parted(method: Callable) -> Callable:
    return lambda self, *args, **options: self._part(method(self, *args, **options))


for _event in (
    *("migrate_to", "copied", "copy_failed", "after_step", "tick", "on_peer", "peer_died"),
    *("on_start", "on_grant", "on_release", "on_owned_requests"),
):
    setattr(Recorded, _event, _parted(getattr(Llumlet, _event)))


class Engine:
    """A llumlet over its scheduler, and the steps that the worker would make."""

    def __init__(self, journal: Journal, blocks: int = 40, seqs: int = 4, tokens: int = 64, **options) -> None:
        self.scheduler = Scheduler(
            BlockManager(blocks + 1, SIZE),
            max_num_seqs=seqs,
            max_batch_tokens=tokens,
            max_model_len=1000,
            eos_token_ids=(),
        )
        self.llumlet = Recorded(self.scheduler, journal, **options)
        self.blocks = self.scheduler.blocks

    def step(self, now: float = 0.0, seconds: float = 0.0, token: int = 7) -> list:
        plan = self.scheduler.plan(now)
        emissions = []
        if plan is not None:
            drawn = [row for row in plan.rows if row.sample]
            logprobs = [TokenLogprobs(-float(r.request.num_output), [], []) for r in drawn]
            emissions = self.scheduler.apply_result(plan, StepResult([token] * len(drawn), logprobs), now)
        actions = self.llumlet.after_step(emissions, now, seconds)
        self.check()
        return actions

    def check(self) -> None:
        self.scheduler.check(self.llumlet.tables())
        assert self.scheduler.held_slots == len(self.llumlet.frozen) + len(self.llumlet.incoming)

    def run(self, request: Request, steps: int = 1) -> Request:
        self.llumlet.on_start(request, 0.0)
        for _ in range(steps):
            self.step()
        return request

    def move(self, peer: EngineIncarnation = THERE, rid: int = 0, now: float = 0.0, **order) -> list:
        return self.llumlet.migrate_to(peer, MigrateTo(peer.engine, 10.0, rid, **order), now)

    @property
    def empty(self) -> bool:
        return not self.blocks.num_used and not self.scheduler.held_slots and not self.scheduler.running


@pytest.fixture
def journal() -> Journal:
    return Journal()


@pytest.fixture
def source(journal: Journal) -> Engine:
    return Engine(journal)


@pytest.fixture
def there(journal: Journal) -> Engine:
    return Engine(journal)


@pytest.fixture
def make(journal: Journal) -> Callable[..., Request]:
    def make(rid: int = 1, prompt: int = 9, *, priority: int = 0, epoch: int = 1, **sampling) -> Request:
        params = RequestParams(SamplingParams(**{"max_tokens": 50, "seed": 0} | sampling), float(rid), priority)
        request = Request(rid, epoch, 0, params, [1000 + rid] * prompt, prompt, slot=rid)
        journal.slots[rid] = request
        return request

    return make


def only(actions: list):
    (action,) = actions
    return action


def relay(actions: list, sender: EngineIncarnation, to: Engine) -> list:
    """Bring what one engine sends to the other; returns what that one does."""
    return [a for action in actions for a in to.llumlet.on_peer(sender, action.message, 0.0)]


def copying(source: Engine, there: Engine) -> Copy:
    """A move up to its first copy."""
    return only(relay(relay(source.move(), HERE, there), THERE, source))


def handed_over(source: Engine, there: Engine) -> Takeover:
    """A move up to the takeover."""
    for copy in relay(relay(source.move(), HERE, there), THERE, source):
        assert source.llumlet.copied(copy.move, 0.0) == []
    tail = only(source.step())
    handover = source.llumlet.copied(tail.move, 0.0) if isinstance(tail, Copy) else [tail]
    told = only(relay(handover, HERE, there))
    assert isinstance(told, Tell)
    return told.message


# -- a move that goes well ---------------------------------------------------------------------


def test_a_move_from_beginning_to_end(source, there, make):
    request = source.run(make(prompt=9), 2)  # 10 computed, 11 known: two full blocks and a begun one
    asked = only(source.move())
    assert asked == Send(THERE, Reserve(1, 1, 1, 0, 1, 0, 11 + SIZE, 59, block_hashes(request.tokens[:8], SIZE)))
    answer = only(relay([asked], HERE, there))
    assert answer.peer == HERE and isinstance(answer.message, Reserved) and len(answer.message.blocks) == 4
    copy = only(relay([answer], THERE, source))
    assert copy == Copy(THERE, 1, list(zip(request.block_table[:2], answer.message.blocks[:2], strict=True)))
    assert source.step() == [] and request.num_output == 3  # it goes on decoding
    assert source.llumlet.copied(1, 0.0) == []
    tail = only(source.step())
    assert tail.pairs == [(request.block_table[2], answer.message.blocks[2])]
    assert source.llumlet.frozen == [request] and source.scheduler.plan(0.0) is None
    handover = only(source.llumlet.copied(1, 0.0))
    assert handover == Send(THERE, Handover(1, 1, 1, 12, 0, 4, [], None))
    takeover = only(relay([handover], HERE, there))
    assert takeover == Tell(0, Takeover(1, 1, 4, [], None)) and there.step() == []
    there.llumlet.on_grant(1, 1, 2, 0.0)
    moved = there.scheduler.get(1)
    assert (moved.epoch, moved.tokens, moved.num_computed, moved.slot) == (2, request.tokens, 12, 1)
    assert moved.block_table == answer.message.blocks and moved.sampling == request.sampling
    there.step()
    assert moved.num_output == 5
    assert source.llumlet.on_release(1, 1, 0.0) == [] and source.empty and not source.llumlet.outgoing


def test_output_that_the_journal_lacks_is_carried_with_its_logprobs(source, there, make, journal):
    request = source.run(make(logprobs=0), 2)
    copy = copying(source, there)
    source.llumlet.copied(copy.move, 0.0)
    journal.behind = 1
    tail = only(source.step())
    takeover = only(relay(source.llumlet.copied(tail.move, 0.0), HERE, there)).message
    assert takeover == Takeover(1, 1, 2, [7], [TokenLogprobs(-2.0, [], [])])
    assert there.llumlet.pending[0].tokens == request.tokens


def test_no_freeze_before_the_journal_holds_what_came_before_the_move(source, there, make, journal):
    source.run(make(), 3)
    journal.behind = 2
    copy = copying(source, there)
    source.llumlet.copied(copy.move, 0.0)
    assert source.step(seconds=1.0) == []  # 4 tokens, 2 journaled, 3 when the move began
    assert isinstance(only(source.step(seconds=1.0)), Copy) and source.llumlet.frozen


def test_blocks_that_are_there_already_are_not_copied(source, there, make):
    there.run(make(rid=2, prompt=9), 1)
    shared = there.scheduler.get(2).block_table[:2]
    twin = make(rid=3, prompt=9)
    twin.tokens[:] = [1002] * 9
    source.run(twin, 1)
    answer = only(relay(source.move(), HERE, there))
    assert answer.message.skip == 2 and len(answer.message.blocks) == 2
    there.llumlet.on_release(2, 1, 0.0)
    there.check()
    assert all(b in there.llumlet.tables()[0] for b in shared)  # held from the answer on
    assert relay([answer], THERE, source) == []
    tail = only(source.step())
    assert tail.pairs == [(twin.block_table[2], answer.message.blocks[0])]


def test_names_are_given_only_after_the_grant(source, there, make):
    request = source.run(make(), 2)
    names = block_hashes(request.tokens[:8], SIZE)
    handed_over(source, there)
    assert there.blocks.match(names) == []
    there.llumlet.on_grant(1, 1, 2, 0.0)
    assert there.blocks.match(names) == there.scheduler.get(1).block_table[:2]


def test_stages_follow_until_little_is_left(source, there, make):
    request = source.run(make(prompt=9), 1)
    copy = copying(source, there)
    for _ in range(2 * SIZE + 2):  # a slow copy: two blocks and more are written meanwhile
        assert source.step(seconds=1.0) == []
    source.llumlet.copied(copy.move, 100.0)
    asked = only(source.step(now=100.0, seconds=1.0))
    assert asked.message.stage == 1 and asked.message.hashes == [] and not source.llumlet.frozen
    more = only(relay([asked], HERE, there))
    second = only(relay([more], THERE, source))
    assert [a for a, _ in second.pairs] == request.block_table[2:5]
    source.llumlet.copied(second.move, 100.0)  # in no time
    assert isinstance(only(source.step(now=100.0, seconds=1.0)), Copy) and source.llumlet.frozen


def test_a_rest_that_copies_within_a_step_is_little(source, there, make):
    source.run(make(prompt=9), 1)
    copy = copying(source, there)
    for _ in range(4):
        source.step()
    source.llumlet.copied(copy.move, 0.2)  # a tenth of a second a block
    tail = only(source.step(now=0.2, seconds=0.25))
    assert len(tail.pairs) == 2 and source.llumlet.frozen


def test_a_half_prefilled_request_moves_with_what_is_computed(journal, there, make):
    source = Engine(journal, tokens=8)
    request = source.run(make(prompt=30), 1)
    copy = only(relay(relay(source.move(rid=1), HERE, there), THERE, source))
    assert [a for a, _ in copy.pairs] == request.block_table[:2]
    source.llumlet.copied(copy.move, 0.0)
    tail = only(source.step(seconds=1.0))
    assert source.llumlet.frozen == [request] and [a for a, _ in tail.pairs] == request.block_table[2:4]
    relay(source.llumlet.copied(tail.move, 0.0), HERE, there)
    there.llumlet.on_grant(1, 1, 2, 5.0)
    moved = there.scheduler.get(1)
    assert (moved.num_computed, moved.pending, moved.admitted) == (16, 14, 5.0)
    there.step()
    assert moved.num_output == 1


# -- which request -----------------------------------------------------------------------------


@pytest.mark.parametrize(("choice", "rid"), [("shortest", 2), ("longest", 1), ("last", 3)])
def test_the_choice_among_equals(source, make, choice, rid):
    for r, prompt in ((1, 20), (2, 5), (3, 10)):
        source.run(make(r, prompt))
    assert only(source.move(choice=choice)).message.rid == rid


def test_less_urgent_classes_leave_first_and_urgent_ones_never(source, make):
    source.run(make(1, 20, priority=5))
    source.run(make(2, 5, priority=-1))
    source.run(make(3, 9))
    assert only(source.move()).message.rid == 1
    assert only(source.move(THIRD)).message.rid == 3
    assert source.move(EngineIncarnation(3, 1)) == []


def test_a_drain_moves_all_and_hands_back_what_waits(journal, make):
    source = Engine(journal, seqs=2, max_outgoing=4)
    source.run(make(1, 20))
    source.run(make(2, 5, priority=-1))
    source.run(make(3, 9))
    source.llumlet.accept(False)
    actions = source.move(drain=True)
    assert actions[0] == Tell(0, HandBack(3, 1))
    assert {a.message.rid for a in actions[1:]} == {1, 2} and not source.scheduler.waiting


def test_who_serves_again_drains_no_longer(journal, make):
    source = Engine(journal, seqs=1, max_outgoing=1)
    source.run(make(1, 5))
    source.llumlet.accept(False)
    assert only(source.move(drain=True)).message.rid == 1
    source.llumlet.accept(True)
    source.llumlet.on_start(make(2, 5), 0.0)
    assert source.llumlet.tick(0.0) == [] and 2 in [r.rid for r in source.scheduler.waiting]
    assert source.move(drain=True) == []  # it was on its way
    assert source.llumlet.tick(0.0) == [] and 2 in [r.rid for r in source.scheduler.waiting]


def test_an_order_goes_on_until_its_lease_ends(source, there, make):
    for rid in (1, 2):
        source.run(make(rid, 5))
    assert handed_over(source, there).rid == 2
    source.llumlet.on_release(2, 1, 0.0)
    assert only(source.step(now=9.0)).message.rid == 1
    source.llumlet.on_release(1, 1, 9.0)
    source.llumlet.on_start(make(3, 5), 9.0)
    assert source.step(now=10.0) == [] and not source.llumlet.orders


@pytest.mark.parametrize("state", ["waiting", "barely prefilled"])
def test_what_has_no_kv_worth_moving_is_handed_back(journal, make, state):
    source = Engine(journal, tokens=3)
    source.llumlet.on_start(make(1, 30), 0.0)
    if state == "barely prefilled":
        source.step()
    assert source.move(rid=1) == [Tell(0, HandBack(1, 1))]
    assert source.empty and source.scheduler.get(1) is None


def test_an_unknown_request_is_not_moved(source):
    assert source.move(rid=99) == []


def test_no_more_moves_than_allowed(journal, make):
    source = Engine(journal, max_outgoing=1)
    for rid in (1, 2):
        source.run(make(rid, 5))
    assert len(source.move()) == 1 and source.move(THIRD) == []
    source.llumlet.accept(False)
    assert source.move(drain=True) == []


# -- the destination says no -------------------------------------------------------------------


def reserve(move=1, rid=1, num_tokens=8, longest=50, stage=0) -> Reserve:
    return Reserve(move, rid, 1, 0, rid, stage, num_tokens, longest, [])


@pytest.mark.parametrize(
    ("options", "asked"),
    [
        ({"blocks": 4}, reserve(num_tokens=20, longest=16)),
        ({"blocks": 4}, reserve(longest=17)),
        ({"max_incoming": 0}, reserve()),
        ({}, reserve(stage=1)),
    ],
)
def test_what_cannot_be_taken_is_declined(journal, options, asked):
    there = Engine(journal, **options)
    answer = only(there.llumlet.on_peer(HERE, asked, 0.0))
    assert isinstance(answer.message, Declined) and there.empty


def test_a_draining_engine_takes_in_nothing(there):
    there.llumlet.accept(False)
    assert isinstance(only(there.llumlet.on_peer(HERE, reserve(), 0.0)).message, Declined) and there.empty


def test_a_place_in_the_batch_is_reserved(journal, make):
    there = Engine(journal, seqs=2)
    there.run(make(2))
    assert isinstance(only(there.llumlet.on_peer(HERE, reserve(), 0.0)).message, Reserved)
    assert isinstance(only(there.llumlet.on_peer(HERE, reserve(move=2), 0.0)).message, Declined)
    there.run(make(3))
    assert 3 not in there.scheduler.running  # the place is kept
    there.llumlet.on_peer(HERE, Aborted(1, 1, 1), 0.0)
    there.step()
    assert 3 in there.scheduler.running


def test_running_requests_keep_a_block_to_grow_into(journal, make):
    there = Engine(journal, blocks=5)
    there.run(make(2, 7))
    assert isinstance(only(there.llumlet.on_peer(HERE, reserve(num_tokens=12, longest=12), 0.0)).message, Declined)
    assert isinstance(only(there.llumlet.on_peer(HERE, reserve(num_tokens=8, longest=12), 0.0)).message, Reserved)


def test_declined_the_source_carries_on_and_drops_the_order(source, make):
    request = source.run(make())
    source.move()
    assert source.llumlet.on_peer(THERE, Declined(1, 1, 1, "full"), 0.0) == [Send(THERE, Aborted(1, 1, 1))]
    assert source.llumlet.idle and source.step() == [] and request.num_output == 2


def test_a_late_answer_to_an_older_move_counts_for_nothing(source, there, make):
    source.run(make())
    first = relay(source.move(), HERE, there)
    source.llumlet.on_peer(THERE, Declined(1, 1, 1, ""), 0.0)
    second = only(source.move())
    assert second.message.move == 2
    assert relay(first, THERE, source) == []


# -- the request ends, or loses its KV, in the middle --------------------------------------------


def test_a_request_that_finishes_is_aborted_after_its_copy(source, there, make):
    source.run(make(max_tokens=3), 2)
    copy = copying(source, there)
    assert source.step() == [] and source.scheduler.get(1) is None
    assert source.llumlet.copied(copy.move, 0.0) == [Send(THERE, Aborted(1, 1, 1))]
    assert source.empty and source.llumlet.outgoing == {}


def test_a_request_that_finishes_at_the_last_step_before_the_freeze(source, there, make):
    source.run(make(max_tokens=3), 2)
    source.llumlet.copied(copying(source, there).move, 0.0)
    assert source.step() == [Send(THERE, Aborted(1, 1, 1))]


@pytest.mark.parametrize("readmitted", [False, True])
def test_a_preempted_request_is_aborted_even_when_it_is_back(source, there, make, readmitted):
    request = source.run(make(), 2)
    source.llumlet.copied(copying(source, there).move, 0.0)
    source.scheduler.preempt(request, 0.0)
    actions = source.step() if readmitted else source.llumlet.tick(0.0)
    assert Send(THERE, Aborted(1, 1, 1)) in actions and not source.llumlet.frozen


@pytest.mark.parametrize("when", ["reserving", "copying", "ready", "tail"])
def test_a_cancel_frees_here_at_once_and_there_after_the_copy(source, there, make, when):
    source.run(make(), 2)
    actions = source.move()
    answers = relay(actions, HERE, there)
    if when != "reserving":
        relay(answers, THERE, source)
    if when in ("ready", "tail"):
        source.llumlet.copied(1, 0.0)
    if when == "tail":
        source.step()
    actions = source.llumlet.on_release(1, 1, 0.0)
    source.check()
    assert source.empty
    if when in ("copying", "tail"):
        assert actions == []
        actions = source.llumlet.copied(1, 0.0)
    assert actions == [Send(THERE, Aborted(1, 1, 1))]
    relay(actions, HERE, there)
    assert there.empty and not source.llumlet.outgoing


def test_a_cancel_after_the_handover_leaves_the_rest_to_the_frontend(source, there, make):
    source.run(make(), 2)
    handed_over(source, there)
    assert source.llumlet.on_release(1, 1, 0.0) == [] and source.empty
    assert not there.empty and there.llumlet.on_release(1, 1, 0.0) == [] and there.empty


def test_only_aborted_frees_a_reservation(source, there, make):
    source.run(make(), 2)
    copying(source, there)
    used = there.blocks.num_used
    there.llumlet.on_release(1, 5, 0.0)
    there.llumlet.on_owned_requests(0, {}, 0.0)
    there.llumlet.peer_died(EngineIncarnation(0, 0), 0.0)  # a former life of the source
    there.llumlet.peer_died(EngineIncarnation(2, 1), 0.0)
    there.llumlet.tick(1e9)
    assert there.blocks.num_used == used
    there.llumlet.peer_died(EngineIncarnation(0, 3), 0.0)  # two lives have passed unseen
    assert there.empty


@pytest.mark.parametrize("stage", ["copying", "tail", "doomed"])
def test_a_copy_that_fails_frees_the_reservation_and_keeps_the_request(source, there, make, stage):
    request = source.run(make(), 2)
    copying(source, there)
    if stage == "tail":
        source.llumlet.copied(1, 0.0)
        source.step()
    if stage == "doomed":
        source.llumlet.on_release(1, 1, 0.0)
    aborted, *asked = source.llumlet.copy_failed(1, 0.0)
    relay([aborted], HERE, there)
    assert there.empty and not source.llumlet.orders
    assert asked == ([Tell(0, Reclaim(1, 1, 3, [], None))] if stage == "tail" else [])
    assert source.scheduler.running.get(1) is (request if stage == "copying" else None)
    assert source.llumlet.copy_failed(1, 0.0) == []


# -- the verdict -------------------------------------------------------------------------------


def test_a_frozen_request_asks_when_it_waits_too_long_and_runs_when_granted(source, there, make):
    request = source.run(make(), 2)
    handed_over(source, there)
    assert source.llumlet.tick(0.9) == [] and source.step(now=0.9) == []
    assert source.llumlet.tick(1.0) == [Tell(0, Reclaim(1, 1, 3, [], None))]
    assert source.llumlet.tick(9.0) == []
    source.llumlet.on_grant(1, 1, 2, 9.0)
    assert request.epoch == 2
    source.step()
    assert request.num_output == 4 and not source.llumlet.frozen
    there.llumlet.on_release(1, 1, 9.0)
    assert there.empty


@pytest.mark.parametrize("when", ["tail", "handed"])
def test_the_death_of_the_destination_makes_a_frozen_request_ask(source, there, make, when):
    source.run(make(), 2)
    if when == "handed":
        handed_over(source, there)
    else:
        source.llumlet.copied(copying(source, there).move, 0.0)
        source.step()
    assert source.llumlet.peer_died(THERE, 0.0) == [Tell(0, Reclaim(1, 1, 3, [], None))]
    assert source.llumlet.copied(1, 0.0) == [] and source.llumlet.peer_died(THERE, 0.0) == []


def test_the_death_of_the_destination_before_the_freeze_costs_nothing(source, there, make):
    request = source.run(make(), 2)
    copy = copying(source, there)
    assert source.llumlet.peer_died(THERE, 0.0) == [] and source.llumlet.idle
    assert source.llumlet.copied(copy.move, 0.0) == [] and source.step() == [] and request.num_output == 3


def test_the_death_of_the_source_leaves_the_pending_request_waiting(source, there, make):
    source.run(make(), 2)
    handed_over(source, there)
    there.llumlet.peer_died(HERE, 0.0)
    there.llumlet.on_grant(1, 1, 2, 0.0)
    there.step()
    assert there.scheduler.get(1).num_output == 4


def test_a_handover_that_the_journal_disowns_is_declined_and_asked_for(source, there, make, journal):
    source.run(make(), 2)
    source.llumlet.copied(copying(source, there).move, 0.0)
    tail = only(source.step())
    handover = source.llumlet.copied(tail.move, 0.0)
    del journal.slots[1]
    declined = relay(handover, HERE, there)
    assert isinstance(only(declined).message, Declined) and there.empty
    assert isinstance(only(relay(declined, THERE, source)).message, Reclaim)


def test_grants_and_releases_of_other_epochs_count_for_nothing(source, there, make):
    source.run(make(epoch=3), 2)
    handed_over(source, there)
    there.llumlet.on_grant(1, 2, 9, 0.0)
    there.llumlet.on_release(1, 2, 0.0)
    source.llumlet.on_release(1, 2, 0.0)
    assert len(there.llumlet.pending) == len(source.llumlet.frozen) == 1


@pytest.mark.parametrize("epoch", [2, 3, 4])
def test_a_start_counts_only_above_the_epoch_held(source, there, make, epoch):
    source.run(make(epoch=3), 2)
    handed_over(source, there)
    again = make(epoch=epoch)
    for engine in (source, there):
        engine.llumlet.on_start(again, 0.0)
        engine.check()
        assert (engine.scheduler.get(1) is again) == (epoch == 4)
        assert (engine.llumlet.epoch_of(1)) == max(3, epoch)


def test_a_statement_drops_what_it_omits_and_asks_for_what_it_keeps(source, there, make):
    source.run(make(), 2)
    handed_over(source, there)
    running = source.run(make(2))
    assert source.llumlet.on_owned_requests(0, {1: 1, 2: 1, 3: 4}, 0.0) == [
        Tell(0, Reclaim(1, 1, 3, [], None)),
        Tell(0, HandBack(3, 4)),
    ]
    assert source.scheduler.get(2) is running
    there.llumlet.on_owned_requests(0, {}, 0.0)
    assert there.empty
    source.llumlet.on_owned_requests(7, {}, 0.0)  # another frontend's
    assert source.llumlet.frozen
    source.llumlet.on_owned_requests(0, {2: 2}, 0.0)
    source.check()
    assert source.empty


def test_frozen_and_pending_requests_are_nobodys_victims(journal, source, make):
    """Memory runs out beside them, and an urgent request comes."""
    there = Engine(journal, blocks=7, seqs=3)
    source.run(make(max_tokens=12), 2)
    handed_over(source, there)
    pending = only(there.llumlet.pending)
    table = list(pending.block_table)
    there.llumlet.on_start(make(2, 5, priority=1), 0.0)
    there.step()
    there.llumlet.on_start(make(3, 9, priority=-5), 0.0)
    for _ in range(12):
        there.step()
    assert there.scheduler.num_preemptions
    assert there.llumlet.pending == [pending] and pending.block_table == table


def test_frozen_and_pending_requests_take_another_priority(source, there, make):
    frozen = source.run(make(), 2)
    handed_over(source, there)
    (pending,) = there.llumlet.pending
    for engine in (source, there):
        engine.llumlet.on_reprioritise(1, 2, 5)
        engine.llumlet.on_reprioritise(1, 1, -1)
    assert (frozen.params.priority, pending.params.priority) == (-1, -1)
    there.llumlet.on_grant(1, 1, 2, 0.0)
    assert there.scheduler.running[1].params.priority == -1


def test_an_older_epoch_makes_way_for_the_grant(source, there, make, journal):
    zombie = there.run(make(epoch=1))
    source.run(make(epoch=2), 2)
    handed_over(source, there)
    there.llumlet.on_grant(1, 2, 3, 0.0)
    there.check()
    assert there.scheduler.get(1).epoch == 3 and zombie.block_table == []


# -- what is reported --------------------------------------------------------------------------


def told(engine: Engine) -> tuple[MigrationResult, str]:
    """The result and detail of the one report."""
    report = only(engine.llumlet.reports)
    return report.result, report.detail


def test_a_move_that_went_well_is_reported_once_with_all_that_it_took(source, there, make):
    request = source.run(make(prompt=9), 2)
    answer = relay(source.move(now=1.0, reason="memory"), HERE, there)
    copy = only(source.llumlet.on_peer(THERE, answer[0].message, 2.0))
    source.llumlet.copied(copy.move, 3.0)
    tail = only(source.step(now=4.0))
    relay(source.llumlet.copied(tail.move, 5.0), HERE, there)
    there.llumlet.on_grant(1, 1, 2, 5.0)
    assert source.llumlet.reports == []  # it is over when the source hears of it
    source.llumlet.on_release(1, 1, 7.0)
    assert only(source.llumlet.reports) == Report(
        request, 1, "memory", MigrationResult.MOVED, stages=2, blocks=3, skipped=0, seconds=6.0, frozen_seconds=3.0
    )
    source.llumlet.on_release(1, 1, 8.0)
    assert len(source.llumlet.reports) == 1 and there.llumlet.reports == []


def test_blocks_that_were_there_are_reported_as_such(source, there, make):
    there.run(make(rid=2, prompt=9), 1)
    twin = make(rid=3, prompt=9)
    twin.tokens[:] = [1002] * 9
    source.run(twin, 1)
    relay(relay(source.move(), HERE, there), THERE, source)
    tail = only(source.step())
    source.llumlet.copied(tail.move, 0.0)
    source.llumlet.on_release(3, 1, 0.0)
    report = only(source.llumlet.reports)
    assert (report.result, report.stages, report.blocks, report.skipped) == (MigrationResult.MOVED, 1, 1, 2)


def test_a_refusal_is_reported_with_its_reason(source, make):
    source.run(make())
    source.move()
    source.llumlet.on_peer(THERE, Declined(1, 1, 1, "full"), 0.0)
    assert told(source) == (MigrationResult.DECLINED, "full")


def test_a_refusal_after_the_handover_is_reported_when_the_frontend_has_decided(source, there, make, journal):
    source.run(make(), 2)
    handed_over(source, there)
    source.llumlet.on_peer(THERE, Declined(1, 1, 1, "the request has moved on"), 0.0)
    assert source.llumlet.reports == []
    source.llumlet.on_release(1, 1, 0.0)
    assert told(source) == (MigrationResult.DECLINED, "the request has moved on")


@pytest.mark.parametrize(
    ("end", "result"), [("finish", MigrationResult.FINISHED), ("preempt", MigrationResult.PREEMPTED)]
)
def test_what_becomes_of_the_request_meanwhile_is_reported(source, there, make, end, result):
    request = source.run(make(max_tokens=3), 2)
    copy = copying(source, there)
    if end == "preempt":
        source.scheduler.preempt(request, 0.0)
    source.step()
    assert source.llumlet.reports == []  # its copy is under way
    source.llumlet.copied(copy.move, 0.0)
    assert told(source) == (result, "") and source.llumlet.reports[0].blocks == len(copy.pairs)


@pytest.mark.parametrize("when", ["reserving", "ready", "tail", "handed"])
def test_a_cancel_is_reported(source, there, make, when):
    source.run(make(), 2)
    if when == "handed":
        handed_over(source, there)
    else:
        answers = relay(source.move(), HERE, there)
    if when in ("ready", "tail"):
        source.llumlet.copied(only(relay(answers, THERE, source)).move, 0.0)
    if when == "tail":
        source.step()
    source.llumlet.on_release(1, 1, 0.0, cancelled=True)
    source.llumlet.copied(1, 0.0)
    assert told(source) == (MigrationResult.CANCELLED, "")


@pytest.mark.parametrize("stage", ["copying", "tail"])
def test_a_copy_that_fails_is_reported_when_nobody_waits_for_a_verdict(source, there, make, stage):
    source.run(make(), 2)
    copying(source, there)
    if stage == "tail":
        source.llumlet.copied(1, 0.0)
        source.step()
    source.llumlet.copy_failed(1, 0.0)
    if stage == "tail":
        assert source.llumlet.reports == []
        source.llumlet.on_grant(1, 1, 2, 0.0)
    assert told(source) == (MigrationResult.COPY_FAILED, "")


@pytest.mark.parametrize("frozen", [False, True])
def test_the_death_of_the_destination_is_reported(source, there, make, frozen):
    source.run(make(), 2)
    if frozen:
        handed_over(source, there)
    else:
        copying(source, there)
    source.llumlet.peer_died(THERE, 0.0)
    source.llumlet.on_grant(1, 1, 2, 0.0)
    assert told(source) == (MigrationResult.PEER_DIED, "")


def test_a_request_given_back_to_its_source_is_reported_with_the_time_it_stood_still(source, there, make):
    source.run(make(), 2)
    handed_over(source, there)
    source.llumlet.tick(2.0)
    source.llumlet.on_grant(1, 1, 2, 3.0)
    assert told(source) == (MigrationResult.TAKEN_BACK, "") and source.llumlet.reports[0].frozen_seconds == 3.0


def test_what_is_handed_back_is_reported_with_the_reason_of_the_order(journal, make):
    source = Engine(journal, seqs=1)
    running, waiting = source.run(make(1)), source.run(make(2))
    source.llumlet.accept(False)
    source.move(drain=True, reason="draining")
    assert only(source.llumlet.reports) == Report(waiting, -1, "draining", MigrationResult.HANDED_BACK, "it waited")
    source.move(rid=1, how="recompute")
    assert source.llumlet.reports[1:] == []  # it is moving already
    source.llumlet.on_peer(THERE, Declined(1, 1, 1, "full"), 0.0)
    source.move(rid=1, how="recompute")
    assert source.llumlet.reports[2] == Report(
        running, -1, "operator", MigrationResult.HANDED_BACK, "to be computed anew"
    )


# -- when enough is moved ----------------------------------------------------------------------


def test_a_source_that_is_no_busier_any_more_begins_no_move(journal, make):
    asked = []
    busy = True
    source = Engine(journal, busier_than=lambda peer: (asked.append(peer), busy)[1])
    for rid in (1, 2, 3):
        source.run(make(rid, 5))
    assert asked == []  # no order, nothing to ask
    assert len(source.move()) == 1 and asked == [THERE]
    source.step()
    assert asked == [THERE]  # not while a move is under way
    busy = False
    source.llumlet.on_peer(THERE, Declined(1, 1, 1, ""), 0.0)
    assert source.move() == [] and source.llumlet.orders  # the order stands: it may get busier again
    busy = True
    assert len(source.step(now=1.0)) == 1


@pytest.mark.parametrize("order", [{"drain": True}, {"rid": 1}])
def test_drains_and_single_requests_move_however_busy_we_are(journal, make, order):
    source = Engine(journal, busier_than=lambda peer: False)
    source.run(make(1, 5))
    source.llumlet.accept(not order.get("drain"))
    assert len(source.move(**order)) == 1
