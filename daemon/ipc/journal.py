"""The journal: one frontend's record of every request it answers for, in shared memory.

Written only by the owning frontend, mapped read-only by engines and the coordinator. It holds all that is
needed to run a request again from where its client stands: parameters, prompt, seed, epoch, owner and the
output accepted so far with its logprobs. Space for the whole of max_tokens is reserved at admission.

A slot is nine u64 words:

    0  request id
    1  epoch << 32 | owner << 16 | state      (one aligned store commits all three)
    2  output tokens accepted
    3  params offset << 32 | params length, bytes
    4  prompt offset << 32 | prompt length, tokens
    5  output offset << 32 | output capacity, tokens
    6  logprobs offset << 32 | bytes of one token's logprob record (0: none)
    7  incarnation of the owner
    8  priority as it is now, two's complement (params hold what it was at admission)

Offsets count from the start of the segment, in bytes. Prompt and output are u32 arrays. A logprob record is
f32 of the chosen token, then (u32 id, f32 logprob) for each alternative; unused alternatives have id 2^32-1.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence
from enum import IntEnum

from daemon.ipc.arena import ALIGN, Arena, rounded
from daemon.ipc.messages import RequestParams, TokenLogprobs, decode_params, encode

SLOT_WORDS = 9
_NO_TOKEN = 0xFFFFFFFF
_U64 = (1 << 64) - 1


class SlotState(IntEnum):
    """FREE may be reused; LIVE is answered for; CLOSED has ended and only waits to be freed."""

    FREE = 0
    LIVE = 1
    CLOSED = 2


class JournalFull(Exception):
    """No slot or no contiguous space for the request's reservation."""


class JournalTooSmall(Exception):
    """The reservation exceeds what an empty journal has."""


def slots_for(size: int) -> int:
    """Slots in a journal segment of `size` bytes: one for each 4 KiB, so that space runs out before slots do."""
    return size // (4 << 10)


class JournalView:
    """Read access to a journal: engines and the coordinator."""

    def __init__(self, view: memoryview) -> None:
        self._view = view
        self.num_slots = slots_for(len(view))
        self._words = view[: self.num_slots * SLOT_WORDS * 8].cast("Q")
        self._u32 = view[: len(view) & -4].cast("I")

    def rid(self, slot: int) -> int:
        """Request in the slot (meaningful unless FREE)."""
        return int(self._words[slot * SLOT_WORDS])

    def epoch(self, slot: int) -> int:
        return int(self._words[slot * SLOT_WORDS + 1]) >> 32

    def owner(self, slot: int) -> tuple[int, int]:
        """(engine index, its incarnation) that the frontend has given the request to."""
        base = slot * SLOT_WORDS
        return int(self._words[base + 1]) >> 16 & 0xFFFF, int(self._words[base + 7])

    def state(self, slot: int) -> SlotState:
        return SlotState(self._words[slot * SLOT_WORDS + 1] & 0xFFFF)

    def num_output(self, slot: int) -> int:
        return int(self._words[slot * SLOT_WORDS + 2])

    def priority(self, slot: int) -> int:
        """The request's class as it is now; `params` has the one it came with."""
        word = int(self._words[slot * SLOT_WORDS + 8])
        return word - (word >> 63 << 64)

    def prompt_len(self, slot: int) -> int:
        return int(self._words[slot * SLOT_WORDS + 4]) & 0xFFFFFFFF

    def params(self, slot: int) -> RequestParams:
        offset, length = self._pair(slot, 3)
        return decode_params(self._view[offset : offset + length])

    def prompt(self, slot: int) -> list[int]:
        return self._tokens(slot, 4, self.prompt_len(slot))

    def output(self, slot: int, start: int = 0) -> list[int]:
        """Accepted output tokens from position `start` on."""
        offset, _ = self._pair(slot, 5)
        return self._u32[offset // 4 + start : offset // 4 + self.num_output(slot)].tolist()

    def logprobs(self, slot: int, position: int) -> TokenLogprobs | None:
        """Logprobs of the accepted output token at `position`; None where the request asked for none."""
        offset, record = self._pair(slot, 6)
        if not record:
            return None
        return _unpack_logprobs(self._view[offset + position * record : offset + (position + 1) * record])

    def live_slots(self) -> list[int]:
        live = int(SlotState.LIVE)
        states = self._words[1::SLOT_WORDS].tolist()  # one look for all: this is on the way of every status
        return [slot for slot, word in enumerate(states) if word & 0xFFFF == live]

    def _pair(self, slot: int, word: int) -> tuple[int, int]:
        value = int(self._words[slot * SLOT_WORDS + word])
        return value >> 32, value & 0xFFFFFFFF

    def _tokens(self, slot: int, word: int, count: int) -> list[int]:
        offset, _ = self._pair(slot, word)
        return self._u32[offset // 4 : offset // 4 + count].tolist()


class Journal(JournalView):
    """The owning frontend's journal. Begins empty: what a predecessor left is forgotten."""

    def __init__(self, view: memoryview) -> None:
        super().__init__(view)
        self._arena = rounded(self.num_slots * SLOT_WORDS * 8)
        self._capacity = len(view) - self._arena & -ALIGN
        self._extents = Arena(self._capacity)
        for slot in range(self.num_slots):
            self._words[slot * SLOT_WORDS + 1] = SlotState.FREE
        self._free_slots = list(range(self.num_slots - 1, -1, -1))
        self._held: dict[int, tuple[int, int]] = {}  # slot -> extent

    def open(self, rid: int, params: RequestParams, prompt: Sequence[int]) -> int:
        """Record a request and reserve all the space it can need. Returns its slot, without owner, at epoch 0.

        Raises JournalFull (try again later) or JournalTooSmall (never).
        """
        sampling = params.sampling
        blob = encode(params)
        record = 0 if sampling.logprobs < 0 else 4 + 8 * sampling.logprobs
        tokens_at = rounded(len(blob))
        output_at = tokens_at + 4 * len(prompt)
        logprobs_at = output_at + 4 * sampling.max_tokens
        size = logprobs_at + record * sampling.max_tokens
        slot, start = self._reserve(size)
        at = self._arena + start
        self._view[at : at + len(blob)] = blob
        packed = prompt if isinstance(prompt, array) and prompt.typecode == "I" else array("I", prompt)
        self._view[at + tokens_at : at + output_at] = packed.tobytes()
        base = slot * SLOT_WORDS
        self._words[base] = rid
        self._words[base + 2] = 0
        self._words[base + 3] = at << 32 | len(blob)
        self._words[base + 4] = at + tokens_at << 32 | len(prompt)
        self._words[base + 5] = at + output_at << 32 | sampling.max_tokens
        self._words[base + 6] = at + logprobs_at << 32 | record
        self._words[base + 7] = 0
        self._words[base + 8] = params.priority & _U64
        self._words[base + 1] = 0xFFFF << 16 | SlotState.LIVE
        return slot

    def assign(self, slot: int, epoch: int, engine: int, incarnation: int) -> None:
        """Give the request to an engine at `epoch`: one store decides."""
        base = slot * SLOT_WORDS
        self._words[base + 7] = incarnation
        self._words[base + 1] = epoch << 32 | engine << 16 | SlotState.LIVE

    def reprioritise(self, slot: int, priority: int) -> None:
        """Give the request another class, with one store."""
        self._words[slot * SLOT_WORDS + 8] = priority & _U64

    def append(self, slot: int, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs | None] | None) -> None:
        """Accept output tokens: written first, then counted with one store. ValueError past the reservation."""
        n = self.num_output(slot)
        offset, capacity = self._pair(slot, 5)
        if n + len(tokens) > capacity:
            raise ValueError(f"request {self.rid(slot)} outgrows its {capacity} tokens")
        base = offset // 4 + n
        for i, token in enumerate(tokens):
            self._u32[base + i] = token
        if logprobs is not None:
            self._write_logprobs(slot, n, logprobs)
        self._words[slot * SLOT_WORDS + 2] = n + len(tokens)

    def close(self, slot: int) -> None:
        """The request has ended; free its slot and space."""
        base = slot * SLOT_WORDS
        self._words[base + 1] = self._words[base + 1] & ~0xFFFF | SlotState.CLOSED
        self._extents.free(*self._held.pop(slot))
        self._words[base + 1] = SlotState.FREE
        self._free_slots.append(slot)

    @property
    def free_bytes(self) -> int:
        return self._extents.free_bytes

    def _reserve(self, size: int) -> tuple[int, int]:
        if size > self._capacity:
            raise JournalTooSmall(f"the request needs {size} bytes of journal, journal_memory gives {self._capacity}")
        start = self._extents.allocate(size) if self._free_slots else None
        if start is None:
            raise JournalFull("the journal has no room for another request")
        slot = self._free_slots.pop()
        self._held[slot] = (start, size)
        return slot, start

    def _write_logprobs(self, slot: int, position: int, logprobs: Sequence[TokenLogprobs | None]) -> None:
        offset, record = self._pair(slot, 6)
        if not record:
            return
        for i, entry in enumerate(logprobs):
            at = offset + (position + i) * record
            self._view[at : at + record] = _pack_logprobs(entry, record)


def _pack_logprobs(entry: TokenLogprobs | None, record: int) -> bytes:
    if entry is None:
        entry = TokenLogprobs(float("nan"), [], [])
    packed = struct.pack("<f", entry.logprob)
    for token, logprob in zip(entry.top_ids, entry.top_logprobs, strict=True):
        packed += struct.pack("<If", token, logprob)
    unused = (record - len(packed)) // 8
    return packed + struct.pack("<If", _NO_TOKEN, 0.0) * unused


def _unpack_logprobs(record: memoryview) -> TokenLogprobs:
    (chosen,) = struct.unpack_from("<f", record)
    top = [t for t in struct.iter_unpack("<If", record[4:]) if t[0] != _NO_TOKEN]
    return TokenLogprobs(chosen, [t[0] for t in top], [t[1] for t in top])
