"""The journal against a simple model, read through a view of the same memory."""

from __future__ import annotations

import struct
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from daemon.ipc.journal import Crashes, Failure, Journal, JournalFull, JournalTooSmall, JournalView, SlotState
from daemon.ipc.messages import Finish, RequestParams, SamplingParams, TokenLogprobs
from daemon.ipc.prompt_logprobs import NO_ID, PromptLogprob, PromptLogprobs
from tests.ipc.crashing_memory import Crash, CrashingMemory, StoreBudget

SIZE = 24 << 10
token_ids = st.integers(0, 2**32 - 2)
priorities = st.integers(-(2**63), 2**63 - 1) | st.integers(-2, 2)
# Multiples of 1/8, so that float32 is exact; rounding has its own test.
logs = st.integers(-800, 0).map(lambda n: n / 8)


def params(
    max_tokens: int = 16,
    logprobs: int = -1,
    label: str = "",
    seed: int = 7,
    priority: int = 0,
    prompt_logprobs: int = -1,
) -> RequestParams:
    sampling = SamplingParams(max_tokens=max_tokens, seed=seed, logprobs=logprobs, prompt_logprobs=prompt_logprobs)
    return RequestParams(sampling, 1.5, priority, label=label)


def memory(size: int = SIZE) -> memoryview:
    return memoryview(bytearray(size))


def packed(found: list[PromptLogprob], top: int) -> bytes:
    """Return the records of `found`, as an engine sends them."""
    out = b""
    for own, rank, ids, tops in found:
        pairs = [*zip(ids, tops, strict=True), *[(NO_ID, 0.0)] * (top - len(ids))]
        out += struct.pack("<fI", own, rank) + b"".join(struct.pack("<If", *pair) for pair in pairs)
    return out


def prompt_entries(top: int) -> st.SearchStrategy[PromptLogprob]:
    alternatives = st.lists(st.tuples(token_ids, logs), max_size=top)
    return st.builds(lambda own, rank, pairs: PromptLogprob(own, rank, [p[0] for p in pairs], [p[1] for p in pairs]),
                     logs, st.integers(1, 2**32 - 1), alternatives)  # fmt: skip


def entries(top: int) -> st.SearchStrategy[TokenLogprobs]:
    alternatives = st.lists(st.tuples(token_ids, logs), max_size=top)
    return st.builds(lambda own, pairs: TokenLogprobs(own, [p[0] for p in pairs], [p[1] for p in pairs]),
                     logs, alternatives)  # fmt: skip


class JournalModel(RuleBasedStateMachine):
    """Random calls of the owner; after each, a view must read exactly the content of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = memory()
        self.journal = Journal(self.memory, generation=7)
        self.view = JournalView(self.memory.toreadonly())
        self.empty = self.journal.free_bytes
        self.rids = count(1)
        self.live: dict[int, dict] = {}  # by slot

    def pick(self, which: int) -> int:
        return sorted(self.live)[which % len(self.live)]

    @rule(
        prompt=st.lists(token_ids, max_size=300),
        max_tokens=st.integers(0, 300),
        logprobs=st.integers(-1, 3),
        label=st.text(max_size=20),
        priority=priorities,
        scored=st.integers(-1, 2),
    )
    def open(self, prompt: list[int], max_tokens: int, logprobs: int, label: str, priority: int, scored: int) -> None:
        wanted = params(max_tokens, logprobs, label, next(self.rids), priority, scored)
        rid = next(self.rids) << 32
        try:
            slot = self.journal.open(rid, wanted, prompt)
        except JournalFull:
            assert self.live, "an empty journal refused a request that fits"
            return
        assert slot not in self.live
        self.live[slot] = {"rid": rid, "params": wanted, "prompt": prompt, "output": [], "logprobs": [], "scored": [],
                           "epoch": 0, "owner": (0xFFFF, 0), "priority": priority,
                           "finish": Finish.NONE, "failure": Failure.NONE,
                           "cached": 0, "crashes": Crashes()}  # fmt: skip

    def unfinished(self) -> list[int]:
        return [slot for slot, entry in sorted(self.live.items()) if not (entry["finish"] or entry["failure"])]

    @rule()
    def adopt(self) -> None:
        """The owner dies. Its successor keeps what an engine has been given, and drops what was being opened."""
        self.live = {slot: entry for slot, entry in self.live.items() if entry["owner"][0] != 0xFFFF}
        self.journal = Journal(self.memory, adopt=True, generation=9)

    @precondition(lambda self: self.unfinished())
    @rule(which=st.integers(0, 1000), finish=st.sampled_from(Finish), failure=st.sampled_from(Failure))
    def end(self, which: int, finish: Finish, failure: Failure) -> None:
        slot = self.unfinished()[which % len(self.unfinished())]
        if finish or failure:
            self.live[slot] |= {"finish": finish, "failure": failure}
            self.journal.end(slot, finish, failure)

    @precondition(lambda self: self.unfinished())
    @rule(which=st.integers(0, 1000), cached=st.integers(0, 2**32 - 1), crashed=st.integers(0, 9))
    def record(self, which: int, cached: int, crashed: int) -> None:
        slot = self.unfinished()[which % len(self.unfinished())]
        crashes = Crashes(self.live[slot]["epoch"], crashed // 2, crashed)
        self.live[slot] |= {"cached": cached, "crashes": crashes}
        self.journal.record_cached(slot, cached)
        self.journal.record_crashes(slot, crashes)

    @precondition(lambda self: self.unfinished())
    @rule(
        which=st.integers(0, 1000),
        by=st.integers(1, 9),
        engine=st.integers(0, 63),
        incarnation=st.integers(1, 99),
        weights=st.integers(0, 2**64 - 1),
    )
    def assign(self, which: int, by: int, engine: int, incarnation: int, weights: int) -> None:
        slot = self.unfinished()[which % len(self.unfinished())]
        entry = self.live[slot]
        entry["epoch"] += by
        entry["owner"] = (engine, incarnation)
        entry["weights"] = weights
        self.journal.assign(slot, entry["epoch"], engine, incarnation, weights)

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, 1000), priority=priorities)
    def reprioritise(self, which: int, priority: int) -> None:
        self.live[self.pick(which)]["priority"] = priority
        self.journal.reprioritise(self.pick(which), priority)

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, 1000), tokens=st.lists(token_ids, max_size=20), data=st.data())
    def append(self, which: int, tokens: list[int], data: st.DataObject) -> None:
        slot = self.pick(which)
        entry = self.live[slot]
        sampling = entry["params"].sampling
        found = None
        if sampling.logprobs >= 0:
            some = entries(sampling.logprobs)
            found = data.draw(st.lists(some, min_size=len(tokens), max_size=len(tokens)))
        if len(entry["output"]) + len(tokens) > sampling.max_tokens:
            with pytest.raises(ValueError, match="exceeds"):
                self.journal.append(slot, tokens, found)
            return
        self.journal.append(slot, tokens, found)
        entry["output"] += tokens
        entry["logprobs"] += found if found is not None else [None] * len(tokens)

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, 1000), back=st.integers(-1, 9), count=st.integers(0, 12), data=st.data())
    def append_prompt_logprobs(self, which: int, back: int, count: int, data: st.DataObject) -> None:
        """`back`: how many of the records the journal has already; -1: one is missing."""
        slot = self.pick(which)
        entry = self.live[slot]
        top, known, start = entry["params"].sampling.prompt_logprobs, entry["scored"], len(entry["scored"]) - back
        if top < 0 or start < 0:
            return
        new = data.draw(st.lists(prompt_entries(top), min_size=count, max_size=count))
        new[: max(0, back)] = known[start:][:count]  # an engine that computes it again gets the same
        sent = PromptLogprobs(start, packed(new, top))
        if back < 0 or start + len(new) >= len(entry["prompt"]):
            with pytest.raises(ValueError, match="logprobs"):
                self.journal.append_prompt_logprobs(slot, sent)
            return
        self.journal.append_prompt_logprobs(slot, sent)
        known += new[back:]

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, 1000))
    def close(self, which: int) -> None:
        slot = self.pick(which)
        self.journal.close(slot)
        del self.live[slot]
        assert self.view.state(slot) is SlotState.FREE

    @invariant()
    def a_view_reads_the_content_of_the_model(self) -> None:
        view = self.view
        assert view.generation == 7
        assert view.live_slots() == self.unfinished()
        assert view.kept_slots() == sorted(self.live)
        for slot, entry in self.live.items():
            assert view.rid(slot) == entry["rid"]
            assert view.params(slot) == entry["params"]  # as it was at admission
            assert view.priority(slot) == entry["priority"]
            assert view.prompt_len(slot) == len(entry["prompt"])
            assert view.prompt(slot) == entry["prompt"]
            assert view.num_output(slot) == len(entry["output"])
            assert view.output(slot) == entry["output"]
            middle = len(entry["output"]) // 2
            assert view.output(slot, middle) == entry["output"][middle:]
            assert (view.finish(slot), view.failure(slot)) == (entry["finish"], entry["failure"])
            assert (view.num_cached_tokens(slot), view.crashes(slot)) == (entry["cached"], entry["crashes"])
            assert (view.epoch(slot), view.owner(slot)) == (entry["epoch"], entry["owner"])
            assert view.weights(slot) == entry.get("weights", 0)
            assert [view.logprobs(slot, i) for i in range(len(entry["output"]))] == entry["logprobs"]
            assert view.num_prompt_logprobs(slot) == len(entry["scored"])
            if entry["scored"]:
                assert view.prompt_logprobs(slot, 0, len(entry["scored"])) == entry["scored"]
                assert view.prompt_logprobs(slot, 1, len(entry["scored"])) == entry["scored"][1:]

    def teardown(self) -> None:
        for slot in list(self.live):
            self.journal.close(slot)
        assert self.journal.free_bytes == self.empty


TestJournal = JournalModel.TestCase
TestJournal.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


@given(st.floats(allow_nan=False, width=64, max_value=0, min_value=-1e30), st.lists(st.floats(-100, 0), max_size=2))
def test_logprobs_are_stored_as_float32(own: float, top: list[float]):
    def single(x: float) -> float:
        return struct.unpack("<f", struct.pack("<f", x))[0]

    journal = Journal(memory())
    slot = journal.open(1, params(2, logprobs=2), [5])
    journal.append(slot, [8], [TokenLogprobs(own, list(range(len(top))), top)])
    kept = journal.logprobs(slot, 0)
    assert kept == TokenLogprobs(single(own), list(range(len(top))), [single(x) for x in top])


def test_a_full_journal_and_one_that_is_too_small_raise_different_errors():
    journal = Journal(memory())
    room = journal.free_bytes
    with pytest.raises(JournalTooSmall, match="journal_memory"):
        journal.open(1, params(room // 4), [1])
    slot = journal.open(2, params(room // 8), [1])
    with pytest.raises(JournalFull):
        journal.open(3, params(room // 8), [1])
    journal.close(slot)
    journal.open(3, params(room // 8), [1])


def test_slots_run_out_and_are_reused():
    journal = Journal(memory())
    slots = [journal.open(rid, params(0), []) for rid in range(journal.num_slots)]
    assert len(set(slots)) == journal.num_slots
    with pytest.raises(JournalFull):
        journal.open(999, params(0), [])
    before = journal.free_bytes
    journal.close(slots[0])
    assert journal.open(999, params(0), []) == slots[0]
    assert journal.free_bytes == before


@pytest.mark.parametrize("odd", range(0, 64, 7))
def test_a_segment_of_any_size_can_be_used(odd: int):
    """A request that fits an empty journal never raises JournalFull there."""
    journal = Journal(memory(SIZE + odd))
    room = journal.free_bytes
    for max_tokens in range(room // 4 - 64, room // 4 + 1):
        try:
            journal.close(journal.open(1, params(max_tokens), []))
        except JournalTooSmall:
            break
    else:
        raise AssertionError("never too small")
    assert journal.free_bytes == room


def test_a_new_owner_starts_with_an_empty_journal():
    shared = memory()
    first = Journal(shared)
    slots = [first.open(rid, params(), [1, 2]) for rid in range(5)]
    first.assign(slots[0], 3, 1, 1)
    second = Journal(shared)
    assert JournalView(shared).live_slots() == []
    assert second.free_bytes == Journal(memory()).free_bytes
    slot = second.open(77, params(label="new"), [9])
    view = JournalView(shared)
    assert (view.rid(slot), view.epoch(slot), view.prompt(slot), view.output(slot)) == (77, 0, [9], [])


def test_a_crash_of_the_owner_at_any_store_leaves_no_partial_request():
    """For every store: a reader reads the whole request or none, and all of the output or none."""
    for k in count():
        shared, budget, died = memory(), StoreBudget(k), False
        view = JournalView(shared)
        journal = Journal(shared)
        try:
            journal = _crashing(journal, budget)
            slot = journal.open(5, params(8, logprobs=0, priority=-1, prompt_logprobs=0), [1, 2, 3])
            journal.assign(slot, 1, 2, 3)
            journal.append_prompt_logprobs(slot, PromptLogprobs(0, packed([PromptLogprob(-2.0, 7, [], [])] * 2, 0)))
            journal.reprioritise(slot, 1)
            journal.append(slot, [10, 11, 12], [TokenLogprobs(-1.0, [], [])] * 3)
        except Crash:
            died = True
        for slot in view.live_slots():
            assert (view.rid(slot), view.prompt(slot)) == (5, [1, 2, 3])
            assert view.params(slot) == params(8, logprobs=0, priority=-1, prompt_logprobs=0)
            scored = view.num_prompt_logprobs(slot)
            assert scored in (0, 2)
            assert view.prompt_logprobs(slot, 0, scored) == [PromptLogprob(-2.0, 7, [], [])] * scored
            assert view.priority(slot) in ((-1, 1) if view.epoch(slot) else (-1,))
            assert (view.epoch(slot), view.owner(slot)[0]) in ((0, 0xFFFF), (1, 2))
            output = view.output(slot)
            assert output in ([], [10, 11, 12])
            assert [view.logprobs(slot, i).logprob for i in range(len(output))] == [-1.0] * len(output)
        if not died:
            break
    assert view.output(view.live_slots()[0]) == [10, 11, 12]
    assert view.priority(view.live_slots()[0]) == 1
    assert k > 15


def test_a_successor_adopts_a_consistent_journal_whatever_store_was_the_last():
    """At every store: owner and incarnation belong together, nothing overlaps, and all space comes back."""
    empty = Journal(memory()).free_bytes
    for k in count():
        shared, budget, died = memory(), StoreBudget(k), False
        first = Journal(shared, generation=1)
        closing = first.open(4, params(4), [1])
        first.assign(closing, 1, 0, 1)
        try:
            journal = _crashing(first, budget)
            slot = journal.open(5, params(8, logprobs=0), [1, 2, 3])
            for epoch, owner in enumerate([(2, 30), (0, 31), (1, 32)], 1):
                journal.assign(slot, epoch, *owner)
            journal.record_cached(slot, 16)
            journal.append(slot, [10, 11], [TokenLogprobs(-1.0, [], [])] * 2)
            journal.record_crashes(slot, Crashes(3, 0, 1))
            journal.end(slot, Finish.STOP)
            journal.close(closing)
        except Crash:
            died = True
        second = Journal(shared, adopt=True, generation=2)
        assert second.generation == 1
        for slot in second.kept_slots():
            if second.rid(slot) == 5:
                owners = {1: (2, 30), 2: (0, 31), 3: (1, 32)}
                assert second.owner(slot) == owners[second.epoch(slot)]
                ended = second.state(slot) is SlotState.ENDED
                assert not ended or (second.finish(slot), second.num_cached_tokens(slot)) == (Finish.STOP, 16)
                assert not second.num_output(slot) or second.num_cached_tokens(slot) == 16
        before = set(second.kept_slots())
        others = [second.open(rid, params(8), [7] * 9) for rid in range(100, 103)]
        assert not before & set(others)
        for slot in second.kept_slots():
            second.close(slot)
        assert second.free_bytes == empty
        if not died:
            break
    assert k > 20


def test_a_journal_that_was_only_partly_emptied_is_not_adopted():
    for k in count():
        shared = memory()
        first = Journal(shared, generation=1)
        for rid in range(3):
            first.assign(first.open(rid, params(), [1, 2]), 1, 0, 1)
        try:
            _crashing(first, StoreBudget(k))._discard(2)
        except Crash:
            assert (Journal(shared, adopt=True, generation=3).kept_slots() == []) == (k > 0)
            assert JournalView(shared).generation == (3 if k else 1)
        else:
            break
    assert k > 3


def _crashing(journal: Journal, budget: StoreBudget) -> Journal:
    """Let `journal` spend `budget` for every store that it makes from now on."""
    for name in ("_header", "_words", "_u32", "_view"):
        setattr(journal, name, CrashingMemory(getattr(journal, name), budget))
    return journal
