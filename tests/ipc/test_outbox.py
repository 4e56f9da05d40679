"""The outbox against a simple model, and after a crash of its writer at any store."""

from __future__ import annotations

from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from daemon.ipc.outbox import BYTES_PER_SLOT, Outbox, OutboxFull, OutboxSlot
from tests.ipc.crashing_memory import Crash, CrashingMemory, StoreBudget

SIZE = 64 << 10
words = st.integers(0, 2**64 - 1)


def memory(size: int = SIZE) -> memoryview:
    return memoryview(bytearray(size))


class OutboxModel(RuleBasedStateMachine):
    """Random calls of the writer, which dies between any two of them; what a successor reads is the model's."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = memory()
        self.outbox = Outbox(self.memory)
        self.empty = self.outbox.free_bytes
        self.slots: dict[int, OutboxSlot] = {}  # by token
        self.model: dict[int, tuple[bytes, bytes, list[int], int]] = {}  # facts, bytes, state, baseline
        self.valid: dict[int, int] = {}  # how many of the last bytes are kept
        self.tokens = count(1)

    def pick(self, which: int) -> int:
        return sorted(self.slots)[which % len(self.slots)]

    @rule(facts=st.binary(max_size=300), state=st.lists(words, min_size=1, max_size=9), baseline=words)
    def open(self, facts: bytes, state: list[int], baseline: int) -> None:
        token = next(self.tokens)
        try:
            slot = self.outbox.open(facts, state, token=token, baseline=baseline, ring_bytes=1 << 10)
        except OutboxFull:
            assert self.slots
            return
        self.slots[token], self.model[token] = slot, (facts, b"", state, baseline)
        self.valid[token] = 0

    @precondition(lambda self: self.slots)
    @rule(which=st.integers(0, 99), size=st.integers(0, 2000), more=words)
    def commit(self, which: int, size: int, more: int) -> None:
        token = self.pick(which)
        facts, sent, state, baseline = self.model[token]
        data = bytes((len(sent) + i) * 7 % 251 for i in range(size))
        state = [word ^ more for word in state]
        if size > self.slots[token].ring_bytes:
            with pytest.raises(ValueError, match="do not fit"):
                self.slots[token].commit(data, state)
            return
        self.slots[token].commit(data, state)
        self.model[token] = facts, sent + data, state, baseline
        self.valid[token] = min(self.valid[token] + size, self.slots[token].ring_bytes)

    @precondition(lambda self: self.slots)
    @rule(which=st.integers(0, 99), to=st.sampled_from([2048, 8192, 32768]))
    def grow(self, which: int, to: int) -> None:
        slot = self.slots[self.pick(which)]
        if to > slot.ring_bytes:
            try:
                slot.grow(to)
            except OutboxFull:
                assert self.outbox.free_bytes < 2 * to

    @precondition(lambda self: self.slots)
    @rule(which=st.integers(0, 99))
    def close(self, which: int) -> None:
        token = self.pick(which)
        del self.model[token]
        slot = self.slots.pop(token)
        slot.close()
        slot.close()

    @rule()
    def die(self) -> None:
        before = self.outbox.free_bytes
        self.outbox = Outbox(self.memory, adopt=True)
        self.slots = {slot.token: slot for slot in self.outbox.slots()}
        assert self.outbox.free_bytes == before

    @invariant()
    def a_successor_reads_the_content_of_the_model(self) -> None:
        found = {slot.token: slot for slot in Outbox(memoryview(bytearray(self.memory)), adopt=True).slots()}
        assert found.keys() == self.model.keys()
        for token, (facts, sent, state, baseline) in self.model.items():
            slot = found[token]
            assert (slot.facts, slot.state, slot.baseline) == (facts, state, baseline)
            assert slot.committed == len(sent)
            first = len(sent) - self.valid[token]
            assert slot.tail(first) == sent[first:]
            for start in (-1, len(sent) - slot.ring_bytes - 1, len(sent) + 1):
                with pytest.raises(ValueError, match="not in the outbox"):
                    slot.tail(start)

    def teardown(self) -> None:
        for slot in self.slots.values():
            slot.close()
        assert self.outbox.free_bytes == self.empty


TestOutbox = OutboxModel.TestCase
TestOutbox.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


@given(st.lists(st.integers(0, 40), max_size=20), st.integers(0, 64))
def test_a_grown_ring_keeps_what_the_small_one_had(sizes: list[int], grown_at: int):
    outbox, sent = Outbox(memory()), b""
    slot = outbox.open(b"", [0], token=1, baseline=0, ring_bytes=64)
    for i, size in enumerate(sizes):
        if i == grown_at:
            slot.grow(256)
        data = bytes(len(sent) + k & 255 for k in range(size))
        slot.commit(data, [i])
        sent += data
        assert slot.tail(max(0, len(sent) - 64)) == sent[-64:]


def test_slots_and_space_run_out_and_come_back():
    outbox = Outbox(memory())
    free, slots = outbox.free_bytes, []
    with pytest.raises(OutboxFull, match="slot"):
        for token in count():
            slots.append(outbox.open(b"", [0], token=token, baseline=0, ring_bytes=64))
    assert len(slots) == SIZE // BYTES_PER_SLOT
    slots.pop().close()
    before = outbox.free_bytes
    with pytest.raises(OutboxFull, match="room"):
        outbox.open(b"x", [0], token=1, baseline=0, ring_bytes=1 << 20)
    with pytest.raises(OutboxFull, match="room"):
        slots[0].grow(1 << 20)
    assert outbox.free_bytes == before
    for slot in slots:
        slot.close()
    assert outbox.free_bytes == free


def test_a_late_close_does_not_free_the_slot_of_another():
    outbox = Outbox(memory())
    first = outbox.open(b"", [0], token=1, baseline=0, ring_bytes=64)
    first.close()
    second = outbox.open(b"", [0], token=2, baseline=0, ring_bytes=64)
    first.close()
    assert [slot.token for slot in Outbox(outbox._view, adopt=True).slots()] == [second.token]


def test_without_adoption_it_starts_empty():
    shared = memory()
    Outbox(shared).open(b"facts", [1, 2], token=1, baseline=0, ring_bytes=64)
    second = Outbox(shared)
    assert second.slots() == []
    assert second.free_bytes == Outbox(memory()).free_bytes
    assert Outbox(shared, adopt=True).slots() == []


@pytest.mark.parametrize("torn", [False, True])
def test_a_crash_at_any_store_leaves_bytes_and_state_of_one_commit(torn: bool):
    """For every store: a successor finds the response as before or after the call that the crash interrupts."""
    stages = [(b"", [0, 0]), (b"a" * 50, [1, 1]), (b"a" * 50 + b"b" * 40, [2, 7])]
    stages += [stages[-1], (stages[-1][0] + b"c" * 200, [3, 9])]
    for k in count():
        shared, budget, died = memory(), StoreBudget(), False
        outbox = _crashing(Outbox(shared), budget, torn)
        budget.left = k
        stage = -1
        try:
            slot = outbox.open(b"facts", [0, 0], token=5, baseline=6, ring_bytes=64)
            stage = 0
            while stage < 4:
                stage += 1
                before, (after, state) = stages[stage - 1][0], stages[stage]
                if stage == 3:
                    slot.grow(256)
                else:
                    slot.commit(after[len(before) :], state)
            stage = 5
            slot.close()
        except Crash:
            died = True
        found = Outbox(shared, adopt=True).slots()
        if not found:
            assert stage in (-1, 5)
        else:
            slot = found[0]
            sent, state = next(s for s in stages[max(0, stage - 1) :] if len(s[0]) == slot.committed)
            assert (slot.facts, slot.token, slot.baseline, slot.state) == (b"facts", 5, 6, state)
            # The writer made sure that the kernel has what the interrupted commit may have overwritten.
            overwritten = (0, 0, 90 - 64, 90 - 64, 290 - 256, 290 - 256)[stage]
            assert slot.tail(overwritten) == sent[overwritten:]
        if not died:
            break
    assert k > 20


def _crashing(outbox: Outbox, budget: StoreBudget, torn: bool) -> Outbox:
    """Let `outbox` spend `budget` for every store that it makes from now on."""
    for name in ("_words", "_view"):
        setattr(outbox, name, CrashingMemory(getattr(outbox, name), budget, torn))
    return outbox
