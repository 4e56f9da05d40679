"""The outbox: the bytes of one frontend's responses that the kernel may not have taken yet, in shared memory.

A frontend commits the bytes of a response here before it gives them to the socket, in one store with the *state* that
they bring the response to: how much of each choice's output they contain. So a successor knows both what the client
still needs and where to go on. The kernel tells how many bytes it has taken.

A response has a slot of eight u64 words:

    0  SlotState
    1  version: its lowest bit selects one of two copies        (one aligned store commits bytes and state)
    2  token of the connection
    3  baseline: what the kernel had taken from the connection's writers before the first byte of this response
    4  facts offset << 32 | facts length, bytes
    5  copies offset << 32 | words of each copy

A copy is u64 words: the number of bytes committed, ring offset << 32 | ring size, then the state. Byte p of the
response is at p modulo the ring's size, so the ring always holds the last bytes that were committed, as many as it
has room for. Nothing is freed byte by byte: the writer waits until the kernel has taken what it would overwrite.
Offsets count from the start of the segment, in bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from enum import IntEnum

from daemon.ipc.arena import ALIGN, Arena, rounded

SLOT_WORDS = 8
BYTES_PER_SLOT = 8 << 10  # of the segment; there is one slot for so many
_LOW = 0xFFFFFFFF


class SlotState(IntEnum):
    FREE = 0
    LIVE = 1


class OutboxFull(Exception):
    """There is no free slot, or no contiguous space, now."""


class Outbox:
    """The outbox of one frontend. Its frontend alone maps it."""

    def __init__(self, view: memoryview, *, adopt: bool = False) -> None:
        """`adopt`: keep the responses that a predecessor has left; otherwise discard them."""
        self._view = view
        self.num_slots = len(view) // BYTES_PER_SLOT
        self._words = view[: self.num_slots * SLOT_WORDS * 8].cast("Q")
        self._arena_offset = rounded(self.num_slots * SLOT_WORDS * 8)
        self.capacity = len(view) - self._arena_offset & -ALIGN
        self._arena = Arena(self.capacity)
        self._live: dict[int, OutboxSlot] = {}
        for slot in range(self.num_slots):
            if self._words[slot * SLOT_WORDS] == SlotState.LIVE and adopt:
                self._live[slot] = found = OutboxSlot(self, view, self._words, slot)
                for at, size in found.extents():
                    self._arena.reserve(at - self._arena_offset, size)
            else:
                self._words[slot * SLOT_WORDS] = SlotState.FREE
        self._free = [slot for slot in range(self.num_slots - 1, -1, -1) if slot not in self._live]

    @property
    def free_bytes(self) -> int:
        return self._arena.free_bytes

    def slots(self) -> list[OutboxSlot]:
        """Return the slots of all responses that are not closed."""
        return list(self._live.values())

    def open(self, facts: bytes, state: Sequence[int], *, token: int, baseline: int, ring_bytes: int) -> OutboxSlot:
        """Record a response of which no byte is committed, and return its slot. Raises OutboxFull.

        `state`: its first one; all later ones have as many words. `ring_bytes`: size of its ring, a power of two.
        """
        words = 2 + len(state)
        fixed = _fixed_bytes(facts, state)
        if not self._free:
            raise OutboxFull("the outbox has no free slot")
        at = self.allocate(fixed)
        try:
            ring = self.allocate(ring_bytes)
        except OutboxFull:
            self.free(at, fixed)
            raise
        facts_at = at + 2 * words * 8
        self._view[facts_at : facts_at + len(facts)] = facts
        self._view[at : at + words * 8] = struct.pack(f"={words}Q", 0, ring << 32 | ring_bytes, *state)
        slot = self._free.pop()
        base = slot * SLOT_WORDS
        self._words[base + 1] = 0
        self._words[base + 2] = token
        self._words[base + 3] = baseline
        self._words[base + 4] = facts_at << 32 | len(facts)
        self._words[base + 5] = at << 32 | words
        self._words[base] = SlotState.LIVE
        self._live[slot] = found = OutboxSlot(self, self._view, self._words, slot)
        return found

    def can_hold(self, facts: bytes, state: Sequence[int], ring_bytes: int) -> bool:
        """Return True if the outbox could hold such a response if it were empty."""
        return rounded(_fixed_bytes(facts, state)) + rounded(ring_bytes) <= self.capacity

    def allocate(self, size: int) -> int:
        """Return the offset of a new extent in the segment. Raises OutboxFull."""
        start = self._arena.allocate(size)
        if start is None:
            raise OutboxFull("the outbox has no room")
        return self._arena_offset + start

    def free(self, at: int, size: int) -> None:
        """Free an extent exactly as it was allocated."""
        self._arena.free(at - self._arena_offset, size)

    def forget(self, slot: int, extents: list[tuple[int, int]]) -> None:
        """Free the slot and the extents of a response that is closed."""
        for at, size in extents:
            self.free(at, size)
        del self._live[slot]
        self._free.append(slot)


def _fixed_bytes(facts: bytes, state: Sequence[int]) -> int:
    """Return the size of the two copies and of the facts."""
    return 2 * (2 + len(state)) * 8 + len(facts)


class OutboxSlot:
    """One response in the outbox. `committed`: its bytes so far. `ring_bytes`: how many of the last ones are kept."""

    __slots__ = (
        "_base", "_copies", "_fixed", "_form", "_open", "_outbox", "_pack", "_ring", "_ring_word", "_slot",
        "_version", "_view", "_words", "baseline", "committed", "facts", "ring_bytes", "token",
    )  # fmt: skip

    def __init__(self, outbox: Outbox, view: memoryview, words: memoryview, slot: int) -> None:
        """Read the slot from the segment, as its writer or its writer's predecessor has left it."""
        self._outbox = outbox
        self._view = view
        self._words = words
        self._slot = slot
        self._base = base = slot * SLOT_WORDS
        self._version: int = words[base + 1]
        self.token: int = words[base + 2]
        self.baseline: int = words[base + 3]
        facts_at, facts_len = words[base + 4] >> 32, words[base + 4] & _LOW
        at, count = words[base + 5] >> 32, words[base + 5] & _LOW
        self.facts = bytes(view[facts_at : facts_at + facts_len])
        self._fixed = at, 2 * count * 8 + facts_len
        self._copies = [view[at + i * count * 8 : at + (i + 1) * count * 8] for i in (0, 1)]
        self._form = struct.Struct(f"={count}Q")
        self._pack = self._form.pack
        self.committed, self._ring_word, *_ = self._form.unpack(bytes(self._copies[self._version & 1]))
        self._ring, self.ring_bytes = self._ring_word >> 32, self._ring_word & _LOW
        self._open = True

    @property
    def state(self) -> list[int]:
        """The state that was committed last."""
        return list(self._form.unpack(bytes(self._copies[self._version & 1]))[2:])

    def extents(self) -> list[tuple[int, int]]:
        """Return (offset, size) of the two extents that the response has in the segment."""
        return [self._fixed, (self._ring, self.ring_bytes)]

    def commit(self, data: bytes, state: Sequence[int]) -> None:
        """Append `data`, together with the state that it brings the response to.

        It writes the copy that is not in use, and selects it with one store.
        The caller makes sure that the kernel has taken all but the last ``ring_bytes - len(data)`` bytes. Raises
        ValueError for more than `ring_bytes`.
        """
        size, begin = len(data), self.committed & self.ring_bytes - 1
        if begin + size <= self.ring_bytes:  # without a call: this is the daemon's hottest path
            at = self._ring + begin
            self._view[at : at + size] = data
        elif size > self.ring_bytes:
            raise ValueError(f"{size} bytes do not fit a ring of {self.ring_bytes}")
        else:
            self._put(self.committed, data)
        self.committed += size
        version = self._version + 1
        self._copies[version & 1][:] = self._pack(self.committed, self._ring_word, *state)
        self._version = self._words[self._base + 1] = version

    def _put(self, position: int, data: bytes) -> None:
        """Write `data`, which fits the ring, from byte `position` of the response on."""
        begin = position & self.ring_bytes - 1
        first = self.ring_bytes - begin
        at = self._ring + begin
        if len(data) <= first:
            self._view[at : at + len(data)] = data
        else:
            self._view[at : at + first] = data[:first]
            self._view[self._ring : self._ring + len(data) - first] = data[first:]

    def grow(self, ring_bytes: int) -> None:
        """Replace the ring by a larger one with the same bytes. `ring_bytes`: a power of two. Raises OutboxFull."""
        ring = self._outbox.allocate(ring_bytes)
        kept = self.tail(max(0, self.committed - self.ring_bytes))
        old = self._ring, self.ring_bytes
        self._ring, self.ring_bytes = ring, ring_bytes
        self._ring_word = ring << 32 | ring_bytes
        self._put(self.committed - len(kept), kept)
        self.commit(b"", self.state)
        self._outbox.free(*old)

    def tail(self, start: int) -> bytes:
        """Return the committed bytes from `start` on. Raises ValueError if the ring does not have them all."""
        size = self.committed - start
        if not 0 <= size <= min(self.ring_bytes, self.committed):
            raise ValueError(f"bytes from {start} on are not in the outbox")
        begin = start & self.ring_bytes - 1
        first = min(size, self.ring_bytes - begin)
        at = self._ring + begin
        return bytes(self._view[at : at + first]) + bytes(self._view[self._ring : self._ring + size - first])

    def close(self) -> None:
        """Forget the response: it has ended, and the kernel has all of its bytes. No effect on later calls."""
        if self._open:
            self._open = False
            self._words[self._base] = SlotState.FREE
            self._outbox.forget(self._slot, self.extents())
