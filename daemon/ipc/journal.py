"""The journal: one frontend's record of all its requests, in shared memory.

Only the owning frontend writes it; engines and the coordinator map it read-only. It contains everything that another
engine needs to continue a request from the last token that the frontend has accepted: parameters, prompt, seed,
epoch, owner and the accepted output with its logprobs. At admission it reserves the space for all of max_tokens.

A slot is nine u64 words:

    0  request id
    1  epoch << 32 | owner << 16 | state      (one aligned store commits all three)
    2  output tokens accepted
    3  params offset << 32 | params length, bytes
    4  prompt offset << 32 | prompt length, tokens
    5  output offset << 32 | output capacity, tokens
    6  logprobs offset << 32 | bytes of one token's logprob record (0: none)
    7  incarnation of the owner
    8  priority as it is now, two's complement (params contain the priority at admission)

Offsets count from the start of the segment, in bytes. Prompt and output are u32 arrays. A logprob record is
f32 of the chosen token, then (u32 id, f32 logprob) for each alternative; unused alternatives have id 2^32-1.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

from daemon.ipc.arena import ALIGN, Arena, rounded
from daemon.ipc.messages import RequestParams, TokenLogprobs, decode_params, encode

SLOT_WORDS = 9
_NO_TOKEN = 0xFFFFFFFF
_U64 = (1 << 64) - 1


class SlotState(IntEnum):
    """FREE: can be reused; LIVE: belongs to a request; CLOSED: the request has ended, the slot is being freed."""

    FREE = 0
    LIVE = 1
    CLOSED = 2


class JournalFull(Exception):
    """There is no free slot or no contiguous space for the request's reservation now."""


class JournalTooSmall(Exception):
    """The reservation does not fit an empty journal."""


def slots_for(size: int) -> int:
    """Return the number of slots in a journal of `size` bytes: one per 4 KiB, so that space runs out before slots."""
    return size // (4 << 10)


class Layout(NamedTuple):
    """Where the parts of a request are in its reservation, and how large it is. In bytes."""

    tokens_at: int
    output_at: int
    logprobs_at: int
    record: int  # of one token's logprobs
    size: int


def layout(params_len: int, prompt_len: int, max_tokens: int, logprobs: int) -> Layout:
    """Lay out a reservation. `params_len` in bytes; `logprobs` as in `SamplingParams`."""
    record = 0 if logprobs < 0 else 4 + 8 * logprobs
    tokens_at = rounded(params_len)
    output_at = tokens_at + 4 * prompt_len
    logprobs_at = output_at + 4 * max_tokens
    return Layout(tokens_at, output_at, logprobs_at, record, logprobs_at + record * max_tokens)


class JournalView:
    """Read access to a journal, for engines and the coordinator."""

    def __init__(self, view: memoryview) -> None:
        self._view = view
        self.num_slots = slots_for(len(view))
        self._words = view[: self.num_slots * SLOT_WORDS * 8].cast("Q")
        self._u32 = view[: len(view) & -4].cast("I")

    def rid(self, slot: int) -> int:
        """Return the request id in the slot (meaningless if it is FREE)."""
        return int(self._words[slot * SLOT_WORDS])

    def epoch(self, slot: int) -> int:
        return int(self._words[slot * SLOT_WORDS + 1]) >> 32

    def owner(self, slot: int) -> tuple[int, int]:
        """Return (engine index, its incarnation) of the request's owner."""
        base = slot * SLOT_WORDS
        return int(self._words[base + 1]) >> 16 & 0xFFFF, int(self._words[base + 7])

    def state(self, slot: int) -> SlotState:
        return SlotState(self._words[slot * SLOT_WORDS + 1] & 0xFFFF)

    def num_output(self, slot: int) -> int:
        return int(self._words[slot * SLOT_WORDS + 2])

    def priority(self, slot: int) -> int:
        """Return the current priority; `params` contains the one at admission."""
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
        """Return the accepted output tokens from position `start` on."""
        offset, _ = self._pair(slot, 5)
        return self._u32[offset // 4 + start : offset // 4 + self.num_output(slot)].tolist()

    def logprobs(self, slot: int, position: int) -> TokenLogprobs | None:
        """Return the logprobs of the accepted output token at `position`; None if the request asked for none."""
        offset, record = self._pair(slot, 6)
        if not record:
            return None
        return _unpack_logprobs(self._view[offset + position * record : offset + (position + 1) * record])

    def live_slots(self) -> list[int]:
        """Return the slots of all LIVE requests."""
        live = int(SlotState.LIVE)
        states = self._words[1::SLOT_WORDS].tolist()  # one bulk read: every status request calls this
        return [slot for slot, word in enumerate(states) if word & 0xFFFF == live]

    def _pair(self, slot: int, word: int) -> tuple[int, int]:
        value = int(self._words[slot * SLOT_WORDS + word])
        return value >> 32, value & 0xFFFFFFFF

    def _tokens(self, slot: int, word: int, count: int) -> list[int]:
        offset, _ = self._pair(slot, word)
        return self._u32[offset // 4 : offset // 4 + count].tolist()


class Journal(JournalView):
    """The owning frontend's journal. It starts empty: it discards the content that a predecessor has left."""

    def __init__(self, view: memoryview) -> None:
        super().__init__(view)
        self._arena_offset = rounded(self.num_slots * SLOT_WORDS * 8)
        self._capacity = len(view) - self._arena_offset & -ALIGN
        self._arena = Arena(self._capacity)
        for slot in range(self.num_slots):
            self._words[slot * SLOT_WORDS + 1] = SlotState.FREE
        self._free_slots = list(range(self.num_slots - 1, -1, -1))
        self._reserved: dict[int, tuple[int, int]] = {}  # slot -> extent

    def open(self, rid: int, params: RequestParams, prompt: Sequence[int]) -> int:
        """Record a request, reserve all the space it can need and return its slot, at epoch 0 and without an owner.

        Raises JournalFull (a later try can succeed) or JournalTooSmall (no try can succeed).
        """
        sampling = params.sampling
        blob = encode(params)
        tokens_at, output_at, logprobs_at, record, size = layout(
            len(blob), len(prompt), sampling.max_tokens, sampling.logprobs
        )
        slot, start = self._reserve(size)
        at = self._arena_offset + start
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
        """Make an engine the owner at `epoch`; one aligned store commits both."""
        base = slot * SLOT_WORDS
        self._words[base + 7] = incarnation
        self._words[base + 1] = epoch << 32 | engine << 16 | SlotState.LIVE

    def reprioritise(self, slot: int, priority: int) -> None:
        """Change the priority of the request with one store."""
        self._words[slot * SLOT_WORDS + 8] = priority & _U64

    def append(self, slot: int, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs | None] | None) -> None:
        """Append accepted output tokens: write them, then commit their number with one store.

        Raises ValueError if they exceed the reservation.
        """
        n = self.num_output(slot)
        offset, capacity = self._pair(slot, 5)
        if n + len(tokens) > capacity:
            raise ValueError(f"request {self.rid(slot)} exceeds its reservation of {capacity} tokens")
        base = offset // 4 + n
        for i, token in enumerate(tokens):
            self._u32[base + i] = token
        if logprobs is not None:
            self._write_logprobs(slot, n, logprobs)
        self._words[slot * SLOT_WORDS + 2] = n + len(tokens)

    def close(self, slot: int) -> None:
        """Free the slot and the space of a request that has ended."""
        base = slot * SLOT_WORDS
        self._words[base + 1] = self._words[base + 1] & ~0xFFFF | SlotState.CLOSED
        self._arena.free(*self._reserved.pop(slot))
        self._words[base + 1] = SlotState.FREE
        self._free_slots.append(slot)

    @property
    def free_bytes(self) -> int:
        return self._arena.free_bytes

    def reserved_bytes(self, slot: int) -> int:
        """Return how much of `free_bytes` the request in the slot has taken."""
        return rounded(self._reserved[slot][1])

    def _reserve(self, size: int) -> tuple[int, int]:
        if size > self._capacity:
            raise JournalTooSmall(f"the request needs {size} bytes of journal, journal_memory has {self._capacity}")
        start = self._arena.allocate(size) if self._free_slots else None
        if start is None:
            raise JournalFull("the journal has no room for another request")
        slot = self._free_slots.pop()
        self._reserved[slot] = (start, size)
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
